"""nnx.shard_map on a mesh of several devices; skipped where there is one, and run by a process that makes eight."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tests.core.models import Leaf

import nnx

MANY = len(jax.devices()) >= 4


def test_this_file_on_eight_devices():
    if MANY:
        return
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


needs_devices = pytest.mark.skipif(not MANY, reason="takes four devices; test_this_file_on_eight_devices runs it")


class Net(nnx.Module):
    def __init__(self, *, ctx):
        self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (4, 6)))
        self.mean = nnx.BatchStat(jnp.zeros(6))
        self.calls = nnx.var("counts", jnp.int32(0))


X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)


def mesh(*names):
    sizes = {1: (4,), 2: (2, 2)}[len(names)]
    return jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))


def forward(net, x):
    y = x @ net.w
    net.mean = jax.lax.pmean(y.mean(0), "data")
    net.calls += 1
    return y


@needs_devices
@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_data_parallel(wrap):
    net = Net(ctx=nnx.context(0))
    run = wrap(nnx.shard_map(forward, mesh=mesh("data"), in_specs=(P(), P("data")), out_specs=P("data")))
    y = run(net, X)
    np.testing.assert_allclose(y, X @ np.asarray(net.w), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(net.mean, y.mean(0), rtol=1e-5, atol=1e-6)
    assert net.calls == 1


@needs_devices
def test_a_sharded_parameter():
    net = Net(ctx=nnx.context(0))
    expected = X @ np.asarray(net.w)

    def column(net, x):
        assert net.w.shape == (4, 3)
        net.w = net.w * 2
        return x @ net.w

    run = nnx.shard_map(
        column,
        mesh=mesh("data", "model"),
        in_specs=(P(), P("data")),
        out_specs=P("data", "model"),
        variable_specs={nnx.Param: P(None, "model")},
    )
    np.testing.assert_allclose(run(net, X), 2 * expected, rtol=1e-5, atol=1e-6)
    assert net.w.shape == (4, 6)


@needs_devices
def test_streams():
    def draw(ctx, x):
        return jax.random.uniform(ctx.make_rng("noise"), x.shape)

    ctx = nnx.context(noise=0)
    same = nnx.shard_map(draw, mesh=mesh("data"), in_specs=(P(), P("data")), out_specs=P("data"))
    rows = np.asarray(same(ctx, jnp.zeros((8, 3)))).reshape(4, 2, 3)
    assert all((rows[0] == row).all() for row in rows)
    apart = nnx.shard_map(draw, mesh=mesh("data"), in_specs=(P(), P("data")), out_specs=P("data"), split_rngs="data")
    rows = np.asarray(apart(ctx, jnp.zeros((8, 3)))).reshape(4, 2, 3)
    assert len({row.tobytes() for row in rows}) == 4
    assert int(ctx.rngs["noise"].count) == 2


@needs_devices
def test_what_a_shard_draws_is_no_part_of_what_its_stream_draws_outside():
    """A key is split by folding in numbers, as a stream is drawn from: shard 2 must not start from draw number 2."""

    def draw(ctx):
        return jnp.stack([jax.random.key_data(ctx.make_rng("noise")) for _ in range(3)])[None]

    ctx = nnx.context(noise=0)
    keys = nnx.shard_map(draw, mesh=mesh("data"), in_specs=P(), out_specs=P("data"), split_rngs="data")(ctx)
    fresh = nnx.context(noise=0)
    outside = [jax.random.split(fresh.make_rng("noise"), 3) for _ in range(4)]
    inside = {tuple(key) for key in np.asarray(keys).reshape(-1, 2).tolist()}
    assert len(inside) == 12
    assert not inside & {tuple(key) for split in outside for key in jax.random.key_data(split).tolist()}


@needs_devices
def test_a_shared_variable_with_values_that_differ_is_refused():
    def bad(net, x):
        net.mean = (x @ net.w).mean(0)
        return x

    net = Net(ctx=nnx.context(0))
    with pytest.raises(nnx.VariableError, match=r"`mean` \(BatchStat\).*`data`.*pmean.*variable_specs"):
        nnx.shard_map(bad, mesh=mesh("data"), in_specs=(P(), P("data")), out_specs=P("data"))(net, X)
    np.testing.assert_array_equal(net.mean, np.zeros(6))


@needs_devices
def test_gradients_are_those_of_one_device():
    net = Net(ctx=nnx.context(0))
    expected = jax.grad(lambda w: ((X @ w) ** 2).mean())(net.w)

    def loss(net, x):
        return jax.lax.pmean((forward(net, x) ** 2).mean(), "data")

    sharded = nnx.shard_map(loss, mesh=mesh("data"), in_specs=(P(), P("data")), out_specs=P())
    grads = nnx.jit(nnx.grad(sharded))(net, X)
    np.testing.assert_allclose(grads["w"].value, expected, rtol=1e-4, atol=1e-5)
    assert net.calls == 1


@needs_devices
def test_new_variables_and_modules_by_name():
    def call(x, *, leaf):
        leaf.last = nnx.Cache(x)
        return x * leaf.w

    leaf = Leaf(2.0)
    run = nnx.shard_map(
        call, mesh=mesh("data"), in_specs=P("data"), out_specs=P("data"), variable_specs={nnx.Cache: P("data")}
    )
    assert run(jnp.arange(8.0), leaf=leaf).tolist() == [2.0 * i for i in range(8)]
    assert leaf.last.tolist() == list(range(8))
    with pytest.raises(ValueError, match="an entry for each of the 1 positional arguments"):
        nnx.shard_map(call, mesh=mesh("data"), in_specs=(P(), P()), out_specs=P())(jnp.ones(8), leaf=leaf)
