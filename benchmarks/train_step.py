"""What a whole training step with adam costs, against one written by hand with `jax.jit` and optax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

import nnx
from benchmarks._measure import Options, Side, alternate
from benchmarks._models import data, lifted_step, raw_step, state_step
from benchmarks._results import OURS, RAW, Result, results_of

SIZES = ((4, 32), (24, 32), (24, 256))
"""Layers and their width."""


def measure(options: Options) -> Iterator[Result]:
    """The lifted style and TrainState, donated and not."""
    for depth, width in SIZES:
        for donate in (False, True):
            case = f"MLP {depth}x{width}, {'donated' if donate else 'not donated'}"
            sides = {RAW: _raw(depth, width, donate), OURS: _lifted(depth, width, donate)}
            if options.rivals:
                from benchmarks._rivals import train_sides

                sides |= train_sides(depth, width, donate=donate)
            timings = alternate(sides, rounds=options.rounds, round_seconds=options.round_seconds)
            yield from results_of("train_step", f"lifted, {case}", timings)
            sides = {RAW: _raw(depth, width, donate), OURS: _train_state(depth, width, donate)}
            timings = alternate(sides, rounds=options.rounds, round_seconds=options.round_seconds)
            yield from results_of("train_step", f"TrainState, {case}", timings)


def _raw(depth: int, width: int, donate: bool) -> Side:
    make, (layers, opt_state) = raw_step(depth, width)
    x, y = data(width)
    step = jax.jit(make(), donate_argnums=(0, 1) if donate else ())

    def side() -> jax.Array:
        nonlocal layers, opt_state
        layers, opt_state, loss = step(layers, opt_state, x, y)
        return loss

    return side


def _lifted(depth: int, width: int, donate: bool) -> Side:
    make, (model, optimizer) = lifted_step(depth, width)
    x, y = data(width)
    options: dict[str, Any] = {"donate_argnums": (0, 1)} if donate else {}
    step = nnx.jit(make(), **options)
    return lambda: step(model, optimizer, x, y)


def _train_state(depth: int, width: int, donate: bool) -> Side:
    make, (state,) = state_step(depth, width)
    x, y = data(width)
    step = jax.jit(make(), donate_argnums=(0,) if donate else ())

    def side() -> jax.Array:
        nonlocal state
        state, loss = step(state, x, y)
        return loss

    return side
