"""Train the sharded transformer by every recipe and draw the losses: `python docs/pictures/recipes.py`.

It takes eight devices; on a CPU, `XLA_FLAGS=--xla_force_host_platform_device_count=8` makes them. It writes
`recipes.png` beside this file, and prints how far each curve is from that of one device.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from nnx.examples.transformer_sharded import make_mesh, run

STEPS = 60
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
RUNS = {
    "one device": ({"data": 1}, "data_parallel", "auto"),
    "data parallel, 8": ({"data": 8}, "data_parallel", "auto"),
    "FSDP, 8": ({"fsdp": 8}, "fsdp", "auto"),
    "tensor parallel, 4": ({"tensor": 4}, "tensor_parallel", "auto"),
    "combined, 2 x 2 x 2": (CUBE, "combined", "auto"),
    "sequence parallel, 2 x 2 x 2": (CUBE, "sequence_parallel", "auto"),
    "combined, explicit axes": (CUBE, "combined", "explicit"),
}


def main() -> None:
    """Run and draw."""
    curves = {
        name: np.asarray(run(make_mesh(sizes, axes), recipe, steps=STEPS, dropout=0.1))
        for name, (sizes, recipe, axes) in RUNS.items()
    }
    reference = curves["one device"]
    figure, (losses, differences) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    steps = np.arange(1, STEPS + 1)
    for i, (name, curve) in enumerate(curves.items()):
        # Wide to narrow, so that each is seen under the next.
        losses.plot(steps, curve, label=name, linewidth=9 - 1.2 * i, alpha=0.75)
        if name != "one device":
            apart = np.abs(curve - reference) / reference
            differences.semilogy(steps, np.maximum(apart, 1e-9), label=name)
            sys.stdout.write(f"{name}: at most {apart.max():.1e} apart\n")
    losses.set(xlabel="step", ylabel="loss (nats per pixel)", title="The losses of every recipe")
    losses.legend(fontsize=8)
    differences.set(xlabel="step", ylabel="relative difference", title="Apart from one device, in float32")
    differences.legend(fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
