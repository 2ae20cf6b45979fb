"""How long it takes until a new training step can be compiled: tracing it, and lowering it to StableHLO."""

from __future__ import annotations

from collections.abc import Iterator

import jax

import nnx
from benchmarks._measure import Options, Side, alternate
from benchmarks._models import data, lifted_step, raw_step, state_step
from benchmarks._results import OURS, RAW, Result, results_of

DEPTH, WIDTH = 48, 32
ROUNDS = 15
"""At most: a round takes seconds, and varies little."""


def measure(options: Options) -> Iterator[Result]:
    """Tracing alone, and both, in the lifted style and through TrainState."""
    rounds = min(options.rounds, ROUNDS)
    for lower in (False, True):
        what = f"trace{' and lower' if lower else ''}, {DEPTH} layers"
        sides = _sides(lower)
        state = sides.pop("TrainState")
        if options.rivals and lower:
            from benchmarks._rivals import lower_sides

            sides |= lower_sides(DEPTH, WIDTH)
        timings = alternate(sides, rounds=rounds, round_seconds=options.round_seconds, warm_up=1)
        yield from results_of("trace", f"{what}, lifted", timings)
        sides = {RAW: sides[RAW], OURS: state}
        timings = alternate(sides, rounds=rounds, round_seconds=options.round_seconds, warm_up=1)
        yield from results_of("trace", f"{what}, TrainState", timings)


def _sides(lower: bool) -> dict[str, Side]:
    x, y = data(WIDTH)
    raw, lifted, state = raw_step(DEPTH, WIDTH), lifted_step(DEPTH, WIDTH), state_step(DEPTH, WIDTH)

    def raw_side() -> None:
        jitted = jax.jit(raw.make())
        (jitted.lower if lower else jitted.trace)(*raw.arguments, x, y)

    def lifted_side() -> None:
        jitted = nnx.jit(lifted.make())
        (jitted.lower if lower else jitted.trace)(*lifted.arguments, x, y)

    def state_side() -> None:
        jitted = jax.jit(state.make())
        (jitted.lower if lower else jitted.trace)(*state.arguments, x, y)

    return {RAW: raw_side, OURS: lifted_side, "TrainState": state_side}
