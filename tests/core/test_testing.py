"""The helpers for tests, and with them how often each transform traces and how much memory a step takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tests.core.models import Leaf

import nnx
from nnx.testing import assert_memory, assert_traces, counted


class Model(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((3, 3)))
        self.count = nnx.BatchStat(jnp.int32(0))


def body(model, ctx, x):
    model.count += 1
    return jnp.tanh(x @ model.w) + jax.random.uniform(ctx.make_rng("noise"))


MESH = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def looped(val, *, f):
    model, ctx, x = val
    return model, ctx, f(model, ctx, x)


STAGED = {
    "jit": nnx.jit,
    "remat": nnx.remat,
    "scan": lambda f: nnx.scan(f, in_axes=(None, None, nnx.Carry), out_axes=None, length=3),
    "cond": lambda f: lambda model, ctx, x: nnx.cond(True, f, stays, model, ctx, x),
    "switch": lambda f: lambda model, ctx, x: nnx.switch(0, [f, stays], model, ctx, x),
    "shard_map": lambda f: nnx.shard_map(f, mesh=MESH, in_specs=(P(), P(), P()), out_specs=P()),
}


def stays(model, ctx, x):
    return x


@pytest.mark.parametrize("name", STAGED)
def test_a_staged_transform_traces_once_even_if_it_is_made_anew(name):
    f = counted(body)
    model, ctx, x = Model(), nnx.context(noise=0), jnp.ones((2, 3))
    if name == "scan":
        f = counted(lambda model, ctx, x: x @ model.w)
    with assert_traces(f, 1):
        STAGED[name](f)(model, ctx, x)
    STAGED[name](f)(model, ctx, x)  # after shard_map the values are of the mesh, which those that went in were not
    with assert_traces(f, 0):
        for _ in range(3):
            STAGED[name](f)(model, ctx, x)


def test_loops_trace_their_bodies_once():
    def step(val):
        return looped(val, f=body)

    def step_i(i, val):
        return looped(val, f=body)

    step, step_i, more = counted(step), counted(step_i), counted(lambda val: val[0].count < 3)
    model, ctx, x = Model(), nnx.context(noise=0), jnp.ones((2, 3))
    with assert_traces(step, 1), assert_traces(more, 1):
        nnx.while_loop(more, step, (model, ctx, x))
        nnx.while_loop(more, step, (model, ctx, x))
    with assert_traces(step_i, 1):
        for n in (2, 5):
            nnx.fori_loop(0, n, step_i, (model, ctx, x))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: nnx.grad(lambda *args: f(*args).sum()),
        lambda f: nnx.vmap(f, in_axes=(None, None, 0)),
        lambda f: lambda *args: nnx.vjp(f, *args)[0],
        lambda f: lambda *args: nnx.eval_shape(f, *args),
        nnx.make_jaxpr,
        lambda f: lambda *args: nnx.checkify(f)(*args)[1],
    ],
)
def test_the_others_run_the_function_once_a_call(transform):
    f = counted(body)
    model, ctx = Model(), nnx.context(noise=0)
    for _ in range(2):
        with assert_traces(f, 1):
            transform(f)(model, ctx, jnp.ones((2, 3)))


def test_a_captured_module_is_never_kept():
    model = Leaf(2.0)

    def read(x):
        return model.w * x

    assert nnx.cond(True, read, lambda x: x, jnp.float32(3)) == 6.0
    model.w = jnp.float32(5.0)
    assert nnx.cond(True, read, lambda x: x, jnp.float32(3)) == 15.0
    assert nnx.scan(lambda c, x: (c + read(x), None))(jnp.float32(0), jnp.ones(2))[0] == 10.0


def test_the_memory_of_a_gradient_step_is_that_of_one_by_hand():
    def loss(model, x):
        model.count += 1
        return (jnp.tanh(x @ model.w) ** 2).sum()

    def step(model, x):
        grads = nnx.grad(loss)(model, x)
        model.w = model.w - 0.1 * grads["w"].value

    def by_hand(w, count, x):
        g = jax.grad(lambda w: (jnp.tanh(x @ w) ** 2).sum())(w)
        return w - 0.1 * g, count + 1

    model, x = Model(), jnp.ones((64, 3))
    ours = nnx.jit(step).lower(model, x).compile()
    assert_memory(ours, like=jax.jit(by_hand).lower(model.w, model.count, x).compile())


@pytest.mark.parametrize("remat", [False, True])
def test_the_memory_of_a_stack_is_that_of_a_scan_by_hand(remat):
    class Block(nnx.Module):
        def __init__(self, *, ctx):
            self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (64, 64)))
            self.seen = nnx.BatchStat(jnp.float32(0))

        def __call__(self, x):
            self.seen += x.mean()
            return jnp.sin(jnp.tanh(x @ self.w))

    def by_hand(weights, seen, x):
        def block(x, layer):
            w, seen = layer
            return jnp.sin(jnp.tanh(x @ w)), seen + x.mean()

        if remat:
            block = jax.checkpoint(block, prevent_cse=False)
        out, seen = jax.lax.scan(block, x, (weights, seen))
        return out.sum(), seen

    stack, x = nnx.Stack(Block, 8, remat=remat)(ctx=nnx.context(0)), jnp.ones((256, 64))
    ours = nnx.jit(nnx.grad(lambda stack, x: stack(x).sum())).lower(stack, x).compile()
    raw = jax.jit(jax.grad(by_hand, has_aux=True)).lower(stack.layers.w, stack.layers.seen, x).compile()
    assert_memory(ours, like=raw, tolerance=0.03)


def test_assert_traces_counts_jit_itself():
    step = nnx.jit(lambda model, x: model.w * x)
    with assert_traces(step, 2):
        step(Leaf(1.0), jnp.ones(2))
        step(Leaf(2.0), jnp.ones(2))
        step(Leaf(2.0), jnp.ones(3))
    with pytest.raises(AssertionError, match="was traced 1 times, and 0 were expected"), assert_traces(step, 0):
        step(Leaf(2.0), jnp.ones(4))


def test_assert_traces_wants_what_counts():
    with pytest.raises(TypeError, match="assert_traces takes a function of nnx.jit"), assert_traces(body, 1):
        pass


def test_assert_memory_says_what_is_too_much():
    small = jax.jit(lambda x: x.sum()).lower(jnp.ones(8)).compile()
    large = jax.jit(lambda x: jnp.outer(x, x)).lower(jnp.ones(8)).compile()
    assert_memory(small, like=large)
    with pytest.raises(AssertionError, match="256 bytes of outputs, and at most 4 were expected"):
        assert_memory(large, like=small)
    with pytest.raises(ValueError, match="to compare with"):
        assert_memory(small)


def test_counted_keeps_the_function():
    @counted
    def f(x):
        """What it does."""
        return x

    assert (f.__name__, f.__doc__, f(3)) == ("f", "What it does.", 3)
    assert functools.reduce(lambda a, g: g(a), [f], 1) == 1


def test_a_model_is_exported_and_loaded_again():
    class Counted(Model):
        def __call__(self, x):
            self.count += 1
            return x @ self.w

    model = Counted()
    state, moduledef = model.partition()
    leaves, tree = jax.tree.flatten(state)

    @jax.jit
    def forward(leaves, x):
        module = moduledef.merge(jax.tree.unflatten(tree, leaves))
        return module(x), jax.tree.leaves(module.partition().state)

    x = jnp.ones((2, 3))
    loaded = jax.export.deserialize(jax.export.export(forward)(leaves, x).serialize())
    y, changed = loaded.call(leaves, x)
    np.testing.assert_allclose(y, model(x), rtol=1e-6)
    for new, old in zip(changed, jax.tree.leaves(model.partition().state), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-6)
