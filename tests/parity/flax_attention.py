"""The cases of attention and of its masks against flax.nnx."""

import jax.numpy as jnp
import numpy as np
from tests.parity.cases import Case
from tests.parity.flax_linear import DTYPES

import nnx

# In float16 flax asks for a product that a CPU lacks.
_NUMBERS = tuple(numbers for numbers in DTYPES if numbers != "float16")

_RANDOM = np.random.default_rng(0)


def _mask(*shape):
    """A mask that hides a third, and never the first key."""
    mask = _RANDOM.random(shape) < 0.7
    mask[..., 0] = True
    return mask


_HIDDEN = _mask(2, 1, 5, 5)
_HIDDEN[0, 0, 3] = False

_Q, _KV = (2, 5, 12), (2, 7, 12)


def _attention(options, inputs, call=None, numbers="float32", note=""):
    return Case(
        "MultiHeadAttention",
        options={"num_heads": 4, "in_features": 12, **options},
        inputs=inputs,
        call=call or {},
        numbers=numbers,
        note=note,
    )


_LAYER = [
    *(
        _attention(options, (_Q,), call)
        for options in ({}, {"use_bias": False}, {"normalize_qk": True}, {"num_kv_heads": 2}, {"num_kv_heads": 1})
        for call in ({}, {"is_causal": True}, {"mask": _mask(2, 1, 5, 5)})
    ),
    *(
        _attention(options, (_Q,))
        for options in (
            {"qkv_features": 8},
            {"out_features": 5},
            {"qkv_features": 24, "out_features": 7, "num_kv_heads": 2, "normalize_qk": True},
            {"precision": "highest"},
        )
    ),
    *(_attention({}, (_Q,), {"mask": mask}) for mask in (_mask(1, 1, 5, 5), _mask(2, 4, 5, 5), _mask(2, 1, 1, 5))),
    _attention({}, (_Q,), {"mask": _HIDDEN}, note="a query sees nothing"),
    _attention({}, (_Q,), {"mask": _mask(2, 1, 5, 5).astype(np.float32)}),
    _attention({}, (_Q,), {"mask": _mask(2, 1, 5, 5), "is_causal": True}),
    *(
        _attention(options, (_Q, _KV), call)
        for options in ({}, {"num_kv_heads": 2}, {"normalize_qk": True})
        for call in ({}, {"mask": _mask(2, 1, 5, 7)})
    ),
    _attention({}, (_Q, _KV, _KV)),
    _attention({"in_kv_features": 6}, (_Q, (2, 7, 6))),
    _attention({"in_kv_features": 6, "num_kv_heads": 2}, (_Q, (2, 7, 6), (2, 7, 6)), {"mask": _mask(2, 1, 5, 7)}),
    *(_attention({}, (shape,)) for shape in ((5, 12), (2, 3, 5, 12), (2, 1, 12))),
    *(_attention({}, (_Q,), {"is_causal": True}, numbers) for numbers in _NUMBERS),
    *(_attention({"normalize_qk": True, "num_kv_heads": 2}, (_Q,), {}, numbers) for numbers in _NUMBERS),
]


def _rotating(options, inputs, call=None):
    def make(new, **options):
        return new("MultiHeadAttention", num_heads=3, in_features=12, rotary=new("RotaryEmbedding", 4), **options)

    return Case("MultiHeadAttention", options=options, inputs=inputs, call=call or {}, make=make, note="rotary")


def _turn(layer, x):
    """Positions from 0; flax has the heads before the positions."""
    if isinstance(layer, nnx.RotaryEmbedding):
        return layer(x, jnp.arange(x.shape[-3]))
    return jnp.moveaxis(layer(jnp.moveaxis(x, -2, -3)), -3, -2)


_ROTARY = [
    *(_rotating(options, (_Q,), call) for options in ({}, {"num_kv_heads": 1}) for call in ({}, {"is_causal": True})),
    _rotating({"normalize_qk": True}, (_Q,), {"mask": _mask(2, 1, 5, 5)}),
    *(
        Case(
            "RotaryEmbedding",
            (shape[-1],),
            {"base": base},
            (shape,),
            make=lambda new, shape=shape, **options: new("RotaryEmbedding", shape[-1], **options),
            run=_turn,
        )
        for shape in ((5, 3, 8), (2, 5, 3, 6), (2, 1, 9, 1, 2))
        for base in (10_000.0, 100.0)
    ),
]

_HEADS = ((2, 5, 4, 6), (2, 7, 4, 6), (2, 7, 4, 6))
_GROUPED = ((2, 5, 4, 6), (2, 7, 2, 6), (2, 7, 2, 6))
_SQUARE = ((2, 5, 4, 6),) * 3

_FUNCTION = [
    *(
        Case("dot_product_attention", inputs=inputs, call=call)
        for inputs in (_HEADS, _GROUPED)
        for call in (
            {},
            {"mask": _mask(2, 4, 5, 7)},
            {"mask": _mask(1, 1, 5, 7)},
            {"bias": _RANDOM.normal(size=(2, 4, 5, 7)).astype(np.float32)},
            {"bias": _RANDOM.normal(size=(1, 4, 5, 7)).astype(np.float32), "mask": _mask(2, 1, 5, 7)},
            {"precision": "highest"},
            {"precision": "highest", "mask": _mask(2, 4, 5, 7)},
        )
    ),
    *(
        Case("dot_product_attention", inputs=_SQUARE, call={"is_causal": True, **call})
        for call in ({}, {"mask": _mask(2, 4, 5, 5)}, {"precision": "highest"})
    ),
    *(
        Case("dot_product_attention", inputs=_HEADS, call=call, numbers=numbers)
        for numbers in ("float64", "bfloat16")
        for call in ({}, {"mask": _mask(2, 1, 5, 7)})
    ),
    Case("dot_product_attention", inputs=((3, *_HEADS[0]), (3, *_HEADS[1]), (3, *_HEADS[2])), note="two batch axes"),
]

_TOKENS = np.array([[1, 1, 0, 1], [1, 0, 0, 0]], np.int32)

_MASKS = [
    *(
        Case("make_causal_mask", inputs=(shape,), call=call)
        for shape in ((4,), (2, 4))
        for call in ({}, {"dtype": bool})
    ),
    Case("make_causal_mask", inputs=((2, 4),), call={"extra_batch_dims": 2}),
    *(
        Case("make_attention_mask", inputs=(_TOKENS, _TOKENS[:, :3]), call=call)
        for call in ({}, {"dtype": bool}, {"pairwise_fn": jnp.greater_equal}, {"extra_batch_dims": 1})
    ),
    Case("combine_masks", inputs=(_mask(2, 1, 4, 4), _mask(1, 1, 4, 4))),
    Case("combine_masks", inputs=(_mask(2, 1, 4, 4), _mask(2, 3, 4, 4)), call={"dtype": bool}),
]

CASES = [*_LAYER, *_ROTARY, *_FUNCTION, *_MASKS]
