"""Sequence and Dict: a list and a dict that are Modules."""

import collections.abc
import copy
import pickle

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


def _values(sequence):
    return [float(item.w) for item in sequence]


@pytest.fixture
def three():
    return nnx.Sequence([Leaf(1.0), Leaf(2.0), Leaf(3.0)])


# Sequence


def test_a_sequence_is_a_list(three):
    assert isinstance(three, collections.abc.MutableSequence)
    assert isinstance(three, nnx.Module)
    assert len(three) == 3
    assert _values(three) == [1.0, 2.0, 3.0]
    assert _values(reversed(three)) == [3.0, 2.0, 1.0]
    assert three[0] in three
    assert Leaf(1.0) not in three
    assert three.index(three[2]) == 2
    assert three[-1] is three[2]
    assert three[-3] is three[0]
    assert three[np.int64(1)] is three[1]
    assert bool(three)


def test_an_empty_sequence():
    empty = nnx.Sequence()
    assert len(empty) == 0
    assert not empty
    assert list(empty) == []
    assert empty(5.0) == 5.0
    assert len(empty.get_state()) == 0
    assert len(empty.clone()) == 0
    assert len(nnx.Sequence(())) == 0
    with pytest.raises(IndexError, match=r"Sequence index 0 out of range: its length is 0"):
        empty[0]
    with pytest.raises(IndexError):
        empty.pop()
    with pytest.raises(TypeError, match=r"an empty Sequence returns its one argument, got 2 and \[\]"):
        empty(1, 2)


@pytest.mark.parametrize("index", [3, -4, 100])
def test_an_index_out_of_range(three, index):
    with pytest.raises(IndexError, match=rf"Sequence index {index} out of range: its length is 3"):
        three[index]
    with pytest.raises(IndexError, match=f"{index} out of range"):
        three[index] = Leaf()
    with pytest.raises(IndexError, match=f"{index} out of range"):
        del three[index]
    assert len(three) == 3


@pytest.mark.parametrize("index", ["0", 1.0, None, (0,)])
def test_an_index_of_another_type(three, index):
    with pytest.raises(TypeError, match="a Sequence's index is an integer or a slice, got"):
        three[index]


@pytest.mark.parametrize(
    "part", [slice(None), slice(1, None), slice(-2, None), slice(None, None, -1), slice(None, None, 2), slice(5, 9)]
)
def test_slices_are_sequences_of_the_same_items(three, part):
    cut = three[part]
    assert isinstance(cut, nnx.Sequence)
    assert list(cut) == list(three)[part]
    cut.append(Leaf())
    assert len(three) == 3


def test_items_are_replaced(three):
    three[1] = Leaf(9.0)
    three[-1] = Leaf(8.0)
    assert _values(three) == [1.0, 9.0, 8.0]


@pytest.mark.parametrize("part", [slice(0, 1), slice(1, 3), slice(None), slice(3, None), slice(None, None, 2)])
def test_slices_are_assigned(three, part):
    items = list(three)
    new = [Leaf(7.0), Leaf(8.0)]
    items[part] = new if len(items[part]) == 2 or part.step is None else new[:1]
    three[part] = new if part.step is None or len(list(three)[part]) == 2 else new[:1]
    assert list(three) == items
    assert three.get_state().paths == tuple((str(i), "w") for i in range(len(items)))


def test_slice_assignment_of_another_length_to_a_stride_changes_nothing(three):
    before = list(three)
    with pytest.raises(ValueError, match="extended slice"):
        three[::2] = [Leaf()]
    assert list(three) == before


@pytest.mark.parametrize("index", [0, 1, 3, 10, -1, -3, -10])
def test_insert(three, index):
    expected, item = list(three), Leaf(9.0)
    expected.insert(index, item)
    three.insert(index, item)
    assert list(three) == expected
    assert len(three.get_state()) == 4


@pytest.mark.parametrize("index", [0, 1, -1, slice(0, 2), slice(None), slice(None, None, 2)])
def test_delete(three, index):
    expected = list(three)
    del expected[index]
    del three[index]
    assert list(three) == expected
    assert len(three) == len(expected)
    assert len(three.get_state()) == len(expected)


def test_list_methods(three):
    first, second, third = three
    assert three.pop() is third
    assert three.pop(0) is first
    three.extend([first, third])
    assert list(three) == [second, first, third]
    three.reverse()
    assert list(three) == [third, first, second]
    three.remove(first)
    assert list(three) == [third, second]
    three += [first]
    assert list(three) == [third, second, first]
    three.clear()
    assert list(three) == []


