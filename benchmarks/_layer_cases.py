"""What `benchmarks/layers.py` compiles: every layer that flax.nnx has too, made alike, on the same shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import nnx
from nnx import layers

NO_RANDOMNESS = ("PReLU",)
"""The layers of both libraries whose parameters are not drawn."""


class Case(NamedTuple):
    """A layer of both libraries.

    Attributes:
        ours: makes ours, given a Context.
        flax: makes flax's, given its module and its Rngs.
        shape: the shape of the input.
        dtype: the dtype of the input.
        call: how the layer, or the function of either library, is called with the input.
        draws: whether the call takes a random stream too, made outside: our Context as `ctx`, flax's Rngs as `rngs`.
    """

    ours: Callable[[nnx.Context], Any]
    flax: Callable[[Any, Any], Any]
    shape: tuple[int, ...]
    dtype: str = "float32"
    call: Callable[..., Any] = lambda layer, x: layer(x)
    draws: bool = False

    def inputs(self) -> jax.Array:
        """Standard normals, or integers up to some hundreds."""
        x = jax.random.normal(jax.random.key(0), self.shape)
        return jnp.abs(x * 100).astype(jnp.int32) if self.dtype == "int32" else x.astype(self.dtype)


def _both(name: str, *args: Any, shape: tuple[int, ...], **options: Any) -> Case:
    """The layer of one name and the same arguments."""
    given = {key: options.pop(key) for key in ("dtype_of_input", "call") if key in options}
    ours: dict[str, Any] = {} if name in NO_RANDOMNESS else {"ctx": nnx.context(0)}
    return Case(
        lambda ctx: getattr(layers, name)(*args, **options, **(ours and {"ctx": ctx})),
        lambda f, rngs: getattr(f, name)(*args, **options, **(ours and {"rngs": rngs})),
        shape,
        given.get("dtype_of_input", "float32"),
        given.get("call", lambda layer, x: layer(x)),
    )


def _attention(
    shape: tuple[int, ...] = (8, 32, 64), call: Callable[..., Any] = lambda layer, x: layer(x), **options: Any
) -> Case:
    return Case(
        lambda ctx: layers.MultiHeadAttention(num_heads=4, in_features=shape[-1], **options, ctx=ctx),
        lambda f, rngs: f.MultiHeadAttention(num_heads=4, in_features=shape[-1], decode=False, **options, rngs=rngs),
        shape,
        call=call,
    )


def _rotating() -> Case:
    """Rotary positions, which are an option here and another function there."""
    return Case(
        lambda ctx: layers.MultiHeadAttention(4, 64, rotary=True, ctx=ctx),
        lambda f, rngs: f.MultiHeadAttention(
            num_heads=4,
            in_features=64,
            decode=False,
            attention_fn=functools.partial(f.dot_product_attention_with_rope, rope=f.RoPE()),
            rngs=rngs,
        ),
        (8, 32, 64),
    )


def _recurrent(cell: str, **call: Any) -> Case:
    """A cell over 16 steps."""
    return Case(
        lambda ctx: layers.RNN(getattr(layers, cell)(32, 64, ctx=ctx)),
        lambda f, rngs: f.RNN(getattr(f, cell)(32, 64, rngs=rngs), rngs=rngs),
        (8, 16, 32),
        call=lambda layer, x: layer(x, **call),
    )


def _ending(return_carry: bool) -> Case:
    """A cell over sequences of several lengths.

    Ours leaves out what lies past the end. flax's computes with it, save for the carry, so there inputs and outputs are
    masked by hand: without that the results would be other ones.
    """
    lengths = jnp.array([16, 3, 5, 7, 9, 16, 1, 2])

    def call(layer: Any, x: jax.Array) -> Any:
        valid = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
        ours = isinstance(layer, nnx.Module)
        out = layer(x if ours else jnp.where(valid, x, 0), seq_lengths=lengths, return_carry=return_carry)
        carry, y = out if return_carry else (None, out)
        y = y if ours else jnp.where(valid, y, 0)
        return y if carry is None else y + carry[:, None]

    return _recurrent("GRUCell")._replace(call=call)


def _bidirectional() -> Case:
    def make(library: Any, **random: Any) -> Any:
        return library.Bidirectional(
            library.RNN(library.GRUCell(32, 64, **random)), library.RNN(library.GRUCell(32, 64, **random))
        )

    def flax(f: Any, rngs: Any) -> Any:
        rnns = [f.RNN(f.GRUCell(32, 64, rngs=rngs), rngs=rngs) for _ in range(2)]
        return f.Bidirectional(*rnns, rngs=rngs)

    return Case(lambda ctx: make(layers, ctx=ctx), flax, (8, 16, 32))


def _dropping() -> Case:
    """Attention that drops weights, by one draw of a stream that a train step is handed, and that goes on from it."""
    return Case(
        lambda ctx: layers.MultiHeadAttention(4, 64, dropout_rate=0.1, deterministic=False, ctx=ctx),
        lambda f, rngs: f.MultiHeadAttention(
            num_heads=4, in_features=64, dropout_rate=0.1, deterministic=False, decode=False, rngs=rngs
        ),
        (8, 32, 64),
        call=lambda layer, x, **random: layer(x, **random),
        draws=True,
    )


def _wrapped(name: str, call: Callable[..., Any] = lambda layer, x: layer(x)) -> Case:
    """A norm of the weights of a Linear."""
    return Case(
        lambda ctx: getattr(layers, name)(layers.Linear(64, 128, ctx=ctx), ctx=ctx),
        lambda f, rngs: getattr(f, name)(f.Linear(64, 128, rngs=rngs), rngs=rngs),
        (32, 64),
        call=call,
    )


_MASK = jnp.tril(jnp.ones((1, 1, 32, 32), bool))
_IMAGE = (8, 16, 16, 16)

CASES = {
    "Linear": _both("Linear", 128, 128, shape=(64, 128)),
    "Linear, no bias": _both("Linear", 128, 128, use_bias=False, shape=(64, 128)),
    "Linear, bfloat16": _both("Linear", 128, 128, dtype=jnp.bfloat16, shape=(64, 128)),
    "Linear, a vector": _both("Linear", 128, 128, shape=(128,)),
    "LinearGeneral": _both("LinearGeneral", 128, (4, 32), shape=(64, 128)),
    "LinearGeneral, two axes": _both("LinearGeneral", (4, 32), 128, axis=(-2, -1), shape=(64, 4, 32)),
    "Einsum": _both("Einsum", "...a,abc->...bc", (64, 4, 32), (4, 32), shape=(64, 64)),
    "Embed": _both("Embed", 1000, 64, shape=(16, 32), dtype_of_input="int32"),
    "Embed, attend": _both("Embed", 1000, 64, shape=(32, 64), call=lambda layer, x: layer.attend(x)),
    "LoRALinear": _both("LoRALinear", 64, 128, lora_rank=4, shape=(64, 64)),
    "Conv": _both("Conv", 16, 32, (3, 3), shape=_IMAGE),
    "Conv, strided": _both("Conv", 16, 32, (3, 3), 2, shape=_IMAGE),
    "Conv, groups": _both("Conv", 16, 32, (3, 3), feature_group_count=4, shape=_IMAGE),
    "Conv, dilated": _both("Conv", 16, 32, (3, 3), kernel_dilation=2, padding="VALID", shape=_IMAGE),
    "Conv, CIRCULAR": _both("Conv", 16, 32, (3, 3), padding="CIRCULAR", shape=_IMAGE),
    "Conv, REFLECT": _both("Conv", 16, 32, (3, 3), padding="REFLECT", shape=_IMAGE),
    "Conv, CAUSAL": _both("Conv", 16, 32, 3, padding="CAUSAL", shape=(8, 32, 16)),
    "Conv, two batch axes": _both("Conv", 16, 32, (3, 3), shape=(2, *_IMAGE)),
    "ConvTranspose": _both("ConvTranspose", 16, 32, (3, 3), 2, shape=(8, 8, 8, 16)),
    "ConvTranspose, CIRCULAR": _both("ConvTranspose", 16, 32, (3, 3), 2, padding="CIRCULAR", shape=(8, 8, 8, 16)),
    "ConvTranspose, transposed kernel": _both(
        "ConvTranspose", 16, 32, (3, 3), 2, transpose_kernel=True, shape=(8, 8, 8, 16)
    ),
    "BatchNorm": _both("BatchNorm", 64, use_running_average=False, shape=(256, 64)),
    "BatchNorm, images": _both("BatchNorm", 16, use_running_average=False, shape=_IMAGE),
    "BatchNorm, running": _both("BatchNorm", 64, use_running_average=True, shape=(256, 64)),
    "BatchNorm, bfloat16": _both(
        "BatchNorm", 64, use_running_average=False, dtype=jnp.bfloat16, shape=(256, 64), dtype_of_input="bfloat16"
    ),
    "LayerNorm": _both("LayerNorm", 128, shape=(64, 128)),
    "LayerNorm, bfloat16": _both("LayerNorm", 128, dtype=jnp.bfloat16, shape=(64, 128), dtype_of_input="bfloat16"),
    "RMSNorm": _both("RMSNorm", 128, shape=(64, 128)),
    "GroupNorm": _both("GroupNorm", 64, num_groups=8, shape=(16, 32, 64)),
    "InstanceNorm": _both("InstanceNorm", 16, shape=_IMAGE),
    "WeightNorm": _wrapped("WeightNorm"),
    "SpectralNorm": _wrapped("SpectralNorm", lambda layer, x: layer(x, update_stats=True)),
    "PReLU": _both("PReLU", shape=(64, 128)),
    "MultiHeadAttention": _attention(),
    "MultiHeadAttention, causal": _attention(call=lambda layer, x: layer(x, is_causal=True)),
    "MultiHeadAttention, mask": _attention(call=lambda layer, x: layer(x, mask=_MASK)),
    "MultiHeadAttention, grouped": _attention(num_kv_heads=2),
    "MultiHeadAttention, qk norm": _attention(normalize_qk=True),
    "MultiHeadAttention, bfloat16": _attention(dtype=jnp.bfloat16),
    "MultiHeadAttention, highest": _attention(precision="highest"),
    "MultiHeadAttention, dropout": _dropping(),
    "MultiHeadAttention, rotary": _rotating(),
    "LSTMCell": _recurrent("LSTMCell"),
    "OptimizedLSTMCell": _recurrent("OptimizedLSTMCell"),
    "GRUCell": _recurrent("GRUCell"),
    "SimpleCell": _recurrent("SimpleCell"),
    "GRUCell, reversed": _recurrent("GRUCell", reverse=True, keep_order=True),
    "GRUCell, lengths": _ending(return_carry=False),
    "GRUCell, lengths and carry": _ending(return_carry=True),
    "Bidirectional": _bidirectional(),
}
