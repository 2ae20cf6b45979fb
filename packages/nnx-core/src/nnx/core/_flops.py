"""FLOPs of a traced computation, counted from its jaxpr: nothing is compiled and nothing is run."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["TOTAL", "Counted", "count_flops", "scope"]

TOTAL = -1
"""The key of the whole computation among those of its scopes."""

_SCOPE = re.compile(r"nnx-row-(\d+)-(\d+)")

# fmt: off
# One operation for each element of the output.
_ELEMENTWISE = frozenset({
    "abs", "acos", "acosh", "add", "add_any", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp",
    "cos", "cosh", "digamma", "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "integer_pow",
    "lgamma", "log", "log1p", "logistic", "max", "min", "mul", "neg", "nextafter", "pow", "rem", "round", "rsqrt",
    "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh",
})
# One for each element of the input.
_REDUCING = frozenset({
    "argmax", "argmin", "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "reduce_and", "reduce_max",
    "reduce_min", "reduce_or", "reduce_prod", "reduce_sum", "reduce_window_max", "reduce_window_min",
    "reduce_window_sum",
})
# fmt: on


class Counted(NamedTuple):
    """What a jaxpr does: operations by scope, the whole under `TOTAL`, and which calls of a scope are in it."""

    flops: Counter[int]
    calls: dict[int, set[int]]


def scope(number: int, call: int) -> Any:
    """A context manager: what is traced inside counts for this number too, as the call of that number."""
    return jax.named_scope(f"nnx-row-{number}-{call}")


def count_flops(jaxpr: Any) -> Counted:
    """Count the floating-point operations of a jaxpr.

    A multiplication with an addition counts two, any other arithmetic one for each element, data movement nothing. The
    body of a scan counts once for each step; that of a `while_loop`, whose steps nobody knows, once; of the branches of
    a `cond` the dearest.

    Args:
        jaxpr: a jaxpr, closed or open.

    Returns:
        The count for each `scope`, and for the whole under `TOTAL`.
    """
    calls: dict[int, set[int]] = {}
    return Counted(_count(getattr(jaxpr, "jaxpr", jaxpr), frozenset((TOTAL,)), calls), calls)


def _count(jaxpr: Any, outer: frozenset[int], calls: dict[int, set[int]]) -> Counter[int]:
    total: Counter[int] = Counter()
    for eqn in jaxpr.eqns:
        # The names of a jaxpr inside of another start anew, so those around it are handed in.
        scopes = [(int(number), int(call)) for number, call in _SCOPE.findall(str(eqn.source_info.name_stack))]
        for number, call in scopes:
            calls.setdefault(number, set()).add(call)
        owners = outer.union(number for number, _ in scopes)
        own = _own(eqn)
        if own is not None:
            for owner in owners:
                total[owner] += own
            continue
        inside = [_count(inner, owners, calls) for inner in _inner(eqn.params)]
        if eqn.primitive.name == "cond" and inside:
            inside = [max(inside, key=lambda branch: branch[TOTAL])]
        times = _times(eqn)
        for part in inside:
            for owner, flops in part.items():
                total[owner] += flops * times
    return total


def _times(eqn: Any) -> int:
    if eqn.primitive.name == "scan":
        return int(eqn.params["length"])
    if eqn.primitive.name == "shard_map":
        return int(eqn.params["mesh"].size)
    return 1


def _own(eqn: Any) -> int | None:
    """The operations of one equation; None if what it does stands in jaxprs of its own."""
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2 * _size(eqn.outvars[0]) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        return 2 * _size(eqn.outvars[0]) * (math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]])
    if name in _ELEMENTWISE:
        return _size(eqn.outvars[0]) if _floating(eqn.outvars[0]) else 0
    if name in _REDUCING:
        window = math.prod(eqn.params.get("window_dimensions", (1,)))
        counted = _size(eqn.outvars[0]) * window if window > 1 else _size(eqn.invars[0])
        return counted if _floating(eqn.invars[0]) else 0
    if name in ("scatter-add", "scatter_add", "scatter_mul"):
        return _size(eqn.invars[2]) if _floating(eqn.invars[2]) else 0
    return None


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _floating(variable: Any) -> bool:
    return bool(jnp.issubdtype(variable.aval.dtype, jnp.inexact))


def _inner(params: Any) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            found = getattr(item, "jaxpr", item)
            if hasattr(found, "eqns"):
                yield found
