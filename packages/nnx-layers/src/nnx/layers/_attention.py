"""Multi-head attention: projections, positions, and a cache of keys and values for decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nnx.core import Context, Module, ShapeError
from nnx.layers._common import (
    NO_METADATA,
    DefaultNames,
    Metadata,
    Names,
    PrecisionLike,
    PromoteDtype,
    check_features,
    default_bias_init,
    default_kernel_init,
    draw_key,
    resolve_flag,
)
from nnx.layers._dot_product import Implementation, check_window, dot_product_attention, positions_mask
from nnx.layers._dropout import check_rate
from nnx.layers._dtypes import promote_dtype
from nnx.layers._kv_cache import append, new_cache
from nnx.layers._linear import LinearGeneral
from nnx.layers._norm import LayerNorm
from nnx.layers._rotary import RotaryEmbedding
from nnx.layers._settled import settled
from nnx.layers.initializers import Initializer

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(Module):
    """Attention of several heads, each with its own projections of queries, keys and values.

    `out = concat_h(attention(x_q @ W_q[h], x_k @ W_k[h], x_v @ W_v[h])) @ W_o`, biases left out.

    Self-attention takes one input, `layer(x)`; cross-attention a second one, `layer(x, memory)`. With fewer
    `num_kv_heads` than `num_heads`, neighbouring heads share keys and values (grouped-query; with 1, multi-query).

    The flag `deterministic` comes from the call, the constructor or the Context, in that order; it is needed only if
    `dropout_rate` is above 0.

    For decoding, `init_cache(batch, max_length)` gives it a cache; `layer(x, decode=True)` then appends the keys and
    values of `x`, any number of tokens, to each row, and attends to what the row holds. Rows may be at different
    positions.

    Where logical axis rules split "activation_heads" over a mesh, so are the heads that are attended to.

    Attributes:
        query: LinearGeneral, its kernel [in_features, num_heads, head_dim], its bias [num_heads, head_dim]. The
            logical axes are "embed", "heads" ("kv_heads" for keys and values) and "head_dim".
        key: LinearGeneral, its kernel [in_kv_features, num_kv_heads, head_dim].
        value: LinearGeneral, its kernel [in_kv_features, num_kv_heads, head_dim].
        out: LinearGeneral, its kernel [num_heads, head_dim, out_features].
        query_ln: LayerNorm over head_dim, or None.
        key_ln: LayerNorm over head_dim, or None.
        cached_key: Cache, [batch, max_length, num_kv_heads, head_dim]; after `init_cache`.
        cached_value: the same for the values.
        cache_index: Cache, the number of tokens in each row, [batch].

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
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
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
        qkv_promote_dtype: PromoteDtype = promote_dtype,
        out_promote_dtype: PromoteDtype = promote_dtype,
        ln_promote_dtype: PromoteDtype = promote_dtype,
        rotary: RotaryEmbedding | bool | None = None,
        is_causal: bool = False,
        local_window_size: int | tuple[int, int] | None = None,
        decode: bool | None = None,
        implementation: Implementation | None = None,
        rng_collection: str = "dropout",
        ctx: Context,
        kernel_metadata: Metadata = NO_METADATA,
        out_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
        out_bias_metadata: Metadata = NO_METADATA,
        query_ln_scale_metadata: Metadata = NO_METADATA,
        key_ln_scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes the layer.

        Args:
            num_heads: number of query heads.
            in_features: size of the last axis of the queries' inputs.
            qkv_features: size of all query heads together; `None` is `in_features`.
            out_features: size of the last axis of the outputs; `None` is `in_features`.
            num_kv_heads: number of key and value heads, a divisor of `num_heads`; `None` is `num_heads`.
            in_kv_features: size of the last axis of the keys' and values' inputs; `None` is `in_features`.
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
            qkv_promote_dtype: the option `promote_dtype` of `query`, `key` and `value`.
            out_promote_dtype: the same of `out`.
            ln_promote_dtype: the same of `query_ln` and `key_ln`.
            rotary: turns queries and keys by their positions: a RotaryEmbedding, or True for one of `head_dim`.
            is_causal: whether position `i` sees only positions up to `i`.
            local_window_size: how many positions before and after its own each position sees, an int for both.
            decode: whether calls use the cache; a call may say otherwise.
            implementation: "xla", "cudnn", or `None` for JAX's choice.
            rng_collection: the Context's random stream that dropout draws from.
            ctx: gives the keys, from its stream "params".
            kernel_metadata: metadata of the kernels, which win over those of their initializers and of the layer.
            out_kernel_metadata: the same for the output's kernel; if empty, `kernel_metadata`.
            bias_metadata: the same for the biases.
            out_bias_metadata: the same for the output's bias; if empty, `bias_metadata`.
            query_ln_scale_metadata: the same for the scale of `query_ln`.
            key_ln_scale_metadata: the same for the scale of `key_ln`.

        Raises:
            ValueError: the heads do not divide `qkv_features`, or `num_kv_heads` does not divide `num_heads`.
        """
        self.num_heads = num_heads
        self.num_kv_heads: int = num_heads if num_kv_heads is None else num_kv_heads
        self.in_features = in_features
        self.qkv_features: int = in_features if qkv_features is None else qkv_features
        self.out_features: int = in_features if out_features is None else out_features
        self.in_kv_features: int = in_features if in_kv_features is None else in_kv_features
        if self.qkv_features % num_heads:
            raise ValueError(
                f"MultiHeadAttention: num_heads={num_heads} does not divide qkv_features={self.qkv_features}"
            )
        if self.num_kv_heads <= 0 or num_heads % self.num_kv_heads:
            raise ValueError(f"MultiHeadAttention: num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")
        self.head_dim: int = self.qkv_features // num_heads
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.broadcast_dropout = broadcast_dropout
        self.dropout_rate: float = check_rate(type(self).__name__, dropout_rate)
        self.deterministic = deterministic
        self.precision = precision
        self.use_bias = use_bias
        self.attention_fn = attention_fn
        self.normalize_qk = normalize_qk
        self.rotary: RotaryEmbedding | None = RotaryEmbedding(self.head_dim) if rotary is True else rotary or None
        self.is_causal = is_causal
        self.local_window_size: tuple[int, int] | None = check_window(type(self).__name__, local_window_size)
        self.decode = decode
        self.implementation = implementation
        self.rng_collection = rng_collection

        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "ctx": ctx}
        linear: dict[str, Any] = {"use_bias": use_bias, "precision": precision, **options}
        inner: dict[str, Any] = {
            "kernel_init": kernel_init,
            "bias_init": bias_init,
            "promote_dtype": qkv_promote_dtype,
            "kernel_metadata": kernel_metadata,
            "bias_metadata": bias_metadata,
            **linear,
        }
        inner_kv = {**inner, **_names(inner, ("embed", "kv_heads", "head_dim"), ("kv_heads", "head_dim"))}
        inner |= _names(inner, ("embed", "heads", "head_dim"), ("heads", "head_dim"))
        self.query: LinearGeneral = LinearGeneral(in_features, (num_heads, self.head_dim), **inner)
        self.key: LinearGeneral = LinearGeneral(self.in_kv_features, (self.num_kv_heads, self.head_dim), **inner_kv)
        self.value: LinearGeneral = LinearGeneral(self.in_kv_features, (self.num_kv_heads, self.head_dim), **inner_kv)
        self.query_ln: LayerNorm | None = None
        self.key_ln: LayerNorm | None = None
        if normalize_qk:
            options |= {"use_bias": False, "promote_dtype": ln_promote_dtype}
            self.query_ln = LayerNorm(self.head_dim, scale_metadata=query_ln_scale_metadata, **options)
            self.key_ln = LayerNorm(self.head_dim, scale_metadata=key_ln_scale_metadata, **options)
        self.out: LinearGeneral = LinearGeneral(
            (num_heads, self.head_dim),
            self.out_features,
            axis=(-2, -1),
            kernel_init=DefaultNames(out_kernel_init or kernel_init, ("heads", "head_dim", "embed")),
            bias_init=DefaultNames(out_bias_init or bias_init, ("embed",)),
            promote_dtype=out_promote_dtype,
            kernel_metadata=out_kernel_metadata or kernel_metadata,
            bias_metadata=out_bias_metadata or bias_metadata,
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
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool | None = None,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
        input_positions: jax.Array | None = None,
        lengths: jax.Array | None = None,
        ctx: Context | None = None,
    ) -> jax.Array:
        """Attends from `inputs_q` to `inputs_k` and `inputs_v`.

        Args:
            inputs_q: [*batch, query_length, in_features].
            inputs_k: [*batch, key_length, in_kv_features]; `None` is `inputs_q`, that is self-attention.
            inputs_v: [*batch, key_length, in_kv_features]; `None` is `inputs_k`.
            mask: zero or False where a query must not see a key, broadcastable to
                [*batch, num_heads, query_length, key_length]; with a cache, `key_length` is its `max_length`.
            deterministic: whether to skip dropout; overrides the constructor and the Context.
            sow_weights: whether to keep the weights before dropout as the Intermediate `attention_weights`.
            decode: whether to append to the cache and attend to all that it holds, causally; overrides the constructor.
                Takes inputs of [batch, query_length, in_features].
            is_causal: whether position `i` sees only positions up to `i`; overrides the constructor.
            out_sharding: on a mesh of explicit axes, how the outputs are split, such as a PartitionSpec; `None` splits
                them as inputs and kernel are.
            qkv_sharding: the same for queries, keys and values, [*batch, length, heads, head_dim].
            input_positions: the positions of the queries and keys of self-attention, integers that broadcast to
                [*batch, query_length], for `rotary`, or without it for an `attention_fn` that takes them; `None` counts
                from 0, or with a cache from what each row holds.
            lengths: with `decode`, how many of the tokens of each row count, [batch]; the others are padding at the
                end. `None` if all do.
            ctx: carries the random stream, and possibly the flag. Not needed without dropout.

        Returns:
            [*batch, query_length, out_features].

        Raises:
            ContextError: there is dropout, and `deterministic` is set nowhere or there is no random stream.
            ShapeError: the inputs have other sizes than the layer was made for, or do not fit each other.
            CacheFullError: outside of a trace, a row of the cache has no room. Under `nnx.checkify` it is an error too;
                else, under JAX's own `checkify` as well, the outputs of such a row are NaN.
            ValueError: `inputs_v` without `inputs_k`, or a cache for cross-attention, or `decode` without a cache, or
                `input_positions` that nothing takes.
        """
        kind = type(self).__name__
        cross = inputs_k is not None
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
        decoding = bool(self.decode if decode is None else decode)
        self._check_decoding(kind, decoding, cross, inputs_q, lengths)

        query = self.query(inputs_q, qkv_sharding)
        key, value = self.key(inputs_k, qkv_sharding), self.value(inputs_v, qkv_sharding)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        if self.rotary is not None:
            own = self._positions(query, decoding) if input_positions is None else jnp.asarray(input_positions)
            query = self.rotary(query, own)
            key = self.rotary(key, self._positions(key, decoding=False) if cross else own)

        # Only what is asked for, so that an `attention_fn` need not know every option.
        extra: dict[str, Any] = {}
        if input_positions is not None and self.rotary is None:
            if self.attention_fn is dot_product_attention:
                raise ValueError(
                    f"{kind}: `input_positions` are for rotary positions, which this layer has not; make it with"
                    " rotary=True, or with an `attention_fn` that takes them"
                )
            extra["input_positions"] = input_positions
        causal = bool(self.is_causal if is_causal is None else is_causal)
        has_room = None
        if decoding:
            places, has_room = append(kind, self, key, value, lengths)
            key, value = self.cached_key, self.cached_value
            near = positions_mask(places, jnp.arange(key.shape[1]), True, self.local_window_size)[:, None]
            mask = near if mask is None else near & _as_mask(kind, mask, near.ndim)
        else:
            if causal:
                extra["is_causal"] = True
            if self.local_window_size is not None:
                extra["local_window_size"] = self.local_window_size
        if self.implementation is not None:
            extra["implementation"] = self.implementation

        dropping = self.dropout_rate > 0 and not resolve_flag(
            self, "deterministic", deterministic, self.deterministic, ctx, example=True
        )
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
        out = self.out(settled(heads, -2, "activation_heads"), out_sharding)
        if has_room is not None:
            out = jnp.where(has_room[:, None, None], out, jnp.nan)
        return out

    def init_cache(self, batch: int, max_length: int, dtype: DTypeLike | None = None) -> None:
        """Make an empty cache of keys and values, in the place of the one before.

        Args:
            batch: the number of rows.
            max_length: the tokens that a row has room for.
            dtype: dtype of keys and values; `None` is the layer's `dtype`, or else its `param_dtype`.

        Raises:
            ValueError: a size is not positive.
        """
        if dtype is None:
            dtype = self.param_dtype if self.dtype is None else self.dtype
        for name in ("cached_key", "cached_value", "cache_index"):
            if hasattr(self, name):
                delattr(self, name)
        fresh: Any = new_cache(batch, max_length, self.num_kv_heads, self.head_dim, dtype)
        self.cached_key, self.cached_value, self.cache_index = fresh

    def _positions(self, x: jax.Array, decoding: bool) -> jax.Array | None:
        """The positions for `rotary`, or None for one that counts by itself."""
        if not decoding and type(self.rotary) is RotaryEmbedding:
            return None
        steps = jnp.arange(x.shape[-3], dtype=jnp.int32)
        return self.cache_index[:, None] + steps[None] if decoding else steps

    def _check_decoding(
        self, kind: str, decoding: bool, cross: bool, inputs: jax.Array, lengths: jax.Array | None
    ) -> None:
        if not decoding:
            if lengths is not None:
                raise ValueError(f"{kind}: `lengths` is for decode=True; without a cache give a `mask`")
            return
        if cross:
            raise ValueError(f"{kind}: decode=True is for self-attention; call cross-attention without it")
        if not hasattr(self, "cache_index"):
            raise ValueError(f"{kind}: decode=True needs a cache, call init_cache(batch, max_length) first")
        if inputs.ndim != 3:
            raise ShapeError(f"{kind}: with decode=True the inputs are [batch, length, features], got {inputs.shape}")


def _names(inits: dict[str, Any], kernel: Names, bias: Names) -> dict[str, Any]:
    return {
        "kernel_init": DefaultNames(inits["kernel_init"], kernel),
        "bias_init": DefaultNames(inits["bias_init"], bias),
    }


def _as_mask(kind: str, mask: jax.Array, rank: int) -> jax.Array:
    mask = jnp.asarray(mask).astype(bool)
    if mask.ndim > rank:
        raise ShapeError(f"{kind}: expected a mask of at most {rank} axes, got {tuple(mask.shape)}")
    return mask.reshape((1,) * (rank - mask.ndim) + mask.shape)
