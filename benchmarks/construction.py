"""How long it takes to make a model of 1,000 Modules, against the `jax.random` calls in it."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

import nnx
from benchmarks._measure import Options, Side, Spread, alternate
from benchmarks._models import MLP
from benchmarks._results import OURS, RAW, Result, results_of

LAYERS, WIDTH = 998, 8
"""With the MLP itself and its Sequence, 1,000 Modules."""
JITTED_LAYERS = 50
"""XLA compiles each random call by itself, which for 1,000 takes minutes on every side."""
ROUNDS = 9


def measure(options: Options) -> Iterator[Result]:
    """Outside of a trace by time; under `nnx.jit` by the number of compilations."""
    sides: dict[str, Side] = {RAW: _random_calls, OURS: lambda: _drop(MLP(LAYERS, WIDTH, ctx=nnx.context(0)))}
    if options.rivals:
        from benchmarks._rivals import make_mlps

        sides |= make_mlps(LAYERS, WIDTH)
    timings = alternate(sides, rounds=min(options.rounds, ROUNDS), round_seconds=options.round_seconds, warm_up=1)
    yield from results_of("construction", f"{LAYERS + 2} Modules", timings)

    traces = 0

    @nnx.jit
    def make(ctx: nnx.Context) -> MLP:
        nonlocal traces
        traces += 1
        return MLP(JITTED_LAYERS, WIDTH, ctx=ctx)

    for seed in range(3):
        make(nnx.context(seed))
    yield Result(
        "construction", "compilations of a jitted constructor called 3 times", OURS, traces, "", Spread.of([traces])
    )


def _random_calls() -> list[jax.Array]:
    """One key and one kernel for each layer. The biases take no random numbers, so they are not in it."""
    key = jax.random.key(0)
    return [
        jax.random.truncated_normal(jax.random.fold_in(key, i), -2.0, 2.0, (WIDTH, WIDTH), jnp.float32)
        for i in range(LAYERS)
    ]


def _drop(_: object) -> None:
    """A Module is no pytree, and cannot be waited for."""
