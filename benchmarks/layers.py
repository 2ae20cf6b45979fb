"""Each layer compiled, forward and backward, against flax's for the same shapes: operations, FLOPs, bytes, and time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import nnx
from benchmarks._measure import Options, Spread, alternate
from benchmarks._results import OURS, Result

OPERATION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = \S+ ([a-z\-]+)\(", re.MULTILINE)
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
"""What costs nothing when it runs."""
ROUNDS = 9


class Case(NamedTuple):
    """A layer of both libraries.

    Attributes:
        ours: makes ours, given a Context.
        flax: makes flax's, given its module and its Rngs.
        shape: the shape of the input.
        integers: whether the input is of integers.
    """

    ours: Callable[[nnx.Context], Any]
    flax: Callable[[Any, Any], Any]
    shape: tuple[int, ...]
    integers: bool = False


CASES = {
    "Linear": Case(lambda ctx: nnx.Linear(128, 128, ctx=ctx), lambda f, rngs: f.Linear(128, 128, rngs=rngs), (64, 128)),
    "LinearGeneral": Case(
        lambda ctx: nnx.LinearGeneral(128, (4, 32), ctx=ctx),
        lambda f, rngs: f.LinearGeneral(128, (4, 32), rngs=rngs),
        (64, 128),
    ),
    "Embed": Case(
        lambda ctx: nnx.Embed(1000, 64, ctx=ctx), lambda f, rngs: f.Embed(1000, 64, rngs=rngs), (16, 32), integers=True
    ),
    "Conv": Case(
        lambda ctx: nnx.Conv(16, 32, (3, 3), ctx=ctx),
        lambda f, rngs: f.Conv(16, 32, (3, 3), rngs=rngs),
        (8, 16, 16, 16),
    ),
    "BatchNorm": Case(
        lambda ctx: nnx.BatchNorm(64, use_running_average=False, ctx=ctx),
        lambda f, rngs: f.BatchNorm(64, use_running_average=False, rngs=rngs),
        (256, 64),
    ),
    "LayerNorm": Case(lambda ctx: nnx.LayerNorm(128, ctx=ctx), lambda f, rngs: f.LayerNorm(128, rngs=rngs), (64, 128)),
    "RMSNorm": Case(lambda ctx: nnx.RMSNorm(128, ctx=ctx), lambda f, rngs: f.RMSNorm(128, rngs=rngs), (64, 128)),
    "GroupNorm": Case(
        lambda ctx: nnx.GroupNorm(64, num_groups=8, ctx=ctx),
        lambda f, rngs: f.GroupNorm(64, num_groups=8, rngs=rngs),
        (16, 32, 64),
    ),
    "MultiHeadAttention": Case(
        lambda ctx: nnx.MultiHeadAttention(4, 64, ctx=ctx),
        lambda f, rngs: f.MultiHeadAttention(num_heads=4, in_features=64, decode=False, rngs=rngs),
        (8, 32, 64),
    ),
    "LSTM": Case(
        lambda ctx: nnx.RNN(nnx.OptimizedLSTMCell(32, 64, ctx=ctx)),
        lambda f, rngs: f.RNN(f.OptimizedLSTMCell(32, 64, rngs=rngs), rngs=rngs),
        (8, 16, 32),
    ),
    "GRU": Case(
        lambda ctx: nnx.RNN(nnx.GRUCell(32, 64, ctx=ctx)),
        lambda f, rngs: f.RNN(f.GRUCell(32, 64, rngs=rngs), rngs=rngs),
        (8, 16, 32),
    ),
}


def measure(options: Options) -> Iterator[Result]:
    """Nothing without the other libraries."""
    if not options.rivals:
        return
    from benchmarks._rivals import FLAX, flax_layer

    for name, case in CASES.items():
        x = jax.random.normal(jax.random.key(0), case.shape)
        if case.integers:
            x = jnp.abs(x * 100).astype(jnp.int32)
        state, run = _ours(case)
        flax_state, flax_run = flax_layer(case.flax)
        ours, flax = (jax.jit(jax.value_and_grad(_loss(function), has_aux=True)) for function in (run, flax_run))
        compiled = ours.lower(state, x).compile(), flax.lower(flax_state, x).compile()
        for what, count in (("operations", _operations), ("FLOPs", _cost("flops")), ("bytes", _cost("bytes accessed"))):
            mine, theirs = map(count, compiled)
            unit = "bytes" if what == "bytes" else ""
            label = f"{name}, {what}"
            yield Result("layers", label, OURS, mine, unit, Spread.of([mine / theirs if theirs else 1.0]))
            yield Result("layers", label, FLAX, theirs, unit, Spread.of([1.0]))
        timings = alternate(
            {FLAX: lambda f=flax, s=flax_state, x=x: f(s, x), OURS: lambda f=ours, s=state, x=x: f(s, x)},
            rounds=min(options.rounds, ROUNDS),
            round_seconds=options.round_seconds,
        )
        for library in (OURS, FLAX):
            timing = timings[library]
            yield Result("layers", f"{name}, time", library, timing.seconds.median, "s", timing.ratio)


def _ours(case: Case) -> tuple[Any, Callable[[Any, Any], Any]]:
    (params, rest), moduledef = case.ours(nnx.context(0)).partition(nnx.Param, ...)

    def run(params: Any, x: jax.Array) -> Any:
        module = moduledef.merge(params, rest)
        return module(x), module.filter(nnx.BatchStat)

    return params, run


def _loss(run: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def loss(state: Any, x: jax.Array) -> Any:
        out, rest = run(state, x)
        return jnp.sum(out * out), rest

    return loss


def _operations(compiled: Any) -> int:
    return sum(name not in FREE for name in OPERATION.findall(compiled.as_text()))


def _cost(name: str) -> Callable[[Any], float]:
    def cost(compiled: Any) -> float:
        analysis = compiled.cost_analysis()
        return float((analysis[0] if isinstance(analysis, list) else analysis)[name])

    return cost
