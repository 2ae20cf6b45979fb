"""Object, the base of Module and Context: cells beside plain attributes, the trace it was made in, its caches."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from nnx.core._errors import TraceContextError
from nnx.core._state import Path, natural_key, path_text
from nnx.core._tracing import TraceRef, current_trace
from nnx.core._variable import Cell, trace_error

if TYPE_CHECKING:
    from nnx.core._layout import Layout

__all__ = ["Object", "attribute_name", "check_object_trace", "invalidate", "new_object", "origin_of"]


class Object:
    """A node of the graph: plain attributes in `__dict__` (statics and other Objects), data in `_nnx_cells`.

    The hidden fields are slots, so that `vars(module)` shows a user's own attributes and nothing else.
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_nnx_cells",
        "_nnx_initializing",
        "_nnx_layout",
        "_nnx_layouts",
        "_nnx_origin",
        "_nnx_trace",
    )

    _nnx_cells: dict[str, Cell]
    _nnx_trace: TraceRef
    _nnx_layout: Layout | None
    """The layout of the graph that starts here, if one was made."""
    _nnx_layouts: list[weakref.ref[Layout]]
    """The layouts, of whatever root, that this object is part of."""
    _nnx_initializing: int
    _nnx_origin: tuple[types.CodeType, int] | None
    """The line that made it, for errors; None for an object that merge or a transform built."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        _init_object(self)
        frame = sys._getframe(1)
        set_origin(self, (frame.f_code, frame.f_lineno))
        return self

    def _nnx_children(self) -> Iterator[tuple[str, Any]]:
        """The attributes that belong to the graph, in natural order: Cells, Objects, and static values."""
        merged = {**_graph_attributes(self), **self._nnx_cells}
        for name in sorted(merged, key=natural_key):
            yield name, merged[name]


set_cells: Callable[[Object, dict[str, Cell]], None] = Object.__dict__["_nnx_cells"].__set__
set_object_trace: Callable[[Object, TraceRef], None] = Object.__dict__["_nnx_trace"].__set__
set_layout: Callable[[Object, Any], None] = Object.__dict__["_nnx_layout"].__set__
set_layouts: Callable[[Object, Any], None] = Object.__dict__["_nnx_layouts"].__set__
set_initializing: Callable[[Object, int], None] = Object.__dict__["_nnx_initializing"].__set__

set_origin: Callable[[Object, tuple[types.CodeType, int] | None], None] = Object.__dict__["_nnx_origin"].__set__


def _init_object(instance: Object) -> None:
    set_cells(instance, {})
    set_object_trace(instance, current_trace())
    set_layout(instance, None)
    set_layouts(instance, [])
    set_initializing(instance, 0)
    set_origin(instance, None)


def new_object(kind: type[Object]) -> Any:
    """Make an Object without running a user's `__new__` or `__init__`."""
    instance = object.__new__(kind)
    _init_object(instance)
    return instance


def _graph_attributes(instance: Object) -> dict[str, Any]:
    """`__dict__` without what `functools.cached_property` keeps there: a cache is made again, it is no state."""
    plain = instance.__dict__
    cached = cached_names(type(instance))
    if cached:
        return {name: value for name, value in plain.items() if name not in cached}
    return plain


def cached_names(kind: type) -> frozenset[str]:
    """The names of a class's cached properties."""
    found = _CACHED.get(kind)
    if found is None:
        names = {
            name
            for base in kind.__mro__
            for name, item in base.__dict__.items()
            if isinstance(item, functools.cached_property)
        }
        found = _CACHED[kind] = frozenset(names)
    return found


_CACHED: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def invalidate(instance: Object) -> None:
    """Declare every layout that `instance` is part of out of date: its structure is about to change."""
    if instance._nnx_layouts:
        for reference in instance._nnx_layouts:
            layout = reference()
            if layout is not None:
                layout.valid = False
                root = layout.root() if layout.root is not None else None
                if root is not None and root._nnx_layout is layout:
                    set_layout(root, None)  # it may be the last to know arrays that are about to go
        set_layouts(instance, [])


def check_object_trace(instance: Object, name: str, verb: str = "write") -> None:
    """Raise a TraceContextError unless `instance` was made in the current trace; `name` is the attribute touched."""
    trace = current_trace()
    if instance._nnx_trace is not trace:
        what = attribute_name(instance, name) if name else type(instance).__name__
        raise TraceContextError(trace_error(what, instance._nnx_trace, trace, verb, origin_of(instance)))


def origin_of(instance: Object) -> str:
    """The line that made an object, as `file:line`; empty where it is not known."""
    if instance._nnx_origin is None:
        return ""
    code, line = instance._nnx_origin
    return f"{code.co_filename}:{line}"


def attribute_name(instance: Object, name: str) -> str:
    """An attribute as errors name it: by class, and by path from the root where a layout knows it."""
    path: Path = ()
    for reference in instance._nnx_layouts:
        layout = reference()
        if layout is None:
            continue
        own = {id(cell) for cell in instance._nnx_cells.values()}
        for cell, known in zip(layout.cells, layout.moduledef.schema.paths, strict=True):
            if id(cell) in own and len(known) > len(path):
                path = known
    where = f" at {path_text((*path[:-1], name))}" if len(path) > 1 else ""
    return f"{type(instance).__name__}.{name}{where}"
