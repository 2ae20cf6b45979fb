"""Checkpointer: saves and restores training states by step, exactly, through orbax."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nnx.core import Context, StructureError
from nnx.train import _together as together
from nnx.train._errors import CheckpointError, CheckpointNotFoundError, CorruptError
from nnx.train._given import check_concrete, floats_of, method_of, through_json
from nnx.train._keep import Keep
from nnx.train._leaves import Flat, flatten, rebuild
from nnx.train._manifest import (
    Manifest,
    decode_state,
    encode,
    encode_state,
    snapshot,
)
from nnx.train._match import Match, RestoreReport
from nnx.train._reader import Reader
from nnx.train._shared_write import SharedWrite
from nnx.train._storage import Storage
from nnx.train._writer import Writer

__all__ = ["Checkpointer", "Restored"]

_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` gives.

    Attributes:
        step: the step of the checkpoint.
        value: the value, of the structure of `like`; Modules in it are those of `like`, changed in place.
        extra: what was given to `save` as `extra`.
        metrics: what was given to `save` as `metrics`, as floats.
        report: what was restored, kept, renamed and cast.
    """

    step: int
    value: Any
    extra: Any = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    report: RestoreReport | None = None


@dataclasses.dataclass(frozen=True)
class _Read:
    """What was read of a step, and is not put in place yet."""

    manifest: Manifest
    matches: Mapping[str, Match]
    values: Mapping[str, list[Any]]


