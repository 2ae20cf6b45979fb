"""Dtypes: one promotion rule, and no layer that promotes behind its back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx import layers
from nnx.layers import canonicalize_dtype, promote_dtype


def test_common_type_of_arrays():
    x, y, z = promote_dtype((jnp.ones(2, jnp.bfloat16), None, jnp.ones(2, jnp.float32)))
    assert x.dtype == z.dtype == jnp.float32
    assert y is None


@pytest.mark.parametrize(("given", "expected"), [("bfloat16", "bfloat16"), (jnp.float16, "float16"), (None, "float32")])
def test_dtype_wins_over_common_type(given, expected):
    x, y = promote_dtype((jnp.arange(3), np.ones(3, np.float32)), dtype=given)
    assert x.dtype.name == y.dtype.name == expected


def test_integers_become_floating_unless_told_otherwise():
    assert canonicalize_dtype(jnp.arange(3)).name == "float32"
    assert canonicalize_dtype(jnp.ones(2, bool), jnp.ones(2, jnp.float16)).name == "float16"
    assert canonicalize_dtype(jnp.arange(3), inexact=False).name == "int32"
    (x,) = promote_dtype((jnp.arange(3),), inexact=False)
    assert x.dtype == jnp.int32


def test_python_scalars_do_not_widen():
    assert canonicalize_dtype(jnp.ones(2, jnp.float16), 2.0).name == "float16"


def test_integer_dtype_is_refused():
    with pytest.raises(ValueError, match="floating point or complex type, got int32"):
        promote_dtype((jnp.ones(2),), dtype=jnp.int32)


# Each with the shape of an input. Norms have no kernel, so their initializers are left alone.
LAYERS = {
    "Linear": (lambda init, **kw: nnx.Linear(4, 6, **init, **kw), (2, 4)),
    "LinearGeneral": (lambda init, **kw: nnx.LinearGeneral(4, (2, 3), **init, **kw), (2, 4)),
    "MLP": (lambda init, **kw: nnx.MLP(4, (5,), 3, **init, **kw), (2, 4)),
    "Einsum": (lambda init, **kw: nnx.Einsum("nta,hab->nthb", (2, 4, 3), (2, 3), **init, **kw), (2, 5, 4)),
    "Conv": (lambda init, **kw: nnx.Conv(4, 6, (3,), **init, **kw), (2, 5, 4)),
    "ConvTranspose": (lambda init, **kw: nnx.ConvTranspose(4, 6, 3, 2, padding="CIRCULAR", **init, **kw), (2, 4, 4)),
    "LayerNorm": (lambda _, **kw: nnx.LayerNorm(4, **kw), (2, 4)),
    "RMSNorm": (lambda _, **kw: nnx.RMSNorm(4, **kw), (2, 4)),
    "GroupNorm": (lambda _, **kw: nnx.GroupNorm(4, 2, **kw), (2, 5, 4)),
    "InstanceNorm": (lambda _, **kw: nnx.InstanceNorm(4, **kw), (2, 5, 4)),
    "BatchNorm": (lambda _, **kw: nnx.BatchNorm(4, use_running_average=False, **kw), (8, 4)),
    "BatchNorm evaluated": (lambda _, **kw: nnx.BatchNorm(4, use_running_average=True, **kw), (8, 4)),
    "MultiHeadAttention": (lambda init, **kw: nnx.MultiHeadAttention(2, 4, normalize_qk=True, **init, **kw), (2, 3, 4)),
    "MultiHeadAttention precise": (
        lambda init, **kw: nnx.MultiHeadAttention(2, 4, precision="highest", **init, **kw),
        (2, 3, 4),
    ),
    "LSTMCell": (lambda init, **kw: recurrent(nnx.LSTMCell, init, **kw), (2, 5, 4)),
    "OptimizedLSTMCell": (lambda init, **kw: recurrent(nnx.OptimizedLSTMCell, init, **kw), (2, 5, 4)),
    "GRUCell": (lambda init, **kw: recurrent(nnx.GRUCell, init, **kw), (2, 5, 4)),
    "SimpleCell": (lambda init, **kw: recurrent(nnx.SimpleCell, init, **({"dtype": None} | kw)), (2, 5, 4)),
}


def recurrent(cell, init, **options):
    return nnx.RNN(cell(4, 3, **init, recurrent_kernel_init=init["kernel_init"], **options))


@nnx.jit
def call(layer, x):
    return layer(x)


def as_single(y):
    return np.asarray(y).astype(np.float32)


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", LAYERS)
def test_output_dtype(name, low, normal, both):
    make, shape = LAYERS[name]
    x = normal(*shape)
    exact = call(make(both, ctx=nnx.context(0)), x)
    assert exact.dtype == jnp.float32

    # dtype alone decides what comes out, whatever goes in; inside, nothing is promoted without saying so.
    with jax.numpy_dtype_promotion("strict"):
        computed_low = call(make(both, dtype=low, ctx=nnx.context(0)), x)
    assert computed_low.dtype == low
    np.testing.assert_allclose(as_single(computed_low), exact, atol=0.05, rtol=0.05)

    # Without it, inputs and parameters decide together.
    both_low = make(both, param_dtype=low, ctx=nnx.context(0))
    with jax.numpy_dtype_promotion("strict"):
        from_low = call(both_low, jnp.asarray(x, low))
    assert from_low.dtype == low
    from_single = call(both_low, x)
    assert from_single.dtype == jnp.float32
    np.testing.assert_allclose(as_single(from_low), from_single, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_finite_in_half_precision(name, normal, both):
    make, shape = LAYERS[name]
    layer = make(both, dtype=jnp.float16, param_dtype=jnp.float16, ctx=nnx.context(0))

    @nnx.jit
    def gradients(layer, x):
        return nnx.grad(lambda layer, x: jnp.sum(layer(x).astype(jnp.float32) ** 2), argnums=(0, 1))(layer, x)

    of_layer, of_input = gradients(layer, normal(*shape, dtype="float16"))
    assert of_input.dtype == jnp.float16
    for gradient in jax.tree.leaves((of_layer, of_input)):
        assert np.isfinite(as_single(gradient)).all()


# Every Module of `layers`: how it is made, and the shape of an input, whose dtype is low unless it says otherwise.
EVERY = {
    "AdaptiveAvgPool": (lambda **_: nnx.AdaptiveAvgPool(2), (2, 5, 3)),
    "AdaptiveMaxPool": (lambda **_: nnx.AdaptiveMaxPool(2), (2, 5, 3)),
    "AvgPool": (lambda **_: nnx.AvgPool((2,)), (2, 4, 3)),
    "BatchNorm": (lambda **kw: nnx.BatchNorm(4, use_running_average=False, **kw), (8, 4)),
    "Bidirectional": (lambda **kw: nnx.Bidirectional(*(nnx.RNN(nnx.GRUCell(4, 3, **kw)) for _ in "ab")), (2, 5, 4)),
    "Conv": (lambda **kw: nnx.Conv(4, 6, (3,), **kw), (2, 5, 4)),
    "ConvTranspose": (lambda **kw: nnx.ConvTranspose(4, 6, 3, 2, **kw), (2, 4, 4)),
    "DropPath": (lambda **_: Dropping(nnx.DropPath(0.5)), (4, 3)),
    "Dropout": (lambda **_: Dropping(nnx.Dropout(0.5)), (4, 3)),
    "Einsum": (lambda **kw: nnx.Einsum("nta,hab->nthb", (2, 4, 3), (2, 3), **kw), (2, 5, 4)),
    "Embed": (lambda **kw: nnx.Embed(5, 4, **kw), jax.ShapeDtypeStruct((2, 3), jnp.int32)),
    "GRUCell": (lambda **kw: nnx.RNN(nnx.GRUCell(4, 3, **kw)), (2, 5, 4)),
    "GlobalAvgPool": (lambda **_: nnx.GlobalAvgPool(), (2, 4, 3)),
    "GlobalMaxPool": (lambda **_: nnx.GlobalMaxPool(), (2, 4, 3)),
    "GroupNorm": (lambda **kw: nnx.GroupNorm(4, 2, **kw), (2, 5, 4)),
    "InstanceNorm": (lambda **kw: nnx.InstanceNorm(4, **kw), (2, 5, 4)),
    "LSTMCell": (lambda **kw: nnx.RNN(nnx.LSTMCell(4, 3, **kw)), (2, 5, 4)),
    "LayerNorm": (lambda **kw: nnx.LayerNorm(4, **kw), (2, 4)),
    "Linear": (lambda **kw: nnx.Linear(4, 6, **kw), (2, 4)),
    "LinearGeneral": (lambda **kw: nnx.LinearGeneral(4, (2, 3), **kw), (2, 4)),
    "LoRA": (lambda **kw: nnx.LoRA(4, 2, 6, **kw), (2, 4)),
    "LoRALinear": (lambda **kw: nnx.LoRALinear(4, 6, lora_rank=2, **lora(kw)), (2, 4)),
    "LoRALinearGeneral": (lambda **kw: nnx.LoRALinearGeneral(4, (2, 3), lora_rank=2, **lora(kw)), (2, 4)),
    "MLP": (lambda **kw: nnx.MLP(4, (5,), 3, **kw), (2, 4)),
    "MaxPool": (lambda **_: nnx.MaxPool((2,)), (2, 4, 3)),
    "MinPool": (lambda **_: nnx.MinPool((2,)), (2, 4, 3)),
    "MultiHeadAttention": (
        lambda **kw: nnx.MultiHeadAttention(2, 8, normalize_qk=True, rotary=True, is_causal=True, **kw),
        (2, 3, 8),
    ),
    "OptimizedLSTMCell": (lambda **kw: nnx.RNN(nnx.OptimizedLSTMCell(4, 3, **kw)), (2, 5, 4)),
    "PReLU": (lambda ctx, **kw: nnx.PReLU(**kw), (2, 4)),
    "RMSNorm": (lambda **kw: nnx.RMSNorm(4, **kw), (2, 4)),
    "RNN": (lambda **kw: nnx.RNN(nnx.GRUCell(4, 3, **kw), reverse=True), (2, 5, 4)),
    "RotaryEmbedding": (lambda **_: nnx.RotaryEmbedding(4), (5, 2, 4)),
    # Computes in float32 by default, as in flax.
    "SimpleCell": (lambda **kw: nnx.RNN(nnx.SimpleCell(4, 3, **({"dtype": None} | kw))), (2, 5, 4)),
    "SpectralNorm": (lambda **kw: wrapped(nnx.SpectralNorm, **kw), (2, 4)),
    "WeightNorm": (lambda **kw: wrapped(nnx.WeightNorm, **kw), (2, 4)),
}


class Dropping(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x, deterministic=False, ctx=nnx.context(dropout=0))


def lora(options):
    """With the same dtypes for the map of low rank, which has arguments of its own."""
    return options | {f"lora_{name}": options[name] for name in ("dtype", "param_dtype") if name in options}


def wrapped(norm, **options):
    """The norm keeps its statistics in float32, and its scales in what it is told."""
    return norm(nnx.Linear(4, 6, **options), **options)


def test_no_layer_is_left_out():
    modules = {
        name
        for name in layers.__all__
        if isinstance(made := getattr(layers, name), type) and issubclass(made, nnx.Module)
    }
    assert {*EVERY} == modules - {"RNNCellBase"}


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", EVERY)
def test_no_layer_promotes(name, low):
    """Abstractly: what comes out, and the gradients, are as low as inputs and parameters, or as `dtype` says."""
    make, shape = EVERY[name]
    x = jax.ShapeDtypeStruct(shape, low) if isinstance(shape, tuple) else shape

    def forward(layer, x):
        y = layer(x)
        return y.astype(jnp.float32).sum(), y

    def gradients(x):
        by = 0 if x.dtype == jnp.int32 else (0, 1)
        return nnx.value_and_grad(forward, argnums=by, has_aux=True)(make(ctx=nnx.context(0), param_dtype=low), x)

    def told(x):
        return make(ctx=nnx.context(0), dtype=low)(x)

    with jax.numpy_dtype_promotion("strict"):
        (_, y), found = jax.eval_shape(gradients, x)
        assert y.dtype == low
        floats = {leaf.dtype for leaf in jax.tree.leaves(found) if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert floats == {jnp.dtype(low)}
        assert jax.eval_shape(told, x).dtype == low
