"""Reading: what a directory of checkpoints holds, every difference and every damage found before anything changes."""

from __future__ import annotations

import contextlib
import errno
import operator
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.core import StructureError, get_named_sharding
from nnx.core._sharding import current_rules
from nnx.train._additive import MODULUS, partial_sum
from nnx.train._errors import CheckpointError, CheckpointNotFoundError, CheckpointWarning, CorruptError
from nnx.train._leaves import Flat, Leaf, Spec
from nnx.train._manifest import PACKED, Entry, FutureFormatError, Manifest, decode
from nnx.train._match import Match, match
from nnx.train._storage import Storage
from nnx.train._together import decide, place

__all__ = ["Reader", "decode_leaf"]

# What says something of the machine and nothing of the file: a checkpoint is not to be put aside for it.
_ELSEWHERE = {
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
}
_ELSEWHERE_WORDS = ("PERMISSION_DENIED", "Permission denied", "RESOURCE_EXHAUSTED", "Too many open files")


class Reader:
    """Reads the checkpoints of a directory.

    Args:
        ocp: the module `orbax.checkpoint`.
        storage: the directory.
        pool: threads to copy and to check sums on.
    """

    def __init__(self, ocp: Any, storage: Storage, pool: ThreadPoolExecutor) -> None:
        self._ocp = ocp
        self._storage = storage
        self._path = str(storage.root)
        self._pool = pool
        self.manifests: dict[int, Manifest] = {}

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step, kept once it was read."""
        if step not in self.manifests:
            self.manifests[step] = self._storage.read_manifest(step)
        return self.manifests[step]

    def metrics(self) -> dict[int, dict[str, float]]:
        """The metrics of each step."""
        found = {}
        for step in self._storage.steps():
            with contextlib.suppress(OSError, ValueError):  # a damaged one has none
                found[step] = self.manifest(step).metrics
        return found

    def candidates(self, step: int | None) -> list[int]:
        """The steps to try: the one asked for, or all from the newest on."""
        steps = self._storage.steps()
        if step is None:
            if not steps:
                foreign = self._storage.others()
                if foreign:
                    raise CheckpointError(
                        f"{self._path} has folders named by steps ({', '.join(foreign[:5])}), and none was saved by "
                        "nnx.train.Checkpointer"
                    )
                raise CheckpointNotFoundError(f"there is no checkpoint in {self._path}")
            return steps[::-1]
        step = operator.index(step)
        if step not in steps:
            if step in self._storage.strays():
                raise self.without_manifest(step)
            if str(step) in self._storage.others():
                raise CheckpointError(
                    f"the checkpoint of step {step} in {self._path} was not saved by nnx.train.Checkpointer"
                )
            raise CheckpointNotFoundError(
                f"there is no checkpoint of step {step} in {self._path}; there are: {list(steps)}"
            )
        return [step]

    def checked_manifest(self, step: int) -> Manifest:
        """The manifest of a step, or a CorruptError."""
        try:
            return self.manifest(step)
        except FutureFormatError as error:
            raise CheckpointError(f"cannot read the checkpoint of step {step} in {self._path}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._blame_the_machine(step, error)
            raise CorruptError(f"the checkpoint of step {step} in {self._path} is damaged: {error}", step) from error

    def without_manifest(self, step: int) -> CorruptError:
        """The error for a step that has lost its manifest."""
        return CorruptError(f"the checkpoint of step {step} in {self._path} is damaged: it has no manifest", step)

    def _blame_the_machine(self, step: int, error: BaseException) -> None:
        """Raise if an error tells of the machine, and not of the checkpoint."""
        link: BaseException | None = error
        while link is not None:
            if (isinstance(link, OSError) and link.errno in _ELSEWHERE) or any(
                words in str(link) for words in _ELSEWHERE_WORDS
            ):
                raise CheckpointError(
                    f"cannot read the checkpoint of step {step} in {self._path}: {link}. That is no damage: nothing "
                    "was changed, and it can be tried again"
                ) from error
            link = link.__cause__ or link.__context__

    def match(
        self, step: int, items: Mapping[str, Flat], options: Mapping[str, Any], *, refuse: bool = True
    ) -> tuple[Manifest, dict[str, Match]]:
        """How each item is restored; a StructureError if it cannot be and `refuse`."""
        manifest = self.checked_manifest(step)
        matches = {}
        for name, flat in items.items():
            own = options if name == "state" else {}
            matches[name] = match(step, name, flat, manifest.items.get(name, {}), **own)
        problems = [line for found in matches.values() for line in found.report.problems]
        if problems and refuse:
            raise StructureError(
                f"the checkpoint of step {step} in {self._path} does not fit:\n  " + "\n  ".join(problems)
            )
        return manifest, matches

    def read(
        self,
        step: int,
        items: Mapping[str, Flat],
        matches: Mapping[str, Match],
        mesh: Any,
        *,
        verify: bool,
    ) -> tuple[dict[str, list[Any]], dict[str, dict[str, int]]]:
        """The new leaves of each item, and by item and path what this process adds to the checksums of arrays.

        Of an array that several processes read, none can check the sum by itself: see `check_sums`.
        """
        result = {}
        sums: dict[str, dict[str, int]] = {}
        for name, flat in items.items():
            sources = matches[name].sources
            targets = _shardings(flat, mesh)
            direct = _spread(flat, sources, targets)
            arrays = self.read_arrays(step, name, list(sources.values()), direct)
            sums[name] = _sums_of(sources, arrays, self._pool) if verify else {}

            def value(
                leaf: Leaf,
                name: str = name,
                sources: Any = sources,
                arrays: Any = arrays,
                targets: Mapping[str, Any] = targets,
            ) -> Any:
                if leaf.path not in sources:
                    return leaf.value
                source, entry = sources[leaf.path]
                if verify:  # here, where what is read once for its sum is still in the cache for its copy
                    self._verify(step, name, source, entry, arrays)
                return decode_leaf(leaf, source, entry, arrays, targets.get(leaf.path))

            result[name] = list(self._pool.map(value, flat.leaves))
        return result, sums

    def check_sums(self, step: int, manifest: Manifest, every: Sequence[Mapping[str, Mapping[str, int]]]) -> None:
        """Raise a CorruptError if what the processes have read of an array does not add up to its checksum.

        Args:
            step: the step.
            manifest: its manifest.
            every: the sums that `read` gave in each process.
        """
        for name in every[0]:
            for path in every[0][name]:
                if sum(sums[name][path] for sums in every) % MODULUS != manifest.items[name][path].sum:
                    raise self._no_checksum(step, name, path)

    def _no_checksum(self, step: int, name: str, path: str) -> CorruptError:
        return CorruptError(
            f"the checkpoint of step {step} in {self._path} is damaged: `{path}` of `{name}` does not have its "
            "checksum",
            step,
            name,
            path,
        )

    def read_arrays(
        self, step: int, name: str, sources: list[tuple[str, Entry]], direct: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """What orbax has stored of the entries of an item, by the names in its files: NumPy's arrays.

        Those of `direct` are read to the shardings that it gives, each process its own shards.
        """
        stored = [(path, entry) for path, entry in sources if entry.nbytes]
        keys = {f"leaf:{path}" if entry.offset is None else PACKED for path, entry in stored}
        if not keys:
            return {}
        ocp = self._ocp
        kind = ocp.RestoreArgs(restore_type=np.ndarray)
        kinds = dict.fromkeys(keys, kind)
        for path, sharding in (direct or {}).items():
            kinds[f"leaf:{path}"] = ocp.ArrayRestoreArgs(sharding=sharding)
        arguments = ocp.args.PyTreeRestore(item=dict.fromkeys(keys, 0), restore_args=kinds, partial_restore=True)
        try:
            with ocp.Checkpointer(self.handler(), multiprocessing_options=self._alone()) as reader:
                found = dict(reader.restore(self._storage.folder(step) / name, args=arguments))
        except MemoryError:
            raise
        except Exception as error:  # what orbax and its libraries raise for a damaged file is of any type
            self._blame_the_machine(step, error)
            reason = str(error).partition(" [tensorstore_spec=")[0]  # a thousand characters of what was opened
            raise CorruptError(
                f"the checkpoint of step {step} in {self._path} is damaged: `{name}` cannot be read: {reason}",
                step,
                name,
            ) from error
        for path, entry in stored:
            array = found.get(f"leaf:{path}" if entry.offset is None else PACKED)
            whole = isinstance(array, np.ndarray | jax.Array) and (
                array.nbytes == entry.nbytes if entry.offset is None else array.nbytes >= entry.offset + entry.nbytes
            )
            if not whole:
                raise CorruptError(
                    f"the checkpoint of step {step} in {self._path} is damaged: `{path}` of `{name}` is not whole",
                    step,
                    name,
                    path,
                )
        return found

    def _alone(self) -> Any:
        """Has orbax wait for no other process: one that finds a damage must not leave the others waiting."""
        me = jax.process_index()
        return self._ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})

    def handler(self) -> Any:
        """What reads and writes arrays."""
        # Parameters are close to noise: compressing them takes longer than writing them.
        return self._ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)

    def _verify(self, step: int, name: str, path: str, entry: Entry, arrays: Mapping[str, Any]) -> None:
        if not entry.checked or isinstance(arrays.get(f"leaf:{path}"), jax.Array):
            return  # nothing to check, or only together with the other processes
        if entry.sum is None:
            whole = decode(path, entry, arrays, (-1,), np.uint8)
        else:
            whole = np.asarray(arrays[f"leaf:{path}"])
        if not entry.holds(whole):
            raise self._no_checksum(step, name, path)

    def put_aside(self, step: int, error: CorruptError) -> None:
        """Rename a damaged step, and say so. Of several processes, called in each, the first one renames it."""
        self.manifests.pop(step, None)

        def rename() -> str | None:
            try:
                return f"it was renamed to {self._storage.quarantine(step).name}"
            except FileNotFoundError:
                return None  # whoever saves here has removed it while it was read
            except OSError as problem:
                return f"it could not be renamed ({problem})"

        aside = decide(rename)
        if aside is None:
            return
        warnings.warn(f"{error}; {aside}, and the checkpoint before it is used", CheckpointWarning, stacklevel=4)

    def put_strays_aside(self) -> CorruptError | None:
        """Rename what has lost its manifest, and give the error for the newest of it. Called in every process."""
        found: CorruptError | None = None
        for step in reversed(decide(self._storage.strays)):
            error = self.without_manifest(step)
            self.put_aside(step, error)
            found = found or error
        return found


def _sums_of(
    sources: Mapping[str, tuple[str, Entry]], arrays: Mapping[str, Any], pool: ThreadPoolExecutor
) -> dict[str, int]:
    """What this process has read of each array that it has not read as a whole, as a part of the array's checksum."""

    def own(array: jax.Array) -> int:
        parts = [shard for shard in array.addressable_shards if shard.replica_id == 0]
        starts = [tuple(part.start or 0 for part in shard.index) for shard in parts]
        return sum(partial_sum(np.asarray(shard.data), at) for shard, at in zip(parts, starts, strict=True)) % MODULUS

    found = {path: arrays.get(f"leaf:{path}") for path, entry in sources.values() if entry.sum is not None}
    spread = {path: array for path, array in found.items() if isinstance(array, jax.Array)}
    return dict(zip(spread, pool.map(own, spread.values()), strict=True))


