"""Any directory that orbax wrote: its steps and items, and the arrays by path, without knowing what they were."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.core import State
from nnx.train._errors import CheckpointError, CheckpointNotFoundError, CorruptError
from nnx.train._leaves import Spec, path_of
from nnx.train._manifest import Entry, Manifest, decode
from nnx.train._reader import Reader
from nnx.train._storage import MANIFEST, Storage

__all__ = ["Found", "folders_of", "open_checkpoint"]

_STEP = re.compile(r"(?:.*[_-])?([0-9]+)")  # orbax may put a prefix before the step
_TREE = ("_METADATA", "manifest.ocdbt")


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint, ours or another's.

    Attributes:
        folder: where it is.
        step: its step; None for one that stands alone.
        manifest: our manifest; None for another's.
        items: the entries of each item by path; without sums for another's.
    """

    folder: Path
    step: int | None
    manifest: Manifest | None
    items: Mapping[str, Mapping[str, Entry]]
    _reader: Any
    _folders: Mapping[str, Path]

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        return sum(entry.nbytes for leaves in self.items.values() for entry in leaves.values())

    def paths(self) -> list[tuple[str, str, Entry]]:
        """Item, path and entry of each leaf."""
        return [(item, path, entry) for item, leaves in self.items.items() for path, entry in leaves.items()]

    def arrays(self, item: str, *, only: Any = None) -> dict[str, Any]:
        """What is stored of an item, by path: arrays as NumPy's, keys as the numbers that they are made of.

        Args:
            item: the item.
            only: a filter by path; None for everything.

        Raises:
            CorruptError: it cannot be read.
        """
        entries = {path: entry for path, entry in self.items[item].items() if only is None or self.matches(path, only)}
        if self.manifest is None:
            every = _read_tree(self._folders[item])
            return {path: every[path] for path in entries}
        stored = {path: entry for path, entry in entries.items() if entry.spec.kind in ("array", "key")}
        assert self.step is not None
        read = self._reader.read_arrays(self.step, item, list(stored.items()))
        return {path: _array_of(path, entry, read) for path, entry in stored.items()}

    @staticmethod
    def matches(path: str, only: Any) -> bool:
        """Whether a filter by path takes a leaf."""
        return bool(State([(tuple(path.split("/")), np.zeros(()))]).filter(only))

    def check(self, item: str, path: str, array: Any) -> None:
        """Raise a CorruptError if an array does not have its checksum."""
        entry = self.items[item][path]
        if not entry.holds(array):
            raise CorruptError(
                f"{self.folder} is damaged: `{path}` of `{item}` does not have its checksum", self.step, item, path
            )

    def damages(self) -> Iterator[str]:
        """Read everything, and say what is wrong: a line for each damage.

        What has no checksums can only be found unreadable, and not changed.
        """
        for item, leaves in self.items.items():
            try:
                arrays = self.arrays(item)
            except (CorruptError, CheckpointError, ValueError, OSError) as error:
                yield f"`{item}` cannot be read: {error}"
                continue
            for path, entry in leaves.items():
                if path in arrays and not entry.holds(arrays[path]):
                    yield f"`{path}` of `{item}` does not have its checksum"


def folders_of(root: Path) -> dict[int, Path]:
    """The checkpoints in a directory by step, whoever wrote them, in rising order.

    Raises:
        CheckpointNotFoundError: there is no such directory.
    """
    try:
        named = [(_STEP.fullmatch(folder.name), folder) for folder in root.iterdir() if folder.is_dir()]
    except OSError as error:
        raise CheckpointNotFoundError(f"cannot look into {root}: {error}") from error
    found = {int(name[1]): folder for name, folder in named if name and (folder.name.isdecimal() or _items(folder))}
    return dict(sorted(found.items()))


def open_checkpoint(path: Path, step: int | None = None) -> Found:
    """A checkpoint: that of a step in a directory of steps, the newest of them, or one that stands alone.

    Raises:
        CheckpointNotFoundError: there is none.
        CorruptError: its manifest is damaged.
        CheckpointError: it is neither ours nor orbax's.
    """
    path = path.absolute()
    if step is None and _is_checkpoint(path):
        folder = path
    else:
        folders = folders_of(path)
        if not folders:
            raise CheckpointNotFoundError(f"there is no checkpoint in {path}")
        if step is not None and step not in folders:
            raise CheckpointNotFoundError(
                f"there is no checkpoint of step {step} in {path}; there are: {list(folders)}"
            )
        folder = folders[max(folders) if step is None else step]
    number = _STEP.fullmatch(folder.name)
    own = int(number[1]) if number else None
    if (folder / MANIFEST).exists():
        if not folder.name.isdecimal() or own is None:
            raise CheckpointError(f"{folder} is one of nnx.train.Checkpointer that is not named by its step")
        import orbax.checkpoint as ocp

        # Only `read_arrays` is called, which needs no threads, and none are started before they are used.
        reader = Reader(ocp, Storage(folder.parent), ThreadPoolExecutor())
        manifest = reader.checked_manifest(own)
        return Found(folder, own, manifest, manifest.items, reader, {})
    trees = _items(folder)
    if not trees:
        raise CorruptError(f"{folder} is no checkpoint, or a damaged one: it has neither {MANIFEST} nor arrays", own)
    return Found(folder, own, None, {name: _entries(where) for name, where in trees.items()}, None, trees)


def _is_tree(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).exists() for name in _TREE)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or bool(_items(folder))


def _items(folder: Path) -> dict[str, Path]:
    """The parts of a checkpoint of orbax that hold arrays."""
    if _is_tree(folder):
        return {"default": folder}
    try:
        return {
            entry.name: entry
            for entry in sorted(folder.iterdir())
            if not _STEP.fullmatch(entry.name) and _is_tree(entry)
        }
    except OSError:
        return {}


def _handler() -> Any:
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _tree_of(folder: Path) -> Any:
    try:
        with _handler() as reader:
            found = reader.metadata(folder).item_metadata
    except Exception as error:  # what orbax and its libraries raise for a damaged file is of any type
        raise CorruptError(f"{folder} is damaged: what it holds cannot be read: {error}", None) from error
    tree = getattr(found, "tree", found)
    if tree is None:
        raise CorruptError(f"{folder} is damaged: it does not say what it holds", None)
    return tree


def _entries(folder: Path) -> dict[str, Entry]:
    entries = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(_tree_of(folder))[0]:
        if getattr(leaf, "dtype", None) is None:
            entries[path_of(keys)] = Entry(Spec(type(leaf).__name__))
            continue
        shape, dtype = tuple(getattr(leaf, "shape", ()) or ()), jnp.dtype(leaf.dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        entries[path_of(keys)] = Entry(Spec("array", shape, dtype.name), nbytes=nbytes)
    return entries


def _read_tree(folder: Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    tree = _tree_of(folder)
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    try:
        with _handler() as reader:
            found = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arguments))
    except Exception as error:  # as above
        reason = str(error).partition(" [tensorstore_spec=")[0]
        raise CorruptError(f"{folder} is damaged: it cannot be read: {reason}", None) from error
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(found)[0]}


def _array_of(path: str, entry: Entry, read: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    shape, dtype = entry.spec.shape, np.dtype(np.uint32) if entry.spec.kind == "key" else jnp.dtype(entry.spec.dtype)
    if not entry.nbytes:
        return np.zeros(shape, dtype)
    found: np.ndarray[Any, Any] = decode(path, entry, read, (*shape, -1) if entry.spec.kind == "key" else shape, dtype)
    return found
