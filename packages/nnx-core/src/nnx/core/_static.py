"""Static values: a hashable key that tells two of them apart exactly, and a copy that shares nothing mutable."""

from __future__ import annotations

import dataclasses
import enum
import functools
import struct
import types
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import numpy as np

__all__ = ["Fingerprint", "StaticProblem", "copy_static", "fingerprint", "is_plain_scalar"]

_SCALARS = frozenset({type(None), bool, int, str, bytes, type(Ellipsis), type(NotImplemented), range})
_IDENTITY_TYPES = (type, types.ModuleType)
_HEAP_TYPE = 1 << 9
_COPY_HOOKS = ("__reduce__", "__reduce_ex__", "__getstate__", "__copy__", "__deepcopy__", "__iter__")


class StaticProblem(Exception):  # noqa: N818 - caught by us, never seen by users
    """A value that cannot be static: `where` leads from the attribute to the culprit, `reason` says what it is."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = where


@dataclasses.dataclass(slots=True)
class Fingerprint:
    """What is known of one static value.

    Attributes:
        key: equal exactly when two values are interchangeable in a compiled function.
        mutable: whether the value can change in place, so that its key must be taken again at each call.
        by_identity: parts that can only be compared by identity, as `where: repr` texts; a fresh one makes a retrace.
        parts: the lists, dicts, sets, arrays and plain objects inside that can change in place, in the order met.
    """

    key: Hashable
    mutable: bool
    by_identity: tuple[str, ...]
    parts: tuple[Any, ...] = ()


def is_plain_scalar(value: object) -> bool:
    """Whether `value` is of a type whose equality (with its exact type) needs no closer look."""
    return type(value) in _SCALARS


def fingerprint(value: Any, *, forbidden: tuple[type, ...] = (), arrays: bool = False) -> Fingerprint:
    """Take the fingerprint of a static value.

    Args:
        value: any object.
        forbidden: types that must not be reached from a static (Modules and Variables).
        arrays: whether NumPy arrays inside pytree containers are allowed (they are in an explicit `Static`).

    Raises:
        StaticProblem: the value reaches a forbidden object or a JAX array, or cannot be compared.
    """
    if type(value) in _SCALARS:
        return Fingerprint((type(value), value), False, ())
    walker = _Walker(forbidden, arrays)
    key = walker.key(value, "", True)
    return Fingerprint(key, bool(walker.parts), tuple(walker.by_identity), tuple(walker.parts))


class _Walker:
    __slots__ = ("active", "arrays", "by_identity", "forbidden", "parts")

    def __init__(self, forbidden: tuple[type, ...], arrays: bool) -> None:
        self.forbidden = forbidden
        self.arrays = arrays
        self.parts: list[Any] = []
        self.by_identity: list[str] = []
        self.active: dict[int, int] = {}

    def key(self, value: Any, where: str, in_tree: bool) -> Hashable:
        kind = type(value)
        if kind in _SCALARS:
            return (kind, value)
        if kind is float:
            return (float, struct.pack("d", value))
        if kind is complex:
            return (complex, struct.pack("dd", value.real, value.imag))
        if isinstance(value, self.forbidden):
            raise StaticProblem(f"a {kind.__name__}", where)
        if isinstance(value, jax.Array):
            raise StaticProblem(f"a JAX array {_array_text(value)}", where)
        if isinstance(value, np.ndarray):
            if in_tree and not self.arrays:
                raise StaticProblem(f"a NumPy array {_array_text(value)}", where)
            if value.flags.writeable:
                self.parts.append(value)
            return (kind, value.dtype.str, value.shape, _array_content(value, self, where))
        if isinstance(value, np.generic):
            return (kind, value.dtype.str, value.tobytes())
        if isinstance(value, (enum.Enum, *_IDENTITY_TYPES)):
            return (kind, _Identity(value))
        # A value that contains itself is compared by the distance to itself, as the walk would never end.
        if id(value) in self.active:
            return ("cycle", len(self.active) - self.active[id(value)])
        self.active[id(value)] = len(self.active)
        try:
            return self._compound(value, kind, where, in_tree)
        finally:
            del self.active[id(value)]

    def _compound(self, value: Any, kind: type, where: str, in_tree: bool) -> Hashable:
        if isinstance(value, (list, tuple)):
            if isinstance(value, list):
                self.parts.append(value)
            return (kind, tuple(self.key(item, f"{where}[{i}]", in_tree) for i, item in enumerate(value)))
        if isinstance(value, (dict, types.MappingProxyType)):
            # In insertion order: a forward pass may iterate over it.
            if isinstance(value, dict):
                self.parts.append(value)
            return (
                kind,
                tuple(
                    (self.key(k, f"{where} key", False), self.key(v, f"{where}[{k!r}]", in_tree))
                    for k, v in value.items()
                ),
            )
        if isinstance(value, slice):  # not hashable before Python 3.12
            return (kind, self._compound((value.start, value.stop, value.step), tuple, where, in_tree))
        if isinstance(value, (set, frozenset)):
            if isinstance(value, set):
                self.parts.append(value)
            return (kind, frozenset(self.key(item, f"{where} item", False) for item in value))
        if isinstance(value, functools.partial):
            return (
                kind,
                self.key(value.func, f"{where}.func", False),
                self.key(value.args, f"{where}.args", False),
                # A view of them: nobody edits the keywords of a partial.
                self.key(types.MappingProxyType(value.keywords), f"{where}.keywords", False),
            )
        if isinstance(value, types.MethodType):
            return (
                kind,
                self.key(value.__func__, f"{where}.__func__", False),
                self.key(value.__self__, f"{where}.__self__", False),
            )
        if isinstance(value, types.FunctionType):
            self._check_function(value, where)
            if "<locals>" in value.__qualname__ or value.__name__ == "<lambda>":
                self.by_identity.append(f"{where or 'value'}: {value.__qualname__}")
            return (kind, _Identity(value))
        fields = _plain_fields(value, kind)
        if fields is not None:
            if not _is_frozen(kind):
                self.parts.append(value)
            return (kind, tuple((name, self.key(item, f"{where}.{name}", False)) for name, item in fields))
        if kind.__hash__ is None or not _hashable(value):
            raise StaticProblem(
                f"a {kind.__module__}.{kind.__qualname__} that can neither be hashed nor compared by its fields", where
            )
        if kind.__eq__ is object.__eq__:
            if kind.__module__.partition(".")[0] not in {"jax", "jaxlib", "numpy", "builtins"}:
                self.by_identity.append(f"{where or 'value'}: {kind.__qualname__} object")
            return (kind, _Identity(value))
        return (kind, value)

    def _check_function(self, function: types.FunctionType, where: str) -> None:
        """A closure over a Module or a Variable would bake it in, and one over a tracer leak it: refuse them."""
        held: list[tuple[str, Any]] = []
        if function.__closure__:
            for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True):
                try:
                    held.append((f"{where} closes over `{name}`:", cell.cell_contents))
                except ValueError:  # an empty cell: the name is not bound yet
                    continue
        held += [(f"{where} has a default:", item) for item in function.__defaults__ or ()]
        held += [(f"{where} has a default `{name}`:", item) for name, item in (function.__kwdefaults__ or {}).items()]
        for label, item in held:
            for sub in _reach(item):
                if isinstance(sub, self.forbidden):
                    raise StaticProblem(f"a {type(sub).__name__}", label)
                if isinstance(sub, jax.core.Tracer):
                    raise StaticProblem(f"a traced array {_array_text(sub)}", label)
                if isinstance(sub, types.FunctionType) and id(sub) not in self.active:
                    self.active[id(sub)] = len(self.active)
                    try:
                        self._check_function(sub, where)
                    finally:
                        del self.active[id(sub)]


class _Identity:
    """Equal only to a wrapper of the same object, whatever that object's own `__eq__` says."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return object.__hash__(self.value) if not isinstance(self.value, type) else type.__hash__(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Identity, (self.value,))


