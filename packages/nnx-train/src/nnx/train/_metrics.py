"""Metrics of values: their mean, their spread, and several metrics as one."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from nnx.train import _sums as sums
from nnx.train._metric import Metric, check_weights, new_sum, real_array, spread, weights_of

__all__ = ["Average", "Mean", "MultiMetric", "Statistics", "Welford"]


@jax.jit
def _add_values(total: jax.Array, count: jax.Array, values: jax.Array, mask: Any, weights: Any) -> Any:
    shape = values.shape
    each = weights_of(shape, mask, weights)
    values = values.astype(jnp.float32)
    if each is not None:
        # Left out rather than multiplied by 0, which of a NaN makes a NaN.
        values = jnp.where(each != 0, values * each, 0.0)
    total = sums.add(total, jnp.sum(values))
    if each is None:
        return total, sums.add_count(count, values.size)
    if weights is None:
        return total, sums.add_count(count, jnp.sum(spread(mask, shape), dtype=jnp.int32))
    return total, sums.add(count, jnp.sum(each))


class Mean(Metric):
    """The base of what is a weighted mean over all that was seen."""

    total: jax.Array
    count: jax.Array

    def __init__(self) -> None:
        self.total = new_sum()
        self.count = new_sum()

    def _add(self, values: Any, mask: Any, weights: Any, what: str) -> None:
        values = real_array(values, what)
        mask, weights = check_weights(values.shape, mask, weights, what)
        self.total, self.count = _add_values(self.total, self.count, values, mask, weights)

    def compute(self) -> jax.Array:
        """The mean, a float32; NaN if nothing was seen."""
        return sums.ratio(self.total, self.count)


class Average(Mean):
    """The mean of the values seen: `sum(weight * value) / sum(weight)`.

    Both sums are kept in float32 pairs, so neither a long evaluation nor a long run makes them stall or overflow.

    A mean of batches' means is not the mean of the examples when the last batch is smaller: give the values of each
    example.

    Args:
        argname: the argument of `update` that holds the values.

    Raises:
        ValueError: the name is that of an argument with another meaning.

    Example:
        >>> loss = nnx.Average("loss")
        >>> loss.update(loss=jnp.array([1.0, 2.0, 6.0]), mask=jnp.array([True, True, False]))
        >>> loss.update(loss=3.0)
        >>> print(loss.compute())
        2.0
    """

    def __init__(self, argname: str = "values") -> None:
        super().__init__()
        self.argname: str = _check_argname(self, argname)

    def update(self, *, mask: Any = None, weights: Any = None, **kwargs: Any) -> None:
        """Count some values.

        Args:
            mask: booleans, of the first axes of the values: those under False are not counted, and may be NaN.
            weights: real numbers of the first axes of the values, how often each counts; 1 if not given.
            **kwargs: the values, under the name given to the constructor: real numbers of any shape. Others are
                ignored.

        Raises:
            TypeError: the values are missing, or an argument has a wrong type.
            ShapeError: mask or weights don't fit the values.
        """
        self._add(_named(self, self.argname, kwargs), mask, weights, f"Average: `{self.argname}`")


def _check_argname(metric: Metric, argname: str) -> str:
    if argname in ("mask", "weights"):
        raise ValueError(
            f"{type(metric).__name__}: argname={argname!r} is the name of another argument of `update`; choose another"
        )
    return argname


def _named(metric: Metric, argname: str, kwargs: dict[str, Any]) -> Any:
    if argname not in kwargs:
        given = ", ".join(f"`{name}`" for name in kwargs) or "nothing"
        raise TypeError(
            f"{type(metric).__name__}.update takes the values as `{argname}`, got {given}: the name is the `argname` "
            "that the metric was made with"
        )
    return kwargs[argname]


class Statistics(NamedTuple):
    """What `Welford` computes.

    Attributes:
        mean: the mean.
        standard_error_of_mean: the standard deviation by the square root of the count.
        standard_deviation: the square root of the mean squared distance from the mean.
    """

    mean: jax.Array
    standard_error_of_mean: jax.Array
    standard_deviation: jax.Array


@jax.jit
def _moments(values: jax.Array, mask: Any, weights: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Count, mean, and sum of squared distances of a batch, each as a pair."""
    each = weights_of(values.shape, mask, weights)
    values = values.astype(jnp.float32)
    nothing = sums.zeros()
    if each is None:
        count = sums.add_count(nothing, values.size)
        each = jnp.ones_like(values)
    else:
        count = sums.add(nothing, jnp.sum(each))
    values = jnp.where(each != 0, values, 0.0)
    size = sums.to_float(count)
    size = jnp.where(size > 0, size, 1.0)
    # The mean of values far from zero is rounded to their size. What it misses is the mean of the distances from it,
    # from the rounded one: without the barrier XLA fuses the division with the subtraction.
    rough = jax.lax.optimization_barrier(jnp.sum(values * each) / size)
    distances = jnp.where(each != 0, values - rough, 0.0)
    missed = jnp.sum(each * distances) / size
    m2 = jnp.sum(each * (distances - missed) ** 2)
    return count, sums.add(sums.add(nothing, rough), missed), sums.add(nothing, m2)


