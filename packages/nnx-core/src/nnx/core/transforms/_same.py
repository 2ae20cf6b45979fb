"""Whether two traces of one function compute the same: compared equation by equation, as far as that can be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

__all__ = ["same_computation"]


def same_computation(
    one: ClosedJaxpr, other: ClosedJaxpr, inputs: Sequence[tuple[int, int]], outputs: Sequence[tuple[Any, Any]]
) -> bool:
    """Compare two jaxprs.

    Args:
        one: a jaxpr.
        other: another.
        inputs: the numbers of the inputs that are the same in both. An input that is in no pair must not be used.
        outputs: pairs of variables or literals, one of each jaxpr, that are to have the same value.

    Returns:
        True if they surely compute the same; False if they do not, or if it cannot be told.
    """
    return _Comparison(one.jaxpr, other.jaxpr, one.consts, other.consts, inputs).holds(outputs)


class _Comparison:
    __slots__ = ("consts", "jaxprs", "names")

    def __init__(self, one: Any, other: Any, consts: Any, other_consts: Any, inputs: Sequence[tuple[int, int]]) -> None:
        self.jaxprs = one, other
        self.names = {one.invars[i]: other.invars[j] for i, j in inputs}
        self.consts = (
            dict(zip(one.constvars, consts, strict=True)),
            dict(zip(other.constvars, other_consts, strict=True)),
        )

    def holds(self, outputs: Sequence[tuple[Any, Any]]) -> bool:
        one, other = self.jaxprs
        if len(one.eqns) != len(other.eqns):
            return False
        for a, b in zip(one.eqns, other.eqns, strict=True):
            if a.primitive is not b.primitive or len(a.invars) != len(b.invars) or len(a.outvars) != len(b.outvars):
                return False
            if not all(map(self._equal, a.invars, b.invars)) or not _same_params(a.params, b.params):
                return False
            self.names.update(zip(a.outvars, b.outvars, strict=True))
        return all(self._equal(a, b) for a, b in outputs)

    def _equal(self, a: Any, b: Any) -> bool:
        if isinstance(a, Literal) or isinstance(b, Literal):
            return isinstance(a, Literal) and isinstance(b, Literal) and a.aval == b.aval and _same_value(a.val, b.val)
        consts, other_consts = self.consts
        if a in consts or b in other_consts:
            return a in consts and b in other_consts and _same_value(consts[a], other_consts[b])
        return self.names.get(a) is b


def _same_value(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False
    plain = (np.ndarray, np.generic, bool, int, float, complex)
    if not isinstance(a, plain) or not isinstance(b, plain):
        return False  # to compare arrays on a device would wait for them
    x, y = np.asarray(a), np.asarray(b)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def _same_params(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_same_params(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same_params, a, b))
    if isinstance(a, ClosedJaxpr):
        return isinstance(b, ClosedJaxpr) and _same_jaxprs(a.jaxpr, b.jaxpr, a.consts, b.consts)
    if isinstance(a, Jaxpr):
        return isinstance(b, Jaxpr) and _same_jaxprs(a, b, (), ())
    if type(a) is type(b) and (callable(a) or hasattr(a, "call_wrapped")):
        return True  # the rule of a custom derivative, made anew with each trace; the function itself is compared
    return _same_value(a, b) or (type(a) is type(b) and not isinstance(a, jax.Array) and bool(a == b))


def _same_jaxprs(a: Any, b: Any, consts: Any, other_consts: Any) -> bool:
    if len(a.invars) != len(b.invars) or len(a.outvars) != len(b.outvars):
        return False
    inputs = [(i, i) for i in range(len(a.invars))]
    return _Comparison(a, b, consts, other_consts, inputs).holds(list(zip(a.outvars, b.outvars, strict=True)))
