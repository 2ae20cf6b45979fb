"""Random damage to a checkpoint, and what comes out of it: never a value that is silently wrong."""

from __future__ import annotations

import collections
import os
import random
import shutil
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import nnx

KINDS = ("flip", "flip many", "zero a block", "truncate", "remove", "empty a folder", "swap")
PARTS = ("data", "manifest", "orbax's files")


def files_of(folder: Path, part: str) -> list[Path]:
    """The files of a checkpoint that hold arrays, our manifest, or what orbax notes of the arrays."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    manifest = [path for path in files if path.name == "nnx_manifest.json"]
    data = [path for path in files if path.parent.name == "d"]
    return {"data": data, "manifest": manifest}.get(part) or [f for f in files if f not in data + manifest]


def damage(folder: Path, rng: random.Random, part: str | None = None, kind: str | None = None) -> str:
    """Damage a checkpoint.

    Args:
        folder: that of the step.
        rng: decides what is not given.
        part: one of `PARTS`.
        kind: one of `KINDS`.

    Returns:
        What was done, in words.
    """
    file = rng.choice(files_of(folder, part or rng.choice(PARTS)))
    kind = kind or rng.choice(KINDS)
    content = bytearray(file.read_bytes())
    if kind in ("flip", "flip many"):
        for _ in range(1 if kind == "flip" else rng.randint(2, 50)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif kind == "zero a block":
        start = rng.randrange(len(content))
        end = min(len(content), start + rng.choice((16, 512, 4096)))
        content[start:end] = bytes(end - start)
        file.write_bytes(content)
    elif kind == "truncate":
        os.truncate(file, rng.randrange(len(content)))
    elif kind == "remove":
        file.unlink()
    elif kind == "empty a folder":
        for entry in list(file.parent.iterdir()):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    else:  # the file of another step, whole in itself
        others = [path for path in folder.parent.glob(f"*/{file.relative_to(folder)}") if path != file]
        # What holds arrays has another name in each step.
        others = others or files_of(next(f for f in folder.parent.iterdir() if f.is_dir() and f != folder), "data")
        shutil.copyfile(rng.choice(others), file)
    return f"{kind}: {file.relative_to(folder)}"


def value(step: int) -> dict[str, object]:
    """What is saved: arrays of both ways of storing, a key, a number; every bit depends on the step."""
    rng = np.random.default_rng(step)
    return {
        "large": jnp.asarray(rng.normal(size=40_000).astype(np.float32)),
        "small": [jnp.asarray(rng.normal(size=50).astype(np.float32)) for _ in range(4)],
        "half": jnp.asarray(rng.normal(size=40_000)).astype(jnp.bfloat16),
        "key": jax.random.key(step),
        "number": step,
    }


def bits(tree: object) -> list[bytes]:
    """Every bit of a value."""
    return [
        np.asarray(
            jax.random.key_data(leaf) if getattr(leaf, "dtype", None) == jax.random.key(0).dtype else leaf
        ).tobytes()
        for leaf in jax.tree.leaves(tree)
    ]


def damages(count: int, seed: int = 0) -> collections.Counter[str]:
    """Damage the newest of two checkpoints, again and again, and restore.

    Returns:
        How often what came out.

    Raises:
        AssertionError: a value was restored that was not saved; or a run could not go on.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name, "whole")
        with nnx.Checkpointer(whole, save_every=1) as checkpointer:
            for step in (1, 2):
                checkpointer.save(step, value(step), context=nnx.context(noise=step))
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            root = Path(name, "damaged")
            shutil.copytree(whole, root)
            done = damage(root / "2", rng)
            context = nnx.context(noise=0)
            with nnx.Checkpointer(root, save_every=1) as checkpointer, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                restored = checkpointer.restore(like=value(0), context=context)
                assert restored.step in (1, 2), done
                assert bits(restored.value) == bits(value(restored.step)), (number, done)
                expected = nnx.context(noise=restored.step).make_rng("noise")
                assert bits(context.make_rng("noise")) == bits(expected), (number, done)
                said = [w for w in caught if w.category is nnx.CheckpointWarning]
                assert len(said) == (restored.step == 1), (number, done)
                if restored.step == 1:
                    # Put aside, and out of the way of the run that goes on.
                    assert checkpointer.save(2, value(2))
                    assert bits(checkpointer.restore(2, like=value(0)).value) == bits(value(2)), (number, done)
            outcomes["found, the one before restored" if restored.step == 1 else "of no consequence"] += 1
            shutil.rmtree(root)
    return outcomes
