"""vmap: one function, written for one example and one layer, over an axis of arrays, Variables and random streams."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, ParamSpec, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from nnx.core._errors import VariableError
from nnx.core._filters import to_filter
from nnx.core._state import make_node
from nnx.core._tracing import is_batched
from nnx.core.transforms._axes import (
    BROADCAST,
    FRESH,
    PARTITION_NAME,
    SPLIT,
    Change,
    Rules,
    Split,
    axes_like,
    changes,
    common_size,
    mapped_definition,
    mapped_sizes,
    unmapped_definition,
    without,
)
from nnx.core.transforms._callable import lift_callable
from nnx.core.transforms._inputs import Call
from nnx.core.transforms._join import live_places
from nnx.core.transforms._lift import Packed
from nnx.core.transforms._outcome import Outcome, finish
from nnx.core.transforms._staging import is_array

__all__ = ["vmap"]

P = ParamSpec("P")
R = TypeVar("R")

_REDUCERS: Final[dict[str, Callable[[jax.Array], Any]]] = {
    "mean": lambda values: jnp.mean(values, axis=0).astype(values.dtype),
    "sum": lambda values: jnp.sum(values, axis=0, dtype=values.dtype),
    "first": lambda values: values[0],
}


class _Plan:
    """As static data: what a lane changed, and in which bucket each value is, with its reducer."""

    __slots__ = ("outcome", "places")

    def __init__(self, outcome: Outcome, places: tuple[tuple[int, Any], ...]) -> None:
        self.outcome = outcome
        self.places = places


jax.tree_util.register_pytree_node(
    _Plan, lambda plan: ((), (plan.outcome, plan.places)), lambda data, _: _Plan(data[0], data[1])
)


@overload
def vmap(
    f: Callable[P, R],
    /,
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    variable_axes: Mapping[Any, int | None] | None = None,
    variable_reduce: Mapping[Any, Any] | None = None,
    split_rngs: Any = True,
    axis_name: Any = None,
    axis_size: int | None = None,
    metadata_params: Mapping[str, Any] | None = None,
) -> Callable[P, R]: ...
@overload
def vmap(
    f: None = None,
    /,
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    variable_axes: Mapping[Any, int | None] | None = None,
    variable_reduce: Mapping[Any, Any] | None = None,
    split_rngs: Any = True,
    axis_name: Any = None,
    axis_size: int | None = None,
    metadata_params: Mapping[str, Any] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def vmap(
    f: Any = None,
    /,
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    variable_axes: Mapping[Any, int | None] | None = None,
    variable_reduce: Mapping[Any, Any] | None = None,
    split_rngs: Any = True,
    axis_name: Any = None,
    axis_size: int | None = None,
    metadata_params: Mapping[str, Any] | None = None,
) -> Any:
    """Map a function of Modules, Contexts and arrays over an axis, as `jax.vmap` does.

    Args:
        f: the function; a class makes an ensemble. A Module or a bound method of one is lifted together with that
            Module, whose Variables are shared by all. Without it, a decorator.
        in_axes: for each positional argument its axis, or None if all share it; an int for all. For a Module it is the
            axis of its Variables. Numbers, flags and the like are shared; arrays given by name have axis 0.
        out_axes: the axis of the output, and of the Variables that the function makes.
        variable_axes: the axis of Variables by filter, `{nnx.Param: 0, nnx.BatchStat: None}`, in the place of the
            Module's; the first filter that matches counts.
        variable_reduce: how the copies of a shared Variable that the function wrote become one, by filter: "mean",
            "sum", "first", or a function of the stacked copies.
        split_rngs: the random streams that differ along the axis: True for all, False for none, or their names. Such
            a stream advances by one; a stream that is shared gives the same keys all along the axis.
        axis_name: a name for the axis, for `jax.lax.psum` and its like.
        axis_size: the size of the axis, if no argument has it.
        metadata_params: `{nnx.PARTITION_NAME: name}` names the axis in the `sharding` of Variables that get it.

    Returns:
        A function of the same arguments.

    Raises:
        StructureError: the axes have different sizes, or a value lacks its axis.
        VariableError: a shared Variable was written with values that differ along the axis, and no reduction is given;
            or one Variable has two axes.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self, *, ctx):
        ...         self.w = nnx.Param(jax.random.normal(ctx.make_rng("params")))
        ...     def __call__(self, x):
        ...         return self.w * x
        >>> ensemble = nnx.vmap(Scale, axis_size=5)(ctx=nnx.context(0))
        >>> ensemble.w.shape
        (5,)
        >>> nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(ensemble, jnp.ones(3)).shape
        (5, 3)
    """
    options: dict[str, Any] = {
        "in_axes": in_axes,
        "out_axes": out_axes,
        "variable_axes": variable_axes,
        "variable_reduce": variable_reduce,
        "split_rngs": split_rngs,
        "axis_name": axis_name,
        "axis_size": axis_size,
        "metadata_params": metadata_params,
    }
    if f is None:
        return functools.partial(vmap, **options)
    function, bound = lift_callable(f, "nnx.vmap")
    rules = Rules("nnx.vmap", variable_axes or {}, None, None, split_rngs)
    reducers = [(to_filter(key), _reducer(value)) for key, value in (variable_reduce or {}).items()]
    name = (metadata_params or {}).get(PARTITION_NAME)

    @functools.wraps(function, updated=())
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        mapped = _Mapped(rules, reducers, bound + args, kwargs, len(bound), in_axes, out_axes, axis_size)
        return mapped.run(function, out_axes, axis_name, name)

    return wrapper


def _reducer(value: Any) -> Callable[[jax.Array], Any]:
    if callable(value):
        return value  # type: ignore[no-any-return]
    if value not in _REDUCERS:
        raise ValueError(
            f"variable_reduce of nnx.vmap takes {', '.join(map(repr, _REDUCERS))} or a function, got {value!r}"
        )
    return _REDUCERS[value]


class _Mapped:
    """One call of a mapped function."""

    def __init__(
        self,
        rules: Rules,
        reducers: Sequence[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        bound: int,
        in_axes: Any,
        out_axes: Any,
        axis_size: int | None,
    ) -> None:
        self.call = call = Call(args, kwargs)
        self.rules, self.reducers = rules, reducers
        axes = self._leaf_axes(in_axes, len(args), bound)
        self.new_axis = out_axes if isinstance(out_axes, int) else 0
        defaults = [BROADCAST if axes[i] is None else axes[i] for i in call.packed]
        self.assigned = rules.assign(call, defaults)
        self.axes = axes
        self.size = common_size("nnx.vmap", mapped_sizes(call, axes, self.assigned), axis_size)

    def _leaf_axes(self, in_axes: Any, count: int, bound: int) -> list[Any]:
        call = self.call
        if isinstance(in_axes, list):
            in_axes = tuple(in_axes)
        if isinstance(in_axes, tuple) and len(in_axes) != count - bound:
            raise ValueError(
                f"in_axes of nnx.vmap has {len(in_axes)} entries, and the function was called with {count - bound} "
                "positional arguments"
            )
        axes: list[Any] = [None] * call.spans[bound - 1][1] if bound else []
        for n in range(bound, count):
            prefix = in_axes[n - bound] if isinstance(in_axes, tuple) else in_axes
            axes += axes_like("nnx.vmap", prefix, call, n, f"argument {n - bound}")
        named = in_axes if isinstance(in_axes, int) else 0
        axes += [named if type(leaf) is Packed else 0 for leaf in call.leaves[slice(*call.spans[-1])]]
        return [
            None if type(leaf) is not Packed and not is_array(leaf) else axis
            for leaf, axis in zip(call.leaves, axes, strict=True)
        ]

    def run(self, function: Callable[..., Any], out_axes: Any, axis_name: Any, name: str | None) -> Any:
        """Map, and write back."""
        call = self.call
        split = Split(call, self.assigned, self.size)
        operands: list[Any] = []
        in_axes: list[Any] = []
        definitions = {}
        for i, (leaf, axis) in enumerate(zip(call.leaves, self.axes, strict=True)):
            if type(leaf) is not Packed:
                operands.append(leaf)
                in_axes.append(axis)
                continue
            root = call.packed.index(i)
            categories = self.assigned[root]
            sliced = any(isinstance(category, int) for category in categories)
            definitions[i] = mapped_definition(leaf.moduledef, categories) if sliced else leaf.definition
            values = list(leaf.values)
            value_axes: list[Any] = [category if isinstance(category, int) else None for category in categories]
            for position, category in enumerate(categories):
                if category is SPLIT:
                    values[position] = (split.keys[root, position], np.uint32(0))
                    value_axes[position] = (0, None)
            operands.append(values)
            in_axes.append(value_axes)
        buckets = sorted({axis for axis in (*self.rules.axes, *self.axes, self.new_axis, 0) if axis is not None})

        def lane(operands: list[Any]) -> Any:
            leaves = [Packed(definitions[i], value) if i in definitions else value for i, value in enumerate(operands)]
            out, values, outcome = call.run(function, leaves)
            return self._deal(out, values, outcome, buckets, name)

        mapped = jax.vmap(
            lane,
            in_axes=(in_axes,),
            out_axes=(out_axes, tuple(buckets), None, None),
            axis_name=axis_name,
            axis_size=self.size,
        )
        out, stacked, shared, plan = mapped(operands)
        values = []
        positions = [0] * (len(buckets) + 1)
        for bucket, reducer in plan.places:
            held = (*stacked, shared)[bucket]
            value = held[positions[bucket]]
            positions[bucket] += 1
            values.append(jax.tree.map(reducer, value) if reducer is not None else value)
        result = finish(call.frame, out, values, plan.outcome)
        split.finish()
        return result

    def _axis_of(self, change: Change, value: Any) -> Any:
        if change.place is not None:
            root, position = change.place
            category = self.assigned[root][position]
            if category is FRESH:
                own = self.axes[self.call.packed[root]]
                return own if own is not None else 0
            return category
        found = self.rules.explicit(*change.entry, value)
        return self.new_axis if found is None else found

    def _deal(self, out: Any, values: list[Any], outcome: Outcome, buckets: Sequence[int], name: str | None) -> Any:
        """Inside of a lane: each value into the bucket of its axis."""
        frame = self.call.frame

        def is_split(change: Change) -> bool:
            return change.place is not None and self.assigned[change.place[0]][change.place[1]] is SPLIT

        outcome, kept = without(frame, outcome, is_split)
        values = [value for value, keep in zip(values, kept, strict=True) if keep]
        stacked: tuple[list[Any], ...] = tuple([] for _ in buckets)
        shared: list[Any] = []
        places, missing = [], []
        every = changes(frame, outcome)
        axes: dict[int, Any] = {}
        for change, value in zip(every, values, strict=True):
            axis = self._axis_of(change, value)
            reducer = None
            if not isinstance(axis, int):
                if any(map(is_batched, jax.tree.leaves(value))):
                    reducer = next((use for key, use in self.reducers if _matches(key, change, value)), None)
                    if reducer is None:
                        missing.append(change.name)
                        continue
                    bucket = buckets.index(0)
                else:
                    bucket = len(buckets)
            else:
                bucket = buckets.index(axis)
            (*stacked, shared)[bucket].append(value)
            places.append((bucket, reducer))
            if change.number is not None:
                axes[change.number] = axis
        if missing:
            raise VariableError(
                f"inside of nnx.vmap the shared {', '.join(missing)} got values that differ along the axis. Say how "
                "they become one, variable_reduce={filter: 'mean' | 'sum' | 'first' | function}, or give each its own, "
                "variable_axes={filter: 0}"
            )
        if outcome.post is not None:
            outcome = outcome._replace(post=self._definition_outside(outcome, axes, name))
        return out, stacked, shared, _Plan(outcome, tuple(places))

    def _definition_outside(self, outcome: Outcome, axes: dict[int, Any], name: str | None) -> Any:
        post = outcome.post
        assert post is not None
        at = live_places(self.call.frame)
        every: list[Any] = []
        originals: list[Any] = []
        for i, origin in enumerate(outcome.cells):
            if origin < 0:
                every.append(axes.get(i))
                originals.append(None)
                continue
            root, position = at[origin]
            category = self.assigned[root][position]
            every.append(axes.get(i, category))
            originals.append(self.call.frame.layouts[root].moduledef.schema.entries[position][2])
        return unmapped_definition(post, every, originals, name)


def _matches(key: Any, change: Change, value: Any) -> bool:
    path, kind, metadata = change.entry
    return bool(key.match(path, kind, lambda: make_node(kind, value, metadata)))
