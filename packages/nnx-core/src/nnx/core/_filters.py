"""Filters: predicates over (path, node), answered from types and paths alone wherever they can be."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable
from types import EllipsisType
from typing import Any

import jax
import numpy as np

from nnx.core._errors import FilterError
from nnx.core._variable import Buffer, Cell

__all__ = [
    "All",
    "Any_",
    "Everything",
    "Filter",
    "FilterLike",
    "Not",
    "Nothing",
    "Path",
    "PathGlob",
    "buffers",
    "to_filter",
]

Path = tuple[str, ...]
FilterLike = Any  # type | ... | None | str | Callable[[Path, Any], bool] | tuple[FilterLike, ...] | Filter


class Filter:
    """A predicate `(path, node) -> bool`, compared by what it selects.

    Attributes:
        uses_node: whether the answer needs the node itself, and not only its path and type.
    """

    __slots__ = ("_key", "uses_node")

    def __init__(self, key: Hashable, uses_node: bool) -> None:
        self._key = (type(self), key)
        self.uses_node: bool = uses_node

    def match(self, path: Path, kind: type[Cell], node: Callable[[], Any]) -> bool:
        """Whether the node at `path` is selected.

        Args:
            path: where the node is.
            kind: its type; `Buffer` for a bare array.
            node: gives the node itself, on demand.
        """
        raise NotImplementedError

    def __call__(self, path: Path, node: Any) -> bool:
        return self.match(path, type(node) if isinstance(node, Cell) else Buffer, lambda: node)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Filter) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class Everything(Filter):
    """Selects every node: the filter `...`."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__((), False)

    def match(self, path: Path, kind: type[Cell], node: Callable[[], Any]) -> bool:
        return True

    def __repr__(self) -> str:
        return "..."


class Nothing(Filter):
    """Selects no node: the filter `None`."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__((), False)

    def match(self, path: Path, kind: type[Cell], node: Callable[[], Any]) -> bool:
        return False

    def __repr__(self) -> str:
        return "None"


class OfType(Filter):
    """Selects the nodes that are instances of a type."""

    __slots__ = ("type",)

    def __init__(self, kind: type) -> None:
        super().__init__(kind, not issubclass(kind, Cell))
        self.type = kind

    def match(self, path: Path, kind: type[Cell], node: Callable[[], Any]) -> bool:
        if kind is not Buffer:
            return issubclass(kind, self.type)
        if issubclass(self.type, Cell):
            return False
        value = node()
        # Under jax.eval_shape an array is a ShapeDtypeStruct; it stands for a jax.Array.
        return isinstance(value, self.type) or (self.type is jax.Array and isinstance(value, jax.ShapeDtypeStruct))

    def __repr__(self) -> str:
        return self.type.__name__


class Collection(Filter):
    """Selects the Variables of a named collection, those of its subclasses among them."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        super().__init__(name, False)
        self.name = name

    def match(self, path: Path, kind: type[Cell], node: Callable[[], Any]) -> bool:
        return any(base.__dict__.get("collection") == self.name for base in kind.__mro__)

    def __repr__(self) -> str:
        return repr(self.name)


