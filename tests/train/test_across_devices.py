"""Training on a mesh is training on one device: metrics, clipping, averages and loss scales over sharded arrays."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import nnx

MANY = len(jax.devices()) >= 8


def test_this_file_on_eight_devices():
    if MANY:
        return
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


needs_devices = pytest.mark.skipif(not MANY, reason="takes eight devices; test_this_file_on_eight_devices runs it")


def make_mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def metrics_of():
    return nnx.MultiMetric(loss=nnx.Average("loss"), spread=nnx.Welford("loss"), f1=nnx.F1(3), top2=nnx.TopKAccuracy(2))


def flat(results):
    return [float(leaf) for leaf in jax.tree.leaves(results)]


@pytest.fixture
def batch(rng):
    return {
        "loss": (1e4 + rng.normal(size=16)).astype(np.float32),
        "logits": rng.normal(size=(16, 3)).astype(np.float32),
        "labels": rng.integers(0, 3, 16),
        "mask": np.arange(16) % 4 > 0,
    }


@needs_devices
def test_metrics_of_shards_reduced_are_those_of_the_whole(batch):
    mesh, whole, metrics = make_mesh(), metrics_of(), metrics_of()

    @nnx.jit
    @nnx.shard_map(mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    def step(metrics, batch):
        part = metrics.fresh()
        part.update(**batch)
        part.reduce("data")
        metrics.merge(part)
        return part.loss.compute()

    sharded = metrics_of()
    placed = jax.device_put(batch, NamedSharding(mesh, P("data")))
    update = nnx.jit(lambda metrics, batch: metrics.update(**batch))
    for _ in range(3):
        step(metrics, batch)
        update(sharded, placed)
        whole.update(**batch)
    for found in (metrics, sharded):
        np.testing.assert_allclose(flat(found.compute()), flat(whole.compute()), rtol=2e-6)
    forgetful = nnx.shard_map(
        lambda metrics, batch: metrics.update(**batch), mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    with pytest.raises(nnx.VariableError, match=r"got values that differ along the mesh axis `data`"):
        forgetful(metrics_of(), batch)


def train(model, x, y, *, donate):
    tx = optax.chain(optax.clip_by_global_norm(0.05), optax.adam(1e-2))
    optimizer, ema, scale = nnx.Optimizer(model, tx), nnx.EMA(model, 0.5), nnx.LossScale(64.0, growth_interval=2)

    def body(model, optimizer, ema, scale, x, y):
        grads = nnx.grad(lambda model: scale.scale(((model(x) - y) ** 2).mean()))(model)
        norm = optax.tree.norm(scale.unscale(grads))
        finite = scale.update(optimizer, model, grads)
        ema.update(model)
        return norm, finite

    step = nnx.jit(body, donate_argnums=(0, 1, 2, 3) if donate else ())
    norms = [step(model, optimizer, ema, scale, x, y) for _ in range(4)]
    return optimizer, ema, scale, norms


@needs_devices
@pytest.mark.parametrize("donate", [False, True])
def test_a_sharded_step_with_clipping_average_and_loss_scale(rng, donate):
    x, y = rng.normal(size=(16, 8)).astype(np.float32), rng.normal(size=(16, 4)).astype(np.float32)
    mesh, single, sharded = make_mesh(), nnx.Linear(8, 4, ctx=nnx.context(0)), nnx.Linear(8, 4, ctx=nnx.context(0))
    layout = NamedSharding(mesh, P(None, "model"))
    sharded.kernel = jax.device_put(sharded.kernel, layout)
    sharded.bias = jax.device_put(sharded.bias, NamedSharding(mesh, P("model")))
    _, one_ema, one_scale, one_norms = train(single, x, y, donate=donate)
    placed = jax.device_put((x, y), NamedSharding(mesh, P("data")))
    optimizer, ema, scale, norms = train(sharded, *placed, donate=donate)
    assert flat(one_norms)[0] > 0.05  # so it is clipped
    np.testing.assert_allclose(flat(norms), flat(one_norms), rtol=1e-4)
    np.testing.assert_allclose(sharded.kernel, single.kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ema.averaged(sharded).kernel, one_ema.averaged(single).kernel, rtol=1e-4, atol=1e-6)
    assert float(scale.value) == float(one_scale.value) == 256.0
    moments = optimizer.opt_state.filter(nnx.PathGlob("**/mu/kernel")).raw_values[0]
    for array in (sharded.kernel, ema.average.kernel, moments):
        assert array.sharding.is_equivalent_to(layout, 2)
    assert jnp.isfinite(sharded(placed[0])).all()
