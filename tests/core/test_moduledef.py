"""ModuleDef: the static half of a Module, interned, compared exactly, a pytree without leaves."""

import copy
import functools
import math
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.core.static_models import (
    ByValue,
    Color,
    Config,
    Frozen,
    Holder,
    Level,
    OnlyEqual,
    Plain,
    Point,
    Slotted,
    definition,
    function,
    other_function,
)

import nnx

# --- equality ---


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: 1,
        lambda: 10**30,
        lambda: True,
        lambda: 1.5,
        lambda: float("nan"),
        lambda: complex(float("nan"), -0.0),
        lambda: "text",
        lambda: b"bytes",
        lambda: ...,
        lambda: range(3),
        lambda: slice(1, 2),
        lambda: int,
        lambda: math,
        lambda: math.sin,
        lambda: jnp.sin,
        lambda: jax.nn.relu,
        lambda: jnp.float32,
        lambda: np.dtype("float32"),
        lambda: jax.lax.Precision.HIGHEST,
        lambda: function,
        lambda: Color.RED,
        lambda: Level.LOW,
        lambda: Point(1, 2),
        lambda: (1, (2, "x")),
        lambda: [1, [2, "x"]],
        lambda: {"a": {"b": [1]}},
        lambda: {1, 2, 3},
        lambda: frozenset({1, (2, 3)}),
        lambda: types.MappingProxyType({"a": 1}),
        lambda: np.float32(1.5),
        lambda: functools.partial(function, 1, y=[2]),
        lambda: functools.partial(jax.nn.initializers.zeros, dtype=jnp.float32),
        lambda: Config(1, ["a"]),
        lambda: Frozen(1, Frozen(2, (3,))),
        lambda: Plain(a=1, b=[2], c=Plain(d=3)),
        lambda: Slotted(1, [2]),
        lambda: ByValue(3),
        lambda: list[int],
        lambda: jax.sharding.PartitionSpec("a", None),
        lambda: nnx.Static(np.arange(3)),
        lambda: nnx.Static([np.arange(3), {"a": np.ones(2)}]),
        lambda: types.SimpleNamespace(a=1),
        lambda: Plain.__init__,
        lambda: "".join,
    ],
)
def test_equal_statics_make_one_definition(make):
    """A model that is built twice compiles once."""
    assert definition(make()) is definition(make())


_MANY = {
    "int": 1,
    "float": 1.0,
    "bool": True,
    "str": "1",
    "bytes": b"1",
    "complex": 1 + 0j,
    "np.int32": np.int32(1),
    "np.int64": np.int64(1),
    "np.float32": np.float32(1),
    "np.bool": np.bool_(1),
    "zero": 0.0,
    "minus zero": -0.0,
    "nan": float("nan"),
    "int zero": 0,
    "false": False,
    "none": None,
    "tuple": (1,),
    "tuple of float": (1.0,),
    "tuple of bool": (True,),
    "nested zero": ((0.0,),),
    "nested minus zero": ((-0.0,),),
    "point": Point(1, 2),
    "pair": (1, 2),
    "list": [1],
    "list of float": [1.0],
    "pair list": [1, 2],
    "pair set": {1, 2},
    "pair frozenset": frozenset({1, 2}),
    "set of floats": {1.0, 2.0},
    "dict": {"a": 1},
    "dict of float": {"a": 1.0},
    "other key": {"b": 1},
    "integer key": {1: 1},
    "bool key": {True: 1},
    "proxy": types.MappingProxyType({"a": 1}),
    "order ab": {"a": 1, "b": 2},
    "order ba": {"b": 2, "a": 1},
    "enum": Color.RED,
    "int enum": Level.LOW,
    "static array": nnx.Static(np.ones(2)),
    "static float32": nnx.Static(np.ones(2, np.float32)),
    "static other": nnx.Static(np.zeros(2)),
    "static minus": nnx.Static(-np.zeros(2)),
    "static shape": nnx.Static(np.ones((2, 1))),
    "static one": nnx.Static(1),
    "function": function,
    "other function": other_function,
    "partial": functools.partial(function, 1),
    "partial float": functools.partial(function, 1.0),
    "partial key": functools.partial(function, y=1),
    "partial other": functools.partial(other_function, 1),
    "config": Config(1, []),
    "config float": Config(1.0, []),
    "config list": Config(1, [0]),
    "frozen": Frozen(1, ()),
    "plain": Plain(size=1),
    "plain true": Plain(size=True),
    "plain more": Plain(size=1, more=None),
    "by value": ByValue(5),
    "by another value": ByValue(6),
    "type int": int,
    "type bool": bool,
    "dtype": np.dtype("float32"),
    "dtype class": np.float32,
}


