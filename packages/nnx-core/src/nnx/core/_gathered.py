"""Gathered values: the list that one call has collected is good for the next, until a value is written anywhere.

A call would else read every cell of a model that nobody has written to since the last call. Whoever writes to a cell
says so here. The token is what correctness rests on: a list that was gathered before a write, in whatever thread, was
gathered under another token. That the lists are let go of as well keeps no array alive that a write has replaced.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

__all__ = ["Holder", "hold", "note_write", "writes"]


class Holder(Protocol):
    """What keeps a list of values: a Layout.

    Attributes:
        values: the list, or None.
        written: the token under which it was gathered.
        itself: a weak reference to the holder.
    """

    values: list[Any] | None
    written: object
    itself: weakref.ref[Any]


class _Writes:
    __slots__ = ("token",)

    def __init__(self) -> None:
        self.token: object = object()


writes = _Writes()
"""Its token is replaced by every write."""

_holders: list[weakref.ref[Any]] = []
_PRUNE_AT = 256


def note_write() -> object:
    """Say that a cell has been written: no list that was gathered before is good any more.

    Returns:
        The new token.
    """
    while _holders:
        try:
            holder = _holders.pop()()
        except IndexError:  # another thread was faster
            break
        if holder is not None:
            holder.values = None
    token = writes.token = object()
    return token


def hold(holder: Holder, values: list[Any], token: object) -> None:
    """Keep a list for the next call.

    Args:
        holder: what keeps it.
        values: the list, which nobody edits.
        token: the token as it was before the list was gathered.
    """
    holder.values = values
    holder.written = token
    if len(_holders) > _PRUNE_AT:
        _holders[:] = [item for item in _holders if item() is not None]
    _holders.append(holder.itself)
