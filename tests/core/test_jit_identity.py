"""nnx.jit: which object is which, afterwards."""

import jax
import jax.numpy as jnp
import pytest
from tests.core.jit_models import Leaf, Model, traced

import nnx


def test_returned_arguments_are_the_same_objects():
    model, ctx = Model(), nnx.context(0)
    got = nnx.jit(lambda m, c: (m, [c, m], {"left": m.left}))(model, ctx)
    assert got[0] is model
    assert got[1][0] is ctx
    assert got[1][1] is model
    assert got[2]["left"] is model.left


def test_returned_arguments_of_a_changed_structure_are_the_same_objects():
    @nnx.jit
    def step(model):
        model.left, model.right = model.right, model.left
        model.new = Leaf()
        return model, model.left, model.new

    model = Model()
    left, right = model.left, model.right
    got, got_left, got_new = step(model)
    assert got is model
    assert got_left is model.left is right
    assert model.right is left
    assert got_new is model.new


def test_a_submodule_that_is_detached_and_returned_is_the_same_object():
    @nnx.jit
    def step(model):
        left = model.left
        del model.left
        left.w = left.w + 1
        return left

    model = Model()
    left = model.left
    assert step(model) is left
    assert float(left.w) == 3.0


def test_a_submodule_that_is_detached_and_changed_is_changed():
    """Somebody outside may still hold it, as it would be without the transform."""

    @nnx.jit
    def step(model):
        left = model.left
        del model.left
        left.w = left.w + 1

    model = Model()
    left = model.left
    step(model)
    assert float(left.w) == 3.0


def test_fresh_modules_are_returned():
    @nnx.jit
    def make(ctx):
        model = Model()
        model.left.w = jax.random.normal(ctx.make_rng("params"))
        return model, [model.left], nnx.context(dropout=1)

    model, (left,), ctx = make(nnx.context(0))
    assert model.left is left
    assert not isinstance(left.w, jax.core.Tracer)
    left.w = jnp.float32(1)
    assert float(model(1.0)) == 3.0
    assert ctx.make_rng("dropout").shape == ()


def test_fresh_modules_are_fresh_at_each_call():
    make = traced(lambda x: Leaf(value=x))
    a, b = make(1.0), make(2.0)
    assert a is not b
    assert (float(a.w), float(b.w)) == (1.0, 2.0)
    assert make.traces == [1]


def test_fresh_modules_that_hold_arguments():
    @nnx.jit
    def wrap(leaf):
        model = Model()
        model.left = leaf
        leaf.w = leaf.w + 1
        return model

    leaf = Leaf(1.0)
    model = wrap(leaf)
    assert model.left is leaf
    assert float(leaf.w) == 2.0


def test_the_same_module_twice():
    @traced
    def step(a, b):
        assert a is b
        a.w = a.w + 1
        b.w = b.w + 1
        return b

    leaf = Leaf(0.0)
    assert step(leaf, leaf) is leaf
    assert float(leaf.w) == 2.0
    step(leaf, leaf)
    assert step.traces == [1]


def test_one_function_called_with_the_same_and_with_different_modules():
    @traced
    def step(a, b):
        a.w = a.w + 1
        return a is b

    one, two = Leaf(0.0), Leaf(0.0)
    assert bool(step(one, one)) is True
    assert bool(step(one, two)) is False
    assert bool(step(two, two)) is True
    assert (float(one.w), float(two.w)) == (2.0, 1.0)
    assert step.traces == [2]


@pytest.mark.parametrize("order", [lambda m: (m, m.left), lambda m: (m.left, m)])
def test_a_module_and_its_part(order):
    @traced
    def step(a, b):
        model, left = (a, b) if isinstance(a, Model) else (b, a)
        assert model.left is left
        left.w = left.w * 2
        model.left.w = model.left.w + 1
        return left

    model = Model()
    for expected in (5.0, 11.0):
        assert step(*order(model)) is model.left
        assert float(model.left.w) == expected
    assert step.traces == [1]


@pytest.mark.parametrize("order", [lambda m: (m, m.left), lambda m: (m.left, m)])
def test_the_structure_of_a_shared_part_changes(order):
    @nnx.jit
    def step(a, b):
        model, left = (a, b) if isinstance(a, Model) else (b, a)
        left.extra = nnx.Param(jnp.float32(4))
        del model.right
        return model, left

    model = Model()
    left = model.left
    assert step(*order(model)) == (model, left)
    assert model.left is left
    assert float(left.extra) == 4.0
    assert not hasattr(model, "right")


def test_two_modules_with_a_part_in_common():
    a, b = Model(), Model()
    b.left = a.left

    @traced
    def step(a, b):
        assert a.left is b.left
        a.left.w = a.left.w + b.left.w

    step(a, b)
    step(a, b)
    assert float(b.left.w) == 8.0
    assert b.left is a.left
    assert step.traces == [1]


def test_tied_variables_across_arguments():
    a, b = Leaf(1.0), Leaf(2.0)
    b.w = a.get_variable("w")

    @traced
    def step(a, b):
        a.w = a.w + 1
        return b.w

    assert float(step(a, b)) == 2.0
    assert float(step(b, a)) == 3.0
    assert a.get_variable("w") is b.get_variable("w")
    assert step.traces == [1]


def test_a_part_with_a_callback_to_its_parent():
    """Alone the part could not be partitioned; beside its parent it can."""

    class Parent(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.float32(2))
            self.child = nnx.Module()
            self.child.callback = self.double

        def double(self):
            self.w = self.w * 2
            return self.w

    parent = Parent()
    step = nnx.jit(lambda parent, child: child.callback())
    assert float(step(parent, parent.child)) == 4.0
    assert float(step(parent, parent.child)) == 8.0
    assert float(parent.w) == 8.0


def test_the_structure_of_sharing_is_part_of_the_signature():
    @traced
    def step(a, b):
        return a.left is b.left

    a, b = Model(), Model()
    assert not step(a, b)
    b.left = a.left
    assert step(a, b)
    b.left = Leaf()
    assert not step(a, b)
