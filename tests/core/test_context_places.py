"""Context: as an attribute, copied, on its own, and where it must not be used."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


def data(key):
    """A key as something that compares."""
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def draws(ctx, name, n):
    return [data(ctx.make_rng(name)) for _ in range(n)]


# --- as an attribute ---


class Dropout(nnx.Module):
    def __init__(self, ctx):
        self.ctx = ctx

    def __call__(self, x):
        return x * jax.random.bernoulli(self.ctx.make_rng("dropout"), 0.5, x.shape)


def test_a_context_as_an_attribute():
    ctx = nnx.context(dropout=0)
    module = Dropout(ctx)
    assert module.get_state().paths == (("ctx", "dropout"),)
    f = nnx.jit(lambda m, x: m(x))
    masks = [np.asarray(f(module, jnp.ones(32))) for _ in range(3)]
    assert not np.array_equal(masks[0], masks[1])
    assert module.ctx is ctx
    assert ctx.rngs["dropout"].count == 3
    reference = Dropout(nnx.context(dropout=0))
    for mask in masks:
        np.testing.assert_array_equal(mask, reference(jnp.ones(32)))


def test_a_context_shared_by_attributes_and_an_argument():
    ctx = nnx.context(dropout=0)
    a, b = Dropout(ctx), Dropout(ctx)

    @nnx.jit
    def f(a, b, ctx):
        assert a.ctx is b.ctx is ctx
        return a.ctx.make_rng("dropout"), b.ctx.make_rng("dropout"), ctx.make_rng("dropout")

    assert [data(key) for key in f(a, b, ctx)] == draws(nnx.context(dropout=0), "dropout", 3)
    assert ctx.rngs["dropout"].count == 3


def test_an_attributes_stream_survives_partition_and_merge():
    module = Dropout(nnx.context(dropout=0))
    module(jnp.ones(2))
    merged = module.partition().merge()
    assert draws(merged.ctx, "dropout", 2) == draws(module.ctx, "dropout", 2)


def test_a_state_with_streams_leaves_and_enters_raw_jit():
    state, moduledef = Dropout(nnx.context(dropout=0)).partition()

    traces = []

    @jax.jit
    def f(state):
        traces.append(1)
        y, (state, _) = moduledef.apply(state)(jnp.ones(8))
        return y, state

    first, state = f(state)
    second, state = f(state)
    reference = Dropout(nnx.context(dropout=0))
    np.testing.assert_array_equal(first, reference(jnp.ones(8)))
    np.testing.assert_array_equal(second, reference(jnp.ones(8)))
    assert traces == [1]


def test_a_context_can_be_replaced_inside_of_jit():
    module = Dropout(nnx.context(dropout=0))

    @nnx.jit
    def f(module):
        module.ctx = nnx.context(dropout=9)
        module.ctx.make_rng("dropout")

    f(module)
    assert draws(module.ctx, "dropout", 1) == draws(nnx.context(dropout=9), "dropout", 2)[1:]


# --- where a Context must not be used ---


def test_a_context_of_an_outer_trace_is_refused():
    ctx = nnx.context(dropout=0)
    with pytest.raises(
        nnx.TraceContextError, match=r"cannot draw from `Context\.make_rng\('dropout'\)` here"
    ) as caught:
        jax.jit(lambda x: jax.random.uniform(ctx.make_rng("dropout")) + x)(1.0)
    assert "eager code" in str(caught.value)
    assert "Pass the object as an argument" in str(caught.value)
    assert ctx.rngs["dropout"].count == 0


@pytest.mark.parametrize("transform", [nnx.jit, nnx.grad, jax.grad, jax.vmap, jax.checkpoint])
def test_a_context_of_an_outer_trace_is_refused_by_every_transform(transform):
    ctx = nnx.context(dropout=0)
    argument = jnp.ones(3) if transform is jax.vmap else 1.0
    with pytest.raises(nnx.TraceContextError, match="make_rng"):
        transform(lambda x: jax.random.uniform(ctx.make_rng("dropout")) * x)(argument)


def test_a_context_does_not_leave_its_trace():
    leaked = []
    jax.jit(lambda x: leaked.append(nnx.context(dropout=0)) or x)(1.0)
    with pytest.raises(
        nnx.TraceContextError, match=r"cannot draw from `Context\.make_rng\('dropout'\)` here(?s:.*)staged transform"
    ):
        leaked[0].make_rng("dropout")


def test_a_context_is_no_pytree():
    with pytest.raises(nnx.AttributeKindError, match=r"a Context is not a pytree.*ctx\.partition\(\)"):
        jax.jit(lambda ctx: 0)(nnx.context(0))


def test_an_exception_inside_advances_nothing():
    ctx = nnx.context(dropout=0)

    @nnx.jit
    def f(ctx):
        ctx.make_rng("dropout")
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        f(ctx)
    with pytest.raises(KeyError, match="inside"):
        nnx.grad(lambda x, ctx: f(ctx))(1.0, ctx)
    assert ctx.rngs["dropout"].count == 0
    assert draws(ctx, "dropout", 2) == draws(nnx.context(dropout=0), "dropout", 2)


# --- copies ---


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda ctx: pickle.loads(pickle.dumps(ctx))])
def test_copies_go_on_from_where_they_are_and_alone(copied):
    ctx = nnx.context(0, dropout=1, flags={"a": [1]})
    draws(ctx, "dropout", 3)
    other = copied(ctx)
    assert other.get_flag("a") == [1]
    assert list(other.rngs) == ["params", "dropout"]
    assert other.rngs["dropout"].count == 3
    assert draws(other, "dropout", 2) == draws(ctx, "dropout", 2)
    draws(other, "dropout", 5)
    assert ctx.rngs["dropout"].count == 5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.clone()])
def test_copies_of_a_module_copy_its_context(copied):
    module = Dropout(nnx.context(dropout=0))
    module(jnp.ones(2))
    module.again = module.ctx
    other = copied(module)
    assert other.ctx is other.again
    assert other.ctx is not module.ctx
    assert draws(other.ctx, "dropout", 2) == draws(module.ctx, "dropout", 2)


def test_a_stream_can_be_made_on_its_own():
    stream = nnx.RngStream(3)
    ctx = nnx.Context({"dropout": stream})
    assert draws(ctx, "dropout", 1) == draws(nnx.context(dropout=3), "dropout", 1)


def test_streams_made_on_their_own_differ_by_the_names_that_they_are_given():
    ctx = nnx.Context({"a": nnx.RngStream(3), "b": nnx.RngStream(3), "c": nnx.RngStream(3, name="a")})
    assert draws(ctx, "a", 2) == draws(nnx.context(a=3), "a", 2) == draws(ctx, "c", 2)
    assert draws(ctx, "b", 2) == draws(nnx.context(b=3), "b", 2)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])
def test_copies_of_a_stream_without_a_name_are_given_one_too(copied):
    ctx = nnx.Context({"a": copied(nnx.RngStream(3, count=1))})
    assert draws(ctx, "a", 1) == draws(nnx.context(a=3), "a", 2)[1:]
    again = nnx.Context({"b": copied(ctx.rngs["a"])})  # its name is folded in already
    assert draws(again, "b", 1) == draws(nnx.context(a=3), "a", 3)[2:]


def test_a_stream_of_an_outer_trace_is_given_no_name():
    stream = nnx.RngStream(3)
    with pytest.raises(nnx.TraceContextError, match="cannot write `RngStream 'a'` here"):
        jax.jit(lambda: nnx.Context({"a": stream}).partition()[0])()
    assert draws(nnx.Context({"a": stream}), "a", 1) == draws(nnx.context(a=3), "a", 1)


def test_a_draw_folds_in_the_count_and_nothing_else():
    """The name is in the key already, so that a draw costs what it costs by hand."""

    state, definition = nnx.context(a=0).partition()
    jaxpr = jax.make_jaxpr(lambda state: definition.merge(state).make_rng("a"))(state)
    assert str(jaxpr).count("random_fold_in") == 1


def test_keys_along_an_axis():
    """A Context of many keys, for a transform of raw JAX to take apart."""
    keys = jax.random.split(jax.random.key(0), 3)
    state, definition = nnx.context(a=keys).partition()
    states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, 3), state)
    drawn = jax.vmap(lambda state: definition.merge(state).make_rng("a"))(states)
    assert [data(key) for key in drawn] == [draws(nnx.context(a=key), "a", 1)[0] for key in keys]


def test_a_stream_that_starts_later():
    ctx = nnx.Context({"dropout": nnx.RngStream(3, count=2)})
    assert draws(ctx, "dropout", 1) == draws(nnx.context(dropout=3), "dropout", 3)[2:]


def test_a_stream_that_has_nearly_wrapped_goes_on():
    ctx = nnx.Context({"a": nnx.RngStream(3, count=2**32 - 1)})
    f = nnx.jit(lambda ctx: (ctx.make_rng("a"), ctx.make_rng("a")))
    eager = nnx.Context({"a": nnx.RngStream(3, count=2**32 - 1)})
    assert [data(key) for key in f(ctx)] == draws(eager, "a", 2)


def test_update_state_takes_over_keys_and_counts():
    ctx, other = nnx.context(0, dropout=1), nnx.context(5, dropout=6)
    ctx.make_rng("dropout")
    other.update_state(ctx.partition()[0])
    expected = jax.random.key_data(ctx.make_rng("dropout"))
    np.testing.assert_array_equal(jax.random.key_data(other.make_rng("dropout")), expected)
    with pytest.raises(nnx.ContextError, match="holds the streams"):
        nnx.context(noise=1).update_state(ctx.partition()[0])
