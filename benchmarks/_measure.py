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
    """Measure sides in turn.

    Every side makes as many calls in a round as the reference does, unless it is so slow that this would take `slowest`
    times as long: then as many as fit. Results are waited for once, at the end of a side's turn, so that calls overlap
    with the work that they started, as they do in a training loop. The order is reversed from round to round, so no
    side always finds in the processor's caches what the same other one left there.

    Args:
        sides: the sides by name; the first is the reference.
        rounds: the number of rounds.
        round_seconds: how long the reference takes in one round.
        slowest: how much longer any other side may take in one round.
        warm_up: calls of each side before anything is measured.
    """
    calls: dict[str, int] = {}
    for name, side in sides.items():
        for _ in range(warm_up):
            jax.block_until_ready(side())
        once = min(_turn(side, 1) for _ in range(3))
        if not calls:
            budget, wanted = round_seconds * slowest, max(1, round(round_seconds / once))
        calls[name] = max(1, min(wanted, round(budget / once)))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    with no_collection():
        for _ in range(rounds):
            for name in order:
                seconds[name].append(_turn(sides[name], calls[name]))
            order.reverse()
    reference = np.array(seconds[next(iter(sides))])
    return {name: Timing(Spread.of(taken), Spread.of(np.array(taken) / reference)) for name, taken in seconds.items()}


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