def test_more_than_ten_items_are_in_natural_order():
    many = nnx.Sequence(Leaf(float(i)) for i in range(12))
    assert [path[0] for path in many.get_state()] == [str(i) for i in range(12)]
    assert _values(many.clone()) == [float(i) for i in range(12)]


def test_a_sequence_holds_variables_and_arrays_too():
    sequence = nnx.Sequence([nnx.Param(1.0), jnp.ones(2), 3, "text"])
    assert sequence[0] == 1.0
    assert sequence[2:] is not None
    assert sequence.get_state().paths == (("0",), ("1",))
    variable = sequence.get_variable("0")
    sequence.insert(0, nnx.Param(0.0))
    assert sequence.get_variable("1") is variable
    sequence[1] = 5.0
    assert variable.value == 5.0
    assert list(sequence.clone())[3:] == [3, "text"]
    del sequence[0]
    assert sequence.get_variable("0") is variable
    assert sequence[:1].get_variable("0") is variable


def test_moving_items_moves_their_variables():
    sequence = nnx.Sequence([nnx.Param(1.0), nnx.BatchStat(2.0)])
    sequence.reverse()
    assert list(sequence) == [2.0, 1.0]
    assert type(sequence.get_variable("0")) is nnx.BatchStat


def test_popping_a_variable_gives_its_value():
    sequence = nnx.Sequence([nnx.Param(1.0), nnx.Param(2.0)])
    assert sequence.pop(0) == 1.0
    assert list(sequence) == [2.0]


def test_pop_state_takes_items_out_of_a_sequence():
    sequence = nnx.Sequence([nnx.Intermediate(1.0), nnx.Param(2.0), nnx.Intermediate(3.0), Leaf(4.0)])
    popped = sequence.pop_state(nnx.Intermediate)
    assert popped.paths == (("0",), ("2",))
    assert len(sequence) == 2
    assert sequence[0] == 2.0
    assert sequence[-1].w == 4.0
    sequence.update_state(popped)
    assert list(sequence)[:3] == [1.0, 2.0, 3.0]
    sequence.pop_state(nnx.Intermediate)
    sequence.append(Leaf(5.0))
    assert [item if isinstance(item, float) else float(item.w) for item in sequence] == [2.0, 4.0, 5.0]
    del sequence[0]
    assert sequence.get_state().paths == (("0", "w"), ("1", "w"))


def test_a_call_that_captures_in_a_sequence_is_merged_without_the_captures():
    sequence = nnx.Sequence([Leaf(2.0)])
    sequence.append(nnx.Intermediate(1.0))
    params, moduledef = sequence.partition(nnx.Param, ...)[0][0], sequence.get_module_def()
    merged = moduledef.merge(params)
    assert len(merged) == 1
    assert merged(1.0) == 2.0


@pytest.mark.parametrize(
    "change", [lambda s, x: s.insert(0, x), lambda s, x: s.append(x), lambda s, x: s.__setitem__(slice(0, 1), [x])]
)
def test_an_item_that_cannot_be_one_changes_nothing(three, change):
    before = list(three)
    with pytest.raises(nnx.AttributeKindError, match="that holds a JAX array"):
        change(three, [jnp.ones(1)])
    assert list(three) == before


def test_a_chain_spreads_tuples_and_dicts():
    chain = nnx.Sequence([lambda x: (x, x + 1), lambda a, b: {"a": a, "b": b}, lambda *, a, b: a * 10 + b])
    assert chain(1) == 12


def test_a_chain_takes_several_arguments():
    chain = nnx.Sequence([lambda a, *, b: a + b, lambda x: x * 2])
    assert chain(1, b=2) == 6


def test_a_chain_hands_ctx_to_those_that_take_it():
    class Drops(nnx.Module):
        def __call__(self, x, *, ctx):
            return x, ctx

    seen = []

    def takes_any(x, ctx, **kwargs):
        seen.append((ctx, kwargs))
        return x

    ctx = nnx.context(dropout=0)
    x, got = nnx.Sequence([Leaf(2.0), takes_any, jnp.sin, takes_any, Drops()])(jnp.zeros(2), ctx=ctx)
    assert got is ctx
    assert seen == [(ctx, {}), (ctx, {})]
    np.testing.assert_array_equal(x, jnp.zeros(2))


def test_a_chain_of_chains_hands_ctx_down():
    inner = nnx.Sequence([nnx.Dropout(0.5)])
    model = nnx.Sequence([nnx.Linear(4, 4, ctx=nnx.context(0)), inner])
    ctx = nnx.context(dropout=0, flags={"deterministic": False})
    y = model(jnp.ones((2, 4)), ctx=ctx)
    assert ctx.rngs["dropout"].count == 1
    assert (y == 0).any()


