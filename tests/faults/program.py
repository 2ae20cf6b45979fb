"""The run that is killed: trains for so many steps, going on from what its folder holds.

It has whatever a run keeps: parameters, running averages, an optimizer's moments, an average of the parameters, random
streams, the order of the data and a log. At its end it prints a digest of all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint  # noqa: F401 - once for all lives, which are forked from one process
import tqdm

import nnx

SAVE_EVERY = 2


class Net(nnx.Module):
    """Large enough that a save takes as long as some steps."""

    def __init__(self, *, ctx: nnx.Context) -> None:
        self.first = nnx.Linear(16, 256, ctx=ctx)
        self.norm = nnx.BatchNorm(256, ctx=ctx)
        self.dropout = nnx.Dropout(0.1)
        self.second = nnx.Linear(256, 256, ctx=ctx)
        self.last = nnx.Linear(256, 4, ctx=ctx)

    def __call__(self, x: jax.Array, *, ctx: nnx.Context) -> jax.Array:
        x = nnx.relu(self.norm(self.first(x), ctx=ctx))
        return self.last(nnx.relu(self.second(self.dropout(x, ctx=ctx))))


@nnx.jit
def train(state: Any, batch: Any, ctx: nnx.Context) -> dict[str, jax.Array]:
    """One step."""
    model, optimizer, ema = state["model"], state["optimizer"], state["ema"]

    def loss_fn(model: Net, ctx: nnx.Context) -> jax.Array:
        logits = model(batch["x"] + 0.1 * jax.random.normal(ctx.make_rng("noise"), batch["x"].shape), ctx=ctx)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model, ctx)
    optimizer.update(model, grads)
    ema.update(model)
    # Which examples were seen, in which order.
    return {"loss": loss, "batch": (batch["index"] * jnp.arange(1, 9)).sum()}


def digest(value: Any) -> str:
    """A digest of every bit of a value."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def live(folder: Path, steps: int, output: Path, cache: Path) -> None:
    """A life: train, saying to a file where it begins, what was logged, and at the end what all came to.

    Args:
        folder: of the run.
        steps: when it ends.
        output: the file.
        cache: keeps compiled functions from life to life, for the sake of time.
    """
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a kill would leave behind
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 16)).astype(np.float32)
    data = {"x": x, "y": x[:, :4].argmax(axis=1), "index": np.arange(256)}
    loader = nnx.ArrayLoader(data, 8, seed=0, epochs=None)
    model = Net(ctx=nnx.context(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2))
    state = {"model": model, "optimizer": optimizer, "ema": nnx.EMA(model, decay=0.9)}
    ctx = nnx.context(noise=1, dropout=2, flags={"deterministic": False, "use_running_average": False})

    class Told(nnx.JSONLinesLogger):
        def resume(self, step: int) -> None:
            print("resumed", step, flush=True)
            super().resume(step)

        def log(self, step: int, values: Any) -> None:
            super().log(step, values)
            print("step", step, flush=True)

    with nnx.Checkpointer(folder / "run", save_every=SAVE_EVERY, keep_last=2, keep_best=1) as checkpointer:
        print("ready", flush=True)
        nnx.fit(
            train,
            state,
            loader,
            steps=steps,
            context=ctx,
            checkpointer=checkpointer,
            log_every=1,
            loggers=[Told(folder / "log.jsonl")],
            progress=False,
        )
    parts = {name: digest(part.get_state()) for name, part in state.items()}
    parts["keys"] = digest([ctx.make_rng(name) for name in ("noise", "dropout")])
    parts["data"] = hashlib.sha256(json.dumps(loader.get_state()).encode()).hexdigest()
    print("end", json.dumps(parts), flush=True)
