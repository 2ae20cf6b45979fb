"""Logical axes: Variables name the axes of their values, and rules say which axes of a mesh split them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from nnx.core._errors import ShardingError
from nnx.core._layout import layout_of, state_of
from nnx.core._object import Object
from nnx.core._state import State, path_text
from nnx.core._variable import Buffer, Cell, new_cell, with_metadata

__all__ = [
    "Annotated",
    "Names",
    "RulesLike",
    "annotate",
    "current_rules",
    "get_named_sharding",
    "get_partition_spec",
    "names_by_path",
    "logical_axis_rules",
    "logical_to_mesh",
    "logical_to_mesh_sharding",
    "names_of_leaf",
    "to_rules",
    "with_logical_constraint",
    "with_logical_partitioning",
]

A = TypeVar("A")
F = TypeVar("F", bound=Callable[..., Any])

MeshAxes = str | tuple[str, ...] | None
RulesLike = Mapping[str, MeshAxes] | Sequence[tuple[str, MeshAxes]]
Rules = tuple[tuple[str, MeshAxes], ...]
Names = tuple[Any, ...]

# Part of the key under which JAX keeps what it has compiled: a function that was traced under other rules is traced
# anew, instead of keeping the constraints of the old ones.
_context = jax.make_user_context(None)


def to_rules(rules: RulesLike) -> Rules:
    """Rules as a hashable value.

    Raises:
        ShardingError: a rule is malformed, or a name has two.
    """
    pairs = tuple(rules.items()) if isinstance(rules, Mapping) else tuple(rules)
    seen: dict[str, MeshAxes] = {}
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ShardingError(
                f"a rule is a pair of a logical axis and a mesh axis, ('mlp', 'model') or ('mlp', None), got {pair!r}"
            )
        name, axes = pair
        axes = tuple(axes) if isinstance(axes, (tuple, list)) else axes
        parts = axes if isinstance(axes, tuple) else (axes,)
        if not (axes is None or all(isinstance(axis, str) for axis in parts)):
            raise ShardingError(f"the rule of `{name}` gives a mesh axis, a tuple of them or None, got {axes!r}")
        if name in seen:
            raise ShardingError(f"the logical axis `{name}` has two rules, {seen[name]!r} and {axes!r}: keep one")
        seen[name] = axes
    return tuple(seen.items())


def current_rules(rules: RulesLike | None = None) -> Rules | None:
    """The rules that were given, else those of the context, else None."""
    if rules is not None:
        return to_rules(rules)
    return _context.value  # type: ignore[no-any-return]


@contextlib.contextmanager
def logical_axis_rules(rules: RulesLike | None) -> Iterator[None]:
    """The rules from logical axes to mesh axes for what runs inside of the `with`.

    A function that was compiled under other rules compiles anew.

    Args:
        rules: a mapping, or pairs, from a logical axis to the mesh axis that splits it, to a tuple of mesh axes, or to
            None where it is not split. None takes the rules away.

    Raises:
        ShardingError: a rule is malformed, or a name has two.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> with nnx.logical_axis_rules({"batch": "data", "mlp": "model"}):
        ...     tuple(nnx.get_partition_spec(nnx.Param(jnp.ones((4, 8)), sharding=("batch", "mlp"))).value)
        ('data', 'model')
    """
    with _context(None if rules is None else to_rules(rules)):
        yield


def with_logical_partitioning(initializer: F, names: Sequence[str | None] | None) -> F:
    """Wrap an initializer so that the Variable made from its result names the axes of its value.

    The layers name their own axes; what is given here takes the place of that.

    Args:
        initializer: a function such as those of `nnx.initializers`.
        names: the logical axis of each dimension of the Variable, None for one that is never split. None in the place
            of all says that the Variable has no names.

    Example:
        >>> import jax, nnx
        >>> init = nnx.with_logical_partitioning(jax.nn.initializers.zeros, ("embed", "mlp"))
        >>> nnx.Param(init(jax.random.key(0), (2, 3))).sharding
        ('embed', 'mlp')
    """
    return with_metadata(initializer, sharding=None if names is None else tuple(names))


class Annotated:
    """A part of a pytree: a leaf, a Variable, a State or a Module, with the logical names of each array in it.

    Attributes:
        item: the part itself.
        state: what stands for it: the State of a Module, else the part.
        leaves: its arrays.
        names: for each array its logical names, or None.
        labels: for each array what an error calls it.
    """

    __slots__ = ("item", "labels", "leaves", "names", "state", "treedef")

    def __init__(self, item: Any, label: str) -> None:
        self.item = item
        self.state = state_of(layout_of(item)) if isinstance(item, Object) else item
        leaves, treedef = jax.tree.flatten(self.state)
        self.leaves: list[Any] = leaves
        self.treedef: Any = treedef
        self.names: list[Names | None] = []
        self.labels: list[str] = []
        if isinstance(self.state, State):
            values = zip(self.state.schema.entries, self.state.raw_values, strict=True)
            for (path, _, metadata), value in values:
                self._add(metadata.get("sharding"), path_text(path), value)
        elif isinstance(item, Cell):
            self._add(item._metadata.get("sharding"), label or type(item).__name__, item._value)
        else:
            self._add(None, label, item)

    def _add(self, names: Any, label: str, value: Any) -> None:
        for leaf in jax.tree.leaves(value):
            if names is not None and len(names) != np.ndim(leaf):
                raise ShardingError(
                    f"`{label}` has the shape {tuple(np.shape(leaf))} and the logical axes {tuple(names)!r}: name each "
                    "dimension once, None for one that is never split"
                )
            self.names.append(None if names is None else tuple(names))
            self.labels.append(label)

    def build(self, results: Sequence[Any]) -> Any:
        """The part, or its State, with other leaves."""
        if isinstance(self.state, State):
            # Not by unflattening alone: a PartitionSpec or a sharding must be one value, as the array was.
            rest = iter(results)
            values = [jax.tree.map(lambda _: next(rest), value) for value in self.state.raw_values]
            return self.state.replace_values(values)
        if isinstance(self.item, Cell):
            rest = iter(results)
            value = jax.tree.map(lambda _: next(rest), self.item._value)
            return value if type(self.item) is Buffer else new_cell(type(self.item), value, self.item._metadata)
        return results[0] if len(results) == 1 else self.treedef.unflatten(results)


def _is_part(item: Any) -> bool:
    return isinstance(item, (State, Cell, Object))


def annotate(tree: Any) -> tuple[list[Annotated], Any]:
    """The parts of a pytree with their logical names, and its treedef.

    An array outside of all Variables has those of the Variable whose path is a dict key on the way to it, if the
    shapes are equal: so an optax state, which goes by the paths of the parameters, is laid out as they are.
    """
    found, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_part)
    parts = [Annotated(item, jax.tree_util.keystr(path, simple=True, separator="/")) for path, item in found]
    known = _known(parts)
    for (path, _), part in zip(found, parts, strict=True):
        if not _is_part(part.item) and part.leaves:
            part.names = [names_of_leaf(path, tuple(np.shape(part.leaves[0])), known)]
    return parts, treedef


def names_by_path(state: State) -> dict[str, list[tuple[tuple[int, ...], Names]]]:
    """The shapes and names of a State's arrays by path."""
    return _known([Annotated(state, "")])


