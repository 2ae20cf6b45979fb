"""Activations: their formulas, their dtypes, their gradients at the awkward points."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import nnx

NAMES = [
    "celu",
    "elu",
    "gelu",
    "glu",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "leaky_relu",
    "log_sigmoid",
    "log_softmax",
    "logsumexp",
    "one_hot",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "soft_sign",
    "softmax",
    "softplus",
    "standardize",
    "swish",
    "tanh",
    "normalize",
    "mish",
    "identity",
]

sigmoid = np.vectorize(lambda v: 1 / (1 + math.exp(-v)))
erf = np.vectorize(math.erf)
X = np.array([-50.0, -6.0, -3.0, -1.0, -0.25, 0.0, 0.5, 1.0, 2.5, 3.0, 6.5, 50.0])

FORMULAS = {
    "celu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hard_silu": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "identity": lambda x: x,
    "leaky_relu": lambda x: np.where(x >= 0, x, 0.01 * x),
    "log_sigmoid": lambda x: -np.log1p(np.exp(-np.abs(x))) + np.minimum(x, 0),
    "log_softmax": lambda x: x - x.max() - np.log(np.exp(x - x.max()).sum()),
    "logsumexp": lambda x: x.max() + np.log(np.exp(x - x.max()).sum()),
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "normalize": lambda x: (x - x.mean()) / np.sqrt(x.var() + 1e-5),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0))),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "soft_sign": lambda x: x / (np.abs(x) + 1),
    "softmax": lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum(),
    "softplus": lambda x: np.logaddexp(x, 0),
    "standardize": lambda x: (x - x.mean()) / np.sqrt(x.var() + 1e-5),
    "swish": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
}


def test_every_name_is_exported():
    assert set(NAMES) <= set(nnx.layers.__all__)
    assert set(FORMULAS) == set(NAMES) - {"glu", "one_hot"}


@functools.cache
def outputs_and_gradients(dtype):
    """Those of all activations at X, compiled as one."""

    def run(x):
        outputs = {name: getattr(nnx, name)(x) for name in FORMULAS}
        gradients = {
            name: jax.grad(lambda x, name=name: getattr(nnx, name)(x).sum().astype(jnp.float32))(x) for name in FORMULAS
        }
        return outputs, gradients

    return jax.jit(run)(jnp.asarray(X, dtype))


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    np.testing.assert_allclose(outputs_and_gradients("float32")[0][name], FORMULAS[name](X), rtol=2e-5, atol=2e-6)


def test_exact_gelu():
    np.testing.assert_allclose(
        nnx.gelu(jnp.asarray(X, jnp.float32), approximate=False),
        X * (1 + erf(X / math.sqrt(2))) / 2,
        rtol=1e-5,
        atol=1e-6,
    )


def test_glu_and_one_hot():
    x = np.linspace(-2, 2, 12).reshape(2, 6)
    np.testing.assert_allclose(nnx.glu(jnp.asarray(x, jnp.float32)), x[:, :3] * sigmoid(x[:, 3:]), rtol=1e-5)
    np.testing.assert_array_equal(nnx.one_hot(jnp.array([2, 0, 5]), 3), [[0, 0, 1], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", FORMULAS)
def test_dtype_stays_and_gradients_are_finite(name, dtype):
    outputs, gradients = outputs_and_gradients(dtype)
    assert outputs[name].dtype == dtype
    assert np.isfinite(np.asarray(gradients[name]).astype(np.float32)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_prelu(dtype):
    layer = nnx.PReLU(0.2)
    assert layer.negative_slope.shape == ()
    assert layer.negative_slope.dtype == jnp.float32
    x = jnp.asarray([-5.0, 0.0, 2.0], dtype)
    with jax.numpy_dtype_promotion("strict"):
        y = layer(x)
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), [-1, 0, 2], rtol=1e-2)


def test_prelu_computes_in_its_dtype():
    y = nnx.PReLU(0.25, dtype=jnp.bfloat16)(jnp.asarray([-2.0, 3.0]))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, [-0.5, 3])


def test_prelu_gradients_by_finite_differences(rng):
    with jax.enable_x64(True):
        state, definition = nnx.PReLU(0.2, param_dtype=jnp.float64).partition()
        x = jnp.asarray(rng.normal(size=8))
        check_grads(lambda state, x: definition.merge(state)(x), (state, x), order=1, modes=("rev",), rtol=1e-6)


def test_prelu_learns_its_slope():
    gradients = nnx.grad(lambda layer: layer(jnp.array([-5.0, 3.0])).sum())(nnx.PReLU())
    np.testing.assert_allclose(gradients["negative_slope"].value, -5)


def test_prelu_refuses_integers():
    with pytest.raises(nnx.ShapeError, match="PReLU: expected floating point `inputs`, got dtype int32"):
        nnx.PReLU()(jnp.arange(3))