def test_unequal_statics_make_different_definitions():
    definitions = {name: definition(value) for name, value in _MANY.items()}
    names = list(definitions)
    same = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if definitions[a] is definitions[b]]
    assert same == []
    equal = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if definitions[a] == definitions[b]]
    assert equal == []


def test_nan_is_nan_and_zero_is_not_minus_zero():
    assert definition(float("nan")) is definition(float("nan") * 1)
    assert definition([0.0]) is not definition([-0.0])
    assert math.copysign(1, definition(-0.0).merge(nnx.State({"w": nnx.Param(1.0)})).value) == -1


def test_lambdas_compare_by_identity():
    def make():
        return lambda x: x

    one = make()
    assert definition(one) is definition(one)
    assert definition(one) is not definition(make())


def test_equality_that_lies_is_not_asked():
    """Two that call themselves equal but differ by type."""
    assert definition(1) is not definition(True)
    assert definition((1, 2)) is not definition(Point(1, 2))


def test_what_can_neither_be_hashed_nor_taken_apart_is_an_error():
    with pytest.raises(
        nnx.StaticError, match=r"`value` holds a .*OnlyEqual that can neither be hashed nor compared by its fields"
    ):
        definition([OnlyEqual(1)])


def test_a_value_that_contains_itself():
    def make():
        value = [1]
        value.append(value)
        return value

    assert definition(make()) is definition(make())
    merged = Holder(make()).partition().merge()
    assert merged.value[1] is merged.value


# --- what else is part of it ---


def test_it_is_interned_hashable_and_comparable():
    first, second = definition(1), definition(1)
    assert first is second
    assert hash(first) == hash(second)
    assert len({first, second, definition(2)}) == 2
    assert first != definition(2)
    assert first != "something else"


def test_values_are_not_part_of_it():
    one, other = Holder(1), Holder(1)
    other.w = jnp.zeros((3, 3))
    assert one.partition().moduledef is other.partition().moduledef


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "extra", 1),
        lambda m: setattr(m, "more", nnx.Param(1.0)),
        lambda m: delattr(m, "w"),
        lambda m: setattr(m, "array", jnp.ones(1)),
        lambda m: setattr(m, "sub", Holder(1)),
        lambda m: setattr(m, "itself", m),
        lambda m: setattr(m, "tied", m.get_variable("w")),
        lambda m: setattr(m, "ctx", nnx.context(0)),
        lambda m: (delattr(m, "w"), setattr(m, "w", nnx.BatchStat(1.0))),
        lambda m: (delattr(m, "w"), setattr(m, "w", nnx.Param(1.0, sharding=("a",)))),
        lambda m: (delattr(m, "value"), setattr(m, "value", nnx.Static(1))),
    ],
)
def test_structure_is_part_of_it(change):
    module = Holder(1)
    change(module)
    assert module.partition().moduledef is not definition(1)


def test_the_order_of_assignment_is_not_part_of_it():
    one, other = nnx.Module(), nnx.Module()
    one.a, one.b = nnx.Param(1.0), 2
    other.b, other.a = 2, nnx.Param(1.0)
    assert one.partition().moduledef is other.partition().moduledef


def test_sharing_is_part_of_it():
    shared, split = nnx.Module(), nnx.Module()
    shared.a = shared.b = Holder(1)
    split.a, split.b = Holder(1), Holder(1)
    assert shared.partition().moduledef is not split.partition().moduledef


def test_the_class_is_part_of_it():
    class Other(Holder):
        pass

    assert Other(1).partition().moduledef is not definition(1)
    assert Other(1).partition().moduledef.type is Other


def test_unused_definitions_are_forgotten():
    import gc
    import weakref

    reference = weakref.ref(definition(("unique", object())))
    gc.collect()
    assert reference() is None


# --- as a pytree ---


