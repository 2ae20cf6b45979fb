"""eval_shape, make_jaxpr and checkify: a function of Modules looked at, and not only run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

import jax
import numpy as np
from jax.experimental import checkify as jax_checkify

from nnx.core._object import Object
from nnx.core.transforms._callable import lift_callable
from nnx.core.transforms._inputs import Call, Inputs
from nnx.core.transforms._lift import Frame, Packed
from nnx.core.transforms._outcome import finish
from nnx.core.transforms._staging import Operands, is_number

__all__ = ["checkify", "eval_shape", "make_jaxpr"]

# Part of the key under which JAX keeps what it has compiled: under checkify a function is traced anew, with its checks.
_checking = jax.make_user_context(False)

M = TypeVar("M", bound=Object)
P = ParamSpec("P")
R = TypeVar("R")


def is_checked() -> bool:
    """Whether `nnx.checkify` asks for checks here.

    A check is an effect, and JAX calls what has an effect by a slow path, checked or not: some 200 us instead of 20.
    """
    return bool(_checking.value)


@overload
def eval_shape(f: Callable[..., M], *args: Any, **kwargs: Any) -> M: ...
@overload
def eval_shape(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...
def eval_shape(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call of `f` would return, without computing anything.

    Args:
        f: a Module class, a Module, or a function of Modules, Contexts and arrays.
        *args: its arguments, which are left as they are. Arrays may be `jax.ShapeDtypeStruct`, Modules may hold them;
            numbers, strings and the like are what they are.
        **kwargs: the arguments by name.

    Returns:
        The output with `jax.ShapeDtypeStruct` in the place of arrays, in Modules too, whose Variables keep their
        metadata. A Module that was an argument comes back as a copy, changed as `f` would have changed it.

    Example:
        >>> import jax, nnx
        >>> class Linear(nnx.Module):
        ...     def __init__(self, din, dout, *, ctx):
        ...         self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (din, dout)))
        >>> nnx.eval_shape(Linear, 10**6, 10**6, ctx=nnx.context(0)).w
        ShapeDtypeStruct(shape=(1000000, 1000000), dtype=float32)
    """
    function, bound = lift_callable(f, "nnx.eval_shape")
    call = Call((*bound, *args), kwargs)
    operands = Operands(call, "arrays")
    out, values, outcome = jax.eval_shape(
        lambda dynamic: call.run(function, operands.leaves(dynamic)), operands.dynamic
    )
    return finish(_copies(call), out, values, outcome)


def _copies(call: Call) -> Frame:
    """The roots of a call as abstract copies, so that what happens to them leaves the caller's alone."""
    inputs = Inputs()
    for position in call.packed:
        packed = call.leaves[position]
        inputs.add(Packed(packed.definition, [jax.tree.map(_abstract, value) for value in packed.values]))
    frame = Frame().begin()
    for root in inputs.roots:
        root._nnx.initializing = 0
        frame.enter(root)
    return frame


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct) or not is_number(leaf):
        return leaf
    if isinstance(leaf, np.generic):  # the count of a random stream
        return leaf
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def make_jaxpr(f: Callable[..., Any], *, return_shape: bool = False) -> Callable[..., Any]:
    """Make a function that gives the jaxpr of a call of `f`, as `jax.make_jaxpr` does.

    Args:
        f: a Module class, a Module, or a function of Modules, Contexts and arrays.
        return_shape: whether to give the shapes of the output as well, as `eval_shape` does.

    Returns:
        A function of the same arguments. The jaxpr takes the values of the Modules in the place of each, in the order
        of their paths, and gives the output and then the values that change.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.w = nnx.Param(jnp.float32(3))
        >>> print(nnx.make_jaxpr(lambda m, x: m.w * x)(Scale(), jnp.float32(1)))
        { lambda ; a:f32[] b:f32[]. let c:f32[] = mul a b in (c,) }
    """
    function, bound = lift_callable(f, "nnx.make_jaxpr")

    @functools.wraps(function, updated=())
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = Call((*bound, *args), kwargs)
        operands = Operands(call)

        @functools.wraps(function, updated=())
        def body(dynamic: Any) -> Any:
            return call.run(function, operands.leaves(dynamic))

        closed, (out, values, outcome) = jax.make_jaxpr(body, return_shape=True)(operands.dynamic)
        return (closed, finish(_copies(call), out, values, outcome)) if return_shape else closed

    return wrapper


def checkify(f: Callable[P, R], errors: Any = jax_checkify.user_checks) -> Callable[P, tuple[jax_checkify.Error, R]]:
    """Make a function that also returns what went wrong inside of it, as `jax.experimental.checkify.checkify` does.

    Args:
        f: a function of Modules, Contexts and arrays; a Module, or a bound method of one.
        errors: which checks to make, such as `checkify.user_checks | checkify.float_checks`.

    Returns:
        A function of the same arguments that returns `(error, output)`; `error.throw()` raises if a check failed.
        Changes to Modules come out either way.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> from jax.experimental import checkify
        >>> def root(x):
        ...     checkify.check(x >= 0, "negative: {x}", x=x)
        ...     return jnp.sqrt(x)
        >>> error, y = nnx.jit(nnx.checkify(root))(jnp.float32(-1))
        >>> error.get() is not None
        True
    """
    function, bound = lift_callable(f, "nnx.checkify")

    @functools.wraps(function, updated=())
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = Call((*bound, *args), kwargs)
        operands = Operands(call)

        def body(dynamic: Any) -> Any:
            return call.run(function, operands.leaves(dynamic))

        with _checking(True):
            error, (out, values, outcome) = jax_checkify.checkify(body, errors=errors)(operands.dynamic)
        return error, finish(call.frame, out, values, outcome)

    return wrapper
