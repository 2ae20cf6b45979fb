"""Two traces are the same computation, or it cannot be told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnx.core.transforms._same import same_computation

X = jax.ShapeDtypeStruct((3,), jnp.float32)
KEPT = jnp.arange(3.0)


def same(f, g, inputs=((0, 0), (1, 1))):
    # Each in a function of its own, or JAX gives the same jaxpr again.
    one, other = (jax.make_jaxpr(lambda x, y, function=function: function(x, y))(X, X) for function in (f, g))
    outputs = list(zip(one.jaxpr.outvars, other.jaxpr.outvars, strict=True))
    return same_computation(one, other, list(inputs), outputs)


def maximum(x, y):
    return jax.nn.relu(x) + jax.lax.cond(x[0] > 0, lambda: x * 2, lambda: y)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: x + 2 * y,
        maximum,
        lambda x, y: x,
        lambda x, y: 3.0,
        lambda x, y: x + KEPT,
        lambda x, y: x + np.float32([1, 2, 3]),
        lambda x, y: jax.lax.scan(lambda c, t: (c * y[0] + t, c), 0.0, x)[1],
    ],
)
def test_a_function_is_the_same_as_itself(f):
    assert same(f, f)


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: x + 3 * y,
        lambda x, y: y + 2 * x,
        lambda x, y: x - 2 * y,
        lambda x, y: x + 2 * y + 0,
        lambda x, y: 2 * y,
        lambda x, y: x,
        lambda x, y: x + jnp.float32(2),
        lambda x, y: x + KEPT,
    ],
)
def test_functions_that_differ(other):
    assert not same(lambda x, y: x + 2 * y, other)


@pytest.mark.parametrize("change", [lambda x: x * 3, jnp.sin, lambda x: x + jnp.arange(3.0)])
def test_what_differs_inside_of_a_branch(change):
    def f(g):
        return lambda x, y: jax.lax.cond(x[0] > 0, lambda: g(x), lambda: y)

    assert same(f(jnp.cos), f(jnp.cos))
    assert not same(f(jnp.cos), f(change))


def test_an_input_without_its_like_must_not_be_used():
    assert not same(lambda x, y: x + y, lambda x, y: x + y, [(0, 0)])
    assert same(lambda x, y: y * 2, lambda x, y: y * 2, [(1, 1)])
    assert same(lambda x, y: x - y, lambda x, y: y - x, [(0, 1), (1, 0)])


def test_arrays_from_outside_are_compared_by_identity():
    first, second = jnp.arange(3.0), jnp.arange(3.0)
    assert not same(lambda x, y: x + first, lambda x, y: x + second)
