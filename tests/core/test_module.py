"""Module: what an attribute becomes, how it is replaced, and what class attributes have to say about it."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.models import Everything, Leaf

import nnx

# The kinds of attributes


def test_a_variable_reads_as_its_value():
    module = Leaf(2.0)
    assert isinstance(module.w, jax.Array)
    assert module.w == 2.0
    assert "w" in dir(module)
    assert hasattr(module, "w")


def test_writing_an_attribute_writes_into_the_same_variable():
    module = Leaf()
    variable = module.get_variable("w")
    module.w = jnp.asarray(5.0)
    module.w += 1
    assert module.get_variable("w") is variable
    assert variable.value == 6.0


def test_state_holds_the_nodes_and_the_definition_the_statics():
    state, moduledef = Everything().partition()
    assert set(map("/".join, state)) == {
        "param",
        "stat",
        "jax_buffer",
        "np_buffer",
        "node",
        "child/w",
        "ctx/dropout",
        "blocks/0/w",
        "blocks/1/w",
        "pair/0/w",
        "pair/1/w",
        "named/a/w",
        "named/b/w",
    }
    statics = {"/".join(path): value for path, value in moduledef.statics()}
    own = {name: value for name, value in statics.items() if "/" not in name}
    assert own == {
        "integer": 3,
        "floating": 0.5,
        "text": "gelu",
        "none": None,
        "flag": True,
        "listing": [1, 2, [3]],
        "mapping": {"lr": 0.1},
        "function": jax.nn.gelu,
    }


def test_merge_restores_every_kind():
    module = Everything()
    merged = module.partition().merge()
    assert type(merged.get_variable("param")) is nnx.Param
    assert type(merged.get_variable("stat")) is nnx.BatchStat
    assert isinstance(merged.jax_buffer, jax.Array)
    assert isinstance(merged.np_buffer, np.ndarray)
    assert type(merged.get_variable("node")) is nnx.Node
    assert jax.tree.structure(merged.node) == jax.tree.structure(module.node)
    assert isinstance(merged.blocks, nnx.Sequence)
    assert isinstance(merged.pair, nnx.Sequence)
    assert isinstance(merged.named, nnx.Dict)
    assert isinstance(merged.ctx, nnx.Context)
    assert merged.flag is True
    assert merged.function is jax.nn.gelu
    assert merged.partition().moduledef is module.partition().moduledef


def test_a_number_in_a_numpy_buffer_keeps_it_a_buffer():
    class Counter(nnx.Module):
        def __init__(self):
            self.np_buffer = np.array(2)

    module = Counter()
    module.np_buffer = module.np_buffer + 1
    assert type(module.np_buffer) is np.int64
    assert module.get_state().paths == (("np_buffer",),)
    assert module.partition().merge().get_state().paths == (("np_buffer",),)
    assert module.filter(nnx.buffers).paths == (("np_buffer",),)


@pytest.mark.parametrize("leaf", [jax.ShapeDtypeStruct((3,), jnp.float32), 1.5, np.float32(2)])
def test_merge_restores_a_buffer_whatever_the_leaf(leaf):
    class Holder(nnx.Module):
        def __init__(self):
            self.buffer = jnp.zeros(3)

    pure = Holder().partition()
    state = jax.tree.map(lambda _: leaf, pure.state)
    module = pure.moduledef.merge(state)
    assert module.buffer is leaf
    assert module.get_state().paths == (("buffer",),)
    assert module.get_module_def() == pure.moduledef


def test_shapes_of_a_module_by_eval_shape():
    pure = jax.eval_shape(lambda: Everything().partition())
    module = pure.merge()
    assert module.param == jax.ShapeDtypeStruct((2,), jnp.float32)
    assert module.get_state().paths == Everything().get_state().paths


def test_registered_node_types_are_nodes():
    @nnx.register_node_type
    @jax.tree_util.register_pytree_node_class
    class Pair:
        def __init__(self, a, b):
            self.a, self.b = a, b

        def tree_flatten(self):
            return (self.a, self.b), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    class Holder(nnx.Module):
        def __init__(self):
            self.pair = Pair(jnp.ones(1), jnp.zeros(1))

    module = Holder()
    assert nnx.is_node(module.pair)
    assert module.get_state().paths == (("pair",),)
    assert len(jax.tree.leaves(module.get_state())) == 2
    with pytest.raises(TypeError, match="register_node_type takes a class"):
        nnx.register_node_type(3)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (jnp.ones(1), True),
        (np.ones(1), True),
        (nnx.Param(1), True),
        (nnx.Node([1]), True),
        (nnx.Sequence(), True),
        (nnx.State(), True),
        (nnx.Static(1), False),
        (1, False),
        (1.0, False),
        ([jnp.ones(1)], False),
        (None, False),
    ],
)
def test_is_node(value, expected):
    assert nnx.is_node(value) is expected


def test_a_state_is_a_node():
    class Ema(nnx.Module):
        def __init__(self, model):
            self.shadow = model.filter(nnx.Param)

    module = Ema(Leaf(2.0))
    assert module.shadow["w"].value == 2.0
    assert module.get_state().paths == (("shadow",),)
    assert len(jax.tree.leaves(module.get_state())) == 1


def test_an_attribute_that_was_none_becomes_a_variable():
    module = nnx.Module()
    module.y = None
    module.y = nnx.Intermediate(1)
    assert module.y == 1
    assert "y" not in vars(module)
    assert module.get_state().paths == (("y",),)


def test_vars_shows_plain_attributes_and_one_hidden_record():
    module = Leaf()
    module.rate = 0.1
    assert {name: value for name, value in vars(module).items() if name != "_nnx"} == {"rate": 0.1}


def test_the_hidden_record_cannot_be_assigned():
    with pytest.raises(nnx.AttributeKindError, match="'_nnx' cannot be an attribute"):
        Leaf()._nnx = 3


def test_a_class_does_not_show_its_instances_variables():
    assert Leaf().w is not None
    assert not hasattr(Leaf, "w")
    with pytest.raises(AttributeError, match="type object 'Leaf' has no attribute 'w'"):
        Leaf.w


def test_a_field_of_a_dataclass_takes_no_default_from_a_base_that_was_used():
    class Base(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(1.0)

    Base()

    @dataclasses.dataclass(eq=False)
    class Child(Base):
        w: object

    with pytest.raises(TypeError, match="missing 1 required positional argument: 'w'"):
        Child()
    assert Child(nnx.Param(2.0)).w == 2.0


def test_a_name_may_be_data_in_one_instance_and_plain_in_another():
    class Layer(nnx.Module):
        def __init__(self, bias):
            self.bias = bias

    with_bias, without = Layer(nnx.Param(1.0)), Layer(None)
    assert (with_bias.bias, without.bias) == (1.0, None)
    del with_bias.bias
    assert not hasattr(with_bias, "bias")


def test_a_fallback_of_the_users_own_is_asked_for_what_is_missing():
    class Layer(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(1.0)

        def __getattr__(self, name):
            return f"fallback for {name}"

    module = Layer()
    assert module.w == 1.0
    assert module.v == "fallback for v"
    del module.w
    assert module.w == "fallback for w"


def test_static_holds_an_array_as_a_constant():
    module = nnx.Module()
    module.table = nnx.Static(np.arange(3))
    assert len(module.get_state()) == 0
    first = module.get_module_def()
    module.table = np.arange(3)
    assert module.get_module_def() == first
    module.table = np.arange(4)
    assert module.get_module_def() != first
    np.testing.assert_array_equal(module.partition().merge().table, np.arange(4))


def test_an_attribute_name_cannot_hold_a_slash():
    with pytest.raises(nnx.AttributeKindError, match="'a/b' cannot be an attribute of a Module"):
        setattr(nnx.Module(), "a/b", 1)


def test_slots_are_refused():
    with pytest.raises(nnx.AttributeKindError, match="Slotted declares __slots__"):

        class Slotted(nnx.Module):
            __slots__ = ("hidden",)


def test_empty_slots_are_harmless():
    class Fine(nnx.Module):
        __slots__ = ()

    assert len(Fine().get_state()) == 0


# Replacing what an attribute holds


def test_an_unowned_variable_of_equal_type_writes_its_value():
    module = Leaf()
    variable = module.get_variable("w")
    module.w = nnx.Param(7.0)
    assert module.get_variable("w") is variable
    assert variable.value == 7.0


def test_a_variable_of_another_type_is_refused():
    module = Leaf()
    with pytest.raises(nnx.VariableError, match=r"`Leaf.w` is a Param, but .* BatchStat.*`del module.w`"):
        module.w = nnx.BatchStat(1.0)
    assert type(module.get_variable("w")) is nnx.Param
    assert module.w == 1.0


def test_a_variable_of_other_metadata_is_refused():
    module = nnx.Module()
    module.w = nnx.Param(jnp.ones(2), sharding=("a",))
    with pytest.raises(
        nnx.VariableError, match=r"has metadata \{'sharding': \('a',\)\}, but the Param given for it has \{\}"
    ):
        module.w = nnx.Param(jnp.zeros(2))
    assert module.get_variable("w").sharding == ("a",)


def test_the_remedy_of_the_refusal_works():
    module = Leaf()
    with pytest.raises(nnx.VariableError, match=r"`del module\.w`"):
        module.w = nnx.BatchStat(1.0)
    del module.w
    module.w = nnx.BatchStat(1.0)
    assert type(module.get_variable("w")) is nnx.BatchStat


def test_a_module_over_a_variable_is_refused():
    module = Leaf()
    with pytest.raises(
        nnx.AttributeKindError, match=r"cannot assign a Leaf to `Leaf.w`, which is a Param: `del module.w` first"
    ):
        module.w = Leaf()


def test_a_string_over_an_array_is_refused():
    module = nnx.Module()
    module.buffer = jnp.ones(2)
    with pytest.raises(nnx.AttributeKindError, match=r"cannot assign a str to `Module.buffer`, which holds an array"):
        module.buffer = "text"


def test_a_submodule_is_replaced():
    module = Everything()
    module.child = Leaf(9.0)
    assert module.get_state()["child", "w"].value == 9.0
    module.child = None
    assert ("child", "w") not in module.get_state()


# Tied Variables


def test_tying_makes_one_entry():
    embed, head = Leaf(2.0), Leaf(3.0)
    model = nnx.Dict(embed=embed, head=head)
    head.w = embed.get_variable("w")
    assert model.get_state().paths == (("embed", "w"),)
    assert head.w == 2.0
    head.w = jnp.float32(8.0)
    assert embed.w == 8.0
    grads = nnx.grad(lambda m: m["embed"].w * 3 + m["head"].w * 4)(model)
    assert grads.paths == (("embed", "w"),)
    assert grads["embed", "w"].value == 7.0


@pytest.mark.parametrize(
    "remake",
    [
        lambda m: m.partition().merge(),
        lambda m: m.clone(),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        nnx.jit(lambda m: m.clone()),
    ],
    ids=["merge", "clone", "deepcopy", "pickle", "jit"],
)
def test_ties_survive(remake):
    model = nnx.Dict(embed=Leaf(2.0), head=Leaf(3.0))
    model.head.w = model.embed.get_variable("w")
    other = remake(model)
    assert other.head.get_variable("w") is other.embed.get_variable("w")
    assert other.head.get_variable("w") is not model.head.get_variable("w")
    other.head.w = jnp.float32(5.0)
    assert other.embed.w == 5.0
    assert model.embed.w == 2.0


def test_tying_is_undone_by_a_new_variable():
    model = nnx.Dict(embed=Leaf(2.0), head=Leaf(3.0))
    model.head.w = model.embed.get_variable("w")
    del model.head.w
    model.head.w = nnx.Param(1.0)
    assert model.embed.w == 2.0
    assert len(model.get_state()) == 2


def test_tying_across_types_is_refused():
    a, b = nnx.Module(), nnx.Module()
    a.w = nnx.Param(1.0)
    b.w = nnx.BatchStat(1.0)
    with pytest.raises(nnx.VariableError, match="is a BatchStat"):
        b.w = a.get_variable("w")


def test_get_variable_of_what_is_none():
    module = Everything()
    with pytest.raises(AttributeError, match=r"`Everything.text` is not a Variable"):
        module.get_variable("text")
    with pytest.raises(AttributeError, match=r"`Everything.jax_buffer` is not a Variable"):
        module.get_variable("jax_buffer")
    with pytest.raises(AttributeError, match=r"has no attribute 'parm'; did you mean `param`\?"):
        module.get_variable("parm")


# repr


def test_repr_shows_types_statics_and_shapes():
    text = repr(Everything())
    assert "Everything(" in text
    assert "text='gelu'" in text
    assert "param=Param(value=Array([1., 1.], dtype=float32))" in text
    assert "blocks=Sequence(" in text
    assert "_nnx" not in text


# Raw JAX


def _read(module):
    return module.w


@pytest.mark.parametrize(
    "use",
    [
        jax.jit(_read),
        jax.grad(_read),
        jax.vmap(_read),
        lambda m: jax.tree.map(lambda x: x, m),
        lambda m: jax.tree.leaves([m]),
        lambda m: jax.eval_shape(lambda m: m.w, m),
        lambda m: jax.lax.scan(lambda m, x: (m, x), m, jnp.ones(2)),
        lambda m: jax.jit(lambda: m)(),
    ],
    ids=["jit", "grad", "vmap", "tree.map", "tree.leaves", "eval_shape", "scan", "output"],
)
def test_a_module_given_to_raw_jax_says_what_to_do(use):
    with pytest.raises(
        nnx.AttributeKindError, match=r"a Leaf is an nnx.Module and not a pytree.*nnx\.jit.*module\.partition\(\)"
    ):
        use(Leaf())


def test_a_module_among_operations_is_refused():
    with pytest.raises(TypeError):
        jnp.ones(2) + Leaf()
