"""How the arguments and the output of a scanned function are laid out: what is the carry, and what is sliced."""

from __future__ import annotations

import inspect
from typing import Any, Final

import jax
import jax.numpy as jnp

from nnx.core._errors import StructureError
from nnx.core._object import Object
from nnx.core.transforms._axes import CARRY, CARRY_ALL, axes_like
from nnx.core.transforms._inputs import Call
from nnx.core.transforms._lift import Packed
from nnx.core.transforms._staging import is_array

__all__ = ["Carry", "axes_of_rest", "is_constructor", "joined", "leaf_axes", "moved", "parts"]


class _CarryMark:
    """Marks the argument, and the part of the output, that is the carry of a scan."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "nnx.Carry"


Carry: Final = _CarryMark()
"""In `in_axes` and `out_axes` of `nnx.scan`: the argument, and the part of the output, that is the carry."""


def is_constructor(function: Any) -> bool:
    """Whether a function makes a Module, and so has no carry."""
    return inspect.isclass(function) or getattr(function, "__name__", "") == "__init__"


def leaf_axes(call: Call, args: tuple[Any, ...], in_axes: Any, bound: int, makes: bool) -> tuple[list[Any], int | None]:
    """The axis or the category of each leaf of a call's arguments, and the number of the one that is the carry.

    Args:
        call: the call.
        args: its positional arguments.
        in_axes: as the user gave it.
        bound: how many of the arguments come from a bound method.
        makes: whether the function is a constructor.
    """
    count = len(args)
    carried: int | None = None
    axes: list[Any] = [CARRY] * (call.spans[bound - 1][1] if bound else 0)
    if isinstance(in_axes, list):
        in_axes = tuple(in_axes)
    marked = isinstance(in_axes, tuple) and any(axis is Carry for axis in in_axes)
    if in_axes is Carry:
        in_axes, marked = (Carry,), True
    if marked:
        if len(in_axes) != count - bound or sum(axis is Carry for axis in in_axes) > 1:
            raise ValueError(
                f"in_axes of nnx.scan is {in_axes}: with nnx.Carry it has an entry for each of the "
                f"{count - bound} positional arguments, and one of them is nnx.Carry"
            )
        for n, axis in enumerate(in_axes, start=bound):
            if axis is Carry:
                carried = n
                axes += [CARRY_ALL] * (call.spans[n][1] - call.spans[n][0])
            else:
                axes += axes_like("nnx.scan", axis, call, n, f"argument {n - bound}")
    else:
        rest = list(in_axes) if isinstance(in_axes, tuple) else None
        for n in range(bound, count):
            width = call.spans[n][1] - call.spans[n][0]
            if isinstance(args[n], Object):
                axes += [0 if makes and n == 0 else CARRY]
            elif makes:
                axes += [None] * width
            elif carried is None:
                carried = n
                axes += [CARRY_ALL] * width
            else:
                if rest is not None and not rest:
                    raise ValueError(
                        f"in_axes of nnx.scan is {in_axes}: too few entries for the arguments after the carry"
                    )
                axis = in_axes if rest is None else rest.pop(0)
                axes += axes_like("nnx.scan", axis, call, n, f"argument {n - bound}")
        if rest:
            raise ValueError(f"in_axes of nnx.scan is {in_axes}: more entries than arguments after the carry")
    axes += [CARRY if type(leaf) is Packed else None for leaf in call.leaves[slice(*call.spans[-1])]]
    axes = [
        None if isinstance(axis, int) and type(leaf) is not Packed and not is_array(leaf) else axis
        for leaf, axis in zip(call.leaves, axes, strict=True)
    ]
    return axes, carried


def parts(function: Any, out: Any, out_axes: Any) -> tuple[Any, Any]:
    """What a function with a carry returned, as the carry and the rest."""
    if out_axes is None or out_axes is Carry:
        return out, None
    if isinstance(out_axes, (tuple, list)) and any(axis is Carry for axis in out_axes):
        if not isinstance(out, tuple) or len(out) != len(out_axes):
            raise StructureError(
                f"the body of nnx.scan returns {len(out_axes)} parts by its out_axes, got {_count(out)}"
            )
        at = [axis is Carry for axis in out_axes].index(True)
        return out[at], out[:at] + out[at + 1 :]
    if not isinstance(out, tuple) or len(out) != 2:
        raise StructureError(
            f"the body of nnx.scan, `{getattr(function, '__qualname__', function)}`, returns (carry, y), "
            f"got {_count(out)}; with out_axes=None it returns the carry alone"
        )
    return out


def axes_of_rest(out_axes: Any) -> Any:
    """The `out_axes` of what is not the carry."""
    if isinstance(out_axes, (tuple, list)):
        return tuple(axis for axis in out_axes if axis is not Carry)
    return out_axes


def joined(carry: Any, ys: Any, out_axes: Any) -> Any:
    """The carry and the rest, as the user asked for them."""
    if out_axes is None or out_axes is Carry:
        return carry
    if isinstance(out_axes, (tuple, list)) and any(axis is Carry for axis in out_axes):
        at = [axis is Carry for axis in out_axes].index(True)
        return (*ys[:at], carry, *ys[at:])
    return carry, ys


def _count(out: Any) -> str:
    return f"a tuple of {len(out)}" if isinstance(out, tuple) else f"a {type(out).__name__}"


def moved(axes: Any, ys: Any) -> Any:
    """Outputs that are stacked along their first axis, with that axis where `out_axes` wants it."""
    try:
        return jax.tree.map(lambda axis, below: jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, axis), below), axes, ys)
    except ValueError:
        raise ValueError(
            f"out_axes of nnx.scan does not fit its output: {axes!r} is no prefix of {jax.tree.structure(ys)}"
        ) from None
