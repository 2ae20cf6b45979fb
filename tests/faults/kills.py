"""SIGKILL at random instants, always resumed: the run that is killed again and again is the run that is not."""

from __future__ import annotations

import collections
import json
import multiprocessing
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.damage import damage

# What to wait for before the last random delay, and how long that may be, in seconds.
INSTANTS = {"any": 5.0, "training": 0.04, "saving": 0.03, "deleting": 0.004, "damaged": 0.05}


class Life:
    """A process that trains. Each is forked from one that has imported everything and computed nothing."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._output = folder.with_suffix(".out")
        self._output.unlink(missing_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.faults.program"])
        self._process: Any = context.Process(target=_live, args=(folder, steps, self._output, folder.parent / "cache"))
        self._process.start()

    def ended(self) -> bool:
        """Whether it is over."""
        return self._process.exitcode is not None

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def join(self) -> tuple[int, str]:
        """Its exit code, and what it printed."""
        self._process.join(600)
        return self._process.exitcode, self._output.read_text() if self._output.exists() else ""


def _live(*args: Any) -> None:
    from tests.faults.program import live

    live(*args)


def committed(folder: Path) -> list[int]:
    """The steps that count."""
    return sorted(int(f.name) for f in (folder / "run").glob("*") if f.name.isdecimal())


def wait_for(life: Life, seen: Callable[[], bool]) -> None:
    """Until something is seen, or the life has ended."""
    while not life.ended() and not seen():
        time.sleep(0.0005)


def kill_once(folder: Path, steps: int, instant: str, rng: random.Random) -> tuple[bool, str, str]:
    """A life that is killed, unless it is done before.

    Returns:
        Whether it was killed, what it printed, and what was under way, by what it has left.
    """
    root = folder / "run"
    old = {path.name for path in root.glob("*")} if root.exists() else set()
    life = Life(folder, steps)
    if instant == "training":
        log = folder / "log.jsonl"
        before = log.read_bytes() if log.exists() else b""
        wait_for(life, lambda: log.exists() and log.read_bytes() != before)
        lines = log.read_bytes().count(b"\n") + rng.randint(0, 8) if log.exists() else 0
        wait_for(life, lambda: log.read_bytes().count(b"\n") >= lines)
    elif instant != "any":
        mark = {"saving": ".writing-*", "deleting": ".removed-*", "damaged": "corrupt-*"}[instant]
        wait_for(life, lambda: any(path.name not in old for path in root.glob(mark)))
    time.sleep(rng.uniform(0, INSTANTS[instant]))
    life.kill()
    code, out = life.join()
    if code == 0:
        return False, out, "done"
    assert code == -signal.SIGKILL, (code, out[-3000:])
    left = {path.name.rpartition("-")[0] for path in root.glob("*")} if root.exists() else set()
    phase = "a save" if ".writing" in left else "a removal" if ".removed" in left else "training"
    if "ready" not in out:
        phase = "the start"
    elif instant == "damaged" and not _trained(out):
        phase = "a restore after damage"
    return True, out, phase


def run_to_the_end(folder: Path, steps: int) -> tuple[str, dict[str, str]]:
    """A life that is left alone: what it printed, and the digests of its end."""
    code, out = Life(folder, steps).join()
    assert code == 0, out[-3000:]
    return out, json.loads(out.splitlines()[-1].removeprefix("end "))


def _trained(out: str) -> bool:
    return any(line.startswith("step ") for line in out.splitlines())


def check_resumed(out: str, known: list[int], *, damaged: bool) -> None:
    """A life begins at the newest step that counted before it, or at the one before if that one was damaged."""
    resumed = [int(line.split()[1]) for line in out.splitlines() if line.startswith("resumed")]
    if not resumed and not _trained(out):
        return  # killed before
    allowed = (known[-2:] if damaged else known[-1:]) or [0]
    assert len(resumed) == 1, (out, known)
    assert resumed[0] in allowed, (out, known)


def kills(count: int, *, steps: int = 40, per_run: int = 12, seed: int = 0, say: Callable[[str], None] = print) -> None:
    """Kill runs so often in all, and compare each one's end with that of a run that was left alone.

    Args:
        count: the number of kills.
        steps: the steps of a run.
        per_run: the kills of a run, at most.
        seed: of the instants.
        say: told what happens.

    Raises:
        AssertionError: a committed step was lost, the newest could not be read, or an end differs in any bit.
    """
    rng = random.Random(seed)
    phases: collections.Counter[str] = collections.Counter()
    damaged_lives = runs = 0
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name, "whole")
        _, expected = run_to_the_end(whole, steps)
        log = (whole / "log.jsonl").read_bytes()
        while sum(phases.values()) < count:
            folder = Path(name, f"run{runs}")
            runs += 1
            pending = False  # whether the newest was damaged, and nobody has looked at it yet
            for _ in range(min(per_run, count - sum(phases.values()))):
                known = committed(folder)
                choices = ["any", "training", "saving", "saving", "deleting"]
                instant = rng.choice([*choices, "damaged"] if len(known) > 1 else choices)
                if instant == "damaged":
                    damage(folder / "run" / str(known[-1]), rng)
                    damaged_lives += 1
                    pending = True
                killed, out, phase = kill_once(folder, steps, instant, rng)
                check_resumed(out, known, damaged=pending)
                now = committed(folder)
                if known and not pending:
                    assert now, "nothing is left"
                    assert now[-1] >= known[-1], (known, now)
                pending = pending and "resumed" not in out
                if not killed:
                    break
                phases[phase] += 1
            known = committed(folder)
            out, found = run_to_the_end(folder, steps)
            check_resumed(out, known, damaged=pending)
            assert found == expected, {
                part: (found[part], expected[part]) for part in expected if found[part] != expected[part]
            }
            assert (folder / "log.jsonl").read_bytes() == log, "the logs differ"
            say(f"{sum(phases.values())} kills, {runs} runs, each one's end that of the run that was left alone")
            shutil.rmtree(folder)
    shown = ", ".join(f"{number} during {phase}" for phase, number in phases.most_common())
    say(f"{sum(phases.values())} kills of {runs} runs: {shown}; {damaged_lives} after damage to the newest checkpoint")
    say("no committed step lost, no newest unreadable; parameters, optimizer, keys, order of data and logs are equal")
