"""Attention: scaled dot products, multi-head attention built on them, and the masks they take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nnx.core import Context, Intermediate, Module, ShapeError
from nnx.layers._common import (
    PrecisionLike,
    check_features,
    default_bias_init,
    default_kernel_init,
    draw_key,
    resolve_flag,
)
from nnx.layers._dropout import check_rate, dropout
from nnx.layers._dtypes import promote_dtype, statistics_dtype
from nnx.layers._linear import LinearGeneral
from nnx.layers._norm import LayerNorm
from nnx.layers.initializers import Initializer

__all__ = [
    "MultiHeadAttention",
    "combine_masks",
    "dot_product_attention",
    "make_attention_mask",
    "make_causal_mask",
]

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
    *,
    is_causal: bool = False,
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
        is_causal: whether query `i` sees only the keys up to `i`, besides what `mask` says.
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
    dropping = dropout_rate > 0 and not deterministic
    needs_weights = dropping or module is not None or precision is not None or query.shape[-1] != value.shape[-1]
    if needs_weights and implementation == "cudnn":
        raise ValueError(
            "dot_product_attention: implementation='cudnn' has neither dropout, nor `precision`, nor the weights for"
            " `module`, nor values of another size than the queries; use implementation=None"
        )
    # JAX asks XLA for a float16 product that CPUs and TPUs lack, and under jit that fails to compile.
    if not needs_weights and (query.dtype != jnp.float16 or implementation == "cudnn"):
        return _fused(query, key, value, bias, mask, is_causal, scale, implementation)
    weights = _weights(query, key, bias, mask, is_causal, scale, precision)
    if module is not None:
        module.sow(Intermediate, "attention_weights", weights)
    if dropping:
        if dropout_rng is None:
            raise ValueError(
                f"dot_product_attention: dropout_rate={dropout_rate} needs `dropout_rng`, or deterministic=True"
            )
        shared = range(weights.ndim - 2) if broadcast_dropout else ()
        weights = dropout(weights, dropout_rng, dropout_rate, shared)
    kv_heads = key.shape[-2]
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
            implementation=implementation,
        )
    return out.reshape(query.shape)


def _weights(
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    is_causal: bool,
    scale: float,
    precision: PrecisionLike,
) -> jax.Array:
    """The attention weights before dropout, [*batch, num_heads, query_length, key_length]."""
    *batch, length, heads, head_dim = query.shape
    key_length, kv_heads = key.shape[-3:-1]
    grouped = query.reshape(*batch, length, kv_heads, heads // kv_heads, head_dim)
    work = statistics_dtype(query.dtype)
    logits = jnp.einsum("...tkgh,...skh->...kgts", grouped, key, precision=precision, preferred_element_type=work)
    logits = logits.reshape(*batch, heads, length, key_length) * scale
    if bias is not None:
        logits = logits + bias.astype(work)
    if is_causal:
        causal = jnp.tril(jnp.ones((length, key_length), bool)).reshape((1,) * (logits.ndim - 2) + (length, key_length))
        mask = causal if mask is None else mask & causal
    if mask is not None:
        # Finite, so that a row without any key gives a mean and not NaN; half, so that adding to it cannot overflow.
        logits = jnp.where(mask, logits, 0.5 * float(jnp.finfo(work).min))
    return jax.nn.softmax(logits, axis=-1).astype(query.dtype)


class MultiHeadAttention(Module):
    """Attention of several heads, each with its own projections of queries, keys and values.

    `out = concat_h(attention(x_q @ W_q[h], x_k @ W_k[h], x_v @ W_v[h])) @ W_o`, biases left out.

    Self-attention takes one input, `layer(x)`; cross-attention a second one, `layer(x, memory)`. With fewer
    `num_kv_heads` than `num_heads`, neighbouring heads share keys and values (grouped-query; with 1, multi-query).

    The flag `deterministic` comes from the call, the constructor or the Context, in that order; it is needed only if
    `dropout_rate` is above 0.

    Attributes:
        query: LinearGeneral, its kernel [in_features, num_heads, head_dim], its bias [num_heads, head_dim].
        key: LinearGeneral, its kernel [in_kv_features, num_kv_heads, head_dim].
        value: LinearGeneral, its kernel [in_kv_features, num_kv_heads, head_dim].
        out: LinearGeneral, its kernel [num_heads, head_dim, out_features].
        query_ln: LayerNorm over head_dim, or None.
        key_ln: LayerNorm over head_dim, or None.

    References: Vaswani et al., 2017, Attention Is All You Need, arXiv:1706.03762; Ainslie et al., 2023, GQA,
    arXiv:2305.13245; for `normalize_qk`, Dehghani et al., 2023, Scaling Vision Transformers, arXiv:2302.05442.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.MultiHeadAttention(num_heads=4, in_features=32, num_kv_heads=2, ctx=nnx.context(0))
        >>> x = jnp.ones((2, 10, 32))
        >>> layer(x, is_causal=True).shape
        (2, 10, 32)
        >>> layer.query.kernel.shape, layer.key.kernel.shape, layer.out.kernel.shape
        ((32, 4, 8), (32, 2, 8), (4, 8, 32))
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        in_kv_features: int | None = None,
        *,
        num_kv_heads: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        broadcast_dropout: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = default_bias_init,
        out_bias_init: Initializer | None = None,
        use_bias: bool = True,
        attention_fn: Callable[..., jax.Array] = dot_product_attention,
        normalize_qk: bool = False,
        is_causal: bool = False,
        implementation: Implementation | None = None,
        rng_collection: str = "dropout",
        ctx: Context,
    ) -> None:
        """Makes the layer.

        Args:
            num_heads: number of query heads.
            in_features: size of the last axis of the queries' inputs.
            qkv_features: size of all query heads together; `None` is `in_features`.
            out_features: size of the last axis of the outputs; `None` is `in_features`.
            in_kv_features: size of the last axis of the keys' and values' inputs; `None` is `in_features`.
            num_kv_heads: number of key and value heads, a divisor of `num_heads`; `None` is `num_heads`.
            dtype: dtype to compute in; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of the parameters.
            broadcast_dropout: whether one dropout mask serves the whole batch and all heads.
            dropout_rate: the probability of dropping an attention weight.
            deterministic: whether to skip dropout; `None` leaves it to the call or the Context.
            precision: precision of the products, see `jax.lax.Precision`.
            kernel_init: initializer of the kernels, called with their merged shape [inputs, outputs].
            out_kernel_init: the same for the output's kernel; `None` is `kernel_init`.
            bias_init: initializer of the biases.
            out_bias_init: the same for the output's bias; `None` is `bias_init`.
            use_bias: whether the projections have a bias.
            attention_fn: a function with the arguments of `dot_product_attention`.
            normalize_qk: whether to apply a LayerNorm without bias to each head's queries and keys.
            is_causal: whether position `i` sees only positions up to `i`.
            implementation: "xla", "cudnn", or `None` for JAX's choice.
            rng_collection: the Context's random stream that dropout draws from.
            ctx: gives the keys, from its stream "params".

        Raises:
            ValueError: the heads do not divide `qkv_features`, or `num_kv_heads` does not divide `num_heads`.
        """
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.in_features = in_features
        self.qkv_features = in_features if qkv_features is None else qkv_features
        self.out_features = in_features if out_features is None else out_features
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        if self.qkv_features % num_heads:
            raise ValueError(
                f"MultiHeadAttention: num_heads={num_heads} does not divide qkv_features={self.qkv_features}"
            )
        if self.num_kv_heads <= 0 or num_heads % self.num_kv_heads:
            raise ValueError(f"MultiHeadAttention: num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")
        self.head_dim = self.qkv_features // num_heads
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.broadcast_dropout = broadcast_dropout
        self.dropout_rate = check_rate(type(self).__name__, dropout_rate)
        self.deterministic = deterministic
        self.precision = precision
        self.use_bias = use_bias
        self.attention_fn = attention_fn
        self.normalize_qk = normalize_qk
        self.is_causal = is_causal
        self.implementation = implementation
        self.rng_collection = rng_collection

        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "ctx": ctx}
        linear: dict[str, Any] = {"use_bias": use_bias, "precision": precision, **options}
        inner: dict[str, Any] = {"kernel_init": kernel_init, "bias_init": bias_init, **linear}
        self.query = LinearGeneral(in_features, (num_heads, self.head_dim), **inner)
        self.key = LinearGeneral(self.in_kv_features, (self.num_kv_heads, self.head_dim), **inner)
        self.value = LinearGeneral(self.in_kv_features, (self.num_kv_heads, self.head_dim), **inner)
        self.query_ln = LayerNorm(self.head_dim, use_bias=False, **options) if normalize_qk else None
        self.key_ln = LayerNorm(self.head_dim, use_bias=False, **options) if normalize_qk else None
        self.out = LinearGeneral(
            (num_heads, self.head_dim),
            self.out_features,
            axis=(-2, -1),
            kernel_init=kernel_init if out_kernel_init is None else out_kernel_init,
            bias_init=bias_init if out_bias_init is None else out_bias_init,
            **linear,
        )

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
        is_causal: bool | None = None,
        sow_weights: bool = False,
        ctx: Context | None = None,
    ) -> jax.Array:
        """Attends from `inputs_q` to `inputs_k` and `inputs_v`.

        Args:
            inputs_q: [*batch, query_length, in_features].
            inputs_k: [*batch, key_length, in_kv_features]; `None` is `inputs_q`, that is self-attention.
            inputs_v: [*batch, key_length, in_kv_features]; `None` is `inputs_k`.
            mask: zero or False where a query must not see a key, broadcastable to
                [*batch, num_heads, query_length, key_length].
            deterministic: whether to skip dropout; overrides the constructor and the Context.
            is_causal: whether position `i` sees only positions up to `i`; overrides the constructor.
            sow_weights: whether to keep the weights before dropout as the Intermediate `attention_weights`.
            ctx: carries the random stream, and possibly the flag. Not needed without dropout.

        Returns:
            [*batch, query_length, out_features].

        Raises:
            ContextError: there is dropout, and `deterministic` is set nowhere or there is no random stream.
            ShapeError: the inputs have other sizes than the layer was made for, or do not fit each other.
            ValueError: `inputs_v` without `inputs_k`.
        """
        kind = type(self).__name__
        if inputs_k is None:
            if inputs_v is not None:
                raise ValueError(
                    f"{kind}: `inputs_v` was given without `inputs_k`; give both, or neither to attend to `inputs_q`"
                )
            inputs_k = inputs_q
        if inputs_v is None:
            inputs_v = inputs_k
        check_features(self, "inputs_q", inputs_q, self.in_features, f"in_features={self.in_features}")
        for name, inputs in (("inputs_k", inputs_k), ("inputs_v", inputs_v)):
            check_features(self, name, inputs, self.in_kv_features, f"in_kv_features={self.in_kv_features}")

        query, key, value = self.query(inputs_q), self.key(inputs_k), self.value(inputs_v)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)

        dropping = self.dropout_rate > 0 and not resolve_flag(
            self, "deterministic", deterministic, self.deterministic, ctx, example=True
        )
        # Only what is asked for, so that an `attention_fn` need not know every option.
        extra: dict[str, Any] = {}
        if self.is_causal if is_causal is None else is_causal:
            extra["is_causal"] = True
        if self.implementation is not None:
            extra["implementation"] = self.implementation
        heads = self.attention_fn(
            query,
            key,
            value,
            mask=mask,
            broadcast_dropout=self.broadcast_dropout,
            dropout_rng=draw_key(self, self.rng_collection, ctx) if dropping else None,
            dropout_rate=self.dropout_rate,
            deterministic=not dropping,
            dtype=self.dtype,
            precision=self.precision,
            module=self if sow_weights else None,
            **extra,
        )
        return self.out(heads)


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