def _known(parts: Sequence[Annotated]) -> dict[str, list[tuple[tuple[int, ...], Names]]]:
    known: dict[str, list[tuple[tuple[int, ...], Names]]] = {}
    for part in parts:
        if isinstance(part.state, State):
            for label, leaf, names in zip(part.labels, part.leaves, part.names, strict=True):
                if names is not None:
                    known.setdefault(label, []).append((tuple(np.shape(leaf)), names))
    return known


def names_of_leaf(
    path: Sequence[Any], shape: tuple[int, ...], known: Mapping[str, Sequence[tuple[tuple[int, ...], Names]]]
) -> Names | None:
    """The names of an array that lies under the path of a Variable, as an optimizer's moments do."""
    for key in reversed(path):
        for own, names in known.get(str(getattr(key, "key", "")), ()):
            if own == shape:
                return names
    return None


def resolve(
    names: Names | None,
    rules: Rules | None,
    label: str,
    shape: tuple[int, ...] | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> PartitionSpec:
    """The mesh axes of each dimension.

    Args:
        names: the logical axes.
        rules: what each is mapped to; None takes the names for mesh axes.
        label: what an error calls the array.
        shape: its shape, to check that it divides.
        mesh: the mesh, to check that it has the axes and that they divide the sizes.

    Raises:
        ShardingError: a name has no rule, a mesh axis would split two dimensions or does not exist, or a size does not
            divide.
    """
    if names is None:
        return PartitionSpec()
    table = None if rules is None else dict(rules)
    used: dict[str, Any] = {}
    spec: list[Any] = []
    for dimension, name in enumerate(names):
        axes: list[str] = []
        if name is PartitionSpec.UNCONSTRAINED:
            spec.append(name)
            continue
        for part in name if isinstance(name, (tuple, list)) else (name,):
            if part is None:
                continue
            target = part if table is None else _rule(part, table, label, dimension, shape)
            axes += target if isinstance(target, tuple) else [] if target is None else [target]
        for axis in axes:
            if axis in used:
                raise ShardingError(
                    f"`{label}` with the logical axes {names!r} would be split twice over the mesh axis `{axis}`: by "
                    f"`{used[axis]}` and by `{name}`{_sizes(shape)}. A mesh axis splits one dimension: map one of the "
                    "two to None or to another mesh axis"
                )
            used[axis] = name
        if mesh is not None:
            _check_division(axes, name, label, dimension, shape, mesh)
        spec.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*spec)


