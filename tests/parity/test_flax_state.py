"""States of flax.nnx into models of ours, and back: what comes out of both is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

import nnx

CTX = nnx.context(0, flags={"use_running_average": True, "deterministic": True})


class Theirs(flax_nnx.Module):
    def __init__(self, rngs):
        self.conv = flax_nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = flax_nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.dropout = flax_nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.attention = flax_nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.embed = flax_nnx.Embed(5, 4, rngs=rngs)
        self.head = flax_nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, image, token):
        x = self.dropout(self.norm(self.conv(image)))
        x = self.attention(x.reshape(x.shape[0], -1, 4)) + self.embed(token)[:, None]
        return self.head(x)


class Ours(nnx.Module):
    def __init__(self, *, ctx):
        self.conv = nnx.Conv(1, 4, (3, 3), ctx=ctx)
        self.norm = nnx.BatchNorm(4, ctx=ctx)
        self.dropout = nnx.Dropout(0.5)
        self.attention = nnx.MultiHeadAttention(2, 4, ctx=ctx)
        self.embed = nnx.Embed(5, 4, ctx=ctx)
        self.head = nnx.Linear(4, 2, ctx=ctx)

    def __call__(self, image, token, *, ctx):
        x = self.dropout(self.norm(self.conv(image), ctx=ctx), ctx=ctx)
        x = self.attention(x.reshape(x.shape[0], -1, 4), ctx=ctx) + self.embed(token)[:, None]
        return self.head(x)


@pytest.fixture
def inputs():
    return jax.random.normal(jax.random.key(1), (2, 4, 4, 1)), jnp.array([0, 4])


def drawn(state, seed):
    """The same State with other numbers, so that no parameter is one that both would begin with."""
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(seed)
    floats = [
        jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype) if leaf.dtype == jnp.float32 else leaf
        for leaf in leaves
    ]
    return jax.tree.unflatten(tree, floats)


def test_into_ours(inputs):
    definition, state = flax_nnx.split(Theirs(flax_nnx.Rngs(0)))
    state = drawn(state, 0)
    ours = Ours(ctx=nnx.context(1))
    nnx.load_flax_state(ours, state)
    expected = flax_nnx.merge(definition, state)(*inputs)
    np.testing.assert_allclose(ours(*inputs, ctx=CTX), expected, rtol=2e-5, atol=2e-5)


def test_into_theirs(inputs):
    definition, state = flax_nnx.split(Theirs(flax_nnx.Rngs(0)))
    ours = Ours(ctx=nnx.context(1))
    ours.update_state(drawn(ours.filter((nnx.Param, nnx.BatchStat)), 1))
    converted = nnx.to_flax_state(ours, state)
    assert type(converted) is type(state)
    found = flax_nnx.merge(definition, converted)(*inputs)
    np.testing.assert_allclose(found, ours(*inputs, ctx=CTX), rtol=2e-5, atol=2e-5)


def test_into_an_abstract_model(inputs):
    abstract = flax_nnx.eval_shape(lambda: Theirs(flax_nnx.Rngs(0)))
    _, state = flax_nnx.split(abstract)
    converted = nnx.to_flax_state(Ours(ctx=nnx.context(1)), state)
    assert all(
        jnp.shape(leaf) == want.shape for leaf, want in zip(*map(jax.tree.leaves, (converted, state)), strict=True)
    )


def test_a_recurrent_model_both_ways():
    class Theirs(flax_nnx.Module):
        def __init__(self, rngs):
            self.embed = flax_nnx.Embed(7, 4, rngs=rngs)
            self.cells = flax_nnx.List([flax_nnx.RNN(flax_nnx.LSTMCell(4, 4, rngs=rngs)) for _ in range(2)])
            self.gru = flax_nnx.RNN(flax_nnx.GRUCell(4, 3, rngs=rngs))
            self.norm = flax_nnx.GroupNorm(3, num_groups=3, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            for cell in self.cells:
                x = cell(x)
            return self.norm(self.gru(x))

    class Ours(nnx.Module):
        def __init__(self, *, ctx):
            self.embed = nnx.Embed(7, 4, ctx=ctx)
            self.cells = [nnx.RNN(nnx.LSTMCell(4, 4, ctx=ctx)) for _ in range(2)]
            self.gru = nnx.RNN(nnx.GRUCell(4, 3, ctx=ctx))
            self.norm = nnx.GroupNorm(3, num_groups=3, ctx=ctx)

        def __call__(self, tokens):
            x = self.embed(tokens)
            for cell in self.cells:
                x = cell(x)
            return self.norm(self.gru(x))

    tokens = jnp.array([[0, 6, 2, 3], [5, 1, 1, 4]])
    definition, state = flax_nnx.split(Theirs(flax_nnx.Rngs(0)))
    state = drawn(state, 0)
    ours = Ours(ctx=nnx.context(1))
    nnx.load_flax_state(ours, state)
    np.testing.assert_allclose(ours(tokens), flax_nnx.merge(definition, state)(tokens), rtol=1e-4, atol=1e-5)
    ours.update_state(ours.filter(nnx.Param).map(lambda path, value: value * 0.5))
    back = flax_nnx.merge(definition, nnx.to_flax_state(ours, state))
    np.testing.assert_allclose(back(tokens), ours(tokens), rtol=1e-4, atol=1e-5)
