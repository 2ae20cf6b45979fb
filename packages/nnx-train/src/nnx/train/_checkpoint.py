"""Checkpointer: saves and restores training states by step, exactly, on orbax's CheckpointManager."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from nnx.core import Context, StructureError
from nnx.train._errors import CheckpointError, CheckpointNotFoundError
from nnx.train._leaves import Flat, Leaf, Spec, compare, flatten, key_data, spec_of

__all__ = ["Checkpointer", "Restored"]

_FORMAT = "nnx-checkpoint"
_VERSION = 1
_MANIFEST = "manifest"


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` gives.

    Attributes:
        step: the step of the checkpoint.
        value: the value, of the structure of `like`; Modules in it are those of `like`, changed in place.
        extra: what was given to `save` as `extra`.
    """

    step: int
    value: Any
    extra: Any = None


class Checkpointer:
    """Saves values by step in a directory, and restores them bit by bit.

    A value is a Module, an Optimizer, a TrainState, a State, or a dict (or any pytree) of those and of arrays. Arrays
    are saved under their `/`-joined paths, typed PRNG keys and Python numbers included, with a manifest of every path's
    shape, dtype and collection. A checkpoint restores only into a value with the same paths, shapes, dtypes and
    collections.

    orbax-checkpoint is imported when a Checkpointer is made.

    A Checkpointer is a context manager: leaving the block waits for the save that is under way. Without a block, call
    `close()` before the program ends.

    Args:
        directory: where the checkpoints are; made if there is none. A relative path is taken from the current working
            directory, once.
        save_every: `save` does something at the multiples of so many steps.
        keep_last: how many of the newest checkpoints are kept; None keeps all.
        async_save: whether data is written in the background. `save` returns when the arrays have been copied, so
            they may be changed or donated at once.

    Raises:
        ValueError: `save_every` or `keep_last` is less than 1.
        CheckpointError: the directory cannot be used.

    Example:
        >>> import tempfile, jax.numpy as jnp, nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self, factor):
        ...         self.factor = nnx.Param(jnp.array(factor))
        >>> model = Scale(1.0)
        >>> with tempfile.TemporaryDirectory() as directory, nnx.Checkpointer(directory, save_every=10) as checkpointer:
        ...     for step in range(1, 26):
        ...         model.factor += 1
        ...         _ = checkpointer.save(step, model, extra={"loss": 1 / step})
        ...     restored = checkpointer.restore(like=model)
        >>> print(restored.step, restored.extra, model.factor)
        20 {'loss': 0.05} 21.0
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        save_every: int = 1000,
        keep_last: int | None = 3,
        async_save: bool = True,
    ) -> None:
        if save_every < 1:
            raise ValueError(f"Checkpointer: save_every counts steps from 1 up, got {save_every}")
        if keep_last is not None and keep_last < 1:
            raise ValueError(
                f"Checkpointer: keep_last counts checkpoints from 1 up, or is None for all; got {keep_last}"
            )
        # Imported here: it takes longer to import than all the rest.
        import orbax.checkpoint as ocp

        path = os.fspath(directory)
        self._path = path if "://" in path else str(Path(path).expanduser().absolute())
        if Path(self._path).is_file():
            raise CheckpointError(f"cannot keep checkpoints in {self._path}: it is a file")
        self._save_every = save_every
        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            enable_async_checkpointing=async_save,
            # Made in the background, a directory that cannot be made hangs the program for minutes at its end.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(use_zarr3=True),
            "context": ocp.PyTreeCheckpointHandler(use_zarr3=True),
            _MANIFEST: ocp.JsonCheckpointHandler(),
        }
        try:
            self._manager: Any = ocp.CheckpointManager(
                self._path, options=options, item_names=tuple(handlers), item_handlers=handlers
            )
        except OSError as error:
            raise CheckpointError(f"cannot keep checkpoints in {self._path}: {error}") from error

    @property
    def directory(self) -> str:
        """The absolute path of the directory."""
        return self._path

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the checkpoints in the directory, in rising order, the one being written included."""
        return tuple(sorted(self._open().all_steps()))

    @property
    def latest_step(self) -> int | None:
        """The newest step, or None if there is no checkpoint."""
        steps = self.steps
        return steps[-1] if steps else None

    def should_save(self, step: int) -> bool:
        """Whether `save(step, ...)` would write: `step` is a multiple of `save_every` and not saved yet."""
        step = operator.index(step)
        return step % self._save_every == 0 and step not in self.steps

    def save(
        self, step: int, state_or_module: Any, *, context: Context | None = None, extra: Any = None, force: bool = False
    ) -> bool:
        """Save a value under a step.

        A step that is saved already is left as it is.

        Args:
            step: the number of steps taken.
            state_or_module: the value.
            context: a Context whose random streams are saved as well.
            extra: anything that JSON can hold: configuration, history. Tuples come back as lists.
            force: save also at a step that is no multiple of `save_every`.

        Returns:
            Whether the step was saved.

        Raises:
            TypeError: a leaf of the value, or `extra`, is nothing that a checkpoint can hold.
            StructureError: two leaves have one path.
            CheckpointError: there is a later step, or writing failed, now or in the background.
        """
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"Checkpointer.save: a step is not negative, got {step}")
        steps = self.steps
        if step in steps or not (force or step % self._save_every == 0):
            return False
        if steps and step < steps[-1]:
            raise CheckpointError(
                f"cannot save step {step} in {self._path}: step {steps[-1]} is there, and only the newest are kept. "
                "Save to another directory, or remove the later steps"
            )
        items = {"state": flatten(state_or_module, "the value to save")}
        if context is not None:
            items["context"] = flatten(context, "the context to save")
        manifest, arrays = _encode(items, extra)
        arguments = {name: self._ocp.args.PyTreeSave(tree) for name, tree in arrays.items() if tree}
        arguments[_MANIFEST] = self._ocp.args.JsonSave(manifest)
        try:
            # An error of the save before, from its background thread, must not stay unseen.
            self._manager.check_for_errors()
            self._manager.save(step, args=self._ocp.args.Composite(**arguments), force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"saving step {step} in {self._path} failed: {error}") from error
        return True

    def restore(self, step: int | None = None, *, like: Any, context: Context | None = None) -> Restored:
        """Restore a checkpoint into a value of the same structure.

        Arrays go where the arrays of `like` are: to their devices and shardings, or to NumPy. Nothing is changed
        unless everything fits.

        Args:
            step: the step; None for the newest.
            like: a value of the structure of the one that was saved, with concrete or abstract leaves
                (`jax.ShapeDtypeStruct`). Modules in it are changed in place, States and TrainStates are made anew.
            context: a Context whose random streams are restored, in place.

        Raises:
            CheckpointNotFoundError: there is no checkpoint, or none of that step.
            StructureError: the checkpoint has other paths, shapes, dtypes or collections than `like`; the message
                lists them all. No array has been read then.
            CheckpointError: what is there was not saved by a Checkpointer, or cannot be read.
        """
        self.wait()
        steps = self.steps
        if step is None and not steps:
            raise CheckpointNotFoundError(f"there is no checkpoint in {self._path}")
        step = steps[-1] if step is None else operator.index(step)
        if step not in steps:
            raise CheckpointNotFoundError(
                f"there is no checkpoint of step {step} in {self._path}; there are: {list(steps)}"
            )
        items = {"state": flatten(like, "`like`")}
        if context is not None:
            items["context"] = flatten(context, "`context`")
        manifest = self._read_manifest(step)
        saved = {
            name: {path: Spec.from_json(spec) for path, spec in leaves.items()}
            for name, leaves in manifest["items"].items()
        }
        lines = []
        for name, flat in items.items():
            found = compare(saved.get(name, {}), {leaf.path: spec_of(leaf) for leaf in flat.leaves})
            lines += [f"  {line}" if name == "state" else f"  {name}: {line}" for line in found]
        if lines:
            raise StructureError(f"the checkpoint of step {step} in {self._path} does not fit:\n" + "\n".join(lines))
        data = self._read_arrays(step, items, saved)
        decoded = {
            name: [_decode(leaf, saved[name][leaf.path], data.get(name, {})) for leaf in flat.leaves]
            for name, flat in items.items()
        }
        values = {name: flat.rebuild(decoded[name]) for name, flat in items.items()}
        return Restored(step=step, value=values["state"], extra=manifest["extra"])

    def _read_manifest(self, step: int) -> Any:
        ocp = self._ocp
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**{_MANIFEST: ocp.args.JsonRestore()}))[
                _MANIFEST
            ]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._path} has no readable manifest: {error}"
            ) from error
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._path} was not saved by nnx.train.Checkpointer"
            )
        if found["version"] > _VERSION:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._path} has format version {found['version']}, made by a later "
                f"nnx-train; this one reads versions up to {_VERSION}"
            )
        return found

    def _read_arrays(self, step: int, items: dict[str, Flat], saved: dict[str, dict[str, Spec]]) -> dict[str, Any]:
        ocp = self._ocp
        arguments = {}
        for name, flat in items.items():
            stored = [leaf for leaf in flat.leaves if saved[name][leaf.path].stored]
            if stored:
                arguments[name] = ocp.args.PyTreeRestore(
                    item={leaf.path: 0 for leaf in stored},
                    restore_args={leaf.path: self._restore_args(leaf, saved[name][leaf.path]) for leaf in stored},
                )
        if not arguments:
            return {}
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**arguments)))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"the checkpoint of step {step} in {self._path} cannot be read: {error}") from error

    def _restore_args(self, leaf: Leaf, spec: Spec) -> Any:
        sharding = _target_sharding(leaf.value)
        if spec.kind == "array" and sharding is not None:
            return self._ocp.ArrayRestoreArgs(sharding=sharding, global_shape=spec.shape)
        return self._ocp.RestoreArgs(restore_type=np.ndarray)

    def wait(self) -> None:
        """Wait until the save that is under way has been written.

        Raises:
            CheckpointError: it failed.
        """
        try:
            self._open().wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"saving in {self._path} failed in the background: {error}") from error

    def close(self) -> None:
        """Wait for the save that is under way, and end. Closing twice is fine.

        Raises:
            CheckpointError: the save failed.
        """
        if self._manager is None:
            return
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            manager.close()

    def _open(self) -> Any:
        if self._manager is None:
            raise CheckpointError(f"this Checkpointer of {self._path} is closed")
        return self._manager

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpointer({self._path!r}, {'closed' if self._manager is None else f'steps={list(self.steps)}'})"


