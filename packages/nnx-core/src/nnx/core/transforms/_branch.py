"""cond and switch: one of several functions runs, and whatever it changes comes out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from nnx.core.transforms._callable import lift_callable
from nnx.core.transforms._inputs import Call
from nnx.core.transforms._join import Join
from nnx.core.transforms._lift import is_object
from nnx.core.transforms._outcome import finish
from nnx.core.transforms._staging import Once, Operands, stage

__all__ = ["cond", "switch"]

R = TypeVar("R")


def cond(pred: Any, true_fun: Callable[..., R], false_fun: Callable[..., R], *operands: Any) -> R:
    """Call one of two functions on Modules, Contexts and arrays, as `jax.lax.cond` does.

    What the function that runs writes comes out in place; the other's values stay as they were. Random streams advance
    by what the branch that draws most draws, whichever runs.

    Args:
        pred: a boolean scalar.
        true_fun: called as `true_fun(*operands)` where `pred` is true; a function, a Module or a method of one.
        false_fun: the same where it is false.
        *operands: Modules, Contexts, arrays and whatever else the functions take.

    Returns:
        What the function returned. A Module among it is the one that was passed.

    Raises:
        StructureError: the functions return different structures or leave the Modules in different ones.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Counter(nnx.Module):
        ...     def __init__(self):
        ...         self.count = nnx.var("counts", jnp.int32(0))
        >>> def up(counter):
        ...     counter.count += 1
        >>> counter = Counter()
        >>> nnx.cond(True, up, lambda counter: None, counter)
        >>> int(counter.count)
        1
    """
    return _branches("nnx.cond", pred, (true_fun, false_fun), operands)


def switch(index: Any, branches: Sequence[Callable[..., R]], *operands: Any) -> R:
    """Call one of several functions on Modules, Contexts and arrays, as `jax.lax.switch` does.

    Args:
        index: an integer scalar, clamped to the range of `branches`.
        branches: the functions, each called as `branch(*operands)`.
        *operands: Modules, Contexts, arrays and whatever else the functions take.

    Returns:
        What the function returned; see `cond`.

    Raises:
        StructureError: the functions return different structures or leave the Modules in different ones.
        ValueError: there are no branches.

    Example:
        >>> import nnx
        >>> int(nnx.switch(1, [lambda x: x, lambda x: x + 10, lambda x: x + 20], 1))
        11
    """
    if not branches:
        raise ValueError("nnx.switch takes at least one branch")
    return _branches("nnx.switch", index, tuple(branches), operands)


def _branches(what: str, index: Any, functions: tuple[Any, ...], operands: tuple[Any, ...]) -> Any:
    lifted = [lift_callable(function, what) for function in functions]
    targets = tuple(function for function, _ in lifted)
    if is_object(index):
        raise TypeError(
            f"{what} takes {'a boolean' if what == 'nnx.cond' else 'an index'} first, and then the functions and their "
            f"operands; got a {type(index).__name__}"
        )
    # A flag as the index is data, and not one of the flags that the functions are to see as they are.
    index = jax.numpy.asarray(index)
    implementation = functools.partial(_run, what, targets)
    return stage(what, targets, None, implementation, (index, [bound for _, bound in lifted], operands), {})


def _run(what: str, functions: tuple[Any, ...], index: Any, bound: Any, operands: Any) -> Any:
    call = Call((list(bound), operands), {})
    traced = Operands(call)

    def body(number: int, dynamic: Any) -> Any:
        return call.run(lambda bound, operands: functions[number](*bound[number], *operands), traced.leaves(dynamic))

    bodies = [Once(functools.partial(body, number), traced.dynamic) for number in range(len(functions))]
    names = [f"`{getattr(function, '__qualname__', function)}`" for function in functions]
    join = Join(traced, [once.out for once in bodies], names, what)

    def branch(number: int, dynamic: Any) -> Any:
        out, values, _ = bodies[number](dynamic)
        return out, join.values(number, values, dynamic)

    branches = [functools.partial(branch, number) for number in range(len(functions))]
    if what == "nnx.cond":
        out, values = jax.lax.cond(index, *branches, traced.dynamic)
    else:
        out, values = jax.lax.switch(index, branches, traced.dynamic)
    return finish(call.frame, out, values, join.outcome)
