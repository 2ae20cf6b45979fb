"""A small training run as one of several processes: `program.py out checkpoints steps fail_at`.

Writes what this process has seen to `out/<processes>-<process>.json`: its losses by step, what it holds of the
parameters, where it began. The bits of all that is saved go to `out/digests` before, and what is restored has to have
those. Its number in the system is in `out/pid-<process>`.
"""

import functools
import hashlib
import json
import os
import resource
import sys
import warnings
from pathlib import Path

from nnx.train.launch import initialize

several = initialize()

import jax  # noqa: E402 - after the processes have met
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

import nnx  # noqa: E402

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


class Net(nnx.Module):
    def __init__(self, *, ctx):
        self.mlp = nnx.MLP(8, 32, 8, ctx=ctx)
        self.norm = nnx.BatchNorm(8, momentum=0.9, use_running_average=False, ctx=ctx)
        self.dropout = nnx.Dropout(0.1, deterministic=False)

    def __call__(self, x, *, ctx):
        return self.norm(self.dropout(self.mlp(x), ctx=ctx))


def create():
    model = Net(ctx=nnx.context(0))
    return model, nnx.Optimizer(model, TX)


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def step(model, optimizer, metrics, x):
    ctx = nnx.context(dropout=jax.random.fold_in(jax.random.key(0), optimizer.step))

    def loss_fn(model, ctx):
        return ((model(x, ctx=ctx) - jnp.roll(x, 1, axis=1)) ** 2).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model, ctx)
    optimizer.update(model, grads)
    metrics.update(loss=loss)
    return loss


def digest(value):
    """A digest of every bit, the same in every process."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves([part.partition()[0] for part in value.values()]):
        found.update(np.asarray(multihost_utils.process_allgather(leaf, tiled=True)).tobytes())
    return found.hexdigest()


def fails(checkpointer, number, value):
    """What is raised where process 1 may write no file."""
    checkpointer.wait()  # for what is saved before
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if jax.process_index() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        checkpointer.save(number, value, force=True)
        checkpointer.wait()
    except nnx.CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return None


def main(out, checkpoints, steps, fail_at=0):
    shape = (2, 2) if len(jax.devices()) >= 4 else (1, 1)
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    rules = nnx.sharding_rules("combined", mesh)
    model, optimizer = nnx.sharded_init(create, mesh, rules)
    metrics = nnx.MultiMetric(loss=nnx.Average("loss"))
    kernel = model.mlp.layers[0].kernel
    record = {"held": [list(shard.data.shape) for shard in kernel.addressable_shards], "losses": {}}
    me, digests = jax.process_index(), Path(out, "digests")
    digests.mkdir(exist_ok=True)
    Path(out, f"pid-{me}").write_text(str(os.getpid()))
    file = Path(out) / f"{jax.process_count()}-{me}.json"
    placed = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    value = {"model": model, "optimizer": optimizer}
    with nnx.Checkpointer(checkpoints, save_every=2) as checkpointer:
        if not checkpointer.empty:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                record["from"] = checkpointer.restore(like=value).step
            record["said"] = [str(warning.message) for warning in caught if warning.category is nnx.CheckpointWarning]
            assert (digests / f"{record['from']}-{digest(value)}").exists(), "not what was saved"
        with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
            for number in range(int(optimizer.step), steps):
                batch = np.random.default_rng(number).normal(size=(16, 8)).astype(np.float32)
                share = jax.make_array_from_callback(batch.shape, placed, batch.__getitem__)
                record["losses"][number + 1] = float(step(model, optimizer, metrics, share))
                file.write_text(json.dumps(record))
                if number + 1 == fail_at:
                    record["failed"] = fails(checkpointer, fail_at, value)
                if checkpointer.should_save(number + 1):
                    (digests / f"{number + 1}-{digest(value)}").touch()
                    checkpointer.save(number + 1, value)
    record["average"] = float(metrics.compute()["loss"])
    file.write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
