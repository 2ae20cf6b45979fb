"""The first run of a loop's body that makes Variables or sets statics: it finds them as they were before the loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

from nnx.core._graph import CELL, METHOD, OBJECT, ModuleDef
from nnx.core.transforms._join import live_places
from nnx.core.transforms._lift import Frame
from nnx.core.transforms._outcome import Outcome
from nnx.core.transforms._same import same_computation
from nnx.core.transforms._staging import Once

__all__ = ["First", "Numbers", "either", "numbers_of", "reads", "restructures"]

Place = tuple[int, int]


class Numbers:
    """Which inputs and outputs of a traced body are what, by their numbers.

    Attributes:
        others: the inputs that are no Variable's.
        inputs: for each place the inputs that hold its value.
        out: the outputs that the body returned.
        written: the outputs that are written to Variables: by place, or for the first run in the order of its values.
        drawn: how many keys are drawn from the stream at a place.
    """

    __slots__ = ("drawn", "inputs", "others", "out", "written")

    def __init__(
        self,
        others: Sequence[int],
        inputs: Mapping[Place, Sequence[int]],
        out: Sequence[int],
        written: Any,
        drawn: Mapping[Place, int],
    ) -> None:
        self.others, self.inputs, self.out, self.written, self.drawn = others, inputs, out, written, drawn


def numbers_of(tree: Any) -> Any:
    """A pytree of the same structure with the number of each leaf in its place."""
    structure: Any = jax.tree.structure(tree)
    return jax.tree.unflatten(structure, list(range(structure.num_leaves)))


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
        self.drawn = {self._at[i]: keys for _, i, keys in outcome.draws if i < len(self._at)}

    def differs(self, once: Once, before: Numbers, after: Numbers) -> bool:
        """Whether the first run does anything else than those after it, as far as can be told.

        Args:
            once: the trace of a run after the first.
            before: the numbers of the first run's inputs and outputs, with the places of the call before.
            after: the same of the runs after it, with the places of the call after.
        """
        if self.drawn != after.drawn or len(before.others) != len(after.others):
            return True
        one, other = self._once.closed, once.closed
        known = {}
        inputs = list(zip(before.others, after.others, strict=True))
        for place, numbers in before.inputs.items():
            at = self._places[place]
            if at is not None and at in after.inputs:
                known[at] = numbers
                inputs += zip(numbers, after.inputs[at], strict=True)
        outputs = [(one.jaxpr.outvars[i], other.jaxpr.outvars[j]) for i, j in zip(before.out, after.out, strict=True)]
        written = dict(zip(self.writes, before.written, strict=False))
        for at in {*written, *after.written}:
            # What a run leaves alone it hands on.
            mine = [one.jaxpr.outvars[i] for i in written[at]] if at in written else None
            theirs = [other.jaxpr.outvars[i] for i in after.written[at]] if at in after.written else None
            if mine is None and at in known:
                mine = [one.jaxpr.invars[i] for i in known[at]]
            if theirs is None and at in after.inputs:
                theirs = [other.jaxpr.invars[i] for i in after.inputs[at]]
            if mine is None or theirs is None or len(mine) != len(theirs):
                return True
            outputs += zip(mine, theirs, strict=True)
        return not same_computation(one, other, inputs, outputs)

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


def restructures(before: ModuleDef[Any], outcome: Outcome, exempt: Collection[int]) -> bool:
    """Whether a trace changes more of a structure than to add Variables: statics, what attributes refer to.

    Args:
        before: the definition of the distinct roots of the call.
        outcome: what the trace learned.
        exempt: objects, by their number in `before`, that may change.
    """
    post = outcome.post
    if post is None:
        return False
    for node, origin in zip(post.nodes, outcome.objects, strict=True):
        if origin < 0:
            return True
        if origin in exempt:
            continue
        left = {name: (kind, payload) for name, kind, payload in before.nodes[origin].attributes}
        for name, kind, payload in node.attributes:
            if kind is CELL and outcome.cells[payload] < 0 and name not in left:
                continue
            if not _refers_alike(kind, payload, left.pop(name, None), outcome):
                return True
        if left:
            return True
    return False


def _refers_alike(kind: str, payload: Any, before: Any, outcome: Outcome) -> bool:
    if before is None or before[0] is not kind:
        return False
    if kind is CELL:
        return bool(outcome.cells[payload] == before[1])
    if kind is OBJECT:
        return bool(outcome.objects[payload] == before[1])
    if kind is METHOD:
        return outcome.objects[payload[0]] == before[1][0] and payload[1] == before[1][1]
    return bool(payload.key == before[1].key)


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
