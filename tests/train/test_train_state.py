"""TrainState: a pytree that steps under raw `jax.jit`, knows its States by name, and refuses what does not fit."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx


class Net(nnx.Module):
    def __init__(self, *, ctx: nnx.Context):
        self.first = nnx.Linear(3, 4, ctx=ctx)
        self.norm = nnx.BatchNorm(4, ctx=ctx)
        self.second = nnx.Linear(4, 2, ctx=ctx)

    def __call__(self, x, *, ctx):
        return self.second(self.norm(nnx.relu(self.first(x)), ctx=ctx))

    def half(self, x):
        return self.first(x)


TRAIN = {"use_running_average": False}
TX = optax.adam(1e-2)


@pytest.fixture
def model():
    return Net(ctx=nnx.context(0))


@pytest.fixture
def state(model):
    (params, batch_stats), moduledef = model.partition(nnx.Param, nnx.BatchStat)
    return nnx.TrainState(moduledef, params=params, tx=TX, batch_stats=batch_stats)


@pytest.fixture
def batch(rng):
    return rng.normal(size=(8, 3)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)


def loss_and_updates(state, params, x, y):
    out, (updates, _) = state.apply(params, "batch_stats")(x, ctx=nnx.context(flags=TRAIN))
    return ((out - y) ** 2).mean(), updates.filter(nnx.BatchStat)


def train_step(state, x, y):
    grads, batch_stats = jax.grad(lambda p: loss_and_updates(state, p, x, y), has_aux=True)(state.params)
    return state.apply_gradients(grads, batch_stats=batch_stats)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype, path
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def test_training_lowers_the_loss_and_equals_optax_by_hand(state, batch):
    step = jax.jit(train_step)
    params = {
        "/".join(path): value for path, value in zip(state.params.paths, jax.tree.leaves(state.params), strict=True)
    }
    opt_state, stats, by_hand = TX.init(params), state.batch_stats, state.params
    first = loss_and_updates(state, state.params, *batch)[0]
    gradients = jax.jit(jax.grad(lambda p, state: loss_and_updates(state, p, *batch), has_aux=True))
    for _ in range(20):
        grads, stats = gradients(by_hand, state.replace(batch_stats=stats))
        flat = {"/".join(path): g for path, g in zip(grads.paths, jax.tree.leaves(grads), strict=True)}
        updates, opt_state = TX.update(flat, opt_state, params)
        params = optax.apply_updates(params, updates)
        by_hand = by_hand.replace_values([params["/".join(path)] for path in by_hand.paths])
        state = step(state, *batch)
    assert loss_and_updates(state, state.params, *batch)[0] < first / 2
    assert state.step == 20
    for path in state.params.paths:
        np.testing.assert_allclose(state.params[path].value, params["/".join(path)], rtol=1e-5, atol=1e-6)


def test_a_step_compiles_once_and_takes_donation(state, batch):
    traces = []

    def step(state, x, y):
        traces.append(1)
        return train_step(state, x, y)

    donated = jax.jit(step, donate_argnums=0)
    kept = jax.jit(train_step)
    other = jax.tree.map(jnp.copy, state)
    for _ in range(4):
        before = state
        state, other = donated(state, *batch), kept(other, *batch)
    assert len(traces) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert_equal(state, other)


def test_partition_of_the_optimizer_by_labels(model, batch):
    tx = optax.partition(
        {"train": optax.adam(1e-2), "freeze": optax.set_to_zero()},
        lambda params: {path: "train" if path.startswith("second/") else "freeze" for path in params},
    )
    before = nnx.TrainState.from_module(model, tx)
    after = jax.jit(train_step)(before, *batch)
    for path in before.params.paths:
        same = np.array_equal(before.params[path].value, after.params[path].value)
        assert same == (path[0] != "second"), path


def test_line_search_takes_a_value_function_of_states(batch):
    x, y = batch
    model = nnx.Linear(3, 2, ctx=nnx.context(0))
    state = nnx.TrainState.from_module(model, optax.lbfgs())

    @jax.jit
    def step(state):
        def loss(params):
            return ((state.apply(params)(x)[0] - y) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads, tx_args={"value": value, "grad": grads, "value_fn": loss})

    for _ in range(15):
        state = step(state)
    solution = np.linalg.lstsq(np.c_[x, np.ones(8)], y, rcond=None)[0]
    np.testing.assert_allclose(state.merge().kernel, solution[:3], atol=1e-3)


def test_apply_takes_names_states_methods_and_submodules(state, batch):
    x, ctx = batch[0], nnx.context(flags={"use_running_average": True})
    out, (new, moduledef) = state.apply("params", "batch_stats")(x, ctx=ctx)
    assert moduledef == state.moduledef
    assert isinstance(new, nnx.State)
    for caller in (
        state.apply(),
        state.apply(state.params, "batch_stats"),
        state.apply(state.params | state.batch_stats),
    ):
        np.testing.assert_array_equal(caller(x, ctx=ctx)[0], out)
    np.testing.assert_array_equal(state.apply().half(x)[0], state.merge().first(x))
    np.testing.assert_array_equal(state.apply().first(x)[0], state.merge().first(x))


def test_merge_gives_the_model_of_the_state(state, model):
    merged = state.merge()
    assert isinstance(merged, Net)
    assert_equal(merged.get_state(), model.get_state())


def test_from_module_sorts_states_by_collection(model):
    state = nnx.TrainState.from_module(model, TX)
    assert state.batch_stats.paths == model.filter(nnx.BatchStat).paths
    model.table = jnp.arange(3)
    model.counter = nnx.var("counts", 0)
    state = nnx.TrainState.from_module(model, TX, wrt=nnx.PathGlob("second/*"), step=7)
    assert state.step == 7
    assert set(dir(state)) >= {"batch_stats", "buffers", "counts", "frozen", "params"}
    assert state.frozen.paths == (*model.filter(nnx.PathGlob("first/*")).paths, ("norm", "bias"), ("norm", "scale"))
    assert len(jax.tree.leaves(state.opt_state)) == 1 + 2 * 2
    assert_equal(state.merge().get_state(), model.get_state())


def test_tied_parameters_have_one_slot(batch):
    class Tied(nnx.Module):
        def __init__(self, *, ctx):
            self.a = nnx.Linear(3, 3, use_bias=False, ctx=ctx)
            self.b = nnx.Linear(3, 3, use_bias=False, ctx=ctx)
            self.b.kernel = self.a.get_variable("kernel")

        def __call__(self, x):
            return self.b(self.a(x))

    state = nnx.TrainState.from_module(Tied(ctx=nnx.context(0)), optax.adam(1e-2))
    assert list(state.opt_state[0].mu) == ["a/kernel"]
    grads = jax.grad(lambda p: (state.apply(p)(batch[0])[0] ** 2).sum())(state.params)
    model = state.apply_gradients(grads).merge()
    assert model.a.get_variable("kernel") is model.b.get_variable("kernel")


def test_it_is_a_pytree_with_keys(state):
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert {
        ".params['first/kernel']",
        ".opt_state[0].mu['first/kernel']",
        ".step",
        ".batch_stats['norm/mean']",
    } <= paths
    leaves, treedef = jax.tree.flatten(state)
    assert_equal(jax.tree.unflatten(treedef, leaves), state)
    abstract = jax.eval_shape(lambda: state)
    assert isinstance(abstract.params["first/kernel"].value, jax.ShapeDtypeStruct)
    assert jax.tree.structure(abstract) == treedef
    assert_equal(copy.copy(state), state)


def test_the_order_of_further_states_does_not_matter(model):
    params, moduledef = nnx.Linear(2, 2, ctx=nnx.context(0)).partition(nnx.Param)
    one = nnx.TrainState(moduledef, params=params, tx=TX, a=jnp.zeros(1), b=jnp.ones(1))
    two = nnx.TrainState(moduledef, params=params, tx=TX, b=jnp.ones(1), a=jnp.zeros(1))
    assert_equal(one, two)


def test_the_step_is_an_int32_array(state):
    assert state.step.dtype == jnp.int32
    assert state.step.weak_type is False
    assert state.replace(step=np.int64(5)).step.dtype == jnp.int32
    assert int(state.replace(step=jnp.uint32(5)).step) == 5


def test_replace(state):
    changed = state.replace(step=3, batch_stats=jax.tree.map(jnp.zeros_like, state.batch_stats))
    assert (int(changed.step), int(state.step)) == (3, 0)
    assert float(jnp.sum(changed.batch_stats["norm/var"].value)) == 0.0
    other = optax.sgd(1e-2)
    with pytest.raises(nnx.StructureError, match="give `opt_state=` as well"):
        state.replace(tx=other)
    assert state.replace(tx=other, opt_state=other.init({})).tx is other
    with pytest.raises(nnx.StructureError, match=r"it lacks `second/bias`.*give `opt_state=` as well"):
        state.replace(params=state.params.filter(nnx.Not(nnx.PathGlob("second/bias"))))
    with pytest.raises(nnx.StructureError, match=r"no state named `batch_stat`; did you mean `batch_stats`"):
        state.replace(batch_stat=1)
    with pytest.raises(TypeError, match="params must be a State"):
        state.replace(params={}, opt_state=())


def test_it_is_immutable(state):
    with pytest.raises(AttributeError, match=r"write `state = state.replace\(step=...\)`"):
        state.step = 1
    with pytest.raises(AttributeError, match="immutable"):
        del state.step
    with pytest.raises(AttributeError, match=r"no attribute `batch_stat`; did you mean `batch_stats`"):
        state.batch_stat


def test_unknown_names_are_listed(state):
    with pytest.raises(
        nnx.StructureError, match=r"no state named `param`; did you mean `params`.*`batch_stats`, `params`"
    ):
        state.apply("param")
    with pytest.raises(nnx.StructureError, match=r"TrainState.merge: no state named `opt_state`"):
        state.merge("params", "opt_state")
    with pytest.raises(TypeError, match="takes States and names of States; got a dict"):
        state.apply({})
    with pytest.raises(nnx.StructureError, match=r"no state named `batch_stat`; did you mean `batch_stats`"):
        state.apply_gradients(state.params, batch_stat=state.batch_stats)


def test_gradients_must_belong_to_the_parameters(state):
    part = state.params.filter(nnx.Not(nnx.PathGlob("first/*")))
    with pytest.raises(nnx.StructureError, match="no gradient for `first/bias`, `first/kernel`"):
        state.apply_gradients(part)
    with pytest.raises(nnx.StructureError, match="gradients for `norm/mean`, `norm/var`, which are not updated"):
        state.apply_gradients(state.params | state.batch_stats)
    with pytest.raises(TypeError, match="takes the gradients as a State, got dict"):
        state.apply_gradients({})
    wrong = state.params.map(lambda path, value: value[:1] if path == ("first", "bias") else value)
    with pytest.raises(nnx.StructureError, match=r"`first/bias` \(1,\) for a parameter of \(4,\)"):
        state.apply_gradients(wrong)


def test_a_new_state_must_have_the_paths_of_the_old(state):
    with pytest.raises(nnx.StructureError, match=r"new `batch_stats` has other paths.*it has `first/bias`"):
        state.apply_gradients(state.params, batch_stats=state.params | state.batch_stats)


def test_bad_constructions_are_refused(state, model):
    with pytest.raises(TypeError, match="takes a ModuleDef first, got Net"):
        nnx.TrainState(model, params=state.params, tx=TX)
    with pytest.raises(TypeError, match="params must be a State, got dict"):
        nnx.TrainState(state.moduledef, params={}, tx=TX)
    with pytest.raises(TypeError, match=r"call it first: `optax.adam\(1e-3\)`"):
        nnx.TrainState(state.moduledef, params=state.params, tx=optax.adam)
    with pytest.raises(TypeError, match="the name `apply` is taken"):
        nnx.TrainState(state.moduledef, params=state.params, tx=TX, apply=state.batch_stats)
    with pytest.raises(TypeError, match="`ema` is a Net, a Module"):
        nnx.TrainState(state.moduledef, params=state.params, tx=TX, ema=model)
    with pytest.raises(nnx.StructureError, match="selects nothing of this Net: there are: `first/bias`"):
        nnx.TrainState.from_module(model, TX, wrt=nnx.Cache)
    with pytest.raises(TypeError, match="takes a Module, got State"):
        nnx.TrainState.from_module(state.params, TX)


def test_repr_is_short(state):
    assert repr(state).startswith("TrainState(step=0, params=State[6 arrays, 34 values], batch_stats=")