def _encode(items: dict[str, Flat], extra: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The manifest and, for each item, the arrays to write by path."""
    try:
        # Through JSON and back at once: what cannot make the way is refused now, and what is saved no longer changes.
        extra = json.loads(json.dumps(extra))
    except (TypeError, ValueError) as error:
        raise TypeError(f"Checkpointer.save: `extra` must be what JSON can hold: {error}") from error
    manifest: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "items": {}, "extra": extra}
    arrays: dict[str, dict[str, Any]] = {}
    for name, flat in items.items():
        specs = {leaf.path: spec_of(leaf) for leaf in flat.leaves}
        abstract = [leaf.path for leaf in flat.leaves if isinstance(leaf.value, jax.ShapeDtypeStruct)]
        if abstract:
            raise TypeError(f"Checkpointer.save: `{abstract[0]}` is a ShapeDtypeStruct, which has no data")
        manifest["items"][name] = {path: spec.to_json() for path, spec in specs.items()}
        arrays[name] = {leaf.path: key_data(leaf.value) for leaf in flat.leaves if specs[leaf.path].stored}
    return manifest, arrays


def _target_sharding(value: Any) -> Any:
    """Where an array has to go, or None if JAX is free to place it.

    An array that was never put anywhere must not come back pinned to a device: a function compiled for the one would
    compile again for the other.
    """
    if isinstance(value, jax.ShapeDtypeStruct):
        return value.sharding
    return value.sharding if isinstance(value, jax.Array) and value.committed else None


def _decode(leaf: Leaf, spec: Spec, data: dict[str, Any]) -> Any:
    """A leaf as `like` has it: a jax array where it was, a NumPy array, a key, or a Python number."""
    if spec.kind not in ("array", "key"):
        return complex(*spec.value) if spec.kind == "complex" else spec.value
    found = data[leaf.path] if spec.stored else None
    if spec.kind == "key":
        if found is None:
            # No data, and so no number of words to take from it: as many keys as there are of another one.
            key = jnp.broadcast_to(jax.random.key(0, impl=spec.impl), spec.shape)
        else:
            key = jax.random.wrap_key_data(jnp.array(found), impl=spec.impl)
        sharding = _target_sharding(leaf.value)
        return key if sharding is None else jax.device_put(key, sharding)
    if found is None:
        found = np.zeros(spec.shape, jnp.dtype(spec.dtype))
    if isinstance(leaf.value, np.generic):
        return found[()]
    if isinstance(leaf.value, np.ndarray):
        return found
    if isinstance(found, jax.Array):
        return _as_weak_as(leaf.value, found)
    array = _as_weak_as(leaf.value, jnp.array(found))
    sharding = _target_sharding(leaf.value)
    return array if sharding is None else jax.device_put(array, sharding)


def _as_weak_as(like: Any, array: jax.Array) -> jax.Array:
    """`array`, weakly typed if `like` is (`jnp.array(1.5)` is): the type is part of what functions are compiled for."""
    if not (like.weak_type if isinstance(like, jax.ShapeDtypeStruct) else like.aval.weak_type):
        return array
    # Only Python numbers make weak types, and `at[...].set` keeps the type of what it writes into.
    weak = jnp.broadcast_to(jnp.asarray(np.zeros((), array.dtype).item()), array.shape)
    return weak.at[...].set(array) if weak.dtype == array.dtype else array
