"""State: a flat, immutable mapping from paths to Variables, stored by column."""

import copy
import pickle
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nnx


def make_state():
    return nnx.State(
        {
            ("layers", "10", "kernel"): nnx.Param(jnp.ones((2, 3)), sharding=("in", "out")),
            ("layers", "2", "kernel"): nnx.Param(jnp.zeros((2, 3))),
            ("layers", "2", "mean"): nnx.BatchStat(jnp.zeros(3)),
            ("buffer",): jnp.arange(3),
            ("step",): nnx.var("counts", 7),
        }
    )


# --- reading ---


def test_paths_come_in_natural_order():
    assert make_state().paths == (
        ("buffer",),
        ("layers", "2", "kernel"),
        ("layers", "2", "mean"),
        ("layers", "10", "kernel"),
        ("step",),
    )


def test_order_does_not_depend_on_the_order_given():
    items = list(make_state().items())
    assert nnx.State(items[::-1]).schema is nnx.State(items).schema


def test_it_is_a_mapping():
    state = make_state()
    assert isinstance(state, Mapping)
    assert len(state) == 5
    assert list(state) == list(state.paths) == list(state.keys())
    assert [type(node).__name__ for node in state.values()][1:3] == ["Param", "BatchStat"]
    assert dict(state.items()).keys() == set(state.paths)
    assert state.get(("nothing",), "default") == "default"
    assert state.get("step").value == 7


@pytest.mark.parametrize(
    "path", [("layers", "2", "kernel"), "layers/2/kernel", ("layers", 2, "kernel"), ["layers", "2", "kernel"]]
)
def test_a_path_can_be_written_in_several_ways(path):
    state = make_state()
    assert path in state
    assert state[path].value.shape == (2, 3)


def test_a_tuple_of_parts_is_a_subscript():
    state = make_state()
    assert state["layers", "10", "kernel"].sharding == ("in", "out")
    assert state["layers", 10, "kernel"].sharding == ("in", "out")
    assert state["step"].value == 7


def test_a_bare_array_is_given_back_bare():
    state = make_state()
    assert isinstance(state["buffer"], jax.Array)
    assert not isinstance(state["buffer"], nnx.Variable)


@pytest.mark.parametrize("other", ["layers", ("layers", "2"), ("kernel",), (), 3, None, 1.5, ("layers", 2.0), object()])
def test_what_is_no_path_is_not_contained(other):
    assert other not in make_state()


def test_raw_values_are_the_values_by_column():
    state = make_state()
    assert len(state.raw_values) == 5
    assert all(value is state[path].value for path, value in zip(state.paths[1:], state.raw_values[1:], strict=True))


def test_an_empty_state():
    state = nnx.State()
    assert len(state) == 0
    assert not state
    assert state.paths == ()
    assert jax.tree.leaves(state) == []
    assert state.to_nested_dict() == {}
    assert state.partition() is state
    assert repr(state) == "State({})"


def test_the_repr_shows_paths_types_values_and_metadata():
    text = repr(make_state())
    assert "('layers', '10', 'kernel'): Param(value=Array(float32[2, 3]), sharding=('in', 'out'))" in text
    assert "('step',): Counts(value=7)" in text
    assert "('buffer',): Array([0, 1, 2], dtype=int32)" in text


def test_the_repr_of_a_large_state_is_cut():
    text = repr(nnx.State({f"p{i}": nnx.Param(i) for i in range(100)}))
    assert "... and 40 more" in text
    assert len(text.splitlines()) < 70


# --- errors ---


def test_an_unknown_path_names_near_misses():
    with pytest.raises(
        nnx.PathError, match=r"^no entry `layers/2/kernle` in this State: did you mean `layers/2/kernel`"
    ):
        make_state()["layers", "2", "kernle"]


def test_an_unknown_path_is_a_key_error_with_a_plain_message():
    with pytest.raises(KeyError) as caught:
        make_state()["layers/3/kernel"]
    assert not str(caught.value).startswith(("'", '"'))


def test_a_part_of_the_way_lists_what_lies_behind():
    message = r"`layers/2` is a part of the way to: `layers/2/kernel`, `layers/2/mean`"
    with pytest.raises(nnx.PathError, match=message):
        make_state()["layers", "2"]


def test_a_path_like_nothing_lists_what_there_is():
    with pytest.raises(nnx.PathError, match=r"there are: `buffer`, `layers/2/kernel`, .*"):
        make_state()["zzzzzz"]
    with pytest.raises(nnx.PathError, match="there are none"):
        nnx.State()["a"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("a/b",), "'a/b' cannot be a part of a path"),
        (("",), "'' cannot be a part of a path"),
        ((None,), "None cannot be a part of a path"),
        (("a", 1.0), "1.0 cannot be a part of a path"),
        (3.5, "a path is a tuple of strings or a string with '/', got 3.5"),
    ],
)
def test_a_malformed_path_is_refused(path, message):
    with pytest.raises(nnx.PathError, match=re.escape(message)):
        nnx.State({path: nnx.Param(1)})


