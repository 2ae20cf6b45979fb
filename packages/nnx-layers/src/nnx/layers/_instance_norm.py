"""InstanceNorm: each channel of each example by its own mean and variance over space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nnx.core import Context, ShapeError
from nnx.layers import initializers
from nnx.layers._common import NO_METADATA, Axes, Metadata, PromoteDtype, as_tuple, normalize_axes
from nnx.layers._dtypes import promote_dtype
from nnx.layers._norm_base import IndexGroups, Norm
from nnx.layers.initializers import Initializer

__all__ = ["InstanceNorm"]


class InstanceNorm(Norm):
    """Normalises each channel of each example by its mean and variance over space.

    `y = (x - mean) / sqrt(var + epsilon) * scale + bias`, with statistics over all axes but the first and the channels.

    Attributes:
        scale: Param, [num_features], or None.
        bias: Param, [num_features], or None.

    Reference: Ulyanov, Vedaldi and Lempitsky, 2016, Instance Normalization, arXiv:1607.08022.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.InstanceNorm(1, ctx=nnx.context(0))
        >>> print(layer(jnp.array([[[1.0], [2.0], [3.0]]])).ravel().round(3))
        [-1.225  0.     1.225]
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
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
            num_features: number of channels, the size of the feature axis.
            epsilon: added to the variance.
            dtype: dtype of the outputs; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of scale and bias.
            use_bias: whether to add a bias.
            use_scale: whether to multiply by a scale.
            bias_init: initializer of the bias.
            scale_init: initializer of the scale.
            feature_axes: the axis of the channels, any but the first.
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
            ValueError: `feature_axes` are not one axis.
        """
        self.num_features = num_features
        self.feature_axes: tuple[int, ...] = as_tuple(feature_axes)
        if len(self.feature_axes) != 1:
            raise ValueError(f"InstanceNorm: feature_axes must be one axis, that of the channels, got {feature_axes}")
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
            x: [batch, *space, num_features], or with the channels at `feature_axes`.
            mask: True where an element counts for the statistics, broadcastable to `x`; all are normalised.

        Returns:
            An array of the shape of `x`.

        Raises:
            ShapeError: `x` has no such axis or another number of channels; `mask` does not broadcast to `x`.
            ValueError: the channels are the first axis, which is that of the examples.
        """
        kind = type(self).__name__
        (channels,) = normalize_axes(self.feature_axes, x.ndim, f"{kind}: feature_axes")
        if channels == 0:
            raise ValueError(
                f"{kind}: the channels, feature_axes={self.feature_axes}, cannot be the first axis, that of the"
                f" examples; got `x` of shape {tuple(x.shape)}"
            )
        if x.shape[channels] != self.num_features:
            raise ShapeError(
                f"{kind}: expected `x` with {self.num_features} channels at axis {self.feature_axes[0]}"
                f" (num_features={self.num_features}), got {tuple(x.shape)}"
            )
        axes = tuple(axis for axis in range(1, x.ndim) if axis != channels)
        x, scale, bias = self._operands(x)
        mean, var, _ = self._statistics(x, axes, mask)
        return self._normalized(x, mean, var, (channels,), scale, bias)
