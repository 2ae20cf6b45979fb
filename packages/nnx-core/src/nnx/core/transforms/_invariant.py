"""What in a loop's body depends on no run of it: found in the jaxpr, and computed once outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from nnx.core.transforms._staging import zeros_of

__all__ = ["hoisted", "used_constants", "varying"]


def varying(closed: ClosedJaxpr) -> list[bool]:
    """For each output of a jaxpr whether it depends on any of its inputs."""
    jaxpr = closed.jaxpr
    tainted = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if eqn.effects or any(not isinstance(var, Literal) and var in tainted for var in eqn.invars):
            tainted.update(eqn.outvars)
    return [not isinstance(var, Literal) and var in tainted for var in jaxpr.outvars]


def used_constants(closed: ClosedJaxpr) -> list[Any]:
    """The constants that the outputs of a jaxpr are computed from."""
    jaxpr = closed.jaxpr
    needed = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(var for var in eqn.invars if not isinstance(var, Literal))
    return [value for var, value in zip(jaxpr.constvars, closed.consts, strict=True) if var in needed]


def hoisted(closed: ClosedJaxpr, outputs: Sequence[int]) -> list[Any]:
    """Compute some outputs of a jaxpr that depend on none of its inputs."""
    jaxpr = closed.jaxpr
    outvars = [jaxpr.outvars[i] for i in outputs]
    needed = {var for var in outvars if not isinstance(var, Literal)}
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            eqns.append(eqn)
            needed.update(var for var in eqn.invars if not isinstance(var, Literal))
    part = jaxpr.replace(eqns=eqns[::-1], outvars=outvars, effects=frozenset(), debug_info=_without_results(jaxpr))
    return list(jaxpr_as_fun(ClosedJaxpr(part, closed.consts))(*[zeros_of(var.aval) for var in jaxpr.invars]))


def _without_results(jaxpr: Any) -> Any:
    info = jaxpr.debug_info
    return info._replace(result_paths=None) if info is not None else None
