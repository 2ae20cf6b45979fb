"""Object, the base of Module and Context: cells beside plain attributes, the trace it was made in, its caches."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from nnx.core._errors import TraceContextError
from nnx.core._state import Path, natural_key, path_text
from nnx.core._tracing import TraceRef, current_trace
from nnx.core._variable import Cell, trace_error

if TYPE_CHECKING:
    from nnx.core._layout import Layout

__all__ = [
    "CellAttribute",
    "Hidden",
    "Object",
    "attribute_name",
    "check_object_trace",
    "class_attribute",
    "expose",
    "invalidate",
    "names_apart",
    "new_object",
    "origin_of",
    "plain_attributes",
]


class Hidden:
    """What an Object keeps about itself beside its attributes.

    One record in `__dict__`, and not slots: on a class with slots beside `__dict__` CPython reads every plain attribute
    and method three times as slowly.

    Attributes:
        cells: the data, by attribute.
        trace: the trace that the object was made in.
        layout: the layout of the graph that starts here, if one was made.
        layouts: the layouts, of whatever root, that the object is part of.
        initializing: how many calls of `module.init` are under way.
        origin: the line that made it, for errors; None for an object that merge or a transform built.
        sown: in an object that a transform built, the names sown since; None anywhere else.
    """

    __slots__ = ("cells", "initializing", "layout", "layouts", "origin", "sown", "trace")

    def __init__(self, origin: tuple[types.CodeType, int] | None = None) -> None:
        self.cells: dict[str, Cell] = {}
        self.trace: TraceRef = current_trace()
        self.layout: Layout | None = None
        self.layouts: list[weakref.ref[Layout]] = []
        self.initializing = 0
        self.origin = origin
        self.sown: set[str] | None = None


class Object:
    """A node of the graph: plain attributes in `__dict__` (statics and other Objects), data in `_nnx.cells`."""

    _nnx: Hidden
    _nnx_exposed: ClassVar[set[str] | None] = None
    """The names of cells that instances have as attributes, by `expose`; None if they never are."""

    if not TYPE_CHECKING:
        # Hidden from type checkers, some of which take its arguments and result for those of every constructor.
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            self = super().__new__(cls)
            frame = sys._getframe(1)
            object.__setattr__(self, "_nnx", Hidden((frame.f_code, frame.f_lineno)))
            return self

    def _nnx_children(self) -> Iterator[tuple[str, Any]]:
        """The attributes that belong to the graph, in natural order: Cells, Objects, and static values."""
        merged = {**plain_attributes(self), **self._nnx.cells}
        for name in sorted(merged, key=natural_key):
            yield name, merged[name]


def new_object(kind: type[Object]) -> Any:
    """Make an Object without running a user's `__new__` or `__init__`."""
    instance = object.__new__(kind)
    object.__setattr__(instance, "_nnx", Hidden())
    return instance


def plain_attributes(instance: Object) -> dict[str, Any]:
    """A copy of `__dict__` without what is no state: the hidden record, and what `functools.cached_property` keeps."""
    apart = names_apart(type(instance))
    return {name: value for name, value in instance.__dict__.items() if name not in apart}


def names_apart(kind: type) -> frozenset[str]:
    """The names in an instance's `__dict__` that are no state."""
    found = _APART.get(kind)
    if found is None:
        cached = {
            name
            for base in kind.__mro__
            for name, item in base.__dict__.items()
            if isinstance(item, functools.cached_property)
        }
        found = _APART[kind] = frozenset({"_nnx", "__orig_class__", *cached})
    return found


_APART: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()
_MISSING: Any = object()


class CellAttribute:
    """Gives an instance's cell where it has one of that name, and otherwise what would be found without it.

    It stands on the class and comes before a default there (a dataclass's, `bias = None`), which would hide the cell
    from a `__getattr__`. It also is faster than one, above all on Python 3.11, which reads every attribute of a class
    with `__getattr__` slowly.
    """

    __slots__ = ("default", "name")

    def __init__(self, name: str, default: Any) -> None:
        self.name = name
        self.default = default

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is not None:
            cell = instance._nnx.cells.get(self.name)
            if cell is not None:
                return cell._value
            if self.name in instance.__dict__:
                return instance.__dict__[self.name]
        if self.default is _MISSING:
            # On the class too: `dataclasses` would take whatever it finds there for the field's default.
            what = f"type object {owner.__name__!r}" if instance is None and owner else f"{owner.__name__!r} object"  # type: ignore[union-attr]
            raise AttributeError(f"{what} has no attribute {self.name!r}", name=self.name, obj=instance)
        if hasattr(type(self.default), "__get__"):
            return type(self.default).__get__(self.default, instance, owner)
        return self.default

    def __set__(self, instance: Any, value: Any) -> None:
        # Only `object.__setattr__` and `functools.cached_property` come here: a Module's own `__setattr__` does not.
        instance.__dict__[self.name] = value

    def __delete__(self, instance: Any) -> None:
        del instance.__dict__[self.name]


def expose(kind: type[Object], name: str) -> None:
    """See to it that instances of a class show a cell of that name as an attribute."""
    exposed = kind._nnx_exposed
    if exposed is None or name in exposed:
        return
    item = next((base.__dict__[name] for base in kind.__mro__ if name in base.__dict__), _MISSING)
    if not isinstance(item, CellAttribute) and not hasattr(type(item), "__set__"):
        # On the instance's own class: a base may be a mixin that other classes use.
        type.__setattr__(kind, name, CellAttribute(name, item))
    exposed.add(name)


def class_attribute(kind: type, name: str) -> Any:
    """The raw class attribute as the class was written, without running descriptors; None if there is none."""
    for base in kind.__mro__:
        if name in base.__dict__:
            item = base.__dict__[name]
            if not isinstance(item, CellAttribute):
                return item
            if item.default is not _MISSING:
                return item.default
    return None


def invalidate(instance: Object) -> None:
    """Declare every layout that `instance` is part of out of date: its structure is about to change."""
    if instance._nnx.layouts:
        for reference in instance._nnx.layouts:
            layout = reference()
            if layout is not None:
                layout.valid = False
                layout.given = None
                root = layout.root() if layout.root is not None else None
                if root is not None and root._nnx.layout is layout:
                    root._nnx.layout = None  # it may be the last to know arrays that are about to go
        instance._nnx.layouts = []


def check_object_trace(instance: Object, name: str, verb: str = "write") -> None:
    """Raise a TraceContextError unless `instance` was made in the current trace; `name` is the attribute touched."""
    trace = current_trace()
    if instance._nnx.trace is not trace:
        what = attribute_name(instance, name) if name else type(instance).__name__
        raise TraceContextError(trace_error(what, instance._nnx.trace, trace, verb, origin_of(instance)))


def origin_of(instance: Object) -> str:
    """The line that made an object, as `file:line`; empty where it is not known."""
    if instance._nnx.origin is None:
        return ""
    code, line = instance._nnx.origin
    return f"{code.co_filename}:{line}"


def attribute_name(instance: Object, name: str) -> str:
    """An attribute as errors name it: by class, and by path from the root where a layout knows it."""
    path: Path = ()
    for reference in instance._nnx.layouts:
        layout = reference()
        if layout is None:
            continue
        own = {id(cell) for cell in instance._nnx.cells.values()}
        for cell, known in zip(layout.cells, layout.moduledef.schema.paths, strict=True):
            if id(cell) in own and len(known) > len(path):
                path = known
    where = f" at {path_text((*path[:-1], name))}" if len(path) > 1 else ""
    return f"{type(instance).__name__}.{name}{where}"
