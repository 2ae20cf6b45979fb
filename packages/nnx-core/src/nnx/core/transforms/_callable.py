"""What a lifted transform is applied to: a function, or a Module or bound method as a function of that Module."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from nnx.core._object import Object

__all__ = ["lift_callable"]


def lift_callable(f: Any, what: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Split a callable into a function and the Modules that it is bound to, which become its first arguments.

    Args:
        f: a function, a Module, a method bound to one (compiled or not), or any other callable.
        what: the transform, for the error.

    Raises:
        TypeError: `f` cannot be called.
    """
    if isinstance(f, Object):
        if not callable(f):
            raise TypeError(f"{what} takes a callable, and a {type(f).__name__} has no `__call__`")
        return type(f).__call__, (f,)
    if isinstance(f, types.MethodType) and isinstance(f.__self__, Object):
        return f.__func__, (f.__self__,)
    if not callable(f):
        raise TypeError(f"{what} takes a callable, got {type(f).__name__}")
    bound = getattr(f, "__self__", None)
    if isinstance(bound, Object) and hasattr(f, "__wrapped__"):  # a method that a transform has wrapped
        return f.__wrapped__, (bound,)
    return f, ()
