"""What can be done with the data of a Module: partition, pop_state, update_state, apply, sow, init and the like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.models import Count, Everything, Leaf

import nnx

# partition, filter, pop_state, update_state


def test_partition_is_a_pair_with_methods():
    pure = Everything().partition()
    state, moduledef = pure
    assert isinstance(state, nnx.State)
    assert isinstance(moduledef, nnx.ModuleDef)
    assert moduledef.type is Everything
    assert pure.moduledef is moduledef
    assert isinstance(pure.merge(), Everything)


def test_partition_shares_no_later_writes():
    model = Leaf(1.0)
    state, _ = model.partition()
    model.w = jnp.float32(2.0)
    assert state["w"].value == 1.0


def test_partition_that_does_not_cover_names_the_rest():
    with pytest.raises(
        nnx.FilterError, match=r"12 of 13 nodes are matched by none.*`blocks/0/w` \(Param\).*Add `\.\.\.`"
    ):
        Everything().partition("batch_stats")


def test_ellipsis_must_be_last():
    with pytest.raises(nnx.FilterError, match="it is number 1 of 2"):
        Everything().partition(..., nnx.Param)
    with pytest.raises(nnx.FilterError, match="it is number 1 of 2"):
        Everything().pop_state(..., nnx.Param)


def test_filter_takes_at_least_one():
    with pytest.raises(nnx.FilterError, match="filter takes at least one filter"):
        Leaf().filter()
    with pytest.raises(nnx.FilterError, match="pop_state takes at least one filter"):
        Leaf().pop_state()


def test_pop_state_by_several_filters():
    model = Everything()
    params, stats = model.pop_state(nnx.Param, nnx.BatchStat)
    assert len(params) == 8
    assert stats.paths == (("stat",),)
    assert not hasattr(model, "param")
    assert not hasattr(model.blocks[0], "w")
    assert set(map("/".join, model.get_state())) == {"jax_buffer", "np_buffer", "node", "ctx/dropout"}


def test_pop_state_of_nothing_changes_nothing():
    model = Leaf()
    first = model.get_module_def()
    assert len(model.pop_state(nnx.Intermediate)) == 0
    assert model.get_module_def() is first


def test_pop_state_takes_every_name_of_a_tied_variable():
    model = nnx.Dict(a=Leaf(), b=Leaf())
    model.b.w = model.a.get_variable("w")
    popped = model.pop_state(nnx.Param)
    assert popped.paths == (("a", "w"),)
    assert not hasattr(model.a, "w")
    assert not hasattr(model.b, "w")


def test_pop_state_puts_back_by_update_state():
    model = Everything()
    first = model.get_module_def()
    popped = model.pop_state(nnx.Param)
    model.update_state(popped)
    assert model.get_module_def() == first
    assert model.blocks[1].w == 2.0


def test_update_state_takes_states_and_tuples():
    model = Everything()
    params, stats, rest = model.filter(nnx.Param, nnx.BatchStat, ...)
    model.update_state((jax.tree.map(lambda x: x + 1, params), jax.tree.map(lambda x: x + 2, stats)))
    assert model.child.w == 2.0
    assert model.stat[0] == 2.0
    model.update_state(params, stats, rest)
    assert model.child.w == 1.0
    assert model.stat[0] == 0.0


def test_update_state_keeps_the_variables():
    model = Leaf(1.0)
    variable = model.get_variable("w")
    model.update_state(nnx.State({"w": nnx.Param(3.0)}))
    assert variable.value == 3.0
    assert model.get_variable("w") is variable


def test_update_state_adds_entries():
    model = Everything()
    model.update_state(nnx.State({"child/y": nnx.Intermediate(5), "extra": jnp.ones(1)}))
    assert model.child.y == 5
    assert type(model.child.get_variable("y")) is nnx.Intermediate
    assert model.extra == 1


def test_update_state_checks_before_it_writes():
    model = nnx.Dict(a=Leaf(1.0), b=Leaf(2.0))
    with pytest.raises(nnx.VariableError, match=r"`b/w` is a Param, but .* BatchStat"):
        model.update_state(nnx.State({"a/w": nnx.Param(9.0), "b/w": nnx.BatchStat(9.0)}))
    assert model.a.w == 1.0
    with pytest.raises(
        nnx.PathError, match=r"the path `aa/w` leads nowhere: the Dict at `.` has no submodule `aa`; did you mean `a`\?"
    ):
        model.update_state(nnx.State({"a/w": nnx.Param(9.0), "aa/w": nnx.Param(9.0)}))
    assert model.a.w == 1.0


def test_update_state_of_an_entry_over_a_static_or_module_is_refused():
    """A State has nothing to say about what is no data: it must not make a submodule or a static disappear."""
    model = Everything()
    with pytest.raises(nnx.NnxError, match="child"):
        model.update_state(nnx.State({"child": nnx.Param(1.0)}))
    assert isinstance(model.child, Leaf)
    with pytest.raises(nnx.NnxError, match="integer"):
        model.update_state(nnx.State({"integer": nnx.Param(1.0)}))
    assert model.integer == 3


def test_update_state_takes_no_other_things():
    with pytest.raises(
        nnx.StructureError, match="update_state takes a State, a tuple of States, a Pure or a Module, got dict"
    ):
        Leaf().update_state({"w": 1.0})


def test_update_state_from_a_module_takes_the_structure():
    model = Everything()
    other = model.clone()
    other.integer = 4
    other.child.w = jnp.float32(7.0)
    other.child.new = nnx.Param(1.0)
    other.blocks.append(Leaf(8.0))
    del other.stat
    other.listing.append(1)
    child, blocks, first = model.child, model.blocks, model.blocks[0]
    param = model.get_variable("param")
    model.update_state(other)
    assert model.get_module_def() == other.get_module_def()
    assert model.integer == 4
    assert model.child.w == 7.0
    assert model.child.new == 1.0
    assert len(model.blocks) == 3
    assert not hasattr(model, "stat")
    assert model.listing == [1, 2, [3], 1]
    # What stays, stays itself, and nothing is shared with the other Module.
    assert (model.child, model.blocks, model.blocks[0]) == (child, blocks, first)
    assert model.get_variable("param") is param
    assert model.blocks[2] is not other.blocks[2]
    model.listing.append(5)
    assert other.listing == [1, 2, [3], 1]


def test_update_state_from_a_pure_takes_the_structure():
    model = Everything()
    _, changed = model.partition().apply.child(1.0)
    model.update_state(changed)
    taken, without = model.partition().pop_state(nnx.BatchStat)
    model.update_state(without)
    assert not hasattr(model, "stat")
    assert taken.paths == (("stat",),)


def test_update_state_from_a_module_takes_ties_and_sharing():
    model = nnx.Dict(a=Leaf(1.0), b=Leaf(2.0))
    other = nnx.Dict(a=Leaf(1.0), b=Leaf(2.0))
    other.b.w = other.a.get_variable("w")
    model.update_state(other)
    assert model.a.get_variable("w") is model.b.get_variable("w")
    assert model.a.get_variable("w") is not other.a.get_variable("w")


def test_update_state_from_another_class_is_refused():
    with pytest.raises(nnx.StructureError, match="cannot update a Leaf from the definition of a Everything"):
        Leaf().update_state(Everything())


def test_update_state_with_itself():
    model = Everything()
    model.update_state(model)
    model.update_state(model.get_state())
    assert model.child.w == 1.0


def test_a_frozen_variable_ties_nothing():
    """A Variable out of a State is a view; assigned to a Module, its value becomes a Variable of the Module's own."""
    model, other = Leaf(2.0), nnx.Module()
    view = model.get_state()["w"]
    other.w = view
    other.w = jnp.float32(3.0)
    assert model.w == 2.0
    assert view.value == 2.0


