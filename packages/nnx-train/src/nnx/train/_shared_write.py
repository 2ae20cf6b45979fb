"""Writing a step with several processes: each its own shards, and the first one gives the step its name at the end."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nnx.train import _together as together
from nnx.train._additive import MODULUS, partial_sum
from nnx.train._errors import CheckpointError
from nnx.train._leaves import Flat, key_data, spec_of
from nnx.train._manifest import Entry, Manifest, encode
from nnx.train._storage import Storage, flush

__all__ = ["SharedWrite"]


class SharedWrite:
    """A step that is being written; made in every process, once its folders are there.

    When it is made, the arrays have been copied. Nothing of orbax waits for other processes: a handler writes what this
    one holds, and whoever fails comes to the barriers all the same, so that nobody waits for it.

    Args:
        ocp: the module `orbax.checkpoint`.
        storage: the directory.
        step: the step.
        number: that all processes have for this write, and for no other.
        items: what is saved.
        checked: whether checksums are saved.
        pool: threads to copy and to sum on.
    """

    def __init__(
        self,
        ocp: Any,
        storage: Storage,
        step: int,
        number: int,
        items: Mapping[str, Flat],
        *,
        checked: bool,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._ocp, self._handler, self._storage, self._pool = ocp, _handler(ocp), storage, pool
        self._step, self._name = step, f"{number} of {step}"
        self._folder = storage.writing_folder(step)
        self._entries: dict[str, dict[str, Entry]] = {}
        self._parts: list[tuple[str, str, tuple[int, ...], np.ndarray[Any, Any]]] = []
        self._writes: list[Any] = []
        self._written: list[str] = []
        for name, flat in items.items():
            arrays = self._split(name, flat, checked=checked)
            if arrays:
                args = ocp.args.PyTreeSave(arrays)
                # On a thread of its own, since this one may be in a loop already.
                saving = pool.submit(asyncio.run, self._handler.async_save(_path(self._folder / name), args=args))
                self._writes += saving.result() or []
                self._written.append(name)

    def _split(self, name: str, flat: Flat, *, checked: bool) -> dict[str, Any]:
        """Notes the entries of an item, and gives its arrays: those that processes hold together as they are."""
        local: dict[str, Any] = {}
        spread: dict[str, Any] = {}
        for leaf in flat.leaves:
            spec = spec_of(leaf)
            data = key_data(leaf.value) if spec.stored else None
            if isinstance(data, jax.Array) and not data.is_fully_addressable:
                spread[leaf.path] = Entry(spec, nbytes=data.nbytes), data
            elif data is None or isinstance(data, jax.Array):
                local[leaf.path] = spec, None if data is None else np.asarray(data)
            else:
                local[leaf.path] = spec, np.array(data, copy=True)
        # What each process has for itself is the same in all, as a step count is. The first one writes it.
        entries, arrays = encode(local, checked=checked and together.is_first(), pool=self._pool)
        for path, (entry, data) in spread.items():
            entries[path] = entry
            arrays[f"leaf:{path}"] = data
            for shard in data.addressable_shards if checked else ():
                if shard.replica_id == 0:
                    start = tuple(part.start or 0 for part in shard.index)
                    self._parts.append((name, path, start, np.asarray(shard.data)))
        self._entries[name] = {leaf.path: entries[leaf.path] for leaf in flat.leaves}
        return arrays

    def finish(self, metrics: dict[str, float], extra: Any, position: Any) -> Manifest | None:
        """Write what this process holds, wait for the others, and make it count. On any thread.

        Returns:
            The manifest, in the first process.

        Raises:
            CheckpointError: this process could not write, or another one.
        """
        error: Exception | None = None
        manifest: Manifest | None = None
        try:
            note: dict[str, Any] = {"sums": self._write()}
        except Exception as raised:  # noqa: BLE001 - raised below, once nobody waits any more
            error, note = raised, {"error": f"{type(raised).__name__}: {raised}"}
        try:
            file = self._note(jax.process_index())
            file.write_text(json.dumps(note), encoding="utf-8")
            flush(file)
        except OSError as raised:
            error = error or raised
        together.barrier(self._ocp, f"written {self._name}")
        if together.is_first():
            try:
                manifest = self._commit(metrics, extra, position)
            except Exception as raised:  # noqa: BLE001 - as above
                self._storage.abandon(self._step)
                error = error or raised
        together.barrier(self._ocp, f"named {self._name}")
        if error is None and self._step not in self._storage.steps():
            error = CheckpointError("another process could not write its part, and the first one's error says which")
        if error is not None:
            raise CheckpointError(f"step {self._step} was not saved in {self._storage.root}: {error}") from error
        return manifest

    def _write(self) -> list[Any]:
        errors = [error for error in map(_error_of, self._writes) if error is not None]  # all: none is left running
        if errors:
            raise errors[0]
        sums = list(self._pool.map(lambda part: partial_sum(part[3], part[2]), self._parts))
        for name in self._written:
            own = self._folder / name / f"ocdbt.process_{jax.process_index()}"
            for path in [*own.rglob("*"), own] if own.exists() else ():
                flush(path)
        return [[name, path, own] for (name, path, _, _), own in zip(self._parts, sums, strict=True)]

    def _note(self, process: int) -> Any:
        """What a process has to say of its part, until the step counts."""
        return self._folder / f"part-{process}.json"

    def _commit(self, metrics: dict[str, float], extra: Any, position: Any) -> Manifest:
        totals: dict[tuple[str, str], int] = {}
        for process in range(jax.process_count()):
            try:
                note = json.loads(self._note(process).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                note = {"error": f"what it says of its part cannot be read: {error}"}
            if "error" in note:
                raise CheckpointError(f"process {process} could not write its part: {note['error']}")
            for name, path, own in note["sums"]:
                totals[name, path] = (totals.get((name, path), 0) + own) % MODULUS
            self._note(process).unlink()
        entries = {
            name: {path: dataclasses.replace(entry, sum=totals.get((name, path))) for path, entry in leaves.items()}
            for name, leaves in self._entries.items()
        }
        manifest = Manifest(self._step, entries, metrics, extra, position)
        for name in self._written:
            self._handler.finalize(_path(self._folder / name))
        self._storage.commit(self._step, manifest)
        return manifest


def _error_of(write: Any) -> Exception | None:
    try:
        write.result()
    except Exception as error:  # noqa: BLE001 - raised when all have ended
        return error
    return None


def _handler(ocp: Any) -> Any:
    """What writes arrays, without the notes on their chunks, for which processes wait for the first one's folder."""
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (jax.Array, handlers.ArrayHandler(array_metadata_store=None)), (np.ndarray, handlers.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False, type_handler_registry=registry)


def _path(path: Path) -> Any:
    """A path as handlers of orbax take it, from the library that orbax has for them."""
    from etils import epath

    return epath.Path(path)