def test_it_is_a_pytree_without_leaves():
    moduledef = definition(1)
    leaves, tree = jax.tree.flatten(moduledef)
    assert leaves == []
    assert tree.unflatten(leaves) is moduledef


def test_it_crosses_raw_jit_in_and_out():
    traces = []

    @jax.jit
    def f(moduledef, state):
        traces.append(1)
        module = moduledef.merge(state)
        module.w = module.w * 2
        module.value = "new"
        return module.partition()

    pure = f(*reversed(Holder("old").partition()))
    pure = f(*reversed(Holder("old").partition()))
    assert pure.merge().value == "new"
    assert pure.moduledef is definition("new")
    assert traces == [1]


def test_pickle_and_copy_give_the_same_object():
    for value in (1, [1, {"a": 2.0}], functools.partial(function, 1), nnx.Static(np.arange(3)), Color.RED):
        moduledef = definition(value)
        assert pickle.loads(pickle.dumps(moduledef)) is moduledef
        assert copy.copy(moduledef) is moduledef
        assert copy.deepcopy(moduledef) is moduledef


def test_a_pickled_definition_merges():
    module = Holder([1])
    module.hook = module.method
    module.itself = module
    merged = pickle.loads(pickle.dumps(module.partition())).merge()
    assert merged.hook() == 1.0
    assert merged.itself is merged


# --- merge ---


def make_model():
    model = Holder(1)
    model.stat = nnx.BatchStat(jnp.zeros(2))
    model.sub = Holder(2)
    model.seen = nnx.Intermediate(1.0)
    return model


def test_merge_needs_every_value():
    params, rest = make_model().get_state().partition(nnx.Param, ...)
    moduledef = make_model().get_module_def()
    message = r"merge of a Holder: 2 of 4 values are missing: `sub/w` \(Param\), `w` \(Param\)\. Pass every State"
    with pytest.raises(nnx.StructureError, match=message):
        moduledef.merge(rest)
    with pytest.raises(nnx.StructureError, match="4 of 4|3 of 4"):
        moduledef.merge()
    assert moduledef.merge(params, rest).value == 1


def test_merge_does_without_what_is_temporary():
    state, moduledef = make_model().partition()
    merged = moduledef.merge(state - state.filter(nnx.Intermediate))
    assert not hasattr(merged, "seen")
    assert moduledef.merge(state).seen == 1.0


def test_merge_adds_what_is_more():
    state, moduledef = make_model().partition()
    merged = moduledef.merge(state, nnx.State({"sub/y": nnx.Intermediate(5.0), "array": jnp.ones(2)}))
    assert merged.sub.y == 5.0
    assert isinstance(merged.sub.get_variable("y"), nnx.Intermediate)
    assert merged.array.shape == (2,)


def test_merge_refuses_a_path_that_leads_nowhere():
    state, moduledef = make_model().partition()
    with pytest.raises(
        nnx.PathError, match=r"the path `sbu/y` leads nowhere: the Holder at `\.` has no submodule `sbu`.*`sub`"
    ):
        moduledef.merge(state, nnx.State({"sbu/y": nnx.Param(5.0)}))


def test_merge_refuses_another_type():
    state, moduledef = make_model().partition()
    with pytest.raises(nnx.VariableError, match="`sub/w` is a Param, but the value given for it is in a BatchStat"):
        moduledef.merge(state, nnx.State({"sub/w": nnx.BatchStat(1.0)}))


def test_merge_refuses_other_metadata():
    state, moduledef = make_model().partition()
    with pytest.raises(
        nnx.VariableError, match=r"`w` has metadata \{\}, but the Param given for it has \{'sharding': \('a',\)\}"
    ):
        moduledef.merge(state, nnx.State({"w": nnx.Param(1.0, sharding=("a",))}))


@pytest.mark.parametrize("wrong", [{}, None, 1.0, "state"])
def test_merge_refuses_what_is_no_state(wrong):
    with pytest.raises(nnx.StructureError, match="expected a State, got"):
        make_model().get_module_def().merge(wrong)


def test_merge_of_a_tuple_says_to_unpack_it():
    states, moduledef = make_model().partition(nnx.Param, ...)
    with pytest.raises(nnx.StructureError, match=r"expected a State, got tuple \(unpack the tuple with `\*`\)"):
        moduledef.merge(states)


