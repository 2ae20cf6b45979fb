"""Why a function was traced again, how often it may be, and what it must not capture."""

import functools
import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


class Dropout(nnx.Module):
    def __init__(self, rate=0.5):
        self.rate = rate


class Encoder(nnx.Module):
    def __init__(self, rate=0.5):
        self.dropout = Dropout(rate)
        self.kernel = nnx.Param(jnp.ones(3))


class Model(nnx.Module):
    def __init__(self, rate=0.5, act=None):
        self.encoder = Encoder(rate)
        self.act = act


def traced(*calls):
    """The messages that a fresh jitted function logs over some calls."""

    @nnx.jit
    def train_step(model, x=1.0):
        return model.encoder.kernel.sum() * x

    for args in calls:
        train_step(*args)


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.WARNING, logger="nnx")
    with nnx.explain_retraces():
        yield lambda: [record.getMessage().removeprefix("traced.<locals>.") for record in caplog.records]


def test_a_static_is_named_by_path(log):
    traced((Model(0.5),), (Model(0.1),))
    assert log() == ["train_step retraced: static `encoder.dropout.rate` 0.5 -> 0.1"]


def test_an_argument_is_named_with_its_shapes(log):
    traced((Model(), jnp.ones((8, 3))), (Model(), jnp.ones((7, 3))))
    assert log() == ["train_step retraced: argument `x` float32[8,3] -> float32[7,3]"]


def test_a_value_in_a_module_is_named_by_path(log):
    other = Model()
    other.encoder.kernel = jnp.ones(3, jnp.bfloat16)
    traced((Model(),), (other,))
    assert log() == ["train_step retraced: argument `model.encoder.kernel` float32[3] -> bfloat16[3]"]


def test_structure_is_named_by_path(log):
    grown, retyped, swapped = Model(), Model(), Model()
    grown.encoder.scale = nnx.Param(jnp.ones(3))
    del retyped.encoder.kernel
    retyped.encoder.kernel = nnx.BatchStat(jnp.ones(3))
    swapped.encoder.dropout = nnx.Sequence()
    traced((Model(),), (grown,))
    traced((Model(),), (retyped,))
    traced((Model(),), (swapped,))
    first, second, third = log()
    assert "`encoder.scale` appeared" in first
    assert "Variable `encoder.kernel` Param -> BatchStat" in second
    assert "Module `encoder.dropout` Dropout -> Sequence" in third


def test_a_tie_is_named_by_path(log):
    tied, untied = Model(), Model()
    for model in (tied, untied):
        model.other = Encoder()
    tied.other.kernel = tied.encoder.get_variable("kernel")
    traced((untied,), (tied,))
    (message,) = log()
    assert "`other.kernel` Param -> Param tied to `encoder/kernel`" in message


def test_the_nearest_trace_is_the_one_compared_with(log):
    traced((Model(0.1), jnp.ones(3)), (Model(0.5), jnp.ones((7, 3))), (Model(0.5), jnp.ones(3)))
    # Either earlier trace differs in one thing from the third; the second differed in two from the first.
    assert len(log()[0].split(";")) == 2
    assert len(log()[1].split(";")) == 1


def test_nothing_is_logged_when_it_is_off(caplog):
    explaining = nnx.explain_retraces()
    explaining.stop()
    traced((Model(0.5),), (Model(0.1),))
    assert not caplog.records


def test_no_retrace_is_no_message(log):
    traced((Model(),), (Model(),), (Model(),))
    assert log() == []


def test_an_identity_is_named_at_the_first_retrace():
    @nnx.jit
    def step(model):
        return model.encoder.kernel * 2

    step(Model(act=lambda x: x))
    with pytest.warns(nnx.RetraceWarning, match=r"static `act` .*compared by identity.*Define it once"):
        step(Model(act=lambda x: x))


def test_a_change_that_is_meant_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced((Model(act=None),), (Model(act=jax.nn.relu),), (Model(act="gelu"),))


def test_max_traces_is_a_bound():
    @nnx.jit(max_traces=2)
    def step(model, x):
        return model.encoder.kernel * x

    model = Model()
    for _ in range(3):
        step(model, 1.0)
        step(model, jnp.ones(3))
    with pytest.raises(nnx.RetraceError, match=r"step would be traced 3 times, and max_traces=2: argument `x`"):
        step(model, jnp.ones((2, 3)).sum(0, keepdims=True)[0][:1])
    np.testing.assert_array_equal(step(model, 2.0), jnp.full(3, 2.0))


def test_a_captured_module_warns_with_name_and_bytes():
    model = Model()
    with pytest.warns(nnx.CaptureWarning, match=r"uses the Model `model` from outside: its 12 bytes become constants"):
        nnx.jit(lambda x: model.encoder.kernel * x)(1.0)


def test_a_partial_and_a_default_are_captures_too():
    model = Model()

    def step(x, model=model):
        return model.encoder.kernel * x

    with pytest.warns(nnx.CaptureWarning, match="Model `a default`"):
        nnx.jit(step)(1.0)
    with pytest.warns(nnx.CaptureWarning, match="Model `partial`"):
        nnx.jit(functools.partial(lambda m, x: m.encoder.kernel * x, model))(1.0)


GLOBAL = Model()


def test_a_global_is_a_capture_too():
    def step(x):
        return GLOBAL.encoder.kernel * x

    with pytest.warns(nnx.CaptureWarning, match="Model `GLOBAL`"):
        nnx.jit(step)(1.0)


def test_a_capture_warns_once():
    model = Model()
    step = nnx.jit(lambda x: model.encoder.kernel * x)
    with pytest.warns(nnx.CaptureWarning):
        step(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(jnp.ones(3))


def test_what_bakes_nothing_in_does_not_warn():
    model = Model()
    definition = model.get_module_def()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Eager, so nothing is compiled; a definition holds no arrays; an inner function's Module is the outer's tracer.
        nnx.grad(lambda x: (model.encoder.kernel * x).sum())(1.0)
        nnx.jit(lambda state: definition.merge(state).encoder.kernel)(model.get_state())
        nnx.jit(lambda m: nnx.jit(lambda x: m.encoder.kernel * x)(2.0))(model)


def test_a_bound_method_lifts_its_module():
    class Scale(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(2))

        def double(self):
            self.w = self.w * 2

    scale = Scale()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nnx.jit(scale.double)()
    np.testing.assert_array_equal(scale.w, jnp.full(2, 2.0))
