"""jacfwd, jacrev and hessian: all derivatives of what a function returns, by the Variables a filter selects."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar, overload

import jax

from nnx.core._errors import VariableError
from nnx.core._filters import FilterLike, to_filter
from nnx.core._variable import Param
from nnx.core.transforms._autodiff import numbers_of, split_aux
from nnx.core.transforms._callable import lift_callable
from nnx.core.transforms._outcome import finish
from nnx.core.transforms._selection import Selection

__all__ = ["hessian", "jacfwd", "jacrev"]

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")


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
    numbers = numbers_of(argnums)
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
            out, aux = split_aux(out, has_aux)
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