def test_the_later_state_wins():
    state, moduledef = make_model().partition()
    doubled = jax.tree.map(lambda x: x * 2, state.filter(nnx.Param))
    assert float(moduledef.merge(state, doubled).w) == 2.0
    assert float(moduledef.merge(doubled, state).w) == 1.0


def test_a_bare_value_takes_the_variables_place():
    """What comes from elsewhere, a checkpoint say, may have lost the Variables around its arrays."""
    moduledef = definition(1)
    merged = moduledef.merge(nnx.State({"w": jnp.float32(9)}))
    assert isinstance(merged.get_variable("w"), nnx.Param)
    assert float(merged.w) == 9.0


def test_merge_restores_kinds_whatever_the_leaf():
    module = nnx.Module()
    module.array = np.array(2)
    module.w = nnx.Param(1.0)
    state, moduledef = module.partition()
    for leaf in (np.int64(3), 3, jax.ShapeDtypeStruct((), jnp.int32), None):
        merged = moduledef.merge(state.map(lambda _, __, leaf=leaf: leaf))
        assert merged.partition().moduledef is moduledef


def test_a_merged_module_is_independent():
    state, moduledef = make_model().partition()
    one, other = moduledef.merge(state), moduledef.merge(state)
    one.w = jnp.float32(5)
    one.sub.extra = 1
    assert float(other.w) == 1.0
    assert other.partition().moduledef is moduledef


# --- apply ---


def test_apply():
    state, moduledef = make_model().partition()
    out, (new, same) = moduledef.apply(state).method()
    assert float(out) == 1.0
    assert same is moduledef
    assert new.schema is state.schema
    out, _ = moduledef.apply(state).sub.other()
    assert float(out) == -1.0


def test_apply_says_what_is_missing():
    state, moduledef = make_model().partition()
    with pytest.raises(AttributeError, match="'Holder' object has no attribute 'metod'"):
        moduledef.apply(state).metod()


# --- looking ---


def test_the_repr_is_a_tree():
    model = make_model()
    model.again = model.sub
    text = repr(model.get_module_def())
    assert text.startswith("ModuleDef(Holder(")
    assert "  w=Param" in text
    assert "# shared" in text
    assert "    value=2" in text


def test_statics_lists_paths_and_values():
    assert dict(make_model().get_module_def().statics()) == {("value",): 1, ("sub", "value"): 2}


def test_a_deep_graph():
    root = node = nnx.Module()
    for _ in range(1000):
        node.child = nnx.Module()
        node = node.child
    node.w = nnx.Param(1.0)
    state, moduledef = root.partition()
    assert hash(moduledef) == hash(copy.deepcopy(root).partition().moduledef)
    assert len(state.paths[0]) == 1001
    assert moduledef.merge(state).partition().moduledef is moduledef
    assert repr(moduledef)


# --- laws ---

_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 1),
    st.floats(width=16),
    st.text("ab", max_size=1),
    st.sampled_from([0.0, -0.0, 1.0]),
)
_statics = st.recursive(
    _scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
        inner.map(lambda value: Config(1, [value])),
        inner.map(lambda value: functools.partial(function, value)),
        inner.map(lambda value: Plain(a=value)),
    ),
    max_leaves=4,
)


def _text(value):
    """An exact account of a value, made another way."""
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_text, value))
    if isinstance(value, dict):
        return ("dict", *((key, _text(item)) for key, item in value.items()))
    if isinstance(value, Config):
        return ("Config", _text(value.size), _text(value.names))
    if isinstance(value, functools.partial):
        return ("partial", _text(value.args[0]))
    if isinstance(value, Plain):
        return ("Plain", _text(value.a))
    return (type(value).__name__, value.hex() if isinstance(value, float) else repr(value))


@given(_statics, _statics)
def test_definitions_are_equal_exactly_if_statics_are(a, b):
    assert (definition(a) is definition(b)) == (_text(a) == _text(b))


@given(_statics)
def test_merge_gives_equal_statics(value):
    module = Holder(value)
    merged = module.partition().merge()
    assert _text(merged.value) == _text(value)
    assert merged.partition().moduledef is module.partition().moduledef
    assert copy.deepcopy(module).partition().moduledef is module.partition().moduledef
    assert pickle.loads(pickle.dumps(module)).partition().moduledef is module.partition().moduledef