def _shardings(flat: Flat, mesh: Any) -> dict[str, Any]:
    """Where each leaf goes on a mesh."""
    if mesh is None:
        return {}
    result = {}
    for _, node, leaves in flat.entries:
        names = getattr(node, "sharding", None)
        spec = [name if name in mesh.axis_names else None for name in names] if isinstance(names, tuple) else []
        target: Any = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        if current_rules() is not None and isinstance(names, tuple):
            target = get_named_sharding(node, mesh).value
        for path in leaves:
            result[path] = target
    return result


def _spread(flat: Flat, sources: Mapping[str, tuple[str, Entry]], targets: Mapping[str, Any]) -> dict[str, Any]:
    """The saved arrays of which each process reads its own shards alone, with the sharding to read them to.

    Those with a checksum are read as a whole, as it is one of the whole; so are small ones, which lie together.
    """
    result = {}
    for leaf in flat.leaves:
        if leaf.path in sources:
            path, entry = sources[leaf.path]
            sharding = targets.get(leaf.path, _target_sharding(leaf.value))
            if (
                sharding is not None
                and not sharding.is_fully_addressable
                and entry.spec.kind == "array"
                and entry.crc is entry.offset is None
                and entry.nbytes
            ):
                result[path] = sharding
    return result


def _target_sharding(value: Any) -> Any:
    """Where an array has to go, or None if JAX is free to place it.

    An array that was never put anywhere must not come back pinned to a device: a function compiled for the one would
    compile again for the other.
    """
    if isinstance(value, jax.ShapeDtypeStruct):
        return value.sharding
    return value.sharding if isinstance(value, jax.Array) and value.committed else None