# apply


class Nested(nnx.Module):
    def __init__(self):
        self.calls = Count(0)
        self.layers = [Leaf(2.0), Leaf(3.0)]
        self.heads = {"a": Leaf(4.0)}

    def __call__(self, x, *, scale=1):
        self.calls += 1
        return self.layers[0](x) * scale

    def method(self, x):
        self.calls += 10
        return self.layers[1](x)


@pytest.mark.parametrize(
    ("access", "out", "calls"),
    [
        (lambda apply: apply(1.0, scale=2), 4.0, 1),
        (lambda apply: apply.method(1.0), 3.0, 10),
        (lambda apply: apply.layers[1](1.0), 3.0, 0),
        (lambda apply: apply.layers[-1](1.0), 3.0, 0),
        (lambda apply: apply.heads["a"](1.0), 4.0, 0),
        (lambda apply: apply.heads.a(1.0), 4.0, 0),
        (lambda apply: apply.layers[0].__call__(1.0), 2.0, 0),
    ],
)
def test_apply_reaches_methods_submodules_and_items(access, out, calls):
    model = Nested()
    y, pure = access(model.partition().apply)
    assert y == out
    assert pure.state["calls"].value == calls
    y, changed = access(model.apply)
    assert y == out
    assert changed.calls == calls
    state, moduledef = model.partition()
    y, (state, _) = access(moduledef.apply(state))
    assert y == out
    assert state["calls"].value == calls
    assert model.calls == 0