@pytest.mark.parametrize("path", ["a//b", "/a", "a/", "", ()])
def test_a_path_with_an_empty_part_is_refused(path):
    with pytest.raises(nnx.PathError):
        nnx.State({path: nnx.Param(1)})


def test_equal_paths_are_refused():
    with pytest.raises(nnx.StructureError, match="two entries for the path `a/0`"):
        nnx.State([("a/0", nnx.Param(1)), (("a", 0), nnx.Param(2))])


def test_a_path_inside_a_node_is_refused():
    with pytest.raises(nnx.StructureError, match="the path `a` is the beginning of `a/b`"):
        nnx.State({"a": nnx.Param(1), "a/b": nnx.Param(2)})


def test_a_path_inside_a_node_is_refused_wherever_they_stand():
    with pytest.raises(nnx.StructureError, match="the path `a` is the beginning of `a/b`"):
        nnx.State({"a/b": nnx.Param(2), "a": nnx.Param(1), "a!": nnx.Param(1), "a0": nnx.Param(1)})


# --- immutability ---


def test_a_state_does_not_change():
    state = make_state()
    with pytest.raises(TypeError, match="does not support item assignment"):
        state["step"] = nnx.Param(1)
    with pytest.raises(TypeError, match="does not support item deletion"):
        del state["step"]
    with pytest.raises(AttributeError):
        state.step = 1


def test_a_variable_out_of_a_state_is_frozen():
    variable = make_state()["step"]
    with pytest.raises(nnx.VariableError, match=r"came out of a State or a pytree, so the write would be lost"):
        variable.value = 8


def test_a_state_does_not_see_later_writes():
    variable = nnx.Param(1)
    state = nnx.State({"a": variable})
    variable.value = 2
    assert state["a"].value == 1


# --- partition and filter ---


def test_partition_deals_out_by_filter():
    params, stats, rest = make_state().partition(nnx.Param, nnx.BatchStat, ...)
    assert params.paths == (("layers", "2", "kernel"), ("layers", "10", "kernel"))
    assert stats.paths == (("layers", "2", "mean"),)
    assert rest.paths == (("buffer",), ("step",))


def test_partition_with_one_filter_gives_one_state():
    state = make_state()
    assert state.partition(...) is state
    assert isinstance(state.filter(nnx.Param).partition(nnx.Param), nnx.State)


def test_partition_by_collections_name():
    counts, rest = make_state().partition("counts", ...)
    assert counts.paths == (("step",),)
    assert len(rest) == 4


def test_the_first_match_wins():
    kernels, params, rest = make_state().partition(nnx.PathGlob("**/10/kernel"), nnx.Param, ...)
    assert kernels.paths == (("layers", "10", "kernel"),)
    assert params.paths == (("layers", "2", "kernel"),)
    assert len(rest) == 3


def test_a_filter_may_match_nothing():
    nothing, everything = make_state().partition(nnx.Cache, ...)
    assert len(nothing) == 0
    assert len(everything) == 5


def test_a_partition_that_leaves_something_over_is_an_error():
    message = r"3 of 5 nodes are matched by none of the filters \(Param\): `buffer` \(array\), "
    message += r"`layers/2/mean` \(BatchStat\), `step` \(Counts\)\. Add `\.\.\.` as the last filter"
    with pytest.raises(nnx.FilterError, match=message):
        make_state().partition(nnx.Param)


def test_the_error_of_a_partition_lists_the_first_paths_only():
    state = nnx.State({f"p{i}": nnx.Param(i) for i in range(40)})
    with pytest.raises(nnx.FilterError) as caught:
        state.partition(nnx.BatchStat)
    assert "`p4` (Param) ..." in str(caught.value)
    assert "`p5`" not in str(caught.value)


def test_ellipsis_only_last():
    with pytest.raises(
        nnx.FilterError, match=r"the filter `\.\.\.` .* can only be the last one; it is number 1 of 2: \.\.\., Param"
    ):
        make_state().partition(..., nnx.Param)
    with pytest.raises(nnx.FilterError, match="number 2 of 3"):
        make_state().filter(nnx.Param, ..., nnx.BatchStat)


def test_filter_leaves_out_the_rest():
    state = make_state()
    assert len(state.filter(nnx.Param)) == 2
    params, stats = state.filter(nnx.Param, nnx.BatchStat)
    assert (len(params), len(stats)) == (2, 1)
    assert len(state.filter(None)) == 0
    assert state.filter(...) is state


