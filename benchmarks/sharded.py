"""What nnx.jit costs beside jax.jit where arrays lie on eight devices: `python -m benchmarks.sharded`.

Both sides run the same update of the same arrays, in turn, in one process. On a CPU,
`XLA_FLAGS=--xla_force_host_platform_device_count=8` makes the devices.
"""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

import nnx

ROUNDS, CALLS = 15, 20


class Net(nnx.Module):
    """`layers` Linear layers of two arrays each."""

    def __init__(self, layers: int, *, ctx: nnx.Context) -> None:
        self.layers = [nnx.Linear(16, 16, ctx=ctx) for _ in range(layers)]


@nnx.jit
def nnx_read(model: Net, x: jax.Array) -> jax.Array:
    """Use the first kernel."""
    return model.layers[0].kernel.sum() + x


@nnx.jit
def nnx_update(model: Net, x: jax.Array) -> None:
    """Change every array."""
    model.update_state(jax.tree.map(lambda leaf: leaf + x, model.partition()[0]))


@jax.jit
def jax_read(arrays: list[jax.Array], x: jax.Array) -> jax.Array:
    """Use one array."""
    return arrays[0].sum() + x


@jax.jit
def jax_update(arrays: list[jax.Array], x: jax.Array) -> list[jax.Array]:
    """Change every array."""
    return [array + x for array in arrays]


def measure(layers: int, devices: int) -> tuple[float, float]:
    """The ratios of a read and of an update, nnx over jax: medians over rounds."""
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    model = nnx.sharded_init(lambda: Net(layers, ctx=nnx.context(0)), mesh, nnx.sharding_rules("fsdp"))
    arrays = list(model.partition()[0].raw_values)
    x = jax.device_put(jnp.float32(1), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))

    def plain_update() -> None:
        arrays[:] = jax_update(arrays, x)

    pairs = (
        (lambda: nnx_read(model, x), lambda: jax_read(arrays, x)),
        (lambda: nnx_update(model, x), plain_update),
    )
    ratios = []
    for mine, plain in pairs:
        rounds = []
        for _ in range(ROUNDS + 2):
            times = []
            for call in (mine, plain):
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                jax.block_until_ready((arrays, model.partition()[0].raw_values))
                times.append(time.perf_counter() - start)
            rounds.append(times[0] / times[1])
        ratios.append(statistics.median(rounds[2:]))
    return ratios[0], ratios[1]


def main() -> None:
    """Measure and print."""
    print("| arrays | devices | read | update |\n| --- | --- | --- | --- |")
    for devices in (1, len(jax.devices())):
        for layers in (12, 96):
            read, update = measure(layers, devices)
            print(f"| {2 * layers} | {devices} | {read:.2f} | {update:.2f} |")


if __name__ == "__main__":
    main()
