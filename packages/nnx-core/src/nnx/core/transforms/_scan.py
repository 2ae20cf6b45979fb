"""scan: one body runs along an axis of arrays and Variables, and hands a carry from run to run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, overload

from nnx.core.transforms._axes import Rules
from nnx.core.transforms._callable import lift_callable
from nnx.core.transforms._loops import raise_unstable
from nnx.core.transforms._scan_axes import Carry, is_constructor
from nnx.core.transforms._scan_run import Run
from nnx.core.transforms._staging import Once, content_of, stage

__all__ = ["Carry", "scan"]

P = ParamSpec("P")
R = TypeVar("R")


@overload
def scan(
    f: Callable[P, R],
    /,
    *,
    variable_axes: Mapping[Any, int | None] | None = None,
    variable_broadcast: Any = None,
    variable_carry: Any = None,
    split_rngs: Any = True,
    in_axes: Any = 0,
    out_axes: Any = 0,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    metadata_params: Mapping[str, Any] | None = None,
) -> Callable[P, R]: ...
@overload
def scan(
    f: None = None,
    /,
    *,
    variable_axes: Mapping[Any, int | None] | None = None,
    variable_broadcast: Any = None,
    variable_carry: Any = None,
    split_rngs: Any = True,
    in_axes: Any = 0,
    out_axes: Any = 0,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    metadata_params: Mapping[str, Any] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def scan(
    f: Any = None,
    /,
    *,
    variable_axes: Mapping[Any, int | None] | None = None,
    variable_broadcast: Any = None,
    variable_carry: Any = None,
    split_rngs: Any = True,
    in_axes: Any = 0,
    out_axes: Any = 0,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    metadata_params: Mapping[str, Any] | None = None,
) -> Any:
    """Run a function along an axis, as `jax.lax.scan` does, with Modules and Contexts anywhere in its arguments.

    The function is called as `f(*modules, carry, *xs)` and returns `(carry, y)`: the first positional argument that is
    no Module or Context is the carry, the others after it are sliced. Or mark the carry, which may then be a Module:
    `in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)`. A constructor (a class, or an `__init__`) has no carry: each run
    makes one layer, and their Variables are stacked.

    What a Variable is, is settled by the first of these that matches: `variable_axes`, `variable_carry`,
    `variable_broadcast`, the axis that `in_axes` gives to its Module, and else it is carried: each run sees what the
    run before it wrote, as in a Python loop. What is sown is stacked along axis 0.

    Args:
        f: the function, a class, or a Module or bound method of one, which is lifted together with that Module.
            Without it, a decorator.
        variable_axes: the axis of Variables by filter, `{nnx.Param: 0}`: each run sees, and leaves, its own slice.
        variable_broadcast: a filter of Variables that are the same in each run.
        variable_carry: a filter of Variables that go from run to run.
        split_rngs: the random streams that differ from run to run: True for all, False for none, or their names. Such a
            stream advances by one; a stream that is not split gives the same keys in each run.
        in_axes: the axis of each argument after the carry, None if it is the same in each run; an int for all.
        out_axes: the axis of `y`; None if the function returns the carry alone.
        length: the number of runs, if no argument has it.
        reverse: whether to run from the end of the axis to its start.
        unroll: as for `jax.lax.scan`.
        metadata_params: `{nnx.PARTITION_NAME: name}` names the axis in the `sharding` of Variables that get it.

    Returns:
        A function of the same arguments that returns `(carry, ys)`. The second eager call with the same function,
        structure and shapes traces nothing.

    Raises:
        StructureError: sizes differ, or the body returns another structure than it was given.
        VariableError: a shared Variable is written with values that differ from run to run, or a Variable that is
            carried changes its shape or dtype.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> class Layer(nnx.Module):
        ...     def __init__(self, *, ctx):
        ...         self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (3, 3)))
        ...     def __call__(self, x):
        ...         return jnp.tanh(x @ self.w), None
        >>> layers = nnx.scan(Layer, length=4)(ctx=nnx.context(0))
        >>> layers.w.shape
        (4, 3, 3)
        >>> y, _ = nnx.scan(Layer.__call__, variable_axes={nnx.Param: 0})(layers, jnp.ones((2, 3)))
        >>> y.shape
        (2, 3)
    """
    options: dict[str, Any] = {
        "variable_axes": variable_axes,
        "variable_broadcast": variable_broadcast,
        "variable_carry": variable_carry,
        "split_rngs": split_rngs,
        "in_axes": in_axes,
        "out_axes": out_axes,
        "length": length,
        "reverse": reverse,
        "unroll": unroll,
        "metadata_params": metadata_params,
    }
    if f is None:
        return functools.partial(scan, **options)
    function, bound = lift_callable(f, "nnx.scan")
    rules = Rules("nnx.scan", variable_axes or {}, variable_broadcast, variable_carry, split_rngs)
    key = content_of(options)
    implementation = functools.partial(_scan, function, rules, options, len(bound))

    @functools.wraps(function, updated=())
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        traces = "arrays" if is_constructor(function) else "numbers"
        return stage("nnx.scan", (function,), key, implementation, bound + args, kwargs, traces)

    return wrapper


def _scan(function: Any, rules: Rules, options: Mapping[str, Any], bound: int, *args: Any, **kwargs: Any) -> Any:
    before: tuple[Run, Once] | None = None
    for _ in range(2):
        run = Run(function, rules, options, bound, args, kwargs)
        once = run.trace()
        if not run.must_grow(once):
            break
        if before is not None:
            raise_unstable("nnx.scan", function, run.call, once.out[1][2])
        before = run, once
        run.grow(once)
    if run.settle(once):
        once = run.trace()
    if before is not None:
        run.note_first(*before, once)
    return run.finish(once)
