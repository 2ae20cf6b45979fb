"""Donation: a donated buffer is gone, so no array of a donated Module may be anywhere else in the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx.core._layout import layout_of, values_of
from nnx.core._object import Object
from nnx.core._variable import Cell
from nnx.core.transforms._lift import is_object

__all__ = ["separate"]


def separate(args: Sequence[Any], kwargs: dict[str, Any], numbers: Sequence[int], names: Sequence[str]) -> None:
    """Give each place in the donated Modules an array of its own, since a buffer can be donated but once.

    Args:
        args: the positional arguments.
        kwargs: those by name.
        numbers: which positional arguments are donated.
        names: which of those by name are.
    """
    if _apart(args if not kwargs else (*args, *kwargs.values())):
        return  # as it is nearly always: no array is in two places
    donated: list[Any] = []
    others: list[Any] = []
    for i, arg in enumerate(args):
        (donated if i in numbers else others).append(arg)
    for name, arg in kwargs.items():
        (donated if name in names else others).append(arg)
    cells, bare = _cells_and_leaves(others)
    own_cells, own_bare = _cells_and_leaves(donated)
    # An array that is donated as an argument of its own is gone afterwards: whoever else holds it gets a copy.
    gone = {id(leaf) for leaf in own_bare if isinstance(leaf, jax.Array)}
    for cell in dict.fromkeys(cells):
        _copy_leaves(cell, gone, note=False)
    used = gone | {id(leaf) for leaf in bare}
    used.update(id(leaf) for leaf in jax.tree.leaves([cell._value for cell in cells]))
    beside = set(cells)
    for cell in dict.fromkeys(own_cells):
        if cell not in beside:
            _copy_leaves(cell, used, note=True)


_array_types: set[type] = set()
"""The types of JAX's arrays, as they are met."""


def _apart(args: Sequence[Any]) -> bool:
    """Whether no array is in two places. This is on the path of every donated call."""
    every: list[Any] = []
    for arg in args:
        if isinstance(arg, Object):
            every += values_of(layout_of(arg))
        elif type(arg) in _array_types:
            every.append(arg)
        else:
            cells, bare = _cells_and_leaves(arg)
            every += [*[cell._value for cell in cells], *bare]
    if not _array_types.issuperset(map(type, every)):
        every = [leaf for leaf in jax.tree.leaves(every) if isinstance(leaf, jax.Array)]
        _array_types.update(kind for kind in map(type, every) if not issubclass(kind, jax.core.Tracer))
    return len(set(map(id, every))) == len(every)


def _copy_leaves(cell: Cell, used: set[int], *, note: bool) -> None:
    """Copy the arrays of a cell that are in use elsewhere; `note` the others as in use."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if id(leaf) in used:
            return jnp.copy(leaf)
        if note:
            used.add(id(leaf))
        return leaf

    value = cell._value
    separate = jax.tree.map(one, value)
    if any(new is not old for new, old in zip(jax.tree.leaves(separate), jax.tree.leaves(value), strict=True)):
        cell._value = separate


def _cells_and_leaves(tree: Any) -> tuple[list[Cell], list[Any]]:
    """The cells of the Modules in a pytree, and its other leaves."""
    cells: list[Cell] = []
    bare = []
    for leaf in jax.tree.leaves(tree, is_leaf=is_object):
        if isinstance(leaf, Object):
            cells += layout_of(leaf).cells
        else:
            bare.append(leaf)
    return cells, bare
