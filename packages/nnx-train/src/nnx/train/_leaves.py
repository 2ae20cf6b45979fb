"""What a checkpoint sees of a value: its leaves by `/`-joined path, what is known of each, and the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nnx.core import Context, Module, State, StructureError, Variable

__all__ = ["Flat", "Leaf", "Spec", "flatten", "key_data", "path_of", "rebuild", "spec_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of a value.

    Attributes:
        path: its path, parts joined by `/`.
        parts: the parts, where they are not what splitting the path at `/` gives: integers, or texts with a `/`.
        value: an array, a key, a Python number, or a `ShapeDtypeStruct`.
        collection: the collection of the Variable that holds it, None for the leaves of other pytrees.
    """

    path: str
    value: Any
    collection: str | None
    parts: tuple[str | int, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """What a checkpoint's manifest tells of a leaf without reading its data.

    Attributes:
        kind: `"array"`, `"key"` (a typed PRNG key), or the name of a Python number's type.
        shape: the shape, without the dimensions of a key's own data.
        dtype: the name of the dtype; empty for Python numbers.
        collection: the collection of the Variable that holds it, or None.
        impl: the PRNG implementation of a concrete key.
        value: the value of a Python number.
        devices: the number of devices of an array that was put somewhere; None for others.
        parts: the parts of the path with their types, where they are not what splitting it at `/` gives: integers, or
            texts with a `/`; None where they are.
    """

    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    collection: str | None = None
    impl: str | None = None
    value: Any = None
    devices: int | None = None
    parts: tuple[str | int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The Spec as JSON holds it, without what is absent."""
        fields = dataclasses.asdict(self)
        return {name: item for name, item in fields.items() if item is not None and item != ""}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Spec:
        """The inverse of `to_json`."""
        own = {**fields, "shape": tuple(fields["shape"])}
        if "parts" in own:
            own["parts"] = tuple(own["parts"])
        return cls(**own)

    @property
    def stored(self) -> bool:
        """Whether there is array data: Python numbers and arrays without elements are in the manifest alone."""
        return self.kind in ("array", "key") and 0 not in self.shape

    def __str__(self) -> str:
        if self.kind not in ("array", "key"):
            return f"a Python {self.kind}"
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Flat:
    """A value as leaves by path, and the way back.

    Attributes:
        leaves: the leaves, each path once.
        entries: for each Variable, array or other node its path, itself, and the paths of its leaves.
    """

    def __init__(
        self,
        leaves: list[Leaf],
        entries: list[tuple[tuple[str, ...], Any, list[str]]],
        treedef: Any,
        builders: list[Callable[[Iterator[Any]], Any]],
        roots: list[Any],
        states: list[State | None],
    ) -> None:
        self.leaves = leaves
        self.entries = entries
        self._treedef = treedef
        self._builders = builders
        self._roots = roots
        self._states = states

    def select(self, only: Any) -> set[str]:
        """The paths of the leaves that a filter matches."""
        # Each by itself: a State holds no path that begins another one, and a dict of arrays may.
        return {leaf for path, node, leaves in self.entries if State([(path, node)]).filter(only) for leaf in leaves}

    def build(self, values: Iterable[Any]) -> list[Any]:
        """The value's parts again, with other leaves: a State for each Module and Context.

        Args:
            values: the new leaves, in the order of `leaves`.
        """
        stream = iter(values)
        return [builder(stream) for builder in self._builders]

    def join(self, built: list[Any]) -> Any:
        """The value of parts from `build`, once Modules and Contexts have been changed."""
        parts = [root if _in_place(root) else part for root, part in zip(self._roots, built, strict=True)]
        return jax.tree.unflatten(self._treedef, parts)

    def in_place(self, built: list[Any]) -> list[tuple[Any, Any, Any]]:
        """Each Module and Context, what it holds, and what it shall hold."""
        triples = zip(self._roots, self._states, built, strict=True)
        return [triple for triple in triples if _in_place(triple[0])]


def rebuild(flats: Mapping[str, Flat], values: Mapping[str, Iterable[Any]]) -> dict[str, Any]:
    """Make values again with other leaves. Modules and Contexts are changed in place: all of them, or none.

    Args:
        flats: the values.
        values: the new leaves of each, in the order of its `leaves`.
    """
    built = {name: flat.build(values[name]) for name, flat in flats.items()}
    changes = [change for name, flat in flats.items() for change in flat.in_place(built[name])]
    begun = 0
    try:
        for root, _, new in changes:
            begun += 1
            root.update_state(new)
    except BaseException:
        # In this order: that which raised may do so again, when the others are as they were.
        for root, old, _ in changes[:begun]:
            # Not the method of a user's class, which may be what raised.
            (Module if isinstance(root, Module) else Context).update_state(root, old)
        raise
    return {name: flat.join(built[name]) for name, flat in flats.items()}


def _in_place(root: object) -> bool:
    return isinstance(root, (Module, Context))


def _is_ours(value: object) -> bool:
    return isinstance(value, (Module, Context, State))


def flatten(value: Any, what: str) -> Flat:
    """Take a value apart.

    Args:
        value: a Module, TrainState, State, Optimizer or Context, or any pytree of those and of arrays.
        what: names the value in errors.

    Raises:
        StructureError: two leaves have one path.
        TypeError: a leaf is nothing that a checkpoint can hold.
    """
    roots, treedef = jax.tree_util.tree_flatten_with_path(value, is_leaf=_is_ours)
    leaves: list[Leaf] = []
    entries: list[tuple[tuple[str, ...], Any, list[str]]] = []
    builders: list[Callable[[Iterator[Any]], Any]] = []
    states: list[State | None] = []
    for key_path, root in roots:
        prefix = _key_parts(key_path)
        state = root if isinstance(root, State) else root.partition()[0] if _is_ours(root) else None
        states.append(state)
        if state is None:
            leaves.append(_leaf(prefix or ["value"], root, None, what))
            # Keys may hold a `/`: those that optax makes of paths do.
            entries.append((tuple(leaves[-1].path.split("/")), root, [leaves[-1].path]))
            builders.append(next)
        else:
            treedefs = []
            for (path, kind, _), entry, node in zip(
                state.schema.entries, state.raw_values, state.values(), strict=True
            ):
                collection = kind.collection if issubclass(kind, Variable) else None
                pairs, entry_treedef = jax.tree_util.tree_flatten_with_path(entry)
                treedefs.append(entry_treedef)
                own = [_leaf([*prefix, *path, *_key_parts(keys)], leaf, collection, what) for keys, leaf in pairs]
                leaves += own
                parts = "/".join(map(str, prefix)).split("/") if prefix else ()
                entries.append(((*parts, *path), node, [leaf.path for leaf in own]))
            builders.append(_state_builder(state, treedefs))
    seen: set[str] = set()
    for leaf in leaves:
        if leaf.path in seen:
            raise StructureError(f"{what} has two leaves with the path `{leaf.path}`; rename one of them")
        seen.add(leaf.path)
    return Flat(leaves, entries, treedef, builders, [root for _, root in roots], states)


def _state_builder(state: State, treedefs: Sequence[Any]) -> Callable[[Iterator[Any]], State]:
    def build(values: Iterator[Any]) -> State:
        return state.replace_values(
            [jax.tree.unflatten(t, [next(values) for _ in range(t.num_leaves)]) for t in treedefs]
        )

    return build


def _key_parts(key_path: Sequence[Any]) -> list[str | int]:
    parts: list[str | int] = []
    for key in key_path:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                part = getattr(key, attribute)
                parts.append(part if type(part) is int else str(part))
                break
        else:
            parts.append(str(key))
    return parts


def path_of(key_path: Sequence[Any]) -> str:
    """A path of JAX's as a text: its parts, joined by `/`."""
    return "/".join(map(str, _key_parts(key_path)))


def _leaf(parts: Sequence[str | int], value: Any, collection: str | None, what: str) -> Leaf:
    path = "/".join(map(str, parts))
    typed = None if tuple(path.split("/")) == tuple(parts) else tuple(parts)
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{what}: `{path}` is traced; checkpoints are saved and restored outside of JAX transforms")
    if type(value) not in (bool, int, float, complex):
        dtype = getattr(value, "dtype", None)
        if dtype is None or not hasattr(value, "shape") or not _is_storable(dtype):
            kind = f"{type(value).__name__} of {dtype}" if dtype is not None else type(value).__name__
            raise TypeError(
                f"{what}: `{path}` is a {kind}; a checkpoint holds arrays, PRNG keys and Python numbers "
                "(and `extra=` what JSON can hold)"
            )
        if isinstance(value, jax.Array) and value.is_deleted():
            raise TypeError(f"{what}: the array at `{path}` has been deleted: it was donated to a compiled function")
    return Leaf(path, value, collection, typed)


def _is_storable(dtype: Any) -> bool:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return True
    number = jax.dtypes.issubdtype(dtype, np.number) or jax.dtypes.issubdtype(dtype, np.bool_)
    return number and np.dtype(dtype).itemsize <= (16 if np.dtype(dtype).kind == "c" else 8)


def spec_of(leaf: Leaf) -> Spec:
    """The Spec of a leaf."""
    return dataclasses.replace(_spec_of(leaf), parts=leaf.parts) if leaf.parts else _spec_of(leaf)


def _spec_of(leaf: Leaf) -> Spec:
    value = leaf.value
    if type(value) in (bool, int, float):
        return Spec(type(value).__name__, collection=leaf.collection, value=value)
    if type(value) is complex:
        return Spec("complex", collection=leaf.collection, value=[value.real, value.imag])
    shape = tuple(int(size) for size in value.shape)
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(value)) if isinstance(value, jax.Array) else None
        return Spec("key", shape, str(value.dtype), leaf.collection, impl, devices=_devices(value))
    return Spec("array", shape, np.dtype(value.dtype).name, leaf.collection, devices=_devices(value))


def _devices(value: Any) -> int | None:
    sharding = value.sharding if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)) else None
    if sharding is None or (isinstance(value, jax.Array) and not value.committed):
        return None
    return len(sharding.device_set)


def key_data(value: Any) -> Any:
    """What of a leaf is written as array data: a key's own numbers, or the array itself."""
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(value)
    return np.asarray(value) if isinstance(value, np.generic) else value
