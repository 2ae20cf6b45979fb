"""nnx.scan against loops in Python: axes, carries, new Variables, streams, constructors, methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.models import Leaf

import nnx


class Layer(nnx.Module):
    def __init__(self, dim=3, *, ctx):
        self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (dim, dim)))
        self.mean = nnx.BatchStat(jnp.zeros(dim))
        self.calls = nnx.var("counts", jnp.int32(0))

    def __call__(self, x):
        y = jnp.tanh(x @ self.w)
        self.mean = self.mean + y
        self.calls += 1
        return y, y.sum()


N = 4
AXES = {nnx.Param: 0, nnx.BatchStat: 0}
X = np.linspace(-1, 1, 3, dtype=np.float32)


def loop(ws, x, order):
    means, sums = {}, {}
    for i in order:
        x = jnp.tanh(x @ ws[i])
        means[i], sums[i] = x, x.sum()
    return x, jnp.stack([means[i] for i in range(N)]), jnp.stack([sums[i] for i in range(N)])


@pytest.mark.parametrize("unroll", [1, 2, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_layers(wrap, reverse, unroll):
    make = nnx.scan(Layer, length=N, variable_axes=AXES, variable_carry="counts")
    layers = make(ctx=nnx.context(0))
    assert layers.calls.shape == ()
    assert layers.w.shape == (N, 3, 3)
    assert len({np.asarray(w).tobytes() for w in layers.w}) == N
    order = range(N)[::-1] if reverse else range(N)
    expected, means, sums = loop(layers.w, X, order)
    run = wrap(nnx.scan(Layer.__call__, variable_axes=AXES, reverse=reverse, unroll=unroll))
    y, ys = run(layers, X)
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    np.testing.assert_allclose(ys, sums, rtol=1e-5)
    np.testing.assert_allclose(layers.mean, means, rtol=1e-5)
    assert layers.calls == N


def test_the_decorators_on_init_and_call():
    class Stacked(nnx.Module):
        @nnx.scan(length=N, variable_axes={...: 0})
        def __init__(self, dim, *, ctx):
            self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (dim, dim)))

        @nnx.scan(variable_axes={nnx.Param: 0}, out_axes=None)
        def __call__(self, x):
            return jnp.tanh(x @ self.w)

    stacked = Stacked(3, ctx=nnx.context(0))
    assert stacked.w.shape == (N, 3, 3)
    np.testing.assert_allclose(stacked(X), loop(stacked.w, X, range(N))[0], rtol=1e-5)


def test_arrays_beside_the_carry():
    def step(leaf, carry, x, y, scale):
        leaf.w = leaf.w + x
        return {"sum": carry["sum"] + x * y["y"] * scale}, (x, y["y"])

    leaf = Leaf(0.0)
    xs, ys = jnp.arange(3.0), jnp.arange(6.0).reshape(2, 3)
    scanned = nnx.scan(step, in_axes=(0, {"y": 1}, None), out_axes=(0, -1))
    carry, (a, b) = scanned(leaf, {"sum": jnp.zeros(2)}, xs, {"y": ys}, 10.0)
    np.testing.assert_allclose(carry["sum"], (ys @ xs) * 10)
    np.testing.assert_array_equal(a, xs)
    np.testing.assert_array_equal(b, ys)
    assert leaf.w == 3.0


def test_a_module_and_a_context_as_the_carry():
    def step(carry, x):
        leaf, ctx, total = carry
        leaf.w = leaf.w * 2
        return (leaf, ctx, total + leaf.w), jax.random.uniform(ctx.make_rng("noise"))

    leaf, ctx = Leaf(1.0), nnx.context(noise=0)
    (out, same, total), draws = nnx.scan(step)((leaf, ctx, jnp.float32(0)), jnp.arange(3))
    assert out is leaf
    assert same is ctx
    assert (float(leaf.w), float(total)) == (8.0, 14.0)
    # A stream that is carried draws what a loop draws.
    other = nnx.context(noise=0)
    assert draws.tolist() == [float(jax.random.uniform(other.make_rng("noise"))) for _ in range(3)]
    assert int(ctx.rngs["noise"].count) == 3


def test_the_mark_of_the_carry():
    def step(x, leaf, y):
        leaf.w = leaf.w + x
        return y * 2, leaf

    leaf = Leaf(0.0)
    ys, out = nnx.scan(step, in_axes=(0, nnx.Carry, 1), out_axes=(1, nnx.Carry))(
        jnp.arange(3.0), leaf, jnp.ones((2, 3))
    )
    assert out is leaf
    assert leaf.w == 3.0
    assert ys.shape == (2, 3)


def test_streams():
    def step(ctx, carry, x):
        keys = jax.random.uniform(ctx.make_rng("noise")), jax.random.uniform(ctx.make_rng("dropout"))
        return carry, keys

    ctx = nnx.context(noise=0, dropout=0)
    _, (noise, dropout) = nnx.scan(step, split_rngs="dropout")(ctx, 0, jnp.arange(3))
    assert len(set(noise.tolist())) == 1
    assert len(set(dropout.tolist())) == 3
    assert (int(ctx.rngs["noise"].count), int(ctx.rngs["dropout"].count)) == (1, 1)
    _, (more, others) = nnx.scan(step, split_rngs="dropout")(ctx, 0, jnp.arange(3))
    assert not set(others.tolist()) & set(dropout.tolist())
    assert more[0] != noise[0]


def test_broadcast_writes_that_are_the_same_in_each_run_are_kept():
    def step(leaf, carry, x):
        leaf.seen = leaf.w * 2
        return carry + leaf.seen, None

    leaf = Leaf(3.0)
    leaf.seen = nnx.BatchStat(jnp.float32(0))
    total, _ = nnx.scan(step, variable_broadcast=...)(leaf, jnp.float32(0), jnp.arange(4))
    assert (float(total), float(leaf.seen)) == (24.0, 6.0)


@pytest.mark.parametrize("reverse", [False, True])
def test_what_first_appears_inside(reverse):
    def step(leaf, carry, x):
        if not hasattr(leaf, "total"):
            leaf.total = nnx.var("totals", jnp.float32(0))
        leaf.total = leaf.total * 10 + x
        leaf.slices = nnx.Cache(x * leaf.w)
        leaf.sow("intermediates", "seen", x)
        return carry, None

    for _ in range(2):
        leaf = Leaf(2.0)
        nnx.scan(step, variable_axes={nnx.Cache: 0}, reverse=reverse)(leaf, 0, jnp.arange(1.0, 4.0))
        assert leaf.total == (321 if reverse else 123)
        np.testing.assert_array_equal(leaf.slices, [2, 4, 6])  # in the order of the axis either way
        assert leaf.seen[0].tolist() == [1, 2, 3]


def test_sown_values_do_not_grow():
    def step(leaf, carry, x):
        leaf.sow("intermediates", "seen", x)
        return carry, None

    leaf = Leaf()
    for _ in range(3):
        nnx.scan(step)(leaf, 0, jnp.arange(3.0))
        assert len(leaf.seen) == 1


@pytest.mark.parametrize("length", [0, 1])
def test_short_scans(length):
    def step(leaf, carry, x):
        leaf.w = leaf.w + x
        return carry + leaf.w, x

    leaf = Leaf(1.0)
    carry, ys = nnx.scan(step)(leaf, jnp.float32(0), jnp.ones(length))
    assert (float(carry), float(leaf.w), ys.shape) == (2.0 * length, 1.0 + length, (length,))


def test_negative_and_inner_axes_of_variables():
    layers = nnx.scan(Layer, length=N, variable_axes={nnx.Param: 1, nnx.BatchStat: -1, "counts": 0})(ctx=nnx.context(0))
    assert (layers.w.shape, layers.mean.shape, layers.calls.shape) == ((3, N, 3), (3, N), (N,))
    axes = {nnx.Param: 1, nnx.BatchStat: -1, "counts": 0}
    y, _ = nnx.scan(Layer.__call__, variable_axes=axes)(layers, X)
    expected, means, _ = loop(jnp.moveaxis(layers.w, 1, 0), X, range(N))
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    np.testing.assert_allclose(layers.mean, means.T, rtol=1e-5)
    assert layers.calls.tolist() == [1] * N


def test_gradients():
    layers = nnx.scan(Layer, length=N, variable_axes={...: 0})(ctx=nnx.context(0))
    run = nnx.scan(Layer.__call__, variable_axes={...: 0})
    grads = nnx.grad(lambda layers: (run(layers, X)[0] ** 2).sum())(layers)
    expected = jax.grad(lambda ws: (loop(ws, X, range(N))[0] ** 2).sum())(layers.w)
    np.testing.assert_allclose(grads["w"].value, expected, rtol=1e-4, atol=1e-6)
    assert layers.calls.tolist() == [1] * N


def test_a_shared_module_keeps_its_sharing():
    class Twice(nnx.Module):
        def __init__(self):
            self.a = Leaf(1.0)
            self.b = self.a

    def step(twice, carry, x):
        twice.a.w = twice.b.w + x
        return carry + twice.b.w, None

    twice = Twice()
    total, _ = nnx.scan(step)(twice, jnp.float32(0), jnp.ones(3))
    assert twice.a is twice.b
    assert (float(total), float(twice.a.w)) == (9.0, 4.0)


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_first_run_makes_what_the_others_find(reverse, wrap):
    def step(leaf, ctx, carry, x):
        if not hasattr(leaf, "other"):
            leaf.other = Leaf(5.0)
            leaf.history = nnx.Cache(jax.random.uniform(ctx.make_rng("noise")))
            leaf.w = leaf.w * 2
        else:
            leaf.history = leaf.history * 10
        leaf.other.w = leaf.other.w + x
        return carry + leaf.other.w, leaf.other.w

    leaf, ctx = Leaf(1.0), nnx.context(noise=0)
    scan = nnx.scan(step, split_rngs=False, variable_carry=(nnx.Param, nnx.Cache), reverse=reverse)
    total, ys = wrap(scan)(leaf, ctx, jnp.float32(0), jnp.arange(1.0, 4.0))
    np.testing.assert_allclose(leaf.other.w, 11.0)
    np.testing.assert_allclose(ys, [11, 10, 8] if reverse else [6, 8, 11])
    np.testing.assert_allclose(total, sum(ys))
    assert leaf.w == 2.0
    np.testing.assert_allclose(
        leaf.history, 100 * jax.random.uniform(nnx.context(noise=0).make_rng("noise")), rtol=1e-5
    )


def test_a_shared_variable_that_a_run_makes():
    def step(leaf, carry, x):
        if not hasattr(leaf, "table"):
            leaf.table = nnx.Cache(jnp.float32(7))
        leaf.seen = nnx.var("seens", x)
        return carry + leaf.table, None

    leaf = Leaf()
    total, _ = nnx.scan(step, variable_broadcast=nnx.Cache)(leaf, jnp.float32(0), jnp.arange(3.0))
    assert (float(total), float(leaf.table), float(leaf.seen)) == (21.0, 7.0, 2.0)


def test_slices_and_carried_variables_that_a_run_makes_and_reads():
    def step(leaf, carry, x):
        if not hasattr(leaf, "slices"):
            leaf.slices = nnx.Cache(jnp.float32(7))
            leaf.total = nnx.var("totals", jnp.float32(0))
        leaf.total = leaf.total + leaf.slices
        return carry, None

    with pytest.raises(nnx.StructureError, match="makes `slices` of the Leaf.*Make it before the scan"):
        nnx.scan(step, variable_axes={nnx.Cache: 0})(Leaf(), 0, jnp.ones(3))


def test_an_error_inside_changes_nothing():
    def bad(leaf, carry, x):
        leaf.w = x
        raise ZeroDivisionError

    leaf, ctx = Leaf(1.0), nnx.context(noise=0)
    with pytest.raises(ZeroDivisionError):
        nnx.scan(bad)(leaf, 0, jnp.ones(3))
    assert leaf.w == 1.0
    assert int(ctx.rngs["noise"].count) == 0


def test_scan_and_remat_modules():
    class Block(nnx.Module):
        def __init__(self, dim, *, ctx):
            self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (dim, dim)))

        def __call__(self, x, shift, ctx):
            x = jnp.tanh(x @ self.w + shift) + 0 * jax.random.uniform(ctx.make_rng("noise"))
            return x, x.sum()

    layers = nnx.Scan(Block, length=N, reverse=True)(3, ctx=nnx.context(0))
    ctx = nnx.context(noise=0)
    y, sums = nnx.jit(lambda m, x, ctx: m(x, jnp.zeros(N), ctx=ctx))(layers, X, ctx)
    expected, _, all_sums = loop(layers.layers.w, X, range(N)[::-1])
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    np.testing.assert_allclose(sums, all_sums, rtol=1e-5)
    assert int(ctx.rngs["noise"].count) == 1
    block = nnx.Remat(Block, policy=jax.checkpoint_policies.nothing_saveable)(3, ctx=nnx.context(0))
    y, _ = block(X, 0.0, ctx)
    np.testing.assert_allclose(y, jnp.tanh(X @ block.module.w), rtol=1e-5)
    for module in (layers, block):
        copy = module.clone()
        assert repr(copy) == repr(module)


def test_a_stack_by_index_and_iteration():
    class Block(nnx.Module):
        def __init__(self, *, ctx):
            self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (3, 3)))

        def __call__(self, x):
            return jnp.tanh(x @ self.w)

    stack = nnx.Stack(Block, N, unroll=2)(ctx=nnx.context(0))
    x = X
    for block in stack:
        x = block(x)
    np.testing.assert_allclose(stack(X), x, rtol=1e-5)
    assert len(stack) == N
    np.testing.assert_array_equal(stack[-1].w, stack.layers.w[N - 1])
    with pytest.raises(IndexError, match="layer 4 of a Stack of 4 layers"):
        _ = stack[N]
