"""Saving and restoring with every process of `jax.distributed`: each writes and reads the shards that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from nnx.train._leaves import Flat, Leaf, key_data, spec_of
from nnx.train._manifest import Entry, Manifest
from nnx.train._storage import Storage

__all__ = ["barrier", "contents", "is_first", "is_together", "place", "write"]


def is_together() -> bool:
    """Whether this is one of several processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that makes and renames folders."""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """Wait until every process has come here."""
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(f"nnx checkpoint: {what}")


def contents(items: Mapping[str, Flat]) -> tuple[dict[str, dict[str, Entry]], dict[str, dict[str, Any]]]:
    """For each item its entries, and its arrays as they are: those that several processes hold are not gathered.

    There are no checksums: no process has all the bytes that one would be of.
    """
    entries: dict[str, dict[str, Entry]] = {}
    arrays: dict[str, dict[str, Any]] = {}
    for name, flat in items.items():
        entries[name], arrays[name] = {}, {}
        for leaf in flat.leaves:
            spec = spec_of(leaf)
            data = _data(leaf) if spec.stored else None
            entries[name][leaf.path] = Entry(spec, nbytes=0 if data is None else data.nbytes)
            if data is not None:
                arrays[name][f"leaf:{leaf.path}"] = data
    return entries, arrays


def _data(leaf: Leaf) -> Any:
    data = key_data(leaf.value)
    # What one process has alone is the same in each, as a step count is; the first one writes it.
    return data if isinstance(data, jax.Array) and not data.is_fully_addressable else np.asarray(data)


def write(
    ocp: Any, handler: Any, storage: Storage, manifest: Manifest, arrays: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write a step, in every process at once.

    The first process makes the folder, and gives it its name when all have written what they hold: a process that dies
    before leaves nothing that counts.
    """
    step = manifest.step

    def write_shards(folder: Any) -> None:
        barrier(f"begin {step}")
        for name, own in arrays.items():
            if own:
                with ocp.Checkpointer(handler) as writer:
                    writer.save(folder / name, args=ocp.args.PyTreeSave(dict(own)))
        barrier(f"written {step}")

    if is_first():
        storage.lock()
        storage.check_free(step)
        with storage.writing(step, manifest) as folder:
            write_shards(folder)
    else:
        write_shards(storage.writing_folder(step))
    barrier(f"named {step}")


def place(array: np.ndarray[Any, Any], sharding: Any) -> jax.Array:
    """An array that every process has as one that they hold together."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
