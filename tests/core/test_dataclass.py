"""Dataclass-style Modules: fields say what their values become."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


@nnx.dataclass
class Layer(nnx.Module):
    w: jax.Array = nnx.param_field()
    mean: jax.Array = nnx.var_field("batch_stats")
    cache: object = nnx.node_field(default_factory=lambda: [jnp.zeros(1)])
    table: object = nnx.static_field(default_factory=lambda: np.arange(3))
    rate: float = 0.5
    name: str = nnx.field(default="layer", metadata={"help": "what it is called"})

    def __call__(self, x):
        return x * self.w


@pytest.fixture
def layer():
    return Layer(jnp.ones(2), jnp.zeros(2))


def test_fields_become_what_they_say(layer):
    assert type(layer.get_variable("w")) is nnx.Param
    assert type(layer.get_variable("mean")) is nnx.BatchStat
    assert type(layer.get_variable("cache")) is nnx.Node
    assert layer.get_state().paths == (("cache",), ("mean",), ("w",))
    statics = {"/".join(path): value for path, value in layer.get_module_def().statics()}
    assert set(statics) == {"table", "rate", "name"}
    assert (layer.rate, layer.name) == (0.5, "layer")
    np.testing.assert_array_equal(layer.table, np.arange(3))


def test_fields_are_those_of_a_dataclass(layer):
    assert [field.name for field in dataclasses.fields(layer)] == ["w", "mean", "cache", "table", "rate", "name"]
    assert {field.name: field.metadata.get("help") for field in dataclasses.fields(layer)}[
        "name"
    ] == "what it is called"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'mean'"):
        Layer(jnp.ones(2))


def test_default_factories_are_called_for_each(layer):
    other = Layer(jnp.ones(2), jnp.zeros(2))
    other.cache[0] = jnp.ones(1)
    assert layer.cache[0] == 0


def test_modules_stay_hashable_and_compare_by_identity(layer):
    other = Layer(jnp.ones(2), jnp.zeros(2))
    assert layer != other
    assert len({layer, other}) == 2


def test_repr_is_that_of_a_module(layer):
    assert "w=Param(value=Array([1., 1.], dtype=float32))" in repr(layer)


def test_a_variable_given_to_a_field_is_taken_as_it_is():
    param = nnx.Param(jnp.ones(2), sharding=("a",))
    layer = Layer(param, nnx.BatchStat(jnp.zeros(2), note=1))
    assert layer.get_variable("w") is param
    assert layer.get_variable("mean").note == 1


def test_a_variable_of_another_type_given_to_a_field_is_refused():
    with pytest.raises(nnx.VariableError, match=r"field `w` .*Param.*BatchStat"):
        Layer(nnx.BatchStat(jnp.ones(2)), jnp.zeros(2))


def test_a_value_with_metadata_given_to_a_field():
    init = nnx.with_metadata(jax.nn.initializers.ones, sharding=("a",))
    layer = Layer(init(jax.random.key(0), (2,)), jnp.zeros(2))
    assert layer.get_variable("w").sharding == ("a",)
    np.testing.assert_array_equal(layer.w, jnp.ones(2))


def test_a_default_value_does_not_hide_the_variable():
    @nnx.dataclass
    class Scale(nnx.Module):
        w: object = nnx.param_field(default=1.0)

    assert Scale().w == 1.0
    assert Scale(2.0).w == 2.0
    scale = Scale(3.0)
    scale.w = 4.0
    assert scale.w == 4.0
    assert scale.partition().merge().w == 4.0
    assert type(scale.get_variable("w")) is nnx.Param


def test_writing_a_field_later_writes_its_variable(layer):
    variable = layer.get_variable("w")
    layer.w = jnp.full(2, 3.0)
    assert layer.get_variable("w") is variable
    layer.table = np.arange(4)
    assert layer.get_state().paths == (("cache",), ("mean",), ("w",))


def test_deleting_a_field_and_writing_it_again_wraps_it_again(layer):
    del layer.w
    layer.w = jnp.zeros(2)
    assert type(layer.get_variable("w")) is nnx.Param


def test_submodules_and_lists_of_them():
    @nnx.dataclass
    class Model(nnx.Module):
        layers: list
        head: Layer | None = None

    model = Model([Layer(jnp.ones(2), jnp.zeros(2)), Layer(jnp.ones(2), jnp.zeros(2))])
    assert isinstance(model.layers, nnx.Sequence)
    assert len(model.filter(nnx.Param)) == 2
    assert model.head is None


def test_post_init_and_init_var():
    @nnx.dataclass
    class Dense(nnx.Module):
        din: int
        dout: int
        ctx: dataclasses.InitVar[nnx.Context]
        use_bias: bool = dataclasses.field(default=True, kw_only=True)

        def __post_init__(self, ctx):
            self.kernel = nnx.Param(jax.random.normal(ctx.make_rng("params"), (self.din, self.dout)))
            if self.use_bias:
                self.bias = nnx.Param(jnp.zeros(self.dout))

    dense = Dense(2, 3, nnx.context(0))
    assert dense.get_state().paths == (("bias",), ("kernel",))
    assert Dense(2, 3, nnx.context(0), use_bias=False).get_state().paths == (("kernel",),)


def test_inheritance():
    @nnx.dataclass
    class Wider(Layer):
        extra: object = nnx.param_field(default_factory=lambda: jnp.ones(1))

    wider = Wider(jnp.ones(2), jnp.zeros(2))
    assert wider.filter(nnx.Param).paths == (("extra",), ("w",))
    assert type(wider.get_variable("mean")) is nnx.BatchStat


def test_options_are_those_of_dataclasses():
    @nnx.dataclass(kw_only=True)
    class Keyword(nnx.Module):
        w: object = nnx.param_field()

    with pytest.raises(TypeError, match="positional argument"):
        Keyword(1.0)
    assert Keyword(w=1.0).w == 1.0


def test_eq_if_asked_for_keeps_the_module_hashable():
    @nnx.dataclass(eq=True, unsafe_hash=True)
    class Named(nnx.Module):
        name: str = "n"

    assert Named() == Named()
    assert hash(Named()) == hash(Named())


def test_slots_are_refused():
    with pytest.raises(nnx.AttributeKindError, match="declares __slots__"):

        @nnx.dataclass(slots=True)
        class Slotted(nnx.Module):
            w: int = 1


def test_the_standard_decorator_works_too():
    @dataclasses.dataclass(eq=False)
    class Standard(nnx.Module):
        w: object = nnx.param_field()
        n: int = 2

    assert Standard(1.0).filter(nnx.Param).paths == (("w",),)


@pytest.mark.parametrize(
    "remake", [lambda m: m.partition().merge(), copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies(layer, remake):
    other = remake(layer)
    assert other.get_module_def() == layer.get_module_def()
    other.w = jnp.zeros(2)
    assert layer.w[0] == 1


def test_jit_and_grad(layer):
    grads = nnx.jit(nnx.grad(lambda m: m(2.0).sum()))(layer)
    assert grads.paths == (("w",),)
    np.testing.assert_array_equal(grads["w"].value, jnp.full(2, 2.0))


def test_an_unhashable_dataclass_works_all_the_same():
    """The standard decorator compares by content and takes the hash away; nothing of ours may ask for either."""

    @dataclasses.dataclass
    class Standard(nnx.Module):
        w: object = nnx.param_field(default_factory=lambda: jnp.ones(2))
        child: object = None

    model = Standard(child=Standard())
    assert Standard.__hash__ is None
    assert nnx.jit(lambda m: m)(model) is model
    assert nnx.grad(lambda m: (m.w * m.child.w).sum())(model).paths == (("child", "w"), ("w",))
    for other in (model.clone(), copy.deepcopy(model), model.partition().merge()):
        assert other.get_module_def() == model.get_module_def()
    model.for_each(Standard, lambda m: setattr(m, "w", jnp.zeros(2)))
    assert model.child.w.sum() == 0
