"""while_loop and fori_loop against loops in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.models import Leaf

import nnx


class Model(nnx.Module):
    def __init__(self):
        self.a = Leaf(2.0)
        self.b = self.a
        self.count = nnx.var("counts", 0)

    def step(self, ctx, x):
        self.count += 1
        self.b.w = self.a.w * 1.5
        return x + self.a.w * jax.random.uniform(ctx.make_rng("noise"))


def body(val):
    model, ctx, x = val
    return model, ctx, model.step(ctx, x)


def in_python(n):
    model, ctx, x = Model(), nnx.context(noise=0), jnp.float32(0)
    for _ in range(n):
        x = model.step(ctx, x)
    return float(x), float(model.a.w), int(model.count), int(ctx.rngs["noise"].count)


def state_of(val):
    model, ctx, x = val
    assert model.a is model.b
    return float(x), float(model.a.w), int(model.count), int(ctx.rngs["noise"].count)


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit])
@pytest.mark.parametrize("n", [0, 1, 4])
def test_loops_are_loops(n, wrap):
    loops = [
        lambda *val: nnx.while_loop(lambda val: val[0].count < n, body, val),
        lambda *val: nnx.fori_loop(0, n, lambda i, val: body(val), val),
        lambda *val: nnx.fori_loop(jnp.int32(3), jnp.int32(3 + n), lambda i, val: body(val), val),
    ]
    for loop in loops:
        model, ctx = Model(), nnx.context(noise=0)
        got = wrap(loop)(model, ctx, jnp.float32(0))
        assert got[0] is model
        assert got[1] is ctx
        np.testing.assert_allclose(state_of(got), in_python(n), rtol=1e-6)


def test_the_index_and_the_unrolling():
    def add(i, val):
        leaf, total = val
        leaf.w = leaf.w + i
        return leaf, total + leaf.w

    for unroll in (None, 2, True):
        leaf = Leaf(0.0)
        assert nnx.fori_loop(2, 6, add, (leaf, jnp.float32(0)), unroll=unroll)[1] == 2 + 5 + 9 + 14
        assert leaf.w == 14


def test_a_known_range_has_a_reverse_gradient():
    def loss(leaf):
        return nnx.fori_loop(0, 3, lambda i, val: (val[0], val[1] * val[0].w), (leaf, jnp.float32(1)))[1]

    assert nnx.grad(loss)(Leaf(2.0))["w"].value == 12.0


def test_numbers_take_the_type_that_comes_out():
    assert nnx.fori_loop(0, 3, lambda i, x: x + 0.5, 0) == 1.5
    model = Leaf()
    model.n = nnx.var("counts", 0)

    def half(i, model):
        model.n = model.n + 0.5
        return model

    nnx.fori_loop(0, 3, half, model)
    assert model.n == 1.5


def test_what_the_body_makes_and_sows():
    def make(i, leaf):
        leaf.last = nnx.var("lasts", leaf.w + i)
        leaf.sow("intermediates", "y", leaf.w * i)
        return leaf

    leaf = Leaf(2.0)
    for _ in range(2):
        nnx.fori_loop(0, 3, make, leaf)
        assert leaf.last == 4.0
        assert [float(y) for y in leaf.y] == [4.0]
    never = Leaf(2.0)
    nnx.fori_loop(0, 0, make, never)
    assert never.last == 0.0


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("n", [0, 1, 4])
def test_the_first_run_makes_what_the_others_find(n, wrap):
    def make(val):
        leaf, ctx, i = val
        if not hasattr(leaf, "other"):
            leaf.other = Leaf(5.0)
            leaf.drawn = nnx.Cache(jax.random.uniform(ctx.make_rng("noise")))
            leaf.w = leaf.w * 2
        leaf.other.w = leaf.other.w * 2
        return leaf, ctx, i + 1

    loops = [
        lambda *val: nnx.fori_loop(2, n + 2, lambda i, val: make(val), val),
        lambda *val: nnx.while_loop(lambda val: val[2] < n, make, val),
    ]
    for loop in loops:
        leaf, ctx = Leaf(1.0), nnx.context(noise=0)
        wrap(loop)(leaf, ctx, 0)
        assert leaf.other.w == (5.0 * 2**n if n else 0)
        assert leaf.w == (2.0 if n else 1.0)
        np.testing.assert_allclose(
            leaf.drawn, jax.random.uniform(nnx.context(noise=0).make_rng("noise")) if n else 0, rtol=1e-6
        )
        assert int(ctx.rngs["noise"].count) == min(n, 1)


def test_keys_integers_and_pytrees_are_carried():
    class Mixed(nnx.Module):
        def __init__(self):
            self.key = nnx.var("keys", jax.random.key(0))
            self.done = nnx.var("flags", False)
            self.pair = nnx.Node({"a": jnp.zeros(2), "b": [jnp.int32(1)]})

    def step(i, m):
        m.key = jax.random.fold_in(m.key, i)
        m.done = i > 0
        m.pair = {"a": m.pair["a"] + 1, "b": [m.pair["b"][0] * 2]}
        return m

    m = nnx.fori_loop(0, 3, step, Mixed())
    expected = jax.random.key(0)
    for i in range(3):
        expected = jax.random.fold_in(expected, i)
    assert (jax.random.key_data(m.key) == jax.random.key_data(expected)).all()
    assert m.done
    assert (m.pair["a"].tolist(), int(m.pair["b"][0])) == ([3.0, 3.0], 8)


def test_one_module_in_two_places_of_the_carry():
    leaf = Leaf(1.0)

    def double(i, val):
        val[0].w = val[0].w * 2
        return val

    got = nnx.fori_loop(0, 3, double, (leaf, leaf))
    assert got[0] is leaf
    assert got[1] is leaf
    assert leaf.w == 8.0


def test_an_error_in_a_body_changes_nothing():
    def bad(val):
        val.w = val.w + 1
        raise ZeroDivisionError

    leaf = Leaf(1.0)
    with pytest.raises(ZeroDivisionError):
        nnx.while_loop(lambda leaf: leaf.w < 3, bad, leaf)
    assert leaf.w == 1.0


def test_bound_methods():
    class Counter(nnx.Module):
        def __init__(self):
            self.n = nnx.var("counts", jnp.int32(0))

        def below(self, x):
            return self.n < 4

        def step(self, x):
            self.n += 1
            return x * 2

    counter = Counter()
    assert nnx.while_loop(counter.below, counter.step, 1.0) == 16.0
    assert counter.n == 4
