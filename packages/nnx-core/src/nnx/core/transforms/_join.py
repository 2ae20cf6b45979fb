"""What several traces of one call changed, as one: each gives what any of them writes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nnx.core._context import RngStream
from nnx.core._errors import StructureError
from nnx.core._explain import attribute_differences
from nnx.core._graph import walk
from nnx.core._layout import walk_in_turn
from nnx.core.transforms._lift import Frame
from nnx.core.transforms._outcome import HoleNode, Outcome, distinct, identity_differences
from nnx.core.transforms._staging import Operands

__all__ = ["Join", "live_places"]

Place = tuple[int, int]


def live_places(frame: Frame) -> list[Place]:
    """For each cell in the order of an Outcome's `cells`, its root and its position in that root's layout."""
    where = {id(cell): (k, i) for k, layout in enumerate(frame.layouts) for i, cell in enumerate(layout.cells)}
    return [where[id(cell)] for graph in walk_in_turn(distinct(frame.roots)) for cell in graph.cells]


class Join:
    """The common outcome of several traces, and how each comes to the values that it asks for.

    Attributes:
        outcome: the common outcome.
    """

    def __init__(
        self, operands: Operands, outs: Sequence[tuple[Any, Any, Outcome]], names: Sequence[str], what: str
    ) -> None:
        """Join.

        Args:
            operands: what the traces had as their input.
            outs: for each trace its output, its values and its outcome.
            names: what an error calls each.
            what: the transform.

        Raises:
            StructureError: they leave different structures, or return different ones.
        """
        self._operands = operands
        self._frame = operands.call.frame
        self._check_outputs([out for out, _, _ in outs], names, what)
        outcomes = [outcome for _, _, outcome in outs]
        if any(outcome.post is not None for outcome in outcomes):
            self._check_structures(outcomes, names, what)
            self._join_structures(outcomes)
        else:
            self._join_values(outcomes)

    def values(self, number: int, values: Sequence[Any], dynamic: Sequence[Any]) -> list[Any]:
        """What the common outcome asks for, in trace `number`, from what the trace wrote and what it was given."""
        return [source(values, dynamic) for source in self._sources[number]]

    def _check_outputs(self, outs: Sequence[Any], names: Sequence[str], what: str) -> None:
        first: Any
        first, *rest = [jax.tree.flatten(out, is_leaf=_is_hole) for out in outs]
        for name, (leaves, tree) in zip(names[1:], rest, strict=True):
            if tree != first[1]:
                raise StructureError(
                    f"the branches of {what} return different structures: {names[0]} returns {first[1]}, {name} {tree}"
                )
            for i, (one, other) in enumerate(zip(first[0], leaves, strict=True)):
                if _text(one, self._frame) != _text(other, self._frame):
                    raise StructureError(
                        f"the branches of {what} return different things at leaf {i} of the output: {names[0]} returns "
                        f"{_text(one, self._frame)}, {name} {_text(other, self._frame)}"
                    )

    def _check_structures(self, outcomes: Sequence[Outcome], names: Sequence[str], what: str) -> None:
        before = walk(distinct(self._frame.roots)).moduledef
        first = outcomes[0]
        for name, outcome in zip(names[1:], outcomes[1:], strict=True):
            same = (outcome.post, outcome.objects, outcome.cells) == (first.post, first.objects, first.cells)
            if not same:
                lines = "\n  ".join(
                    attribute_differences(first.post or before, outcome.post or before)
                    or identity_differences(before, first, outcome)
                    or ["the order or sharing of Modules differs"]
                )
                raise StructureError(
                    f"the branches of {what} leave the Modules in different structures; after {names[0]}, and after "
                    f"{name}:\n  {lines}\n"
                    "Which branch runs is known only when the compiled code runs, so both must create, delete and "
                    "change the same attributes: give the attribute a first value before, or in each branch"
                )

    def _join_values(self, outcomes: Sequence[Outcome]) -> None:
        written: dict[Place, None] = {}
        for outcome in outcomes:
            written.update(dict.fromkeys(_places(outcome)))
        # In the order that an Outcome has: root by root.
        places = sorted(written)
        draws: dict[Place, int] = {}
        for outcome in outcomes:
            for root, position, keys in outcome.draws:
                if (root, position) not in written:
                    draws[root, position] = max(keys, draws.get((root, position), 0))
        writes: dict[int, list[int]] = {}
        for root, position in places:
            writes.setdefault(root, []).append(position)
        self.outcome = Outcome(
            writes=tuple((root, tuple(positions)) for root, positions in writes.items()),
            draws=tuple((*place, keys) for place, keys in draws.items()),
            streams=any(isinstance(self._frame.layouts[k].cells[i], RngStream) for k, i in places),
            holes=outcomes[0].holes,
        )
        self._sources = []
        for outcome in outcomes:
            own = {place: i for i, place in enumerate(_places(outcome))}
            drawn = {(root, position): keys for root, position, keys in outcome.draws}
            self._sources.append([self._source(own.get(place), place, drawn.get(place, 0)) for place in places])

    def _join_structures(self, outcomes: Sequence[Outcome]) -> None:
        first = outcomes[0]
        at = live_places(self._frame)
        written = [any(flags) for flags in zip(*[outcome.written for outcome in outcomes], strict=True)]
        lost = sorted({number for outcome in outcomes for number in outcome.lost})
        draws: dict[int, int] = {}
        for outcome in outcomes:
            for _, position, keys in outcome.draws:
                if not written[position]:
                    draws[position] = max(keys, draws.get(position, 0))
        self.outcome = first._replace(
            written=tuple(written),
            lost=tuple(lost),
            draws=tuple((-1, position, keys) for position, keys in draws.items()),
        )
        self._sources = []
        for outcome in outcomes:
            drawn = {position: keys for _, position, keys in outcome.draws}
            count = 0
            sources = []
            for i, (wanted, own) in enumerate(zip(written, outcome.written, strict=True)):
                if wanted:
                    place = at[outcome.cells[i]] if outcome.cells[i] >= 0 else (-1, -1)
                    sources.append(self._source(count if own else None, place, drawn.get(i, 0)))
                count += own
            for number in lost:
                own_number = outcome.lost.index(number) if number in outcome.lost else None
                sources.append(self._source(None if own_number is None else count + own_number, at[number], 0))
            self._sources.append(sources)

    def _source(self, own: int | None, place: Place, drawn: int) -> Callable[[Sequence[Any], Sequence[Any]], Any]:
        if own is not None:
            return functools.partial(_written, own)
        root, position = place
        return functools.partial(_given, self._operands.values_of(root), position, drawn)


def _written(own: int, values: Sequence[Any], _: Sequence[Any]) -> Any:
    return values[own]


def _given(where: int, position: int, drawn: int, _: Sequence[Any], dynamic: Sequence[Any]) -> Any:
    value = dynamic[where][position]
    return (value[0], value[1] + np.uint32(drawn)) if drawn else value


def _places(outcome: Outcome) -> list[Place]:
    return [(root, position) for root, positions in outcome.writes for position in positions]


def _is_hole(value: Any) -> bool:
    return type(value) is HoleNode


def _text(leaf: Any, frame: Frame) -> str:
    if type(leaf) is HoleNode:
        hole = leaf.hole
        if hole.root >= 0:
            return f"the {type(frame.roots[hole.root]).__name__} of argument {hole.root}"
        return f"Module number {hole.number}"
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
