"""What a call costs where arrays lie on eight devices: the reads and updates of `dispatch`, on a model split by FSDP.

The devices are forced ones of the CPU, which only a process of its own can have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nnx
from benchmarks._measure import Options, Spread, alternate
from benchmarks._models import Blocks
from benchmarks._results import Result, results_of
from benchmarks.dispatch import own_read_sides, own_update_sides

DEVICES = 8
SIZES = (12, 48, 192)
"""Blocks, of four arrays each."""


def measure(options: Options) -> Iterator[Result]:
    """Read and update, by number of blocks."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    program = [sys.executable, "-m", "benchmarks.sharded", json.dumps(options._asdict())]
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    output = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
    for line in output.splitlines():
        row = json.loads(line)
        yield Result(**{**row, "ratio": Spread(*row["ratio"])})


def measure_here(options: Options) -> Iterator[Result]:
    """The same in this process, which has the devices."""
    mesh = jax.make_mesh((DEVICES,), ("fsdp",), axis_types=(AxisType.Auto,))
    rules = nnx.sharding_rules("fsdp", mesh)
    x = jax.device_put(jnp.ones((2, 8)), NamedSharding(mesh, PartitionSpec()))
    for blocks in SIZES:
        model = Blocks(blocks, ctx=nnx.context(0))
        # Not born in shards, which would compile one function of a thousand random draws.
        state = model.partition()[0]
        model.update_state(jax.device_put(state, nnx.get_named_sharding(state, mesh, rules)))
        read = own_read_sides(model, x, lambda x: x + 1)
        leaves = [jnp.copy(leaf) for leaf in jax.tree.leaves(model.partition()[0])]
        for kind, sides in (("read", read), ("update", own_update_sides(leaves, model, x))):
            timings = alternate(sides, rounds=options.rounds, round_seconds=options.round_seconds)
            yield from results_of("sharded", f"{kind}, {blocks} blocks on {DEVICES} devices", timings)


if __name__ == "__main__":
    for result in measure_here(Options(**json.loads(sys.argv[1]))):
        sys.stdout.write(json.dumps(result._asdict()) + "\n")
        sys.stdout.flush()
