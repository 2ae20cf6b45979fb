"""Variable and its collections: one value in one place, with a type and metadata that never change."""

from __future__ import annotations

import functools
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import jax
import numpy as np

from nnx.core._errors import TraceContextError, VariableError
from nnx.core._static import StaticProblem, copy_static, fingerprint
from nnx.core._tracing import TraceRef, calling_line, current_trace, describe_trace

__all__ = [
    "BatchStat",
    "Buffer",
    "Cache",
    "Cell",
    "Intermediate",
    "NO_METADATA",
    "PLAIN",
    "Metadata",
    "Node",
    "Param",
    "Static",
    "Variable",
    "VariableMetadata",
    "interning",
    "new_cell",
    "unshared",
    "var",
    "with_metadata",
]

F = TypeVar("F", bound=Callable[..., Any])
if TYPE_CHECKING:
    import typing_extensions

    # With a default, so that strict checkers take the bare class; Python itself has defaults since 3.13.
    A = typing_extensions.TypeVar("A", default=Any)
else:
    A = TypeVar("A")


# Two threads that make the same thing at once must get one. Reentrant, as a collection of garbage may come in between.
interning = threading.RLock()


class Metadata(Mapping[str, Any]):
    """Read-only metadata of a Variable, interned: equal metadata are one object."""

    __slots__ = ("__weakref__", "_items", "_mutable")

    _items: dict[str, Any]
    _mutable: bool
    _interned: ClassVar[weakref.WeakValueDictionary[Any, Metadata]] = weakref.WeakValueDictionary()

    @classmethod
    def of(cls, items: Mapping[str, Any]) -> Metadata:
        """Return the one Metadata object that holds `items`."""
        if isinstance(items, Metadata):
            return items
        key, mutable = [], False
        for name in sorted(items):
            try:
                mark = fingerprint(items[name], forbidden=(Cell,))
            except StaticProblem as problem:
                raise VariableError(
                    f"metadata `{name}{problem.where}` is {problem.reason}; metadata must be static values"
                ) from None
            key.append((name, mark.key))
            mutable = mutable or mark.mutable
        with interning:
            found = cls._interned.get(tuple(key))
            if found is None:
                for name in items:
                    _give_attribute(name)
                found = object.__new__(cls)
                found._mutable = mutable
                found._items = {name: copy_static(items[name], {}) for name in sorted(items)}
                cls._interned[tuple(key)] = found
        return found

    def __getitem__(self, name: str) -> Any:
        # A list is copied out: whoever edited it would edit the metadata of every Variable that shares them.
        return copy_static(self._items[name], {}) if self._mutable else self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Metadata({self._items})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Metadata.of, (self._items,))

    def __copy__(self) -> Metadata:
        return self

    def __deepcopy__(self, memo: object) -> Metadata:
        return self


NO_METADATA = Metadata.of({})


class VariableMetadata(Generic[A]):
    """A value on its way into a Variable together with metadata: what an initializer of `with_metadata` returns.

    Attributes:
        value: the value.
        metadata: what the Variable's metadata will hold besides what its constructor is given.
    """

    __slots__ = ("metadata", "value")

    def __init__(self, value: A, metadata: Mapping[str, Any]) -> None:
        if isinstance(value, VariableMetadata):  # of one wrapped initializer inside another, whose metadata win
            metadata = {**value.metadata, **metadata}
            value = value.value
        self.value: A = value
        self.metadata: dict[str, Any] = dict(metadata)


def with_metadata(initializer: F, **metadata: Any) -> F:
    """Wrap an initializer so that the Variable made from its result carries `metadata`.

    Example:
        >>> import jax, nnx
        >>> init = nnx.with_metadata(jax.nn.initializers.zeros, sharding=("in", "out"))
        >>> nnx.Param(init(jax.random.key(0), (2, 3))).sharding
        ('in', 'out')
    """

    @functools.wraps(initializer)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return VariableMetadata(initializer(*args, **kwargs), metadata)

    return wrapper  # type: ignore[return-value]


