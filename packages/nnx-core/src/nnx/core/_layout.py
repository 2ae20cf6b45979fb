"""Layout: what a call needs to know of a graph, cached on its root until the structure changes."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from nnx.core._errors import StaticError
from nnx.core._graph import Graph, ModuleDef, handle_of, statics_changed, walk
from nnx.core._object import Object
from nnx.core._state import State, path_text
from nnx.core._tracing import TraceRef, eager_trace
from nnx.core._variable import (
    Cell,
    check_cell_trace,
    holds_in_a_list,
    interning,
    set_keeper,
    set_place,
    unshared,
)

__all__ = ["Layout", "layout_of", "layout_after", "state_of", "values_of", "walk_in_turn"]


class Layout:
    """A definition and the cells that it numbers. It is good while `valid` is true and no mutable static was edited.

    Every object of the graph knows the layout weakly and sets `valid` to false before its structure changes. The
    layout knows cells and statics but no object, so it keeps no Module alive.

    Attributes:
        moduledef: the definition.
        cells: the cells, in the order of the definition's schema.
        statics: the mutable statics, each with its key at the time of the walk.
        token: stands for this layout in the keys of `after`, without keeping it alive.
        after: layouts of the same root for calls in which other roots came before it; None stands for this one, which
            must not refer to itself or it would wait for the garbage collector.
        root: the root, weakly, so that it can drop a layout that is out of date together with the arrays that only
            this knows.
        handle: stands for the definition in what is handed to JAX.
        column: the values of the cells, in a list that the cells themselves read and write; None while they do not.
        given: what a call hands to JAX, where nothing has to be looked at first; else None.
        streams: the positions of random streams, whose values are made when they are asked for.
        blocker: the layout that has the cells in its own column, so that they cannot be in this one's.
        missed: how often the values were gathered for that reason.
    """

    __slots__ = (
        "__weakref__",
        "_cell_ids",
        "after",
        "blocker",
        "cells",
        "column",
        "given",
        "handle",
        "itself",
        "missed",
        "moduledef",
        "root",
        "statics",
        "streams",
        "token",
        "trace",
        "valid",
    )

    def __init__(self, graph: Graph) -> None:
        self.valid = True
        self.moduledef: ModuleDef[Any] = graph.moduledef
        self.handle = handle_of(graph.moduledef)
        self.cells: list[Cell] = graph.cells
        self.statics: list[tuple[Any, Hashable, bool]] = graph.statics
        self.token = object()
        self.after: dict[object, Layout | None] = {}
        self.root: weakref.ref[Object] | None = weakref.ref(graph.objects[0]) if graph.objects else None
        traces = {cell._trace for cell in graph.cells}
        # The one trace that all cells belong to lets a call check them all at once; cells of several are checked one
        # by one.
        self.trace = traces.pop() if len(traces) == 1 else None
        self.column: list[Any] | None = None
        self.given: dict[Any, list[Any]] | None = None
        self.blocker: weakref.ref[Layout] | None = None
        self.missed = 0
        self._cell_ids: frozenset[int] | None = None
        self.streams = tuple([i for i, cell in enumerate(graph.cells) if not holds_in_a_list(type(cell))])
        self.itself = reference = weakref.ref(self)
        for instance in graph.objects:
            known = instance._nnx.layouts
            if len(known) > 16:
                known[:] = [item for item in known if item() is not None]
            known.append(reference)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if self.column is not None and not is_finalizing():
            self._release(None)

    def _adopt(self) -> list[Any] | None:
        """Move the values of the cells into a column, which a call takes as it is.

        A cell can be in one column alone. Of layouts that share cells the larger has them, as it gains more; but one
        that has gathered its values again and again, while another had them, gets them after all.

        Returns:
            The column; None if another layout has the cells.
        """
        with interning:
            if self.column is not None or self.trace is not eager_trace():
                return self.column
            blocker = self.blocker() if self.blocker is not None else None
            if blocker is not None and blocker.column is not None:
                self.missed += 1
                if self.missed * len(self.cells) < _PATIENCE * len(blocker.cells):
                    return None
            held = [cell for cell in self.cells if holds_in_a_list(type(cell))]
            keepers = {id(cell._keeper): cell._keeper for cell in held if cell._keeper is not None}
            others = [other for other in (keeper() for keeper in keepers.values()) if other is not None]
            for other in others:
                if other is not blocker and other.valid and len(other.cells) > len(self.cells):
                    self.blocker = other.itself
                    return None
            for other in others:
                other._release(self)
            self.blocker, self.missed = None, 0
            column = [cell._value for cell in self.cells]
            for i, cell in enumerate(self.cells):
                if holds_in_a_list(type(cell)):
                    _move(cell, (column, i), self.itself)
            # Last, so that an adoption that was cut short is begun anew.
            self.column = column
            if self.valid and not self.streams and not self.statics:
                self.given = {self.handle: column}
            return column

    def _release(self, other: Layout | None) -> None:
        """Give each cell its value in a list of its own, since this layout ends or `other` adopts cells of it.

        A cell may outlive the layout, and would keep every array of the column alive.
        """
        with interning:
            column, self.column, self.given = self.column, None, None
            self.blocker = other.itself if other is not None else None
            for cell in self.cells:
                if holds_in_a_list(type(cell)) and cell._place[0] is column:
                    _move(cell, ([cell._value], 0), None)

    @property
    def cell_ids(self) -> frozenset[int]:
        """What tells whether a cell is in it."""
        if self._cell_ids is None:
            self._cell_ids = frozenset(map(id, self.cells))
        return self._cell_ids

    def check_trace(self, trace: TraceRef, positions: Sequence[int] | None) -> None:
        """Raise unless the cells may be written in a trace.

        Args:
            trace: the current one.
            positions: the positions of the cells; None for all of them.
        """
        if self.trace is not trace:
            for i in range(len(self.cells)) if positions is None else positions:
                check_cell_trace(self.cells[i], path_text(self.moduledef.schema.paths[i]))

    def write(self, positions: Sequence[int] | None, values: Sequence[Any], *, streams: bool) -> None:
        """Write values into the cells; that they may be written here has been checked.

        Args:
            positions: the positions of the cells; None for all of them.
            values: a value for each.
            streams: whether random streams are among them.
        """
        column = self.column
        if column is not None and not streams:
            if positions is None:
                column[:] = values
            else:
                for i, value in zip(positions, values, strict=True):
                    column[i] = value
        if column is None or streams or self.column is not column:  # another thread has moved the cells in between
            for i, value in zip(range(len(self.cells)) if positions is None else positions, values, strict=True):
                self.cells[i]._value = value


_PATIENCE = 8
"""A layout may gather about as many values as this many times the cells that it would take from another."""


def _move(cell: Cell, place: tuple[list[Any], int], keeper: weakref.ref[Layout] | None) -> None:
    """Move a cell's value to another place; what another thread writes to the old one meanwhile comes along."""
    old = cell._place
    before = place[0][place[1]]
    set_keeper(cell, keeper)
    set_place(cell, place)
    now = old[0][old[1]]
    if now is not before:
        place[0][place[1]] = now


