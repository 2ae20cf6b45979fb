"""Metric: a Module that counts during a step, without waiting for the device, and says what came of it when asked."""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp

from nnx.core import Module, ShapeError, StructureError, Variable
from nnx.train import _sums as sums

__all__ = ["Metric", "MetricState", "MetricSum", "check_weights", "new_sum", "real_array", "spread", "weights_of"]


class MetricState(Variable):
    """What a metric has counted so far."""

    collection = "metrics"


class MetricSum(MetricState):
    """A sum with what rounding left out of it, [2, ...]: see `nnx.train._sums`."""

    collection = "metrics"


def new_sum(shape: tuple[int, ...] = ()) -> Any:
    """A MetricSum of nothing. As Any, since reading the attribute that it is assigned to gives its value."""
    return MetricSum(sums.zeros(shape))


class Metric(Module):
    """The base of metrics: `update` counts, `compute` says what came of it, `reset` starts anew.

    What was counted lies in Variables of the type `MetricState`, so a metric goes through `nnx.jit` as a model does, is
    checkpointed as one, and is held by a TrainState as `metric.partition()`. `update` waits for nothing: it makes JAX
    operations, eagerly or in a trace. `compute` too; printing what it returns waits.

    A metric of your own is a subclass with `update` and `compute`, whose counts are `MetricState`s. What a `reset`
    makes zero, and `merge` and `reduce` add up, needs no more; a maximum, say, overrides the last two.

    Example:
        >>> class Largest(nnx.Metric):
        ...     def __init__(self):
        ...         self.largest = nnx.MetricState(jnp.float32(0))
        ...     def update(self, *, values, **_):
        ...         self.largest = jnp.maximum(self.largest, jnp.abs(values).max())
        ...     def compute(self):
        ...         return self.largest
        ...     def merge(self, other):
        ...         self.largest = jnp.maximum(self.largest, other.largest)
        >>> metric = Largest()
        >>> metric.update(values=jnp.array([3.0, -5.0]))
        >>> print(metric.compute())
        5.0
    """

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Count a batch. Arguments go by name, and those that this metric does not know are ignored."""
        raise NotImplementedError(f"{type(self).__name__} is a metric without `update`")

    def compute(self) -> Any:
        """What has been counted since the last `reset`."""
        raise NotImplementedError(f"{type(self).__name__} is a metric without `compute`")

    def reset(self) -> None:
        """Forget what was counted."""
        state = self.filter(MetricState)
        self.update_state(state.replace_values([jax.tree.map(jnp.zeros_like, value) for value in state.raw_values]))

    def fresh(self) -> Self:
        """A metric of the same kind and settings that has counted nothing."""
        new = self.clone()
        new.reset()
        return new

    def merge(self, other: Self) -> None:
        """Add what another metric of the same kind has counted.

        Args:
            other: the other metric, which stays as it is.

        Raises:
            StructureError: `other` is another kind of metric, or has other settings.
        """
        mine, others = self._pair_with(other)
        joined = [
            sums.join(a, b) if issubclass(kind, MetricSum) else jax.tree.map(jnp.add, a, b)
            for (_, kind, _), a, b in zip(mine.schema.entries, mine.raw_values, others.raw_values, strict=True)
        ]
        self.update_state(mine.replace_values(joined))

    def reduce(self, axis_name: Any) -> None:
        """Add up what the metrics along a mapped axis have counted: all of them become the metric of everything.

        Inside of `nnx.vmap` or `nnx.shard_map`. The counts must have been made along this axis alone: those that a
        metric held before, the same on each device, would be added as often as there are devices. So count a step's
        batch in a fresh metric, reduce that, and merge it:

            batch = metric.fresh()
            batch.update(values=losses)
            batch.reduce("data")
            metric.merge(batch)

        Under `nnx.jit` with sharded arrays nothing of this is needed, since there a sum is one over all devices.

        Args:
            axis_name: the axis, or several.
        """
        state = self.filter(MetricState)
        reduced = [
            sums.sum_over(value, axis_name) if issubclass(kind, MetricSum) else jax.lax.psum(value, axis_name)
            for (_, kind, _), value in zip(state.schema.entries, state.raw_values, strict=True)
        ]
        self.update_state(state.replace_values(reduced))

    def _pair_with(self, other: Metric) -> tuple[Any, Any]:
        """The counts of both; definitions are interned, so their comparison costs nothing."""
        if type(other) is not type(self):
            raise StructureError(f"{type(self).__name__}.merge takes another one, got {type(other).__name__}")
        if other.get_module_def() != self.get_module_def():
            raise StructureError(
                f"{type(self).__name__}.merge: the two have other settings, {other!r} and {self!r}; make the one to be "
                "merged by `metric.fresh()`"
            )
        return self.filter(MetricState), other.filter(MetricState)


def real_array(x: Any, what: str) -> jax.Array:
    """Values to be counted, as an array.

    Raises:
        TypeError: they are not real numbers.
    """
    array = jnp.asarray(x)
    if not (jnp.issubdtype(array.dtype, jnp.bool_) or jnp.issubdtype(array.dtype, jnp.integer)) and not jnp.issubdtype(
        array.dtype, jnp.floating
    ):
        raise TypeError(f"{what}: expected real numbers, got {array.dtype}")
    return array


def check_weights(shape: tuple[int, ...], mask: Any, weights: Any, what: str) -> tuple[Any, Any]:
    """Mask and weights as arrays.

    Args:
        shape: the shape of what they weigh.
        mask: True where an element counts; None counts all.
        weights: how often an element counts; None counts each once.
        what: names the values in errors.

    Raises:
        ShapeError: their axes are not the first ones of the values.
        TypeError: the mask is no array of booleans, or the weights are not real.
    """
    arrays = []
    for name, given in (("mask", mask), ("weights", weights)):
        array = None if given is None else real_array(given, f"{what}: {name}")
        if array is not None and array.shape != shape[: array.ndim]:
            raise ShapeError(
                f"{what} has the shape {shape}, and `{name}` {array.shape}: the {name} must have its first axes. Give "
                "the values of each example, not their mean over the batch"
            )
        if name == "mask" and array is not None and array.dtype != jnp.bool_:
            raise TypeError(f"{what}: a mask is an array of booleans, got {array.dtype}; or give it as `weights`")
        arrays.append(array)
    return arrays[0], arrays[1]


def spread(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """An array of the first axes of `shape`, repeated along the others."""
    return jnp.broadcast_to(x.reshape(x.shape + (1,) * (len(shape) - x.ndim)), shape)


def weights_of(shape: tuple[int, ...], mask: Any, weights: Any) -> jax.Array | None:
    """What each value counts, float32 and of their shape; None if each counts once."""
    if weights is None:
        return None if mask is None else spread(mask, shape).astype(jnp.float32)
    weights = spread(weights, shape).astype(jnp.float32)
    return weights if mask is None else jnp.where(spread(mask, shape), weights, 0.0)