class Cell:
    """The place where one leaf of a Module lives: the base of Variables, Nodes, buffers and streams.

    The value itself is an item of a list: of one of the cell's own, or of the column of a Layout, which holds the
    values of a whole graph. So a compiled function takes the values of a graph as they lie, and writes all at once.
    """

    __slots__ = ("__weakref__", "_keeper", "_metadata", "_owned", "_place", "_trace")

    _place: tuple[list[Any], int]
    """The list and the position in it: one object, so that no thread ever sees the one without the other."""
    _keeper: weakref.ref[Any] | None
    """The Layout whose column the list is."""
    _metadata: Metadata
    _trace: TraceRef | None
    _owned: bool

    @property
    def _value(self) -> Any:
        values, position = self._place
        return values[position]

    @_value.setter
    def _value(self, value: Any) -> None:
        place = self._place
        place[0][place[1]] = value
        while self._place is not place:  # another thread has moved the cell in between
            place = self._place
            place[0][place[1]] = value

    structural: ClassVar[bool] = False
    """Whether writing a value changes the structure (true of `Static` alone)."""

    temporary: ClassVar[bool] = False
    """Whether `merge` may find no value for it: collections that come and go, as `Intermediate` does."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            _unpickle_cell,
            (encode_type(type(self)), self._metadata, self._value, self._trace is None, self._owned),
        )

    def __copy__(self) -> Any:
        return new_cell(type(self), self._value, self._metadata)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        import copy

        return new_cell(type(self), copy.deepcopy(self._value, memo), self._metadata)


# The slots' own setters: a Variable's `__setattr__` guards its metadata, and what is internal must not pay for that.
set_keeper: Callable[[Cell, weakref.ref[Any] | None], None] = Cell.__dict__["_keeper"].__set__
set_place: Callable[[Cell, tuple[list[Any], int]], None] = Cell.__dict__["_place"].__set__
set_metadata: Callable[[Cell, Metadata], None] = Cell.__dict__["_metadata"].__set__
set_trace: Callable[[Cell, TraceRef | None], None] = Cell.__dict__["_trace"].__set__
set_owned: Callable[[Cell, bool], None] = Cell.__dict__["_owned"].__set__


_IN_A_LIST: Any = Cell._value
"""How a cell holds its value, unless it is a random stream."""


def holds_in_a_list(kind: type[Cell]) -> bool:
    """Whether cells of a type hold their value as an item of a list, as all but random streams do."""
    return kind._value is _IN_A_LIST


def set_apart(cell: Cell, value: Any) -> None:
    """Give a cell a value in a list of its own, whatever list it was in."""
    set_place(cell, ([value], 0))
    set_keeper(cell, None)


def new_cell(
    kind: type[Cell], value: Any, metadata: Metadata = NO_METADATA, *, owned: bool = False, frozen: bool = False
) -> Any:
    """Make a Cell without running a user's constructor; a frozen one belongs to no trace and refuses writes."""
    cell = object.__new__(kind)
    set_metadata(cell, metadata)
    set_owned(cell, owned)
    set_trace(cell, None if frozen else current_trace())
    if kind._value is _IN_A_LIST:
        set_apart(cell, value)
    else:
        cell._value = value
    return cell


def unshared(value: Any) -> Any:
    """A value that no edit in place can reach from where it came: a State is no view of a Module."""
    if isinstance(value, PLAIN):
        return value
    return jax.tree.map(
        lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) and leaf.flags.writeable else leaf, value
    )


PLAIN = (jax.Array, int, float, complex, np.generic, jax.ShapeDtypeStruct)
"""The types of values that hold no others and cannot be edited in place."""


def write_cell(cell: Cell, value: Any) -> None:
    """Write a value from the trace that the Cell belongs to.

    Raises:
        VariableError: the Cell is frozen.
        TraceContextError: the Cell was made in another trace.
    """
    if cell._trace is not current_trace():
        check_cell_trace(cell, f"{type(cell).__name__}.value")
    place = cell._place
    place[0][place[1]] = value
    if cell._place is not place:
        cell._value = value


def check_cell_trace(cell: Cell, what: str, origin: str = "") -> None:
    """Raise unless `cell` may be written here; `what` names it in the error, `origin` is where it was made."""
    trace = current_trace()
    if cell._trace is trace:
        return
    if cell._trace is None:
        raise VariableError(
            f"cannot write `{what}`: this {type(cell).__name__} came out of a State or a pytree, so the write would be "
            "lost. Write to the Module's attribute (for a layer of a Stack, to that of `stack.layers`), or build a new "
            "Variable with `variable.replace(value)`."
        )
    raise TraceContextError(trace_error(what, cell._trace, trace, "write", origin))


def trace_error(what: str, made: TraceRef, used: TraceRef, verb: str, origin: str = "") -> str:
    """The message of a TraceContextError: what was touched, where it was made, where it is used, and the way out."""
    return (
        f"cannot {verb} `{what}` here, since it belongs to another JAX trace.\n"
        f"  made{' at ' + origin if origin else ''} in {describe_trace(made)}\n"
        f"  used at {calling_line()} in {describe_trace(used)}\n"
        "A change made here would leak a tracer or be lost when the trace ends. Pass the object as an argument "
        "through a lifted "
        "transform (nnx.jit, nnx.grad, ...), which carries changes out; or use the functional API: "
        "`state, moduledef = module.partition()` outside, `moduledef.merge(state)` inside, and return the new state."
    )