def test_apply_of_a_missing_method():
    model = Nested()
    with pytest.raises(AttributeError, match=r"'Nested' object has no attribute 'methd'"):
        model.partition().apply.methd(1.0)


# sow


def test_sow_collects():
    module = nnx.Module()
    module.sow("intermediates", "y", 1)
    module.sow("intermediates", "y", 2)
    module.sow(nnx.Intermediate, "z", 3)
    assert module.y == (1, 2)
    assert module.z == (3,)
    assert type(module.get_variable("y")) is nnx.Intermediate
    assert module.pop_state("intermediates").paths == (("y",), ("z",))


def test_sow_with_a_reduction_of_ones_own():
    module = nnx.Module()
    for value in (1, 2, 3):
        module.sow("losses", "total", value, reduce_fn=lambda total, value: total + value, init_fn=lambda: 0)
    assert module.total == 6
    assert module.filter("losses").paths == (("total",),)


def test_sow_into_another_collection_is_refused():
    module = Leaf()
    with pytest.raises(nnx.VariableError, match=r"cannot sow a Intermediate into `Leaf.w`, which is a Param"):
        module.sow("intermediates", "w", 1)


def test_sow_into_what_is_no_tuple_is_refused():
    module = nnx.Module()
    module.y = nnx.Intermediate(1)
    with pytest.raises(nnx.VariableError, match=r"cannot sow into `Module.y`: it holds a int"):
        module.sow("intermediates", "y", 2)


def test_sow_into_a_static_is_refused():
    module = nnx.Module()
    module.y = 1
    with pytest.raises(nnx.VariableError, match=r"cannot sow into `Module.y`"):
        module.sow("intermediates", "y", 2)


def test_sow_into_a_none_default_of_the_class_is_a_new_variable():
    class Layer(nnx.Module):
        y = None

    module = Layer()
    for value in (2, 3):
        module.sow("intermediates", "y", value)
        assert module.y == (value,)
        module.pop_state("intermediates")
        assert module.y is None


def test_sown_values_come_out_of_jit():
    class Layer(nnx.Module):
        def __call__(self, x):
            self.sow("intermediates", "y", x * 2)
            return x

    module = Layer()
    step = nnx.jit(lambda m, x: m(x))
    step(module, 1.0)
    step(module, 2.0)
    assert [float(y) for y in module.y] == [4.0]  # each lifted call starts afresh
    assert len(module.pop_state("intermediates")) == 1
    step(module, 3.0)
    assert [float(y) for y in module.y] == [6.0]


# for_each, init, mutable_state_dict


def test_for_each_visits_each_module_once_parents_first():
    shared = Leaf(1.0)
    model = nnx.Sequence([shared, nnx.Sequence([shared, Leaf(2.0)])])
    seen = []
    model.for_each(Leaf, seen.append)
    assert [float(item.w) for item in seen] == [1.0, 2.0]
    everything = []
    model.for_each(nnx.Module, everything.append)
    assert everything[0] is model
    assert len(everything) == 4


def test_for_each_may_change_the_modules():
    model = nnx.Sequence([Leaf(1.0), Leaf(2.0)])

    def double(leaf):
        leaf.w = leaf.w * 2
        leaf.extra = Leaf()

    model.for_each(Leaf, double)
    assert [float(item.w) for item in model] == [2.0, 4.0]


class Lazy(nnx.Module):
    def __init__(self, dout):
        self.dout = dout

    def __call__(self, x):
        if self.is_initializing() and not hasattr(self, "w"):
            self.w = nnx.Param(jnp.ones((x.shape[-1], self.dout)))
        return x @ self.w


def test_init_on_an_instance_makes_parameters_from_inputs():
    model = nnx.Sequence([Lazy(3), Lazy(2)])
    assert not model.is_initializing()
    y = model.init(jnp.ones((4, 5)))
    assert y.shape == (4, 2)
    assert [item.w.shape for item in model] == [(5, 3), (3, 2)]
    assert not model[0].is_initializing()
    assert model(jnp.ones((4, 5))).shape == (4, 2)


