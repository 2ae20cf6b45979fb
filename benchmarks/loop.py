"""What `fit` adds to a loop by hand, at a step of about a millisecond."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import nnx
from benchmarks._measure import Options, alternate
from benchmarks._results import OURS, RAW, Result, results_of

WIDTH, STEPS = 256, 100


def measure(options: Options) -> Iterator[Result]:
    """A hundred steps, with nothing logged but at the end."""

    @jax.jit
    def step(state: Any, x: jax.Array) -> Any:
        for _ in range(5):
            state = jnp.tanh(state @ x)
        return state, {"loss": state.sum()}

    start, x = jnp.ones((WIDTH, WIDTH)), jnp.ones((WIDTH, WIDTH)) / WIDTH

    def by_hand() -> jax.Array:
        state = start
        for _ in range(STEPS):
            state, metrics = step(state, x)
        float(metrics["loss"])
        return state

    def by_fit() -> jax.Array:
        result = nnx.fit(step, start, [x], steps=STEPS, log_every=STEPS, loggers=[])
        return result.state

    # A turn is one run of a tenth of a second, in which XLA's own threads make more difference than what is measured.
    timings = alternate({RAW: by_hand, OURS: by_fit}, rounds=4 * options.rounds, round_seconds=options.round_seconds)
    yield from results_of("loop", f"{STEPS} steps", timings)
