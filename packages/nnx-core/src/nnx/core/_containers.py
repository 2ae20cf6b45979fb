"""Sequence and Dict: Modules that hold others by position and by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any, Generic, TypeVar, overload

from nnx.core._errors import AttributeKindError
from nnx.core._module import Module, _assign, _class_attribute
from nnx.core._object import Object

__all__ = ["Dict", "Sequence", "to_container"]

A = TypeVar("A")


class Sequence(Module, MutableSequence[A], Generic[A]):
    """A list of Modules (or of anything that can be an attribute of a Module), itself a Module.

    Calling a Sequence calls its items as a chain: the output of one is the input of the next. A tuple becomes several
    arguments, a dict keyword arguments; `ctx` goes to each item that takes it.

    Args:
        items: the items.

    Example:
        >>> import nnx
        >>> chain = nnx.Sequence([lambda x: x + 1, lambda x: x * 2])
        >>> chain(3), len(chain)
        (8, 2)
    """

    def __init__(self, items: Iterable[A] = (), /) -> None:
        self._length = 0
        for item in items:
            self.append(item)

    def __len__(self) -> int:
        return self._length

    def _position(self, index: int, what: str = "index") -> str:
        if not hasattr(index, "__index__"):
            raise TypeError(f"a Sequence's index is an integer or a slice, got {type(index).__name__}")
        number = index.__index__()
        if not -self._length <= number < self._length:
            raise IndexError(f"Sequence {what} {number} out of range: its length is {self._length}")
        return str(number % self._length)

    @overload
    def __getitem__(self, index: int) -> A: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[A]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            part: Sequence[A] = Sequence()
            part._replace([self._raw(i) for i in range(self._length)[index]])
            return part
        return getattr(self, self._position(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            raw = [self._raw(i) for i in range(self._length)]
            raw[index] = list(value)
            self._replace(raw)
            return
        setattr(self, self._position(index), value)

    def __delitem__(self, index: Any) -> None:
        raw = [self._raw(i) for i in range(self._length)]
        if not isinstance(index, slice):
            self._position(index)
        del raw[index]
        self._replace(raw)

    def insert(self, index: int, value: A) -> None:
        """Insert an item before `index`."""
        if index >= self._length:
            setattr(self, str(self._length), value)
            self._length += 1
            return
        raw = [self._raw(i) for i in range(self._length)]
        raw.insert(index, value)
        self._replace(raw)

    def _raw(self, index: int) -> Any:
        """The item as it is held: a Variable, not its value, so that moving it keeps it the same Variable."""
        name = str(index)
        return self._nnx_cells[name] if name in self._nnx_cells else self.__dict__[name]

    def _replace(self, raw: list[Any]) -> None:
        for i in range(self._length):
            delattr(self, str(i))
        self._length = 0
        for item in raw:
            _assign(self, str(self._length), item)
            self._length += 1

    def __iter__(self) -> Iterator[A]:
        for i in range(self._length):
            yield getattr(self, str(i))

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __call__(self, *args: Any, ctx: Any = None, **kwargs: Any) -> Any:
        """Call the items as a chain.

        Args:
            *args: the first item's arguments.
            ctx: a Context, handed to each item that takes `ctx`.
            **kwargs: the first item's keyword arguments.

        Raises:
            TypeError: an item cannot be called.
        """
        if not self._length:
            if kwargs or len(args) != 1:
                raise TypeError(f"an empty Sequence returns its one argument, got {len(args)} and {sorted(kwargs)}")
            return args[0]
        out: Any = None
        for i, item in enumerate(self):
            if not callable(item):
                raise TypeError(f"Sequence[{i}] is a {type(item).__name__} and cannot be called")
            if i:
                args, kwargs = _spread(out)
            out = item(*args, **kwargs, ctx=ctx) if ctx is not None and takes_ctx(item) else item(*args, **kwargs)
        return out


def _spread(out: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if type(out) is tuple:
        return out, {}
    if type(out) is dict:
        return (), out
    return (out,), {}


def takes_ctx(function: Callable[..., Any]) -> bool:
    """Whether a callable has a parameter `ctx`, or takes any keyword."""
    target = type(function).__call__ if isinstance(function, Module) else function
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # builtins have no signature
        return False
    return any(p.name == "ctx" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


class Dict(Module, MutableMapping[str, A], Generic[A]):
    """A dict of Modules (or of anything that can be an attribute of a Module) by name, itself a Module.

    Items are attributes too: `blocks["encoder"]` is `blocks.encoder`. They keep the order in which they were added.

    Args:
        items: a mapping or pairs.
        **more: further items by name.

    Raises:
        AttributeKindError: a name is no string, holds `/`, or is the name of one of Dict's own methods.
    """

    def __init__(self, items: Mapping[str, A] | Iterable[tuple[str, A]] = (), /, **more: A) -> None:
        self._names: tuple[str, ...] = ()
        for name, item in dict(items, **more).items():
            self[name] = item

    def __getitem__(self, name: str) -> A:
        if name not in self._names:
            raise KeyError(name)
        return getattr(self, name)  # type: ignore[no-any-return]

    def __setitem__(self, name: str, value: A) -> None:
        if not isinstance(name, str):
            raise AttributeKindError(f"the names in an nnx.Dict are strings, got {name!r} ({type(name).__name__})")
        setattr(self, name, value)

    def __delitem__(self, name: str) -> None:
        if name not in self._names:
            raise KeyError(name)
        delattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "_names" and name not in self.__dict__.get("_names", ()):
            if name.startswith("_") or _class_attribute(type(self), name) is not None:
                raise AttributeKindError(f"an nnx.Dict cannot hold the name {name!r}: it is private, or one of Dict's own methods")
            super().__setattr__(name, value)
            super().__setattr__("_names", (*self._names, name))
            return
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        super().__setattr__("_names", tuple(item for item in self._names if item != name))

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def to_container(value: Any) -> Module | None:
    """A Sequence or Dict of a list, tuple or dict whose leaves are Modules or statics; None if it is something else."""
    if type(value) in (list, tuple):
        items = [item if isinstance(item, Object) or not _holds_modules(item) else to_container(item) for item in value]
        if any(item is None and old is not None for item, old in zip(items, value, strict=True)):
            return None
        return Sequence(items)
    if type(value) is dict and all(isinstance(name, str) and name for name in value):
        items = [item if isinstance(item, Object) or not _holds_modules(item) else to_container(item) for item in value.values()]
        if any(item is None and old is not None for item, old in zip(items, value.values(), strict=True)):
            return None
        return Dict(zip(value, items, strict=True))
    return None


def _holds_modules(value: Any) -> bool:
    from nnx.core._module import _container_leaves

    return any(isinstance(leaf, Object) for leaf in _container_leaves(value))

