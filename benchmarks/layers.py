"""Each layer compiled, forward and backward, against flax's for the same shapes: operations, FLOPs, bytes, and time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
    from benchmarks._rivals import FLAX

    for name, case in CASES.items():
        ours, flax = sides(case)
        for what, (mine, theirs) in counts(ours, flax).items():
            unit = "bytes" if what == "bytes" else ""
            label = f"{name}, {what}"
            yield Result("layers", label, OURS, mine, unit, Spread.of([mine / theirs if theirs else 1.0]))
            yield Result("layers", label, FLAX, theirs, unit, Spread.of([1.0]))
        timings = alternate(
            {FLAX: lambda f=flax: f.function(*f.arguments), OURS: lambda f=ours: f.function(*f.arguments)},
            rounds=min(options.rounds, ROUNDS),
            round_seconds=options.round_seconds,
        )
        for library in (OURS, FLAX):
            timing = timings[library]
            yield Result("layers", f"{name}, time", library, timing.seconds.median, "s", timing.ratio)


class Compared(NamedTuple):
    """One library's side of a case: what is compiled, and what it is called with."""

    function: Any
    arguments: tuple[Any, ...]


def sides(case: Case) -> tuple[Compared, Compared]:
    """Output, gradients and updated state of our layer and of flax's, by parameters, streams and inputs."""
    from benchmarks._rivals import flax_layer

    x = case.inputs()
    # Of the inputs too, as wherever a layer comes after another one.
    by = (0,) if case.dtype == "int32" else (0, 2)
    ours, flax = (
        Compared(jax.jit(jax.value_and_grad(_loss(run), argnums=by, has_aux=True)), (params, streams, x))
        for params, streams, run in (_ours(case), flax_layer(case.flax, case.call, draws=case.draws))
    )
    return ours, flax


def counts(*sides: Compared) -> dict[str, list[float]]:
    """The operations of the optimized HLO, the FLOPs and the bytes accessed, of each side."""
    compiled = [side.function.lower(*side.arguments).compile() for side in sides]
    cost = {"operations": _operations, "FLOPs": _cost("flops"), "bytes": _cost("bytes accessed")}
    return {what: [count(one) for one in compiled] for what, count in cost.items()}


def _ours(case: Case) -> tuple[Any, Any, Callable[..., Any]]:
    (params, rest), moduledef = case.ours(nnx.context(0)).partition(nnx.Param, ...)
    streams, contextdef = (nnx.context(dropout=1) if case.draws else nnx.context()).partition()

    def run(params: Any, streams: Any, x: jax.Array) -> Any:
        module, ctx = moduledef.merge(params, rest), contextdef.merge(streams)
        out = case.call(module, x, **({"ctx": ctx} if case.draws else {}))
        return out, (module.filter(nnx.BatchStat), ctx.partition()[0])

    return params, streams, run


def _loss(run: Callable[..., Any]) -> Callable[..., Any]:
    def loss(params: Any, streams: Any, x: jax.Array) -> Any:
        out, rest = run(params, streams, x)
        return jnp.sum(jnp.square(out.astype(jnp.float32))), rest

    return loss


def _operations(compiled: Any) -> int:
    return sum(name not in FREE for name in OPERATION.findall(compiled.as_text()))


def _cost(name: str) -> Callable[[Any], float]:
    def cost(compiled: Any) -> float:
        analysis = compiled.cost_analysis()
        return float((analysis[0] if isinstance(analysis, list) else analysis)[name])

    return cost