def _sizes(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else f" (shape {shape})"


def _rule(name: Any, table: Mapping[str, MeshAxes], label: str, dimension: int, shape: Any) -> MeshAxes:
    if name not in table:
        size = "" if shape is None else f" of size {shape[dimension]}"
        known = ", ".join(f"`{item}`" for item in table) or "nothing"
        raise ShardingError(
            f"`{label}` has the logical axis `{name}` (dimension {dimension}{size}), for which there is no rule: add "
            f"({name!r}, <a mesh axis>), or ({name!r}, None) to leave it whole. There are rules for {known}"
        )
    return table[name]


def _check_division(
    axes: Sequence[str], name: Any, label: str, dimension: int, shape: Any, mesh: Mesh | AbstractMesh
) -> None:
    for axis in axes:
        if axis not in mesh.shape:
            have = ", ".join(f"`{item}` ({size})" for item, size in mesh.shape.items()) or "none"
            raise ShardingError(
                f"the logical axis `{name}` of `{label}` is mapped to the mesh axis `{axis}`, which the mesh does not "
                f"have (its axes: {have})"
            )
    count = math.prod(mesh.shape[axis] for axis in axes)
    if shape is not None and shape[dimension] % count:
        over = " and ".join(f"`{axis}` of size {mesh.shape[axis]}" for axis in axes)
        raise ShardingError(
            f"dimension {dimension} (`{name}`) of `{label}` has the size {shape[dimension]} (shape {tuple(shape)}), "
            f"which does not divide over the mesh axis {over}: make the size a multiple of {count}, or map `{name}` to "
            "None"
        )


def get_partition_spec(tree: Any, rules: RulesLike | None = None) -> Any:
    """The PartitionSpec of each array.

    Args:
        tree: a Module, a State, a Variable, a TrainState, or any pytree of these and of arrays. Arrays may be
            `jax.ShapeDtypeStruct`. An array outside of all Variables (a moment of an optax state) has the names of the
            Variable whose path is a dict key on the way to it, if their shapes are equal; others are not split.
        rules: from logical axes to mesh axes; None takes those of `logical_axis_rules`. Without any, the specs hold the
            logical names, for `logical_to_mesh`.

    Returns:
        The same tree with a PartitionSpec for each array, and a State in the place of a Module.

    Raises:
        ShardingError: a name has no rule, a mesh axis would split two dimensions, or the names do not fit the shape.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Linear(nnx.Module):
        ...     def __init__(self):
        ...         self.w = nnx.Param(jnp.ones((4, 8)), sharding=("embed", "mlp"))
        >>> tuple(nnx.get_partition_spec(Linear(), {"embed": None, "mlp": "model"})["w"].value)
        (None, 'model')
    """
    table = current_rules(rules)
    return _map(tree, lambda names, label, leaf: resolve(names, table, label, tuple(np.shape(leaf))))


def get_named_sharding(tree: Any, mesh: Mesh | AbstractMesh, rules: RulesLike | None = None) -> Any:
    """The NamedSharding of each array: where `jax.device_put` or a restored checkpoint should put it.

    Args:
        tree: as for `get_partition_spec`.
        mesh: the mesh.
        rules: from logical axes to mesh axes; None takes those of `logical_axis_rules`. Without any, the names are
            axes of the mesh.

    Returns:
        The same tree with a `jax.sharding.NamedSharding` for each array, and a State in the place of a Module.

    Raises:
        ShardingError: a name has no rule, a mesh axis would split two dimensions or does not exist, or a size does not
            divide; with the path, the axes and the sizes.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> w = nnx.Param(jnp.ones((4, 8)), sharding=("embed", "mlp"))
        >>> tuple(nnx.get_named_sharding(w, mesh, {"embed": None, "mlp": "model"}).value.spec)
        (None, 'model')
    """
    table = current_rules(rules)

    def sharding(names: Names | None, label: str, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, resolve(names, table, label, tuple(np.shape(leaf)), mesh))

    return _map(tree, sharding)


def _map(tree: Any, function: Callable[[Names | None, str, Any], Any]) -> Any:
    parts, treedef = annotate(tree)
    return treedef.unflatten([part.build(list(map(function, part.names, part.labels, part.leaves))) for part in parts])


def logical_to_mesh(tree: Any, rules: RulesLike | None = None) -> Any:
    """PartitionSpecs of mesh axes for PartitionSpecs of logical axes.

    Args:
        tree: a pytree of PartitionSpecs, such as `get_partition_spec` gives without rules; other leaves stay.
        rules: from logical axes to mesh axes; None takes those of `logical_axis_rules`.

    Raises:
        ShardingError: there are no rules, a name has none, or a mesh axis would split two dimensions.

    Example:
        >>> import nnx
        >>> from jax.sharding import PartitionSpec as P
        >>> tuple(nnx.logical_to_mesh({"w": P("embed", "mlp")}, {"embed": None, "mlp": "model"})["w"])
        (None, 'model')
    """
    return _map_specs(tree, rules, resolve)


def logical_to_mesh_sharding(tree: Any, mesh: Mesh | AbstractMesh, rules: RulesLike | None = None) -> Any:
    """NamedShardings for PartitionSpecs of logical axes; as `logical_to_mesh`, and with the mesh.

    Args:
        tree: a pytree of PartitionSpecs of logical axes.
        mesh: the mesh.
        rules: from logical axes to mesh axes; None takes those of `logical_axis_rules`.

    Raises:
        ShardingError: as for `logical_to_mesh`, or the mesh lacks an axis.

    Example:
        >>> import jax, nnx
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> tuple(nnx.logical_to_mesh_sharding(P("embed", "mlp"), mesh, {"embed": None, "mlp": "model"}).spec)
        (None, 'model')
    """
    return _map_specs(
        tree, rules, lambda names, table, label: NamedSharding(mesh, resolve(names, table, label, None, mesh))
    )


def _map_specs(tree: Any, rules: RulesLike | None, function: Callable[[Names, Rules, str], Any]) -> Any:
    table = current_rules(rules)
    if table is None:
        raise ShardingError("there are no rules: give `rules=`, or enter `nnx.logical_axis_rules(rules)`")

    def convert(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, PartitionSpec):
            return leaf
        return function(tuple(leaf), table, jax.tree_util.keystr(path, simple=True, separator="/") or "the spec")

    return jax.tree_util.tree_map_with_path(convert, tree, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def with_logical_constraint(
    x: A, names: Sequence[Any], *, rules: RulesLike | None = None, mesh: Mesh | AbstractMesh | None = None
) -> A:
    """Say how a value inside of a computation is split, by logical axes.

    Where there are no rules it returns `x` as it is, so that a model with constraints runs on one device unchanged. On
    axes of a mesh that JAX lays out by itself (auto) it is `jax.lax.with_sharding_constraint`, on explicit axes
    `jax.sharding.reshard`, and on manual ones (inside of `shard_map`) it says nothing.

    Args:
        x: an array, or a pytree of arrays with the same axes.
        names: the logical axis of each dimension; None for one that is not split, or
            `PartitionSpec.UNCONSTRAINED` for one that is left to the compiler.
        rules: from logical axes to mesh axes; None takes those of `logical_axis_rules`.
        mesh: the mesh; None takes that of `jax.set_mesh`.

    Raises:
        ShardingError: there are rules and no mesh; a name has no rule; a mesh axis would split two dimensions; a size
            does not divide; or there are more or fewer names than dimensions.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> with jax.set_mesh(mesh), nnx.logical_axis_rules({"batch": "data", "embed": None}):
        ...     y = nnx.jit(lambda x: nnx.with_logical_constraint(x, ("batch", "embed")))(jnp.ones((4, 8)))
        >>> y.sharding.spec[0]
        'data'
    """
    table = current_rules(rules)
    if table is None:
        return x
    around: Any = jax.sharding.get_abstract_mesh()
    chosen: Any = around if mesh is None else mesh
    if chosen.empty:
        raise ShardingError(
            f"a constraint on the logical axes {tuple(names)!r} has rules and no mesh: run inside of "
            "`jax.set_mesh(mesh)`, or give `mesh=`; without rules it would say nothing"
        )
    return jax.tree.map(lambda leaf: _constrain(leaf, tuple(names), table, chosen, around), x)  # type: ignore[no-any-return]


def _constrain(x: Any, names: Names, table: Rules, mesh: Any, around: Any) -> Any:
    if len(names) != np.ndim(x):
        raise ShardingError(
            f"a constraint on the logical axes {names!r} got an array of the shape {tuple(np.shape(x))}: name each "
            "dimension once, None for one that is not split"
        )
    # Inside of shard_map the array is a shard already: what is manual there has been split.
    types = dict(zip(around.axis_names, around.axis_types, strict=True)) if not around.empty else {}
    types = {axis: types.get(axis, kind) for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)}
    manual = {axis for axis, kind in types.items() if kind == AxisType.Manual}
    if manual:
        table = tuple((name, _left(axes, manual)) for name, axes in table)
    spec = resolve(names, table, "the constrained value", tuple(np.shape(x)), mesh)
    if len(manual) == len(types):
        return x
    explicit = {axis for axis, kind in types.items() if kind == AxisType.Explicit}
    if explicit:
        own = PartitionSpec(*(_left(part, set(types) - explicit) for part in spec))
        x = jax.sharding.reshard(x, NamedSharding(mesh, own) if around.empty else own)
        if len(explicit) + len(manual) == len(types):
            return x
        spec = PartitionSpec(*(_left(part, explicit) for part in spec))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec) if around.empty else spec)


def _left(axes: Any, without: set[str]) -> Any:
    """Mesh axes without some of them."""
    if axes is PartitionSpec.UNCONSTRAINED:
        return None
    kept = tuple(a for a in (axes if isinstance(axes, tuple) else (axes,)) if a is not None and a not in without)
    return kept if len(kept) > 1 else kept[0] if kept else None
