"""Norms by the statistics of a batch, of each example's features, and of groups of its channels."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from nnx.core import BatchStat, Context, ShapeError
from nnx.layers import initializers
from nnx.layers._common import (
    NO_METADATA,
    Axes,
    Metadata,
    PromoteDtype,
    as_tuple,
    as_value,
    normalize_axes,
    resolve_flag,
)
from nnx.layers._dtypes import promote_dtype, statistics_dtype
from nnx.layers._explicit import like
from nnx.layers._norm_base import IndexGroups, Norm, broadcast_mask
from nnx.layers.initializers import Initializer

__all__ = ["BatchNorm", "GroupNorm", "LayerNorm", "RMSNorm"]


class BatchNorm(Norm):
    """Normalises each feature by the mean and variance of the batch, or by their running averages.

    `y = (x - mean) / sqrt(var + epsilon) * scale + bias`, and with the statistics of the batch also
    `running <- momentum * running + (1 - momentum) * batch`, with the biased variance.

    The flag `use_running_average` comes from the call, the constructor or the Context, in that order. Under `jit` with
    sharded inputs the statistics are those of the whole batch; `axis_name` is for axes mapped by `vmap` or `shard_map`.

    Attributes:
        scale: Param, [num_features], or None.
        bias: Param, [num_features], or None.
        mean: BatchStat, [num_features].
        var: BatchStat, [num_features].

    Reference: Ioffe and Szegedy, 2015, Batch Normalization, arXiv:1502.03167.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.BatchNorm(2, momentum=0.9, ctx=nnx.context(0))
        >>> x = jnp.array([[1.0, 2.0], [3.0, 2.0]])
        >>> print(layer(x, use_running_average=False).round(3))
        [[-1.  0.]
         [ 1.  0.]]
        >>> print(layer.mean.round(3))
        [0.2 0.2]
        >>> y = layer(x, ctx=nnx.context(flags=dict(use_running_average=True)))
    """

    mean: jax.Array
    var: jax.Array

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = None,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        axis_name: str | None = None,
        axis_index_groups: IndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        ctx: Context,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes the layer.

        Args:
            num_features: size of the feature axis.
            use_running_average: whether to normalise by the running averages and leave them alone; `None` leaves it to
                the call or the Context.
            axis: the feature axis. All others are reduced.
            momentum: how much of a running average stays at each update.
            epsilon: added to the variance.
            dtype: dtype of the outputs; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of scale and bias. The running averages are float32, or float64 if this is.
            use_bias: whether to add a bias.
            use_scale: whether to multiply by a scale.
            bias_init: initializer of the bias.
            scale_init: initializer of the scale.
            axis_name: name of a mapped axis over which statistics are taken too.
            axis_index_groups: groups of indices along that axis, each with statistics of its own.
            use_fast_variance: whether the variance is `E[x^2] - E[x]^2`, in one pass, rather than `E[(x - E[x])^2]`,
                which keeps its digits where the mean is large beside the deviation.
            promote_dtype: casts the tuple of inputs, running averages, scale and bias beforehand, with the arguments of
                `nnx.promote_dtype`, which itself casts the outputs alone.
            ctx: gives the keys, from its stream "params".
            bias_metadata: metadata of the bias, which win over those of its initializer and of the layer.
            scale_metadata: the same for the scale.
        """
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self._set_options(epsilon, dtype, param_dtype, axis_name, axis_index_groups, use_fast_variance, promote_dtype)
        self._set_affine(
            (num_features,),
            scale_init if use_scale else None,
            bias_init if use_bias else None,
            ctx,
            scale_metadata,
            bias_metadata,
        )
        stats_dtype = statistics_dtype(param_dtype)
        self.mean = as_value(BatchStat(jnp.zeros((num_features,), stats_dtype), sharding=("features",)))
        self.var = as_value(BatchStat(jnp.ones((num_features,), stats_dtype), sharding=("features",)))

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        ctx: Context | None = None,
    ) -> jax.Array:
        """Normalises `x`, and updates the running averages unless they are what it is normalised by.

        Args:
            x: [batch, ..., num_features], or with the features at `axis`.
            use_running_average: whether to normalise by the running averages; overrides constructor and Context.
            mask: True where an element counts for the statistics, broadcastable to `x`; all are normalised. Running
                averages of a feature without any such element stay.
            ctx: carries the flag, if it is set there.

        Returns:
            An array of the shape of `x`.

        Raises:
            ContextError: `use_running_average` is set nowhere.
            ShapeError: `x` has no such axis, or another number of features; `mask` does not broadcast to `x`.
        """
        kind = type(self).__name__
        running = resolve_flag(
            self, "use_running_average", use_running_average, self.use_running_average, ctx, example=True
        )
        (axis,) = normalize_axes(self.axis, x.ndim, f"{kind}: axis")
        if x.shape[axis] != self.num_features:
            raise ShapeError(
                f"{kind}: expected `x` with {self.num_features} features at axis {self.axis}"
                f" (num_features={self.num_features}), got {tuple(x.shape)}"
            )
        mean: jax.Array | None
        x, average, variance, scale, bias = self._operands(x, self.mean, self.var)
        if running:
            shape = tuple(size if i == axis else 1 for i, size in enumerate(x.shape))
            mean, var = average.reshape(shape), variance.reshape(shape)
        else:
            axes = tuple(i for i in range(x.ndim) if i != axis)
            mean, var, count = self._statistics(x, axes, mask)
            assert mean is not None
            self.mean = self._updated(self.mean, mean, count)
            self.var = self._updated(self.var, var, count)
        return self._normalized(x, mean, var, (axis,), scale, bias)

    def _updated(self, running: jax.Array, batch: jax.Array, count: jax.Array | None) -> jax.Array:
        """The next running average. No gradient goes through it."""
        new = like(lax.stop_gradient(batch).reshape(running.shape), running).astype(running.dtype)
        updated = self.momentum * running + (1 - self.momentum) * new
        return updated if count is None else jnp.where(count.reshape(running.shape) > 0, updated, running)