class Checkpointer:
    """Saves values by step in a directory, and restores them bit by bit.

    A value is a Module, an Optimizer, a TrainState, a State, or a dict (or any pytree) of those and of arrays. Arrays
    are saved under their `/`-joined paths, typed PRNG keys and Python numbers included, with a manifest of every path's
    shape, dtype, collection and checksum. orbax-checkpoint writes and reads the arrays; it is imported when a
    Checkpointer is made. Nothing that is loaded can execute anything.

    A checkpoint is there as a whole or not at all, whenever the program or the machine stops: it is written under
    another name, flushed to the disk, and renamed. A newest checkpoint that turns out to be damaged is put aside, and
    the one before it restored. One process at a time may save in a directory; any number may read.

    With several processes of `jax.distributed`, each makes a Checkpointer of one directory that all of them see, and
    all call `save` and `restore` with the same arguments. Each writes and reads the shards that it holds. All of the
    above holds for them together: a step counts when every process has written its part; damage that one of them finds
    is damage for all; where one cannot write or read, all raise. A checkpoint may be restored by another number of
    processes than saved it.

    A Checkpointer is a context manager: leaving the block waits for the save that is under way. Without a block it is
    waited for when the program ends.

    Args:
        directory: where the checkpoints are; made if there is none. A relative path is taken from the current working
            directory, once.
        save_every: `save` does something at the multiples of so many steps.
        keep_last: how many of the newest checkpoints are kept; None keeps all.
        keep_best: how many of the best are kept besides, by one of the `metrics` given to `save`; those that are not
            finite never count as best.
        best_mode: "min" or "max": which metric is better.
        keep_every: the checkpoints of the multiples of so many steps are kept for good.
        async_save: whether data is written in the background. `save` returns when the arrays have been copied, so
            they may be changed or donated at once. Python 3.12.0 to 3.12.2 could not end such a save at the exit of
            the program, and there `save` writes before it returns.
        checksum: whether a checksum of each array is saved, to be checked when it is restored.
        best_metric: the name of the metric that `keep_best` goes by; None for the first. A dict that went through
            `jax.jit` is sorted by name.

    Raises:
        ValueError: a number is less than 1, or `best_mode` is unknown.
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
        ...         _ = checkpointer.save(step, model, metrics={"loss": 1 / step})
        ...     restored = checkpointer.restore(like=model)
        >>> print(restored.step, restored.metrics, model.factor)
        20 {'loss': 0.05} 21.0
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        save_every: int = 1000,
        keep_last: int | None = 3,
        keep_best: int | None = None,
        best_mode: str = "min",
        keep_every: int | None = None,
        async_save: bool = True,
        checksum: bool = True,
        best_metric: str | None = None,
    ) -> None:
        if save_every < 1:
            raise ValueError(f"Checkpointer: save_every counts steps from 1 up, got {save_every}")
        self._keep = Keep(keep_last, keep_best, best_mode, keep_every, best_metric)
        # Imported here: it takes longer to import than all the rest.
        import orbax.checkpoint as ocp

        path = os.fspath(directory)
        if "://" in path:
            raise CheckpointError(
                f"cannot keep checkpoints in {path}: a directory of a file system is needed, whose renames are atomic. "
                "Mount the bucket, or save locally and copy"
            )
        root = Path(path).expanduser().absolute()
        if root.is_file():
            raise CheckpointError(f"cannot keep checkpoints in {root}: it is a file")
        self._path = str(root)
        self._storage = Storage(root)
        self._save_every = save_every
        self._passed: int | None = None  # the last step at which `save` wrote nothing
        self._checksum = checksum
        self._ocp = ocp
        self._writer = Writer(in_background=async_save)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="nnx-checkpoint")
        self._writing: int | None = None
        self._committed: int | None = None  # by several processes, not all of which may see it at once
        self._reader = Reader(ocp, self._storage, self._pool)
        self._closed = False

    @property
    def directory(self) -> str:
        """The absolute path of the directory."""
        return self._path

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the checkpoints in the directory, in rising order, the one being written included."""
        self._check_open()
        steps = set(self._storage.steps())
        # Read in this order, as the background sets them in the other one.
        steps.update(step for step in (self._writing, self._committed) if step is not None)
        return tuple(sorted(steps))

    @property
    def latest_step(self) -> int | None:
        """The newest step, or None if there is no checkpoint."""
        steps = self.steps
        return steps[-1] if steps else None

    @property
    def empty(self) -> bool:
        """Whether there is nothing that `restore` could look at: no checkpoint, damaged ones included."""
        return not self.steps and not self._storage.strays() and not self._storage.others()

    @property
    def best_step(self) -> int | None:
        """The step with the best metric, or None if none has a finite one."""
        self.wait()
        ranked = self._keep.ranked(self._reader.metrics())
        return ranked[0] if ranked else None

    def should_save(self, step: int) -> bool:
        """Whether `save(step, ...)` would write: `step` is a multiple of `save_every` and not saved yet.

        Raises:
            CheckpointError: the save before failed in the background.
        """
        self._check_errors()
        step = operator.index(step)
        return step % self._save_every == 0 and step not in self.steps

    def save(
        self,
        step: int,
        state_or_module: Any,
        *,
        context: Context | None = None,
        data_iter: Any = None,
        metrics: Mapping[str, Any] | None = None,
        extra: Any = None,
        force: bool = False,
    ) -> bool:
        """Save a value under a step.

        A step that is saved already is left as it is.

        Args:
            step: the number of steps taken.
            state_or_module: the value.
            context: a Context whose random streams are saved as well.
            data_iter: a data iterator with `get_state()`, whose position is saved: bytes, or what JSON can hold.
            metrics: numbers by name, such as the loss; `best_metric`, or the first, decides what is best.
            extra: anything that JSON can hold: configuration, history. Tuples come back as lists.
            force: save also at a step that is no multiple of `save_every`.

        Returns:
            Whether the step was saved.

        Raises:
            TypeError: a leaf of the value, a metric, the iterator's state or `extra` is nothing that a checkpoint can
                hold.
            StructureError: two leaves have one path.
            ValueError: the checkpoints of `best_metric` are kept, and `metrics` has none of that name.
            CheckpointError: there is a later step, or another process saves here, or writing failed, now or at the
                save before.
        """
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"Checkpointer.save: a step is not negative, got {step}")
        self._check_open()
        self._check_errors()
        if not (force or step % self._save_every == 0):
            self._passed = step
            return False
        if not together.is_together() and not self._is_new(step):  # of several processes the first one says so
            return False
        items = {"state": flatten(state_or_module, "the value to save")}
        if context is not None:
            items["context"] = flatten(context, "the context to save")
        check_concrete(items)
        floats = floats_of(metrics or {})
        if self._keep.metric is not None and floats and self._keep.metric not in floats:
            raise ValueError(
                f"Checkpointer.save: best_metric is {self._keep.metric!r}, and the metrics are "
                f"{', '.join(map(repr, floats))}"
            )
        position = None if data_iter is None else encode_state(method_of(data_iter, "get_state")())
        extra = through_json(extra)
        self.wait()
        if together.is_together():
            return self._save_together(step, items, floats, extra, position)
        self._prepare(step)
        copies = snapshot(items, self._pool)
        self._writing = step

        def job() -> None:
            try:
                self._write(step, copies, floats, extra, position)
            finally:
                self._writing = None

        with self._as_errors(f"saving step {step} in {self._path} failed"):
            self._writer.submit(job)
        return True

    def _candidates(self, step: int | None) -> list[int]:
        try:
            return self._reader.candidates(step)
        except CheckpointNotFoundError as error:
            if self._passed is None:
                raise
            raise CheckpointNotFoundError(
                f"{error}. `save` wrote nothing at step {self._passed}, which is no multiple of save_every="
                f"{self._save_every}: give the Checkpointer another one, or save with force=True"
            ) from None

    def _is_new(self, step: int) -> bool:
        """Whether a step is not saved yet, nor a later one, which is an error."""
        steps = self.steps
        if step in steps:
            return False
        if steps and step < steps[-1]:
            raise CheckpointError(
                f"cannot save step {step} in {self._path}: step {steps[-1]} is there, and only the newest are kept. "
                "Save to another directory, or remove the later steps"
            )
        return True

    def _prepare(self, step: int) -> None:
        """Become the one that writes here, and make way for a step."""
        self._storage.lock()
        self._storage.check_free(step)
        self._reader.put_strays_aside()

    def _write(
        self, step: int, copies: Mapping[str, Any], metrics: dict[str, float], extra: Any, position: Any
    ) -> None:
        encoded = {name: encode(leaves, checked=self._checksum, pool=self._pool) for name, leaves in copies.items()}
        manifest = Manifest(step, {name: entries for name, (entries, _) in encoded.items()}, metrics, extra, position)
        ocp = self._ocp
        with self._storage.writing(step, manifest) as folder:
            for name, (_, arrays) in encoded.items():
                if arrays:
                    with ocp.Checkpointer(self._reader.handler()) as writer:
                        writer.save(folder / name, args=ocp.args.PyTreeSave(arrays))
        self._reader.manifests[step] = manifest
        self._remove_old()

    def _save_together(
        self, step: int, items: Mapping[str, Flat], metrics: dict[str, float], extra: Any, position: Any
    ) -> bool:
        def begin() -> int | None:
            if not self._is_new(step):
                return None
            self._storage.lock()
            self._storage.check_free(step)
            folder = self._storage.begin(step)
            for name in items:
                (folder / name).mkdir()
            return together.token()

        what = f"saving step {step} in {self._path} failed"
        with self._as_errors(what):
            number = together.decide(begin)
            if number is None:
                return False
            self._reader.put_strays_aside()
            write, _ = together.agreed(
                lambda: (
                    SharedWrite(
                        self._ocp,
                        self._storage,
                        step,
                        number,
                        items,
                        checked=self._checksum,
                        pool=self._pool,
                    ),
                    None,
                )
            )
        self._writing = step

        def job() -> None:
            try:
                manifest = write.finish(metrics, extra, position)
                self._committed = step
                if manifest is not None:
                    self._reader.manifests[step] = manifest
                    self._remove_old()
            finally:
                self._writing = None

        with self._as_errors(what):
            self._writer.submit(job)
        return True

    def _remove_old(self) -> None:
        for old in self._keep.removable(self._storage.steps(), self._reader.metrics()):
            self._storage.remove(old)
            self._reader.manifests.pop(old, None)

    def restore(
        self,
        step: int | None = None,
        *,
        like: Any,
        context: Context | None = None,
        data_iter: Any = None,
        only: Any = None,
        rename: Mapping[str, str] | None = None,
        partial: bool = False,
        cast: bool = False,
        mesh: Any = None,
        verify: bool = True,
    ) -> Restored:
        """Restore a checkpoint into a value of the same structure.

        Arrays go where the arrays of `like` are: to their devices and shardings, or to NumPy. Nothing is changed
        unless everything fits.

        Args:
            step: the step; None for the newest that is whole. Damaged ones on the way are renamed to `corrupt-<step>`,
                with a CheckpointWarning.
            like: a value of the structure of the one that was saved, with concrete or abstract leaves
                (`jax.ShapeDtypeStruct`). Modules in it are changed in place, States and TrainStates are made anew.
            context: a Context whose random streams are restored, in place.
            data_iter: a data iterator with `set_state()`, whose position is restored.
            only: a filter: what of `like` is restored; the rest stays as it is.
            rename: patterns of saved paths and the paths that they have in `like`: `{"old/**": "new/**"}`, `*` for one
                part of a path.
            partial: whether what the checkpoint lacks may stay as it is, and what `like` lacks may be left.
            cast: whether floats and integers may have another precision than they were saved with.
            mesh: puts each array on this mesh, by the rules of `nnx.logical_axis_rules`, or without any by the names in
                its Variable's `sharding` that are axes of the mesh.
            verify: whether the checksums are checked.

        Raises:
            CheckpointNotFoundError: there is no checkpoint, or none of that step.
            StructureError: the checkpoint has other paths, shapes, dtypes or collections than `like`; the message
                lists them all. No array has been read then.
            CorruptError: the checkpoint of that step, or of every step, is damaged.
            CheckpointError: what is there was not saved by a Checkpointer.
        """
        self.wait()
        options: dict[str, Any] = {"only": only, "rename": rename, "partial": partial, "cast": cast}
        items = {"state": flatten(like, "`like`")}
        if context is not None:
            items["context"] = flatten(context, "`context`")
        if data_iter is not None:
            method_of(data_iter, "set_state")

        def attempt(candidate: int) -> tuple[_Read, Any]:
            manifest, matches = self._reader.match(candidate, items, options)
            if data_iter is not None and manifest.data_iter is None:
                raise StructureError(
                    f"the checkpoint of step {candidate} in {self._path} has no position of a data iterator: it "
                    "was saved without `data_iter`"
                )
            values, sums = self._reader.read(candidate, items, matches, mesh, verify=verify)
            return _Read(manifest, matches, values), sums

        first = self._reader.put_strays_aside() if step is None else None
        tried: set[int] = set()
        while True:
            try:
                candidates = together.decide(lambda: self._candidates(step))
                candidate = next(found for found in candidates if found not in tried)
            except (StopIteration, CheckpointNotFoundError):
                if first is None:
                    raise
                raise first from None
            tried.add(candidate)
            try:
                read, sums = together.agreed(functools.partial(attempt, candidate))
                self._reader.check_sums(candidate, read.manifest, sums)
            except CorruptError as error:
                if step is not None:
                    raise
                first = first or error
                self._committed = None
                self._reader.put_aside(candidate, error)
                continue
            return self._install(read, items, data_iter)

    def check(
        self,
        step: int | None = None,
        *,
        like: Any,
        context: Context | None = None,
        only: Any = None,
        rename: Mapping[str, str] | None = None,
        partial: bool = False,
        cast: bool = False,
    ) -> RestoreReport:
        """What `restore` with these arguments would do, from the manifest alone: no array is read.

        Returns:
            The report of the value; `fits` says whether `restore` would go through, `problems` why not.

        Raises:
            CheckpointNotFoundError: there is no checkpoint, or none of that step.
            CorruptError: the manifest is damaged.
        """
        self.wait()
        options: dict[str, Any] = {"only": only, "rename": rename, "partial": partial, "cast": cast}
        items = {"state": flatten(like, "`like`")}
        if context is not None:
            items["context"] = flatten(context, "`context`")
        candidate = next(iter(self._candidates(step)))
        _, matches = self._reader.match(candidate, items, options, refuse=False)
        return _joined(matches)

    def inspect(self, step: int | None = None) -> Manifest:
        """What a checkpoint holds, without reading any array.

        Args:
            step: the step; None for the newest.

        Raises:
            CheckpointNotFoundError: there is no checkpoint, or none of that step.
            CorruptError: the manifest is damaged.
        """
        self.wait()
        return self._reader.checked_manifest(next(iter(self._candidates(step))))

    def _install(
        self,
        read: _Read,
        items: Mapping[str, Flat],
        data_iter: Any,
    ) -> Restored:
        manifest, matches, values = read.manifest, read.matches, read.values
        if data_iter is None:
            rebuilt = rebuild(items, values)
        else:
            before = data_iter.get_state() if hasattr(data_iter, "get_state") else None
            try:
                # First, since an iterator is not ours and may refuse.
                data_iter.set_state(decode_state(manifest.data_iter))
                rebuilt = rebuild(items, values)
            except BaseException:
                if before is not None:
                    data_iter.set_state(before)
                raise
        return Restored(manifest.step, rebuilt["state"], manifest.extra, dict(manifest.metrics), _joined(matches))

    def wait(self) -> None:
        """Wait until the save that is under way has been written.

        Raises:
            CheckpointError: it failed.
        """
        self._check_open()
        with self._as_errors(f"saving in {self._path} failed in the background"):
            self._writer.wait()

    def _check_errors(self) -> None:
        if not self._writer.failed:
            return
        with self._as_errors(f"saving in {self._path} failed in the background"):
            self._writer.check()

    @contextlib.contextmanager
    def _as_errors(self, what: str) -> Any:
        try:
            yield
        except CheckpointError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{what}: {error}") from error

    def close(self) -> None:
        """Wait for the save that is under way, and end. Closing twice is fine.

        Raises:
            CheckpointError: the save failed.
        """
        if self._closed:
            return
        try:
            self.wait()
        finally:
            self._closed = True
            self._pool.shutdown()
            self._storage.unlock()

    def _check_open(self) -> None:
        if self._closed:
            raise CheckpointError(f"this Checkpointer of {self._path} is closed")

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpointer({self._path!r}, {'closed' if self._closed else f'steps={list(self.steps)}'})"


def _joined(matches: Mapping[str, Match]) -> RestoreReport:
    """The report of the state, with the problems of all items."""
    report = matches["state"].report
    problems = tuple(line for found in matches.values() for line in found.report.problems)
    return dataclasses.replace(report, problems=problems)
