"""TraceContextError: no change leaves a trace unseen, whichever transform made the trace."""

import copy
import inspect
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx

# What these tests do is what the warning is about.
pytestmark = pytest.mark.filterwarnings("ignore::nnx.CaptureWarning")

HERE = re.escape(__file__)


class Leaf(nnx.Module):
    def __init__(self, value=1.0):
        self.w = nnx.Param(jnp.asarray(value, jnp.float32))
        self.y = nnx.Intermediate(jnp.zeros(()))
        self.buffer = jnp.ones(())
        self.rate = 0.5


class Model(nnx.Module):
    def __init__(self):
        self.encoder = Leaf()
        self.blocks = [Leaf(2.0)]
        self.ctx = nnx.context(dropout=0)


@pytest.fixture
def model():
    model = Model()
    model.partition()  # paths in errors are those that a partition has seen
    return model


# Each runs `function(x)` for some `x` in a trace of its own.
TRANSFORMS = {
    "jax.jit": (lambda f: jax.jit(f)(1.0), "the body of a staged transform: jit of "),
    "jax.grad": (lambda f: jax.grad(f)(1.0), r"the body of a derivative \(jax\.grad"),
    "jax.vmap": (lambda f: jax.vmap(f)(jnp.ones(2)), r"the body of jax\.vmap"),
    "jax.checkpoint": (lambda f: jax.checkpoint(f)(1.0), "the body of a staged transform: (checkpoint|remat)"),
    "jax.lax.scan": (
        lambda f: jax.lax.scan(lambda c, x: (c, f(x)), 0.0, jnp.ones(2)),
        "the body of a staged transform: scan of ",
    ),
    "jax.lax.cond": (lambda f: jax.lax.cond(jnp.array(True), f, f, 1.0), "the body of a staged transform: cond of "),
    "jax.eval_shape": (lambda f: jax.eval_shape(f, 1.0), "the body of a staged transform: "),
    "nnx.jit": (lambda f: nnx.jit(f)(1.0), "the body of a staged transform: jit of "),
    "nnx.grad": (lambda f: nnx.grad(f)(1.0), r"the body of a derivative \(jax\.grad"),
}

# What is done to the Model, and how the error begins.
OPERATIONS = {
    "Variable": (lambda m, x: setattr(m.encoder, "w", x), "cannot write `Leaf.w at encoder/w` here"),
    "Variable in place": (
        lambda m, x: setattr(m.encoder, "w", m.encoder.w + x),
        "cannot write `Leaf.w at encoder/w` here",
    ),
    "Variable of a Sequence": (lambda m, x: setattr(m.blocks[0], "w", x), "cannot write `Leaf.w at blocks/0/w` here"),
    "new Variable": (lambda m, x: setattr(m.encoder, "w", nnx.Param(x)), "cannot write `Leaf.w at encoder/w` here"),
    "Variable.value": (
        lambda m, x: setattr(m.encoder.get_variable("w"), "value", x),
        "cannot write `Param.value` here",
    ),
    "buffer": (lambda m, x: setattr(m.encoder, "buffer", x), "cannot write `Leaf.buffer at encoder/buffer` here"),
    "new attribute": (
        lambda m, x: setattr(m.encoder, "z", nnx.Intermediate(x)),
        "cannot write `Leaf.z at encoder/z` here",
    ),
    "new array": (lambda m, x: setattr(m.encoder, "z", jnp.ones(2)), "cannot write `Leaf.z at encoder/z` here"),
    "static": (lambda m, x: setattr(m.encoder, "rate", 0.1), "cannot write `Leaf.rate at encoder/rate` here"),
    "submodule": (
        lambda m, x: setattr(m.encoder, "child", m.blocks[0]),
        "cannot write `Leaf.child at encoder/child` here",
    ),
    "tie": (
        lambda m, x: setattr(m.encoder, "w", m.blocks[0].get_variable("w")),
        "cannot write `Leaf.w at encoder/w` here",
    ),
    "deletion": (lambda m, x: delattr(m.encoder, "w"), "cannot delete `Leaf.w at encoder/w` here"),
    "deletion of a static": (lambda m, x: delattr(m.encoder, "rate"), "cannot delete `Leaf.rate at encoder/rate` here"),
    "append": (lambda m, x: m.blocks.append(Leaf()), "cannot write `Sequence.1"),
    "delete item": (lambda m, x: m.blocks.__delitem__(0), "cannot delete `Sequence.0"),
    "update_state": (
        lambda m, x: m.update_state(jax.tree.map(lambda w: w * x, m.filter(nnx.Param))),
        "cannot write `blocks/0/w of the Model` here",
    ),
    "update_state of new entries": (
        lambda m, x: m.update_state(nnx.State({"encoder/z": nnx.Intermediate(x)})),
        "cannot write `Leaf.z at encoder/z` here",
    ),
    "update_state from a Module": (lambda m, x: m.update_state(m.clone()), "cannot write `blocks/0/buffer"),
    "pop_state": (lambda m, x: m.pop_state(nnx.Intermediate), "cannot delete `Leaf.y at "),
    "sow": (lambda m, x: m.encoder.sow("intermediates", "z", x), "cannot write `Leaf.z at encoder/z` here"),
    "mutable_state_dict": (
        lambda m, x: setattr(m.mutable_state_dict("/")["encoder/w"], "value", x),
        "cannot write `encoder/w` here",
    ),
    "make_rng": (lambda m, x: m.ctx.make_rng("dropout"), r"cannot draw from `Context.make_rng\('dropout'\)"),
    "fork": (lambda m, x: m.ctx.fork(), r"cannot draw from `Context.make_rng\('dropout'\)"),
}

