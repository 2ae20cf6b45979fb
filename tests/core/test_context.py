"""Context: random streams and flags that cross every transform without compiling anything anew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nnx


def data(key):
    """A key as something that compares."""
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def draws(ctx, name, n):
    return [data(ctx.make_rng(name)) for _ in range(n)]


# --- seeds ---


@pytest.mark.parametrize(
    "seed",
    [
        7,
        np.int32(7),
        np.uint8(7),
        np.array(7),
        jnp.int32(7),
        jnp.uint32(7),
        jax.random.key(7),
        jax.random.PRNGKey(7),
        np.asarray(jax.random.PRNGKey(7)),
    ],
    ids=lambda seed: f"{type(seed).__name__}-{getattr(seed, 'dtype', '')}",
)
def test_every_kind_of_seed_gives_the_same_keys(seed):
    assert draws(nnx.context(seed), "params", 2) == draws(nnx.context(7), "params", 2)
    assert draws(nnx.context(dropout=seed), "dropout", 2) == draws(nnx.context(dropout=7), "dropout", 2)


def test_a_key_of_another_implementation_is_kept():
    key = nnx.context(jax.random.key(0, impl="rbg")).make_rng("params")
    assert key.dtype == jax.random.key(0, impl="rbg").dtype


def test_a_seed_makes_a_key_of_the_kind_that_is_jax_default():
    before = nnx.context(0).make_rng("params")
    with jax.default_prng_impl("rbg"):
        key = nnx.context(0).make_rng("params")
        assert data(key) == _reference("params", 0, 0)
    assert key.dtype == jax.random.key(0, impl="rbg").dtype != before.dtype


def test_negative_and_large_seeds():
    assert draws(nnx.context(-1), "params", 1) != draws(nnx.context(0), "params", 1)
    assert draws(nnx.context(2**31), "params", 1) != draws(nnx.context(0), "params", 1)
    for seed in (-1, 2**31 - 1, 2**31, 2**32 - 1):
        assert draws(nnx.context(seed), "params", 1) == [_reference("params", seed, 0)]


def test_a_traced_seed():
    keys = jax.vmap(lambda seed: nnx.context(seed).make_rng("params"))(jnp.arange(3))
    assert [data(key) for key in keys] == [draws(nnx.context(i), "params", 1)[0] for i in range(3)]


@pytest.mark.parametrize(
    "seed", [1.5, "7", True, np.float32(1), jnp.ones(()), [0, 1], jnp.ones(2, jnp.int32), object()]
)
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(
        nnx.ContextError, match=r"the seed of the stream `dropout` is an integer, a key \(jax\.random\.key\)"
    ):
        nnx.context(dropout=seed)


@pytest.mark.parametrize("arguments", [{"rngs": 0}, {"rngs": jax.random.key(0)}, {"flags": ("train",)}])
def test_a_context_class_wants_values_by_name(arguments):
    with pytest.raises(nnx.ContextError, match=r"are values by name, got .*nnx.context makes one of seeds"):
        nnx.Context(**arguments)


def test_flags_given_as_a_stream_are_pointed_to_flags():
    with pytest.raises(nnx.ContextError, match=r"flags are given as flags=dict"):
        nnx.context(0, config={"deterministic": True})


def test_params_given_twice():
    with pytest.raises(nnx.ContextError, match="the stream `params` is given twice"):
        nnx.context(0, params=1)


def test_none_leaves_a_stream_out():
    ctx = nnx.context(None, dropout=None, noise=0)
    assert list(ctx.rngs) == ["noise"]


# --- streams ---


def test_a_stream_never_repeats():
    keys = draws(nnx.context(0), "params", 100)
    assert len(set(keys)) == 100


def test_equal_seeds_in_differently_named_streams_differ():
    ctx = nnx.context(0, dropout=0, noise=0)
    keys = draws(ctx, "params", 20) + draws(ctx, "dropout", 20) + draws(ctx, "noise", 20)
    assert len(set(keys)) == 60


def test_streams_do_not_disturb_each_other():
    one, other = nnx.context(0, dropout=1), nnx.context(0, dropout=1)
    draws(other, "dropout", 3)
    assert draws(one, "params", 2) == draws(other, "params", 2)


def test_keys_are_typed_scalars():
    key = nnx.context(0).make_rng("params")
    assert key.shape == ()
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def test_keys_are_the_same_in_another_process():
    """Names are folded in by a hash that does not depend on the process; other keys would break saved runs."""
    assert draws(nnx.context(0), "params", 1) == [_reference("params", 0, 0)]
    assert draws(nnx.context(dropout=3), "dropout", 2)[1] == _reference("dropout", 3, 1)


def _reference(name, seed, count):
    import zlib

    return data(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), count))


def test_an_unknown_stream_lists_the_known_ones():
    with pytest.raises(
        nnx.ContextError, match=r"no random stream `noise` in .* \(it has: `params`, `dropout`\)"
    ) as caught:
        nnx.context(0, dropout=1).make_rng("noise")
    assert "nnx.context(noise=seed)" in str(caught.value)
    with pytest.raises(nnx.ContextError, match="it has: none"):
        nnx.context().make_rng("params")


def test_the_count_can_be_read():
    ctx = nnx.context(0)
    draws(ctx, "params", 3)
    assert ctx.rngs["params"].count == 3
    assert repr(ctx) == "Context(params=RngStream(count=3))"


def test_has_rng():
    ctx = nnx.context(0, dropout=1)
    assert ctx.has_rng("dropout")
    assert not ctx.has_rng("noise")


# --- flags ---


def test_flags():
    ctx = nnx.context(0, flags={"deterministic": False, "mode": "x"})
    assert ctx.get_flag("deterministic") is False
    assert ctx.get_flag("nothing") is None
    assert ctx.get_flag("nothing", 5) == 5
    assert ctx.has_flag("mode")
    assert not ctx.has_flag("nothing")
    assert dict(ctx.flags) == {"deterministic": False, "mode": "x"}
    assert "deterministic" in repr(ctx)


def test_flags_are_read_only():
    with pytest.raises(TypeError, match="does not support item assignment"):
        nnx.context(flags={"a": 1}).flags["a"] = 2
    with pytest.raises(AttributeError, match="a Context has no attribute to set"):
        nnx.context().deterministic = True


def test_flags_are_static_and_streams_are_not():
    traces = []

    @nnx.jit
    def f(ctx, x):
        traces.append(ctx.get_flag("train"))
        return x * 2 if ctx.get_flag("train") else x

    assert float(f(nnx.context(0, flags={"train": True}), 1.0)) == 2.0
    assert float(f(nnx.context(1, flags={"train": True}), 1.0)) == 2.0
    assert float(f(nnx.context(1, flags={"train": False}), 1.0)) == 1.0
    assert traces == [True, False]


def test_copy_shares_streams_and_changes_flags():
    ctx = nnx.context(0, flags={"train": True})
    other = ctx.copy(train=False, extra=1)
    assert (other.get_flag("train"), other.get_flag("extra"), ctx.get_flag("train")) == (False, 1, True)
    assert draws(other, "params", 1) + draws(ctx, "params", 1) == draws(nnx.context(0), "params", 2)


def test_streams_shared_by_two_contexts_stay_shared_in_jit():
    ctx = nnx.context(0, flags={"train": True})
    other = ctx.copy(train=False)

    @nnx.jit
    def f(a, b):
        return a.make_rng("params"), b.make_rng("params"), a.make_rng("params")

    assert [data(key) for key in f(ctx, other)] == draws(nnx.context(0), "params", 3)
    assert ctx.rngs["params"].count == other.rngs["params"].count == 3


# --- fork, partition, merge ---


def test_fork():
    ctx = nnx.context(0, dropout=0, flags={"a": 1})
    fork = ctx.fork()
    assert fork.get_flag("a") == 1
    assert fork.rngs["params"].count == 0
    assert ctx.rngs["params"].count == ctx.rngs["dropout"].count == 1
    keys = draws(ctx, "params", 10) + draws(ctx, "dropout", 10) + draws(fork, "params", 10) + draws(fork, "dropout", 10)
    assert len(set(keys)) == 40
    assert not set(draws(ctx.fork(), "params", 5)) & set(draws(fork, "params", 5))


def test_fork_inside_of_jit():
    f = nnx.jit(lambda ctx: ctx.fork().make_rng("params"))
    ctx, reference = nnx.context(0), nnx.context(0)
    for _ in range(2):
        assert data(f(ctx)) == data(reference.fork().make_rng("params"))
    assert ctx.rngs["params"].count == 2


def test_partition_and_merge():
    ctx = nnx.context(0, dropout=1, flags={"a": 1})
    draws(ctx, "params", 2)
    state, definition = ctx.partition()
    assert state.paths == (("dropout",), ("params",))
    merged = definition.merge(state)
    assert merged.get_flag("a") == 1
    assert draws(merged, "params", 2) == draws(ctx, "params", 2)
    assert draws(merged, "dropout", 2) == draws(ctx, "dropout", 2)


def test_a_merged_context_is_independent():
    ctx = nnx.context(0)
    state, definition = ctx.partition()
    draws(definition.merge(state), "params", 5)
    assert ctx.rngs["params"].count == 0


def test_partition_crosses_raw_jax():
    traces = []

    @jax.jit
    def f(state, definition):
        traces.append(1)
        ctx = definition.merge(state)
        return ctx.make_rng("params"), ctx.partition()[0]

    ctx = nnx.context(0)
    state, definition = ctx.partition()
    keys = []
    for _ in range(3):
        key, state = f(state, definition)
        keys.append(data(key))
    assert keys == draws(ctx, "params", 3)
    assert traces == [1]
    assert hash(definition) == hash(nnx.context(5).partition()[1])
    assert definition == nnx.context(5).partition()[1]


def test_merge_of_a_state_that_lacks_a_stream():
    state, definition = nnx.context(0, dropout=1).partition()
    with pytest.raises(nnx.StructureError, match=r"values are missing: `dropout` \(RngStream\)"):
        definition.merge(state.filter(nnx.PathGlob("params")))


# --- jit ---


def test_a_thousand_passes_compile_once_and_give_a_thousand_keys():
    traces = []

    @nnx.jit
    def f(ctx):
        traces.append(1)
        return jax.random.key_data(ctx.make_rng("dropout"))

    ctx = nnx.context(dropout=0)
    keys = {tuple(np.asarray(f(ctx)).tolist()) for _ in range(1000)}
    assert len(keys) == 1000
    assert traces == [1]
    assert f._cache_size() == 1
    assert ctx.rngs["dropout"].count == 1000


def test_eager_and_compiled_sequences_agree():
    @functools.partial(nnx.jit, static_argnums=1)
    def f(ctx, n):
        return [ctx.make_rng("params") for _ in range(n)]

    ctx, reference = nnx.context(0), nnx.context(0)
    got = []
    for n in (1, 3, 0, 2):
        got += draws(ctx, "params", 2)
        got += [data(key) for key in f(ctx, n)]
    assert got == draws(reference, "params", len(got))


@settings(max_examples=8)
@given(st.lists(st.tuples(st.sampled_from(["eager", "jit", "nested", "grad", "fork"]), st.integers(0, 2)), max_size=4))
def test_any_mixture_of_draws_is_one_sequence(steps):
    def run(lift):
        ctx, keys = nnx.context(a=0, b=0), []
        for kind, n in steps:
            keys += [data(key) for key in lift(kind)(ctx, n)]
        return keys, ctx.rngs["a"].count, ctx.rngs["b"].count

    assert run(lambda kind: _DRAWS[kind]) == run(lambda kind: _fork if kind == "fork" else _eager)


def _eager(ctx, n):
    return [ctx.make_rng("a") for _ in range(n)] + [ctx.make_rng("b")]


def _fork(ctx, n):
    fork = ctx.fork()
    return _eager(fork, n) + _eager(ctx, n)


_jitted = nnx.jit(_eager, static_argnums=1)


@functools.partial(nnx.jit, static_argnums=1)
def _nested(ctx, n):
    return _jitted(ctx, n)


def _in_grad(ctx, n):
    return nnx.grad(lambda x, ctx: (x * 2.0, _eager(ctx, n)), has_aux=True)(1.0, ctx)[1]


_DRAWS = {
    "eager": _eager,
    "jit": _jitted,
    "nested": _nested,
    "grad": nnx.jit(_in_grad, static_argnums=1),
    "fork": nnx.jit(_fork, static_argnums=1),
}


def test_a_context_beside_a_module_in_every_position():
    class Noise(nnx.Module):
        def __call__(self, x, *, ctx):
            return x + jax.random.uniform(ctx.make_rng("noise"))

    f = nnx.jit(lambda m, x, ctx: m(x, ctx=ctx))
    ctx, reference = nnx.context(noise=0), nnx.context(noise=0)
    assert [float(f(Noise(), 0.0, ctx)) for _ in range(3)] == [float(Noise()(0.0, ctx=reference)) for _ in range(3)]


def test_a_new_context_at_each_call_compiles_once():
    traces = []

    @nnx.jit
    def f(ctx):
        traces.append(1)
        return ctx.make_rng("dropout")

    keys = {data(f(nnx.context(dropout=i))) for i in range(20)}
    assert len(keys) == 20
    assert traces == [1]


def test_branches_that_draw_differently_keep_their_counts():
    """How many keys a trace drew belongs to that trace, not to the function."""

    @functools.partial(nnx.jit, static_argnums=1)
    def f(ctx, n):
        for _ in range(n):
            ctx.make_rng("a")

    ctx = nnx.context(a=0)
    for n in (1, 5, 1, 5, 0):
        f(ctx, n)
    assert ctx.rngs["a"].count == 12


def test_a_returned_new_context_goes_on():
    @nnx.jit
    def make():
        ctx = nnx.context(dropout=4)
        ctx.make_rng("dropout")
        return ctx

    ctx = make()
    assert draws(ctx, "dropout", 2) == draws(nnx.context(dropout=4), "dropout", 3)[1:]
    f = nnx.jit(lambda ctx: ctx.make_rng("dropout"))
    assert data(f(ctx)) == draws(nnx.context(dropout=4), "dropout", 4)[3]
    assert int(ctx.rngs["dropout"].count) == 4


def test_draws_inside_of_grad_inside_of_jit():
    class Net(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.float32(2))

    def loss(net, ctx):
        return net.w * jax.random.uniform(ctx.make_rng("noise"))

    def step(net, ctx):
        first = ctx.make_rng("noise")
        grads = nnx.grad(loss)(net, ctx)
        return first, grads["w"].value, ctx.make_rng("noise")

    ctx, reference = nnx.context(noise=0), nnx.context(noise=0)
    compiled = nnx.jit(step)
    for _ in range(3):
        got, expected = compiled(Net(), ctx), step(Net(), reference)
        assert data(got[0]) == data(expected[0])
        np.testing.assert_allclose(got[1], expected[1])
        assert data(got[2]) == data(expected[2])
    assert ctx.rngs["noise"].count == reference.rngs["noise"].count == 9


def test_a_context_as_the_first_argument_of_grad():
    value, grads = nnx.value_and_grad(lambda ctx, x: x * jax.random.uniform(ctx.make_rng("a")), argnums=1)(
        nnx.context(a=0), 2.0
    )
    np.testing.assert_allclose(value, 2.0 * grads)