class _FeatureNorm(Norm):
    """What LayerNorm and RMSNorm share: statistics over some axes of each example, an affine map over others."""

    def _set_axes(self, num_features: int | Sequence[int], reduction_axes: Axes, feature_axes: Axes) -> None:
        self.num_features: tuple[int, ...] = as_tuple(num_features)
        self.reduction_axes: tuple[int, ...] = as_tuple(reduction_axes)
        self.feature_axes: tuple[int, ...] = as_tuple(feature_axes)
        if len(self.feature_axes) != len(self.num_features):
            raise ValueError(
                f"{type(self).__name__}: num_features {self.num_features} and feature_axes {self.feature_axes} must"
                " have the same length"
            )
        if list(self.feature_axes) != sorted(self.feature_axes):
            raise ValueError(
                f"{type(self).__name__}: feature_axes must be in increasing order, got {self.feature_axes}"
            )

    def _apply(self, x: jax.Array, mask: jax.Array | None, *, use_mean: bool) -> jax.Array:
        kind = type(self).__name__
        reduced = normalize_axes(self.reduction_axes, x.ndim, f"{kind}: reduction_axes")
        features = normalize_axes(self.feature_axes, x.ndim, f"{kind}: feature_axes")
        if tuple(x.shape[axis] for axis in features) != self.num_features:
            raise ShapeError(
                f"{kind}: expected `x` with sizes {self.num_features} at the axes {self.feature_axes} (num_features),"
                f" got {tuple(x.shape)}"
            )
        x, scale, bias = self._operands(x)
        mean, var, _ = self._statistics(x, reduced, mask, use_mean=use_mean)
        return self._normalized(x, mean, var, features, scale, bias)


