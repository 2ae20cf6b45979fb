"""What the tests of layers share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture
def init():
    """An initializer that draws with NumPy: XLA takes longer to compile a random draw than most layers."""

    def draw(key, shape, dtype=jnp.float32):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return jnp.asarray(rng.uniform(-1, 1, size=shape), dtype)

    return draw


@pytest.fixture
def both(init):
    """The initializers of a layer with kernel and bias."""
    return {"kernel_init": init, "bias_init": init}


@pytest.fixture
def normal(rng):
    """A function from a shape to an array of standard normals of a given dtype, drawn with NumPy."""

    def draw(*shape, dtype="float32"):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype)

    return draw
