"""Donation: a donated Module stays usable, whatever else holds its arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.jit_models import Leaf, Model, traced

import nnx


@pytest.mark.parametrize("options", [{"donate_argnums": 0}, {"donate_argnums": (0,)}, {"donate_argnames": "leaf"}])
def test_a_donated_module_stays_usable(options):
    @traced(**options)
    def step(leaf, x):
        leaf.w = leaf.w + x
        return leaf

    leaf = Leaf()
    leaf.w, leaf.b = jnp.zeros(100), jnp.ones(50)
    old = leaf.w
    for _ in range(3):
        assert step(leaf, 1.0) is leaf
    np.testing.assert_array_equal(leaf.w, np.full(100, 3.0))
    np.testing.assert_array_equal(leaf.b, np.ones(50))
    assert old.is_deleted()
    assert step.traces[0] <= 2


def test_a_donated_module_by_keyword():
    step = nnx.jit(lambda x, *, leaf: setattr(leaf, "w", leaf.w + x), donate_argnames="leaf")
    leaf = Leaf(1.0)
    step(1.0, leaf=leaf)
    step(1.0, leaf=leaf)
    assert float(leaf.w) == 3.0


def test_a_donated_module_inside_of_a_container():
    step = nnx.jit(lambda box: setattr(box["m"], "w", box["m"].w + 1), donate_argnums=0)
    leaf = Leaf(1.0)
    leaf.other = nnx.Param(jnp.ones(4))
    step({"m": leaf})
    step({"m": leaf})
    assert float(leaf.w) == 3.0
    np.testing.assert_array_equal(leaf.other, np.ones(4))


def test_one_array_in_two_slots_of_a_donated_module():
    shared = jnp.arange(4.0)
    leaf = Leaf()
    leaf.a, leaf.b = nnx.Param(shared), nnx.Param(shared)
    step = nnx.jit(lambda leaf: setattr(leaf, "a", leaf.a + 1), donate_argnums=0)
    step(leaf)
    step(leaf)
    np.testing.assert_array_equal(leaf.a, np.arange(4.0) + 2)
    np.testing.assert_array_equal(leaf.b, np.arange(4.0))


def test_one_array_in_a_donated_module_and_in_one_that_is_not():
    shared = jnp.arange(4.0)
    a, b = Leaf(), Leaf()
    a.w, b.w = shared, shared
    step = nnx.jit(lambda a, b: setattr(a, "w", a.w + b.w), donate_argnums=0)
    step(a, b)
    np.testing.assert_array_equal(a.w, 2 * np.arange(4.0))
    np.testing.assert_array_equal(b.w, np.arange(4.0))


def test_one_array_in_two_donated_modules():
    shared = jnp.arange(4.0)
    a, b = Leaf(), Leaf()
    a.w, b.w = shared, shared
    step = nnx.jit(lambda a, b: setattr(a, "w", a.w + b.w), donate_argnums=(0, 1))
    step(a, b)
    step(a, b)
    np.testing.assert_array_equal(a.w, 3 * np.arange(4.0))
    np.testing.assert_array_equal(b.w, np.arange(4.0))


def test_one_donated_module_twice():
    leaf = Leaf(1.0)
    step = nnx.jit(lambda a, b: setattr(a, "w", a.w + b.w), donate_argnums=(0, 1))
    step(leaf, leaf)
    assert float(leaf.w) == 2.0


def test_a_part_of_a_donated_module_beside_it():
    model = Model()
    step = nnx.jit(lambda m, left: setattr(left, "w", m.right.w + left.w), donate_argnums=0)
    step(model, model.left)
    step(model, model.left)
    assert float(model.left.w) == 8.0
    assert float(model.right.w) == 3.0


def test_a_donated_module_whose_structure_changes():
    @nnx.jit(donate_argnums=0)
    def step(model):
        model.new = nnx.Param(model.left.w)
        del model.right

    model = Model()
    step(model)
    assert float(model.new) == float(model.left.w) == 2.0


def test_a_donated_context():
    ctx = nnx.context(dropout=0)
    step = nnx.jit(lambda ctx: ctx.make_rng("dropout"), donate_argnums=0)
    reference = nnx.context(dropout=0)
    for _ in range(3):
        assert jnp.array_equal(jax.random.key_data(step(ctx)), jax.random.key_data(reference.make_rng("dropout")))


def test_donated_arrays_beside_modules():
    step = nnx.jit(lambda leaf, x: leaf.w + x, donate_argnums=1)
    x = jnp.ones(3)
    np.testing.assert_array_equal(step(Leaf(1.0), x), [2.0, 2.0, 2.0])
    assert x.is_deleted()


def test_a_donated_method():
    class Counter(nnx.Module):
        def __init__(self):
            self.total = nnx.Param(jnp.zeros(3))

        @functools.partial(nnx.jit, donate_argnums=0)
        def add(self, x):
            self.total = self.total + x

    counter = Counter()
    counter.add(1.0)
    counter.add(2.0)
    np.testing.assert_array_equal(counter.total, [3.0, 3.0, 3.0])


def test_arrays_that_come_to_be_in_two_places_after_the_first_call():
    a, b = Leaf(1.0), Leaf(2.0)
    a.other = nnx.Param(jnp.float32(5))
    step = traced(lambda a, b: setattr(a, "w", a.w + b.w + a.other), donate_argnums=0)
    step(a, b)
    assert float(a.w) == 8.0
    b.w = a.w  # in a Module that is not donated
    step(a, b)
    assert (float(a.w), float(b.w)) == (21.0, 8.0)
    a.other = a.w  # twice in the donated one
    step(a, b)
    assert (float(a.w), float(b.w), float(a.other)) == (50.0, 8.0, 21.0)
    step(a, b)
    assert float(a.w) == 79.0
    assert step.traces == [1]


def test_an_array_of_a_donated_module_as_an_argument_of_its_own():
    leaf = Leaf(1.0)
    step = nnx.jit(lambda leaf, x: setattr(leaf, "w", leaf.w + x), donate_argnums=0)
    for i in range(1, 4):
        x = leaf.w
        step(leaf, x)
        assert float(leaf.w) == 2.0**i
        assert float(x) == 2.0 ** (i - 1)


def test_an_unused_module_keeps_the_array_that_a_donated_one_gives_away():
    """XLA leaves unused arguments out, so nobody but us would see that the array is in both."""
    a, b = Leaf(1.0), Leaf(2.0)
    step = nnx.jit(lambda a, b: setattr(a, "w", a.w * 2), donate_argnums=0)
    step(a, b)
    b.w = a.w
    step(a, b)
    assert (float(a.w), float(b.w)) == (4.0, 2.0)


def test_a_donated_argument_that_a_module_holds():
    leaf = Leaf(1.0)
    step = nnx.jit(lambda leaf, x: leaf.w + x, donate_argnums=1)
    for _ in range(3):
        x = leaf.w
        assert float(step(leaf, x)) == 2.0
        assert float(leaf.w) == 1.0
        assert x.is_deleted()


def test_a_failing_donated_call_raises_its_own_error():
    step = nnx.jit(lambda leaf, x: leaf.w + x, donate_argnums=0)
    leaf = Leaf(1.0)
    step(leaf, jnp.ones(3))
    with pytest.raises(TypeError, match="non-array argument"):
        step(leaf, object())
    assert float(leaf.w) == 1.0


def test_many_arguments_that_are_one_module(monkeypatch):
    monkeypatch.setattr("nnx.core._layout._KEPT", 8)  # so that what is known of the first is forgotten within the call
    leaf = Leaf(1.0)
    step = nnx.jit(lambda *leaves: setattr(leaves[0], "w", leaves[0].w + 1), donate_argnums=0)
    for i in range(3):
        step(*[leaf] * 12)
        assert float(leaf.w) == i + 2


def test_a_donated_module_that_keeps_a_method_of_another():
    class Keeper(nnx.Module):
        def __init__(self, leaf):
            self.call = leaf.scaled
            self.count = nnx.Param(jnp.float32(0))

    leaf = Leaf(2.0)
    keeper = Keeper(leaf)
    step = nnx.jit(lambda leaf, keeper: setattr(keeper, "count", keeper.call(1.0, 3.0)), donate_argnums=(0, 1))
    for _ in range(3):
        step(leaf, keeper)
    assert float(keeper.count) == 6.0


def test_unused_arguments_that_are_left_out():
    a, b = Leaf(1.0), Leaf(2.0)
    step = nnx.jit(lambda a, b: setattr(a, "w", a.w * 2), donate_argnums=0, keep_unused=False)
    step(a, b)
    b.w = a.w
    step(a, b)
    step(a, b)
    assert (float(a.w), float(b.w)) == (8.0, 2.0)


def test_two_arrays_on_one_buffer():
    a = Leaf(1.0)
    b = a.clone()
    b.w = jax.device_put(a.w, jax.devices()[0])
    step = nnx.jit(lambda a, b: (setattr(a, "w", a.w + 1), setattr(b, "w", b.w + 10)), donate_argnums=(0, 1))
    for i in range(6):
        step(a, b)
        assert (float(a.w), float(b.w)) == (2.0 + i, 11.0 + 10 * i)
    for _ in range(6):  # again and again, until it is looked for at each call
        b.w = jax.device_put(a.w, jax.devices()[0])
        step(a, b)
        assert float(b.w) == float(a.w) + 9


def test_an_error_that_speaks_of_donation_is_none_of_it():
    step = nnx.jit(lambda leaf: leaf.w.missing, donate_argnums=0)
    with pytest.raises(AttributeError, match="missing"):
        step(Leaf())
