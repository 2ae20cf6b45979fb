"""Dropout, of elements or of whole examples: noise while training, the identity otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from nnx.core import Context, Module, ShapeError
from nnx.layers._common import Axes, as_tuple, draw_key, normalize_axes, resolve_flag

__all__ = ["DropPath", "Dropout"]


def check_rate(kind: str, rate: float) -> float:
    """`rate` as a float, or an error if it is no probability."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"{kind}: the rate is the probability of dropping, between 0 and 1, got {rate}")
    return float(rate)


def dropout(x: jax.Array, key: jax.Array, rate: float, broadcast_dims: Sequence[int] = ()) -> jax.Array:
    """Zeroes elements of `x` with probability `rate`, one draw along `broadcast_dims`, and scales up the rest."""
    if rate >= 1.0:
        # Nothing is kept: `x / 0` would put NaN into the gradient behind the mask.
        return jnp.zeros_like(x)
    shape = tuple(1 if axis in broadcast_dims else size for axis, size in enumerate(x.shape))
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(jnp.broadcast_to(keep, x.shape), x / (1.0 - rate), 0)


class Dropout(Module):
    """Zeroes each element with probability `rate` and scales the others, so that the expectation stays.

    `y = keep * x / (1 - rate)`, with `keep` drawn from Bernoulli(1 - rate).

    The flag `deterministic` comes from the call, the constructor or the Context, in that order.

    Reference: Srivastava et al., 2014, JMLR 15, Dropout: A Simple Way to Prevent Neural Networks from Overfitting.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.Dropout(0.5)
        >>> x = jnp.ones(1000)
        >>> y = layer(x, deterministic=False, ctx=nnx.context(dropout=0))
        >>> sorted(set(y.tolist()))
        [0.0, 2.0]
        >>> bool((layer(x, ctx=nnx.context(flags=dict(deterministic=True))) == x).all())
        True
    """

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = None,
        rng_collection: str = "dropout",
    ) -> None:
        """Makes the layer.

        Args:
            rate: the probability of dropping an element, from 0 to 1.
            broadcast_dims: axes along which one draw holds, e.g. `(1, 2)` to drop whole channels of [N, H, W, C].
            deterministic: whether to pass inputs through unchanged; `None` leaves it to the call or the Context.
            rng_collection: the Context's random stream to draw from.

        Raises:
            ValueError: `rate` is not a probability.
        """
        self.rate: float = check_rate(type(self).__name__, rate)
        self.broadcast_dims: tuple[int, ...] = as_tuple(broadcast_dims)
        self.deterministic = deterministic
        self.rng_collection = rng_collection

    def __call__(
        self, inputs: jax.Array, *, deterministic: bool | None = None, ctx: Context | None = None
    ) -> jax.Array:
        """Applies dropout.

        Args:
            inputs: any shape, floating point.
            deterministic: whether to pass `inputs` through; overrides the constructor and the Context.
            ctx: carries the random stream, and possibly the flag. Not needed where nothing is drawn.

        Returns:
            An array of the shape and dtype of `inputs`.

        Raises:
            ContextError: `deterministic` is set nowhere, or there is no random stream to draw from.
            ShapeError: `inputs` are not floating point, or lack one of the axes that the layer was made with.
        """
        if resolve_flag(self, "deterministic", deterministic, self.deterministic, ctx, example=True):
            return inputs
        if self.rate == 0.0:
            return inputs
        kind = type(self).__name__
        if not jnp.issubdtype(inputs.dtype, jnp.inexact):
            raise ShapeError(f"{kind}: expected floating point `inputs`, got dtype {inputs.dtype.name}")
        axes = self._shared_axes(inputs.ndim)
        return dropout(inputs, draw_key(self, self.rng_collection, ctx), self.rate, axes)

    def _shared_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes along which one draw holds."""
        return normalize_axes(self.broadcast_dims, ndim, f"{type(self).__name__}: broadcast_dims")


class DropPath(Dropout):
    """Stochastic depth: zeroes whole examples with probability `rate` and scales the others.

    `y[i] = keep[i] * x[i] / (1 - rate)`, with one `keep[i]` for each example, drawn from Bernoulli(1 - rate). On the
    branch of a residual block, `x + drop_path(block(x))`, it skips the block for some of the examples.

    The flag `deterministic` comes from the call, the constructor or the Context, in that order.

    Reference: Huang et al., 2016, Deep Networks with Stochastic Depth, arXiv:1603.09382.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.DropPath(0.5)
        >>> y = layer(jnp.ones((1000, 3)), deterministic=False, ctx=nnx.context(dropout=0))
        >>> sorted(set(map(tuple, y.tolist())))
        [(0.0, 0.0, 0.0), (2.0, 2.0, 2.0)]
    """

    def __init__(
        self,
        rate: float,
        *,
        batch_axes: Axes = 0,
        deterministic: bool | None = None,
        rng_collection: str = "dropout",
    ) -> None:
        """Makes the layer.

        Args:
            rate: the probability of dropping an example, from 0 to 1.
            batch_axes: the axes of the examples; one draw holds along all others.
            deterministic: whether to pass inputs through unchanged; `None` leaves it to the call or the Context.
            rng_collection: the Context's random stream to draw from.

        Raises:
            ValueError: `rate` is not a probability.
        """
        super().__init__(rate, deterministic=deterministic, rng_collection=rng_collection)
        self.batch_axes: tuple[int, ...] = as_tuple(batch_axes)

    def _shared_axes(self, ndim: int) -> tuple[int, ...]:
        batch = normalize_axes(self.batch_axes, ndim, f"{type(self).__name__}: batch_axes")
        return tuple(axis for axis in range(ndim) if axis not in batch)
