"""Modules for the tests of nnx.jit, and functions that count their traces."""

import functools
from typing import NamedTuple

import jax.numpy as jnp

import nnx


class Leaf(nnx.Module):
    def __init__(self, value=1.0, rate=0.5):
        self.w = nnx.Param(jnp.float32(value))
        self.rate = rate

    def __call__(self, x):
        return x * self.w

    def scaled(self, x, factor):
        return x * self.w * factor

    @nnx.jit
    def compiled(self, x):
        self.w = self.w + x
        return self.w

    @nnx.jit(static_argnums=(1,), static_argnames=("power",))
    def powered(self, n, *, power=1):
        assert isinstance(n, int)
        return self.w * n**power


class Model(nnx.Module):
    def __init__(self):
        self.left = Leaf(2.0)
        self.right = Leaf(3.0)
        self.count = nnx.var("counts", 0)

    def __call__(self, x):
        self.count += 1
        return self.right(self.left(x))


class Pair(NamedTuple):
    first: object
    second: object


def traced(function=None, **options):
    """A function under nnx.jit that counts its traces."""
    if function is None:
        return functools.partial(traced, **options)
    count = [0]

    @functools.wraps(function)
    def counted(*args, **kwargs):
        count[0] += 1
        return function(*args, **kwargs)

    wrapped = nnx.jit(counted, **options)
    wrapped.traces = count
    return wrapped
