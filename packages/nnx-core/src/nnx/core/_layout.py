"""Layout: what a call needs to know of a graph, cached on its root until the structure changes."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

from nnx.core._errors import StaticError
from nnx.core._gathered import hold, writes
from nnx.core._graph import Graph, ModuleDef, statics_changed, walk
from nnx.core._object import Object
from nnx.core._state import State
from nnx.core._tracing import is_eager
from nnx.core._variable import Cell, unshared

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
        values: the values as the last call gathered or wrote them, good while `written` is the token of all writes.
        keeps: whether values are kept at all: those of a trace are not, nor those of random streams, whose counts the
            host advances.
    """

    __slots__ = (
        "__weakref__",
        "after",
        "cells",
        "itself",
        "keeps",
        "moduledef",
        "root",
        "statics",
        "token",
        "trace",
        "valid",
        "values",
        "written",
    )

    def __init__(self, graph: Graph) -> None:
        self.valid = True
        self.moduledef: ModuleDef[Any] = graph.moduledef
        self.cells: list[Cell] = graph.cells
        self.statics: list[tuple[Any, Hashable, bool]] = graph.statics
        self.token = object()
        self.after: dict[object, Layout | None] = {}
        self.root: weakref.ref[Object] | None = weakref.ref(graph.objects[0]) if graph.objects else None
        traces = {cell._trace for cell in graph.cells}
        # The one trace that all cells belong to lets a call check them all at once; cells of several are checked one
        # by one.
        self.trace = traces.pop() if len(traces) == 1 else None
        self.values: list[Any] | None = None
        self.written: object = None
        kinds: set[Any] = {type(cell) for cell in graph.cells}
        self.keeps = is_eager() and all(kind._value is _SLOT for kind in kinds)
        self.itself = reference = weakref.ref(self)
        for instance in graph.objects:
            known = instance._nnx.layouts
            if len(known) > 16:
                known[:] = [item for item in known if item() is not None]
            known.append(reference)


_SLOT: Any = Cell.__dict__["_value"]


def values_of(layout: Layout) -> list[Any]:
    """The values of the cells, in a list that nobody edits."""
    values = layout.values
    if values is not None and layout.written is writes.token:
        return values
    token = writes.token
    values = [cell._value for cell in layout.cells]
    if layout.keeps:
        hold(layout, values, token)
    return values


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
    try:
        own = layout_of(root)
    except StaticError:
        # Alone it is not whole, as when it keeps a bound method of a root before it.
        return Layout(walk_in_turn([*roots, root])[-1])
    # A token alone for the usual pair of a model and its optimizer: this is on the path of every call.
    key = layouts[0].token if len(layouts) == 1 else tuple([layout.token for layout in layouts])
    found = own.after.get(key, _UNKNOWN)
    if found is _UNKNOWN:
        graph = walk_in_turn([*roots, root])[-1]
        found = None if graph.moduledef is own.moduledef else Layout(graph)
        if len(own.after) >= 8:
            own.after.clear()
        own.after[key] = found
    return own if found is None else found


_UNKNOWN: Any = object()


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