def test_a_chain_without_ctx():
    assert nnx.Sequence([Leaf(2.0), Leaf(3.0)])(jnp.float32(1.0)) == 6.0


def test_an_item_that_cannot_be_called():
    with pytest.raises(TypeError, match=r"Sequence\[1\] is a int and cannot be called"):
        nnx.Sequence([Leaf(), 3])(1.0)


@pytest.mark.parametrize("value", [[], (), {}])
def test_empty_containers_stay_what_they_are(value):
    module = nnx.Module()
    module.things = value
    assert module.things == value
    assert type(module.things) is type(value)


def test_nested_lists_become_nested_sequences():
    module = nnx.Module()
    module.grid = [[Leaf(1.0), Leaf(2.0)], (Leaf(3.0),), {"a": Leaf(4.0), "b": [Leaf(5.0)]}, None, 3]
    assert ["/".join(path) for path in module.get_state()] == [
        "grid/0/0/w",
        "grid/0/1/w",
        "grid/1/0/w",
        "grid/2/a/w",
        "grid/2/b/0/w",
    ]
    assert module.grid[2]["b"][0].w == 5.0
    assert module.grid[3] is None
    assert module.grid[4] == 3


def test_sequences_as_a_list_is_assigned_keep_sharing():
    shared = Leaf()
    module = nnx.Module()
    module.items = [shared, shared]
    assert module.items[0] is module.items[1]
    assert len(module.get_state()) == 1


def test_a_sequence_changes_inside_of_jit():
    @nnx.jit
    def grow(sequence):
        sequence.append(Leaf(4.0))
        del sequence[0]
        return len(sequence)

    sequence = nnx.Sequence([Leaf(1.0), Leaf(2.0)])
    kept = sequence[1]
    assert grow(sequence) == 2
    assert _values(sequence) == [2.0, 4.0]
    assert sequence[0] is kept


@pytest.mark.parametrize(
    "remake", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), lambda s: s.clone()]
)
def test_copies_of_a_sequence(three, remake):
    other = remake(three)
    assert _values(other) == [1.0, 2.0, 3.0]
    other.append(Leaf())
    assert len(three) == 3


def test_a_subclass_of_sequence():
    class Stack(nnx.Sequence):
        def __init__(self, n):
            super().__init__(Leaf(float(i)) for i in range(n))
            self.scale = nnx.Param(2.0)

        def __call__(self, x):
            return super().__call__(x) * self.scale

    stack = Stack(3)
    assert len(stack) == 3
    assert stack.get_state().paths == (("0", "w"), ("1", "w"), ("2", "w"), ("scale",))
    assert stack.clone()(1.0) == 0.0
    assert isinstance(stack[:2], nnx.Sequence)


# Dict


@pytest.fixture
def named():
    return nnx.Dict({"b": Leaf(1.0)}, a=Leaf(2.0))


def test_a_dict_is_a_dict(named):
    assert isinstance(named, collections.abc.MutableMapping)
    assert list(named) == ["b", "a"]
    assert list(named.keys()) == ["b", "a"]
    assert _values(named.values()) == [1.0, 2.0]
    assert dict(named.items()) == {"b": named.b, "a": named.a}
    assert len(named) == 2
    assert "a" in named
    assert "w" not in named
    assert 3 not in named
    assert named["a"] is named.a
    assert named.get("a") is named.a
    assert named.get("zzz") is None
    assert named.get("zzz", 5) == 5


def test_a_dict_of_pairs_and_of_nothing():
    assert list(nnx.Dict([("x", Leaf()), ("y", Leaf())])) == ["x", "y"]
    assert len(nnx.Dict()) == 0
    assert not nnx.Dict()


def test_a_missing_key(named):
    with pytest.raises(KeyError, match="zzz"):
        named["zzz"]
    with pytest.raises(KeyError, match="zzz"):
        del named["zzz"]
    with pytest.raises(KeyError):
        named["get"]


def test_items_and_attributes_are_one(named):
    named.c = Leaf(3.0)
    named["d"] = Leaf(4.0)
    assert list(named) == ["b", "a", "c", "d"]
    assert named["c"].w == 3.0
    assert named.d.w == 4.0
    del named.c
    del named["b"]
    assert list(named) == ["a", "d"]
    assert not hasattr(named, "b")
    assert len(named.get_state()) == 2