class _Held(Cell, Generic[A]):
    """What Variable and Node share: construction, `value`, metadata and the pytree behaviour."""

    __slots__ = ()

    collection: ClassVar[str] = ""

    def __init__(self, value: A | VariableMetadata[A] | Variable[A], **metadata: Any) -> None:
        if isinstance(value, _Held):
            if type(value) is not type(self):
                raise VariableError(
                    f"cannot make a {type(self).__name__} from a {type(value).__name__}: pass its value "
                    f"(`{type(self).__name__}(variable.value)`) to change the collection"
                )
            metadata = {**value._metadata, **metadata}
            value = value._value
        elif isinstance(value, VariableMetadata):
            metadata = {**value.metadata, **metadata}
            value = value.value
            if isinstance(value, _Held):
                self.__init__(value, **metadata)  # type: ignore[misc]
                return
        set_metadata(self, _metadata_of(metadata) if metadata else NO_METADATA)
        set_owned(self, False)
        set_trace(self, current_trace())
        set_apart(self, value)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "collection" in cls.__dict__:
            _collections.setdefault(cls.collection, cls)
        else:
            cls.collection = _snake(cls.__name__)
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, functools.partial(_unflatten, cls), _flatten)

    @property
    def value(self) -> A:
        """The value; assigning writes it in place.

        Raises:
            VariableError: on assignment, if this Variable came out of a State or a pytree.
            TraceContextError: on assignment from another trace than the one it was made in.
        """
        return self._value  # type: ignore[no-any-return]

    @value.setter
    def value(self, value: A) -> None:
        if isinstance(value, Cell):
            value = value._value
        write_cell(self, value)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata, read-only."""
        return MappingProxyType(dict(self._metadata))

    @property
    def sharding(self) -> Any:
        """The logical axis names of the value's dimensions, or None."""
        return self._metadata.get("sharding")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CELL_SLOTS or name == "value":
            object.__setattr__(self, name, value)
        elif name in self._metadata or name == "sharding":
            raise AttributeError(
                f"metadata `{name}` of a {type(self).__name__} is read-only; make a new one with "
                f"`variable.replace({name}=...)`"
            )
        else:
            raise AttributeError(
                f"a {type(self).__name__} has no attribute {name!r}; metadata are given when it is made: "
                f"{type(self).__name__}(value, {name}=...)"
            )

    def replace(self, *args: Any, **changes: Any) -> Any:
        """Return a new Variable of the same type with another value, other metadata, or both.

        Args:
            *args: the new value, if it changes.
            **changes: `value=` or metadata by name; None removes `sharding`.
        """
        if len(args) > 1 or (args and "value" in changes):
            raise TypeError("replace takes one value")
        value = args[0] if args else changes.pop("value", self._value)
        if isinstance(value, _Held):
            if type(value) is not type(self):
                raise VariableError(f"cannot replace the value of a {type(self).__name__} by a {type(value).__name__}")
            value = value._value
        metadata = {**self._metadata, **changes}
        return new_cell(type(self), value, _metadata_of(metadata))

    def copy(self) -> Any:
        """Return a new Variable with the same value and metadata, owned by no Module."""
        return new_cell(type(self), self._value, self._metadata)

    def is_equivalent(self, other: object) -> bool:
        """Whether `other` has the same type and metadata."""
        return type(self) is type(other) and self._metadata is other._metadata  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        from nnx.core._repr import summarize

        parts = [f"value={summarize(self._value)}", *(f"{k}={v!r}" for k, v in self._metadata.items())]
        return f"{type(self).__name__}({', '.join(parts)})"

    def __jax_array__(self) -> Any:
        return jax.numpy.asarray(self._value)


def _give_attribute(name: str) -> None:
    """Let `variable.name` read the metadata of that name.

    By a property, and not by `__getattr__`: a class with `__getattr__` reads all its attributes more slowly, `_value`
    among them, which every call of a compiled function reads once for every Variable.
    """
    if name in _readable:
        return
    if hasattr(_Held, name):
        raise VariableError(
            f"metadata cannot have the name {name!r}, which is an attribute of every Variable: choose another name"
        )
    _readable.add(name)

    def read(variable: Cell) -> Any:
        try:
            return variable._metadata[name]
        except KeyError:
            raise AttributeError(f"{type(variable).__name__!r} has no attribute or metadata {name!r}") from None

    setattr(_Held, name, property(read, doc=f"The metadata `{name}`."))


def _metadata_of(items: Mapping[str, Any]) -> Metadata:
    """Metadata without `sharding=None`, which says the same as no sharding."""
    return Metadata.of({name: item for name, item in items.items() if name != "sharding" or item is not None})


_readable = {"sharding"}
"""The metadata that can be read as attributes so far."""

_CELL_SLOTS = frozenset({"_value", "_metadata", "_trace", "_owned"})
_collections: dict[str, type[Any]] = {}


def _flatten_with_keys(cell: Cell) -> tuple[Any, Any]:
    return ((jax.tree_util.GetAttrKey("value"), cell._value),), cell._metadata


