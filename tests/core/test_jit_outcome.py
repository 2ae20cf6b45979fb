"""nnx.jit: what comes out of a call, of values, attributes, statics, ties and cycles."""

import jax
import jax.numpy as jnp
import pytest
from tests.core.jit_models import Leaf, Model

import nnx

# --- what comes out ---


def test_values_come_out_and_unchanged_values_stay_themselves():
    model = Model()
    left, right = model.left.w, model.right.w

    @nnx.jit
    def step(model):
        model.left.w = model.left.w + 1

    step(model)
    assert float(model.left.w) == 3.0
    assert model.left.w is not left
    assert model.right.w is right


def test_only_what_changes_is_an_output():
    model = Model()
    read = nnx.jit(lambda m: m.left.w).lower(model)
    assert len(jax.tree.leaves(read.out_info)) == 1

    @nnx.jit
    def write(m):
        m.left.w = m.left.w * 2
        m.right.w = m.right.w  # the same value

    assert len(jax.tree.leaves(write.lower(model).out_info)) == 1


def test_new_attributes_come_out():
    model = Model()

    @nnx.jit
    def step(model, x):
        model.left.seen = nnx.Intermediate(x)
        model.buffer = x + 1
        model.extra = Leaf(5.0)
        model.mode = "trained"
        model.blocks = [Leaf(1.0), Leaf(2.0)]

    step(model, 3.0)
    assert float(model.left.seen) == 3.0
    assert isinstance(model.left.get_variable("seen"), nnx.Intermediate)
    assert float(model.buffer) == 4.0
    assert float(model.extra.w) == 5.0
    assert model.mode == "trained"
    assert [float(block.w) for block in model.blocks] == [1.0, 2.0]
    model.extra.w = jnp.float32(7)  # new Modules belong to the caller's trace
    model.blocks.append(Leaf())
    model.left.seen = 0.0


def test_removed_attributes_are_gone():
    model = Model()
    model.note = "x"

    @nnx.jit
    def step(model):
        del model.left.w
        del model.right
        del model.note

    step(model)
    assert not hasattr(model.left, "w")
    assert not hasattr(model, "right")
    assert not hasattr(model, "note")
    assert model.get_state().paths == (("count",),)


def test_popped_state_is_gone():
    model = Model()
    model.y = nnx.Intermediate(jnp.float32(1))

    @nnx.jit
    def step(model):
        return model.pop_state(nnx.Intermediate)

    popped = step(model)
    assert float(popped["y"].value) == 1.0
    assert not hasattr(model, "y")


def test_an_attribute_may_change_its_type():
    model = Model()

    @nnx.jit
    def step(model):
        value = model.left.w
        del model.left.w
        model.left.w = nnx.BatchStat(value * 2, sharding=None)
        model.right, model.left = model.left, model.right

    left, right = model.left, model.right
    step(model)
    assert model.right is left
    assert model.left is right
    assert isinstance(left.get_variable("w"), nnx.BatchStat)
    assert float(left.w) == 4.0


def test_changed_statics_come_out():
    model = Model()
    model.sizes = [1, 2]
    model.config = {"a": {"b": 1}}

    @nnx.jit
    def step(model):
        model.left.rate = 0.25
        model.sizes.append(3)
        model.config["a"]["b"] = 2

    step(model)
    assert model.left.rate == 0.25
    assert model.sizes == [1, 2, 3]
    assert model.config == {"a": {"b": 2}}
    step(model)
    assert model.sizes == [1, 2, 3, 3]


def test_ties_made_inside_come_out():
    model = Model()

    @nnx.jit
    def tie(model):
        model.right.w = model.left.get_variable("w")

    tie(model)
    model.left.w = jnp.float32(9)
    assert float(model.right.w) == 9.0
    assert model.filter(nnx.Param).paths == (("left", "w"),)


def test_ties_undone_inside_come_out():
    model = Model()
    model.right.w = model.left.get_variable("w")

    @nnx.jit
    def untie(model):
        value = model.right.w
        del model.right.w
        model.right.w = nnx.Param(value + 1)

    untie(model)
    assert (float(model.left.w), float(model.right.w)) == (2.0, 3.0)
    assert len(model.filter(nnx.Param)) == 2


def test_cycles_made_and_cut_inside():
    model = Model()

    @nnx.jit
    def cycle(model):
        model.left.parent = model

    @nnx.jit
    def cut(model):
        del model.left.parent
        model.count += 1

    cycle(model)
    assert model.left.parent is model
    cut(model)
    assert not hasattr(model.left, "parent")
    assert model.count == 1


def test_a_changed_dtype_and_shape_come_out():
    leaf = Leaf()

    @nnx.jit
    def step(leaf):
        leaf.w = jnp.zeros((2, 3), jnp.int32)

    step(leaf)
    assert leaf.w.shape == (2, 3)
    assert leaf.w.dtype == jnp.int32


def test_containers_edited_in_place():
    class Box(nnx.Module):
        def __init__(self):
            self.node = nnx.Node([jnp.float32(1), {"a": jnp.float32(2)}])
            self.cache = nnx.Cache({"keys": [jnp.float32(0)], "index": 0})

    @nnx.jit
    def step(box, x):
        box.node[1]["a"] = box.node[1]["a"] + x
        box.cache["keys"].append(x)
        box.cache["index"] += 1

    box = Box()
    step(box, 1.0)
    step(box, 5.0)
    assert [float(x) for x in jax.tree.leaves(box.node)] == [1.0, 8.0]
    assert [float(x) for x in box.cache["keys"]] == [0.0, 1.0, 5.0]
    assert int(box.cache["index"]) == 2
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(box.get_state()))


def test_a_container_edited_before_an_exception_is_as_it_was():
    module = nnx.Module()
    module.node = nnx.Node([jnp.float32(1)])
    held = module.node

    @nnx.jit
    def step(module):
        module.node.append(module.node[0])
        raise KeyError("no")

    with pytest.raises(KeyError):
        step(module)
    assert module.node is held
    assert len(held) == 1
