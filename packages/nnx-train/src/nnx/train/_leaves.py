"""What a checkpoint sees of a value: its leaves by `/`-joined path, what is known of each, and the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nnx.core import Context, Module, State, StructureError, Variable

__all__ = ["Flat", "Leaf", "Spec", "flatten", "key_data", "spec_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of a value.

    Attributes:
        path: its path, parts joined by `/`.
        value: an array, a key, a Python number, or a `ShapeDtypeStruct`.
        collection: the collection of the Variable that holds it, None for the leaves of other pytrees.
    """

    path: str
    value: Any
    collection: str | None


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
    """

    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    collection: str | None = None
    impl: str | None = None
    value: Any = None
    devices: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The Spec as JSON holds it, without what is absent."""
        fields = dataclasses.asdict(self)
        return {name: item for name, item in fields.items() if item is not None and item != ""}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Spec:
        """The inverse of `to_json`."""
        return cls(**{**fields, "shape": tuple(fields["shape"])})

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
    ) -> None:
        self.leaves = leaves
        self.entries = entries
        self._treedef = treedef
        self._builders = builders
        self._roots = roots

    def select(self, only: Any) -> set[str]:
        """The paths of the leaves that a filter matches."""
        chosen = State([(path, node) for path, node, _ in self.entries]).filter(only)
        return {leaf for path, _, leaves in self.entries if path in chosen for leaf in leaves}

    def rebuild(self, values: Iterable[Any]) -> Any:
        """Make the value again with other leaves.

        Modules and Contexts are changed in place, after everything else has been built: either all are or none is.

        Args:
            values: the new leaves, in the order of `leaves`.
        """
        stream = iter(values)
        built = [builder(stream) for builder in self._builders]
        for i, root in enumerate(self._roots):
            if isinstance(root, (Module, Context)):
                root.update_state(built[i])
                built[i] = root
        return jax.tree.unflatten(self._treedef, built)


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
    for key_path, root in roots:
        prefix = _key_parts(key_path)
        state = root if isinstance(root, State) else root.partition()[0] if _is_ours(root) else None
        if state is None:
            leaves.append(_leaf(prefix or ["value"], root, None, what))
            entries.append((tuple(prefix or ["value"]), root, [leaves[-1].path]))
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
                entries.append(((*prefix, *path), node, [leaf.path for leaf in own]))
            builders.append(_state_builder(state, treedefs))
    seen: set[str] = set()
    for leaf in leaves:
        if leaf.path in seen:
            raise StructureError(f"{what} has two leaves with the path `{leaf.path}`; rename one of them")
        seen.add(leaf.path)
    return Flat(leaves, entries, treedef, builders, [root for _, root in roots])


def _state_builder(state: State, treedefs: Sequence[Any]) -> Callable[[Iterator[Any]], State]:
    def build(values: Iterator[Any]) -> State:
        return state.replace_values(
            [jax.tree.unflatten(t, [next(values) for _ in range(t.num_leaves)]) for t in treedefs]
        )

    return build


def _key_parts(key_path: Sequence[Any]) -> list[str]:
    parts = []
    for key in key_path:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                parts.append(str(getattr(key, attribute)))
                break
        else:
            parts.append(str(key))
    return parts


def _leaf(parts: Sequence[str], value: Any, collection: str | None, what: str) -> Leaf:
    path = "/".join(parts)
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
    return Leaf(path, value, collection)


def _is_storable(dtype: Any) -> bool:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return True
    number = jax.dtypes.issubdtype(dtype, np.number) or jax.dtypes.issubdtype(dtype, np.bool_)
    return number and np.dtype(dtype).itemsize <= (16 if np.dtype(dtype).kind == "c" else 8)


def spec_of(leaf: Leaf) -> Spec:
    """The Spec of a leaf."""
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
