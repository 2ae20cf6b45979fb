"""cond and switch: the branch that runs writes, the others do not."""

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
        self.noise = nnx.BatchStat(jnp.float32(0))

    def up(self, x):
        self.count += 1
        return self.a.w * x

    def down(self, x):
        self.a.w = self.a.w - 1
        return x


def test_only_the_branch_that_runs_writes():
    model = Model()
    assert nnx.cond(True, Model.up, Model.down, model, 3.0) == 6.0
    assert (int(model.count), float(model.b.w)) == (1, 2.0)
    assert nnx.cond(False, Model.up, Model.down, model, 3.0) == 3.0
    assert (int(model.count), float(model.b.w)) == (1, 1.0)
    assert model.a is model.b


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit])
def test_traced_predicates_and_indices(wrap):
    model = Model()
    step = wrap(lambda model, i, x: nnx.switch(i, [Model.up, Model.down, Model.up], model, x))
    got = [float(step(model, jnp.int32(i), jnp.float32(3))) for i in (0, 1, 2, 7)]
    assert got == [6.0, 3.0, 3.0, 3.0]
    assert int(model.count) == 3


def test_bound_methods_and_modules():
    model, other = Model(), Leaf(5.0)
    assert nnx.cond(True, model.up, other, 3.0) == 6.0
    assert nnx.cond(False, model.up, other, 3.0) == 15.0
    assert int(model.count) == 1


def test_a_module_that_a_branch_returns_is_the_one_passed():
    model = Model()
    got, inside = nnx.cond(True, lambda m: (m, m.a), lambda m: (m, m.a), model)
    assert got is model
    assert inside is model.a


def test_new_attributes_in_both_branches():
    def one(m):
        m.made = nnx.BatchStat(jnp.float32(1))

    def two(m):
        m.made = nnx.BatchStat(jnp.float32(2))

    model = Model()
    for pick, expected in ((True, 1.0), (False, 2.0)):
        nnx.cond(pick, one, two, model)
        assert model.made == expected


def test_streams_advance_by_the_branch_that_draws_most():
    def draw(ctx, n):
        return sum(jax.random.uniform(ctx.make_rng("a")) for _ in range(n))

    ctx, loop = nnx.context(a=0), nnx.context(a=0)
    got = nnx.cond(False, lambda ctx: draw(ctx, 3), lambda ctx: draw(ctx, 1), ctx)
    np.testing.assert_allclose(got, draw(loop, 1))
    assert ctx.rngs["a"].count == 3


def test_a_stream_written_in_one_branch_and_drawn_from_in_the_other():
    start, _ = nnx.context(a=0).partition()
    ctx = nnx.context(a=0)
    ctx.make_rng("a")

    def reset(ctx):
        ctx.update_state(start)

    def draw(ctx):
        ctx.make_rng("a")

    nnx.cond(False, reset, draw, ctx)
    assert ctx.rngs["a"].count == 2
    nnx.cond(True, reset, draw, ctx)
    assert ctx.rngs["a"].count == 0


def test_gradients_go_through():
    model = Model()
    grads = nnx.grad(lambda m, x: nnx.cond(x > 0, Model.up, Model.down, m, x))(model, 3.0)
    assert grads["a", "w"].value == 3.0
    assert int(model.count) == 1


def test_flags_and_strings_are_what_they_are():
    def scaled(x, double, name):
        assert name == "x"
        return x * 2 if double else x

    assert nnx.cond(True, scaled, lambda x, double, name: x, 3.0, True, "x") == 6.0
    assert nnx.cond(True, scaled, lambda x, double, name: x, 3.0, False, "x") == 3.0


def test_an_error_in_a_branch_changes_nothing():
    def bad(m):
        m.count += 1
        raise ZeroDivisionError

    model = Model()
    with pytest.raises(ZeroDivisionError):
        nnx.cond(True, lambda m: None, bad, model)
    assert model.count == 0


def test_what_is_sown_does_not_grow():
    def sow(m):
        m.sow("intermediates", "y", m.a.w)

    model = Model()
    for _ in range(3):
        nnx.cond(True, sow, sow, model)
        assert len(model.y) == 1