def test_filter_without_filters_is_an_error():
    with pytest.raises(nnx.FilterError, match="filter takes at least one filter"):
        make_state().filter()


def test_values_are_not_copied():
    state = make_state()
    params = state.filter(nnx.Param)
    assert params["layers", "2", "kernel"].value is state["layers", "2", "kernel"].value


def test_schemas_are_interned():
    assert make_state().schema is make_state().schema
    assert make_state().filter(nnx.Param).schema is make_state().filter(nnx.Param).schema
    assert make_state().schema is not make_state().filter(nnx.Param).schema
    assert hash(make_state().schema) == hash(make_state().schema)


def test_metadata_are_part_of_the_schema():
    assert nnx.State({"a": nnx.Param(1, sharding=("x",))}).schema is not nnx.State({"a": nnx.Param(1)}).schema


# --- merge, |, -, map, nested dicts ---


def test_merge_takes_the_later_value():
    a, b = nnx.State({"x": nnx.Param(1), "y": nnx.Param(2)}), nnx.State({"y": nnx.Param(3), "z": nnx.Param(4)})
    for merged in (a.merge(b), nnx.State.merge(a, b), a | b):
        assert {path: node.value for path, node in merged.items()} == {("x",): 1, ("y",): 3, ("z",): 4}
    assert (b | a)["y"].value == 2
    assert a.merge() is a


def test_merge_keeps_natural_order():
    a, b = nnx.State({"a10": nnx.Param(1), "b": nnx.Param(2)}), nnx.State({"a2": nnx.Param(3)})
    assert (a | b).paths == (("a2",), ("a10",), ("b",))


def test_merge_may_change_the_type():
    merged = nnx.State({"x": nnx.Param(1)}) | nnx.State({"x": nnx.BatchStat(2)})
    assert isinstance(merged["x"], nnx.BatchStat)


def test_merge_refuses_a_node_inside_a_node():
    with pytest.raises(nnx.StructureError, match="the path `a` is the beginning of `a/b`"):
        nnx.State({"a": nnx.Param(1)}).merge(nnx.State({"a/b": nnx.Param(2)}))


def test_merge_takes_states_only():
    with pytest.raises(nnx.StructureError, match=r"State\.merge takes States, got dict"):
        make_state().merge({})
    with pytest.raises(TypeError, match="unsupported operand"):
        make_state() | {}
    with pytest.raises(TypeError, match="unsupported operand"):
        make_state() - [("step",)]


def test_minus_removes_paths():
    state = make_state()
    rest = state - state.filter(nnx.Param)
    assert rest.paths == (("buffer",), ("layers", "2", "mean"), ("step",))
    assert len(state - state) == 0
    assert (state - nnx.State({"other": nnx.Param(1)})) is state


def test_map_gives_path_and_value():
    state = make_state().filter(nnx.Param)
    seen = []
    doubled = state.map(lambda path, value: seen.append(path) or value * 2)
    assert tuple(seen) == state.paths
    assert doubled.schema is state.schema
    np.testing.assert_array_equal(doubled["layers/10/kernel"].value, 2 * np.ones((2, 3)))


def test_replace_values():
    state = nnx.State({"a": nnx.Param(1), "b": nnx.BatchStat(2)})
    other = state.replace_values([10, 20])
    assert isinstance(other["b"], nnx.BatchStat)
    assert (other["a"].value, other["b"].value) == (10, 20)
    with pytest.raises(nnx.StructureError, match="expected 2 values, got 1"):
        state.replace_values([1])


def test_nested_dicts_and_back():
    nested = make_state().to_nested_dict()
    assert list(nested) == ["buffer", "layers", "step"]
    assert list(nested["layers"]) == ["2", "10"]
    assert isinstance(nested["layers"]["2"]["mean"], nnx.BatchStat)
    again = nnx.State.from_nested_dict(nested)
    assert again.schema is make_state().schema
    assert isinstance(again["buffer"], jax.Array)


def test_nested_dicts_may_have_integer_keys():
    state = nnx.State.from_nested_dict({"layers": {0: nnx.Param(1), 1: {"w": nnx.Param(2)}}})
    assert state.paths == (("layers", "0"), ("layers", "1", "w"))


def test_nested_dicts_refuse_slashes():
    with pytest.raises(nnx.PathError, match="'a/b' cannot be a part of a path"):
        nnx.State.from_nested_dict({"a/b": nnx.Param(1)})


# --- as a pytree ---


def test_the_leaves_are_the_values():
    state = make_state()
    leaves = jax.tree.leaves(state)
    assert all(leaf is value for leaf, value in zip(leaves, state.raw_values, strict=True))


