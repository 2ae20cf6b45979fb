"""optax with both twins: every kind of transformation does what it does to a dict of arrays, in one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx


class Net(nnx.Module):
    def __init__(self, *, ctx: nnx.Context):
        self.first = nnx.Linear(3, 4, ctx=ctx)
        self.second = nnx.Linear(4, 2, ctx=ctx)

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


@pytest.fixture
def model():
    return Net(ctx=nnx.context(0))


@pytest.fixture
def batch(rng):
    return rng.normal(size=(8, 3)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)


def loss_fn(model, x, y):
    return ((model(x) - y) ** 2).mean()


def arrays(state):
    return {"/".join(path): value for path, value in zip(state.paths, state.raw_values, strict=True)}


def labels(params):
    return {path: "kernels" if path.endswith("kernel") else "rest" for path in params}


TRANSFORMATIONS = {
    "masked by function": lambda: optax.masked(optax.adam(1e-2), lambda params: {p: "first" in p for p in params}),
    "masked by dict": lambda: optax.masked(
        optax.sgd(1e-2, momentum=0.9),
        {"first/kernel": True, "first/bias": False, "second/kernel": True, "second/bias": False},
    ),
    "partition by function": lambda: optax.partition({"kernels": optax.adam(1e-2), "rest": optax.sgd(0.1)}, labels),
    "partition by dict": lambda: optax.partition(
        {"kernels": optax.adam(1e-2), "rest": optax.set_to_zero()},
        labels(["first/kernel", "first/bias", "second/kernel", "second/bias"]),
    ),
    "multi_transform": lambda: optax.transforms.partition(
        {"kernels": optax.adamw(1e-2), "rest": optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()}, labels
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(0.1, 0, 5)),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2, warmup_steps=2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.scale_by_adam(), optax.scale(-1e-2)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_both_twins_do_what_optax_does_to_arrays(model, batch, name):
    tx = TRANSFORMATIONS[name]()
    state = nnx.TrainState.from_module(model, tx)
    optimizer = nnx.Optimizer(model, tx)
    params = arrays(state.params)
    opt_state, moduledef = tx.init(params), model.get_module_def()
    like = state.params

    def by_arrays(params, x, y):
        return loss_fn(moduledef.merge(like.replace_values([params["/".join(path)] for path in like.paths])), x, y)

    @jax.jit
    def by_hand(params, opt_state, x, y):
        updates, opt_state = tx.update(jax.grad(by_arrays)(params, x, y), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @nnx.testing.counted
    def lifted(model, optimizer, x, y):
        optimizer.update(model, nnx.grad(loss_fn)(model, x, y))

    @nnx.testing.counted
    def functional(state, x, y):
        return state.apply_gradients(jax.grad(lambda params: loss_fn(state.merge(params), x, y))(state.params))

    steps = nnx.jit(lifted), jax.jit(functional)
    with nnx.testing.assert_traces(lifted, 1), nnx.testing.assert_traces(functional, 1):
        for _ in range(4):
            params, opt_state = by_hand(params, opt_state, *batch)
            steps[0](model, optimizer, *batch)
            state = steps[1](state, *batch)
    for found in (arrays(model.filter(nnx.Param)), arrays(state.params)):
        for path, value in params.items():
            np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
    for wanted, found in zip(jax.tree.leaves(opt_state), jax.tree.leaves(state.opt_state), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert int(optimizer.step) == int(state.step) == 4


def test_line_search_of_both_twins(model, batch):
    tx, x, y = optax.lbfgs(), *batch
    state, optimizer, moduledef = nnx.TrainState.from_module(model, tx), nnx.Optimizer(model, tx), model.partition()[1]

    def value_fn(params):
        return loss_fn(moduledef.merge(params), x, y)

    @nnx.jit
    def lifted(model, optimizer):
        value, grads = nnx.value_and_grad(loss_fn)(model, x, y)
        optimizer.update(model, grads, value=value, grad=grads, value_fn=value_fn)
        return value

    @jax.jit
    def functional(state):
        value, grads = optax.value_and_grad_from_state(lambda arrays: value_fn(back(arrays)))(
            arrays(state.params), state=state.opt_state
        )
        grads = back(grads)
        return state.apply_gradients(grads, tx_args={"value": value, "grad": grads, "value_fn": value_fn})

    def back(by_path):
        return state.params.replace_values([by_path["/".join(path)] for path in state.params.paths])

    losses = [float(lifted(model, optimizer)) for _ in range(6)]
    new = state
    for _ in range(6):
        new = functional(new)
    assert losses[-1] < 0.5 * losses[0]
    for path, value in arrays(model.filter(nnx.Param)).items():
        np.testing.assert_allclose(arrays(new.params)[path], value, rtol=1e-3, atol=1e-4)


def test_parameters_to_evaluate_of_a_schedule_free_optimizer(model, batch):
    tx = optax.contrib.schedule_free_sgd(0.1)
    optimizer, state = nnx.Optimizer(model, tx), nnx.TrainState.from_module(model, tx)
    for _ in range(3):
        grads = nnx.grad(loss_fn)(model, *batch)
        optimizer.update(model, grads)
        state = state.apply_gradients(grads)
    wanted = optax.contrib.schedule_free_eval_params(state.opt_state, arrays(state.params))
    one = optimizer.params_by(optax.contrib.schedule_free_eval_params, model)
    two = state.params_by(optax.contrib.schedule_free_eval_params)
    assert one.schema is two.schema is state.params.schema
    for path, value in wanted.items():
        np.testing.assert_allclose(arrays(one)[path], value, rtol=1e-6)
        np.testing.assert_allclose(arrays(two)[path], value, rtol=1e-6)
    assert not np.allclose(arrays(one)["first/kernel"], model.first.kernel)


def test_a_hyperparameter_can_be_changed_between_steps(model, batch):
    optimizer = nnx.Optimizer(model, optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))

    @nnx.testing.counted
    def body(model, optimizer, x, y):
        optimizer.update(model, nnx.grad(loss_fn)(model, x, y))

    step = nnx.jit(body)
    with nnx.testing.assert_traces(body, 1):
        step(model, optimizer, *batch)
        np.testing.assert_allclose(optimizer.opt_state.hyperparams.learning_rate, 0.1)
        optimizer.opt_state.hyperparams.learning_rate = jnp.float32(0.0)
        before = model.first.kernel
        step(model, optimizer, *batch)
    np.testing.assert_array_equal(before, model.first.kernel)


@pytest.mark.parametrize("wrt", [nnx.PathGlob("second/*"), nnx.All(nnx.Param, lambda path, _: path[0] == "second")])
def test_what_is_frozen_takes_neither_gradient_nor_memory(model, batch, wrt):
    tx = optax.adam(1e-2)
    optimizer, state = nnx.Optimizer(model, tx, wrt=wrt), nnx.TrainState.from_module(model, tx, wrt=wrt)
    trained = 4 * 2 + 2
    for moments in (optimizer.filter(nnx.OptState), state.opt_state):
        assert sum(leaf.size for leaf in jax.tree.leaves(moments) if leaf.ndim) == 2 * trained
    frozen = model.first.kernel

    @nnx.jit
    def lifted(model, optimizer, x, y):
        grads = nnx.grad(loss_fn, wrt=wrt)(model, x, y)
        assert grads.paths == (("second", "bias"), ("second", "kernel"))
        optimizer.update(model, grads)

    @jax.jit
    def functional(state, x, y):
        grads = jax.grad(lambda params: loss_fn(state.merge(params, "frozen"), x, y))(state.params)
        return state.apply_gradients(grads)

    for _ in range(2):
        lifted(model, optimizer, *batch)
        state = functional(state, *batch)
    assert model.first.kernel is frozen
    np.testing.assert_array_equal(state.merge().first.kernel, frozen)
    np.testing.assert_allclose(state.merge().second.kernel, model.second.kernel, rtol=1e-6)


def test_tied_parameters_have_one_slot_and_the_sum_of_their_gradients(batch):
    class Tied(nnx.Module):
        def __init__(self, *, ctx):
            self.a = nnx.Linear(3, 3, use_bias=False, ctx=ctx)
            self.b = nnx.Linear(3, 3, use_bias=False, ctx=ctx)
            self.b.kernel = self.a.get_variable("kernel")

        def __call__(self, x):
            return self.b(self.a(x))

    model, x = Tied(ctx=nnx.context(0)), batch[0]
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9))
    kernel = model.a.kernel
    assert [path for path in optimizer.filter(nnx.OptState).paths if "kernel" in path] == [
        ("opt_state", "0", "trace", "a", "kernel")
    ]
    loss = lambda model, x: (model(x) ** 2).mean()  # noqa: E731
    step = nnx.jit(lambda model, optimizer, x: optimizer.update(model, nnx.grad(loss)(model, x)))
    step(model, optimizer, x)
    gradient = jax.grad(lambda w: ((x @ w @ w) ** 2).mean())(kernel)
    np.testing.assert_allclose(model.a.kernel, kernel - 0.1 * gradient, rtol=1e-5, atol=1e-6)
    assert model.a.get_variable("kernel") is model.b.get_variable("kernel")


def test_donated_steps_are_the_same_steps(batch):
    tx, runs = optax.adamw(1e-2), []
    for donate in ((), (0, 1)):
        model = Net(ctx=nnx.context(0))
        optimizer = nnx.Optimizer(model, tx)
        step = nnx.jit(
            lambda model, optimizer, x, y: optimizer.update(model, nnx.grad(loss_fn)(model, x, y)),
            donate_argnums=donate,
        )
        old = model.first.kernel, optimizer.opt_state.filter(nnx.PathGlob("0/mu/first/kernel")).raw_values[0]
        for _ in range(3):
            step(model, optimizer, *batch)
        assert [array.is_deleted() for array in old] == [bool(donate)] * 2
        runs.append({**arrays(model.get_state()), **arrays(optimizer.get_state())})
    for path, value in runs[0].items():
        np.testing.assert_array_equal(value, runs[1][path], err_msg=path)


class Regularised(nnx.Module):
    def __init__(self, *, ctx: nnx.Context):
        self.first = nnx.Linear(3, 6, ctx=ctx)
        self.norm = nnx.BatchNorm(6, momentum=0.5, ctx=ctx)
        self.dropout = nnx.Dropout(0.5)
        self.second = nnx.Linear(6, 2, ctx=ctx)

    def __call__(self, x, *, ctx):
        return self.second(self.dropout(self.norm(nnx.relu(self.first(x)), ctx=ctx), ctx=ctx))


def test_accumulated_gradients_with_batch_norm_and_dropout(rng):
    """Each small batch has its own mask and adds to the running averages; the parameters move by the mean gradient."""
    xs, ys = rng.normal(size=(6, 8, 3)).astype(np.float32), rng.normal(size=(6, 8, 2)).astype(np.float32)
    small = optax.sgd(0.1, momentum=0.9)
    flags = {"use_running_average": False, "deterministic": False}

    def loss(model, x, y, ctx):
        return ((model(x, ctx=ctx) - y) ** 2).mean()

    accumulating, ctx = Regularised(ctx=nnx.context(0)), nnx.context(dropout=1, flags=flags)
    optimizer = nnx.Optimizer(accumulating, optax.MultiSteps(small, every_k_schedule=3))

    @nnx.jit
    def step(model, optimizer, x, y, ctx):
        optimizer.update(model, nnx.grad(loss)(model, x, y, ctx))

    state = nnx.TrainState.from_module(Regularised(ctx=nnx.context(0)), optax.MultiSteps(small, every_k_schedule=3))

    @jax.jit
    def functional(state, x, y, key):
        def loss(params):
            ctx = nnx.context(dropout=key, flags=flags)
            out, (updates, _) = state.apply(params, "batch_stats")(x, ctx=ctx)
            return ((out - y) ** 2).mean(), updates.filter(nnx.BatchStat)

        grads, stats = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads, batch_stats=stats)

    whole, whole_ctx = Regularised(ctx=nnx.context(0)), nnx.context(dropout=1, flags=flags)
    whole_optimizer = nnx.Optimizer(whole, small)
    gradient = nnx.jit(nnx.grad(loss))
    for number in range(2):
        before, stats = accumulating.first.kernel, accumulating.norm.mean
        collected = []
        for i in range(3 * number, 3 * number + 3):
            np.testing.assert_array_equal(accumulating.first.kernel, before)
            step(accumulating, optimizer, xs[i], ys[i], ctx)
            assert not np.array_equal(accumulating.norm.mean, stats)
            stats = accumulating.norm.mean
            state = functional(state, xs[i], ys[i], jax.random.key(i))
            collected.append(gradient(whole, xs[i], ys[i], whole_ctx))
        assert not np.array_equal(accumulating.first.kernel, before)
        whole_optimizer.update(whole, jax.tree.map(lambda *grads: sum(grads) / 3, *collected))
        for path, value in arrays(whole.get_state()).items():
            np.testing.assert_allclose(
                arrays(accumulating.get_state())[path], value, rtol=1e-4, atol=1e-5, err_msg=path
            )
    # Other masks there, so other gradients; the same number of updates, and the same order of magnitude.
    assert int(state.step) == 6
    assert int(state.opt_state.gradient_step) == 2
    moved = np.abs(state.params["first", "kernel"].value - Regularised(ctx=nnx.context(0)).first.kernel).max()
    assert 1e-4 < moved < 1.0


def test_a_repeated_small_batch_gets_other_masks(rng):
    model, ctx = Regularised(ctx=nnx.context(0)), nnx.context(dropout=1, flags={"deterministic": False})
    optimizer = nnx.Optimizer(model, optax.MultiSteps(optax.sgd(0.1), every_k_schedule=4))
    x = rng.normal(size=(2, 3)).astype(np.float32)

    @nnx.jit
    def step(model, optimizer, x, ctx):
        def loss(model, ctx):
            hidden = model.dropout(jnp.ones((2, 6)), ctx=ctx)
            return (model.first(x) * hidden).sum(), hidden

        grads, hidden = nnx.grad(loss, has_aux=True)(model, ctx)
        optimizer.update(model, grads)
        return hidden

    masks = [np.asarray(step(model, optimizer, x, ctx)) for _ in range(4)]
    assert len({mask.tobytes() for mask in masks}) == 4
