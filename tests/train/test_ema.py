"""EMA: the averages of the formula, once for each parameter, and the way into a model and back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx


class Net(nnx.Module):
    def __init__(self, *, ctx: nnx.Context, dtype=jnp.float32):
        self.first = nnx.Linear(2, 3, param_dtype=dtype, ctx=ctx)
        self.norm = nnx.BatchNorm(3, ctx=ctx)
        self.second = nnx.Linear(3, 2, param_dtype=dtype, ctx=ctx)

    def __call__(self, x):
        return self.second(self.norm(self.first(x), use_running_average=True))


@pytest.fixture
def model():
    return Net(ctx=nnx.context(0))


def drift(model):
    """A training step that needs no optimizer."""
    state = model.filter(nnx.Param)
    model.update_state(state.map(lambda path, value: (value * 1.5 + 0.25).astype(value.dtype)))


def values(state):
    return {"/".join(path): np.asarray(value) for path, value in zip(state.paths, state.raw_values, strict=True)}


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("debias", [True, False])
def test_the_average_is_that_of_the_formula(model, wrap, debias):
    ema = nnx.EMA(model, 0.9, debias=debias)

    @wrap
    def step(model, ema):
        drift(model)
        ema.update(model)

    average, weight = values(model.filter(nnx.Param)), 1.0
    if debias:
        average, weight = {path: np.zeros_like(value) for path, value in average.items()}, 0.0
    for number in range(1, 6):
        step(model, ema)
        now = values(model.filter(nnx.Param))
        average = {path: 0.9 * value + 0.1 * now[path] for path, value in average.items()}
        weight = 0.9 * weight + 0.1
        out = values(ema.state(model))
        assert out.keys() == average.keys()
        for path, value in average.items():
            np.testing.assert_allclose(out[path], value / weight, rtol=1e-5, atol=1e-6)
        assert int(ema.step) == number


def test_before_the_first_update_it_is_the_model(model):
    for debias in (True, False):
        out = values(nnx.EMA(model, debias=debias).state(model))
        for path, value in values(model.filter(nnx.Param)).items():
            np.testing.assert_array_equal(out[path], value)


def test_a_decay_by_step(model):
    ema = nnx.EMA(model, lambda step: jnp.where(step < 1, 0.0, 0.5), debias=False)
    seen = []
    for _ in range(2):
        drift(model)
        ema.update(model)
        seen.append(np.asarray(model.first.kernel))
    np.testing.assert_allclose(ema.averaged(model).first.kernel, (seen[0] + seen[1]) / 2, rtol=1e-6)


def test_a_slow_average_moves_although_the_parameters_are_half_precision():
    model = Net(ctx=nnx.context(0), dtype=jnp.bfloat16)
    model.first.bias = jnp.ones(3, jnp.bfloat16)
    ema = nnx.EMA(model, 0.999, debias=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(ema.average.filter(nnx.EMAState))} == {jnp.dtype(jnp.float32)}
    model.first.bias = jnp.full(3, 2, jnp.bfloat16)
    update = nnx.jit(lambda model, ema: ema.update(model))
    for _ in range(100):
        update(model, ema)
    np.testing.assert_allclose(ema.average.first.bias, 2 - 0.999**100, rtol=1e-5)
    assert ema.state(model)["first", "bias"].value.dtype == jnp.bfloat16
    assert ema.averaged(model).first.bias.dtype == jnp.bfloat16


def test_swapped_in_for_evaluation(model):
    ema = nnx.EMA(model, 0.5)
    for _ in range(2):
        drift(model)
        ema.update(model)
    before, average = model.get_state(), ema.state(model)
    evaluate, x = nnx.jit(lambda model, x: model(x)), jnp.ones((1, 2))
    own = evaluate(model, x)
    with ema.swapped_into(model) as same:
        assert same is model
        assert model.first.kernel is average["first", "kernel"].value
        averaged = evaluate(model, x)
        model.norm.mean = model.norm.mean + 1
    assert not np.allclose(own, averaged)
    for path in model.filter(nnx.Param).paths:
        assert model.get_state()[path].value is before[path].value
    np.testing.assert_array_equal(model.norm.mean, np.ones(3))
    model.norm.mean = jnp.zeros(3)
    np.testing.assert_allclose(ema.averaged(model)(x), averaged, rtol=1e-6)

    def fail():
        with ema.swapped_into(model):
            model.first.kernel = jnp.zeros((2, 3))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.first.kernel is before["first", "kernel"].value
    ema.copy_to(model)
    np.testing.assert_array_equal(model.first.kernel, average["first", "kernel"].value)
    assert model.first.kernel is not average["first", "kernel"].value


def test_swapping_inside_of_a_compiled_function_returns_no_parameter(model):
    ema = nnx.EMA(model, 0.5)
    drift(model)
    ema.update(model)
    before = model.first.kernel

    @nnx.jit
    def evaluate(model, ema, x):
        with ema.swapped_into(model):
            return model(x)

    np.testing.assert_allclose(evaluate(model, ema, jnp.ones((1, 2))), ema.averaged(model)(jnp.ones((1, 2))), rtol=1e-6)
    assert model.first.kernel is before


def test_donation_of_model_and_average(model):
    ema = nnx.EMA(model, 0.5)

    @nnx.testing.counted
    def body(model, ema):
        drift(model)
        ema.update(model)

    step = nnx.jit(body, donate_argnums=(0, 1))
    with nnx.testing.assert_traces(body, 1):
        step(model, ema)
        averaged = ema.averaged(model)
        for _ in range(2):
            step(model, ema)
    assert np.isfinite(averaged(jnp.ones((1, 2)))).all()
    assert np.isfinite(model(jnp.ones((1, 2)))).all()


def test_tied_parameters_are_averaged_once():
    class Tied(nnx.Module):
        def __init__(self, *, ctx):
            self.a = nnx.Linear(3, 3, use_bias=False, ctx=ctx)
            self.b = nnx.Linear(3, 3, use_bias=False, ctx=ctx)
            self.b.kernel = self.a.get_variable("kernel")

    model = Tied(ctx=nnx.context(0))
    ema = nnx.EMA(model)
    assert ema.average.get_state().paths == (("a", "kernel"),)
    drift(model)
    ema.update(model)
    averaged = ema.averaged(model)
    assert averaged.a.get_variable("kernel") is averaged.b.get_variable("kernel")


def test_a_filter_and_what_is_no_float(model):
    ema = nnx.EMA(model, 0.5, wrt=nnx.PathGlob("second/*"))
    assert ema.average.get_state().paths == (("second", "bias"), ("second", "kernel"))
    model.calls = nnx.var("counts", jnp.int32(1))
    model._odd = nnx.Param(jnp.ones(2))
    model.keys = nnx.Param({"a": jnp.ones(2), "n": jnp.arange(2)})
    everything = nnx.EMA(model, 0.5, wrt=...)
    model.calls = jnp.int32(7)
    model.keys = {"a": jnp.zeros(2), "n": jnp.arange(2) + 5}
    everything.update(model)
    everything.update(model)
    state = everything.state(model)
    assert int(state["calls"].value) == 7
    np.testing.assert_array_equal(state["keys"].value["n"], [5, 6])
    np.testing.assert_array_equal(state["_odd"].value, [1, 1])
    assert everything.averaged(model).keys["a"].shape == (2,)


def test_in_a_train_state_and_beside_an_optimizer(model, rng):
    tx, x = optax.sgd(0.1), rng.normal(size=(4, 2)).astype(np.float32)
    ema, optimizer = nnx.EMA(model, 0.9), nnx.Optimizer(model, tx)
    state = nnx.TrainState.from_module(model, tx, ema=ema.partition())

    @nnx.jit
    def lifted(model, optimizer, ema):
        optimizer.update(model, nnx.grad(lambda model: (model(x) ** 2).mean())(model))
        ema.update(model)

    @jax.jit
    def functional(state):
        grads = jax.grad(lambda params: (state.apply(params, "batch_stats")(x)[0] ** 2).mean())(state.params)
        state = state.apply_gradients(grads)
        ema = state.ema.merge()
        ema.update(state.params)
        return state.replace(ema=ema.partition())

    for _ in range(3):
        lifted(model, optimizer, ema)
        state = functional(state)
    functional_ema = state.ema.merge()
    one, two = values(ema.state(model)), values(functional_ema.state(state.params))
    for path, value in one.items():
        np.testing.assert_allclose(value, two[path], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        functional_ema.averaged(state.merge())(x), state.apply(functional_ema.state(state.params), "batch_stats")(x)[0]
    )


def test_of_shapes_alone(model):
    abstract = nnx.eval_shape(lambda: nnx.EMA(Net(ctx=nnx.context(0), dtype=jnp.bfloat16)))
    assert abstract.average.first.kernel.dtype == jnp.float32
    shapes = nnx.eval_shape(lambda: Net(ctx=nnx.context(0)))
    assert isinstance(nnx.EMA(shapes).average.first.kernel, jax.ShapeDtypeStruct)


def test_what_does_not_fit_is_refused(model):
    ema = nnx.EMA(model)
    with pytest.raises(ValueError, match="at least 0 and below 1; got 1.0"):
        nnx.EMA(model, 1.0)
    with pytest.raises(TypeError, match="takes a Module or a State, got dict"):
        nnx.EMA({})
    with pytest.raises(nnx.StructureError, match=r"selects nothing of this Net: there are: `first/bias`"):
        nnx.EMA(model, wrt=nnx.Cache)
    with pytest.raises(TypeError, match=r"EMA.averaged takes a Module, got State; .*`EMA.state`"):
        ema.averaged(model.get_state())
    del model.second
    model.third = nnx.Linear(3, 2, ctx=nnx.context(0))
    with pytest.raises(
        nnx.StructureError, match=r"EMA.update: .*gone: `second/bias`, `second/kernel`; new: `third/bias`.*a new EMA"
    ):
        ema.update(model)
