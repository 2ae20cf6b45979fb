"""Attention with a cache of keys and values against that of flax.nnx, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from tests.parity.cases import TOLERANCES, difference

import nnx

_OPTIONS = {"num_heads": 4, "in_features": 12}


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_tokens_one_by_one(kv_heads, rng):
    ours = nnx.MultiHeadAttention(**_OPTIONS, num_kv_heads=kv_heads, ctx=nnx.context(0))
    theirs = flax_nnx.MultiHeadAttention(**_OPTIONS, num_kv_heads=kv_heads, decode=True, rngs=flax_nnx.Rngs(0))
    for path, variable in flax_nnx.to_flat_state(flax_nnx.state(theirs, flax_nnx.Param)):
        variable.set_value(ours.get_state()[path].value)
    x = jnp.asarray(rng.normal(size=(2, 6, 12)), jnp.float32)
    nnx.init_cache(ours, 2, 6)
    theirs.init_cache(x.shape)

    @nnx.jit
    def step(layer, token):
        return layer(token, decode=True)

    @flax_nnx.jit
    def their_step(layer, token):
        return layer(token)

    tokens = jnp.split(x, 6, axis=1)
    by_us = jnp.concatenate([step(ours, token) for token in tokens], axis=1)
    with jax.numpy_rank_promotion("allow"):
        by_them = jnp.concatenate([their_step(theirs, token) for token in tokens], axis=1)
    assert difference(by_us, by_them) <= TOLERANCES["float32"]
    assert np.ptp(np.asarray(by_them)) > 0
    for name in ("cached_key", "cached_value"):
        assert difference(getattr(ours, name), getattr(theirs, name).get_value()) <= TOLERANCES["float32"]
