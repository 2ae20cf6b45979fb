"""grad, value_and_grad, vjp and jvp: derivatives by the Variables a filter selects."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar, overload

import jax

from nnx.core._errors import StructureError
from nnx.core._filters import FilterLike, to_filter
from nnx.core._state import Schema, State
from nnx.core._variable import Param
from nnx.core.transforms._callable import lift_callable
from nnx.core.transforms._outcome import finish
from nnx.core.transforms._selection import Selection

__all__ = ["grad", "jvp", "numbers_of", "split_aux", "value_and_grad", "vjp"]

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")


def split_aux(out: Any, has_aux: bool) -> tuple[Any, Any]:
    """What a function returned, as its output and what it gave beside it."""
    if not has_aux:
        return out, None
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            f"with has_aux=True the function returns (output, aux), got {type(out).__name__}"
            + (f" of {len(out)}" if isinstance(out, tuple) else "")
        )
    return out


def numbers_of(argnums: int | Sequence[int]) -> tuple[int, ...]:
    """The arguments to differentiate by, as a tuple."""
    return (argnums,) if isinstance(argnums, int) else tuple(argnums)


@overload
def value_and_grad(
    f: Callable[P, R],
    /,
    *,
    has_aux: Literal[False] = False,
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[P, tuple[R, Any]]: ...
@overload
def value_and_grad(
    f: None = None,
    /,
    *,
    has_aux: Literal[False] = False,
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, tuple[R, Any]]]: ...
@overload
def value_and_grad(
    f: Callable[P, tuple[R, A]],
    /,
    *,
    has_aux: Literal[True],
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[P, tuple[tuple[R, A], Any]]: ...
@overload
def value_and_grad(
    f: None = None,
    /,
    *,
    has_aux: Literal[True],
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[[Callable[P, tuple[R, A]]], Callable[P, tuple[tuple[R, A], Any]]]: ...
def value_and_grad(
    f: Any = None,
    /,
    *,
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Any:
    """Make a function that gives the value of `f` and its gradient.

    Changes that `f` makes to Modules come out, as they do without the transform.

    Args:
        f: a function of Modules, Contexts and arrays that returns a scalar, or `(scalar, aux)`.
        argnums: which arguments to differentiate by. A Module among them gives a State of the gradients of the
            Variables that `wrt` selects, with the paths of `module.filter(wrt)`; any other argument gives its
            gradient as with `jax.grad`.
        wrt: a filter.
        has_aux: whether `f` returns `(scalar, aux)`.
        holomorphic: as for `jax.grad`.
        allow_int: as for `jax.grad`.

    Returns:
        A function of the same arguments that returns `(value, gradient)`, or `((value, aux), gradient)`; `gradient`
        is a tuple if `argnums` is one.

    Raises:
        VariableError: on call, if a Variable to differentiate by is not of floating point.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.w = nnx.Param(jnp.float32(3))
        >>> value, grads = nnx.value_and_grad(lambda m, x: (m.w * x) ** 2)(Scale(), 2.0)
        >>> float(value), float(grads["w"].value)
        (36.0, 24.0)
    """
    if f is None:
        return functools.partial(
            value_and_grad, argnums=argnums, wrt=wrt, has_aux=has_aux, holomorphic=holomorphic, allow_int=allow_int
        )
    function, bound = lift_callable(f, "nnx.grad")
    numbers = numbers_of(argnums)
    selection = to_filter(wrt)

    @functools.wraps(function, updated=())
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        chosen = Selection(bound + args, kwargs, numbers).by_filter(selection, check_dtypes=not allow_int)

        def inner(values: Any, bare: Any) -> Any:
            out, changed, outcome = chosen.call.run(function, chosen.leaves(values, bare))
            value, aux = split_aux(out, has_aux)
            return value, (aux, changed, outcome)

        (value, (aux, changed, outcome)), (value_grads, bare_grads) = jax.value_and_grad(
            inner, argnums=(0, 1), has_aux=True, holomorphic=holomorphic, allow_int=allow_int
        )(chosen.values, chosen.bare)
        aux = finish(chosen.call.frame, aux, changed, outcome)
        grads = chosen.gradients(value_grads, bare_grads)
        gradient = grads[0] if isinstance(argnums, int) else grads
        return ((value, aux), gradient) if has_aux else (value, gradient)

    return wrapper


@overload
def grad(
    f: Callable[P, R],
    /,
    *,
    has_aux: Literal[False] = False,
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[P, Any]: ...
@overload
def grad(
    f: None = None,
    /,
    *,
    has_aux: Literal[False] = False,
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, Any]]: ...
@overload
def grad(
    f: Callable[P, tuple[R, A]],
    /,
    *,
    has_aux: Literal[True],
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[P, tuple[Any, A]]: ...
@overload
def grad(
    f: None = None,
    /,
    *,
    has_aux: Literal[True],
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[[Callable[P, tuple[R, A]]], Callable[P, tuple[Any, A]]]: ...
def grad(
    f: Any = None,
    /,
    *,
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Any:
    """Make a function that gives the gradient of `f`; see `value_and_grad` for the arguments.

    Returns:
        A function of the same arguments that returns the gradient, or `(gradient, aux)`.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.w = nnx.Param(jnp.float32(3))
        >>> float(nnx.grad(lambda m: m.w**2)(Scale())["w"].value)
        6.0
    """
    options: dict[str, Any] = {
        "argnums": argnums,
        "wrt": wrt,
        "has_aux": has_aux,
        "holomorphic": holomorphic,
        "allow_int": allow_int,
    }
    if f is None:
        return functools.partial(grad, **options)
    both = value_and_grad(f, **options)

    @functools.wraps(both, updated=())
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return wrapper


def vjp(f: Callable[..., Any], *primals: Any, has_aux: bool = False, wrt: FilterLike = Param) -> Any:
    """Call `f` and prepare its vector-Jacobian product; see `jax.vjp`.

    Changes that `f` makes to Modules come out with this call.

    Args:
        f: a function of Modules, Contexts and arrays.
        *primals: its arguments.
        has_aux: whether `f` returns `(output, aux)`.
        wrt: a filter: the Variables of the Modules that are differentiated.

    Returns:
        `(output, vjp_fn)`, or `(output, vjp_fn, aux)`. `vjp_fn(cotangent)` gives a tuple with a part for each argument:
        a State for a Module, an array for an array.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.w = nnx.Param(jnp.float32(3))
        >>> y, pull = nnx.vjp(lambda m, x: m.w * x, Scale(), 2.0)
        >>> state, x_bar = pull(jnp.float32(1))
        >>> float(state["w"].value), float(x_bar)
        (2.0, 3.0)
    """
    function, bound = lift_callable(f, "nnx.vjp")
    args = bound + primals
    chosen = Selection(args, {}, range(len(args))).by_filter(to_filter(wrt), check_dtypes=True)

    def inner(values: Any, bare: Any) -> Any:
        out, changed, outcome = chosen.call.run(function, chosen.leaves(values, bare))
        out, aux = split_aux(out, has_aux)
        return out, (aux, changed, outcome)

    out, pull, (aux, changed, outcome) = jax.vjp(inner, chosen.values, chosen.bare, has_aux=True)
    aux = finish(chosen.call.frame, aux, changed, outcome)

    def vjp_fn(cotangent: Any) -> tuple[Any, ...]:
        return chosen.gradients(*pull(cotangent))

    return (out, vjp_fn, aux) if has_aux else (out, vjp_fn)


def jvp(f: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any], *, has_aux: bool = False) -> Any:
    """Call `f` and push tangents forward; see `jax.jvp`.

    Args:
        f: a function of Modules, Contexts and arrays.
        primals: its arguments.
        tangents: a part for each argument: for a Module a State of the tangents of some of its Variables (those it does
            not name stand still), for an array an array.
        has_aux: whether `f` returns `(output, aux)`.

    Returns:
        `(output, output_tangent)`, or `(output, output_tangent, aux)`.

    Raises:
        StructureError: a tangent does not fit its argument.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.w = nnx.Param(jnp.float32(3))
        >>> model = Scale()
        >>> direction = model.filter(nnx.Param).map(lambda path, w: jnp.ones_like(w))
        >>> y, slope = nnx.jvp(lambda m: m.w**2, (model,), (direction,))
        >>> float(y), float(slope)
        (9.0, 6.0)
    """
    function, bound = lift_callable(f, "nnx.jvp")
    if bound and len(tangents) == len(primals):
        tangents = (State.from_columns(Schema.of(()), ()), *tangents)  # the Module itself stands still
    args = bound + tuple(primals)
    if len(args) != len(tangents):
        raise StructureError(
            f"jvp takes a tangent for each argument: got {len(args)} arguments, {len(tangents)} tangents"
        )
    chosen, value_tangents, bare_tangents = Selection(args, {}, range(len(args))).by_states(tangents)

    def inner(values: Any, bare: Any) -> Any:
        out, changed, outcome = chosen.call.run(function, chosen.leaves(values, bare))
        out, aux = split_aux(out, has_aux)
        return out, (aux, changed, outcome)

    out, tangent, (aux, changed, outcome) = jax.jvp(
        inner, (chosen.values, chosen.bare), (value_tangents, bare_tangents), has_aux=True
    )
    aux = finish(chosen.call.frame, aux, changed, outcome)
    return (out, tangent, aux) if has_aux else (out, tangent)
