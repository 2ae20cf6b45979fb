"""The table of wrong programs: the Module that they are given, and how one is entered."""

import jax.numpy as jnp

import nnx


class Layer(nnx.Module):
    def __init__(self, value=1.0, *, shape=()):
        self.w = nnx.Param(jnp.full(shape, value, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(()))
        self.steps = nnx.var("counts", jnp.int32(0))

    def __call__(self, x):
        return self.w * x


class Model(nnx.Module):
    def __init__(self):
        self.layer = Layer()

    def __call__(self, x):
        return self.layer(x)


PROGRAMS = {}


def program(error, match):
    """Enter a program: called with a Model, it raises `error`, whose text matches each of the patterns."""

    def enter(function):
        PROGRAMS[function.__name__] = (function, error, match if isinstance(match, tuple) else (match,))
        return function

    return enter


CROSSES = (r"another JAX trace", r"Pass the object as an argument through a lifted transform")
