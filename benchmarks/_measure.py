"""The alternating timer: several ways to do one thing, measured in turn in many short rounds of one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

Side = Callable[[], Any]
"""One way to do the thing: one call. What it returns is waited for at the end of a round."""


class Options(NamedTuple):
    """How long to measure, and against whom.

    Attributes:
        rounds: the number of rounds.
        round_seconds: how long the reference takes for one round.
        rivals: whether the other libraries are measured too.
        largest: the largest number of blocks of the dispatch benchmark.
    """

    rounds: int = 31
    round_seconds: float = 0.015
    rivals: bool = True
    largest: int = 768


QUICK = Options(rounds=9, round_seconds=0.01, rivals=False, largest=192)


class Spread(NamedTuple):
    """The median of the rounds and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Any) -> Spread:
        """The spread of some samples."""
        low, median, high = np.percentile(np.asarray(samples, dtype=float), (25, 50, 75))
        return cls(float(median), float(low), float(high))


class Timing(NamedTuple):
    """One side: seconds for one call, and the ratio to the reference within the same round."""

    seconds: Spread
    ratio: Spread


def alternate(
    sides: Mapping[str, Side], *, rounds: int, round_seconds: float, slowest: float = 4.0, warm_up: int = 3
) -> dict[str, Timing]:
    """Measure each side in turn with the reference.

    Each is paired with the reference alone, so that what the others leave in the processor's caches is nobody's matter,
    and the order within the pair is reversed from round to round. Both make the same number of calls, unless a side is
    so slow that its turn would take `slowest` times as long as the reference's: then as many as fit. Results are waited
    for once, at the end of a turn: calls overlap with the work that they started, as they do in a training loop.

    Args:
        sides: the sides by name; the first is the reference.
        rounds: the number of rounds for each pair.
        round_seconds: how long the reference takes in one round.
        slowest: how much longer any other side may take.
        warm_up: calls of each side before anything is measured.
    """
    (name, reference), *others = sides.items()
    once = _warm(reference, warm_up)
    calls = max(1, round(round_seconds / once))
    all_reference: list[float] = []
    timings: dict[str, Timing] = {}
    for other_name, other in others:
        other_calls = max(1, min(calls, round(slowest * calls * once / _warm(other, warm_up))))
        first: list[float] = []
        second: list[float] = []
        turns = [(reference, calls, first), (other, other_calls, second)]
        with no_collection():
            for _ in range(rounds):
                for side, count, seconds in turns:
                    seconds.append(_turn(side, count))
                turns.reverse()
        all_reference += first
        timings[other_name] = Timing(Spread.of(second), Spread.of(np.array(second) / np.array(first)))
    return {name: Timing(Spread.of(all_reference), Spread.of([1.0])), **timings}


def _warm(side: Side, calls: int) -> float:
    """Call a side until it is compiled, and give the seconds of a call."""
    for _ in range(calls):
        jax.block_until_ready(side())
    return min(_turn(side, 1) for _ in range(calls))


def _turn(side: Side, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        out = side()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


@contextmanager
def no_collection() -> Iterator[None]:
    """Leave the garbage collector out: it would bill one side for what another one left behind."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
