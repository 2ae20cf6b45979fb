"""Variable: a value, a collection and metadata that never change."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


class HTTPCache2(nnx.Cache):
    pass


class Renamed(nnx.Variable):
    collection = "other_name"


FAMILY = [nnx.Variable, nnx.Param, nnx.BatchStat, nnx.Cache, nnx.Intermediate, nnx.Node]


@pytest.mark.parametrize("kind", FAMILY)
def test_construction(kind):
    value = jnp.ones(2)
    variable = kind(value, sharding=("a",), note="x")
    assert variable.value is value
    assert variable.sharding == ("a",)
    assert variable.note == "x"
    assert dict(variable.metadata) == {"note": "x", "sharding": ("a",)}
    assert kind(value).sharding is None


def test_collections_have_names():
    assert [kind.collection for kind in FAMILY] == [
        "variables",
        "params",
        "batch_stats",
        "cache",
        "intermediates",
        "nodes",
    ]
    assert Renamed.collection == "other_name"
    assert HTTPCache2.collection != nnx.Cache.collection


def test_a_variable_takes_any_value():
    for value in (1, 2.5, None, [1, 2], {"a": jnp.ones(1)}, "text"):
        assert nnx.Variable(value).value is value


def test_var_makes_a_type_once():
    first, second = nnx.var("running_losses", 1.0), nnx.var("running_losses", 2.0, note=3)
    assert type(first) is type(second)
    assert type(first).__name__ == "RunningLosses"
    assert isinstance(first, nnx.Variable)
    assert second.note == 3
    assert type(nnx.var("other_losses", 1.0)) is not type(first)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("params", nnx.Param),
        ("batch_stats", nnx.BatchStat),
        ("cache", nnx.Cache),
        ("intermediates", nnx.Intermediate),
        ("other_name", Renamed),
    ],
)
def test_var_finds_the_known_types(name, kind):
    assert type(nnx.var(name, 1)) is kind


def test_var_finds_a_users_class_by_its_collection():
    class KernelStatistic(nnx.Variable):
        pass

    assert KernelStatistic.collection == "kernel_statistic"


@pytest.mark.parametrize("name", ["", "a b", "a/b", "1a", "a-b", 3, None])
def test_var_refuses_names_that_are_none(name):
    with pytest.raises(nnx.VariableError, match="a collection's name must be an identifier"):
        nnx.var(name, 1.0)


# Metadata


def test_metadata_are_read_only():
    variable = nnx.Param(1.0, sharding=("a",), note="x")
    with pytest.raises(
        AttributeError, match=r"metadata `note` of a Param is read-only.*variable\.replace\(note=\.\.\.\)"
    ):
        variable.note = "y"
    with pytest.raises(AttributeError, match="metadata `sharding` of a Param is read-only"):
        variable.sharding = ("b",)
    with pytest.raises(TypeError, match="does not support item assignment"):
        variable.metadata["note"] = "y"
    assert variable.note == "x"


def test_an_unknown_attribute_cannot_be_set():
    with pytest.raises(
        AttributeError,
        match=r"a Param has no attribute 'note'; metadata are given when it is made: Param\(value, note=\.\.\.\)",
    ):
        nnx.Param(1.0).note = "y"


def test_unknown_metadata_are_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        nnx.Param(1.0).nothing_of_this_name
    nnx.Param(1.0, known_elsewhere=1)
    with pytest.raises(AttributeError, match="'Param' has no attribute or metadata 'known_elsewhere'"):
        nnx.Param(1.0).known_elsewhere
    assert not hasattr(nnx.Param(1.0), "known_elsewhere")


def test_metadata_must_be_static():
    with pytest.raises(
        nnx.VariableError, match=r"metadata `scale` is a JAX array float32\[2\]; metadata must be static values"
    ):
        nnx.Param(1.0, scale=jnp.ones(2))
    with pytest.raises(nnx.VariableError, match=r"metadata `other\[0\]` is a Param"):
        nnx.Param(1.0, other=[nnx.Param(1.0)])


def test_editing_what_was_given_as_metadata_changes_nothing():
    axes = ["a", "b"]
    variable = nnx.Param(1.0, axes=axes)
    axes.append("c")
    assert variable.axes == ["a", "b"]
    assert nnx.Param(1.0, axes=["a", "b"]).is_equivalent(variable)
    variable.axes.append("d")
    variable.metadata["axes"].append("e")
    assert nnx.Param(1.0, axes=["a", "b"]).axes == ["a", "b"]


def test_metadata_are_compared_by_type_and_content():
    assert nnx.Param(1, n=1).is_equivalent(nnx.Param(2, n=1))
    assert not nnx.Param(1, n=1).is_equivalent(nnx.Param(1, n=1.0))
    assert not nnx.Param(1, n=1).is_equivalent(nnx.Param(1, n=True))
    assert not nnx.Param(1, n=1).is_equivalent(nnx.BatchStat(1, n=1))
    assert nnx.Param(1, a=1, b=2).is_equivalent(nnx.Param(1, b=2, a=1))
    assert nnx.Param(1, sharding=None).is_equivalent(nnx.Param(1))


@pytest.mark.parametrize("name", ["value", "metadata", "copy", "replace", "collection", "_value", "_trace", "__init__"])
def test_metadata_cannot_take_the_name_of_an_attribute(name):
    """They would be out of reach as attributes, or replace what the class itself needs."""
    with pytest.raises((nnx.VariableError, TypeError), match=name):
        nnx.Param(1.0, **{name: 2})


def test_metadata_survive_everything():
    module = nnx.Module()
    module.w = nnx.Param(jnp.ones(2), sharding=("a",), note=(1, 2))
    state = module.get_state()
    for other in (
        state["w"],
        jax.tree.map(lambda x: x * 2, state)["w"],
        jax.tree.map(lambda x: x * 2, module.get_variable("w")),
        module.clone().get_variable("w"),
        nnx.jit(lambda m: m.clone())(module).get_variable("w"),
        pickle.loads(pickle.dumps(module)).get_variable("w"),
        copy.deepcopy(module.get_variable("w")),
        copy.copy(module.get_variable("w")),
        module.get_variable("w").copy(),
        nnx.grad(lambda m: m.w.sum())(module)["w"],
    ):
        assert type(other) is nnx.Param
        assert other.sharding == ("a",)
        assert other.note == (1, 2)
        assert other.is_equivalent(module.get_variable("w"))


def test_with_metadata_wraps_an_initializer():
    init = nnx.with_metadata(jax.nn.initializers.ones, sharding=("in", None), note="n")
    variable = nnx.Param(init(jax.random.key(0), (2, 3)))
    np.testing.assert_array_equal(variable.value, jnp.ones((2, 3)))
    assert variable.sharding == ("in", None)
    assert variable.note == "n"
    assert nnx.Param(init(jax.random.key(0), (2, 3)), note="mine").note == "mine"


def test_with_metadata_nests():
    init = nnx.with_metadata(nnx.with_metadata(lambda: jnp.ones(2), sharding=("a",)), note="n")
    variable = nnx.Param(init())
    np.testing.assert_array_equal(variable.value, jnp.ones(2))
    assert variable.sharding == ("a",)
    assert variable.note == "n"


def test_with_metadata_goes_through_layers():
    init = nnx.with_metadata(jax.nn.initializers.lecun_normal(), sharding=("in", "out"))
    layer = nnx.Linear(2, 3, kernel_init=init, ctx=nnx.context(0))
    assert layer.get_variable("kernel").sharding == ("in", "out")
    assert layer.kernel.shape == (2, 3)


def test_with_metadata_goes_through_eval_shape_and_vmap():
    init = nnx.with_metadata(lambda key: jax.random.normal(key, (2,)), sharding=("a",))

    def make(key):
        module = nnx.Module()
        module.w = nnx.Param(init(key))
        return module.get_state()

    state = jax.vmap(make)(jax.random.split(jax.random.key(0), 3))
    assert state["w"].value.shape == (3, 2)
    assert state["w"].sharding == ("a",)


# Variables of Variables


def test_a_variable_of_a_variable_is_that_variable_again():
    inner = nnx.Param(jnp.ones(2), sharding=("a",), note=1)
    outer = nnx.Param(inner, note=2)
    assert outer is not inner
    assert outer.value is inner.value
    assert outer.sharding == ("a",)
    assert outer.note == 2
    assert inner.note == 1


def test_a_variable_of_another_type_must_say_so():
    with pytest.raises(
        nnx.VariableError,
        match=r"cannot make a BatchStat from a Param: pass its value \(`BatchStat\(variable.value\)`\)",
    ):
        nnx.BatchStat(nnx.Param(1.0))
    assert nnx.BatchStat(nnx.Param(1.0).value).value == 1.0


def test_replace():
    variable = nnx.Param(1.0, sharding=("a",), note=1)
    assert variable.replace(2.0).value == 2.0
    assert variable.replace(value=2.0).note == 1
    other = variable.replace(2.0, sharding=None, note=2)
    assert (other.value, other.sharding, other.note) == (2.0, None, 2)
    assert (variable.value, variable.sharding, variable.note) == (1.0, ("a",), 1)
    assert variable.replace(nnx.Param(5.0)).value == 5.0
    with pytest.raises(nnx.VariableError, match="cannot replace the value of a Param by a BatchStat"):
        variable.replace(nnx.BatchStat(1.0))
    with pytest.raises(TypeError, match="replace takes one value"):
        variable.replace(1.0, value=2.0)


def test_copy_is_unowned():
    module = nnx.Module()
    module.w = nnx.Param(1.0)
    other = nnx.Module()
    other.w = module.get_variable("w").copy()
    other.w = 2.0
    assert module.w == 1.0


def test_value_can_be_written():
    variable = nnx.Param(1.0)
    variable.value = 2.0
    assert variable.value == 2.0
    variable.value = nnx.Param(3.0)
    assert variable.value == 3.0
    module = nnx.Module()
    module.w = variable
    variable.value = 4.0
    assert module.w == 4.0


def test_assigning_a_new_variable_ties_that_very_object():
    """A Variable made outside and assigned to two Modules is one Variable."""
    shared = nnx.Param(1.0)
    a, b = nnx.Module(), nnx.Module()
    a.w = shared
    b.w = shared
    assert a.get_variable("w") is shared
    a.w = 2.0
    assert b.w == 2.0
    assert len(nnx.Dict(a=a, b=b).get_state()) == 1


# Pytrees


def test_a_variable_is_a_pytree_node():
    variable = nnx.Param({"a": jnp.ones(2), "b": jnp.zeros(1)}, note=1)
    doubled = jax.tree.map(lambda x: x * 2, variable)
    assert type(doubled) is nnx.Param
    assert doubled.note == 1
    np.testing.assert_array_equal(doubled.value["a"], jnp.full(2, 2.0))
    assert jax.tree.structure(variable) == jax.tree.structure(doubled)
    assert jax.tree.structure(variable) != jax.tree.structure(variable.replace(note=2))
    assert jax.tree.structure(nnx.Param(1.0)) != jax.tree.structure(nnx.BatchStat(1.0))
    (path, _), *_ = jax.tree.leaves_with_path(variable)
    assert jax.tree_util.keystr(path) == ".value['a']"


def test_a_variable_goes_through_jit():
    out = jax.jit(lambda v: v)(nnx.Param(jnp.ones(2), sharding=("a",)))
    assert type(out) is nnx.Param
    assert out.sharding == ("a",)


def test_a_frozen_variable_refuses_writes():
    module = nnx.Module()
    module.w = nnx.Param(1.0)
    for frozen in (module.get_state()["w"], jax.tree.map(lambda x: x, nnx.Param(1.0))):
        with pytest.raises(
            nnx.VariableError,
            match=r"cannot write `Param.value`.*came out of a State or a pytree.*variable\.replace\(value\)",
        ):
            frozen.value = 2.0
        assert frozen.replace(2.0).value == 2.0


def test_a_replaced_variable_can_be_written():
    module = nnx.Module()
    module.w = nnx.Param(1.0)
    fresh = module.get_state()["w"].replace(2.0)
    fresh.value = 3.0
    assert fresh.value == 3.0


def test_a_variable_is_used_as_an_array():
    np.testing.assert_array_equal(jnp.sin(nnx.Param(jnp.zeros(2))), jnp.zeros(2))


def test_repr():
    assert repr(nnx.Param(1.0)) == "Param(value=1.0)"
    assert (
        repr(nnx.Param(jnp.ones((20, 20)), sharding=("a", "b")))
        == "Param(value=Array(float32[20, 20]), sharding=('a', 'b'))"
    )
    assert repr(nnx.Node([jnp.ones((20,))])) == "Node(value=[Array(float32[20])])"
    assert repr(nnx.Static({"a": 1})) == "Static({'a': 1})"
    text = []
    jax.jit(lambda v: text.append(repr(v)))(nnx.Param(jnp.ones((20, 20))))
    assert text == ["Param(value=Traced<float32[20,20]>)"]


def test_pickle_and_copies():
    variable = nnx.Param(jnp.ones(2), note="x")
    for other in (pickle.loads(pickle.dumps(variable)), copy.copy(variable), copy.deepcopy(variable)):
        assert other.is_equivalent(variable)
        np.testing.assert_array_equal(other.value, variable.value)
        other.value = jnp.zeros(2)
        assert variable.value[0] == 1


def test_deepcopy_of_a_variable_copies_its_value():
    variable = nnx.Variable(np.ones(2))
    copied, shallow = copy.deepcopy(variable), copy.copy(variable)
    copied.value[0] = 5
    assert variable.value[0] == 1
    assert shallow.value is variable.value


# Static


def test_static_compares_by_type_and_content():
    assert nnx.Static(1) == nnx.Static(1)
    assert nnx.Static(1) != nnx.Static(1.0)
    assert nnx.Static(np.arange(3)) == nnx.Static(np.arange(3))
    assert hash(nnx.Static(np.arange(3))) == hash(nnx.Static(np.arange(3)))
    assert nnx.Static(np.arange(3)) != nnx.Static(np.arange(4))
    assert nnx.Static([1]) != nnx.Static((1,))
    assert nnx.Static(nnx.Static(1)).value == 1


def test_static_is_a_pytree_without_leaves():
    traces = []

    @jax.jit
    def f(static, x):
        traces.append(1)
        return x * static.value.sum()

    assert f(nnx.Static(np.arange(3)), 2.0) == 6.0
    assert f(nnx.Static(np.arange(3)), 2.0) == 6.0
    assert len(traces) == 1
    assert f(nnx.Static(np.arange(4)), 2.0) == 12.0
    assert len(traces) == 2


def test_static_cannot_replace_a_variable():
    module = nnx.Module()
    module.w = nnx.Param(1.0)
    with pytest.raises(
        nnx.VariableError, match=r"`Module.w` is a Param and cannot become static: `del module.w` first"
    ):
        module.w = nnx.Static(1.0)