def _reach(value: Any) -> Iterator[Any]:
    """The value and, if it is a plain container or a partial, what it holds."""
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, (list, tuple, set, frozenset)):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, functools.partial):
            stack.extend((item.func, item.args, item.keywords))
        elif isinstance(item, types.MethodType):
            stack.extend((item.__self__, item.__func__))


def _array_text(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}"


def _array_content(value: np.ndarray[Any, Any], walker: _Walker, where: str) -> Hashable:
    if value.dtype.hasobject:
        return tuple(walker.key(item, where, False) for item in value.ravel().tolist())
    return value.tobytes()


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _plain_fields(value: Any, kind: type) -> list[tuple[str, Any]] | None:
    """The fields of a config-like object: a dataclass, or an instance of a Python class without rules of its own."""
    if dataclasses.is_dataclass(kind):
        named = {field.name for field in dataclasses.fields(kind)}
        fields = [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(kind)]
        return fields + [(name, item) for name, item in getattr(value, "__dict__", {}).items() if name not in named]
    if isinstance(value, types.SimpleNamespace):
        return list(vars(value).items())
    if not kind.__flags__ & _HEAP_TYPE or kind.__module__.partition(".")[0] in {"jax", "jaxlib", "numpy"}:
        return None
    own_rules = kind.__eq__ is not object.__eq__ and kind.__hash__ is not None
    hooks = any(getattr(kind, name, None) is not getattr(object, name, None) for name in _COPY_HOOKS)
    slotted = any("__slots__" in base.__dict__ for base in kind.__mro__)
    if own_rules or hooks or not (slotted or hasattr(value, "__dict__")):
        return None
    fields = list(getattr(value, "__dict__", {}).items())
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in {"__dict__", "__weakref__"} and hasattr(value, name):
                fields.append((name, getattr(value, name)))
    return fields


