"""Rotary embeddings and sinusoids against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


def turned(x, positions, base=10_000.0, factor=1.0):
    """In complex numbers: each pair is one, and is multiplied by a phase."""
    half = x.shape[-1] // 2
    phase = np.exp(1j * positions[..., None, None] / factor / base ** (np.arange(half) / half))
    z = (x[..., :half] + 1j * x[..., half:]) * phase
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_against_complex_numbers(batch, rng):
    x = rng.normal(size=(*batch, 5, 4, 8)).astype(np.float32)
    positions = rng.integers(0, 100, (*batch, 5))
    got = nnx.RotaryEmbedding(8)(jnp.asarray(x), jnp.asarray(positions))
    np.testing.assert_allclose(got, turned(x, positions), rtol=1e-4, atol=1e-5)
    # The same positions for the whole batch.
    got = nnx.RotaryEmbedding(8, base=500.0)(jnp.asarray(x), jnp.arange(5))
    np.testing.assert_allclose(got, turned(x, np.broadcast_to(np.arange(5), (*batch, 5)), 500.0), rtol=1e-4, atol=1e-5)


def test_a_part_of_the_features(rng):
    x = rng.normal(size=(5, 2, 8)).astype(np.float32)
    got = nnx.RotaryEmbedding(4)(jnp.asarray(x), jnp.arange(5))
    np.testing.assert_allclose(got[..., :4], turned(x[..., :4], np.arange(5)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])


def test_scaling(rng):
    x = rng.normal(size=(5, 2, 8)).astype(np.float32)
    linear = nnx.RotaryEmbedding(8, scaling_factor=4.0)(jnp.asarray(x), 4 * jnp.arange(5))
    np.testing.assert_allclose(linear, nnx.RotaryEmbedding(8)(jnp.asarray(x), jnp.arange(5)), rtol=1e-4, atol=1e-5)
    ntk = nnx.RotaryEmbedding(8, scaling_factor=4.0, scaling="ntk")(jnp.asarray(x), jnp.arange(5))
    np.testing.assert_allclose(ntk, turned(x, np.arange(5), 10_000.0 * 4 ** (8 / 6)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_turns_in_float32(dtype, rng):
    x = jnp.asarray(rng.normal(size=(3, 2, 8)), dtype)
    positions = jnp.array([0, 10_000, 100_003])  # which half precision cannot tell from their neighbours
    got = nnx.RotaryEmbedding(8)(x, positions)
    assert got.dtype == dtype
    expected = turned(np.asarray(x, np.float32), np.asarray(positions))
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=0.05)


def test_rotary_errors():
    with pytest.raises(ValueError, match="positive even number, got 3"):
        nnx.RotaryEmbedding(3)
    with pytest.raises(ValueError, match=r"at least 1, got 0\.5"):
        nnx.RotaryEmbedding(4, scaling_factor=0.5)
    with pytest.raises(ValueError, match="'linear' or 'ntk', got 'yarn'"):
        nnx.RotaryEmbedding(4, scaling="yarn")
    with pytest.raises(nnx.ShapeError, match=r"rotary_dim=8, got \(5, 2, 4\)"):
        nnx.RotaryEmbedding(8)(jnp.ones((5, 2, 4)), jnp.arange(5))
    with pytest.raises(nnx.ShapeError, match=r"must broadcast to \(5,\), got \(4,\)"):
        nnx.RotaryEmbedding(4)(jnp.ones((5, 2, 4)), jnp.arange(4))


def test_sinusoids():
    got = nnx.sinusoidal_positions(7, 6, base=100.0)
    for position in range(7):
        for i in range(3):
            angle = position / 100.0 ** (2 * i / 6)
            np.testing.assert_allclose(got[position, 2 * i], np.sin(angle), atol=1e-5)
            np.testing.assert_allclose(got[position, 2 * i + 1], np.cos(angle), atol=1e-5)
    assert nnx.sinusoidal_positions(2, 4, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="positive even number, got 5"):
        nnx.sinusoidal_positions(2, 5)


def test_attention_depends_on_distances_alone(rng):
    layer = nnx.MultiHeadAttention(2, 8, rotary=True, is_causal=True, ctx=nnx.context(0))
    x = jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32)
    moved = layer(x, input_positions=jnp.arange(6) + 1000)
    np.testing.assert_allclose(moved, layer(x), rtol=1e-3, atol=1e-4)
    assert not np.allclose(layer(x, input_positions=2 * jnp.arange(6)), layer(x), atol=1e-3)
    gradient = jax.grad(lambda x: (layer(x) ** 2).sum())(x)
    assert np.isfinite(gradient).all()


def test_positions_count_from_zero_where_none_are_given(normal):
    x, rotary = normal(2, 5, 2, 4), nnx.RotaryEmbedding(4)
    np.testing.assert_array_equal(rotary(x), rotary(x, jnp.arange(5)))


def test_attention_gives_a_rotary_of_ones_own_the_positions_as_integers(init):
    class Table(nnx.RotaryEmbedding):
        def __call__(self, x, positions):
            return x * jnp.arange(1.0, 9.0)[positions][:, None, None]

    layer = nnx.MultiHeadAttention(2, 8, kernel_init=init, rotary=Table(4), ctx=nnx.context(0))
    assert layer(jnp.ones((5, 8))).shape == (5, 8)
