"""Result: one figure of one library, and the bounds that ours are held to."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks._measure import Spread, Timing

OURS = "nnx"
RAW = "raw JAX"


class Result(NamedTuple):
    """One figure.

    Attributes:
        benchmark: the file that measured it.
        case: what was measured.
        library: whose figure it is.
        value: the median, in `unit`.
        unit: "s" or "bytes", for one call.
        ratio: the ratio to the reference, with its quartiles.
        leaves: the number of arrays in the model, where the case is one of a series.
    """

    benchmark: str
    case: str
    library: str
    value: float
    unit: str
    ratio: Spread
    leaves: int | None = None


def results_of(benchmark: str, case: str, timings: dict[str, Timing], leaves: int | None = None) -> Iterable[Result]:
    """The results of one round of alternation."""
    for library, timing in timings.items():
        yield Result(benchmark, case, library, timing.seconds.median, "s", timing.ratio, leaves)


class Bound(NamedTuple):
    """The most that a figure of ours may be: a ratio to the reference, or seconds where `absolute`."""

    benchmark: str
    case: str
    most: float
    absolute: bool = False


BOUNDS = (
    Bound("dispatch", "read, 12 blocks*", 1.20),
    Bound("dispatch", "read, *", 1.15),
    Bound("dispatch", "update, *", 1.10),
    Bound("sharded", "read, 12 blocks*", 1.20),
    Bound("sharded", "read, *", 1.15),
    Bound("sharded", "update, *", 1.10),
    Bound("train_step", "lifted, *", 1.06),
    Bound("train_step", "TrainState, *", 1.15),
    Bound("trace", "trace and lower, *", 1.20),
    Bound("memory", "*", 1.00),
    Bound("attributes", "Variable", 0.25e-6 if sys.version_info >= (3, 12) else 1e-6, absolute=True),
    # What is the same bytecode on both sides still differs by a nanosecond between two runs of it.
    Bound("attributes", "*", 1.10),
    Bound("construction", "compilations *", 1.00),
    Bound("construction", "*", 2.00),
    Bound("checkpoint", "*MB*: the step is held up", 1.50),
    Bound("checkpoint", "*MB*: a whole save", 1.15),
    Bound("checkpoint", "*MB*: restore", 1.25),
    Bound("checkpoint", "*MB*: restore, unverified", 1.05),
    Bound("checkpoint", "*small*", 0.50),
    Bound("loop", "*", 1.02),
    Bound("layers", "*, operations", 1.00),
    Bound("layers", "*, FLOPs", 1.00),
    Bound("layers", "*, bytes", 1.00),
)
"""The first that fits holds. Benchmarks without one are measured for the record."""


def bound_of(result: Result) -> Bound | None:
    """The bound that holds for a result; None for other libraries and where there is no bound."""
    if result.library != OURS:
        return None
    for bound in BOUNDS:
        if bound.benchmark == result.benchmark and fnmatch.fnmatchcase(result.case, bound.case):
            return bound
    return None


def is_past(result: Result) -> bool:
    """Whether a result misses its bound."""
    bound = bound_of(result)
    if bound is None:
        return False
    return (result.value if bound.absolute else result.ratio.median) > bound.most
