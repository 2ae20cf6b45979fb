"""Save, get killed, resume: `python -m nnx.examples.checkpointing`.

A run is killed without warning (SIGKILL) again and again, and started again each time. In the end it is compared with
one that nobody interrupted: parameters, optimizer, random keys, the order of the data and every logged loss are the
same, bit by bit.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnx
from nnx.examples._common import new_figure, options_of, save_figure
from nnx.examples.data import load_digits

__all__ = ["main", "train"]


class Classifier(nnx.Module):
    """[batch, 64] pixels to [batch, 10] logits."""

    def __init__(self, *, ctx: nnx.Context) -> None:
        self.hidden = nnx.Linear(64, 64, ctx=ctx)
        self.norm = nnx.BatchNorm(64, ctx=ctx)
        self.dropout = nnx.Dropout(0.3)
        self.out = nnx.Linear(64, 10, ctx=ctx)

    def __call__(self, x: jax.Array, *, ctx: nnx.Context) -> jax.Array:
        """Apply the network."""
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x), ctx=ctx)), ctx=ctx))


@nnx.jit
def train_step(state: dict[str, nnx.Module], batch: dict[str, jax.Array], ctx: nnx.Context) -> dict[str, jax.Array]:
    """One step of Adam."""

    def loss_fn(model: nnx.Module, ctx: nnx.Context) -> jax.Array:
        logits = model(batch["image"], ctx=ctx)  # type: ignore[operator]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(state["model"], ctx)
    state["optimizer"].update(state["model"], grads)  # type: ignore[attr-defined]
    return {"loss": loss}


def train(out: Path, steps: int, seed: int, pause: float = 0.0) -> int:
    """Train, or go on where the last process was killed.

    Args:
        out: the directory of checkpoints and log.
        steps: how many steps the whole run has.
        seed: of all randomness.
        pause: seconds to wait after each step, so that a kill meets the middle of a run.

    Returns:
        The step that was reached.
    """
    digits = load_digits()
    data = {"image": digits.train_images.reshape(-1, 64), "label": digits.train_labels}
    model = Classifier(ctx=nnx.context(seed))
    state = {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-3))}
    ctx = nnx.context(dropout=seed, flags={"deterministic": False, "use_running_average": False})

    def paused(*args: object) -> dict[str, jax.Array]:
        time.sleep(pause)
        return train_step(*args)  # type: ignore[arg-type]

    with nnx.Checkpointer(out / "checkpoints", save_every=10, keep_last=2) as checkpointer:
        result = nnx.fit(
            paused,
            state,
            nnx.ArrayLoader(data, 64, seed=seed),
            steps=steps,
            context=ctx,
            checkpointer=checkpointer,
            log_every=1,
            loggers=[nnx.JSONLinesLogger(out / "log.jsonl")],
            progress=False,
        )
    arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in _named(state, ctx).items()}
    np.savez(out / "final.npz", **arrays)
    return result.step


def _named(state: dict[str, nnx.Module], ctx: nnx.Context) -> dict[str, jax.Array]:
    """Every array of the run by name, random keys as their data."""
    parts = {**{name: module.get_state() for name, module in state.items()}, "ctx": ctx.partition()[0]}
    leaves = jax.tree_util.tree_leaves_with_path(parts)
    return {
        jax.tree_util.keystr(path): jax.random.key_data(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for path, leaf in leaves
    }


def _start(out: Path, options: object) -> subprocess.Popen[bytes]:
    words = ["--steps", options.steps, "--seed", options.seed, "--out", out, "--pause", options.pause]  # type: ignore[attr-defined]
    command = [sys.executable, "-m", "nnx.examples.checkpointing", "--child", *map(str, words)]
    return subprocess.Popen(command)  # noqa: S603 - it starts the interpreter that it runs on


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 1 if the two runs differ."""
    options = options_of(
        "checkpointing",
        "Kill a run again and again, resume it each time, and compare it with one that nobody interrupted.",
        arguments,
        steps=150,
        kills={"type": int, "default": 5, "help": "how often to kill it (default: %(default)s)"},
        pause={"type": float, "default": 0.02, "help": "seconds to wait after each step (default: %(default)s)"},
        child={"action": "store_true", "help": "train in this process, as the killed ones do"},
    )
    if options.child:
        train(options.out, options.steps, options.seed, options.pause)
        return 0
    killed, whole = options.out / "killed", options.out / "whole"
    for folder in (killed, whole):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    rng = np.random.default_rng(options.seed)
    reached = []
    for _ in range(options.kills):
        process = _start(killed, options)
        log, before = killed / "log.jsonl", _last_step(killed / "log.jsonl")
        # Not before it has taken a step of its own: what is to be killed is a run, and not the import of JAX.
        while process.poll() is None and _last_step(log) <= before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3 * options.steps * options.pause))
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached.append(_last_step(log))
        print(f"killed at step {reached[-1]}")
    for folder in (killed, whole):
        if _start(folder, options).wait():
            return 1
    same = _compare(killed, whole)
    _draw(options.out, reached)
    print("the same, bit by bit" if same else "they differ")
    return 0 if same else 1


def _rows(log: Path) -> list[dict[str, float]]:
    lines = log.read_text().splitlines() if log.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the line that a kill has cut
            break
    return rows


def _last_step(log: Path) -> int:
    rows = _rows(log)
    return int(rows[-1]["step"]) if rows else 0


def _losses(folder: Path) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in _rows(folder / "log.jsonl")]


def _compare(killed: Path, whole: Path) -> bool:
    same = _losses(killed) == _losses(whole)
    print(f"{len(_losses(whole))} logged losses: {'equal' if same else 'different'}")
    with np.load(killed / "final.npz") as first, np.load(whole / "final.npz") as second:
        different = [name for name in second if first[name].tobytes() != second[name].tobytes()]
        print(f"{len(second.files)} arrays: {'equal' if not different else 'different: ' + ', '.join(different)}")
    return same and not different


def _draw(out: Path, reached: Sequence[int]) -> None:
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    for name, width in (("whole", 5), ("killed", 1.5)):
        axes.plot(*zip(*_losses(out / name), strict=True), linewidth=width, alpha=0.7, label=name)
    for i, step in enumerate(reached):
        axes.axvline(step, color="black", linestyle=":", linewidth=1, label="a kill" if i == 0 else None)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    save_figure(figure, out / "report.png")


if __name__ == "__main__":
    sys.exit(main())
