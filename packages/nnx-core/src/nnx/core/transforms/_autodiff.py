"""grad, value_and_grad, vjp, jvp, jacfwd, jacrev and hessian: derivatives by the Variables a filter selects."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar, overload

import jax

from nnx.core._errors import StructureError, VariableError
from nnx.core._filters import FilterLike, to_filter
from nnx.core._state import Schema, State
from nnx.core._variable import Param
from nnx.core.transforms._callable import lift_callable
from nnx.core.transforms._outcome import finish
from nnx.core.transforms._selection import Selection

__all__ = ["grad", "hessian", "jacfwd", "jacrev", "jvp", "value_and_grad", "vjp"]

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")


def _split_aux(out: Any, has_aux: bool) -> tuple[Any, Any]:
    if not has_aux:
        return out, None
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            f"with has_aux=True the function returns (output, aux), got {type(out).__name__}"
            + (f" of {len(out)}" if isinstance(out, tuple) else "")
        )
    return out


def _numbers(argnums: int | Sequence[int]) -> tuple[int, ...]:
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
    numbers = _numbers(argnums)
    selection = to_filter(wrt)

    @functools.wraps(function, updated=())
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        chosen = Selection(bound + args, kwargs, numbers).by_filter(selection, check_dtypes=not allow_int)

        def inner(values: Any, bare: Any) -> Any:
            out, changed, outcome = chosen.call.run(function, chosen.leaves(values, bare))
            value, aux = _split_aux(out, has_aux)
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
        out, aux = _split_aux(out, has_aux)
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
        out, aux = _split_aux(out, has_aux)
        return out, (aux, changed, outcome)

    out, tangent, (aux, changed, outcome) = jax.jvp(
        inner, (chosen.values, chosen.bare), (value_tangents, bare_tangents), has_aux=True
    )
    aux = finish(chosen.call.frame, aux, changed, outcome)
    return (out, tangent, aux) if has_aux else (out, tangent)


class _Tree:
    """The structure of an output, as static data."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree


jax.tree_util.register_pytree_node(_Tree, lambda node: ((), node.tree), lambda tree, _: _Tree(tree))


def _jacobian(transform: Callable[..., Any], name: str, f: Any, options: dict[str, Any]) -> Any:
    if f is None:
        return functools.partial(_jacobian, transform, name, options=options)
    function, bound = lift_callable(f, f"nnx.{name}")
    argnums, has_aux = options["argnums"], options["has_aux"]
    numbers = _numbers(argnums)
    selection = to_filter(options["wrt"])
    rest = {key: options[key] for key in ("holomorphic", "allow_int") if key in options}

    @functools.wraps(function, updated=())
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        chosen = Selection(bound + args, kwargs, numbers).by_filter(
            selection, check_dtypes=not options.get("allow_int", False)
        )

        if not jax.tree.leaves((chosen.values, chosen.bare)):
            raise VariableError(
                f"nnx.{name} differentiates by nothing: wrt={options['wrt']!r} selects no Variable of the arguments"
            )

        def inner(values: Any, bare: Any) -> Any:
            out, changed, outcome = chosen.call.run(function, chosen.leaves(values, bare))
            out, aux = _split_aux(out, has_aux)
            leaves, tree = jax.tree.flatten(out)
            return leaves, (_Tree(tree), aux, changed, outcome)

        jacobians, (tree, aux, changed, outcome) = transform(inner, argnums=(0, 1), has_aux=True, **rest)(
            chosen.values, chosen.bare
        )
        aux = finish(chosen.call.frame, aux, changed, outcome)
        parts = [chosen.gradients(values, bare) for values, bare in jacobians]
        jacobian = jax.tree.unflatten(tree.tree, [part[0] if isinstance(argnums, int) else part for part in parts])
        return (jacobian, aux) if has_aux else jacobian

    return wrapper