def values_of(layout: Layout) -> list[Any]:
    """The values of the cells, in a list to be read at once: it is the cells' own."""
    column = layout.column
    if column is None:
        column = layout._adopt()
        if column is None:
            return [cell._value for cell in layout.cells]
    for i in layout.streams:
        column[i] = layout.cells[i]._value
    return column


def layout_of(root: Object) -> Layout:
    """The layout of the graph that starts at `root`: the cached one, or a new one if the structure changed."""
    layout = root._nnx.layout
    if layout is not None and layout.valid and (not layout.statics or not statics_changed(layout.statics)):
        return layout
    layout = Layout(walk((root,)))
    root._nnx.layout = layout
    return layout


def layout_after(root: Object, roots: Sequence[Object], layouts: Sequence[Layout]) -> Layout:
    """The layout of `root` where other roots came before it: what these hold already is referred to, not repeated.

    Args:
        root: the root.
        roots: the roots before it.
        layouts: their layouts, in turn.
    """
    own = root._nnx.layout
    if own is None or not own.valid or own.statics:
        try:
            own = layout_of(root)
        except StaticError:
            # Alone it is not whole, as when it keeps a bound method of a root before it.
            return Layout(walk_in_turn([*roots, root])[-1])
    # A token alone for the usual pair of a model and its optimizer: this is on the path of every call.
    key = layouts[0].token if len(layouts) == 1 else tuple([layout.token for layout in layouts])
    found = own.after.get(key, _UNKNOWN)
    if found is _UNKNOWN:
        if _is_apart(root, own, layouts):
            found = None
        else:
            graph = walk_in_turn([*roots, root])[-1]
            found = None if graph.moduledef is own.moduledef else Layout(graph)
        if len(own.after) >= _KEPT:
            del own.after[next(iter(own.after))]
        own.after[key] = found
    return own if found is None else found


_UNKNOWN: Any = object()
_KEPT = 256


def _is_apart(root: Object, own: Layout, layouts: Sequence[Layout]) -> bool:
    """Whether a graph of one object, such as a Context made for this call alone, is seen to share nothing."""
    if len(own.moduledef.nodes) > 1:
        return False
    if any(reference() is layout for reference in root._nnx.layouts for layout in layouts):
        return False
    return not any(id(cell) in layout.cell_ids for layout in layouts for cell in own.cells)


def walk_in_turn(roots: Sequence[Object]) -> list[Graph]:
    """Walk roots one after another, each referring to what the walks before it found."""
    graphs: list[Graph] = []
    for root in roots:
        known = None
        if graphs:
            objects = [item for graph in graphs for item in graph.objects]
            cells = [item for graph in graphs for item in graph.cells]
            known = Graph(graphs[0].moduledef, objects, cells, [])
        graphs.append(walk((root,), known))
    return graphs


def state_of(layout: Layout) -> State:
    """The State of a graph: its values as they are now."""
    return State.from_columns(layout.moduledef.schema, tuple([unshared(cell._value) for cell in layout.cells]))
