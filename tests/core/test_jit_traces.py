"""nnx.jit: when a function is traced, and what is left if it fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.jit_models import Leaf, Model, traced

import nnx

# --- exceptions ---


def test_an_exception_leaves_every_module_as_it_was():
    model, ctx = Model(), nnx.context(dropout=0)
    model.sizes = [1]
    state, moduledef = model.partition()

    @nnx.jit
    def step(model, ctx):
        model.left.w = model.left.w * 2
        ctx.make_rng("dropout")
        model.new = Leaf()
        model.sizes.append(2)
        del model.right
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside"):
        step(model, ctx)
    after, same = model.partition()
    assert same is moduledef
    assert all(new is old for new, old in zip(after.raw_values, state.raw_values, strict=True))
    assert ctx.rngs["dropout"].count == 0
    assert model.sizes == [1]


def test_a_function_works_after_an_exception():
    fail = [True]

    @nnx.jit
    def step(model):
        model.count += 1
        if fail[0]:
            raise ValueError("once")

    model = Model()
    with pytest.raises(ValueError, match="once"):
        step(model)
    fail[0] = False
    step(model)
    assert model.count == 1


def test_an_output_that_is_no_array_is_an_error_and_changes_nothing():
    model = Model()

    @nnx.jit
    def step(model):
        model.count += 1
        return object()

    with pytest.raises(TypeError, match="not a valid JAX type"):
        step(model)
    assert model.count == 0


def test_a_value_that_cannot_come_out_is_an_error_with_its_path():
    model = Model()

    @nnx.jit
    def step(model):
        model.left.w = "text"

    with pytest.raises(nnx.VariableError, match="`left/w` was given a str inside of a transform"):
        step(model)
    assert float(model.left.w) == 2.0


def test_after_an_exception_raw_jax_still_refuses_modules():
    with pytest.raises(ZeroDivisionError):
        nnx.jit(lambda m: 1 / 0)(Model())
    with pytest.raises(nnx.AttributeKindError, match="a Model is an nnx.Module and not a pytree"):
        jax.tree.leaves(Model())


def test_an_argument_that_is_no_jax_type_is_jaxs_own_error():
    model = Model()
    with pytest.raises(TypeError, match="Error interpreting argument|not a valid JAX type"):
        nnx.jit(lambda m, x: m.w)(model, object())
    with pytest.raises(nnx.AttributeKindError, match="not a pytree"):
        jax.jit(lambda m: m)(model)


def test_raw_jax_inside_of_the_function_refuses_modules():
    @nnx.jit
    def step(model):
        return jax.vmap(lambda m, x: x, in_axes=(None, 0))(model, jnp.ones(2))

    with pytest.raises(nnx.AttributeKindError, match="a Model is an nnx.Module and not a pytree"):
        step(Model())


# --- traces ---


def test_the_second_call_traces_nothing():
    @traced
    def step(model, x):
        return model(x)

    model = Model()
    for _ in range(4):
        step(model, jnp.ones(3))
    # An int count has become an array by then, which JAX tells apart by its weak type alone.
    assert step.traces[0] <= 2
    before = step.traces[0]
    step(model, jnp.ones(3))
    step(Model(), jnp.ones(3))
    assert step.traces[0] == before


def test_equal_modules_share_a_trace():
    step = traced(lambda model: model.left.w)
    for _ in range(3):
        step(Model())
    assert step.traces == [1]


def test_values_of_another_shape_or_dtype_trace_anew():
    step = traced(lambda leaf: leaf.w)
    leaf = Leaf()
    step(leaf)
    leaf.w = jnp.ones(3)
    step(leaf)
    leaf.w = jnp.ones(3, jnp.int32)
    step(leaf)
    assert step.traces == [3]


def test_wrapping_a_function_again_finds_what_was_compiled():
    count = [0]

    def step(leaf):
        count[0] += 1
        return leaf.w

    nnx.jit(step)(Leaf())
    nnx.jit(step)(Leaf())
    assert count == [1]


def test_clear_cache():
    step = traced(lambda leaf: leaf.w)
    step(Leaf())
    step.clear_cache()
    step(Leaf())
    assert step.traces == [2]


def _set_static(m):
    m.left.rate = 0.125


def _same_static(m):
    m.left.rate = float("0.5")


def _add(m):
    m.left.extra = nnx.Param(jnp.float32(1))


def _delete(m):
    del m.right


def _retype(m):
    del m.left.w
    m.left.w = nnx.BatchStat(jnp.float32(2))


def _metadata(m):
    m.left.w = m.left.get_variable("w").replace(sharding=None)


def _new_metadata(m):
    del m.left.w
    m.left.w = nnx.Param(jnp.float32(2), sharding=("a",))


def _replace(m):
    m.left = m.right


def _equal_module(m):
    m.left = Leaf(2.0)


def _tie(m):
    m.left.w = m.right.get_variable("w")


def _static_to_data(m):
    del m.left.rate
    m.left.rate = jnp.float32(1)


def _append(m):
    m.sizes.append(1)


def _edit_dict(m):
    m.config["a"]["b"] = 3


def _grow(m):
    m.blocks.append(Leaf())


def _shrink(m):
    del m.blocks[0]


def _name(m):
    m.named["c"] = Leaf()


def _value(m):
    m.left.w = jnp.float32(7)


def _buffer(m):
    m.buffer = np.ones(2)


def _static_array(m):
    m.constant = np.ones(3)


def _undo(m):
    m.sizes.append(5)
    m.sizes.pop()


@pytest.mark.parametrize(
    ("write", "traces"),
    [
        (_set_static, 2),
        (_same_static, 1),
        (_add, 2),
        (_delete, 2),
        (_retype, 2),
        (_metadata, 1),
        (_new_metadata, 2),
        (_replace, 2),
        (_equal_module, 1),
        (_tie, 2),
        (_static_to_data, 2),
        (_append, 2),
        (_edit_dict, 2),
        (_grow, 2),
        (_shrink, 2),
        (_name, 2),
        (_value, 1),
        (_buffer, 1),
        (_static_array, 2),
        (_undo, 1),
    ],
)
def test_a_write_between_calls_is_seen(write, traces):
    model = Model()
    model.sizes = [1]
    model.config = {"a": {"b": 1}}
    model.blocks = [Leaf(1.0), Leaf(2.0)]
    model.named = {"a": Leaf(1.0), "b": Leaf(2.0)}
    model.buffer = np.zeros(2)
    model.constant = nnx.Static(np.zeros(3))
    seen = []

    @traced
    def step(model, part):
        seen.append((model.partition().moduledef, model.left is part))
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(model.get_state()))

    assert float(step(model, model.left)) == _total(model)
    write(model)
    assert float(step(model, model.left)) == _total(model)
    assert step.traces == [traces]
    assert seen[-1] == (model.partition().moduledef, True)


def _total(model):
    return float(sum(np.sum(np.asarray(leaf)) for leaf in jax.tree.leaves(model.get_state())))


def test_a_module_slipped_into_a_static_list_is_an_error_with_its_path():
    model = Model()
    model.blocks = []
    step = nnx.jit(lambda m: m.left.w)
    step(model)
    model.blocks.append(Leaf())
    with pytest.raises(nnx.StaticError, match=r"the static attribute `blocks` holds a Leaf \(at `blocks\[0\]`\)"):
        step(model)
