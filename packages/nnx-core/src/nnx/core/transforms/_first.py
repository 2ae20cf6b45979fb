"""The first run of a loop's body that makes Variables: it finds none of them yet, as in a loop in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

from nnx.core.transforms._join import live_places
from nnx.core.transforms._lift import Frame
from nnx.core.transforms._outcome import Outcome
from nnx.core.transforms._staging import Once

__all__ = ["First", "either", "reads"]

Place = tuple[int, int]


class First:
    """What the trace that made Variables says in terms of the call that has them.

    Attributes:
        made: the places of the Variables that the body makes.
        writes: the places that the first run writes.
        drawn: how many keys the first run draws from the stream at a place.
    """

    def __init__(self, before: Frame, once: Once, after: Frame, outcome: Outcome) -> None:
        """Relate the two.

        Args:
            before: the call that the body was traced for first.
            once: that trace.
            after: the call with the Variables.
            outcome: what the trace learned.
        """
        self._once = once
        self._at = live_places(after)
        cells = {id(cell): (k, i) for k, layout in enumerate(after.layouts) for i, cell in enumerate(layout.cells)}
        self._places = {
            (k, i): cells.get(id(cell))
            for k, layout in enumerate(before.layouts)
            for i, cell in enumerate(layout.cells)
        }
        self.made = [self._at[i] for i, origin in enumerate(outcome.cells) if origin < 0 and i < len(self._at)]
        self.writes = [self._at[i] for i, written in enumerate(outcome.written) if written and i < len(self._at)]
        self.drawn = {self._at[i]: keys for _, i, keys in outcome.draws}

    def place(self, root: int, position: int) -> Place | None:
        """Where a cell of the call before is in the call after; None if the body let go of it."""
        return self._places[root, position]

    def run(self, *args: Any) -> Any:
        """Run the body, given what the trace was given."""
        leaves, tree = jax.tree.flatten(args)
        cast = [
            leaf if jax.typeof(leaf).dtype == aval.dtype else jax.lax.convert_element_type(leaf, aval.dtype)
            for leaf, aval in zip(leaves, self._once.closed.in_avals, strict=True)
        ]
        return self._once(*jax.tree.unflatten(tree, cast))

    def written(self, values: Sequence[Any]) -> dict[Place, Any]:
        """What the first run wrote, by place."""
        # What comes after these is of parts that the graph let go of.
        return dict(zip(self.writes, values, strict=False))


def reads(once: Once, positions: Sequence[int]) -> bool:
    """Whether a traced body uses any of these of its inputs, or hands one on."""
    jaxpr = once.closed.jaxpr
    wanted = {jaxpr.invars[i] for i in positions}
    used = {var for eqn in jaxpr.eqns for var in eqn.invars if not isinstance(var, Literal)}
    return bool(wanted & used) or any(not isinstance(var, Literal) and var in wanted for var in jaxpr.outvars)


def either(is_first: Any, first: Callable[..., Any], later: Callable[..., Any], *operands: Any) -> Any:
    """Run the one or the other, whose results have the same types but for what JAX promotes."""
    shapes = jax.eval_shape(later, *operands)

    def cast(*operands: Any) -> Any:
        return jax.tree.map(
            lambda leaf, like: leaf if leaf.dtype == like.dtype else jax.lax.convert_element_type(leaf, like.dtype),
            jax.tree.map(jax.numpy.asarray, first(*operands)),
            shapes,
        )

    return jax.lax.cond(is_first, cast, later, *operands)
