"""shard_map: one function runs on each shard of arrays and Variables, with collectives between them."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, overload

import jax
from jax.sharding import PartitionSpec

from nnx.core._context import RngStream
from nnx.core._errors import StructureError, VariableError
from nnx.core._filters import Filter, to_filter
from nnx.core._state import make_node, path_text
from nnx.core._tracing import varying_axes
from nnx.core.transforms._axes import Change, axes_like, changes
from nnx.core.transforms._callable import lift_callable
from nnx.core.transforms._inputs import Call
from nnx.core.transforms._lift import Packed
from nnx.core.transforms._outcome import Outcome, finish
from nnx.core.transforms._staging import content_of, is_number, stage

__all__ = ["shard_map"]

P = ParamSpec("P")
R = TypeVar("R")

_SHARDS = zlib.crc32(b"shards")


class _Plan:
    """As static data: what a shard changed, and the number of each value's spec."""

    __slots__ = ("outcome", "places")

    def __init__(self, outcome: Outcome, places: tuple[int, ...]) -> None:
        self.outcome = outcome
        self.places = places


jax.tree_util.register_pytree_node(
    _Plan, lambda plan: ((), (plan.outcome, plan.places)), lambda data, _: _Plan(data[0], data[1])
)


@overload
def shard_map(
    f: Callable[P, R],
    /,
    *,
    mesh: Any = None,
    in_specs: Any,
    out_specs: Any,
    variable_specs: Mapping[Any, PartitionSpec] | None = None,
    split_rngs: str | tuple[str, ...] = (),
    axis_names: Any = None,
    check_vma: bool = True,
) -> Callable[P, R]: ...
@overload
def shard_map(
    f: None = None,
    /,
    *,
    mesh: Any = None,
    in_specs: Any,
    out_specs: Any,
    variable_specs: Mapping[Any, PartitionSpec] | None = None,
    split_rngs: str | tuple[str, ...] = (),
    axis_names: Any = None,
    check_vma: bool = True,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def shard_map(
    f: Any = None,
    /,
    *,
    mesh: Any = None,
    in_specs: Any,
    out_specs: Any,
    variable_specs: Mapping[Any, PartitionSpec] | None = None,
    split_rngs: str | tuple[str, ...] = (),
    axis_names: Any = None,
    check_vma: bool = True,
) -> Any:
    """Run a function of Modules, Contexts and arrays on each shard, as `jax.shard_map` does.

    Args:
        f: the function. Without it, a decorator.
        mesh: the mesh; the one in context if it is None.
        in_specs: for each positional argument how it is split: a PartitionSpec, or a pytree of them. For a Module it
            is the spec of its Variables. Arguments given by name are the same on each shard.
        out_specs: how the output is put together.
        variable_specs: the spec of Variables by filter, in the place of the Module's; the first that matches counts.
        split_rngs: mesh axes along which random streams differ. Along the others shards draw the same keys.
        axis_names: as for `jax.shard_map`.
        check_vma: as for `jax.shard_map`.

    Returns:
        A function of the same arguments.

    Raises:
        StructureError: a value cannot be split as its spec says.
        VariableError: a Variable that is the same on each shard was written with values that differ.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> from jax.sharding import PartitionSpec as P
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.w = nnx.Param(jnp.float32(3))
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> split = nnx.shard_map(lambda m, x: m.w * x, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
        >>> split(Scale(), jnp.ones(4)).shape
        (4,)
    """
    if f is None:
        return functools.partial(
            shard_map,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            variable_specs=variable_specs,
            split_rngs=split_rngs,
            axis_names=axis_names,
            check_vma=check_vma,
        )
    function, bound = lift_callable(f, "nnx.shard_map")
    rules = [(to_filter(key), spec) for key, spec in (variable_specs or {}).items()]
    folded = (split_rngs,) if isinstance(split_rngs, str) else tuple(split_rngs)
    given: dict[str, Any] = {"mesh": mesh, "axis_names": axis_names}
    options = {"check_vma": check_vma, **{name: value for name, value in given.items() if value is not None}}

    def implementation(*args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs)
        specs = _leaf_specs(call, in_specs, len(bound), len(args))
        sharded = _Sharded(call, rules, specs, folded, check_vma)
        sharded.check_shapes(mesh if mesh is not None else jax.sharding.get_abstract_mesh())
        mapped = jax.shard_map(
            functools.partial(sharded.shard, function),
            in_specs=(sharded.in_specs,),
            out_specs=(out_specs, tuple(sharded.known), PartitionSpec()),
            **options,
        )
        out, buckets, plan = mapped(sharded.operands)
        remaining = [iter(bucket) for bucket in buckets]
        return finish(call.frame, out, [next(remaining[k]) for k in plan.places], plan.outcome)

    key = content_of((in_specs, out_specs, variable_specs, folded, options))

    @functools.wraps(function, updated=())
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return stage("nnx.shard_map", (function,), key, implementation, bound + args, kwargs)

    return wrapper


def _leaf_specs(call: Call, in_specs: Any, bound: int, count: int) -> list[Any]:
    specs: list[Any] = [PartitionSpec()] * (call.spans[bound - 1][1] if bound else 0)
    whole = isinstance(in_specs, PartitionSpec)
    if not whole and (not isinstance(in_specs, (tuple, list)) or len(in_specs) != count - bound):
        raise ValueError(
            f"in_specs of nnx.shard_map has an entry for each of the {count - bound} positional arguments, got "
            f"{in_specs!r}"
        )
    for n in range(bound, count):
        prefix = in_specs if whole else in_specs[n - bound]
        specs += axes_like("nnx.shard_map", prefix, call, n, f"argument {n - bound}")
    specs += [PartitionSpec()] * (call.spans[-1][1] - call.spans[-1][0])
    return [PartitionSpec() if spec is None else spec for spec in specs]


class _Sharded:
    """One call of a sharded function."""

    def __init__(
        self, call: Call, rules: list[tuple[Filter, Any]], specs: list[Any], folded: tuple[str, ...], check: bool
    ) -> None:
        self.call, self.rules, self.folded, self.check = call, rules, folded, check
        self.operands: list[Any] = []
        self.in_specs: list[Any] = []
        self.assigned: list[list[Any]] = []
        self.traced: list[int] = []
        for i, (leaf, spec) in enumerate(zip(call.leaves, specs, strict=True)):
            if type(leaf) is Packed:
                root = call.packed.index(i)
                entries = call.frame.layouts[root].moduledef.schema.entries
                own = [self._spec(entry, value, spec) for entry, value in zip(entries, leaf.values, strict=True)]
                self.assigned.append(own)
                self.operands.append(list(leaf.values))
                self.in_specs.append(own)
                self.traced.append(i)
            elif is_number(leaf) and not isinstance(leaf, bool):
                self.operands.append(leaf)
                self.in_specs.append(spec)
                self.traced.append(i)
        every = [spec for own in self.assigned for spec in own] + [spec for _, spec in rules]
        self.known = list(dict.fromkeys([PartitionSpec(), *every]))

    def check_shapes(self, mesh: Any) -> None:
        """Check that the specs fit the mesh and the values, which JAX would do without their names."""
        sizes = dict(mesh.shape)
        if not sizes:
            return
        unknown = [name for name in self.folded if name not in sizes]
        if unknown:
            raise ValueError(
                f"split_rngs of nnx.shard_map names the mesh axis {unknown[0]!r}, and the mesh has "
                f"{', '.join(map(repr, sizes))}"
            )
        for i, value, spec in zip(self.traced, self.operands, self.in_specs, strict=True):
            if type(self.call.leaves[i]) is not Packed:
                _check_shape(f"leaf {i} of the arguments", value, spec, sizes)
                continue
            root = self.call.packed.index(i)
            kind = type(self.call.frame.roots[root]).__name__
            paths = self.call.frame.layouts[root].moduledef.schema.paths
            for path, part, own in zip(paths, value, spec, strict=True):
                _check_shape(f"`{path_text(path)}` of the {kind}", part, own, sizes)

    def _spec(self, entry: Any, value: Any, default: Any) -> Any:
        path, kind, metadata = entry
        if issubclass(kind, RngStream):
            return PartitionSpec()
        for key, spec in self.rules:
            if key.match(path, kind, lambda: make_node(kind, value, metadata)):
                return spec
        return default

    def shard(self, function: Callable[..., Any], operands: list[Any]) -> Any:
        """What runs on each shard."""
        call = self.call
        leaves = list(call.leaves)
        for i, value in zip(self.traced, operands, strict=True):
            leaves[i] = value
            if type(call.leaves[i]) is Packed:
                leaves[i] = Packed(call.leaves[i].definition, self._folded(i, value))
        out, values, outcome = call.run(function, leaves)
        buckets: tuple[list[Any], ...] = tuple([] for _ in self.known)
        places = []
        for change, value in zip(changes(call.frame, outcome), values, strict=True):
            spec = self._spec_of(change, value)
            self._check(change, value, spec)
            places.append(self.known.index(spec))
            buckets[places[-1]].append(value)
        return out, buckets, _Plan(outcome, tuple(places))

    def _folded(self, leaf: int, values: Any) -> list[Any]:
        """The values of a Module, with random streams that differ along the axes to be split."""
        if not self.folded:
            return list(values)
        entries = self.call.frame.layouts[self.call.packed.index(leaf)].moduledef.schema.entries
        result = []
        for (_, kind, _), value in zip(entries, values, strict=True):
            if issubclass(kind, RngStream):
                # Not folded in as it is: the index 3 would give the key that is the stream's own draw number 3.
                apart = jax.random.fold_in(value[0], _SHARDS)
                key = functools.reduce(
                    lambda key, name: jax.random.fold_in(key, jax.lax.axis_index(name)), self.folded, apart
                )
                result.append((key, value[1]))
            else:
                result.append(value)
        return result

    def _spec_of(self, change: Change, value: Any) -> Any:
        if change.place is not None:
            root, position = change.place
            return self.assigned[root][position]
        return self._spec(change.entry, value, PartitionSpec())

    def _check(self, change: Change, value: Any, spec: Any) -> None:
        if not self.check:
            return
        named = {name for part in spec for name in (part if isinstance(part, tuple) else (part,))}
        for leaf in jax.tree.leaves(value):
            varies = varying_axes(leaf) - named
            if varies:
                axes = ", ".join(f"`{name}`" for name in sorted(varies))
                raise VariableError(
                    f"inside of nnx.shard_map {change.name} got values that differ along the mesh axis {axes}, and its "
                    f"spec {spec} says that they do not. Make them one (jax.lax.pmean, psum), or give it a spec with "
                    "the axis, variable_specs={filter: PartitionSpec(...)}"
                )


def _check_shape(name: str, value: Any, spec: Any, sizes: Mapping[str, int]) -> None:
    for leaf in jax.tree.leaves(value):
        shape = jax.numpy.shape(leaf)
        parts = [part if isinstance(part, tuple) else (part,) for part in spec]
        split = [
            math.prod(sizes.get(axis, 1) for axis in part if isinstance(axis, str)) for part in parts[: len(shape)]
        ]
        if len(parts) > len(shape) or any(size % pieces for size, pieces in zip(shape, split, strict=False)):
            raise StructureError(
                f"{name} has the shape {list(shape)}, which {spec} does not split evenly over a mesh of {dict(sizes)}. "
                "in_specs says how each argument is split, variable_specs how Variables are; PartitionSpec() stands "
                "for what is the same on each shard"
            )
