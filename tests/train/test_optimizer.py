"""Optimizer: updates a Module in place, the same eagerly, under `nnx.jit` and as TrainState does."""

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


@pytest.fixture
def model():
    return Net(ctx=nnx.context(0))


@pytest.fixture
def batch(rng):
    return rng.normal(size=(8, 3)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)


def loss_fn(model, x, y):
    return ((model(x, ctx=nnx.context(flags={"use_running_average": False})) - y) ** 2).mean()


def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_fn, wrt=optimizer.wrt)(model, x, y)
    optimizer.update(model, grads)
    return loss


def values(module):
    state = module.get_state()
    return {"/".join(path): np.asarray(value) for path, value in zip(state.paths, state.raw_values, strict=True)}


def test_eager_jit_and_train_state_agree(batch):
    tx = optax.adamw(1e-2)
    runs = []
    for step in (train_step, nnx.jit(train_step)):
        model = Net(ctx=nnx.context(0))
        optimizer = nnx.Optimizer(model, tx)
        losses = [float(step(model, optimizer, *batch)) for _ in range(10)]
        assert losses[-1] < losses[0]
        assert int(optimizer.step) == 10
        runs.append((values(model), values(optimizer)))
    (eager, eager_state), (jitted, jitted_state) = runs
    for path, value in eager.items():
        np.testing.assert_allclose(value, jitted[path], rtol=1e-5, atol=1e-6, err_msg=path)
    for path, value in eager_state.items():
        np.testing.assert_allclose(value, jitted_state[path], rtol=1e-5, atol=1e-6, err_msg=path)

    state = nnx.TrainState.from_module(Net(ctx=nnx.context(0)), tx)

    @jax.jit
    def functional(state, x, y):
        def loss(params):
            out, (updates, _) = state.apply(params, "batch_stats")(
                x, ctx=nnx.context(flags={"use_running_average": False})
            )
            return ((out - y) ** 2).mean(), updates.filter(nnx.BatchStat)

        grads, batch_stats = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads, batch_stats=batch_stats)

    for _ in range(10):
        state = functional(state, *batch)
    for path, value in values(state.merge()).items():
        np.testing.assert_allclose(value, jitted[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_step_compiles_once(model, batch):
    traces = []

    @nnx.jit
    def step(model, optimizer, x, y):
        traces.append(1)
        return train_step(model, optimizer, x, y)

    optimizer = nnx.Optimizer(model, optax.adam(1e-2))
    before = values(model)
    for _ in range(4):
        step(model, optimizer, *batch)
    assert len(traces) == 1
    assert all(not np.array_equal(value, before[path]) for path, value in values(model).items())


def test_an_equal_pair_made_with_the_same_tx_compiles_nothing_anew(batch):
    traces, tx = [], optax.adam(1e-2)

    @nnx.jit
    def step(model, optimizer, x, y):
        traces.append(1)
        return train_step(model, optimizer, x, y)

    for seed in range(3):
        model = Net(ctx=nnx.context(seed))
        step(model, nnx.Optimizer(model, tx), *batch)
    assert len(traces) == 1


def test_its_state_lies_in_variables_at_readable_paths(model):
    optimizer = nnx.Optimizer(model, optax.adam(1e-2))
    paths = {"/".join(path) for path in optimizer.filter(nnx.OptState).paths}
    assert paths >= {"step", "opt_state/0/count", "opt_state/0/mu/first/kernel", "opt_state/0/nu/second/bias"}
    assert len(paths) == 2 + 2 * 6
    assert len(optimizer.filter(nnx.Param)) == 0
    assert optimizer.step.dtype == jnp.int32


def test_it_holds_no_reference_to_the_model(model):
    optimizer = nnx.Optimizer(model, optax.sgd(0.1))
    found = []
    optimizer.for_each(nnx.Module, found.append)
    assert not any(isinstance(item, (Net, nnx.Linear)) for item in found)


def test_wrt_freezes_the_rest(model, batch):
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.PathGlob("second/*"))
    assert len(optimizer.filter(nnx.OptState)) == 2 + 2 * 2
    before = values(model)
    for step in (train_step, nnx.jit(train_step)):
        step(model, optimizer, *batch)
    after = values(model)
    for path in model.filter(nnx.Param).paths:
        same = np.array_equal(before["/".join(path)], after["/".join(path)])
        assert same == (path[0] != "second"), path


def test_parameter_names_may_be_those_of_methods_or_private(batch):
    class Odd(nnx.Module):
        def __init__(self):
            self._w = nnx.Param(jnp.ones((3, 2)))
            self.keys = nnx.Param(jnp.zeros(2))

        def __call__(self, x):
            return x @ self._w + self.keys[None]

    model = Odd()
    optimizer = nnx.Optimizer(model, optax.adam(0.1))
    grads = nnx.grad(lambda model: ((model(batch[0]) - batch[1]) ** 2).mean())(model)
    optimizer.update(model, grads)
    assert int(optimizer.step) == 1
    assert not np.array_equal(model._w, np.ones((3, 2)))


def test_line_search(batch):
    x, y = batch
    model = nnx.Linear(3, 2, ctx=nnx.context(0))
    optimizer = nnx.Optimizer(model, optax.lbfgs())
    _, moduledef = model.partition()

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda model: ((model(x) - y) ** 2).mean())(model)
        value_fn = lambda params: ((moduledef.apply(params)(x)[0] - y) ** 2).mean()  # noqa: E731
        optimizer.update(model, grads, value=value, grad=grads, value_fn=value_fn)

    for _ in range(15):
        step(model, optimizer)
    solution = np.linalg.lstsq(np.c_[x, np.ones(8)], y, rcond=None)[0]
    np.testing.assert_allclose(model.kernel, solution[:3], atol=1e-3)


def test_what_does_not_fit_is_refused(model, batch):
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.PathGlob("second/*"))
    grads = nnx.grad(loss_fn)(model, *batch)
    before = values(optimizer)
    with pytest.raises(nnx.StructureError, match=r"gradients for `first/bias`.* not updated.*same `wrt`"):
        optimizer.update(model, grads)
    with pytest.raises(nnx.StructureError, match="no gradient for `second/bias`"):
        optimizer.update(model, grads.filter(nnx.PathGlob("second/kernel")))
    with pytest.raises(TypeError, match=r"takes the Module first, got State"):
        optimizer.update(grads, model)
    with pytest.raises(TypeError, match=r"takes the gradients as a State, got Net"):
        optimizer.update(model, model)
    for path, value in values(optimizer).items():
        np.testing.assert_array_equal(value, before[path])
    with pytest.raises(nnx.StructureError, match="selects nothing of this Net"):
        nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Cache)
    with pytest.raises(TypeError, match="takes a Module first"):
        nnx.Optimizer(optax.sgd(0.1), model)
    with pytest.raises(TypeError, match="call it first"):
        nnx.Optimizer(model, optax.adam)


def test_a_changed_model_is_noticed(model, batch):
    optimizer = nnx.Optimizer(model, optax.adam(1e-2))
    model.third = nnx.Linear(2, 2, ctx=nnx.context(1))
    grads = nnx.grad(loss_fn)(model, *batch)
    with pytest.raises(nnx.StructureError, match=r"new: `third/bias`, `third/kernel`.*Make a new Optimizer"):
        optimizer.update(model, grads)