@overload
def jacfwd(
    f: Callable[P, R],
    /,
    *,
    has_aux: Literal[False] = False,
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
) -> Callable[P, Any]: ...
@overload
def jacfwd(
    f: None = None,
    /,
    *,
    has_aux: Literal[False] = False,
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, Any]]: ...
@overload
def jacfwd(
    f: Callable[P, tuple[R, A]],
    /,
    *,
    has_aux: Literal[True],
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
) -> Callable[P, tuple[Any, A]]: ...
@overload
def jacfwd(
    f: None = None,
    /,
    *,
    has_aux: Literal[True],
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
) -> Callable[[Callable[P, tuple[R, A]]], Callable[P, tuple[Any, A]]]: ...
def jacfwd(
    f: Any = None,
    /,
    *,
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    has_aux: bool = False,
    holomorphic: bool = False,
) -> Any:
    """Make a function that gives the Jacobian of `f`, column by column: for outputs larger than the inputs.

    Args:
        f: a function of Modules, Contexts and arrays.
        argnums: which arguments to differentiate by.
        wrt: a filter: the Variables of the Modules among them.
        has_aux: whether `f` returns `(output, aux)`.
        holomorphic: as for `jax.jacfwd`.

    Returns:
        A function of the same arguments. It returns the structure of the output, with the Jacobian of each leaf in its
        place: a State for a Module, whose values have the leaf's shape before their own.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.w = nnx.Param(jnp.ones(2))
        >>> nnx.jacfwd(lambda m, x: m.w * x)(Scale(), jnp.arange(2.0))["w"].value.tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    return _jacobian(
        jax.jacfwd, "jacfwd", f, {"argnums": argnums, "wrt": wrt, "has_aux": has_aux, "holomorphic": holomorphic}
    )


@overload
def jacrev(
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
def jacrev(
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
def jacrev(
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
def jacrev(
    f: None = None,
    /,
    *,
    has_aux: Literal[True],
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[[Callable[P, tuple[R, A]]], Callable[P, tuple[Any, A]]]: ...
def jacrev(
    f: Any = None,
    /,
    *,
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Any:
    """Make a function that gives the Jacobian of `f`, row by row: for inputs larger than the outputs.

    See `jacfwd` for the arguments and the result; `allow_int` is as for `jax.jacrev`.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.w = nnx.Param(jnp.ones(2))
        >>> nnx.jacrev(lambda m, x: m.w * x)(Scale(), jnp.arange(2.0))["w"].value.tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    options = {
        "argnums": argnums,
        "wrt": wrt,
        "has_aux": has_aux,
        "holomorphic": holomorphic,
        "allow_int": allow_int,
    }
    return _jacobian(jax.jacrev, "jacrev", f, options)


@overload
def hessian(
    f: Callable[P, R],
    /,
    *,
    has_aux: Literal[False] = False,
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
) -> Callable[P, Any]: ...
@overload
def hessian(
    f: None = None,
    /,
    *,
    has_aux: Literal[False] = False,
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, Any]]: ...
@overload
def hessian(
    f: Callable[P, tuple[R, A]],
    /,
    *,
    has_aux: Literal[True],
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
) -> Callable[P, tuple[Any, A]]: ...
@overload
def hessian(
    f: None = None,
    /,
    *,
    has_aux: Literal[True],
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    holomorphic: bool = False,
) -> Callable[[Callable[P, tuple[R, A]]], Callable[P, tuple[Any, A]]]: ...
def hessian(
    f: Any = None,
    /,
    *,
    argnums: int | Sequence[int] = 0,
    wrt: FilterLike = Param,
    has_aux: bool = False,
    holomorphic: bool = False,
) -> Any:
    """Make a function that gives the Hessian of `f`: `jacfwd` of `jacrev`.

    See `jacfwd` for the arguments. The Hessian by a Module is a State of States: `h["w"].value["b"].value` is
    the second derivative by `w` and `b`.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.w = nnx.Param(jnp.float32(2))
        >>> float(nnx.hessian(lambda m: m.w**3)(Scale())["w"].value["w"].value)
        12.0
    """
    options: dict[str, Any] = {"argnums": argnums, "wrt": wrt, "has_aux": has_aux, "holomorphic": holomorphic}
    if f is None:
        return functools.partial(hessian, **options)
    return jacfwd(jacrev(f, **options), **options)
