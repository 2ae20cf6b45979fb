"""Attention masks: which query may see which key."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nnx.core import ShapeError

__all__ = ["combine_masks", "make_attention_mask", "make_causal_mask"]


def make_attention_mask(
    query_input: jax.Array,
    key_input: jax.Array,
    pairwise_fn: Callable[[jax.Array, jax.Array], jax.Array] = jnp.multiply,
    extra_batch_dims: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """A mask from a comparison of each query with each key.

    `mask[..., 0, i, j] = pairwise_fn(query_input[..., i], key_input[..., j])`

    Args:
        query_input: [*batch, query_length].
        key_input: [*batch, key_length].
        pairwise_fn: a function of two arrays that broadcast; by default both must be nonzero.
        extra_batch_dims: number of axes of size 1 to add in front.
        dtype: dtype of the mask.

    Returns:
        [*batch, 1, query_length, key_length].

    Reference: Vaswani et al., 2017, Attention Is All You Need, arXiv:1706.03762.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> real = jnp.array([[1, 1, 0]])
        >>> nnx.make_attention_mask(real, real, dtype=bool)[0, 0].tolist()
        [[True, True, False], [True, True, False], [False, False, False]]
    """
    mask = pairwise_fn(jnp.expand_dims(query_input, -1), jnp.expand_dims(key_input, -2))
    mask = jnp.expand_dims(mask, -3)
    return jnp.expand_dims(mask, tuple(range(extra_batch_dims))).astype(dtype)


def make_causal_mask(x: jax.Array, extra_batch_dims: int = 0, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """A mask that lets position `i` see the positions up to `i`.

    Where `is_causal=True` is possible it is better: no mask is made.

    Args:
        x: [*batch, length]; only its shape counts.
        extra_batch_dims: number of axes of size 1 to add in front.
        dtype: dtype of the mask.

    Returns:
        [*batch, 1, length, length].

    Reference: Vaswani et al., 2017, Attention Is All You Need, arXiv:1706.03762.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.make_causal_mask(jnp.ones((1, 3)))[0, 0].tolist()
        [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
    return make_attention_mask(positions, positions, jnp.greater_equal, extra_batch_dims, dtype)


def combine_masks(*masks: jax.Array | None, dtype: DTypeLike = jnp.float32) -> jax.Array | None:
    """The mask that lets through what all `masks` let through.

    Args:
        *masks: masks of one rank that broadcast; `None` lets everything through.
        dtype: dtype of the mask.

    Returns:
        A mask, or None if there was none.

    Raises:
        ShapeError: the masks differ in rank or do not broadcast.

    Reference: Vaswani et al., 2017, Attention Is All You Need, arXiv:1706.03762.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> x = jnp.array([[1, 0, 1]])
        >>> causal, real = nnx.make_causal_mask(x), nnx.make_attention_mask(x, x)
        >>> nnx.combine_masks(causal, real, None, dtype=bool)[0, 0, 2].tolist()
        [True, False, True]
    """
    given = [jnp.asarray(mask) for mask in masks if mask is not None]
    if not given:
        return None
    shapes = [tuple(mask.shape) for mask in given]
    one_rank = len({len(shape) for shape in shapes}) == 1
    if not one_rank or any(len({*sizes} - {1}) > 1 for sizes in zip(*shapes, strict=True)):
        raise ShapeError(f"combine_masks: expected masks of one rank that broadcast, got {shapes}")
    combined = given[0].astype(bool)
    for mask in given[1:]:
        combined = combined & mask.astype(bool)
    return combined.astype(dtype)
