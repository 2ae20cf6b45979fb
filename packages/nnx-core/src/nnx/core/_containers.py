"""Sequence and Dict: Modules that hold others by position and by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import TYPE_CHECKING, Any, Generic, overload

from nnx.core._assign import assign, container_leaves
from nnx.core._errors import AttributeKindError, NnxError
from nnx.core._module import Module
from nnx.core._object import Object, class_attribute
from nnx.core._state import natural_key
from nnx.core._variable import A

__all__ = ["Dict", "Sequence", "to_container"]


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

    # Which attributes are items, their names alone say. So when `pop_state` takes items out, or `update_state` puts
    # them back, the Sequence is that much shorter or longer; until it is next changed as a list, an item may then have
    # another number in its path.

    def __init__(self, items: Iterable[A] = (), /) -> None:
        for i, item in enumerate(items):  # not by `append`, which looks for the last item each time
            assign(self, str(i), item)

    def _nnx_items(self) -> list[str]:
        return sorted([name for name in (*self.__dict__, *self._nnx.cells) if name.isdecimal()], key=int)

    def __len__(self) -> int:
        return len(self._nnx_items())

    def _name(self, index: int) -> str:
        if not hasattr(index, "__index__"):
            raise TypeError(f"a Sequence's index is an integer or a slice, got {type(index).__name__}")
        names = self._nnx_items()
        number = index.__index__()
        if not -len(names) <= number < len(names):
            raise IndexError(f"Sequence index {number} out of range: its length is {len(names)}")
        return names[number]

    @overload
    def __getitem__(self, index: int) -> A: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[A]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            part: Sequence[A] = Sequence()
            part._replace(self._raw()[index])
            return part
        return getattr(self, self._name(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            raw = self._raw()
            raw[index] = list(value)
            self._replace(raw)
            return
        setattr(self, self._name(index), value)

    def __delitem__(self, index: Any) -> None:
        raw = self._raw()
        if not isinstance(index, slice):
            self._name(index)
        del raw[index]
        self._replace(raw)

    def append(self, value: A) -> None:
        """Add an item at the end."""
        names = self._nnx_items()
        setattr(self, str(int(names[-1]) + 1) if names else "0", value)

    def insert(self, index: int, value: A) -> None:
        """Insert an item before `index`."""
        raw = self._raw()
        raw.insert(index, value)
        self._replace(raw)

    def reverse(self) -> None:
        """Reverse the items in place."""
        self._replace(self._raw()[::-1])

    def _raw(self) -> list[Any]:
        """The items as they are held: a Variable, not its value, so that moving it keeps it the same Variable."""
        return [self._nnx.cells[name] if name in self._nnx.cells else self.__dict__[name] for name in self._nnx_items()]

    def _replace(self, raw: list[Any]) -> None:
        before = self._raw()
        try:
            self._refill(raw)
        except NnxError:  # one of the new items cannot be an attribute
            self._refill(before)
            raise

    def _refill(self, raw: list[Any]) -> None:
        for name in self._nnx_items():
            delattr(self, name)
        for i, item in enumerate(raw):
            assign(self, str(i), item)

    def __iter__(self) -> Iterator[A]:
        for name in self._nnx_items():
            yield getattr(self, name)

    if not TYPE_CHECKING:  # an assignment is no type
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
        items = list(self)
        if not items:
            if kwargs or len(args) != 1:
                raise TypeError(f"an empty Sequence returns its one argument, got {len(args)} and {sorted(kwargs)}")
            return args[0]
        out: Any = None
        for i, item in enumerate(items):
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

    # The names in the order in which they came. Only a hint: which of them are items is for the attributes to say,
    # since `pop_state`, `merge` and `update_state` take items out and put them in without coming by here.
    _names: tuple[str, ...] = ()

    def __init__(self, items: Mapping[str, A] | Iterable[tuple[str, A]] = (), /, **more: A) -> None:
        for name, item in dict(items, **more).items():
            self[name] = item

    def __getitem__(self, name: str) -> A:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)  # type: ignore[no-any-return]

    def __setitem__(self, name: str, value: A) -> None:
        if not isinstance(name, str):
            raise AttributeKindError(f"the names in an nnx.Dict are strings, got {name!r} ({type(name).__name__})")
        setattr(self, name, value)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        delattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self:
            super().__setattr__(name, value)
            return
        if name.startswith("_") or class_attribute(type(self), name) is not None:
            raise AttributeKindError(
                f"an nnx.Dict cannot hold the name {name!r}: it is private, or one of Dict's own methods"
            )
        super().__setattr__(name, value)
        if name not in self._names:
            super().__setattr__("_names", (*self._names, name))

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        super().__setattr__("_names", tuple(item for item in self._names if item != name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and not name.startswith("_") and (name in self.__dict__ or name in self._nnx.cells)

    def __iter__(self) -> Iterator[str]:
        ordered = self._names
        yield from [name for name in ordered if name in self]
        others = {*self.__dict__, *self._nnx.cells}.difference(ordered)
        yield from sorted([name for name in others if name in self], key=natural_key)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    if not TYPE_CHECKING:  # an assignment is no type
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
        items = [
            item if isinstance(item, Object) or not _holds_modules(item) else to_container(item)
            for item in value.values()
        ]
        if any(item is None and old is not None for item, old in zip(items, value.values(), strict=True)):
            return None
        return Dict(zip(value, items, strict=True))
    return None


def _holds_modules(value: Any) -> bool:
    return any(isinstance(leaf, Object) for leaf in container_leaves(value))