def test_the_keys_are_dict_keys_of_whole_paths():
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(make_state())[0]]
    assert paths[1] == (jax.tree_util.DictKey("layers/2/kernel"),)
    assert jax.tree_util.keystr(paths[1]) == "['layers/2/kernel']"
    assert all(type(key) is jax.tree_util.DictKey for path in paths for key in path)


def test_labels_by_path_are_easy():
    labels = jax.tree_util.tree_map_with_path(lambda path, _: path[0].key.endswith("kernel"), make_state())
    assert labels["layers/2/kernel"].value is True
    assert labels["layers/2/mean"].value is False


def test_tree_map_keeps_types_and_metadata():
    doubled = jax.tree.map(lambda value: value * 2, make_state())
    assert doubled.schema is make_state().schema
    assert doubled["layers", "10", "kernel"].sharding == ("in", "out")
    assert doubled["step"].value == 14


def test_tree_map_over_two_states():
    state = make_state()
    total = jax.tree.map(lambda a, b: a + b, state, state)
    np.testing.assert_array_equal(total["buffer"], [0, 2, 4])


def test_tree_map_refuses_states_of_other_structure():
    with pytest.raises(ValueError, match=r"[Mm]ismatch|structure"):
        jax.tree.map(lambda a, b: a, make_state(), make_state().filter(nnx.Param))


def test_a_state_crosses_raw_jax_transforms():
    state = nnx.State({"w": nnx.Param(jnp.float32(3)), "b": nnx.Param(jnp.float32(1))})
    grads = jax.jit(jax.grad(lambda s: s["w"].value ** 2 * s["b"].value))(state)
    assert isinstance(grads, nnx.State)
    assert grads.schema is state.schema
    assert (float(grads["w"].value), float(grads["b"].value)) == (6.0, 9.0)
    stacked = jax.vmap(lambda x: nnx.State({"w": nnx.Param(x)}))(jnp.arange(4))
    assert stacked["w"].value.shape == (4,)


def test_states_of_equal_schema_share_a_compiled_function():
    traces = []

    @jax.jit
    def f(state):
        traces.append(1)
        return jax.tree.map(lambda value: value + 1, state)

    f(f(nnx.State({"w": nnx.Param(jnp.ones(2))})))
    assert len(traces) == 1


def test_values_may_be_pytrees():
    state = nnx.State({"cache": nnx.Cache({"k": jnp.ones(2), "v": jnp.zeros(2)}), "n": nnx.Node([4, 5])})
    assert len(jax.tree.leaves(state)) == 4
    assert jax.tree.map(lambda x: x + 1, state)["n"].value == [5, 6]


def test_none_as_a_value_is_kept():
    state = nnx.State({"bias": nnx.Param(None), "w": nnx.Param(1)})
    assert jax.tree.leaves(state) == [1]
    assert jax.tree.map(lambda x: x + 1, state)["bias"].value is None


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_and_pickles(copied):
    state = make_state()
    other = copied(state)
    assert other.schema is state.schema
    np.testing.assert_array_equal(other["layers", "10", "kernel"].value, np.ones((2, 3)))


# --- laws ---

_parts = st.text("ab019", min_size=1, max_size=3)
_paths = st.lists(_parts, min_size=2, max_size=2).map(tuple)
_states = st.dictionaries(_paths, st.integers(0, 3), max_size=6).map(
    lambda d: nnx.State({p: nnx.Param(v) for p, v in d.items()})
)


def _plain(state):
    return {path: node.value for path, node in state.items()}


@given(_states, _states, _states)
def test_merge_is_the_union_of_dicts(a, b, c):
    assert _plain(a | b) == {**_plain(a), **_plain(b)}
    assert _plain((a | b) | c) == _plain(a | (b | c)) == _plain(a.merge(b, c))
    assert _plain(a | a) == _plain(a)
    assert (a | nnx.State()).paths == a.paths


@given(_states, _states)
def test_minus_is_the_difference_of_dicts(a, b):
    assert _plain(a - b) == {path: value for path, value in _plain(a).items() if path not in b}
    assert _plain((a - b) | (a - (a - b))) == _plain(a)


@given(_states)
def test_order_is_total_and_stable(state):
    assert nnx.State(dict(reversed(list(state.items())))).schema is state.schema
    digits = [path for path in state.paths if path[0].isdigit() and path[1].isdigit()]
    assert digits == sorted(digits, key=lambda path: (int(path[0]), path[0], int(path[1]), path[1]))


@given(_states)
def test_a_state_equals_itself_after_every_way_around(state):
    leaves, tree = jax.tree.flatten(state)
    for again in (tree.unflatten(leaves), pickle.loads(pickle.dumps(state)), nnx.State(dict(state))):
        assert again.schema is state.schema
        assert _plain(again) == _plain(state)
