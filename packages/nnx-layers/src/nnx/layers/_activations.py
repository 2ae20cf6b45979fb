"""Activation functions: JAX's own under one roof, and PReLU, the one that learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn import (
    celu,
    elu,
    gelu,
    glu,
    hard_sigmoid,
    hard_silu,
    hard_swish,
    hard_tanh,
    identity,
    leaky_relu,
    log_sigmoid,
    log_softmax,
    logsumexp,
    mish,
    one_hot,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    soft_sign,
    softmax,
    softplus,
    standardize,
    swish,
    tanh,
)
from jax.typing import DTypeLike

from nnx.core import Param, ShapeError
from nnx.layers._common import NO_METADATA, Layer, Metadata, PromoteDtype, as_value, check_metadata
from nnx.layers._dtypes import promote_dtype

__all__ = [
    "PReLU",
    "celu",
    "elu",
    "gelu",
    "glu",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "identity",
    "leaky_relu",
    "log_sigmoid",
    "log_softmax",
    "logsumexp",
    "mish",
    "normalize",
    "one_hot",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "soft_sign",
    "softmax",
    "softplus",
    "standardize",
    "swish",
    "tanh",
]

# The older name of the same function.
normalize = standardize


class PReLU(Layer):
    """A leaky ReLU whose slope for negative inputs is learned.

    `y = x` where `x >= 0`, else `y = negative_slope * x`.

    Attributes:
        negative_slope: Param, a scalar.

    Reference: He et al., 2015, Delving Deep into Rectifiers, arXiv:1502.01852.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.PReLU(0.25)
        >>> layer(jnp.array([-2.0, 3.0])).tolist()
        [-0.5, 3.0]
    """

    negative_slope: jax.Array

    def __init__(
        self,
        negative_slope_init: float = 0.01,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        promote_dtype: PromoteDtype = promote_dtype,
        negative_slope_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes the layer.

        Args:
            negative_slope_init: the slope to start from.
            dtype: dtype to compute in; `None` takes that of the inputs.
            param_dtype: dtype of the slope.
            promote_dtype: casts the tuple of inputs and slope, with the arguments of `nnx.promote_dtype`.
            negative_slope_metadata: metadata of the slope.
        """
        self.dtype = dtype
        self.param_dtype = param_dtype
        self._choose(promote_dtype=promote_dtype)
        slope = Param(jnp.asarray(negative_slope_init, param_dtype), **check_metadata(negative_slope_metadata, ()))
        self.negative_slope = as_value(slope)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the activation.

        Args:
            inputs: any shape, floating point.

        Returns:
            An array of the shape of `inputs`.

        Raises:
            ShapeError: `inputs` are integers, which have no fractional slope.
        """
        if not jnp.issubdtype(inputs.dtype, jnp.floating):
            raise ShapeError(f"PReLU: expected floating point `inputs`, got dtype {inputs.dtype.name}")
        # Not the common type: a slope is a number that should not widen half precision.
        x, slope = self.promote_dtype(
            (inputs, self.negative_slope), dtype=inputs.dtype if self.dtype is None else self.dtype
        )
        return jnp.where(x >= 0, x, slope * x)