class Predicate(Filter):
    """Selects what a function `(path, node) -> bool` says."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[Path, Any], Any]) -> None:
        super().__init__(id(function), True)
        self.function = function

    def match(self, path: Path, kind: type[Cell], node: Callable[[], Any]) -> bool:
        return bool(self.function(path, node()))

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


class _Combined(Filter):
    __slots__ = ("filters",)

    def __init__(self, *filters: FilterLike) -> None:
        self.filters: tuple[Filter, ...] = tuple(to_filter(item) for item in filters)
        super().__init__(self.filters, any(item.uses_node for item in self.filters))

    def __repr__(self) -> str:
        return f"{type(self).__name__.rstrip('_')}({', '.join(map(repr, self.filters))})"


class All(_Combined):
    """Selects the nodes that every one of the given filters selects."""

    __slots__ = ()

    def match(self, path: Path, kind: type[Cell], node: Callable[[], Any]) -> bool:
        return all(item.match(path, kind, node) for item in self.filters)


class Any_(_Combined):  # noqa: N801 - `nnx.Any` to users; here typing has the name
    """Selects the nodes that at least one of the given filters selects; a tuple of filters means the same."""

    __slots__ = ()

    def match(self, path: Path, kind: type[Cell], node: Callable[[], Any]) -> bool:
        return any(item.match(path, kind, node) for item in self.filters)


Any_.__name__ = Any_.__qualname__ = "Any"


class Not(_Combined):
    """Selects the nodes that the given filter does not select."""

    __slots__ = ()

    def __init__(self, filter: FilterLike, /) -> None:
        super().__init__(filter)

    def match(self, path: Path, kind: type[Cell], node: Callable[[], Any]) -> bool:
        return not self.filters[0].match(path, kind, node)


class PathGlob(Filter):
    """Selects nodes by a pattern over their path.

    Args:
        pattern: parts joined by `/`. `*` stands for any text within a part, `?` for one character, `**` for any number
            of parts.

    Example:
        >>> import nnx
        >>> nnx.PathGlob("encoder/**/kernel")(("encoder", "layers", "0", "kernel"), None)
        True
    """

    __slots__ = ("_pattern", "pattern")

    def __init__(self, pattern: str) -> None:
        if not isinstance(pattern, str) or not pattern:
            raise FilterError(f"PathGlob takes a pattern such as 'encoder/**/kernel', got {pattern!r}")
        super().__init__(pattern, False)
        self.pattern: str = pattern
        self._pattern = _compile_glob(pattern)

    def match(self, path: Path, kind: type[Cell], node: Callable[[], Any]) -> bool:
        return self._pattern.fullmatch("".join(part + "/" for part in path)) is not None

    def __repr__(self) -> str:
        return f"PathGlob({self.pattern!r})"


@functools.lru_cache(maxsize=256)
def _compile_glob(pattern: str) -> re.Pattern[str]:
    # Every part ends with a slash, so that `**` can stand for no part at all.
    text = ""
    for part in pattern.strip("/").split("/"):
        if part == "**":
            text += "(?:[^/]+/)*"
        else:
            text += "".join({"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char)) for char in part) + "/"
    return re.compile(text)


class _Buffers(Filter):
    __slots__ = ()

    def __init__(self) -> None:
        super().__init__((), True)

    def match(self, path: Path, kind: type[Cell], node: Callable[[], Any]) -> bool:
        return kind is Buffer and isinstance(
            node(), (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, int, float, complex)
        )

    def __repr__(self) -> str:
        return "buffers"


buffers: Filter = _Buffers()
"""Selects the arrays that are attributes of a Module without being in a Variable."""


def to_filter(like: FilterLike) -> Filter:
    """Make a Filter of what users write for one.

    Raises:
        FilterError: `like` is nothing that can be a filter.
    """
    if isinstance(like, Filter):
        return like
    if isinstance(like, EllipsisType):
        return Everything()
    if like is None:
        return Nothing()
    if isinstance(like, type):
        return OfType(like)
    if isinstance(like, str):
        if "/" in like or "*" in like:
            raise FilterError(
                f"the string {like!r} names a collection as a filter; to select by path, write nnx.PathGlob({like!r})"
            )
        return Collection(like)
    if isinstance(like, (tuple, list)):
        return Any_(*like)
    if isinstance(like, bool):
        return Everything() if like else Nothing()
    if callable(like):
        return Predicate(like)
    raise FilterError(
        f"not a filter: {like!r}. A filter is a type, `...`, None, a collection's name, a function (path, node) -> "
        "bool, a tuple of filters, nnx.All, nnx.Any, nnx.Not, nnx.buffers or nnx.PathGlob"
    )


def to_filters(likes: tuple[FilterLike, ...]) -> tuple[Filter, ...]:
    """Make Filters of `likes`, of which only the last may be `...`."""
    filters = tuple(to_filter(like) for like in likes)
    for index, item in enumerate(filters[:-1]):
        if isinstance(item, Everything):
            raise FilterError(
                f"the filter `...` takes everything that is left, so it can only be the last one; "
                f"it is number {index + 1} of {len(filters)}: {', '.join(map(repr, filters))}"
            )
    return filters
