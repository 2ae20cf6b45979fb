"""Graphs of Modules: sharing, cycles and depth, and what copies keep of them."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.models import Everything, Leaf

import nnx

# Sharing, cycles, depth


def test_a_shared_module_is_one_entry_and_stays_shared():
    shared = Leaf(2.0)
    model = nnx.Sequence([shared, shared])
    assert model.get_state().paths == (("0", "w"),)
    for other in (model.partition().merge(), model.clone(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0] is other[1]
        assert other[0] is not shared
        other[1].w = jnp.float32(3.0)
        assert other[0].w == 3.0
    assert shared.w == 2.0


def _cycle():
    parent, child = Leaf(1.0), Leaf(2.0)
    parent.child, child.parent = child, parent
    parent.me = parent
    return parent


@pytest.mark.parametrize(
    "remake",
    [
        lambda m: m.partition().merge(),
        lambda m: m.clone(),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        nnx.jit(lambda m: m.clone()),
        lambda m: m.apply(1.0)[1],
    ],
    ids=["merge", "clone", "deepcopy", "pickle", "jit", "apply"],
)
def test_cycles_are_kept(remake):
    model = _cycle()
    other = remake(model)
    assert other is not model
    assert other.me is other
    assert other.child.parent is other
    assert other.child is not model.child
    assert other.get_state().paths == (("child", "w"), ("w",))


def test_a_cycle_is_returned_as_itself_from_jit():
    model = _cycle()
    assert nnx.jit(lambda m: m.child)(model) is model.child


def test_repr_of_a_cycle_ends():
    text = repr(_cycle())
    assert "Leaf(...)  # shared with the root" in text


DEPTH = 300


@pytest.fixture(scope="module")
def deep():
    model = Leaf(0.0)
    for i in range(DEPTH - 1):
        parent = Leaf(float(i + 1))
        parent.child = model
        model = parent
    return model


def _bottom(model):
    while hasattr(model, "child"):
        model = model.child
    return model


@pytest.mark.parametrize(
    "remake",
    [
        lambda m: m.partition().merge(),
        lambda m: m.clone(),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: pickle.loads(pickle.dumps(m.partition())).merge(),
        lambda m: pickle._loads(pickle.dumps(m)),
    ],
    ids=["merge", "clone", "deepcopy", "pickle", "pickled Pure", "python unpickler"],
)
def test_deep_graphs_are_remade(deep, remake):
    other = remake(deep)
    assert len(other.get_state()) == DEPTH
    assert other.get_module_def() == deep.get_module_def()
    assert _bottom(other) is not _bottom(deep)
    assert _bottom(other).w == 0.0


def test_deep_graphs_are_printed(deep):
    assert repr(deep).startswith("Leaf(\n")
    assert repr(deep.get_module_def()).startswith("ModuleDef(")
    assert "State" in repr(deep.get_state())


def test_deep_graphs_go_through_jit_and_grad(deep):
    def total(m):
        out = 0.0
        while True:
            out = out + m.w
            if not hasattr(m, "child"):
                return out
            m = m.child

    assert nnx.jit(total)(deep) == sum(range(DEPTH))
    grads = nnx.grad(total)(deep)
    assert all(value == 1.0 for value in jax.tree.leaves(grads))


def test_deep_graphs_are_updated_and_popped(deep):
    model = deep.clone()
    model.update_state(jax.tree.map(lambda w: w + 1, model.get_state()))
    assert _bottom(model).w == 1.0
    model.update_state(deep)
    assert _bottom(model).w == 0.0
    count = 0

    def visit(_):
        nonlocal count
        count += 1

    model.for_each(Leaf, visit)
    assert count == DEPTH
    assert len(model.pop_state(nnx.Param)) == DEPTH
    assert len(model.get_state()) == 0


def test_a_deep_graph_with_shortcuts_is_walked_once():
    """Each level refers twice to the next: two to the power of 60 paths, 60 Modules."""
    model = Leaf(0.0)
    for _ in range(60):
        parent = nnx.Module()
        parent.left = parent.right = model
        model = parent
    assert len(model.get_state()) == 1
    assert copy.deepcopy(model).clone().left is not None
    assert len(repr(model)) < 100_000


# copy, deepcopy, pickle, clone


def test_copy_shares_submodules_but_not_values():
    model = Everything()
    other = copy.copy(model)
    assert type(other) is Everything
    assert other.child is model.child
    assert other.listing is model.listing
    other.param = jnp.full(2, 9.0)
    other.integer = 4
    other.new = nnx.Param(1.0)
    np.testing.assert_array_equal(model.param, jnp.ones(2))
    assert model.integer == 3
    assert not hasattr(model, "new")
    assert other != model
    assert hash(other) != hash(model) or other is not model


def test_deepcopy_shares_nothing():
    model = Everything()
    other = copy.deepcopy(model)
    other.child.w = jnp.float32(9.0)
    other.np_buffer[0] = 100
    other.listing[2].append(4)
    other.mapping["lr"] = 1.0
    other.node["b"][0] = jnp.full(1, 7.0)
    assert model.child.w == 1.0
    assert model.np_buffer[0] == 0
    assert model.listing == [1, 2, [3]]
    assert model.mapping == {"lr": 0.1}
    assert model.node["b"][0] == 0
    assert (
        jax.random.key_data(other.ctx.make_rng("dropout")).tolist()
        == jax.random.key_data(model.ctx.make_rng("dropout")).tolist()
    )


def test_deepcopy_of_a_list_of_modules_keeps_what_they_share():
    shared = Leaf()
    first, second = nnx.Sequence([shared]), nnx.Sequence([shared])
    copied = copy.deepcopy([first, second, shared])
    assert copied[0][0] is copied[1][0]
    assert copied[0][0] is copied[2]
    assert copied[2] is not shared


def test_deepcopy_keeps_a_tie_across_roots():
    first, second = Leaf(), Leaf()
    second.w = first.get_variable("w")
    a, b = copy.deepcopy([first, second])
    a.w = jnp.float32(4.0)
    assert b.w == 4.0


def test_deepcopy_keeps_statics_that_are_one_object_one():
    model = nnx.Module()
    model.a = model.b = [1]
    for other in (copy.deepcopy(model), model.clone()):
        other.a.append(2)
        assert other.b == [1, 2]
        assert model.b == [1]


def test_pickle_round_trip():
    model = Everything()
    model.ctx.make_rng("dropout")
    other = pickle.loads(pickle.dumps(model))
    assert other.get_module_def() == model.get_module_def()
    for mine, theirs in zip(
        jax.tree.leaves(model.filter(nnx.Not(nnx.PathGlob("ctx/*")))),
        jax.tree.leaves(other.filter(nnx.Not(nnx.PathGlob("ctx/*")))),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(
        jax.random.key_data(model.ctx.make_rng("dropout")), jax.random.key_data(other.ctx.make_rng("dropout"))
    )
    other.param = jnp.zeros(2)
    np.testing.assert_array_equal(model.param, jnp.ones(2))


def test_pickle_keeps_collections_made_by_name():
    model = nnx.Module()
    model.loss = nnx.var("my_losses", 1.0)
    other = pickle.loads(pickle.dumps(model))
    assert type(other.get_variable("loss")) is type(model.get_variable("loss"))
    assert other.filter("my_losses").paths == (("loss",),)


def test_a_pickled_module_shows_its_variables_over_class_attributes():
    module = Shadowing()
    data = pickle.dumps(module)
    assert pickle.loads(data).bias == 2.0


class Shadowing(nnx.Module):
    bias = None

    def __init__(self):
        self.bias = nnx.Param(2.0)


def test_a_copy_is_independent_of_what_was_compiled():
    step = nnx.jit(lambda m, x: m(x))
    model = Leaf(2.0)
    assert step(model, 3.0) == 6.0
    for other in (copy.copy(model), copy.deepcopy(model), model.clone(), pickle.loads(pickle.dumps(model))):
        other.w = jnp.float32(5.0)
        assert step(other, 3.0) == 15.0
        assert step(model, 3.0) == 6.0


def test_clone_of_clone_is_independent_and_equal():
    model = Everything()
    other = model.clone()
    assert other.get_module_def() is model.get_module_def()
    other.blocks[0].w = jnp.float32(10.0)
    other.np_buffer += 1
    other.listing.append(9)
    assert model.blocks[0].w == 1.0
    assert model.np_buffer[0] == 0
    assert model.listing == [1, 2, [3]]
    assert other.get_module_def() != model.get_module_def()


def test_clone_does_not_run_init():
    class Counts(nnx.Module):
        made = 0

        def __init__(self):
            type(self).made += 1

    Counts().clone()
    assert Counts.made == 1


def test_modules_compare_by_identity_and_hash():
    a, b = Leaf(), Leaf()
    assert a != b
    assert len({a, b, a}) == 2
