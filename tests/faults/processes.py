"""Runs of several processes, one of which is killed: what is there is whole, and another number of them goes on."""

from __future__ import annotations

import collections
import functools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tests.faults.damage import damage

from nnx.train.launch import launch

PROGRAM = Path(__file__).parents[1] / "sharding" / "program.py"
DEVICES = 4  # of all processes together
TIMEOUT = 400  # seconds: a life that hangs is one that has failed


class Life:
    """Processes that train together, on four devices whatever their number.

    Args:
        out: where they write what they have seen.
        saved: where they save.
        processes: how many.
        steps: when they end.
        fail_at: a step at which the second may not write.
    """

    def __init__(self, out: Path, saved: Path, *, processes: int, steps: int, fail_at: int = 0) -> None:
        self._out, self._processes = out, processes
        for file in out.glob("pid-*"):
            file.unlink()
        self._command = [sys.executable, str(PROGRAM), str(out), str(saved), str(steps), str(fail_at)]

    def end(self) -> int:
        """Let them run; the launcher's exit code."""
        return launch(self._command, self._processes, devices=DEVICES // self._processes, timeout=TIMEOUT)

    def kill(self, process: int, *, when: Callable[[], bool], delay: float = 0) -> int:
        """Let them run, and kill one some seconds after something is seen; the launcher's exit code."""
        over = threading.Event()

        def watch() -> None:
            pid = self._out / f"pid-{process}"
            while not over.is_set():
                if pid.exists() and pid.read_text() and when():
                    over.wait(delay)
                    if not over.is_set():
                        os.kill(int(pid.read_text()), signal.SIGKILL)
                    return
                time.sleep(0.0005)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            return self.end()
        finally:
            over.set()
            watcher.join()


def committed(saved: Path) -> list[int]:
    """The steps that count."""
    return sorted(int(folder.name) for folder in saved.glob("*") if folder.name.isdecimal())


def kills_of_processes(
    count: int, *, steps: int = 12, seed: int = 0, say: Callable[[str], None] = print, per_run: int = 6
) -> None:
    """Kill one of one, two or four processes so often in all, and have another number of them go on each time.

    What is restored has the bits of what was saved: each life looks at that itself.

    Args:
        count: the number of kills.
        steps: the steps of a run.
        seed: of the instants.
        say: told what happens.
        per_run: the kills of a run, at most.

    Raises:
        AssertionError: a life hung or failed, a committed step was lost, or the losses are others than those of a run
            that was left alone.
    """
    rng = random.Random(seed)
    phases: collections.Counter[str] = collections.Counter()
    damaged = runs = 0
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name, "whole")
        whole.mkdir()
        assert Life(whole, whole / "saved", processes=1, steps=steps).end() == 0
        expected = _losses(whole)
        while phases.total() < count:
            out = Path(name, f"run{runs}")
            out.mkdir()
            saved = out / "saved"
            losses: dict[str, float] = {}
            runs += 1
            for number in range(per_run + 1):
                known = committed(saved)
                pending = len(known) > 1 and rng.random() < 0.3
                if pending:
                    damage(saved / str(known[-1]), rng)
                    damaged += 1
                for file in out.glob("*.json"):
                    file.unlink()
                processes = rng.choice((1, 2, 4))
                life = Life(out, saved, processes=processes, steps=steps)
                if number == per_run or phases.total() == count:
                    code = life.end()
                else:
                    aim = rng.choice(("saving", "removing", "any"))
                    mark = {"saving": ".writing-*", "removing": ".removed-*", "any": "*"}[aim]
                    code = life.kill(
                        rng.randrange(processes),
                        when=functools.partial(_is_new, saved, mark, {path.name for path in saved.glob("*")}),
                        delay=rng.uniform(0, 0.15 if aim == "saving" else 0.01 if aim == "removing" else 1.0),
                    )
                assert code in (0, -signal.SIGKILL), code
                for file in out.glob("*-0.json"):
                    record = json.loads(file.read_text() or "{}")
                    if "from" in record and known:
                        assert record["from"] in (known[-2:] if pending else known[-1:]), (record["from"], known)
                    losses.update(record.get("losses", {}))
                now = committed(saved)
                assert not known or now[-1] >= known[-2 if pending else -1], (known, now)
                if code == 0:
                    break
                left = {path.name.rpartition("-")[0] for path in saved.glob(".*")}
                phases[f"{'a save' if '.writing' in left else 'other work'} of {processes}"] += 1
            np.testing.assert_allclose([losses[step] for step in expected], list(expected.values()), rtol=1e-5)
            say(f"{phases.total()} kills, {runs} runs, each with the losses of the run that was left alone")
    shown = ", ".join(f"{number} during {phase}" for phase, number in phases.most_common())
    say(f"{phases.total()} kills of {runs} runs of several processes: {shown}; {damaged} lives after damage")


def _is_new(saved: Path, mark: str, old: set[str]) -> bool:
    return any(path.name not in old for path in saved.glob(mark))


def _losses(out: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((out / "1-0.json").read_text())["losses"]
    return found
