"""A small training run as one of several processes: `program.py out checkpoints steps die_at`.

Writes the losses of this process by step to `out/<processes>-<process>.json`, and what it holds of the parameters.
"""

import json
import os
import signal
import sys
from pathlib import Path

from nnx.train.launch import initialize

several = initialize()

import jax  # noqa: E402 - after the processes have met
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
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


@nnx.jit
def step(model, optimizer, metrics, x):
    ctx = nnx.context(dropout=jax.random.fold_in(jax.random.key(0), optimizer.step))

    def loss_fn(model, ctx):
        return ((model(x, ctx=ctx) - jnp.roll(x, 1, axis=1)) ** 2).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model, ctx)
    optimizer.update(model, grads)
    metrics.update(loss=loss)
    return loss


def main(out, checkpoints, steps, die_at):
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rules = nnx.sharding_rules("combined", mesh)
    model, optimizer = nnx.sharded_init(create, mesh, rules)
    metrics = nnx.MultiMetric(loss=nnx.Average("loss"))
    kernel = model.mlp.layers[0].kernel
    record = {"held": [list(shard.data.shape) for shard in kernel.addressable_shards], "losses": {}}
    file = Path(out) / f"{jax.process_count()}-{jax.process_index()}.json"
    placed = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    value = {"model": model, "optimizer": optimizer}
    with nnx.Checkpointer(checkpoints, save_every=2) as checkpointer:
        if checkpointer.latest_step is not None:
            record["from"] = checkpointer.restore(like=value).step
        with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
            for number in range(int(optimizer.step), steps):
                batch = np.random.default_rng(number).normal(size=(16, 8)).astype(np.float32)
                share = jax.make_array_from_callback(batch.shape, placed, batch.__getitem__)
                record["losses"][number + 1] = float(step(model, optimizer, metrics, share))
                file.write_text(json.dumps(record))
                if number + 1 == die_at and jax.process_index() == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                checkpointer.save(number + 1, value)
    record["average"] = float(metrics.compute()["loss"])
    file.write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
