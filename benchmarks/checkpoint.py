"""Saving and restoring: how long a step is held up, a whole save, a restore, against orbax's own manager."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import nnx
from benchmarks._measure import Options, Spread
from benchmarks._results import OURS, Result

ORBAX = "orbax"
ROUNDS = 5
CASES = {"400 MB in 100 arrays": (100, 1_000_000), "2,000 small arrays": (2_000, 64)}


def measure(options: Options) -> Iterator[Result]:
    """The same arrays, saved and restored in turn by both, each time into a directory of its own."""
    for name, (count, size) in CASES.items():
        value = {f"a{i:04}": jax.random.normal(jax.random.key(i), (size,)) for i in range(count)}
        jax.block_until_ready(value)
        seconds: dict[str, dict[str, list[float]]] = {}
        sides: dict[str, Callable[[Path, Any], dict[str, float]]] = {ORBAX: _orbax, OURS: _ours}
        for _ in range(min(options.rounds, ROUNDS)):
            for library, side in sides.items():
                folder = Path(tempfile.mkdtemp())
                try:
                    for what, taken in side(folder, value).items():
                        seconds.setdefault(what, {}).setdefault(library, []).append(taken)
                finally:
                    shutil.rmtree(folder)
        for what, taken in seconds.items():
            reference = taken.get(ORBAX, seconds["restore"][ORBAX])
            for library, samples in taken.items():
                ratio = Spread.of(np.array(samples) / np.array(reference))
                yield Result("checkpoint", f"{name}: {what}", library, Spread.of(samples).median, "s", ratio)


def _ours(folder: Path, value: Any) -> dict[str, float]:
    with nnx.Checkpointer(folder / "run", save_every=1) as checkpointer:
        start = time.perf_counter()
        checkpointer.save(1, value)
        held = time.perf_counter() - start
        checkpointer.wait()
        whole = time.perf_counter() - start
        like = jax.tree.map(jnp.zeros_like, value)
        found = {"the step is held up": held, "a whole save": whole}
        for name, verify in (("restore", True), ("restore, unverified", False)):
            start = time.perf_counter()
            jax.block_until_ready(checkpointer.restore(like=like, verify=verify).value)
            found[name] = time.perf_counter() - start
    return found


def _orbax(folder: Path, value: Any) -> dict[str, float]:
    # With the options that we take: by default it compresses, which parameters do not reward.
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
    with ocp.CheckpointManager(folder / "run", item_handlers=handler) as manager:
        start = time.perf_counter()
        manager.save(1, args=ocp.args.PyTreeSave(value))
        held = time.perf_counter() - start
        manager.wait_until_finished()
        whole = time.perf_counter() - start
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, value)
        arguments = ocp.args.PyTreeRestore(item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
        start = time.perf_counter()
        jax.block_until_ready(manager.restore(1, args=arguments))
        restored = time.perf_counter() - start
    return {"the step is held up": held, "a whole save": whole, "restore": restored}
