"""Dtypes: one promotion rule, and no layer that promotes behind its back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
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


LAYERS = {
    "Linear": (lambda **kw: nnx.Linear(4, 6, **kw), (2, 4)),
    "LinearGeneral": (lambda **kw: nnx.LinearGeneral(4, (2, 3), **kw), (2, 4)),
    "MLP": (lambda **kw: nnx.MLP(4, (5,), 3, **kw), (2, 4)),
    "Conv": (lambda **kw: nnx.Conv(4, 6, (3,), **kw), (2, 5, 4)),
    "LayerNorm": (lambda **kw: nnx.LayerNorm(4, **kw), (2, 4)),
    "RMSNorm": (lambda **kw: nnx.RMSNorm(4, **kw), (2, 4)),
    "GroupNorm": (lambda **kw: nnx.GroupNorm(4, 2, **kw), (2, 5, 4)),
    "BatchNorm": (lambda **kw: nnx.BatchNorm(4, use_running_average=False, **kw), (8, 4)),
    "BatchNorm evaluated": (lambda **kw: nnx.BatchNorm(4, use_running_average=True, **kw), (8, 4)),
    "MultiHeadAttention": (lambda **kw: nnx.MultiHeadAttention(2, 4, normalize_qk=True, **kw), (2, 3, 4)),
    "MultiHeadAttention precise": (lambda **kw: nnx.MultiHeadAttention(2, 4, precision="highest", **kw), (2, 3, 4)),
}


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", LAYERS)
def test_output_dtype(name, low, key):
    make, shape = LAYERS[name]
    x = jax.random.normal(key, shape)
    exact = make(ctx=nnx.context(0))(x)
    assert exact.dtype == jnp.float32

    # dtype alone decides what comes out, whatever goes in.
    computed_low = make(dtype=low, ctx=nnx.context(0))(x)
    assert computed_low.dtype == low
    np.testing.assert_allclose(computed_low.astype(jnp.float32), exact, atol=0.05, rtol=0.05)

    # Without it, inputs and parameters decide together.
    both_low = make(param_dtype=low, ctx=nnx.context(0))
    assert both_low(x.astype(low)).dtype == low
    assert both_low(x).dtype == jnp.float32
    np.testing.assert_allclose(both_low(x.astype(low)).astype(jnp.float32), both_low(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_implicit_promotion_inside(name, low, key):
    make, shape = LAYERS[name]
    layer = make(dtype=low, ctx=nnx.context(0))
    with jax.numpy_dtype_promotion("strict"):
        assert layer(jax.random.normal(key, shape, low)).dtype == low


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_finite_in_half_precision(name, key):
    make, shape = LAYERS[name]
    x = jax.random.normal(key, shape, jnp.float16)

    def loss(x):
        return jnp.sum(make(dtype=jnp.float16, param_dtype=jnp.float16, ctx=nnx.context(0))(x).astype(jnp.float32) ** 2)

    gradient = jax.grad(loss)(x)
    assert gradient.dtype == jnp.float16
    assert bool(jnp.isfinite(gradient).all())
