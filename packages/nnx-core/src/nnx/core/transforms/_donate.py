"""Donation: a donated buffer is gone, so no array of a donated Module may be anywhere else in the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx.core._layout import Layout, layout_after, layout_of
from nnx.core._object import Object
from nnx.core._variable import Cell
from nnx.core.transforms._lift import is_object

__all__ = ["separate"]


def separate(
    args: Sequence[Any],
    kwargs: dict[str, Any],
    numbers: Sequence[int],
    names: Sequence[str],
    *,
    by_buffer: bool = False,
) -> None:
    """Give each place in the donated Modules an array of its own, since a buffer can be donated but once.

    Args:
        args: the positional arguments.
        kwargs: those by name.
        numbers: which positional arguments are donated.
        names: which of those by name are.
        by_buffer: whether two arrays on one buffer, as `jax.device_put` makes them, are told to be one.
    """
    keys = _buffers if by_buffer else _identity
    everything = [(arg, i in numbers) for i, arg in enumerate(args)]
    everything += [(kwargs[name], name in names) for name in sorted(kwargs)]
    roots: list[Object] = []
    layouts: list[Layout] = []
    cells: dict[bool, list[Cell]] = {True: [], False: []}
    bare: dict[bool, list[Any]] = {True: [], False: []}
    for arg, donated in everything:
        for leaf in jax.tree.leaves(arg, is_leaf=is_object):
            if isinstance(leaf, Object):
                layout = layout_after(leaf, roots, layouts) if roots else layout_of(leaf)
                roots.append(leaf)
                layouts.append(layout)
                cells[donated] += layout.cells
            elif isinstance(leaf, jax.Array):
                bare[donated].append(leaf)
    # An array that is donated as an argument of its own is gone afterwards: whoever else holds it gets a copy.
    gone = {key for leaf in bare[True] for key in keys(leaf)}
    for cell in cells[False]:
        _copy_leaves(cell, gone, keys, note=False)
    used = gone | {key for leaf in bare[False] for key in keys(leaf)}
    held = jax.tree.leaves([cell._value for cell in cells[False]])
    used.update(key for leaf in held if isinstance(leaf, jax.Array) for key in keys(leaf))
    for cell in cells[True]:
        _copy_leaves(cell, used, keys, note=True)


def _identity(leaf: jax.Array) -> tuple[Any, ...]:
    return (id(leaf),)


def _buffers(leaf: jax.Array) -> tuple[Any, ...]:
    if isinstance(leaf, jax.core.Tracer) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        return (id(leaf),)
    return tuple([(shard.device, shard.data.unsafe_buffer_pointer()) for shard in leaf.addressable_shards])


def _copy_leaves(cell: Cell, used: set[Any], keys: Callable[[jax.Array], tuple[Any, ...]], *, note: bool) -> None:
    """Copy the arrays of a cell that are in use elsewhere; `note` the others as in use."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        own = keys(leaf)
        if not used.isdisjoint(own):
            return jnp.copy(leaf)
        if note:
            used.update(own)
        return leaf

    value = cell._value
    separate = jax.tree.map(one, value)
    if any(new is not old for new, old in zip(jax.tree.leaves(separate), jax.tree.leaves(value), strict=True)):
        cell._value = separate
