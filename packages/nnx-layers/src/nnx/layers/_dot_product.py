"""Scaled dot products: the attention that multi-head attention is built on."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nnx.core import Intermediate, Module, ShapeError
from nnx.layers._common import PrecisionLike, PromoteDtype
from nnx.layers._dropout import dropout
from nnx.layers._dtypes import promote_dtype, statistics_dtype

__all__ = ["Implementation", "check_window", "dot_product_attention", "positions_mask"]

Implementation = Literal["xla", "cudnn"]


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: PrecisionLike = None,
    module: Module | None = None,
    promote_dtype: PromoteDtype = promote_dtype,
    is_causal: bool = False,
    *,
    local_window_size: int | tuple[int, int] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Means of values, weighted by how well queries and keys agree.

    `out = dropout(softmax(scale * query @ key.T + bias, where=mask)) @ value` for each head, the softmax in float32.

    Without dropout, `precision` and `module` it is `jax.nn.dot_product_attention`, which may run as one fused kernel
    (except in float16, where that is only so for "cudnn"). A query whose keys are all masked gets the plain mean of the
    values, not NaN.

    Args:
        query: [*batch, query_length, num_heads, head_dim].
        key: [*batch, key_length, num_kv_heads, head_dim], where `num_kv_heads` divides `num_heads`: each key head
            serves a group of neighbouring query heads.
        value: [*batch, key_length, num_kv_heads, value_dim].
        bias: added to the logits, broadcastable to [*batch, num_heads, query_length, key_length].
        mask: zero or False where a query must not see a key, broadcastable to the same shape.
        broadcast_dropout: whether one dropout mask, [query_length, key_length], serves the whole batch and all heads.
        dropout_rng: the key to draw the dropout mask from.
        dropout_rate: the probability of dropping a weight.
        deterministic: whether to skip dropout.
        dtype: dtype to compute in; `None` takes the common type of query, key and value.
        precision: precision of the products, see `jax.lax.Precision`.
        module: a Module to sow the weights before dropout into, as the Intermediate `attention_weights`.
        promote_dtype: casts the tuple of query, key and value, with the arguments of `nnx.promote_dtype`.
        is_causal: whether query `i` sees only the keys up to `i`, besides what `mask` says.
        local_window_size: how many keys before and after its own position a query sees, an int for both; None for all.
        scale: multiplies the logits; `None` is `1 / sqrt(head_dim)`.
        implementation: "xla", "cudnn", or `None` for JAX's choice.

    Returns:
        [*batch, query_length, num_heads, value_dim].

    Raises:
        ShapeError: the shapes do not fit each other.
        ValueError: dropout without a key, or an `implementation` for what only plain XLA can do.

    Reference: Vaswani et al., 2017, Attention Is All You Need, arXiv:1706.03762.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> q, kv = jnp.ones((2, 5, 8, 16)), jnp.ones((2, 7, 2, 16))
        >>> nnx.dot_product_attention(q, kv, kv, is_causal=True).shape
        (2, 5, 8, 16)
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    logits_shape = _check_attention(query, key, value)
    bias = None if bias is None else _align("bias", jnp.asarray(bias), logits_shape)
    mask = None if mask is None else _align("mask", jnp.asarray(mask).astype(bool), logits_shape)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    window = check_window("dot_product_attention", local_window_size)
    dropping = dropout_rate > 0 and not deterministic
    needs_weights = dropping or module is not None or precision is not None or query.shape[-1] != value.shape[-1]
    if needs_weights and implementation == "cudnn":
        raise ValueError(
            "dot_product_attention: implementation='cudnn' has neither dropout, nor `precision`, nor the weights for"
            " `module`, nor values of another size than the queries; use implementation=None"
        )
    # JAX asks XLA for a float16 product that CPUs and TPUs lack, and under jit that fails to compile.
    if not needs_weights and (query.dtype != jnp.float16 or implementation == "cudnn"):
        return _fused(query, key, value, bias, mask, is_causal, window, scale, implementation)
    weights = _weights(query, key, bias, mask, is_causal, window, scale, precision)
    if module is not None:
        module.sow(Intermediate, "attention_weights", weights)
    if dropping:
        if dropout_rng is None:
            raise ValueError(
                f"dot_product_attention: dropout_rate={dropout_rate} needs `dropout_rng`, or deterministic=True"
            )
        # A product with what is kept, which a shared mask lets be as small as one head's weights.
        shape = (1,) * (weights.ndim - 2) + weights.shape[-2:] if broadcast_dropout else weights.shape
        weights = weights * dropout(jnp.ones(shape, weights.dtype), dropout_rng, dropout_rate)
    kv_heads = key.shape[-2]
    if query.shape[-2] == kv_heads:  # without a group's axis of size 1, around which XLA would transpose
        return jnp.einsum("...nts,...snh->...tnh", weights, value, precision=precision)
    grouped = weights.reshape(*weights.shape[:-3], kv_heads, -1, *weights.shape[-2:])
    out = jnp.einsum("...kgts,...skh->...tkgh", grouped, value, precision=precision)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _check_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[int, ...]:
    """The shape of the logits, [*batch, num_heads, query_length, key_length], or an error."""
    shapes = f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    kind = "dot_product_attention"
    if query.ndim < 3 or not query.ndim == key.ndim == value.ndim:
        raise ShapeError(f"{kind}: expected [*batch, length, heads, head_dim] of one rank, {shapes}")
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise ShapeError(f"{kind}: the batch axes must be equal, {shapes}")
    if key.shape[-3:-1] != value.shape[-3:-1]:
        raise ShapeError(f"{kind}: key and value must have the same length and number of heads, {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise ShapeError(f"{kind}: query and key must have the same head_dim, {shapes}")
    if query.shape[-2] % key.shape[-2]:
        raise ShapeError(f"{kind}: the number of key heads must divide the number of query heads, {shapes}")
    return (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])


def _align(name: str, array: jax.Array, logits_shape: tuple[int, ...]) -> jax.Array:
    """`array` with the rank of the logits, axes of size 1 in front."""
    missing = len(logits_shape) - array.ndim
    aligned = (1,) * missing + array.shape
    if missing < 0 or any(size not in (1, full) for size, full in zip(aligned, logits_shape, strict=True)):
        raise ShapeError(
            f"dot_product_attention: `{name}` must broadcast to [*batch, heads, query_length, key_length] ="
            f" {logits_shape}, got {tuple(array.shape)}"
        )
    return array.reshape(aligned)


def _fused(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    is_causal: bool,
    window: tuple[int, int] | None,
    scale: float,
    implementation: Implementation | None,
) -> jax.Array:
    """`jax.nn.dot_product_attention`, which knows exactly one batch axis, for any number of them."""
    batch = query.shape[:-3]

    def one_batch_axis(x: jax.Array) -> jax.Array:
        # A bias or mask that is the same for the whole batch stays that small.
        own = (1,) * len(batch) if all(size == 1 for size in x.shape[:-3]) else batch
        return jnp.broadcast_to(x, own + x.shape[-3:]).reshape(math.prod(own), *x.shape[-3:])

    if bias is not None:
        bias = one_batch_axis(bias).astype(statistics_dtype(query.dtype))
    if mask is not None:
        mask = one_batch_axis(mask)
    # JAX's function mixes half precision with float32 inside, which strict promotion forbids. Ours are of one type.
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(
            one_batch_axis(query),
            one_batch_axis(key),
            one_batch_axis(value),
            bias,
            mask,
            scale=scale,
            is_causal=is_causal,
            local_window_size=window,
            implementation=implementation,
        )
    return out.reshape(query.shape)


def _weights(
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    is_causal: bool,
    window: tuple[int, int] | None,
    scale: float,
    precision: PrecisionLike,
) -> jax.Array:
    """The attention weights before dropout, [*batch, num_heads, query_length, key_length]."""
    *batch, length, heads, head_dim = query.shape
    key_length, kv_heads = key.shape[-3:-1]
    work = statistics_dtype(query.dtype)
    # Of the two the query is the smaller where a sequence is longer than a head is wide, but half precision rounds.
    scale_query = query.dtype == work
    if scale_query:
        query = query * scale
    if heads == kv_heads:
        logits = jnp.einsum("...tnh,...snh->...nts", query, key, precision=precision, preferred_element_type=work)
    else:
        grouped = query.reshape(*batch, length, kv_heads, heads // kv_heads, head_dim)
        logits = jnp.einsum("...tkgh,...skh->...kgts", grouped, key, precision=precision, preferred_element_type=work)
        logits = logits.reshape(*batch, heads, length, key_length)
    if not scale_query:
        logits = logits * scale
    if bias is not None:
        logits = logits + bias.astype(work)
    if is_causal or window is not None:
        near = positions_mask(jnp.arange(length), jnp.arange(key_length), is_causal, window)
        near = near.reshape((1,) * (logits.ndim - 2) + near.shape)
        mask = near if mask is None else mask & near
    if mask is not None:
        # Finite, so that a row without any key gives a mean and not NaN; half, so that adding to it cannot overflow.
        logits = jnp.where(mask, logits, 0.5 * float(jnp.finfo(work).min))
    return jax.nn.softmax(logits, axis=-1).astype(query.dtype)


def check_window(kind: str, window: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """The window as a pair (before, after), or an error."""
    if window is None:
        return None
    pair = (window, window) if isinstance(window, int) else tuple(window)
    if len(pair) != 2 or not all(isinstance(size, int) and size >= 0 for size in pair):
        raise ValueError(
            f"{kind}: `local_window_size` is a number of positions, or a pair (before, after), got {window!r}"
        )
    return pair


def positions_mask(
    query_positions: jax.Array, key_positions: jax.Array, is_causal: bool, window: tuple[int, int] | None
) -> jax.Array:
    """Which keys each query sees by position, [..., query_length, key_length]."""
    # To one rank, which strict rank promotion asks for.
    key_positions = key_positions.reshape((1,) * (query_positions.ndim - key_positions.ndim) + key_positions.shape)
    ahead = jnp.expand_dims(key_positions, -2) - jnp.expand_dims(query_positions, -1)
    seen = jnp.ones(ahead.shape, bool)
    if is_causal:
        seen = ahead <= 0
    if window is not None:
        seen = seen & (ahead >= -window[0]) & (ahead <= window[1])
    return seen
