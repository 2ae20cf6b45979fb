"""The manifest: what a checkpoint holds, by typed path, with a checksum for each leaf and one over itself."""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from nnx.train._additive import whole_sum
from nnx.train._leaves import Flat, Leaf, Spec, key_data, spec_of

__all__ = [
    "PACKED",
    "Entry",
    "FutureFormatError",
    "Manifest",
    "checksum",
    "decode",
    "decode_state",
    "encode",
    "encode_state",
    "snapshot",
]

_FORMAT = "nnx-checkpoint"
_VERSION = 2
PACKED = "packed"
"""The name of the one array that all small leaves are in. It has no `/`, and no leaf of a value is called so beside it:
their names get a prefix."""
_SMALL = 1 << 16
_ALIGN = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One leaf in a checkpoint.

    Attributes:
        spec: its type.
        crc: the checksum of its bytes; None if none was asked for or there are no bytes.
        offset: where it is in the packed array; None if it is an array of its own.
        nbytes: the number of its bytes.
        sum: the sum of the checksums of its parts, if several processes held them; None for others.
    """

    spec: Spec
    crc: int | None = None
    offset: int | None = None
    nbytes: int = 0
    sum: int | None = None

    @property
    def checked(self) -> bool:
        """Whether there is a checksum."""
        return self.crc is not None or self.sum is not None

    def holds(self, array: np.ndarray[Any, Any]) -> bool:
        """Whether an array has the checksum, if there is one; of a key, whether its numbers have."""
        if self.sum is not None:
            return whole_sum(array) == self.sum
        return self.crc is None or checksum(array) == self.crc


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: the step.
        items: for each item ("state", "context") its leaves by `/`-joined path.
        metrics: what was given to `save` as `metrics`, as floats.
        extra: what was given to `save` as `extra`.
        data_iter: the state of the data iterator, as JSON; None if there was none.
    """

    step: int
    items: dict[str, dict[str, Entry]]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    extra: Any = None
    data_iter: Any = None

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        return sum(entry.nbytes for leaves in self.items.values() for entry in leaves.values())

    def to_text(self) -> str:
        """The file's text."""
        items = {
            item: {
                path: {
                    **entry.spec.to_json(),
                    **({} if entry.crc is None else {"crc": entry.crc}),
                    **({} if entry.offset is None else {"offset": entry.offset}),
                    **({} if entry.sum is None else {"sum": entry.sum}),
                    "nbytes": entry.nbytes,
                }
                for path, entry in leaves.items()
            }
            for item, leaves in self.items.items()
        }
        body = {
            "step": self.step,
            "items": items,
            "metrics": {name: repr(value) for name, value in self.metrics.items()},
            "extra": self.extra,
            "data_iter": self.data_iter,
        }
        head = {"format": _FORMAT, "version": _VERSION, "crc": _crc_of(body), "body": body}
        return json.dumps(head, indent=1)

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """The inverse of `to_text`.

        Raises:
            ValueError: the text is damaged, or of another format; the message says so.
        """
        try:
            head = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the manifest is no JSON: {error}") from None
        if not isinstance(head, dict) or head.get("format") != _FORMAT:
            raise ValueError("the manifest is not one of nnx.train.Checkpointer")
        if head.get("version") != _VERSION:
            raise FutureFormatError(
                f"it has format version {head.get('version')}, and this nnx-train reads version {_VERSION}"
            )
        body: Any = head.get("body")
        if head.get("crc") != _crc_of(body):
            raise ValueError("the manifest does not have its own checksum")
        items: dict[str, dict[str, Entry]] = {}
        for item, leaves in body["items"].items():
            items[item] = {}
            for path, fields in leaves.items():
                own = dict(fields)
                crc, offset, total = own.pop("crc", None), own.pop("offset", None), own.pop("sum", None)
                nbytes = own.pop("nbytes")
                items[item][path] = Entry(Spec.from_json(own), crc, offset, nbytes, total)
        metrics = {name: float(value) for name, value in body["metrics"].items()}
        return cls(body["step"], items, metrics, body["extra"], body["data_iter"])


class FutureFormatError(ValueError):
    """A checkpoint is of another version of the format."""