def test_init_of_a_method_ends_with_an_exception_too():
    class Layer(nnx.Module):
        def build(self, x):
            assert self.is_initializing()
            raise ValueError(x)

    model = Layer()
    with pytest.raises(ValueError, match="boom"):
        model.init.build("boom")
    assert not model.is_initializing()


def test_init_on_the_class_makes_and_partitions():
    state, moduledef = Leaf.init(3.0)
    assert state["w"].value == 3.0
    assert moduledef.type is Leaf


def test_init_is_no_part_of_the_structure():
    class Layer(nnx.Module):
        def __call__(self):
            return self.is_initializing(), self.get_module_def()

    model = Layer()
    initializing, definition = model.init()
    assert initializing
    assert model()[0] is False
    assert model()[1] is definition


def test_mutable_state_dict_reads_and_writes_in_place():
    model = Everything()
    leaves = model.mutable_state_dict("/")
    assert set(leaves) == set(map("/".join, model.get_state()))
    assert leaves["child/w"].value == 1.0
    assert leaves["child/w"].collection == "params"
    assert leaves["jax_buffer"].collection is None
    leaves["child/w"].value = jnp.float32(4.0)
    assert model.child.w == 4.0
    assert ("child", "w") in model.mutable_state_dict()
    assert "child/w" in repr(leaves["child/w"])


# Edits in place


class Editable(nnx.Module):
    """Data that Python can edit in place: a NumPy buffer, a list in a Node, a dict in a Cache."""

    def __init__(self):
        self.table = np.array([1, 2])
        self.node = nnx.Node([jnp.ones(1)])
        self.cache = nnx.Cache({"k": jnp.ones(1)})

    def edit(self):
        self.table += 1
        self.node.append(jnp.zeros(1))
        self.cache["k"] = jnp.zeros(1)
        self.cache["new"] = jnp.zeros(1)


def _held(source):
    """What an Editable or its State holds, as plain numbers."""
    table, node, cache = (source[name] for name in ("table", "node", "cache"))
    return [table.tolist(), [x.tolist() for x in node.value], {k: x.tolist() for k, x in cache.value.items()}]


FRESH = [[1, 2], [[1.0]], {"k": [1.0]}]
EDITED = [[2, 3], [[1.0], [0.0]], {"k": [0.0], "new": [0.0]}]


def test_edits_in_place_do_not_reach_a_state():
    model = Editable()
    state = model.get_state()
    model.edit()
    assert _held(model.get_state()) == EDITED
    assert _held(state) == FRESH


def test_apply_does_not_edit_its_state():
    state, moduledef = Editable().partition()
    for _ in range(2):
        _, (changed, _) = moduledef.apply(state).edit()
        assert _held(changed) == EDITED
        assert _held(state) == FRESH
    moduledef.merge(state).edit()
    assert _held(state) == FRESH


def test_update_state_takes_no_hold_of_a_state():
    model, other = Editable(), Editable()
    state, pure = model.get_state(), model.partition()
    other.update_state(state)
    other.edit()
    other.update_state(pure)
    other.edit()
    other.update_state(model)
    other.edit()
    assert _held(state) == _held(pure.state) == _held(model.get_state()) == FRESH
    popped = other.pop_state(...)
    other.update_state(popped)
    other.edit()
    assert _held(popped) == EDITED


@pytest.mark.parametrize("transform", [nnx.jit, nnx.grad], ids=["jit", "grad"])
def test_edits_in_place_come_out_of_transforms(transform):
    model = Editable()

    def function(x, model):
        model.edit()
        return x

    transform(function)(1.0, model)
    assert _held(model.get_state()) == EDITED


@pytest.mark.parametrize("transform", [nnx.jit, nnx.grad], ids=["jit", "grad"])
def test_edits_in_place_before_an_exception_do_not(transform):
    model = Editable()

    def function(x, model):
        model.edit()
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        transform(function)(1.0, model)
    assert _held(model.get_state()) == FRESH


def test_read_only_arrays_are_shared():
    """A memory-mapped table is not read into memory by looking at it."""
    module = nnx.Module()
    table = np.arange(3)
    table.flags.writeable = False
    module.table = table
    assert module.get_state()["table"] is table
    assert module.partition().merge().table is table
