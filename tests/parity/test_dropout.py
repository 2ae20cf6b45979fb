"""Dropout against that of flax.nnx: what is kept, how often and scaled by what. The draws are each library's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

import nnx

_SIZE = (64, 125)
_RATES = (0.1, 0.5, 0.9)


def _dropped(rate, axes):
    """Outputs for ones, and gradients, of both libraries."""
    ours = nnx.Dropout(rate, broadcast_dims=axes)
    theirs = flax_nnx.Dropout(rate, broadcast_dims=axes)

    def of_ours(x):
        return ours(x, deterministic=False, ctx=nnx.context(dropout=1))

    def of_theirs(x):
        return theirs(x, deterministic=False, rngs=jax.random.key(2))

    x = jnp.ones(_SIZE)
    return [(f(x), jax.grad(lambda x, f=f: f(x).sum())(x)) for f in (of_ours, of_theirs)]


@pytest.mark.parametrize("axes", [(), (0,), (1,)])
@pytest.mark.parametrize("rate", _RATES)
def test_as_much_is_kept_and_scaled_alike(rate, axes):
    draws = np.prod([size for axis, size in enumerate(_SIZE) if axis not in axes])
    deviation = np.sqrt(rate * (1 - rate) / draws)
    (ours, our_gradient), (theirs, their_gradient) = _dropped(rate, axes)
    for y, gradient in ((ours, our_gradient), (theirs, their_gradient)):
        assert abs(float((y != 0).mean()) - (1 - rate)) < 4 * deviation
        np.testing.assert_array_equal(gradient, y)
    np.testing.assert_array_equal(np.unique(ours), np.unique(theirs))
    for axis in axes:
        assert (np.ptp(np.asarray(ours), axis) == 0).all()


@pytest.mark.parametrize(("rate", "deterministic"), [(0.5, True), (0.0, False), (1.0, False)])
def test_what_draws_nothing_is_equal(rate, deterministic):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    ours = nnx.Dropout(rate)(x, deterministic=deterministic, ctx=nnx.context(dropout=0))
    theirs = flax_nnx.Dropout(rate)(x, deterministic=deterministic, rngs=flax_nnx.Rngs(dropout=0))
    np.testing.assert_array_equal(ours, theirs)
