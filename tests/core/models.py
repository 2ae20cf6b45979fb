"""The Modules that several tests use."""

import jax
import jax.numpy as jnp
import numpy as np

import nnx


class Leaf(nnx.Module):
    def __init__(self, value=1.0):
        self.w = nnx.Param(jnp.asarray(value, jnp.float32))

    def __call__(self, x):
        return x * self.w


class Count(nnx.Variable):
    pass


class Everything(nnx.Module):
    """One attribute of each kind."""

    def __init__(self):
        self.param = nnx.Param(jnp.ones(2))
        self.stat = nnx.BatchStat(jnp.zeros(2))
        self.jax_buffer = jnp.arange(3)
        self.np_buffer = np.arange(3.0)
        self.node = nnx.Node({"a": jnp.ones(1), "b": [jnp.zeros(1)]})
        self.child = Leaf()
        self.ctx = nnx.context(dropout=0)
        self.blocks = [Leaf(1.0), Leaf(2.0)]
        self.pair = (Leaf(3.0), Leaf(4.0))
        self.named = {"a": Leaf(5.0), "b": Leaf(6.0)}
        self.integer = 3
        self.floating = 0.5
        self.text = "gelu"
        self.none = None
        self.flag = True
        self.listing = [1, 2, [3]]
        self.mapping = {"lr": 0.1}
        self.function = jax.nn.gelu
