"""The known faults of the library that this one follows, each kept out by a test."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


class Leaf(nnx.Module):
    def __init__(self, value=1.0):
        self.w = nnx.Param(jnp.asarray(value, jnp.float32))

    def __call__(self, x):
        return x * self.w


def _data(key):
    return jax.random.key_data(key).tolist()


def test_a_context_crosses_jit():
    ctx = nnx.context(0, dropout=1, flags={"deterministic": False})
    traces = []

    @nnx.jit
    def draw(ctx):
        traces.append(ctx.get_flag("deterministic"))
        return jax.random.key_data(ctx.make_rng("dropout"))

    drawn = {tuple(draw(ctx).tolist()) for _ in range(20)}
    assert len(drawn) == 20
    assert traces == [False]
    assert ctx.rngs["dropout"].count == 20


def test_streams_of_one_seed_give_different_keys():
    ctx = nnx.context(params=0, dropout=0, noise=0)
    keys = [_data(ctx.make_rng(name)) for name in ("params", "dropout", "noise")]
    assert len({tuple(key) for key in keys}) == 3
    assert _data(nnx.context(dropout=0).make_rng("dropout")) == keys[1]


def test_pops_inside_of_jit_come_out():
    model = Leaf()
    model.y = nnx.Intermediate(jnp.ones(()))

    @nnx.jit
    def pop(model):
        return model.pop_state(nnx.Intermediate)

    assert pop(model).paths == (("y",),)
    assert not hasattr(model, "y")
    assert model.get_state().paths == (("w",),)


def test_changes_of_statics_inside_of_jit_come_out():
    model = Leaf()
    model.mode, model.history = "train", []

    @nnx.jit
    def change(model):
        model.mode = "eval"
        model.history.append("changed")
        model.added = 3

    change(model)
    assert (model.mode, model.history, model.added) == ("eval", ["changed"], 3)
    change(model)
    assert model.history == ["changed", "changed"]


def test_deletions_inside_of_jit_come_out():
    model = nnx.Dict(a=Leaf(), b=Leaf())

    @nnx.jit
    def delete(model):
        del model["a"]
        del model.b.w

    delete(model)
    assert list(model) == ["b"]
    assert len(model.get_state()) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "extra", nnx.Param(1.0)),
        lambda m: delattr(m, "w"),
        lambda m: setattr(m, "static", 1),
        lambda m: setattr(m, "child", Leaf()),
    ],
    ids=["entry", "removal", "static", "submodule"],
)
def test_module_defs_tell_structures_apart(change):
    a, b = Leaf(), Leaf()
    assert a.get_module_def() == b.get_module_def()
    assert hash(a.get_module_def()) == hash(b.get_module_def())
    change(b)
    assert a.get_module_def() != b.get_module_def()


def test_module_defs_tell_variable_types_metadata_and_ties_apart():
    def definition(variable):
        module = nnx.Module()
        module.w = variable
        return module.get_module_def()

    plain = definition(nnx.Param(1.0))
    assert plain == definition(nnx.Param(2.0))
    assert plain != definition(nnx.BatchStat(1.0))
    assert plain != definition(nnx.Param(1.0, sharding=("a",)))
    tied, untied = nnx.Dict(a=Leaf(), b=Leaf()), nnx.Dict(a=Leaf(), b=Leaf())
    tied.b.w = tied.a.get_variable("w")
    assert tied.get_module_def() != untied.get_module_def()


def test_modules_in_a_list_are_no_constants():
    class Stack(nnx.Module):
        def __init__(self):
            self.layers = [Leaf(2.0), Leaf(3.0)]

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Stack()
    assert len(model.filter(nnx.Param)) == 2
    step = nnx.jit(lambda m, x: m(x))
    assert step(model, 1.0) == 6.0
    model.layers[0].w = jnp.float32(10.0)
    assert step(model, 1.0) == 30.0
    grads = nnx.grad(lambda m: m(1.0))(model)
    assert [float(g) for g in jax.tree.leaves(grads)] == [3.0, 10.0]


def test_new_values_win_in_pure_update_state():
    pure = Leaf(1.0).partition()
    updated = pure.update_state(nnx.State({"w": nnx.Param(5.0)}))
    assert updated.merge().w == 5.0
    assert pure.merge().w == 1.0
    assert pure.update_state(Leaf(6.0)).merge().w == 6.0
    assert pure.update_state(nnx.State({"w": nnx.Param(5.0)}), nnx.State({"w": nnx.Param(7.0)})).merge().w == 7.0


def test_new_values_win_in_pure_update_state_of_partitions():
    model = Leaf(1.0)
    model.s = nnx.BatchStat(0.0)
    pure = model.partition(nnx.Param, nnx.BatchStat)
    updated = pure.update_state(nnx.State({"s": nnx.BatchStat(9.0)})).merge()
    assert (updated.w, updated.s) == (1.0, 9.0)


def test_pop_state_of_a_cycle_ends():
    a, b = Leaf(), Leaf()
    a.b, b.a = b, a
    a.y, b.y = nnx.Intermediate(1), nnx.Intermediate(2)
    popped = a.pop_state(nnx.Intermediate)
    assert popped.paths == (("b", "y"), ("y",))
    assert not hasattr(b, "y")
    assert b.a is a


def test_deletion_does_not_pass_the_trace_check():
    model = Leaf()

    def delete(x):
        del model.w
        return x

    with pytest.raises(nnx.TraceContextError, match=r"cannot delete `Leaf\.w`"):
        jax.jit(delete)(1.0)
    assert model.w == 1.0


@pytest.mark.parametrize("name", ["method", "partition", "sow", "init", "apply", "view", "__call__"])
def test_sow_on_a_methods_name_is_refused(name):
    class Layer(nnx.Module):
        def method(self):
            return 1

        @property
        def view(self):
            return 2

        def __call__(self):
            return 3

    module = Layer()
    with pytest.raises(
        nnx.VariableError, match=rf"cannot sow into `Layer\.{name}`: the name is already an attribute or a method"
    ):
        module.sow("intermediates", name, 1)
    assert module.method() == 1
    assert module() == 3
    assert len(module.get_state()) == 0


def test_copy_is_another_module():
    model = Leaf(1.0)
    model.me = model
    other = copy.copy(model)
    assert other is not model
    assert other != model
    other.w = jnp.float32(2.0)
    other.static = 1
    assert model.w == 1.0
    assert not hasattr(model, "static")
    pair = nnx.Sequence([model, other])
    assert pair[0] is not pair[1]
    assert len(pair.filter(nnx.Param)) == 2


def test_an_empty_sequence_is_empty():
    assert len(nnx.Sequence([])) == 0
    assert list(nnx.Sequence([])) == []
    assert not nnx.Sequence([])


def test_a_dict_shows_its_items_alone():
    d = nnx.Dict(a=Leaf(), b=Leaf())
    assert list(d) == list(d.keys()) == ["a", "b"]
    assert len(d) == 2
    assert len(list(d.values())) == len(list(d.items())) == 2
    assert "a" in d
    assert "c" not in d
    assert d.get("a") is d.a
    assert d.get("c", 1) == 1


def test_dataclass_modules_are_hashable():
    @nnx.dataclass
    class Layer(nnx.Module):
        w: object = nnx.param_field(default=1.0)

    assert len({Layer(), Layer()}) == 2
    assert nnx.jit(lambda m: m.w * 2)(Layer()) == 2.0


def test_a_variable_of_a_variable_with_metadata():
    variable = nnx.Param(nnx.Param(jnp.ones(2), sharding=("a",)))
    assert variable.sharding == ("a",)
    assert not isinstance(variable.value, nnx.Variable)
    np.testing.assert_array_equal(variable.value, jnp.ones(2))
    again = nnx.Param(nnx.Param(jnp.ones(2), sharding=("a",)), sharding=("b",))
    assert again.sharding == ("b",)


def test_jit_lowers():
    @nnx.jit
    def step(model, x):
        model.w = model.w + x
        return model.w * 2

    model = Leaf(1.0)
    lowered = step.lower(model, jnp.float32(2.0))
    assert "stablehlo" in lowered.as_text()
    assert model.w == 1.0
    compiled = lowered.compile()
    assert compiled(model, jnp.float32(2.0)) == 6.0
    assert model.w == 3.0


def test_jit_lowers_methods():
    class Layer(Leaf):
        @nnx.jit
        def step(self, x):
            self.w = self.w + x
            return self.w

    layer = Layer(1.0)
    assert "stablehlo" in layer.step.lower(jnp.float32(2.0)).as_text()
    assert layer.step(2.0) == 3.0


def test_a_wrapped_function_does_not_inherit_what_was_compiled_for_the_one_inside():
    def inner(model):
        return model.w

    assert nnx.jit(inner)(Leaf(2.0)) == 2.0

    @functools.wraps(inner)
    def outer(model):
        return inner(model) + 1

    assert nnx.jit(outer)(Leaf(2.0)) == 3.0
    assert nnx.jit(inner)(Leaf(2.0)) == 2.0


def test_a_stream_set_back_inside_of_jit_is_set_back():
    ctx = nnx.context(dropout=0)
    start, _ = ctx.partition()
    ctx.make_rng("dropout")

    @nnx.jit
    def reset(ctx, state):
        ctx.make_rng("dropout")
        ctx.update_state(state)

    reset(ctx, start)
    assert ctx.rngs["dropout"].count == 0
    ctx.make_rng("dropout")
    nnx.jit(lambda ctx, state: ctx.update_state(state))(ctx, start)
    assert ctx.rngs["dropout"].count == 0


def test_a_module_that_shares_an_array_with_a_donated_one_keeps_it():
    model, twin = Leaf(1.0), Leaf(1.0)
    twin.w = model.w

    @functools.partial(nnx.jit, donate_argnums=0)
    def step(model, other):
        model.w = model.w + other.w

    step(model, twin)
    assert (float(model.w), float(twin.w)) == (2.0, 1.0)


def test_an_array_that_is_donated_beside_a_module_that_holds_it():
    model = Leaf(1.0)
    array = model.w

    @functools.partial(nnx.jit, donate_argnums=1)
    def step(model, x):
        model.w = model.w + 1
        return x * 2

    assert step(model, array) == 2.0
    assert float(model.w) == 2.0


def test_a_compiled_function_is_called_without_its_static_arguments():
    step = nnx.jit(lambda model, n: model.w * n, static_argnames="n")
    compiled = step.lower(Leaf(2.0), n=3).compile()
    assert compiled(Leaf(5.0)) == 15.0
    bound = nnx.jit(Leaf(2.0)).lower(jnp.float32(3)).compile()
    assert bound(jnp.float32(4)) == 8.0


def test_a_variable_from_outside_cannot_be_tied_inside():
    other = Leaf(3.0)

    @nnx.jit
    def step(model):
        model.tied = other.get_variable("w")

    model = Leaf(1.0)
    with pytest.raises(nnx.TraceContextError), pytest.warns(nnx.CaptureWarning):
        step(model)
    assert not hasattr(model, "tied")


def test_a_trace_that_raised_is_not_counted():
    calls = []

    @functools.partial(nnx.jit, max_traces=1)
    def step(model, x):
        calls.append(x)
        if len(calls) == 1:
            raise ZeroDivisionError
        return model.w * x

    with pytest.raises(ZeroDivisionError):
        step(Leaf(2.0), 3.0)
    assert step(Leaf(2.0), 3.0) == 6.0
