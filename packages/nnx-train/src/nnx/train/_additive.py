"""A checksum that adds up: an array's is the sum of its parts', however it is split, so that no process needs it whole.

    sum over all elements and words of  word * product of a weight for each axis  (mod 2**64)

An element's words are its bytes, up to four at a time. Weights are odd numbers that depend on the axis and the index
alone: a changed word always changes the sum, and any other damage does but for a chance of about 2**-32, that of a CRC.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["MODULUS", "partial_sum", "whole_sum"]

MODULUS = 1 << 64
_BLOCK = 1 << 12  # indices of an axis
_CHUNK = 1 << 16  # elements: what is widened to 64 bits at a time stays in the cache


def _mixed(axis: int, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Odd numbers from others, each its own: splitmix64."""
    z = (numbers.astype(np.uint64) + np.uint64((axis + 1) << 48)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def _weights(axis: int, start: int, size: int) -> np.ndarray[Any, Any]:
    """The weights of a range of an axis: one for the block that an index is in, times one for where it is in there."""
    first, last = start // _BLOCK, (start + size - 1) // _BLOCK
    blocks = _mixed(axis, np.arange(first, last + 1) + _BLOCK)
    weights = np.multiply.outer(blocks, _mixed(axis, np.arange(_BLOCK))).reshape(-1)
    return weights[start - first * _BLOCK :][:size]


def partial_sum(part: np.ndarray[Any, Any], start: Sequence[int]) -> int:
    """What a part of an array adds to the array's checksum.

    Args:
        part: the part, of the array's rank.
        start: the index of its first element in the array.

    Example:
        >>> x = np.arange(12.0).reshape(3, 4)
        >>> halves = partial_sum(x[:, :2], (0, 0)) + partial_sum(x[:, 2:], (0, 2))
        >>> halves % MODULUS == whole_sum(x)
        True
    """
    if not part.size:
        return 0
    width = min(part.dtype.itemsize, 4)
    flat: np.ndarray[Any, Any] = np.ascontiguousarray(part).reshape(-1).view(f"u{width}")
    *before, last = [*part.shape] or [1]
    *firsts, first = [*start] or [0]
    many = part.dtype.itemsize // width
    inner = np.multiply.outer(_weights(len(before), first, last), _weights(-1, 0, many)).reshape(-1)
    words = flat.reshape(-1, last * many)
    rows = np.zeros(len(words), np.uint64)
    # In columns as well: a row may be the whole array.
    for column in range(0, len(inner), _CHUNK):
        weights = inner[column : column + _CHUNK]
        step = max(1, _CHUNK // len(weights))
        for row in range(0, len(words), step):
            chunk = words[row : row + step, column : column + _CHUNK].astype(np.uint64)
            rows[row : row + step] += chunk @ weights
    outer = np.ones(1, np.uint64)
    for axis, (begin, size) in enumerate(zip(firsts, before, strict=True)):
        outer = np.multiply.outer(outer, _weights(axis, begin, size)).reshape(-1)
    return int((rows * outer).sum(dtype=np.uint64))


def whole_sum(array: np.ndarray[Any, Any]) -> int:
    """The checksum of a whole array."""
    return partial_sum(array, (0,) * array.ndim)