@jax.jit
def _chan(
    count: jax.Array, mean: jax.Array, m2: jax.Array, count_b: jax.Array, mean_b: jax.Array, m2_b: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Join two sets' counts, means and sums of squared distances; all are pairs."""
    joined = sums.join(count, count_b)
    size = sums.to_float(joined)
    share = sums.to_float(count_b) / jnp.where(size > 0, size, 1.0)
    # The two parts apart, as the second is below the digits of a large distance.
    high, low = mean_b[0] - mean[0], mean_b[1] - mean[1]
    between = (high + low) ** 2 * share * sums.to_float(count)
    return joined, sums.add(sums.add(mean, high * share), low * share), sums.add(sums.join(m2, m2_b), between)


class Welford(Metric):
    """Mean, standard deviation and standard error of the values seen, however far their mean is from zero.

    Counts, means and sums of squared distances `M2` of two sets are joined by `d = mean_b - mean_a`,
    `mean = mean_a + d * n_b / n`, `M2 = M2_a + M2_b + d^2 * n_a * n_b / n` (Chan, Golub and LeVeque, 1983); a
    difference of large squares, in which the digits would cancel, never arises.

    Args:
        argname: the argument of `update` that holds the values.

    Raises:
        ValueError: the name is that of an argument with another meaning.

    Example:
        >>> lengths = nnx.Welford("lengths")
        >>> lengths.update(lengths=jnp.array([10_001, 10_002, 10_003, 10_006]))
        >>> mean, error, deviation = lengths.compute()
        >>> print(mean, f"{deviation:.3f}")
        10003.0 1.871
    """

    count: jax.Array
    mean: jax.Array
    m2: jax.Array

    def __init__(self, argname: str = "values") -> None:
        self.argname: str = _check_argname(self, argname)
        self.count = new_sum()
        self.mean = new_sum()
        self.m2 = new_sum()

    def update(self, *, mask: Any = None, weights: Any = None, **kwargs: Any) -> None:
        """Count some values; the arguments are those of `Average.update`. A weight is a number of repetitions.

        Raises:
            TypeError: the values are missing, or an argument has a wrong type.
            ShapeError: mask or weights don't fit the values.
        """
        what = f"Welford: `{self.argname}`"
        values = real_array(_named(self, self.argname, kwargs), what)
        mask, weights = check_weights(values.shape, mask, weights, what)
        self._join(*_moments(values, mask, weights))

    def _join(self, count: jax.Array, mean: jax.Array, m2: jax.Array) -> None:
        self.count, self.mean, self.m2 = _chan(self.count, self.mean, self.m2, count, mean, m2)

    def merge(self, other: Self) -> None:
        """Add what another Welford has counted.

        Raises:
            StructureError: `other` is another kind of metric, or has other settings.
        """
        self._pair_with(other)
        self._join(other.count, other.mean, other.m2)

    def reduce(self, axis_name: Any) -> None:
        """Join what the metrics along a mapped axis have counted; see `Metric.reduce`."""
        count = sums.sum_over(self.count, axis_name)
        size = sums.to_float(count)
        share = sums.to_float(self.count) / jnp.where(size > 0, size, 1.0)
        # Around a value that is the same everywhere, so that the parts' means are not rounded to their sum's size.
        center = jax.lax.pmax(jnp.where(share > 0, self.mean[0], -jnp.inf), axis_name)
        center = jnp.where(jnp.isfinite(center), center, 0.0)
        offset = jnp.where(share > 0, (self.mean[0] - center) + self.mean[1], 0.0)
        shift = jax.lax.psum(share * offset, axis_name)
        spread_out = sums.add(self.m2, sums.to_float(self.count) * (offset - shift) ** 2)
        self.count = count
        self.mean = sums.add(sums.add(sums.zeros(), center), shift)
        self.m2 = sums.sum_over(spread_out, axis_name)

    def compute(self) -> Statistics:
        """Mean, standard error of the mean and standard deviation, as float32; NaN if nothing was seen."""
        size = sums.to_float(self.count)
        seen = size > 0
        size = jnp.where(seen, size, 1.0)
        deviation = jnp.sqrt(sums.to_float(self.m2) / size)
        values = sums.to_float(self.mean), deviation / jnp.sqrt(size), deviation
        return Statistics(*[jnp.where(seen, value, jnp.nan) for value in values])


class MultiMetric(Metric):
    """Several metrics that are updated together.

    Args:
        **metrics: the metrics by name; each is an attribute of that name too.

    Raises:
        TypeError: there is none, or one is no metric.
        ValueError: a name is that of a method.

    Example:
        >>> metrics = nnx.MultiMetric(loss=nnx.Average("loss"), accuracy=nnx.Accuracy())
        >>> @nnx.jit
        ... def evaluate(metrics, logits, labels):
        ...     metrics.update(loss=(logits**2).sum(-1), logits=logits, labels=labels)
        >>> evaluate(metrics, jnp.array([[0.0, 1.0], [2.0, 0.0]]), jnp.array([1, 1]))
        >>> {name: float(value) for name, value in metrics.compute().items()}
        {'loss': 2.5, 'accuracy': 0.5}
    """

    def __init__(self, **metrics: Metric) -> None:
        if not metrics:
            raise TypeError("MultiMetric takes metrics by name: `MultiMetric(loss=nnx.Average('loss'))`; got none")
        for name, metric in metrics.items():
            if not isinstance(metric, Metric):
                raise TypeError(f"MultiMetric: `{name}` is a {type(metric).__name__}, not a metric")
            if hasattr(MultiMetric, name) or name.startswith("_"):
                raise ValueError(f"MultiMetric: `{name}` is a name of its own; call the metric otherwise")
            setattr(self, name, metric)
        self._names = tuple(metrics)

    def _metrics(self) -> dict[str, Metric]:
        return {name: getattr(self, name) for name in self._names}

    def update(self, **kwargs: Any) -> None:
        """Update every metric with all the arguments; each takes those that it knows."""
        for metric in self._metrics().values():
            metric.update(**kwargs)

    def compute(self) -> dict[str, Any]:
        """What each metric computes, by name."""
        return {name: metric.compute() for name, metric in self._metrics().items()}

    def reset(self) -> None:
        """Forget what was counted."""
        for metric in self._metrics().values():
            metric.reset()

    def merge(self, other: Self) -> None:
        """Add what another MultiMetric of the same metrics has counted.

        Raises:
            StructureError: `other` is another kind of metric, or has others or other settings.
        """
        self._pair_with(other)
        for name, metric in self._metrics().items():
            metric.merge(getattr(other, name))

    def reduce(self, axis_name: Any) -> None:
        """Add up what the metrics along a mapped axis have counted; see `Metric.reduce`."""
        for metric in self._metrics().values():
            metric.reduce(axis_name)
