"""Decoding with a cache gives what the whole sequence gives at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import nnx

DIM, LENGTH = 16, 7
OPTIONS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1, "use_bias": False},
    "rotary": {"rotary": True},
    "window": {"local_window_size": (2, 0)},
    "everything": {
        "num_kv_heads": 2,
        "rotary": nnx.RotaryEmbedding(4, scaling_factor=2.0, scaling="ntk"),
        "normalize_qk": True,
        "local_window_size": (3, 0),
    },
}


def make(**options):
    return nnx.MultiHeadAttention(4, DIM, is_causal=True, ctx=nnx.context(0), **options)


@nnx.jit
def decode(layer, x, lengths=None):
    return layer(x, decode=True, lengths=lengths)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(3, LENGTH, DIM)), jnp.float32)


@pytest.mark.parametrize("name", OPTIONS)
def test_token_by_token_and_in_pieces(name, x):
    layer = make(**OPTIONS[name])
    expected = layer(x)
    for pieces in ([1] * LENGTH, [4, 1, 2], [LENGTH]):
        nnx.init_cache(layer, 3, 9)
        outs, start = [], 0
        for size in pieces:
            outs.append(decode(layer, x[:, start : start + size]))
            start += size
        np.testing.assert_allclose(jnp.concatenate(outs, axis=1), expected, rtol=2e-4, atol=2e-5)
        assert layer.cache_index.tolist() == [LENGTH] * 3


def test_prefill_and_decode_compile_once_each(x):
    layer = make(rotary=True)
    nnx.init_cache(layer, 3, LENGTH)
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    step(layer, x[:, :3])
    for i in range(3, LENGTH):
        step(layer, x[:, i : i + 1])
    assert step._cache_size() == 2
    nnx.reset_cache(layer)
    step(layer, x[:, :3])
    assert step._cache_size() == 2


def test_rows_at_different_positions(x):
    layer = make(rotary=True)
    lengths = jnp.array([2, 5, 4])
    nnx.init_cache(layer, 3, 9)
    prefilled = decode(layer, x[:, :5], lengths)
    assert layer.cache_index.tolist() == lengths.tolist()
    following = decode(layer, x[:, 5:6])
    for row, length in enumerate(lengths.tolist()):
        whole = jnp.concatenate([x[row : row + 1, :length], x[row : row + 1, 5:6]], axis=1)
        expected = layer(whole)
        np.testing.assert_allclose(prefilled[row, :length], expected[0, :-1], rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(following[row, 0], expected[0, -1], rtol=2e-4, atol=2e-5)


def test_a_full_cache_is_an_error(x):
    layer = make()
    nnx.init_cache(layer, 3, 4)
    with pytest.raises(nnx.CacheFullError, match=r"room for 4 tokens in each row, and a row would get 5 \(row 0\)"):
        layer(x[:, :5], decode=True)
    assert layer.cache_index.tolist() == [0, 0, 0]
    layer(x[:, :3], decode=True, lengths=jnp.array([1, 3, 1]))
    error, _ = nnx.jit(nnx.checkify(lambda layer, x: layer(x, decode=True)))(layer, x[:, :2])
    with pytest.raises(checkify.JaxRuntimeError, match="room for 4 tokens in each row, and a row would get 5"):
        error.throw()
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    nnx.reset_cache(layer)
    step(layer, x[:, :3])
    nnx.reset_cache(layer)
    layer(x[:, :2], decode=True)
    # What was compiled without checks is compiled again with them.
    error, _ = nnx.checkify(step)(layer, x[:, :3])
    with pytest.raises(checkify.JaxRuntimeError, match="room for 4 tokens in each row, and a row would get 5"):
        error.throw()
    # Without checks no row gets a wrong answer: that without room gets none, and the others get theirs.
    layer = make()
    nnx.init_cache(layer, 3, 4)
    layer(x[:, :3], decode=True, lengths=jnp.array([1, 3, 1]))
    out = decode(layer, x[:, 3:5])
    assert np.isnan(out[1]).all()
    whole = jnp.concatenate([x[:1, :1], x[:1, 3:5]], axis=1)
    np.testing.assert_allclose(out[0], layer(whole)[0, 1:], rtol=2e-4, atol=2e-5)


def test_reset_and_reorder(x):
    layer = make(rotary=True)
    nnx.init_cache(layer, 3, 9)
    decode(layer, x[:, :4])
    nnx.reorder_cache(layer, jnp.array([2, 0, 0]))
    out = decode(layer, x[jnp.array([2, 0, 0]), 4:5])
    np.testing.assert_allclose(out, layer(x[jnp.array([2, 0, 0]), :5])[:, 4:], rtol=2e-4, atol=2e-5)
    nnx.reset_cache(layer, jnp.array([True, False, False]))
    assert layer.cache_index.tolist() == [0, 5, 5]
    nnx.reset_cache(layer)
    np.testing.assert_allclose(decode(layer, x[:, :2]), layer(x[:, :2]), rtol=2e-4, atol=2e-5)


def test_a_model_of_several_layers_and_a_stack(x):
    class Block(nnx.Module):
        def __init__(self, *, ctx):
            self.norm = nnx.RMSNorm(DIM, ctx=ctx)
            self.attention = nnx.MultiHeadAttention(4, DIM, is_causal=True, rotary=True, ctx=ctx)

        def __call__(self, x, decode=False):
            return x + self.attention(self.norm(x), decode=decode)

    class Model(nnx.Module):
        def __init__(self, *, ctx):
            self.blocks = [Block(ctx=ctx) for _ in range(2)]

        def __call__(self, x, decode=False):
            for block in self.blocks:
                x = block(x, decode)
            return x

    model = Model(ctx=nnx.context(0))
    expected = model(x)
    nnx.init_cache(model, 3, LENGTH, jnp.float32)
    step = nnx.jit(lambda model, x: model(x, decode=True), donate_argnums=0)
    outs = [step(model, x[:, i : i + 1]) for i in range(LENGTH)]
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), expected, rtol=2e-4, atol=2e-4)

    stack = nnx.Stack(Block, 2)(ctx=nnx.context(0))
    expected = stack(x)
    nnx.vmap(lambda layers: nnx.init_cache(layers, 3, LENGTH), axis_size=2)(stack.layers)
    assert stack.layers.attention.cached_key.shape == (2, 3, LENGTH, 4, 4)
    step = nnx.jit(lambda stack, x: stack(x, decode=True))
    outs = [step(stack, x[:, i : i + 1]) for i in range(LENGTH)]
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype, x):
    layer = make(dtype=dtype, rotary=True)
    nnx.init_cache(layer, 3, LENGTH)
    assert layer.cached_key.dtype == dtype
    out = jnp.concatenate([decode(layer, x[:, i : i + 1]) for i in range(LENGTH)], axis=1)
    assert out.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(make(rotary=True)(x), np.float32), atol=0.06, rtol=0.06
    )


def test_a_mask_beside_the_cache(x):
    layer = make()
    nnx.init_cache(layer, 3, LENGTH)
    hidden = jnp.ones((3, 1, 1, LENGTH), bool).at[:, :, :, 1].set(False)
    np.testing.assert_allclose(
        layer(x, decode=True, mask=hidden), layer(x, mask=hidden, is_causal=True), rtol=2e-4, atol=2e-5
    )


def test_errors(x):
    layer = make()
    with pytest.raises(ValueError, match=r"needs a cache, call init_cache\(batch, max_length\) first"):
        layer(x, decode=True)
    with pytest.raises(ValueError, match="max_length is a positive integer, got 0"):
        nnx.init_cache(layer, 3, 0)
    nnx.init_cache(layer, 2, 4)
    with pytest.raises(nnx.ShapeError, match="made for a batch of 2, and the inputs have one of 3"):
        layer(x[:, :1], decode=True)
    with pytest.raises(nnx.ShapeError, match=r"\[batch, length, features\], got"):
        layer(x[0], decode=True)
    with pytest.raises(ValueError, match="for self-attention"):
        layer(x[:2, :1], x[:2, :1], decode=True)
    with pytest.raises(nnx.ShapeError, match=r"`lengths` of shape \(2,\), got \(3,\)"):
        layer(x[:2, :1], decode=True, lengths=jnp.ones(3, int))
    with pytest.raises(nnx.ShapeError, match="`lengths` go up to 2, and there are 1 tokens"):
        layer(x[:2, :1], decode=True, lengths=jnp.array([1, 2]))
    with pytest.raises(ValueError, match="`lengths` is for decode=True"):
        layer(x, lengths=jnp.ones(3, int))
    with pytest.raises(ValueError, match="no layer of the Linear has a cache"):
        nnx.init_cache(nnx.Linear(2, 2, ctx=nnx.context(0)), 1, 1)


def test_decode_by_the_constructor(x):
    layer = make(decode=True)
    layer.init_cache(3, LENGTH)
    out = layer(x)
    assert layer.cache_index.tolist() == [LENGTH] * 3
    np.testing.assert_allclose(out, layer(x, decode=False), rtol=2e-4, atol=2e-5)
    assert jax.tree.leaves(layer.filter(nnx.Cache))


def test_a_step_of_decoding_has_no_effects_that_would_slow_its_calls(x):
    layer = make()
    nnx.init_cache(layer, 3, 4)
    assert not nnx.make_jaxpr(lambda layer, x: layer(x, decode=True))(layer, x[:, :1]).effects