def _crc_of(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def checksum(array: np.ndarray[Any, Any]) -> int:
    """The checksum of an array's bytes, in C order."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return zlib.crc32(flat.view(np.uint8).data) if flat.size else 0


def snapshot(items: Mapping[str, Flat], pool: ThreadPoolExecutor) -> dict[str, dict[str, Any]]:
    """All arrays on the host as they are now, by item and path."""

    def copied(leaf: Leaf) -> Any:
        data = key_data(leaf.value)
        # A view of a JAX array keeps its buffer: if it is donated later, JAX copies instead of overwriting it.
        return np.asarray(data) if isinstance(data, jax.Array) else np.array(data, copy=True)

    specs = {name: {leaf.path: spec_of(leaf) for leaf in flat.leaves} for name, flat in items.items()}
    stored = [(name, leaf) for name, flat in items.items() for leaf in flat.leaves if specs[name][leaf.path].stored]
    arrays = dict(
        zip([(name, leaf.path) for name, leaf in stored], pool.map(copied, [leaf for _, leaf in stored]), strict=True)
    )
    return {
        name: {path: (spec, arrays.get((name, path))) for path, spec in leaves.items()}
        for name, leaves in specs.items()
    }


def encode(
    leaves: Mapping[str, Any], *, checked: bool, pool: ThreadPoolExecutor
) -> tuple[dict[str, Entry], dict[str, np.ndarray[Any, Any]]]:
    """The entries of one item, and the arrays to write: large ones under `leaf:` and their path, small ones packed."""
    large: dict[str, np.ndarray[Any, Any]] = {}
    small: dict[str, np.ndarray[Any, Any]] = {}
    for path, (_, array) in leaves.items():
        if array is not None:
            (small if array.nbytes <= _SMALL else large)[path] = array
    every = {**large, **small}
    sums = dict(zip(every, pool.map(checksum, every.values()), strict=True)) if checked else {}
    offsets, end = {}, 0
    for path, array in small.items():
        offsets[path] = end
        end += -(-array.nbytes // _ALIGN) * _ALIGN
    arrays: dict[str, np.ndarray[Any, Any]] = {f"leaf:{path}": array.view(_Held) for path, array in large.items()}
    if small:
        packed = np.zeros(end, np.uint8)
        for path, array in small.items():
            packed[offsets[path] : offsets[path] + array.nbytes] = (
                np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            )
        arrays[PACKED] = packed.view(_Held)
    entries = {
        path: Entry(spec, sums.get(path), offsets.get(path), 0 if array is None else array.nbytes)
        for path, (spec, array) in leaves.items()
    }
    return entries, arrays


class _Held(np.ndarray[Any, Any]):
    """An array that nobody writes to while it is saved. Of any other one that it is given orbax makes a copy."""

    def __deepcopy__(self, memo: Any) -> _Held:
        return self


def decode(path: str, entry: Entry, arrays: Mapping[str, Any], shape: tuple[int, ...], dtype: Any) -> Any:
    """The array of an entry, from the arrays that were read.

    Args:
        path: the path.
        entry: the entry.
        arrays: what was read.
        shape: the array's shape.
        dtype: its dtype.
    """
    if entry.offset is None:
        whole = np.asarray(arrays[f"leaf:{path}"])
        return np.ascontiguousarray(whole).reshape(-1).view(dtype).reshape(shape)
    data = np.asarray(arrays[PACKED])[entry.offset : entry.offset + entry.nbytes]
    return data.copy().view(dtype).reshape(shape)


def encode_state(state: Any) -> Any:
    """The state of a data iterator as JSON holds it.

    Raises:
        TypeError: it is neither bytes nor what JSON can hold.
    """
    if isinstance(state, (bytes, bytearray)):
        return {"bytes": base64.b64encode(bytes(state)).decode()}
    try:
        return {"json": json.loads(json.dumps(state))}
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Checkpointer.save: the state of `data_iter` must be bytes or what JSON can hold: {error}"
        ) from None


def decode_state(encoded: Any) -> Any:
    """The inverse of `encode_state`."""
    return base64.b64decode(encoded["bytes"]) if "bytes" in encoded else encoded["json"]
