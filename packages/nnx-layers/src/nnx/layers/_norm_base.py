"""Normalisation: statistics and what is done with them in float32 or wider, cast to the output's dtype at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from nnx.core import Context, Module, Param, ShapeError
from nnx.layers._common import NO_METADATA, Layer, Metadata, PromoteDtype, as_tuple, make_param
from nnx.layers._dtypes import canonicalize_dtype, promote_dtype, statistics_dtype
from nnx.layers._explicit import fit_weights
from nnx.layers.initializers import Initializer

__all__: list[str] = []

IndexGroups = Sequence[Sequence[int]]


class Norm(Layer):
    """What all norms share: options, an affine map over the features, statistics and their use."""

    scale: jax.Array | None
    bias: jax.Array | None

    def _set_options(
        self,
        epsilon: float,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        axis_name: str | None,
        axis_index_groups: IndexGroups | None,
        use_fast_variance: bool,
        promote_dtype: PromoteDtype,
    ) -> None:
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.axis_name = axis_name
        self.axis_index_groups: tuple[tuple[int, ...], ...] | None = (
            None if axis_index_groups is None else tuple(as_tuple(g) for g in axis_index_groups)
        )
        self.use_fast_variance = use_fast_variance
        self._choose(promote_dtype=promote_dtype)

    def _set_affine(
        self,
        shape: tuple[int, ...],
        scale_init: Initializer | None,
        bias_init: Initializer | None,
        ctx: Context,
        scale_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes `scale` and `bias`; a None initializer means that there is none."""
        names = ("features", *[None] * (len(shape) - 1))

        def made(init: Initializer | None, metadata: Metadata) -> Any:
            return None if init is None else make_param(ctx, init, shape, self.param_dtype, Param, names, metadata)

        self.scale, self.bias = made(scale_init, scale_metadata), made(bias_init, bias_metadata)

    def _operands(self, x: jax.Array, *statistics: jax.Array) -> tuple[Any, ...]:
        """`x`, `statistics`, scale and bias, cast by a `promote_dtype` that was given.

        Ours is not asked: norms compute in the dtype of statistics, whatever that of the outputs.
        """
        operands = (x, *statistics, self.scale, self.bias)
        if self.promote_dtype is promote_dtype:
            return operands
        cast: tuple[Any, ...] = self.promote_dtype(operands, dtype=self.dtype)
        return cast

    def _statistics(
        self, x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None, *, use_mean: bool = True
    ) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
        """Mean, variance and, where there is a mask, the number of elements they are of; `axes` stay with size 1.

        A group without any element has mean and variance 0. Over `axis_name`, masked means are weighted by how many
        elements each index has.
        """
        x = x.astype(statistics_dtype(x.dtype))
        count = None
        if mask is not None:
            mask = broadcast_mask(self, mask, x.shape)
            # Before the squares, so that what is masked, which may be NaN, reaches no sum.
            x = jnp.where(mask, x, 0)
            count = self._across(lax.psum, jnp.sum(mask.astype(x.dtype), axis=axes))

        def mean_of(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            if count is None:
                return self._across(lax.pmean, tuple(jnp.mean(a, axis=axes) for a in arrays))
            sums = self._across(lax.psum, tuple(jnp.sum(a, axis=axes) for a in arrays))
            return tuple(total / jnp.maximum(count, 1) for total in sums)

        # The reduced axes come back at the very end: what is done with statistics in between XLA then does without
        # broadcasts.
        def whole(reduced: jax.Array) -> jax.Array:
            return jnp.expand_dims(reduced, axes)

        counted = None if count is None else whole(count)
        if not use_mean:
            (square,) = mean_of(lax.square(x))
            return None, whole(square), counted
        if self.use_fast_variance:
            mean, square = mean_of(x, lax.square(x))
            # Rounding may take the difference below zero, and the square root of that would be NaN.
            return whole(mean), whole(jnp.maximum(square - lax.square(mean), 0)), counted
        (mean,) = mean_of(x)
        deviation = x - whole(mean)
        (var,) = mean_of(lax.square(deviation if mask is None else jnp.where(mask, deviation, 0)))
        return whole(mean), whole(var), counted

    def _across(self, reduce: Callable[..., Any], values: Any) -> Any:
        """`reduce` (pmean or psum) over the mapped axis, if there is one."""
        if self.axis_name is None:
            return values
        return reduce(values, self.axis_name, axis_index_groups=self.axis_index_groups)

    def _normalized(
        self,
        x: jax.Array,
        mean: jax.Array | None,
        var: jax.Array,
        feature_axes: tuple[int, ...],
        scale: jax.Array | None,
        bias: jax.Array | None,
    ) -> jax.Array:
        """`(x - mean) / sqrt(var + epsilon) * scale + bias`, computed in the dtype of statistics.

        Args:
            x: the inputs, or a view of them with the features in several axes.
            mean: the mean, with an axis of size 1 for each that was reduced; None for 0.
            var: the variance, of the same shape.
            feature_axes: the axes of `x` that `scale` and `bias` belong to.
            scale: the factors of the features.
            bias: what is added to them.
        """
        work = statistics_dtype(x.dtype)
        shape = tuple(size if axis in feature_axes else 1 for axis, size in enumerate(x.shape))
        y = x.astype(work) if mean is None else x.astype(work) - mean.astype(work)
        factor = lax.rsqrt(var.astype(work) + self.epsilon)
        if scale is not None:
            # The factors first: one product with the inputs, whose derivative is one product too.
            factor = factor * fit_weights(scale.reshape(shape), x).astype(work)
        y = y * factor
        if bias is not None:
            y = y + fit_weights(bias.reshape(shape), x).astype(work)
        return y.astype(canonicalize_dtype(x, scale, bias, dtype=self.dtype))


def broadcast_mask(layer: Module, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`mask` as booleans of the shape of the inputs; an error that names the layer if it does not broadcast to it."""
    try:
        return jnp.broadcast_to(jnp.asarray(mask).astype(bool), shape)
    except ValueError as error:
        raise ShapeError(
            f"{type(layer).__name__}: `mask` of shape {jnp.shape(mask)} does not broadcast to the inputs' shape {shape}"
        ) from error
