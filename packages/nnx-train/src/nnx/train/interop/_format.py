"""The safetensors format: a header in JSON that says where in the file each array is, and the arrays' bytes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

__all__ = ["CODES", "read", "read_header", "write"]

CODES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "C64": np.dtype(np.complex64),
}
"""The dtypes that the format has, by its names for them."""
_NAMES = {dtype: code for code, dtype in CODES.items()}
_LONGEST_HEADER = 100_000_000
_LENGTH = 8
_METADATA = "__metadata__"


def write(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str]) -> None:
    """Write a file, which is there as a whole or not at all.

    Raises:
        TypeError: an array has a dtype that the format has not.
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    # The widest first, so that each begins at a multiple of its own width.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    end = 0
    for name in order:
        array = arrays[name]
        if array.dtype not in _NAMES:
            raise TypeError(f"{path}: `{name}` is of {array.dtype}, which a safetensors file does not hold")
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    fresh = path.with_name(f".{path.name}.new")
    try:
        with fresh.open("wb") as file:
            file.write(len(text).to_bytes(_LENGTH, "little"))
            file.write(text)
            for name in order:
                if arrays[name].size:
                    file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def read_header(path: Path) -> tuple[dict[str, tuple[np.dtype[Any], tuple[int, ...], int]], dict[str, str], int]:
    """What a file holds, without the arrays.

    Returns:
        For each name the dtype, the shape and where in the data it begins; the metadata; and where the data begin.

    Raises:
        ValueError: it is no safetensors file, or a damaged one.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if size < _LENGTH or length > min(_LONGEST_HEADER, size - _LENGTH):
            raise ValueError(
                f"{path} is no safetensors file, or has been cut short: its header would be {length} bytes"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop(_METADATA, {})
        entries = {name: _entry(fields) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}") from None
    begin = _LENGTH + length
    end = 0
    for name, (dtype, shape, start) in sorted(entries.items(), key=lambda item: (item[1][2], _nbytes(item[1]))):
        if start != end:
            raise ValueError(f"{path} is damaged: `{name}` begins at {start}, and what is before it ends at {end}")
        end = start + _nbytes((dtype, shape, start))
    if begin + end != size:
        raise ValueError(f"{path} is damaged: it has {size} bytes, and its header speaks of {begin + end}")
    return entries, metadata, begin


def read(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """The arrays of a file by name, and its metadata.

    Raises:
        ValueError: it is no safetensors file, or a damaged one.
        OSError: it cannot be read.
    """
    entries, metadata, begin = read_header(path)
    data = np.fromfile(path, np.uint8, offset=begin)
    arrays = {}
    for name, (dtype, shape, start) in entries.items():
        own = data[start : start + _nbytes((dtype, shape, start))]
        if dtype.kind == "b" and own.size and own.max() > 1:
            raise ValueError(f"{path} is damaged: `{name}` is of booleans, and has other bytes than 0 and 1")
        arrays[name] = own.view(dtype).reshape(shape)
    return arrays, metadata


def _entry(fields: Mapping[str, Any]) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    if fields["dtype"] not in CODES:
        raise ValueError(f"no dtype {fields['dtype']!r} is known")
    dtype, shape = CODES[fields["dtype"]], tuple(fields["shape"])
    start, end = fields["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError("a shape or an offset is no natural number")
    if end - start != _nbytes((dtype, shape, start)):
        raise ValueError(f"{end - start} bytes for {dtype}{list(shape)}")
    return dtype, shape, start


def _nbytes(entry: tuple[np.dtype[Any], tuple[int, ...], int]) -> int:
    return entry[0].itemsize * math.prod(entry[1])
