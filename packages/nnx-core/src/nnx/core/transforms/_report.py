"""Report: what a trace of `jit` learned, in the form that costs a call the least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnx.core._layout import Layout
from nnx.core._object import Object
from nnx.core._tracing import current_trace
from nnx.core.transforms._lift import Frame
from nnx.core.transforms._outcome import Outcome, finish

__all__ = ["Report"]


class Report:
    """An Outcome as the one key of a dict, whose value is what comes out.

    JAX makes a dict without calling Python, as it would have to for a node of ours. It compares keys by identity.

    Attributes:
        outcome: the whole of it.
        whole: the numbers of the roots all of whose cells are written, if that is all there is to do; else None.
        simple: whether `writes` and `draws` say all.
        writes: for each root with changed cells its number, their positions (None for all), and whether streams are
            among them.
        draws: for each stream that was drawn from the root's number, its position, and the number of keys.
        touched: for each root in `writes` and `draws` its number and the positions.
    """

    __slots__ = ("draws", "outcome", "simple", "touched", "whole", "writes")

    def __init__(self, outcome: Outcome, spans: Sequence[tuple[int, int]]) -> None:
        """Note an outcome.

        Args:
            outcome: it.
            spans: for each root the range of its cells.
        """
        self.outcome = outcome
        self.simple = outcome.post is None and not outcome.holes
        self.writes = tuple(
            [
                (number, None if len(positions) == spans[number][1] - spans[number][0] else positions, outcome.streams)
                for number, positions in outcome.writes
            ]
        )
        self.draws = outcome.draws
        whole = (
            self.simple and not (outcome.draws or outcome.streams) and all(write[1] is None for write in self.writes)
        )
        self.whole = tuple([write[0] for write in self.writes]) if whole else None
        self.touched = (*outcome.writes, *[(number, (position,)) for number, position, _ in outcome.draws])

    def __repr__(self) -> str:
        return "state"

    def split(self, values: Sequence[Any]) -> list[list[Any]]:
        """The values that come out, in a list for each root that is written."""
        if self.outcome.post is not None:
            return [list(values)]
        parts = []
        start = 0
        for _, positions in self.outcome.writes:
            parts.append(list(values[start : start + len(positions)]))
            start += len(positions)
        return parts

    def finish(self, roots: Sequence[Object], layouts: Sequence[Layout], out: Any, values: Sequence[Any]) -> Any:
        """Write what changed into the Modules, and put them into the output; see `finish`.

        Everything is checked before anything is written.
        """
        if not self.simple:
            frame = Frame().begin()
            frame.roots, frame.layouts = list(roots), list(layouts)
            return finish(frame, out, [value for part in values for value in part], self.outcome)
        trace = current_trace()
        for number, places in self.touched:
            layouts[number].check_trace(trace, places)
        for (number, positions, streams), part in zip(self.writes, values, strict=True):
            layouts[number].write(positions, part, streams=streams)
        for number, position, keys in self.draws:
            layouts[number].cells[position].advance(keys)  # type: ignore[attr-defined]
        return out
