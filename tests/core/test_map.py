"""nnx.vmap against jax.vmap and against loops: axes, reductions, streams, ensembles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.models import Leaf

import nnx


class Net(nnx.Module):
    def __init__(self, din=3, dout=2, *, ctx):
        self.kernel = nnx.Param(jax.random.normal(ctx.make_rng("params"), (din, dout)))
        self.mean = nnx.BatchStat(jnp.zeros(dout))
        self.calls = nnx.var("counts", jnp.int32(0))

    def __call__(self, x):
        y = x @ self.kernel
        self.mean = 0.5 * self.mean + 0.5 * y
        self.calls += 1
        return y


X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
EVERY = {nnx.Param: 0, nnx.BatchStat: 0, "counts": None}


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_an_ensemble(wrap):
    nets = wrap(nnx.vmap(Net, axis_size=5, variable_axes=EVERY))(ctx=nnx.context(0))
    assert nets.kernel.shape == (5, 3, 2)
    assert nets.calls.shape == ()
    assert len({np.asarray(kernel).tobytes() for kernel in nets.kernel}) == 5
    call = wrap(nnx.vmap(Net.__call__, in_axes=(0, None), variable_axes=EVERY))
    kernels = nets.kernel
    y = call(nets, X[0])
    np.testing.assert_allclose(y, jax.vmap(lambda kernel: X[0] @ kernel)(kernels), rtol=1e-5)
    np.testing.assert_allclose(nets.mean, 0.5 * y, rtol=1e-5)
    assert nets.calls == 1


def test_without_split_streams_the_ensemble_is_one_net_five_times():
    nets = nnx.vmap(Net, axis_size=5, split_rngs=False)(ctx=nnx.context(0))
    for kernel in nets.kernel:
        np.testing.assert_array_equal(kernel, Net(ctx=nnx.context(0)).kernel)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", lambda y: y.mean(0)),
        ("sum", lambda y: y.sum(0)),
        ("first", lambda y: y[0]),
        (lambda stacked: stacked.max(axis=0), lambda y: y.max(0)),
    ],
)
def test_reductions(how, expected):
    net = Net(ctx=nnx.context(0))
    y = nnx.vmap(Net.__call__, in_axes=(None, 0), variable_reduce={nnx.BatchStat: how})(net, X)
    np.testing.assert_allclose(net.mean, expected(0.5 * y), rtol=1e-5, atol=1e-6)
    assert net.mean.shape == (2,)
    assert net.calls == 1  # the same in each lane, so there is nothing to reduce


def test_an_integer_keeps_its_type_when_it_is_reduced():
    net = Net(ctx=nnx.context(0))

    def call(net, x):
        net.calls = net.calls + x

    nnx.vmap(call, in_axes=(None, 0), variable_reduce={"counts": "sum"})(net, jnp.arange(4))
    assert (int(net.calls), net.calls.dtype) == (6, jnp.int32)


def test_the_first_filter_counts_and_overrides_the_argument():
    net = Net(ctx=nnx.context(0))
    net.kernel = jnp.moveaxis(jnp.stack([net.kernel] * 4), 0, 1)
    call = nnx.vmap(Net.__call__, in_axes=(None, 0), variable_axes={"kernel": 9, nnx.Param: 1, ...: None})
    with pytest.raises(nnx.VariableError, match="BatchStat"):
        call(net, X)
    net.mean = jnp.zeros((2, 4))
    call = nnx.vmap(Net.__call__, in_axes=(None, 0), variable_axes={nnx.Param: 1, nnx.BatchStat: -1})
    y = call(net, X)
    assert y.shape == (4, 2)
    np.testing.assert_allclose(net.mean, 0.5 * y.T, rtol=1e-5)


def test_axes_of_arrays_in_and_out():
    net = Net(ctx=nnx.context(0))
    reduce = {nnx.BatchStat: "mean"}

    def call(net, batch, scale, *, shift):
        y = net(batch["x"]) * scale + shift
        return y, {"sum": y.sum()}

    mapped = nnx.vmap(call, in_axes=(None, {"x": 1}, None), out_axes=(-1, {"sum": 0}), variable_reduce=reduce)
    y, rest = mapped(net, {"x": X.T}, 2.0, shift=jnp.arange(4.0))
    expected = X @ net.kernel * 2.0 + jnp.arange(4.0)[:, None]
    np.testing.assert_allclose(y, expected.T, rtol=1e-5)
    np.testing.assert_allclose(rest["sum"], expected.sum(1), rtol=1e-5, atol=1e-6)


def test_streams_split_by_name():
    def draw(ctx, x):
        return jax.random.uniform(ctx.make_rng("noise")), jax.random.uniform(ctx.make_rng("dropout"))

    ctx = nnx.context(noise=0, dropout=1)
    noise, dropout = nnx.vmap(draw, in_axes=(None, 0), split_rngs="noise")(ctx, jnp.ones(4))
    assert len(set(noise.tolist())) == 4
    assert len(set(dropout.tolist())) == 1
    assert (int(ctx.rngs["noise"].count), int(ctx.rngs["dropout"].count)) == (1, 1)
    # A shared stream gives the key that it would have given outside.
    assert dropout[0] == jax.random.uniform(nnx.context(dropout=1).make_rng("dropout"))
    again, _ = nnx.vmap(draw, in_axes=(None, 0), split_rngs=("noise",))(ctx, jnp.ones(4))
    assert not set(again.tolist()) & set(noise.tolist())


def test_a_context_as_an_attribute():
    class Noisy(nnx.Module):
        def __init__(self):
            self.ctx = nnx.context(noise=0)

        def __call__(self, x):
            return x + jax.random.uniform(self.ctx.make_rng("noise"))

    noisy = Noisy()
    y = nnx.vmap(noisy)(jnp.zeros(4))
    assert len(set(y.tolist())) == 4
    assert int(noisy.ctx.rngs["noise"].count) == 1


def test_new_and_removed_variables_come_out():
    def call(net, x):
        net.last = nnx.Cache(x)
        del net.calls
        net.child = Leaf(2.0)
        return net(x) if False else x

    net = Net(ctx=nnx.context(0))
    nnx.vmap(call, in_axes=(None, 0))(net, X)
    np.testing.assert_array_equal(net.last, X)
    assert not hasattr(net, "calls")
    assert net.child.w.shape == (4,)  # made in each lane, as the output is
    alone = Net(ctx=nnx.context(0))
    nnx.vmap(call, in_axes=(None, 0), variable_axes={nnx.Param: None}, out_axes=1)(alone, X)
    np.testing.assert_array_equal(alone.last, X.T)
    assert alone.child.w.shape == ()


def test_what_is_sown_is_stacked_and_does_not_grow():
    def call(leaf, x):
        leaf.sow("intermediates", "seen", x)
        return leaf(x)

    leaf = Leaf(2.0)
    mapped = nnx.vmap(call, in_axes=(None, 0))
    for _ in range(2):
        mapped(leaf, jnp.arange(3.0))
        (seen,) = leaf.seen
        assert seen.tolist() == [0, 1, 2]


def test_modules_that_are_returned_are_the_ones_passed():
    leaf, other = Leaf(jnp.arange(3.0)), Leaf(1.0)
    out, made = nnx.vmap(lambda a, b, x: ((b, a), Leaf(x)), in_axes=(0, None, 0))(leaf, other, jnp.arange(3.0))
    assert out[0] is other
    assert out[1] is leaf
    assert made.w.tolist() == [0, 1, 2]


def test_a_shared_module_keeps_its_sharing():
    class Twice(nnx.Module):
        def __init__(self):
            self.a = Leaf(jnp.arange(3.0))
            self.b = self.a

        def __call__(self, x):
            self.b.w = self.a.w + x
            return self.a.w

    twice = Twice()
    y = nnx.vmap(twice.__class__.__call__)(twice, jnp.ones(3))
    assert y.tolist() == [1, 2, 3]
    assert twice.a is twice.b
    assert twice.a.w.tolist() == [1, 2, 3]


def test_axis_names_and_sizes():
    def call(leaf, x):
        leaf.w = jax.lax.pmean(x, "batch")
        return jax.lax.axis_index("batch")

    leaf = Leaf()
    got = nnx.vmap(call, in_axes=(None, 0), axis_name="batch")(leaf, jnp.arange(4.0))
    assert got.tolist() == [0, 1, 2, 3]
    assert leaf.w == 1.5
    assert nnx.vmap(lambda: jnp.float32(1), axis_size=3)().tolist() == [1, 1, 1]
    with pytest.raises(nnx.StructureError, match="different sizes"):
        nnx.vmap(lambda x: x, axis_size=3)(jnp.ones(4))


def test_nested_maps_and_gradients():
    net = Net(ctx=nnx.context(0))
    reduce = {nnx.BatchStat: "mean"}
    inner = nnx.vmap(Net.__call__, in_axes=(None, 0), variable_reduce=reduce)
    outer = nnx.vmap(inner, in_axes=(None, 0), variable_reduce=reduce)
    np.testing.assert_allclose(outer(net, X[None]), (X @ net.kernel)[None], rtol=1e-5)
    assert net.calls == 1
    per_example = nnx.vmap(nnx.grad(lambda net, x: (net(x) ** 2).sum()), in_axes=(None, 0), variable_reduce=reduce)(
        net, X
    )
    expected = jax.vmap(jax.grad(lambda kernel, x: ((x @ kernel) ** 2).sum()), in_axes=(None, 0))(net.kernel, X)
    np.testing.assert_allclose(per_example["kernel"].value, expected, rtol=1e-4, atol=1e-5)


def test_the_name_of_the_axis_in_the_sharding():
    class Sharded(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((2, 3)), sharding=("in", "out"))
            self.free = nnx.Param(jnp.ones(2))

    made = nnx.vmap(Sharded, axis_size=4, out_axes=1, metadata_params={nnx.PARTITION_NAME: "heads"})()
    assert made.w.shape == (2, 4, 3)
    assert made.get_variable("w").sharding == ("in", "heads", "out")
    seen = []
    nnx.vmap(lambda m: seen.append(m.get_variable("w").sharding), in_axes=1)(made)
    assert seen == [("in", "out")]
    assert made.get_variable("w").sharding == ("in", "heads", "out")


def test_strings_flags_and_numbers_are_what_they_are():
    def call(leaf, x, how, flag, number=2):
        assert (how, flag, number) == ("up", True, 2)
        return leaf(x)

    assert nnx.vmap(call, in_axes=(None, 0, 0, 0))(Leaf(2.0), jnp.arange(3.0), "up", True).tolist() == [0, 2, 4]


def test_an_error_inside_changes_nothing():
    def bad(leaf, x):
        leaf.w = x
        leaf.extra = nnx.Cache(x)
        raise ZeroDivisionError

    leaf = Leaf(1.0)
    with pytest.raises(ZeroDivisionError):
        nnx.vmap(bad, in_axes=(None, 0))(leaf, jnp.ones(3))
    assert leaf.w == 1.0
    assert not hasattr(leaf, "extra")