class LayerNorm(_FeatureNorm):
    """Normalises each example by the mean and variance of its features.

    `y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias`

    Attributes:
        scale: Param, [num_features], or None.
        bias: Param, [num_features], or None.

    Reference: Ba, Kiros and Hinton, 2016, Layer Normalization, arXiv:1607.06450.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.LayerNorm(3, ctx=nnx.context(0))
        >>> print(layer(jnp.array([1.0, 2.0, 3.0])).round(3))
        [-1.225  0.     1.225]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: IndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        ctx: Context,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes the layer.

        Args:
            num_features: size of each feature axis.
            epsilon: added to the variance.
            dtype: dtype of the outputs; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of scale and bias.
            use_bias: whether to add a bias.
            use_scale: whether to multiply by a scale.
            bias_init: initializer of the bias.
            scale_init: initializer of the scale.
            reduction_axes: the axes that statistics are taken over.
            feature_axes: the axes that scale and bias vary along, one to a size in `num_features`.
            axis_name: name of a mapped axis over which statistics are taken too.
            axis_index_groups: groups of indices along that axis, each with statistics of its own.
            use_fast_variance: whether the variance is `E[x^2] - E[x]^2`, in one pass, rather than `E[(x - E[x])^2]`,
                which keeps its digits where the mean is large beside the deviation.
            promote_dtype: casts the tuple of inputs, scale and bias beforehand, with the arguments of
                `nnx.promote_dtype`, which itself casts the outputs alone.
            ctx: gives the keys, from its stream "params".
            bias_metadata: metadata of the bias, which win over those of its initializer and of the layer.
            scale_metadata: the same for the scale.

        Raises:
            ValueError: `feature_axes` are out of order or do not match `num_features`.
        """
        self._set_axes(num_features, reduction_axes, feature_axes)
        self._set_options(epsilon, dtype, param_dtype, axis_name, axis_index_groups, use_fast_variance, promote_dtype)
        self._set_affine(
            self.num_features,
            scale_init if use_scale else None,
            bias_init if use_bias else None,
            ctx,
            scale_metadata,
            bias_metadata,
        )

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalises `x`.

        Args:
            x: [..., num_features], or with the features at `feature_axes`.
            mask: True where an element counts for the statistics, broadcastable to `x`; all are normalised.

        Returns:
            An array of the shape of `x`.

        Raises:
            ShapeError: `x` lacks one of the axes, or it has another size; `mask` does not broadcast to `x`.
        """
        return self._apply(x, mask, use_mean=True)


class RMSNorm(_FeatureNorm):
    """Divides each example by the root mean square of its features.

    `y = x / sqrt(mean(x^2) + epsilon) * scale`

    Attributes:
        scale: Param, [num_features], or None.

    Reference: Zhang and Sennrich, 2019, Root Mean Square Layer Normalization, arXiv:1910.07467.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.RMSNorm(2, ctx=nnx.context(0))
        >>> print(layer(jnp.array([2.0, -2.0])).round(3))
        [ 1. -1.]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = initializers.ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: IndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        ctx: Context,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes the layer.

        Args:
            num_features: size of each feature axis.
            epsilon: added to the mean square.
            dtype: dtype of the outputs; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of the scale.
            use_scale: whether to multiply by a scale.
            scale_init: initializer of the scale.
            reduction_axes: the axes that the mean square is taken over.
            feature_axes: the axes that the scale varies along, one to a size in `num_features`.
            axis_name: name of a mapped axis over which the mean square is taken too.
            axis_index_groups: groups of indices along that axis, each with a mean square of its own.
            use_fast_variance: what the other norms ask; without a mean both ways to a variance are this one.
            promote_dtype: casts the tuple of inputs, scale and None beforehand, with the arguments of
                `nnx.promote_dtype`, which itself casts the outputs alone.
            ctx: gives the key, from its stream "params".
            scale_metadata: metadata of the scale, which win over those of its initializer and of the layer.

        Raises:
            ValueError: `feature_axes` are out of order or do not match `num_features`.
        """
        self._set_axes(num_features, reduction_axes, feature_axes)
        self._set_options(epsilon, dtype, param_dtype, axis_name, axis_index_groups, use_fast_variance, promote_dtype)
        self._set_affine(self.num_features, scale_init if use_scale else None, None, ctx, scale_metadata)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalises `x`.

        Args:
            x: [..., num_features], or with the features at `feature_axes`.
            mask: True where an element counts for the statistics, broadcastable to `x`; all are normalised.

        Returns:
            An array of the shape of `x`.

        Raises:
            ShapeError: `x` lacks one of the axes, or it has another size; `mask` does not broadcast to `x`.
        """
        return self._apply(x, mask, use_mean=False)