def decode_leaf(leaf: Leaf, path: str, entry: Entry, arrays: Mapping[str, Any], sharding: Any = None) -> Any:
    """A leaf as `like` has it: a jax array where it was, a NumPy array, a key, or a Python number."""
    spec: Spec = entry.spec
    if spec.kind not in ("array", "key"):
        return complex(*spec.value) if spec.kind == "complex" else spec.value
    sharding = _target_sharding(leaf.value) if sharding is None else sharding
    if spec.kind == "key":
        if not entry.nbytes:
            # No data, and so no number of words to take from it: as many keys as there are of another one.
            key = jnp.broadcast_to(jax.random.key(0, impl=spec.impl), spec.shape)
        else:
            data = decode(path, entry, arrays, (*spec.shape, -1), np.uint32)
            key = jax.random.wrap_key_data(jnp.array(data), impl=spec.impl)
        return key if sharding is None else jax.device_put(key, sharding)
    dtype = jnp.dtype(spec.dtype)
    stored = arrays.get(f"leaf:{path}") if entry.offset is None else None
    if isinstance(stored, jax.Array):  # read into its place already
        return _as_weak_as(leaf.value, stored.astype(leaf.value.dtype))
    found = decode(path, entry, arrays, spec.shape, dtype) if entry.nbytes else np.zeros(spec.shape, dtype)
    if leaf.value.dtype != dtype:
        found = found.astype(leaf.value.dtype)
    if isinstance(leaf.value, np.generic):
        return found[()]
    if isinstance(leaf.value, np.ndarray):
        return np.array(found)
    if sharding is None or sharding.is_fully_addressable:
        # At once to its place: `jnp.array` copies twice. What was read is nobody else's, so JAX may keep it as it is.
        array = _as_weak_as(leaf.value, jax.device_put(found, sharding))
        return array if sharding is None else jax.device_put(array, sharding)
    return place(found, sharding)


def _as_weak_as(like: Any, array: jax.Array) -> jax.Array:
    """`array`, weakly typed if `like` is (`jnp.array(1.5)` is): the type is part of what functions are compiled for."""
    if not (like.weak_type if isinstance(like, jax.ShapeDtypeStruct) else like.aval.weak_type):
        return array
    # Only Python numbers make weak types, and `at[...].set` keeps the type of what it writes into.
    weak = jnp.broadcast_to(jnp.asarray(np.zeros((), array.dtype).item()), array.shape)
    return weak.at[...].set(array) if weak.dtype == array.dtype else array
