"""Embed: lookups, their edges, and attention back to the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


@pytest.fixture
def layer():
    return nnx.Embed(10, 4, ctx=nnx.context(0))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_lookup(layer, shape, rng):
    indices = rng.integers(0, 10, shape)
    np.testing.assert_array_equal(layer(jnp.asarray(indices)), np.asarray(layer.embedding)[indices])


def test_edges(layer):
    table = np.asarray(layer.embedding)
    np.testing.assert_array_equal(layer(jnp.array([-1, 9])), table[[-1, 9]])
    assert bool(jnp.isnan(layer(jnp.array([10, -11]))).all())


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
def test_any_integers(layer, dtype):
    np.testing.assert_array_equal(layer(jnp.array([3], dtype)), layer.embedding[3:4])


def test_one_vector():
    layer = nnx.Embed(1, 4, ctx=nnx.context(0))
    np.testing.assert_array_equal(layer(jnp.zeros((2, 3), int)), np.broadcast_to(layer.embedding, (2, 3, 4)))


def test_attend(layer, rng):
    query = rng.normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(
        layer.attend(jnp.asarray(query)), query @ np.asarray(layer.embedding).T, rtol=1e-5, atol=1e-6
    )


def test_dtypes():
    layer = nnx.Embed(10, 4, dtype=jnp.bfloat16, ctx=nnx.context(0))
    assert layer.embedding.dtype == jnp.float32
    assert layer(jnp.array([1])).dtype == jnp.bfloat16
    assert layer.attend(jnp.ones((2, 4))).dtype == jnp.bfloat16
    assert nnx.Embed(10, 4, param_dtype=jnp.float16, ctx=nnx.context(0))(jnp.array([1])).dtype == jnp.float16


def test_vectors_start_with_unit_norm():
    layer = nnx.Embed(1000, 64, ctx=nnx.context(0))
    assert float(jnp.mean(jnp.sum(layer.embedding**2, -1))) == pytest.approx(1, rel=0.03)


def test_gradient_reaches_only_what_was_looked_up(layer):
    def loss(table):
        layer = nnx.Embed(10, 4, embedding_init=lambda *_: table, ctx=nnx.context(0))
        return layer(jnp.array([2, 2, 5])).sum()

    gradient = jax.grad(loss)(layer.embedding)
    np.testing.assert_array_equal(gradient.sum(-1), [0, 0, 8, 0, 0, 4, 0, 0, 0, 0])


def test_errors(layer):
    with pytest.raises(nnx.ShapeError, match="Embed: expected integer `inputs`, got dtype float32"):
        layer(jnp.ones(2))
    with pytest.raises(
        nnx.ShapeError, match=r"Embed: expected `query` of shape \[\.\.\., 4\] \(features=4\), got \(2, 3\)"
    ):
        layer.attend(jnp.ones((2, 3)))