def test_dict_methods(named):
    item = named.b
    assert named.pop("b") is item
    assert named.pop("b", None) is None
    named.update(x=Leaf(7.0), a=Leaf(8.0))
    assert named.setdefault("x", None).w == 7.0
    assert {name: float(leaf.w) for name, leaf in named.items()} == {"a": 8.0, "x": 7.0}
    named.clear()
    assert len(named) == 0
    assert len(named.get_state()) == 0


@pytest.mark.parametrize("name", ["items", "get", "partition", "_private", "__call__", "values", "_names"])
def test_names_that_a_dict_cannot_hold(name):
    with pytest.raises(nnx.AttributeKindError, match=f"an nnx.Dict cannot hold the name '{name}'"):
        nnx.Dict({name: Leaf()})


@pytest.mark.parametrize("name", [3, None, ("a",)])
def test_names_that_are_no_strings(name):
    with pytest.raises(nnx.AttributeKindError, match=r"the names in an nnx\.Dict are strings"):
        nnx.Dict()[name] = Leaf()


@pytest.mark.parametrize("name", ["a/b", ""])
def test_names_that_are_no_parts_of_a_path(name):
    d = nnx.Dict()
    with pytest.raises(nnx.AttributeKindError, match="cannot be an attribute of a Module"):
        d[name] = Leaf()
    assert len(d) == 0


def test_a_dict_holds_variables():
    d = nnx.Dict(w=nnx.Param(1.0), n=3)
    d["w"] = 2.0
    assert d["w"] == 2.0
    assert type(d.get_variable("w")) is nnx.Param
    assert dict(d) == {"w": 2.0, "n": 3}
    assert d.get_state().paths == (("w",),)


def test_pop_state_takes_items_out_of_a_dict():
    d = nnx.Dict(w=nnx.Param(1.0), y=nnx.Intermediate(2.0), z=nnx.Param(3.0))
    d.pop_state(nnx.Intermediate)
    assert dict(d) == {"w": 1.0, "z": 3.0}
    assert len(d) == 2
    assert "y" not in d
    d["y"] = nnx.Intermediate(5.0)
    assert dict(d) == {"w": 1.0, "y": 5.0, "z": 3.0}


def test_pop_state_and_update_state_restore_a_dict():
    d = nnx.Dict(w=nnx.Param(1.0), y=nnx.Intermediate(2.0), z=nnx.Param(3.0))
    before = d.get_module_def()
    d.update_state(d.pop_state(nnx.Intermediate))
    assert d.get_module_def() == before
    assert list(d) == ["w", "y", "z"]


def test_update_state_puts_items_into_a_dict():
    d = nnx.Dict(w=nnx.Param(1.0))
    d.update_state(nnx.State({"y": nnx.Intermediate(2.0)}))
    assert dict(d) == {"w": 1.0, "y": 2.0}
    assert "y" in d
    assert d["y"] == 2.0


def test_merge_without_an_intermediate_leaves_it_out_of_a_dict():
    d = nnx.Dict(w=nnx.Param(1.0), y=nnx.Intermediate(2.0))
    state, moduledef = d.partition()
    merged = moduledef.merge(state.filter(nnx.Param))
    assert dict(merged) == {"w": 1.0}


def test_a_dict_keeps_its_order_through_everything(named):
    for other in (
        named.clone(),
        copy.copy(named),
        copy.deepcopy(named),
        pickle.loads(pickle.dumps(named)),
        nnx.jit(lambda m: m.clone())(named),
    ):
        assert list(other) == ["b", "a"]
        assert _values(other.values()) == [1.0, 2.0]


def test_order_is_structure():
    ab, ba = nnx.Dict(a=Leaf(), b=Leaf()), nnx.Dict(b=Leaf(), a=Leaf())
    assert ab.get_module_def() != ba.get_module_def()
    assert ab.get_state().paths == ba.get_state().paths


def test_a_dict_changes_inside_of_jit(named):
    @nnx.jit
    def change(d):
        d["c"] = Leaf(3.0)
        del d["b"]

    change(named)
    assert list(named) == ["a", "c"]
    assert _values(named.values()) == [2.0, 3.0]


def test_containers_compare_by_identity(three, named):
    assert three != nnx.Sequence(list(three))
    assert three == three  # noqa: PLR0124 -- a list compares by content, a Module does not
    assert named != dict(named)
    assert len({three, named}) == 2


def test_containers_in_gradients(three):
    grads = nnx.grad(lambda m: m(2.0))(three)
    assert [float(g) for g in jax.tree.leaves(grads)] == [12.0, 6.0, 4.0]
