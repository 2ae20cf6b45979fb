"""Every transform inside of every other: random keys differ where they should, and are the same where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx

N = 3


def draw(ctx):
    return jax.random.uniform(ctx.make_rng("noise"))


def mapped(split):
    return lambda f: nnx.vmap(f, in_axes=None, axis_size=N, split_rngs=split)


def scanned(split):
    def transform(f):
        run = nnx.scan(lambda ctx, carry, x: (carry, f(ctx)), split_rngs=split)
        return lambda ctx: run(ctx, 0, jnp.arange(N))[1]

    return transform


def constructed(f):
    """The layers of a Stack, each of which draws a parameter."""

    class Layer(nnx.Module):
        def __init__(self, *, ctx):
            self.w = nnx.Param(f(ctx))

    return lambda ctx: nnx.Stack(Layer, N)(ctx=ctx).layers.w


def in_fori(f):
    def loop(ctx):
        shape = nnx.eval_shape(f, ctx)

        def body(i, val):
            ctx, found = val
            return ctx, found.at[i].set(f(ctx))

        return nnx.fori_loop(0, N, body, (ctx, jnp.zeros((N, *shape.shape))))[1]

    return loop


def in_while(f):
    def loop(ctx):
        shape = nnx.eval_shape(f, ctx)

        def body(val):
            i, ctx, found = val
            return i + 1, ctx, found.at[i].set(f(ctx))

        return nnx.while_loop(lambda val: val[0] < N, body, (0, ctx, jnp.zeros((N, *shape.shape))))[2]

    return loop


def in_grad(f):
    def loss(x, ctx):
        return x, f(ctx)

    return lambda ctx: nnx.grad(loss, has_aux=True)(1.0, ctx)[1]


# name: the transform, and how many different keys its runs draw
TABLE = {
    "vmap": (mapped(True), N),
    "vmap, shared": (mapped(False), 1),
    "scan": (scanned(True), N),
    "scan, shared": (scanned("another"), 1),
    "stack": (constructed, N),
    "fori_loop": (in_fori, N),
    "while_loop": (in_while, N),
    "jit": (nnx.jit, 1),
    "grad": (in_grad, 1),
    "remat": (nnx.remat, 1),
    "cond": (lambda f: lambda ctx: nnx.cond(True, f, f, ctx), 1),
}
AXES = ("vmap", "vmap, shared", "scan", "scan, shared")
PAIRS = [
    pytest.param(outer, inner, marks=() if {outer, inner} <= {*AXES, "jit"} else pytest.mark.slow)
    for outer in TABLE
    for inner in TABLE
    if {outer, inner} - {"jit", "grad", "remat", "cond"}
]


@pytest.mark.parametrize(("outer", "inner"), PAIRS)
def test_keys(outer, inner):
    (transform, times), (inside, inner_times) = TABLE[outer], TABLE[inner]
    run = transform(inside(draw))
    ctx = nnx.context(noise=0)
    first, second = np.asarray(run(ctx)), np.asarray(run(ctx))
    assert first.shape == second.shape
    assert len(set(first.ravel().tolist())) == times * inner_times
    # The outer transform's axis comes first: along it lanes differ as a whole, or are the same.
    if first.ndim == 2:
        assert len({tuple(row) for row in first.tolist()}) == (times if times * inner_times > 1 else 1)
    assert not set(first.ravel().tolist()) & set(second.ravel().tolist())
    # The same seed draws the same again.
    np.testing.assert_array_equal(run(nnx.context(noise=0)), first)
