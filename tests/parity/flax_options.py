"""The cases of what many layers of flax.nnx may be given: functions in the place of JAX's, and dtypes of products."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tests.parity.cases import Case


def leveled(arrays, *, dtype=None, inexact=True):
    """In the place of `promote_dtype`: another factor for each operand, so that each counts, and in which order."""
    levels = (1 + 0.25 * level for level in range(len(arrays)))
    common = jnp.result_type(*(x for x in arrays if x is not None)) if dtype is None else dtype
    return tuple(None if x is None else (x * level).astype(common) for x, level in zip(arrays, levels, strict=True))


def doubled_dot(*args, **kwargs):
    """In the place of `lax.dot_general`."""
    return 2 * lax.dot_general(*args, **kwargs)


def doubled_einsum(*args, **kwargs):
    """In the place of `jnp.einsum`."""
    return 2 * jnp.einsum(*args, **kwargs)


def doubled_convolution(*args, **kwargs):
    """In the place of `lax.conv_general_dilated`."""
    return 2 * lax.conv_general_dilated(*args, **kwargs)


def make_doubled_dot():
    """In the place of a class of such functions."""
    return doubled_dot


def _step(cell, x, *carry):
    return cell(carry if len(carry) > 1 else carry[0], x)


def _attend(layer, query):
    return layer.attend(query)


_PRODUCTS = {
    "Linear": ((5, 7), {}, (3, 5)),
    "LinearGeneral": ((5, (2, 3)), {}, (3, 5)),
    "Einsum": (("...a,ab->...b", (5, 7), (7,)), {}, (3, 5)),
    "Conv": ((4, 6, (3,)), {}, (2, 7, 4)),
    "ConvTranspose": ((4, 6, (3,)), {"strides": 2}, (2, 5, 4)),
}

_INDICES = np.array([[0, 3, 8], [8, 1, 3]], np.int32)
_MASK = np.arange(15).reshape(3, 5) % 4 != 1
_CELLS = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell")
_OF_ATTENTION = ("qkv_promote_dtype", "out_promote_dtype", "ln_promote_dtype")

_PROMOTE = [
    *(
        Case(name, args, {"promote_dtype": leveled, **options, **more}, (shape,))
        for name, (args, options, shape) in _PRODUCTS.items()
        for more in ({}, {"dtype": "float16"} if name == "Linear" else {"param_dtype": "float16"})
    ),
    Case("Linear", (5, 7), {"promote_dtype": leveled, "use_bias": False}, ((3, 5),)),
    Case("Embed", (9, 4), {"promote_dtype": leveled}, (_INDICES,)),
    Case("Embed", (9, 4), {"promote_dtype": leveled}, ((3, 4),), run=_attend, note="attend"),
    Case("PReLU", (), {"promote_dtype": leveled, "dtype": "float32"}, ((3, 5),)),
    *(
        Case("BatchNorm", (5,), {"promote_dtype": leveled}, ((6, 5),), {"use_running_average": running})
        for running in (True, False)
    ),
    *(
        Case(name, args, {"promote_dtype": leveled, **options}, ((3, 4, 6),))
        for name, args in (("LayerNorm", (6,)), ("RMSNorm", (6,)), ("GroupNorm", (6, 3)), ("InstanceNorm", (6,)))
        for options in ({}, {"use_scale": False})
    ),
    Case("LoRA", (5, 2, 7), {"promote_dtype": leveled}, ((3, 5),)),
    *(
        Case("LoRALinear", (5, 7), {"lora_rank": 2, name: leveled}, ((3, 5),))
        for name in ("promote_dtype", "lora_promote_dtype")
    ),
    *(
        Case(
            name,
            (5, 4),
            {"promote_dtype": leveled},
            ((3, 5), *((3, 4),) * (2 if "LSTM" in name else 1)),
            run=_step,
        )
        for name in _CELLS
    ),
    *(
        Case(
            "MultiHeadAttention",
            options={"num_heads": 4, "in_features": 12, "normalize_qk": True, name: leveled},
            inputs=((2, 5, 12),),
        )
        for name in _OF_ATTENTION
    ),
    Case("dot_product_attention", inputs=((2, 5, 4, 6),) * 3, call={"promote_dtype": leveled}),
]

_FUNCTIONS = [
    *(
        Case(name, args, {option: function, **options, **more}, (shape,))
        for name, option, function in (
            ("Linear", "dot_general", doubled_dot),
            ("LinearGeneral", "dot_general", doubled_dot),
            ("LinearGeneral", "dot_general_cls", make_doubled_dot),
            ("Einsum", "einsum_op", doubled_einsum),
            ("Conv", "conv_general_dilated", doubled_convolution),
        )
        for args, options, shape in (_PRODUCTS[name],)
        for more in ({}, {"precision": "highest"})
    ),
    *(
        Case("Conv", (4, 6, (3,)), {"conv_general_dilated": doubled_convolution, "padding": padding}, ((2, 7, 4),))
        for padding in ("CIRCULAR", "REFLECT", "CAUSAL")
    ),
]

_PREFERRED = [
    *(
        Case(name, args, {"preferred_element_type": "float32", **options}, (shape,), numbers=numbers)
        for name, (args, options, shape) in _PRODUCTS.items()
        for numbers in ("bfloat16", "float32 in bfloat16")
    ),
    *(
        Case(
            name, *_PRODUCTS[name][:1], {"preferred_element_type": "bfloat16", **more}, (_PRODUCTS[name][2],), numbers=n
        )
        for name, more in (("Linear", {}), ("Linear", {"use_bias": False}), ("LinearGeneral", {}), ("Einsum", {}))
        for n in ("bfloat16 by float32",)
    ),
]

_BATCHED = [
    *(
        Case("LinearGeneral", (inputs, outputs), {"axis": axis, "batch_axis": batch, "use_bias": bias}, (shape,))
        for bias in (True, False)
        for inputs, outputs, axis, batch, shape in (
            (5, 7, -1, {0: 3}, (3, 5)),
            (5, (2, 4), -1, {0: 3}, (3, 6, 5)),
            ((4, 5), 7, (-2, -1), {0: 2}, (2, 4, 5)),
            (5, 7, 2, {0: 2, 1: 3}, (2, 3, 5, 4)),
            ((4, 5), (2, 3), (1, 3), {0: 2}, (2, 4, 6, 5)),
        )
    ),
    *(
        Case("LinearGeneral", (5, 7), {"batch_axis": {0: 3}}, ((3, 2, 5),), numbers=numbers)
        for numbers in ("float64", "bfloat16", "bfloat16 in float32")
    ),
]


def _with_carry(name):
    def make(new, **options):
        with warnings.catch_warnings():  # flax would rather have it given to `initialize_carry`
            warnings.simplefilter("ignore")
            cell = new(name, 5, 4, carry_init=jax.nn.initializers.ones, **options)
        return new("RNN", cell)

    return Case("RNN", inputs=((2, 3, 5),), make=make, note=f"{name} with a carry_init")


def _positioned(query, key, value, *, input_positions, mask=None, **_):
    """An `attention_fn` that knows of positions."""
    weights = jnp.cos(input_positions)[..., None, None]
    return jax.nn.dot_product_attention(query * weights, key, value, mask=mask)


_POSITIONS = np.array([[3.0, 1.0, 0.0, 2.0, 5.0]], np.float32)

_ARGUMENTS = [
    *(_with_carry(name) for name in _CELLS),
    Case("MultiHeadAttention", (4, 12, 8, 5, 2, 6), {}, ((2, 5, 12), (2, 7, 6))),
    Case(
        "MultiHeadAttention",
        options={"num_heads": 4, "in_features": 12, "attention_fn": _positioned},
        inputs=((2, 5, 12),),
        call={"input_positions": _POSITIONS},
    ),
    Case("RMSNorm", (5,), {}, ((3, 5),), run=lambda layer, x: layer(x, _MASK), note="mask by position"),
    *(Case("RMSNorm", (5,), {"use_fast_variance": fast}, ((3, 5),)) for fast in (True, False)),
    Case(
        "dot_product_attention",
        inputs=((2, 5, 4, 6),) * 3,
        run=lambda attend, q, k, v: attend(q, k, v, None, None, True, None, 0.0, True, None, None, None, leveled, True),
        note="is_causal by position",
    ),
]

CASES = [*_PROMOTE, *_FUNCTIONS, *_PREFERRED, *_BATCHED, *_ARGUMENTS]
