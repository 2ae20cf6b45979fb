"""Each layer compiled, forward and backward, against flax's for the same shapes: operations, FLOPs, bytes, and time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import nnx
from benchmarks._layer_cases import CASES, Case
from benchmarks._measure import Options, Spread, alternate
from benchmarks._results import OURS, Result

# The type before the operation has spaces in it if it is a tuple.
OPERATION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([a-z][a-z\-]*)\(", re.MULTILINE)
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
"""What costs nothing when it runs."""
ROUNDS = 9


def measure(options: Options) -> Iterator[Result]:
    """Nothing without the other libraries."""
    if not options.rivals:
        return
    from benchmarks._rivals import FLAX, flax_layer

    for name, case in CASES.items():
        x = case.inputs()
        state, run = _ours(case)
        flax_state, flax_run = flax_layer(case.flax, case.call)
        # Of the inputs too, as wherever a layer comes after another one.
        by = (0,) if case.dtype == "int32" else (0, 1)
        ours, flax = (
            jax.jit(jax.value_and_grad(_loss(function), argnums=by, has_aux=True)) for function in (run, flax_run)
        )
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
        return case.call(module, x), module.filter(nnx.BatchStat)

    return params, run


def _loss(run: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def loss(state: Any, x: jax.Array) -> Any:
        out, rest = run(state, x)
        return jnp.sum(jnp.square(out.astype(jnp.float32))), rest

    return loss


def _operations(compiled: Any) -> int:
    return sum(name not in FREE for name in OPERATION.findall(compiled.as_text()))


def _cost(name: str) -> Callable[[Any], float]:
    def cost(compiled: Any) -> float:
        analysis = compiled.cost_analysis()
        return float((analysis[0] if isinstance(analysis, list) else analysis)[name])

    return cost