class GroupNorm(Norm):
    """Normalises groups of channels of each example, over space.

    `y = (x - mean) / sqrt(var + epsilon) * scale + bias`, with mean and variance of each example and each group of
    `num_features / num_groups` neighbouring channels.

    Attributes:
        scale: Param, [num_features], or None.
        bias: Param, [num_features], or None.

    Reference: Wu and He, 2018, Group Normalization, arXiv:1803.08494.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.GroupNorm(6, num_groups=3, ctx=nnx.context(0))
        >>> layer(jnp.ones((4, 8, 8, 6))).shape
        (4, 8, 8, 6)
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        reduction_axes: Axes | None = None,
        axis_name: str | None = None,
        axis_index_groups: IndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        ctx: Context,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes the layer.

        Args:
            num_features: number of channels, the size of the last axis.
            num_groups: number of groups; `None` to give `group_size` instead.
            group_size: number of channels in a group.
            epsilon: added to the variance.
            dtype: dtype of the outputs; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of scale and bias.
            use_bias: whether to add a bias.
            use_scale: whether to multiply by a scale.
            bias_init: initializer of the bias.
            scale_init: initializer of the scale.
            reduction_axes: the axes that statistics are taken over, the last among them; `None` is all but the first.
            axis_name: name of a mapped axis over which statistics are taken too.
            axis_index_groups: groups of indices along that axis, each with statistics of its own.
            use_fast_variance: whether the variance is `E[x^2] - E[x]^2`, in one pass, rather than `E[(x - E[x])^2]`,
                which keeps its digits where the mean is large beside the deviation.
            promote_dtype: casts the tuple of inputs, scale and bias beforehand, with the arguments of
                `nnx.promote_dtype`, which itself casts the outputs alone.
            ctx: gives the keys, from its stream "params".
            bias_metadata: metadata of the bias, which win over those of its initializer and of the layer.
            scale_metadata: the same for the scale.

        Raises:
            ValueError: not exactly one of `num_groups` and `group_size` is given, or it does not divide `num_features`.
        """
        if (num_groups is None) == (group_size is None):
            raise ValueError(
                "GroupNorm: give either num_groups or group_size, and None for the other,"
                f" got num_groups={num_groups} and group_size={group_size}"
            )
        divisor = num_groups if num_groups is not None else group_size
        assert divisor is not None
        if divisor <= 0 or num_features % divisor:
            name = "group_size" if num_groups is None else "num_groups"
            raise ValueError(f"GroupNorm: {name}={divisor} does not divide num_features={num_features}")
        self.num_features = num_features
        self.num_groups: int = divisor if num_groups is not None else num_features // divisor
        self.group_size: int = num_features // self.num_groups
        self.reduction_axes: tuple[int, ...] | None = None if reduction_axes is None else as_tuple(reduction_axes)
        self._set_options(epsilon, dtype, param_dtype, axis_name, axis_index_groups, use_fast_variance, promote_dtype)
        self._set_affine(
            (num_features,),
            scale_init if use_scale else None,
            bias_init if use_bias else None,
            ctx,
            scale_metadata,
            bias_metadata,
        )

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalises `x`.

        Args:
            x: [batch, *space, num_features].
            mask: True where an element counts for the statistics, broadcastable to `x`; all are normalised.

        Returns:
            An array of the shape of `x`.

        Raises:
            ShapeError: the last axis of `x` is not `num_features`; `mask` does not broadcast to `x`.
        """
        kind = type(self).__name__
        if x.ndim == 0 or x.shape[-1] != self.num_features:
            raise ShapeError(
                f"{kind}: expected `x` of shape [batch, ..., {self.num_features}] (num_features={self.num_features}),"
                f" got {tuple(x.shape)}"
            )
        given = (*range(1, x.ndim - 1), -1) if self.reduction_axes is None else self.reduction_axes
        axes = normalize_axes(given, x.ndim, f"{kind}: reduction_axes")
        if x.ndim - 1 not in axes:
            raise ValueError(f"{kind}: reduction_axes {given} must contain the last axis, which the groups divide")
        grouped_shape = (*x.shape[:-1], self.num_groups, self.group_size)
        if mask is not None:
            mask = broadcast_mask(self, mask, x.shape).reshape(grouped_shape)
        x, scale, bias = self._operands(x)
        # The last axis became two, of which only the last is reduced.
        grouped = x.reshape(grouped_shape)
        mean, var, _ = self._statistics(grouped, tuple(i if i < x.ndim - 1 else x.ndim for i in axes), mask)
        return self._normalized(grouped, mean, var, (x.ndim - 1, x.ndim), scale, bias).reshape(x.shape)
