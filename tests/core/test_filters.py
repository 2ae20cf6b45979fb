"""Filters: what each selects, what is refused, and that together they are an algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nnx


class KVParam(nnx.Param):
    pass


class Losses(nnx.Variable):
    collection = "losses"


class Model(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones(2))
        self.lora = KVParam(jnp.ones(3))
        self.mean = nnx.BatchStat(jnp.zeros(2))
        self.loss = Losses(0.0)
        self.array = jnp.arange(2)
        self.numpy = np.arange(3)
        self.node = nnx.Node([1.0, 2.0])
        self.encoder = nnx.Sequence([Leaf(), Leaf()])
        self.ctx = nnx.context(dropout=0)


class Leaf(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones(1))
        self.bias = nnx.Param(jnp.ones(1))


def selected(filter):
    return {"/".join(path) for path in Model().filter(filter).paths}


LEAVES = {"encoder/0/kernel", "encoder/0/bias", "encoder/1/kernel", "encoder/1/bias"}
PARAMS = {"kernel", "lora", *LEAVES}
EVERYTHING = PARAMS | {"mean", "loss", "array", "numpy", "node", "ctx/dropout"}


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        (..., EVERYTHING),
        (None, set()),
        (True, EVERYTHING),
        (False, set()),
        (nnx.Param, PARAMS),
        (KVParam, {"lora"}),
        (nnx.Variable, PARAMS | {"mean", "loss"}),
        (nnx.Node, {"node"}),
        (nnx.RngStream, {"ctx/dropout"}),
        (jax.Array, {"array"}),
        (np.ndarray, {"numpy"}),
        (object, EVERYTHING),
        ("params", PARAMS),
        ("kv_param", {"lora"}),
        ("losses", {"loss"}),
        ("batch_stats", {"mean"}),
        ("nodes", {"node"}),
        ("variables", PARAMS | {"mean", "loss"}),
        ("rngs", {"ctx/dropout"}),
        ("nothing_like_it", set()),
        (nnx.buffers, {"array", "numpy"}),
        ((nnx.Param, nnx.BatchStat), PARAMS | {"mean"}),
        (["losses", "batch_stats"], {"loss", "mean"}),
        ((), set()),
        (("losses", (nnx.Node, None)), {"loss", "node"}),
        (nnx.All(nnx.Param, nnx.PathGlob("encoder/**")), LEAVES),
        (nnx.All(), EVERYTHING),
        (nnx.Any(), set()),
        (nnx.Any("losses", nnx.buffers), {"loss", "array", "numpy"}),
        (nnx.Not(nnx.Param), EVERYTHING - PARAMS),
        (nnx.Not(...), set()),
        (nnx.Not(None), EVERYTHING),
        (nnx.Not((nnx.Param, nnx.buffers)), EVERYTHING - PARAMS - {"array", "numpy"}),
        (lambda path, node: path[-1] == "kernel", {"kernel", "encoder/0/kernel", "encoder/1/kernel"}),
        (lambda path, node: isinstance(node, nnx.Param) and node.value.shape == (3,), {"lora"}),
        (lambda path, node: 1, EVERYTHING),
        (lambda path, node: [], set()),
        (nnx.PathGlob("kernel"), {"kernel"}),
        (nnx.PathGlob("/kernel/"), {"kernel"}),
        (nnx.PathGlob("**/kernel"), {"kernel", "encoder/0/kernel", "encoder/1/kernel"}),
        (nnx.PathGlob("encoder/*/bias"), {"encoder/0/bias", "encoder/1/bias"}),
        (nnx.PathGlob("encoder/?/bias"), {"encoder/0/bias", "encoder/1/bias"}),
        (nnx.PathGlob("encoder/1/**"), {"encoder/1/kernel", "encoder/1/bias"}),
        (nnx.PathGlob("**"), EVERYTHING),
        (nnx.PathGlob("encoder"), set()),
        (nnx.PathGlob("*"), EVERYTHING - LEAVES - {"ctx/dropout"}),
        (nnx.PathGlob("**/**/bias"), {"encoder/0/bias", "encoder/1/bias"}),
        (nnx.PathGlob("k.rnel"), set()),
    ],
)
def test_what_a_filter_selects(filter, expected):
    assert selected(filter) == expected


def test_a_predicate_gets_the_path_and_the_node():
    seen = []
    Model().filter(lambda path, node: seen.append((path, node)))
    paths = [path for path, _ in seen]
    assert all(type(path) is tuple and all(type(part) is str for part in path) for path in paths)
    nodes = dict(seen)
    assert isinstance(nodes["encoder", "0", "kernel"], nnx.Param)
    assert isinstance(nodes["array",], jax.Array)
    assert isinstance(nodes["numpy",], np.ndarray)


def test_a_predicate_is_asked_each_time():
    """Its answer may depend on the value, so it is not kept with the schema."""
    model = Model()
    positive = functools.partial(
        lambda path, node, low: isinstance(node, nnx.Param) and float(node.value[0]) > low, low=0
    )
    assert ("kernel",) in model.filter(positive).paths
    model.kernel = -model.kernel
    assert ("kernel",) not in model.filter(positive).paths


def test_types_of_buffers_are_asked_each_time():
    model = Model()
    assert ("numpy",) in model.filter(np.ndarray).paths
    model.numpy = jnp.asarray(model.numpy)
    assert ("numpy",) not in model.filter(np.ndarray).paths
    assert ("numpy",) in model.filter(jax.Array).paths


def test_a_filter_that_raises_tells_its_own_error():
    def broken(path, node):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        Model().filter(broken)


def test_first_match_wins_across_kinds_of_filters():
    first, second, rest = Model().get_state().partition(nnx.PathGlob("**/kernel"), (KVParam, "params"), ...)
    assert {"/".join(path) for path in first.paths} == {"kernel", "encoder/0/kernel", "encoder/1/kernel"}
    assert {"/".join(path) for path in second.paths} == {"lora", "encoder/0/bias", "encoder/1/bias"}
    assert len(first) + len(second) + len(rest) == len(EVERYTHING)


@pytest.mark.parametrize("method", ["partition", "filter", "pop_state"])
def test_ellipsis_is_the_last_filter_or_none(method):
    with pytest.raises(
        nnx.FilterError,
        match=r"`\.\.\.` takes everything that is left, so it can only be the last one; it is number 1 of 2",
    ):
        getattr(Model(), method)(..., nnx.Param)


def test_ellipsis_inside_of_another_filter_is_fine():
    assert selected((nnx.Param, ...)) == EVERYTHING
    first, rest = Model().get_state().partition((nnx.Param, ...), ...)
    assert len(rest) == 0
    assert len(first) == len(EVERYTHING)


@pytest.mark.parametrize("like", [1, 1.5, {"params"}, {"a": nnx.Param}, object(), b"params"])
def test_what_is_no_filter_is_refused(like):
    with pytest.raises(
        nnx.FilterError, match=r"not a filter: .* A filter is a type, `\.\.\.`, None, a collection's name"
    ):
        Model().filter(like)


@pytest.mark.parametrize("like", ["encoder/kernel", "*", "encoder/**"])
def test_a_path_as_a_string_is_refused_with_the_fix(like):
    with pytest.raises(nnx.FilterError, match="to select by path, write nnx.PathGlob"):
        Model().filter(like)


@pytest.mark.parametrize("pattern", ["", None, 3, ("a", "b")])
def test_a_malformed_glob_is_refused(pattern):
    with pytest.raises(nnx.FilterError, match="PathGlob takes a pattern such as 'encoder"):
        nnx.PathGlob(pattern)


def test_not_takes_one_filter():
    with pytest.raises(TypeError):
        nnx.Not(nnx.Param, nnx.BatchStat)


def test_filters_compare_by_what_they_select():
    assert nnx.to_filter((nnx.Param, "losses")) == nnx.Any(nnx.Param, "losses")
    assert hash(nnx.to_filter((nnx.Param, "losses"))) == hash(nnx.Any(nnx.Param, "losses"))
    assert nnx.All(nnx.Param) != nnx.Any(nnx.Param)
    assert nnx.Not(nnx.Param) == nnx.Not(nnx.Param)
    assert nnx.PathGlob("a") != nnx.PathGlob("b")
    assert nnx.to_filter(nnx.to_filter(...)) == nnx.to_filter(...)
    assert nnx.to_filter("params") != nnx.to_filter(nnx.Param)


def test_predicates_compare_by_identity():
    def one(path, node):
        return True

    def other(path, node):
        return True

    assert nnx.to_filter(one) == nnx.to_filter(one)
    assert nnx.to_filter(one) != nnx.to_filter(other)
    assert nnx.to_filter(Model.filter) == nnx.to_filter(Model.filter)


@pytest.mark.parametrize(
    ("like", "text"),
    [
        (..., "..."),
        (None, "None"),
        (nnx.Param, "Param"),
        ("losses", "'losses'"),
        ((nnx.Param, ...), "Any(Param, ...)"),
        (nnx.Not(nnx.All(nnx.Param, nnx.PathGlob("a/*"))), "Not(All(Param, PathGlob('a/*')))"),
        (nnx.buffers, "buffers"),
    ],
)
def test_the_repr_is_what_one_would_write(like, text):
    assert repr(nnx.to_filter(like)) == text


def test_a_filter_is_a_predicate_itself():
    kernel = nnx.Param(jnp.ones(1))
    assert nnx.to_filter(nnx.Param)(("a",), kernel) is True
    assert nnx.Not("params")(("a",), kernel) is False
    assert nnx.buffers(("a",), jnp.ones(1)) is True
    assert nnx.buffers(("a",), kernel) is False
    assert nnx.to_filter(jax.Array)(("a",), jnp.ones(1)) is True
    assert nnx.to_filter(jax.Array)(("a",), kernel) is False


def test_a_collection_made_by_var_can_be_filtered_by_name():
    module = nnx.Module()
    module.x = nnx.var("energies", 1.0)
    module.y = nnx.Param(1.0)
    assert module.filter("energies").paths == (("x",),)
    energies, params = module.get_state().partition("energies", nnx.Param)
    assert (len(energies), len(params)) == (1, 1)


def test_filters_hold_inside_of_a_trace():
    @nnx.jit
    def count(model):
        arrays, rest = model.filter(jax.Array, nnx.Not(jax.Array))
        return len(arrays), len(model.filter(nnx.buffers)), len(rest)

    # Inside of a trace every buffer is a traced jax.Array.
    assert tuple(map(int, count(Model()))) == (2, 2, len(EVERYTHING) - 2)


def test_filters_hold_on_abstract_values():
    state = jax.eval_shape(lambda: Model().partition()[0])
    assert {"/".join(path) for path in state.filter(nnx.buffers).paths} == {"array", "numpy"}
    assert {"/".join(path) for path in state.filter(nnx.Param).paths} == PARAMS


# --- the algebra ---

_atoms = st.sampled_from(
    [..., None, nnx.Param, KVParam, nnx.Variable, "params", "losses", nnx.buffers, jax.Array, np.ndarray]
    + [nnx.PathGlob(pattern) for pattern in ("**/kernel", "encoder/**", "*")]
    + [lambda path, node: len(path) == 1, lambda path, node: "k" in path[-1]]
)
_filters = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(lambda items: nnx.Any(*items)),
        st.lists(inner, max_size=3).map(lambda items: nnx.All(*items)),
        inner.map(nnx.Not),
    ),
    max_leaves=5,
)
STATE = Model().get_state()


def chosen(filter):
    return set(STATE.filter(filter).paths)


@given(_filters, _filters)
def test_filters_are_sets(a, b):
    everything = set(STATE.paths)
    assert chosen(nnx.Any(a, b)) == chosen((a, b)) == chosen(a) | chosen(b)
    assert chosen(nnx.All(a, b)) == chosen(a) & chosen(b)
    assert chosen(nnx.Not(a)) == everything - chosen(a)


@given(_filters, _filters, _filters)
def test_filters_are_a_boolean_algebra(a, b, c):
    assert chosen(nnx.Not(nnx.Not(a))) == chosen(a)
    assert chosen(nnx.Not(nnx.Any(a, b))) == chosen(nnx.All(nnx.Not(a), nnx.Not(b)))
    assert chosen(nnx.All(a, nnx.Any(b, c))) == chosen(nnx.Any(nnx.All(a, b), nnx.All(a, c)))
    assert chosen(nnx.Any(a, None)) == chosen(nnx.All(a, ...)) == chosen(a)
    assert chosen(nnx.All(a, nnx.Not(a))) == set()
    assert chosen(nnx.Any(a, nnx.Not(a))) == set(STATE.paths)


@given(st.lists(_filters.filter(lambda item: item is not ...), max_size=4))
def test_a_partition_is_disjoint_complete_and_in_order(filters):
    groups = STATE.partition(*filters, ...)
    groups = (groups,) if isinstance(groups, nnx.State) else groups
    taken = set()
    for item, group in zip([*filters, ...], groups, strict=True):
        assert set(group.paths) == chosen(item) - taken
        assert list(group.paths) == [path for path in STATE.paths if path in set(group.paths)]
        taken |= set(group.paths)
    assert taken == set(STATE.paths)
    assert nnx.State().merge(*groups).schema is STATE.schema


@given(_filters)
def test_a_filter_answers_alike_from_the_schema_and_as_a_predicate(filter):
    item = nnx.to_filter(filter)
    assert chosen(filter) == {path for path, node in STATE.items() if item(path, node)}
    assert chosen(item) == chosen(filter)