def _flatten(cell: Cell) -> tuple[Any, Any]:
    return (cell._value,), cell._metadata


def _unflatten(kind: type[Cell], metadata: Metadata, children: Any) -> Any:
    return new_cell(kind, children[0], metadata, frozen=True)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


class Node(_Held[A]):
    """A node attribute that is no Variable: any pytree of arrays, held as one entry of the State."""

    collection = "nodes"

    if TYPE_CHECKING:
        # An attribute of a Module that holds it reads as the value, so that is what an assignment makes of it.
        def __new__(cls, value: VariableMetadata[A] | Variable[A] | A, **metadata: Any) -> A: ...  # type: ignore[misc]


class Variable(_Held[A]):
    """A value that a Module owns and changes in place. Subclass it to make a collection of your own.

    A Variable that is an attribute of a Module is read and written through the attribute: `module.w` is the value.
    `module.get_variable("w")` gives the Variable itself; assigning that object to another attribute ties the two.

    Args:
        value: an array, or any pytree of arrays.
        **metadata: read-only facts about the value, such as `sharding=("in", "out")`.
    """

    collection = "variables"

    if TYPE_CHECKING:
        # An attribute of a Module that holds it reads as the value, so that is what an assignment makes of it.
        def __new__(cls, value: VariableMetadata[A] | Variable[A] | A, **metadata: Any) -> A: ...  # type: ignore[misc]


class Param(Variable[A]):
    """A parameter: what gradients are taken of."""

    collection = "params"


class BatchStat(Variable[A]):
    """A statistic of the batches seen so far, such as BatchNorm's running mean."""

    collection = "batch_stats"


class Cache(Variable[A]):
    """What is kept from one call to the next, such as the keys and values of attention."""

    collection = "cache"


class Intermediate(Variable[A]):
    """A value captured during a call, to be taken out with `pop_state`."""

    collection = "intermediates"
    temporary = True


class Buffer(Cell):
    """The place of a bare array (or another registered node type) assigned to a Module; never seen by users."""

    __slots__ = ()
    collection = "buffers"


class Static(Cell, Generic[A]):
    """A value that is part of the ModuleDef, whatever its type: also a NumPy array, compared by content.

    Reading the attribute gives the value. Writing it is a structural change: functions of the Module compile anew.

    Args:
        value: anything that can be compared by content.
    """

    __slots__ = ()
    structural = True

    def __init__(self, value: A) -> None:
        if isinstance(value, Static):
            value = value._value
        self._metadata, self._owned, self._trace = NO_METADATA, False, current_trace()
        set_apart(self, value)

    @property
    def value(self) -> A:
        """The value."""
        return self._value  # type: ignore[no-any-return]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and _static_key(self) == _static_key(other)

    def __hash__(self) -> int:
        return hash(_static_key(self))

    def __repr__(self) -> str:
        return f"Static({self._value!r})"


def _static_key(static: Static[Any]) -> Any:
    return fingerprint(static._value, forbidden=(Cell,), arrays=True).key


jax.tree_util.register_pytree_node(Static, lambda s: ((), s), lambda s, _: s)


def var(collection: str, value: A, **metadata: Any) -> A:
    """Make a Variable of a named collection; the collection's type is made when its name is first used.

    Args:
        collection: `"params"`, `"batch_stats"`, `"cache"`, `"intermediates"`, or a name of your own.
        value: the value.
        **metadata: the Variable's metadata.

    Example:
        >>> import nnx
        >>> nnx.var("losses", 1.0)
        Losses(value=1.0)
    """
    return collection_type(collection)(value, **metadata)  # type: ignore[return-value]


def collection_type(collection: str) -> type[Variable[Any]]:
    """The Variable type of a named collection, made if there is none."""
    found = _collections.get(collection)
    if found is None:
        if not isinstance(collection, str) or not re.fullmatch(r"[A-Za-z_]\w*", collection):
            raise VariableError(f"a collection's name must be an identifier, got {collection!r}")
        name = "".join(part.capitalize() for part in collection.split("_")) or "Variable"
        found = type(
            name,
            (Variable,),
            {"collection": collection, "_from_name": True, "__module__": __name__, "__doc__": f"`{collection}`"},
        )
    return found


def encode_type(kind: type) -> Any:
    """A picklable stand-in for a Variable type: types made by `var` are known by name alone."""
    return kind.collection if kind.__dict__.get("_from_name") else kind  # type: ignore[attr-defined]


def decode_type(code: Any) -> type[Any]:
    """The inverse of `encode_type`."""
    return collection_type(code) if isinstance(code, str) else code


def _unpickle_cell(code: Any, metadata: Metadata, value: Any, frozen: bool, owned: bool) -> Any:
    return new_cell(decode_type(code), value, metadata, frozen=frozen, owned=owned)