REMEDY = (
    r"Pass the object as an argument through a lifted transform \(nnx\.jit.*partition\(\).*moduledef\.merge\(state\)"
)


def _contents(model):
    state, moduledef = model.partition()
    return (
        moduledef,
        [id(leaf) for leaf in state.filter(nnx.Not(nnx.PathGlob("ctx/**"))).raw_values],
        model.ctx.rngs["dropout"].count,
    )


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_change_from_another_trace_is_refused(model, transform, operation):
    run, where = TRANSFORMS[transform]
    change, beginning = OPERATIONS[operation]
    before = _contents(model)

    def function(x):
        change(model, x)
        return x * 1.0

    with pytest.raises(nnx.TraceContextError, match=beginning) as caught:
        run(function)
    assert _contents(model) == before
    message = str(caught.value)
    assert re.search(r"made (at \S+:\d+ )?in eager code", message), message
    assert re.search(rf"used at {HERE}:\d+ in {where}", message), message
    assert re.search(REMEDY, message, re.DOTALL), message


def test_the_error_names_both_lines():
    line = inspect.currentframe().f_lineno + 1
    module = Leaf()

    def function(x):
        module.w = x
        return x

    first = function.__code__.co_firstlineno
    with pytest.raises(nnx.TraceContextError) as caught:
        jax.jit(function)(1.0)
    assert f"made at {__file__}:{line} in eager code" in str(caught.value)
    assert f"used at {__file__}:{first + 1} in the body of a staged transform: jit of " in str(caught.value)


def test_the_error_is_a_runtime_error():
    assert issubclass(nnx.TraceContextError, RuntimeError)
    assert issubclass(nnx.TraceContextError, nnx.NnxError)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_a_trace_makes_it_may_change(transform):
    run, _ = TRANSFORMS[transform]

    def function(x):
        model = Model()
        model.encoder.w = x
        model.encoder.z = nnx.Intermediate(x)
        del model.encoder.y
        model.blocks.append(Leaf(3.0))
        model.update_state(jax.tree.map(lambda w: w + 1, model.filter(nnx.Param)))
        model.pop_state(nnx.Intermediate)
        model.ctx.make_rng("dropout")
        return (model.encoder.w + model.blocks[1].w) * x

    run(function)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_a_trace_merges_or_copies_it_may_change(model, transform):
    run, _ = TRANSFORMS[transform]

    def function(x):
        for other in (model.clone(), model.partition().merge(), copy.deepcopy(model)):
            other.encoder.w = x
            other.blocks[0].w = other.blocks[0].w * x
            other.ctx.make_rng("dropout")
        return other.encoder.w * other.blocks[0].w

    run(function)
    assert model.encoder.w == 1.0
    assert model.ctx.rngs["dropout"].count == 0


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_reading_is_allowed(model, transform):
    run, _ = TRANSFORMS[transform]
    run(lambda x: x * model.encoder.w + model.blocks[0].w + model.encoder.buffer)


