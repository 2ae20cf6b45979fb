"""`fit` in one of several processes, one of which is told to stop: `fit_program.py out`.

Writes where it stopped, and with which loss, to `out/<process>.json`.
"""

import json
import os
import signal
import sys
from pathlib import Path

from nnx.train.launch import initialize

initialize()

import jax  # noqa: E402 - after the processes have met
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

import nnx  # noqa: E402


@jax.jit
def step(state, batch):
    new = {"x": state["x"] + batch["y"].sum(), "n": state["n"] + 1}
    return new, {"loss": new["x"].mean()}


def main(out):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    zeros = np.zeros(4, np.float32)
    state = {"x": jax.make_array_from_callback((4,), split, zeros.__getitem__), "n": 0}
    data = nnx.ArrayLoader({"y": np.arange(8, dtype=np.float32)}, 2, seed=0, epochs=None)

    def told(state, batch):
        if state["n"] == 2 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        new, metrics = step(state, batch)
        return {"x": new["x"], "n": state["n"] + 1}, metrics

    with nnx.Checkpointer(Path(out, "saved"), save_every=100) as checkpointer:
        logger = nnx.CSVLogger(Path(out, "log.csv"))
        result = nnx.fit(told, state, data, steps=12, checkpointer=checkpointer, log_every=2, loggers=[logger])
    found = {"step": result.step, "signal": result.signal, "loss": result.metrics["loss"]}
    Path(out, f"{jax.process_index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
