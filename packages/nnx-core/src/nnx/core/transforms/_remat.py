"""remat: what a function computes is computed again for its gradient, and its changes come out once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, overload

import jax

from nnx.core.transforms._callable import lift_callable
from nnx.core.transforms._inputs import Call
from nnx.core.transforms._lift import refuse_static
from nnx.core.transforms._outcome import finish
from nnx.core.transforms._staging import Operands, content_of, stage

__all__ = ["remat"]

P = ParamSpec("P")
R = TypeVar("R")


@overload
def remat(
    f: Callable[P, R],
    /,
    *,
    policy: Callable[..., bool] | None = None,
    prevent_cse: bool = True,
    static_argnums: int | Sequence[int] = (),
) -> Callable[P, R]: ...
@overload
def remat(
    f: None = None,
    /,
    *,
    policy: Callable[..., bool] | None = None,
    prevent_cse: bool = True,
    static_argnums: int | Sequence[int] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def remat(
    f: Any = None,
    /,
    *,
    policy: Callable[..., bool] | None = None,
    prevent_cse: bool = True,
    static_argnums: int | Sequence[int] = (),
) -> Any:
    """Make a function that keeps less for its gradient and computes it again there, as `jax.checkpoint` does.

    State that the function writes comes out once, and what is computed again draws the same random keys.

    Args:
        f: a function of Modules, Contexts and arrays; a Module or a bound method of one is lifted together with that
            Module. Without it, a decorator.
        policy: what may be kept; one of `jax.checkpoint_policies`.
        prevent_cse: as for `jax.checkpoint`; False inside of a scan.
        static_argnums: arguments that the function sees as they are. Strings, flags, functions and the like always
            are.

    Returns:
        A function of the same arguments.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.w = nnx.Param(jnp.float32(3))
        >>> loss = nnx.remat(lambda m, x: jnp.sin(m.w * x) ** 2)
        >>> float(nnx.grad(loss)(Scale(), 0.0)["w"].value)
        0.0
    """
    if f is None:
        return functools.partial(remat, policy=policy, prevent_cse=prevent_cse, static_argnums=static_argnums)
    function, bound = lift_callable(f, "nnx.remat")
    numbers = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)

    @functools.wraps(function, updated=())
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        still = {n % len(args) if args else n: args[n] for n in numbers if -len(args) <= n < len(args)}
        refuse_static("nnx.remat", "static_argnums", list(still.values()))
        moving = [None if i in still else arg for i, arg in enumerate(args)]
        shifted = {n + len(bound): value for n, value in still.items()}
        implementation = functools.partial(_remat, function, policy, prevent_cse, shifted)
        key = (policy, prevent_cse, content_of(shifted))
        return stage("nnx.remat", (function,), key, implementation, (*bound, *moving), kwargs)

    return wrapper


def _remat(function: Any, policy: Any, prevent_cse: bool, still: dict[int, Any], *args: Any, **kwargs: Any) -> Any:
    call = Call(args, kwargs)
    operands = Operands(call)

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*[still.get(i, arg) for i, arg in enumerate(args)], **kwargs)

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=prevent_cse)
    def body(dynamic: Any) -> Any:
        return call.run(run, operands.leaves(dynamic))

    out, values, outcome = body(operands.dynamic)
    return finish(call.frame, out, values, outcome)
