"""Positions: rotary embeddings of queries and keys, and the sinusoids that are added to inputs."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nnx.core import Module, ShapeError

__all__ = ["RotaryEmbedding", "sinusoidal_positions"]


class RotaryEmbedding(Module):
    """Turns each pair of features by an angle that grows with the position.

    With `h = rotary_dim / 2`, feature `i < h` is paired with `i + h`, and `angle = position / base ** (i / h)`:
    `out[i] = x[i] cos - x[i + h] sin`, `out[i + h] = x[i + h] cos + x[i] sin`. The product of a turned query and a
    turned key depends on the distance of their positions alone. There are no parameters; angles are in float32.

    For a context `scaling_factor` times as long as in training: `"linear"` divides the positions by the factor; `"ntk"`
    enlarges the base by `factor ** (rotary_dim / (rotary_dim - 2))`, which leaves the fastest features alone.

    Args:
        rotary_dim: the number of features that are turned, even; those after them stay as they are.
        base: the base of the wavelengths, from `2 pi` to `2 pi base` positions.
        scaling_factor: how much longer the context is than in training, at least 1.
        scaling: "linear" or "ntk".

    Raises:
        ValueError: `rotary_dim` is odd, or the factor is below 1, or `scaling` is unknown.

    References: Su et al., 2021, RoFormer, arXiv:2104.09864; Chen et al., 2023, Extending Context Window of Large
    Language Models via Positional Interpolation, arXiv:2306.15595; Peng et al., 2023, YaRN (for "ntk"),
    arXiv:2309.00071.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> rotary = nnx.RotaryEmbedding(8)
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 8))
        >>> def product(i, j):
        ...     return float((rotary(q, jnp.array([i])) * rotary(k, jnp.array([j]))).sum())
        >>> abs(product(3, 5) - product(10, 12)) < 1e-4
        True
    """

    def __init__(
        self,
        rotary_dim: int,
        *,
        base: float = 10_000.0,
        scaling_factor: float = 1.0,
        scaling: Literal["linear", "ntk"] = "linear",
    ) -> None:
        if rotary_dim <= 0 or rotary_dim % 2:
            raise ValueError(f"RotaryEmbedding: rotary_dim is a positive even number, got {rotary_dim}")
        if scaling_factor < 1:
            raise ValueError(f"RotaryEmbedding: scaling_factor is at least 1, got {scaling_factor}")
        if scaling not in ("linear", "ntk"):
            raise ValueError(f"RotaryEmbedding: scaling is 'linear' or 'ntk', got {scaling!r}")
        if scaling == "ntk" and rotary_dim == 2:
            raise ValueError("RotaryEmbedding: 'ntk' needs a rotary_dim above 2")
        self.rotary_dim = rotary_dim
        self.base = base
        self.scaling_factor = scaling_factor
        self.scaling = scaling

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Turn the features of queries or keys.

        Args:
            x: [*batch, length, heads, head_dim], `head_dim` at least `rotary_dim`.
            positions: integers that broadcast to [*batch, length]; `None` counts from 0 along the length.

        Returns:
            An array like `x`.

        Raises:
            ShapeError: `x` has too few features or axes, or `positions` do not fit.
        """
        if x.ndim < 3 or x.shape[-1] < self.rotary_dim:
            raise ShapeError(
                f"RotaryEmbedding: expected [*batch, length, heads, head_dim] with a head_dim of at least rotary_dim="
                f"{self.rotary_dim}, got {tuple(x.shape)}"
            )
        places = x.shape[:-2]
        if positions is None:
            positions = jnp.arange(places[-1], dtype=jnp.float32)  # as integers they would be converted at each use
        given = positions.shape
        if len(given) > len(places) or any(
            size not in (1, full) for size, full in zip(given[::-1], places[::-1], strict=False)
        ):
            raise ShapeError(f"RotaryEmbedding: `positions` must broadcast to {places}, got {tuple(given)}")
        positions = positions.reshape((1,) * (len(places) - len(given)) + given)
        half = self.rotary_dim // 2
        base = self.base
        if self.scaling == "ntk":
            base = base * self.scaling_factor ** (self.rotary_dim / (self.rotary_dim - 2))
        speeds = base ** -(np.arange(half) / half)  # constants, so in float64 until the last step
        if self.scaling == "linear":
            speeds = speeds / self.scaling_factor
        angles = positions.astype(jnp.float32)[..., None, None] * jnp.asarray(
            speeds.reshape((1,) * (positions.ndim + 1) + (half,)), jnp.float32
        )
        # Tables as wide as the features: what is narrower XLA computes anew for every row and head.
        sin, cos = (jnp.concatenate([table, table], axis=-1) for table in (jnp.sin(angles), jnp.cos(angles)))
        features = x[..., : self.rotary_dim].astype(jnp.float32)
        across = jnp.concatenate([-features[..., half:], features[..., :half]], axis=-1)
        turned = (features * cos + across * sin).astype(x.dtype)
        return turned if x.shape[-1] == self.rotary_dim else jnp.concatenate([turned, x[..., self.rotary_dim :]], -1)


def sinusoidal_positions(
    length: int, features: int, *, base: float = 10_000.0, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Sinusoids of the position, to be added to a model's inputs.

    `out[p, 2 i] = sin(p / base ** (2 i / features))`, `out[p, 2 i + 1] = cos(p / base ** (2 i / features))`

    Args:
        length: the number of positions.
        features: the number of features, even.
        base: the base of the wavelengths, from `2 pi` to `2 pi base` positions.
        dtype: dtype of the result.

    Returns:
        [length, features].

    Raises:
        ValueError: `features` is odd.

    Reference: Vaswani et al., 2017, Attention Is All You Need, arXiv:1706.03762.

    Example:
        >>> import nnx
        >>> nnx.sinusoidal_positions(10, 4)[0].tolist()
        [0.0, 1.0, 0.0, 1.0]
    """
    if features <= 0 or features % 2:
        raise ValueError(f"sinusoidal_positions: features is a positive even number, got {features}")
    speeds = base ** -(np.arange(features // 2) / (features // 2))
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * jnp.asarray(speeds[None], jnp.float32)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(length, features).astype(dtype)
