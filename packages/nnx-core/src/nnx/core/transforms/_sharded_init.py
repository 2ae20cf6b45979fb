"""sharded_init: a model and its optimizer are born in shards, and no device ever holds the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nnx.core._context import Context, RngStream
from nnx.core._object import Object
from nnx.core._sharding import RulesLike, annotate, current_rules, logical_axis_rules, resolve
from nnx.core._state import State
from nnx.core.transforms._jit import jit

__all__ = ["sharded_init"]

T = TypeVar("T")


def sharded_init(create: Callable[[], T], mesh: Mesh, rules: RulesLike | None = None) -> T:
    """Call `create` so that each array that it makes is born as its logical axes and the rules say.

    It is compiled as one function whose outputs are split, so each device, and each process of several, makes its own
    shards alone. The values are those that one device would make.

    Args:
        create: makes what is wanted, such as `lambda: make_model(nnx.context(0))`, or a function that returns the model
            and its `nnx.Optimizer`, or a `TrainState`. It takes no arguments: a Context is made inside of it.
        mesh: the mesh, of auto or of explicit axes.
        rules: from logical axes to mesh axes; None takes those of `nnx.logical_axis_rules`. Without any, the names are
            axes of the mesh. Arrays without names are whole on each device.

    Returns:
        What `create` returned, its arrays laid out over the mesh.

    Raises:
        ShardingError: a name has no rule, a mesh axis would split two dimensions or does not exist, or a size does not
            divide; with the path, the axes and the sizes.

    Example:
        >>> import jax, nnx
        >>> class Linear(nnx.Module):
        ...     def __init__(self, din, dout, *, ctx):
        ...         self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (din, dout)), sharding=("in", "out"))
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> model = nnx.sharded_init(lambda: Linear(4, 8, ctx=nnx.context(0)), mesh, {"in": None, "out": "model"})
        >>> tuple(model.w.sharding.spec)
        (None, 'model')
    """
    table = current_rules(rules)
    # Under explicit axes each intermediate value would have a layout of its own, whole unless it says otherwise; the
    # compiler that lays out auto axes splits the random bits as it splits the parameter that they become.
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))

    def born() -> T:
        made = create()
        return _place(made, lambda names, label, leaf: _constrain(leaf, _sharding(names, label, leaf, auto, table)))

    with jax.set_mesh(auto), logical_axis_rules(table):
        made = jit(born)()
    return _place(made, lambda names, label, leaf: _on(leaf, _sharding(names, label, leaf, mesh, table)))


def _sharding(names: Any, label: str, leaf: Any, mesh: Mesh, table: Any) -> NamedSharding:
    parts = list(resolve(names, table, label, tuple(leaf.shape), mesh))
    if AxisType.Explicit not in mesh.axis_types:
        # As the compiler writes the layouts of its outputs: or the first step would compile once for the arrays as they
        # are born, and once more for those that it returns.
        while parts and parts[-1] is None:
            parts.pop()
    return NamedSharding(mesh, PartitionSpec(*parts))


def _constrain(leaf: Any, sharding: NamedSharding) -> Any:
    return jax.lax.with_sharding_constraint(leaf, sharding)


def _on(leaf: Any, sharding: NamedSharding) -> Any:
    if leaf.sharding == sharding:
        return leaf
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) or not leaf.sharding.is_equivalent_to(
        sharding, leaf.ndim
    ):
        return jax.device_put(leaf, sharding)
    # The same shards under another mesh's name: nothing is copied.
    shards = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards, dtype=leaf.dtype)


def _place(made: T, place: Callable[[Any, str, Any], Any]) -> T:
    """Put each array of what was made in its place; Modules keep their identity."""
    parts, treedef = annotate(made)
    result: list[Any] = []
    for part in parts:
        if isinstance(part.item, Context):
            result.append(part.item)
            continue
        streams = _stream_leaves(part.state)
        leaves = [
            leaf if i in streams or not hasattr(leaf, "dtype") else place(names, label, jax.numpy.asarray(leaf))
            for i, (names, label, leaf) in enumerate(zip(part.names, part.labels, part.leaves, strict=True))
        ]
        if isinstance(part.item, Object):
            part.item.update_state(part.build(leaves))  # type: ignore[attr-defined]
            result.append(part.item)
        else:
            result.append(part.build(leaves))
    return treedef.unflatten(result)  # type: ignore[no-any-return]


def _stream_leaves(state: Any) -> set[int]:
    """The numbers of the leaves that belong to random streams, whose keys and counts are the host's."""
    found: set[int] = set()
    if isinstance(state, State):
        start = 0
        for (_, kind, _), value in zip(state.schema.entries, state.raw_values, strict=True):
            stop = start + len(jax.tree.leaves(value))
            if issubclass(kind, RngStream):
                found.update(range(start, stop))
            start = stop
    return found
