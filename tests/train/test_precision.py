"""Precision and LossScale: what is cast and what is not, and steps that overflow leave no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx


class Net(nnx.Module):
    def __init__(self, *, ctx: nnx.Context):
        self.body = nnx.Linear(3, 4, ctx=ctx)
        self.norm = nnx.BatchNorm(4, ctx=ctx)
        self.head = nnx.Linear(4, 2, ctx=ctx)
        self.table = jnp.linspace(0, 1, 3)
        self.seen = nnx.var("seen", "")

    def __call__(self, x, *, ctx=None):
        x = self.norm(self.body(x * self.table[None]), ctx=ctx)
        self.seen = x
        return self.head(x)

    def half(self, x):
        return self.body(x)


TRAIN = {"use_running_average": False}


@pytest.fixture
def model():
    net = Net(ctx=nnx.context(0))
    net.seen = jnp.zeros((4, 4))
    return net


@pytest.fixture
def x(rng):
    return rng.normal(size=(4, 3)).astype(np.float32)


def dtypes(module):
    state = module.get_state()
    return {"/".join(path): value.dtype.name for path, value in zip(state.paths, state.raw_values, strict=True)}


def test_only_floats_are_cast():
    tree = {
        "x": jnp.ones(2),
        "host": np.ones(2),
        "half": jnp.ones(2, jnp.float16),
        "n": jnp.arange(2),
        "mask": jnp.ones(2, bool),
        "z": jnp.ones(2, jnp.complex64),
        "key": jax.random.key(0),
        "shape": jax.ShapeDtypeStruct((2,), jnp.float32),
        "rate": 0.5,
        "name": "a",
        "none": None,
    }
    cast = nnx.Precision().cast_to_compute(tree)
    assert {name for name in tree if cast[name] is not tree[name]} == {"x", "host", "half", "shape"}
    assert all(cast[name].dtype == jnp.bfloat16 for name in ("x", "host", "half", "shape"))
    assert isinstance(cast["host"], np.ndarray)
    back = nnx.Precision(params=jnp.float32).cast_to_params(cast)
    assert back["x"].dtype == back["half"].dtype == jnp.float32
    none = nnx.Precision(compute=None, output=None)
    assert none.cast_to_compute(tree) is tree
    assert none.cast_to_output(tree) is tree


def test_of_modules_and_states_parameters_and_buffers_are_cast(model):
    precision = nnx.Precision(compute=jnp.float16)
    cast = precision.cast_to_compute(model)
    assert isinstance(cast, Net)
    assert dtypes(cast) == {
        path: "float32" if path in ("norm/mean", "norm/var", "seen") else "float16" for path in dtypes(model)
    }
    assert {*dtypes(model).values()} == {"float32"}
    state = precision.cast_to_compute(model.get_state())
    assert state.schema is model.get_state().schema
    np.testing.assert_array_equal(state["body", "kernel"].value, cast.body.kernel)
    everything = nnx.Precision(compute=jnp.float16, wrt=...).cast_to_compute({"model": model, "x": jnp.ones(2)})
    assert {*dtypes(everything["model"]).values()} == {"float16"}
    assert everything["x"].dtype == jnp.float16


def test_types_by_filter(model):
    precision = nnx.Precision(
        compute={nnx.PathGlob("head/**"): jnp.float32, nnx.PathGlob("table"): None, ...: jnp.bfloat16}
    )
    cast = dtypes(precision.cast_to_compute(model))
    assert {path for path, name in cast.items() if name == "bfloat16"} == {
        "body/bias",
        "body/kernel",
        "norm/bias",
        "norm/scale",
    }
    assert precision.cast_to_compute({"table": jnp.ones(1), "x": jnp.ones(1)})["table"].dtype == jnp.float32
    assert precision == nnx.Precision(compute=precision.compute)
    assert hash(nnx.Precision()) == hash(nnx.Precision(compute="bfloat16"))
    assert nnx.Precision() != nnx.Precision(compute="float16")


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_a_call_computes_in_half_precision_and_loses_no_write(model, x, wrap):
    precision = nnx.Precision()
    inside = []

    def forward(model, x):
        ctx = nnx.context(flags=TRAIN)
        out = precision.call(model, x, ctx=ctx)
        inside.append(model.seen.dtype)
        return out

    before = model.get_state()
    out = wrap(forward)(model, x)
    after = model.get_state()
    assert out.dtype == jnp.float32
    assert inside == [jnp.bfloat16]
    assert dtypes(model) == {path: "bfloat16" if path == "seen" else "float32" for path in dtypes(model)}
    for path in model.filter(nnx.Param).paths:
        assert after[path].value is before[path].value
    assert not np.array_equal(after["norm", "mean"].value, before["norm", "mean"].value)
    full = Net(ctx=nnx.context(0))
    np.testing.assert_allclose(out, full(x, ctx=nnx.context(flags=TRAIN)), atol=0.05)
    assert precision.call(model.half, x).dtype == jnp.float32


def test_gradients_are_those_of_the_full_parameters(model, x):
    precision = nnx.Precision()

    @nnx.jit
    def gradient(model, x):
        return nnx.grad(lambda model: (precision.call(model, x, ctx=nnx.context(flags=TRAIN)) ** 2).mean())(model)

    grads = gradient(model, x)
    exact = nnx.grad(lambda model: (model(x, ctx=nnx.context(flags=TRAIN)) ** 2).mean())(model)
    for path in grads.paths:
        assert grads[path].value.dtype == jnp.float32
        np.testing.assert_allclose(grads[path].value, exact[path].value, atol=0.1)


def test_the_parameters_come_back_after_an_error(model):
    def fail():
        with nnx.Precision().computing(model):
            assert model.body.kernel.dtype == jnp.bfloat16
            model.head.bias = model.head.bias + 1
            raise KeyError

    before = model.get_state()
    with pytest.raises(KeyError):
        fail()
    assert model.body.kernel is before["body", "kernel"].value
    assert model.head.bias.dtype == jnp.float32
    np.testing.assert_array_equal(model.head.bias, np.ones(2))


def test_wrong_types_are_refused(model):
    with pytest.raises(TypeError, match="`compute` is a floating-point dtype, got int32"):
        nnx.Precision(compute=jnp.int32)
    with pytest.raises(
        TypeError, match="`output` is a dtype, None, or a mapping from filters to those; got 'half-ish'"
    ):
        nnx.Precision(output="half-ish")
    with pytest.raises(TypeError, match="takes a Module or a bound method of one, got function"):
        nnx.Precision().call(lambda x: x, 1.0)


def test_a_dynamic_scale_follows_the_steps():
    scale = nnx.LossScale(8.0, growth_interval=2, min_scale=2.0, max_scale=16.0)
    seen = []
    adjust = nnx.jit(lambda scale, finite: scale.adjust(finite))
    for finite in (True, True, True, True, True, False, True, False, False, False, True, True):
        adjust(scale, jnp.array(finite))
        seen.append(float(scale.value))
    assert seen == [8, 16, 16, 16, 16, 8, 8, 4, 2, 2, 2, 4]
    assert int(scale.skipped) == 4
    fixed = nnx.LossScale(8.0, dynamic=False)
    for finite in (True, False):
        fixed.adjust(finite)
    assert float(fixed.value) == 8.0
    assert int(fixed.skipped) == 1


def test_scaling_back_and_forth(model):
    scale = nnx.LossScale(1024.0)
    scaled = scale.scale({"loss": jnp.float16(100.0), "aux": 1})
    assert float(scaled["loss"]) == 102400.0
    assert scaled["loss"].dtype == jnp.float32
    # Below the smallest float16 once divided within float16.
    grads = {"half": jnp.float16(2.0), "full": jnp.float32(3.0), "n": jnp.arange(2)}
    back = scale.unscale(grads)
    assert (back["half"].dtype, back["full"].dtype) == (jnp.float16, jnp.float32)
    assert float(back["full"]) == 3 / 1024
    assert back["n"] is grads["n"]


def test_all_finite():
    assert bool(nnx.all_finite({}))
    assert bool(nnx.all_finite({"n": jnp.arange(3), "x": jnp.ones(3), "k": jax.random.key(0)}))
    for bad in (np.inf, -np.inf, np.nan, complex(0, np.inf)):
        assert not bool(nnx.all_finite([jnp.ones(2), jnp.array([1.0, bad])]))


def values(module):
    state = module.get_state()
    return {"/".join(path): np.asarray(value) for path, value in zip(state.paths, state.raw_values, strict=True)}


@pytest.mark.parametrize("tx", [optax.adam(1e-2), optax.MultiSteps(optax.adam(1e-2), 2)], ids=["adam", "MultiSteps"])
def test_a_step_that_overflows_leaves_no_trace(model, x, tx):
    precision, scale = nnx.Precision(compute=jnp.float16), nnx.LossScale(1024.0)
    optimizer = nnx.Optimizer(model, tx)

    @nnx.jit
    def step(model, optimizer, scale, x):
        def loss_fn(model):
            return scale.scale((precision.call(model, x, ctx=nnx.context(flags=TRAIN)) ** 2).mean())

        stats = model.filter(nnx.BatchStat)
        return scale.update(optimizer, model, nnx.grad(loss_fn)(model), restore=stats)

    for _ in range(3):
        assert bool(step(model, optimizer, scale, x))
    before = {**values(model), **values(optimizer)}
    assert not bool(step(model, optimizer, scale, x * np.float32(1e6)))
    after = {**values(model), **values(optimizer)}
    for path, value in before.items():
        if path != "seen":
            np.testing.assert_array_equal(value, after[path], err_msg=path)
    assert float(scale.value) == 512.0
    assert int(scale.skipped) == 1
    for _ in range(2):
        assert bool(step(model, optimizer, scale, x))
    changed = values(model)
    assert not np.array_equal(changed["body/kernel"], after["body/kernel"])
    assert int(optimizer.step) == 5


def test_scaled_steps_are_the_plain_ones(x):
    runs = []
    for scale in (None, nnx.LossScale(1024.0)):
        model = nnx.Linear(3, 2, ctx=nnx.context(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2))
        for _ in range(3):
            factor = 1.0 if scale is None else scale.value
            grads = nnx.grad(lambda model, factor=factor: factor * (model(x) ** 2).mean())(model)
            if scale is None:
                optimizer.update(model, grads)
            else:
                scale.update(optimizer, model, grads)
        runs.append(values(model))
    for path, value in runs[0].items():
        np.testing.assert_array_equal(value, runs[1][path])


def test_with_a_train_state(model, x):
    precision = nnx.Precision(compute=jnp.float16)
    state = nnx.TrainState.from_module(model, optax.adam(1e-2), loss_scale=nnx.LossScale(1024.0).partition())

    @jax.jit
    def step(state, x):
        scale = state.loss_scale.merge()

        def loss_fn(params):
            apply = state.apply(precision.cast_to_compute(params), "batch_stats", "buffers", "seen")
            out, (updates, _) = apply(precision.cast_to_compute(x), ctx=nnx.context(flags=TRAIN))
            return scale.scale((precision.cast_to_output(out) ** 2).mean()), updates.filter(nnx.BatchStat)

        grads, stats = jax.grad(loss_fn, has_aux=True)(state.params)
        state, finite = scale.apply_gradients(state, grads, batch_stats=stats)
        return state.replace(loss_scale=scale.partition()), finite

    state, finite = step(state, x)
    assert bool(finite)
    before = state
    state, finite = step(state, x * np.float32(1e6))
    assert not bool(finite)
    for name in ("params", "opt_state", "batch_stats", "step"):
        for old, new in zip(jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(state, name)), strict=True):
            np.testing.assert_array_equal(old, new, err_msg=name)
    assert float(state.loss_scale.merge().value) == 512.0
    state, finite = step(state, x)
    assert bool(finite)
    assert int(state.step) == 2
    with pytest.raises(TypeError, match="`batch_stats` is what the model's own State is called"):
        nnx.TrainState.from_module(model, optax.sgd(0.1), batch_stats=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_scale": 0.5}, "0 < min_scale <= init_scale <= max_scale, got 1.0, 0.5"),
        ({"backoff_factor": 2.0}, "backoff_factor between 0 and 1, got 2.0 and 2.0"),
        ({"growth_interval": 0}, "growth_interval counts steps from 1 up, got 0"),
    ],
)
def test_senseless_scales_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        nnx.LossScale(**arguments)