def _is_frozen(kind: type) -> bool:
    parameters = getattr(kind, "__dataclass_params__", None)
    return bool(parameters is not None and parameters.frozen)


def copy_static(value: Any, memo: dict[int, Any]) -> Any:
    """Copy the mutable parts of a static value; what cannot change in place is shared.

    Args:
        value: a value that has a fingerprint.
        memo: copies made so far, by the id of the original: an object reached twice stays one object.
    """
    kind = type(value)
    if kind in _SCALARS or kind in (float, complex):
        return value
    if id(value) in memo:
        return memo[id(value)]
    copied = _copy_compound(value, kind, memo)
    memo[id(value)] = copied
    return copied


def _copy_compound(value: Any, kind: type, memo: dict[int, Any]) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy() if value.flags.writeable else value
    if kind is list:
        result: list[Any] = []
        memo[id(value)] = result
        result.extend(copy_static(item, memo) for item in value)
        return result
    if isinstance(value, tuple):
        items = [copy_static(item, memo) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return kind(*items) if hasattr(kind, "_fields") else tuple.__new__(kind, items)
    if isinstance(value, dict):
        copied = _shallow(value)
        memo[id(value)] = copied
        for name, item in value.items():
            copied[name] = copy_static(item, memo)
        return copied
    if isinstance(value, (list, set)):
        return _shallow(value)
    if isinstance(value, functools.partial):
        return functools.partial(
            copy_static(value.func, memo),
            *(copy_static(item, memo) for item in value.args),
            **{name: copy_static(item, memo) for name, item in value.keywords.items()},
        )
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, copy_static(value.__self__, memo))
    if isinstance(value, (types.FunctionType, enum.Enum, *_IDENTITY_TYPES)):
        return value
    fields = _plain_fields(value, kind)
    if fields is None:
        return value
    base: Any = types.SimpleNamespace if isinstance(value, types.SimpleNamespace) else object
    instance = base.__new__(kind)
    memo[id(value)] = instance
    changed = not _is_frozen(kind)
    for name, item in fields:
        fresh = copy_static(item, memo)
        changed = changed or fresh is not item
        object.__setattr__(instance, name, fresh)
    return instance if changed else value


def _shallow(value: Any) -> Any:
    import copy

    return copy.copy(value)
