"""The memory of a compiled training step: its temporaries and its outputs, by `memory_analysis`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

import nnx
from benchmarks._measure import Options, Spread
from benchmarks._models import MLP, RematMLP, data, lifted_step, raw_mlp, raw_remat_mlp, raw_step, state_step
from benchmarks._results import OURS, RAW, Result

DEPTH, WIDTH, BATCH = 24, 64, 512
"""A batch large enough for the activations to outweigh the parameters, which remat is about."""


def measure(options: Options) -> Iterator[Result]:
    """With and without remat, donated and not."""
    x, y = data(WIDTH, BATCH)
    for name, kind, model in (("plain", MLP, raw_mlp), ("remat", RematMLP, raw_remat_mlp)):
        # Both count their steps, or four bytes would differ.
        raw, lifted = raw_step(DEPTH, WIDTH, model, counted=True), lifted_step(DEPTH, WIDTH, kind)
        state = state_step(DEPTH, WIDTH, kind)
        for donate in (False, True):
            both: dict[str, Any] = {"donate_argnums": (0, 1)} if donate else {}
            one: dict[str, Any] = {"donate_argnums": (0,)} if donate else {}
            reference = _bytes(jax.jit(raw.make(), **both).lower(*raw.arguments, x, y))
            case = f"{name}, {'donated' if donate else 'not donated'}"
            found = {
                "lifted": _bytes(nnx.jit(lifted.make(), **both).lower(*lifted.arguments, x, y)),
                "TrainState": _bytes(jax.jit(state.make(), **one).lower(*state.arguments, x, y)),
            }
            for style, size in found.items():
                yield Result("memory", f"{style}, {case}", RAW, reference, "bytes", Spread.of([1.0]))
                yield Result("memory", f"{style}, {case}", OURS, size, "bytes", Spread.of([size / reference]))


def _bytes(lowered: Any) -> int:
    analysis = lowered.compile().memory_analysis()
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)
