"""Safetensors files: a value's arrays by path, for other programs, and theirs, with every difference listed."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnx.core import StructureError
from nnx.train._leaves import Spec, flatten, key_data, rebuild, spec_of
from nnx.train._manifest import Entry
from nnx.train._match import ANY_COLLECTION, match
from nnx.train._reader import decode_leaf
from nnx.train.interop._format import read, write

__all__ = ["load_safetensors", "save_safetensors", "write_leaves"]

_SPECS = "nnx"


def save_safetensors(path: str | os.PathLike[str], value: Any, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write the arrays of a value to a safetensors file, by their `/`-joined paths.

    Keys and Python numbers, which the format does not have, are kept too: keys as the numbers that they are made of,
    and what they are in the file's metadata. The file is there as a whole or not at all.

    Args:
        path: the file; its folder must be there.
        value: a Module, a State, a TrainState, an Optimizer, or a dict (or any pytree) of those and of arrays.
        metadata: texts by name, kept in the file's header.

    Raises:
        TypeError: a leaf of the value is nothing that a file can hold.
        StructureError: two leaves have one path.

    Example:
        >>> import tempfile, pathlib, nnx
        >>> model, other = (nnx.Linear(2, 3, ctx=nnx.context(seed)) for seed in (0, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "model.safetensors"
        ...     nnx.save_safetensors(file, model)
        ...     arrays = nnx.load_safetensors(file)
        ...     _ = nnx.load_safetensors(file, like=other)
        >>> sorted(arrays), bool((other.kernel == model.kernel).all())
        (['bias', 'kernel'], True)
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    specs = {}
    for leaf in flatten(value, "the value to save").leaves:
        spec = spec_of(leaf)
        if spec.kind in ("array", "key"):
            if not hasattr(leaf.value, "__array__"):
                raise TypeError(f"save_safetensors: `{leaf.path}` is a ShapeDtypeStruct, which has no data")
            arrays[leaf.path] = np.asarray(key_data(leaf.value))
        specs[leaf.path] = spec
    given = {str(name): str(text) for name, text in (metadata or {}).items()}
    if _SPECS in given:
        raise ValueError(f"save_safetensors: the name {_SPECS!r} of the metadata is taken")
    write_leaves(Path(path), arrays, specs, given)


def write_leaves(
    path: Path,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str],
) -> None:
    """Write arrays, and what they and the leaves without an array are."""
    told = {name: dataclasses.replace(spec, devices=None).to_json() for name, spec in specs.items()}
    write(path, arrays, {_SPECS: json.dumps(told, separators=(",", ":")), **metadata})


def load_safetensors(
    path: str | os.PathLike[str],
    like: Any = None,
    *,
    only: Any = None,
    rename: Mapping[str, str] | None = None,
    partial: bool = False,
    cast: bool = False,
) -> Any:
    """Read a safetensors file, whoever wrote it.

    Args:
        path: the file.
        like: a value of the structure that is wanted, as for `Checkpointer.restore`: Modules in it are changed in
            place, all of them or none, other values are made anew. None gives a dict of NumPy arrays by name.
        only: a filter: what of `like` is read; the rest stays as it is.
        rename: patterns of names in the file and the paths that they have in `like`: `{"old/**": "new/**"}`.
        partial: whether what the file lacks may stay as it is, and what `like` lacks may be left.
        cast: whether floats and integers may have another precision than in the file.

    Returns:
        The value; with `like=None` the arrays by name.

    Raises:
        ValueError: the file is no safetensors file, or a damaged one.
        StructureError: the file has other paths, shapes, dtypes or collections than `like`; the message lists them all.
    """
    arrays, metadata = read(Path(path))
    if like is None:
        return arrays
    entries = {name: Entry(spec, nbytes=_nbytes(arrays.get(name))) for name, spec in _specs(arrays, metadata).items()}
    flat = flatten(like, "`like`")
    found = match(0, "state", flat, entries, only=only, rename=rename, partial=partial, cast=cast)
    if found.report.problems:
        raise StructureError(f"{os.fspath(path)} does not fit:\n  " + "\n  ".join(found.report.problems))
    stored = {f"leaf:{name}": array for name, array in arrays.items()}
    values = [
        decode_leaf(leaf, *found.sources[leaf.path], stored) if leaf.path in found.sources else leaf.value
        for leaf in flat.leaves
    ]
    return rebuild({"state": flat}, {"state": values})["state"]


def _nbytes(array: np.ndarray[Any, Any] | None) -> int:
    return 0 if array is None else array.nbytes


def _specs(arrays: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str]) -> dict[str, Spec]:
    """What each leaf of a file is: as the file says, or what its array tells."""
    told: dict[str, Any] = {}
    if _SPECS in metadata:
        try:
            told = {name: Spec.from_json(fields) for name, fields in json.loads(metadata[_SPECS]).items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            told = {}  # another program's
    plain = {
        name: Spec("array", array.shape, array.dtype.name, ANY_COLLECTION)
        for name, array in arrays.items()
        if name not in told
    }
    numbers = {name: spec for name, spec in told.items() if name in arrays or spec.kind not in ("array", "key")}
    return {**plain, **numbers}
