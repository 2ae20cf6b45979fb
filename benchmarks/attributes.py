"""What reading an attribute of a Module costs, against a plain Python class."""

from __future__ import annotations

import timeit
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

import nnx
from benchmarks._measure import Options, Side, Spread, Timing, alternate
from benchmarks._results import OURS, RAW, Result, results_of

READS = 100
"""Reads written out one after another, so that the loop around them costs nothing beside them."""
REPEATS = 100


class Plain:
    """What a Module is compared with."""

    def __init__(self) -> None:
        self.kernel = jnp.ones(3)
        self.rate = 0.5
        self.child = object()

    def method(self) -> None:
        """Be called."""


class Holder(nnx.Module):
    """The same as a Module."""

    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.ones(3))
        self.rate = 0.5
        self.child = nnx.Module()

    def method(self) -> None:
        """Be called."""


def measure(options: Options) -> Iterator[Result]:
    """A Variable, a plain attribute, a submodule, a method that does nothing."""
    cases = {"Variable": "kernel", "plain attribute": "rate", "submodule": "child", "method call": "method()"}
    for case, name in cases.items():
        sides = {RAW: _reads(Plain(), name), OURS: _reads(Holder(), name)}
        if options.rivals and case in ("Variable", "plain attribute"):
            from benchmarks._rivals import EQUINOX, FLAX, EquinoxHolder, FlaxHolder

            sides[FLAX] = _reads(FlaxHolder(), "kernel[...]" if case == "Variable" else name)
            sides[EQUINOX] = _reads(EquinoxHolder(jnp.ones(3), 0.5), name)
        timings = alternate(sides, rounds=options.rounds, round_seconds=options.round_seconds / 5)
        each = {
            library: Timing(Spread(*(part / READS / REPEATS for part in timing.seconds)), timing.ratio)
            for library, timing in timings.items()
        }
        yield from results_of("attributes", case, each)


def _reads(owner: Any, name: str) -> Side:
    timer = timeit.Timer("\n".join([f"owner.{name}"] * READS), "owner = held", globals={"held": owner})
    return lambda: timer.timeit(REPEATS)