def test_a_module_that_leaves_its_trace_cannot_be_written():
    kept = []

    def function(x):
        kept.append(Leaf())
        return x

    jax.jit(function)(1.0)
    with pytest.raises(nnx.TraceContextError, match=r"cannot write `Leaf\.w"):
        kept[0].w = jnp.ones(())
    with pytest.raises(nnx.TraceContextError, match=r"used at .* in eager code"):
        kept[0].z = nnx.Param(1.0)


def test_an_outer_trace_is_another_one(model):
    pure = model.partition()

    @jax.jit
    def outer(x):
        inner_model = pure.merge()
        inner_model.encoder.w = x

        def inner(y):
            inner_model.encoder.w = y
            return y

        return jax.grad(inner)(x)

    with pytest.raises(nnx.TraceContextError, match=r"cannot write `Leaf\.w") as caught:
        outer(1.0)
    assert re.search(r"made in the body of a staged transform: jit of outer", str(caught.value))


def test_an_inner_lifted_transform_takes_the_module_as_an_argument(model):
    @nnx.jit
    def outer(model, x):
        def inner(model, y):
            model.encoder.w = model.encoder.w + 1
            return model.encoder.w * y

        return nnx.grad(inner, wrt=nnx.Param)(model, x)

    grads = outer(model, 3.0)
    assert grads["encoder", "w"].value == 3.0
    assert model.encoder.w == 2.0


def test_a_context_of_an_outer_trace_is_refused_and_passed_as_an_argument_is_not():
    ctx = nnx.context(dropout=0)
    with pytest.raises(nnx.TraceContextError, match=r"Context\.make_rng\('dropout'\)"):
        nnx.jit(lambda x: x * jax.random.uniform(ctx.make_rng("dropout")))(1.0)
    assert ctx.rngs["dropout"].count == 0
    nnx.jit(lambda x, ctx: x * jax.random.uniform(ctx.make_rng("dropout")))(1.0, ctx)
    assert ctx.rngs["dropout"].count == 1


def test_a_variable_of_an_outer_trace_is_refused():
    variable = nnx.Param(jnp.zeros(()))

    def function(x):
        variable.value = x
        return x

    with pytest.raises(nnx.TraceContextError, match=r"cannot write `Param\.value`"):
        jax.jit(function)(1.0)
    assert variable.value == 0


def test_a_variable_of_another_trace_assigned_to_a_module_of_this_one(model):
    """Tying a Variable of an outer trace would carry its later writes out; it can be tied, but not written."""
    variable = model.encoder.get_variable("w")

    def function(x):
        inner = nnx.Module()
        inner.w = variable
        inner.w = x
        return x

    with pytest.raises(nnx.TraceContextError, match="cannot write"):
        jax.jit(function)(1.0)
    assert model.encoder.w == 1.0


def test_pickles_and_copies_belong_to_the_trace_that_makes_them(model):
    data = pickle.dumps(model)

    def function(x):
        for other in (pickle.loads(data), copy.copy(model)):
            other.extra = nnx.Param(x)
        pickle.loads(data).encoder.w = x
        return x

    assert jax.jit(function)(1.0) == 1.0
    again = pickle.loads(data)
    again.encoder.w = jnp.float32(4.0)
    assert again.encoder.w == 4.0


def test_after_an_error_the_module_works_as_before(model):
    step = nnx.jit(lambda m, x: setattr(m.encoder, "w", m.encoder.w + x))
    step(model, 1.0)

    def leak(x):
        model.encoder.w = x
        return x

    for _ in range(2):
        with pytest.raises(nnx.TraceContextError, match=r"Leaf\.w at encoder/w"):
            jax.jit(leak)(1.0)
    step(model, 1.0)
    assert model.encoder.w == 3.0


def test_no_tracer_is_left_behind(model):
    with jax.check_tracer_leaks():
        step = nnx.jit(lambda m, x: setattr(m.encoder, "w", m.encoder.w + x))
        step(model, 1.0)
    np.testing.assert_array_equal(model.encoder.w, 2.0)


def test_threads_trace_on_their_own(model):
    """A trace in one thread is none of another's business."""
    import threading

    errors = []

    def writes():
        try:
            for i in range(50):
                model.encoder.w = jnp.float32(i)
        except nnx.NnxError as error:
            errors.append(error)

    thread = threading.Thread(target=writes)

    def function(x):
        thread.start()
        thread.join()
        return x

    jax.jit(function)(1.0)
    assert not errors
    assert model.encoder.w == 49.0
