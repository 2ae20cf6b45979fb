"""grad and value_and_grad: derivatives with respect to the Variables that a filter selects, as States."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx.core._errors import VariableError
from nnx.core._filters import Filter, FilterLike, to_filter
from nnx.core._layout import layout_of
from nnx.core._object import Object
from nnx.core._state import Schema, State, path_text
from nnx.core._variable import Param
from nnx.core.transforms._lift import Frame, Inputs, Packed, finish, is_object, pack, run

__all__ = ["grad", "value_and_grad"]


class _Selected:
    """The cells of one Module that are differentiated: the gradient's Schema, and each cell's place in the call."""

    __slots__ = ("places", "schema")

    def __init__(self, root: Object, wrt: Filter, where: dict[int, tuple[int, int]], check_dtypes: bool) -> None:
        layout = layout_of(root)
        values = [cell._value for cell in layout.cells]
        positions, self.schema = layout.moduledef.schema.select((wrt,), values)[0]
        self.places = [where[id(layout.cells[i])] for i in positions]
        if check_dtypes:
            _check_dtypes(root, self.schema, [values[i] for i in positions])


def _check_dtypes(root: Object, schema: Schema, values: Sequence[Any]) -> None:
    for (path, kind, _), value in zip(schema.entries, values, strict=True):
        for leaf in jax.tree.leaves(value):
            dtype = jnp.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype
            if not jnp.issubdtype(dtype, jnp.inexact):
                raise VariableError(
                    f"cannot differentiate with respect to `{path_text(path)}` ({kind.__name__}) of the "
                    f"{type(root).__name__}: its dtype is {dtype}. Keep it in another Variable type than the one that "
                    "is differentiated, or narrow the filter `wrt`"
                )


def _places(frame: Frame) -> dict[int, tuple[int, int]]:
    return {id(cell): (k, i) for k, layout in enumerate(frame.layouts) for i, cell in enumerate(layout.cells)}


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
    function, bound = _lift_callable(f)
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    selection = to_filter(wrt)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        args = bound + args
        wanted = [n if n >= 0 else n + len(args) for n in numbers]
        for n, given in zip(wanted, numbers, strict=True):
            if not 0 <= n < len(args):
                raise ValueError(
                    f"argnums names argument {given}, but the function was called with {len(args)} positional arguments"
                )
        frame = Frame().begin()
        packed, packed_kwargs = pack(list(args), frame), {name: pack(kwargs[name], frame) for name in sorted(kwargs)}
        where = _places(frame)
        selected = {
            n: jax.tree.map(
                lambda leaf: _Selected(leaf, selection, where, not allow_int) if isinstance(leaf, Object) else None,
                args[n],
                is_leaf=is_object,
            )
            for n in wanted
        }
        chosen = {
            n: [s for s in jax.tree.leaves(tree, is_leaf=_is_selected) if _is_selected(s)]
            for n, tree in selected.items()
        }
        places = list(dict.fromkeys(place for group in chosen.values() for s in group for place in s.places))
        values = [frame.layouts[k].cells[i]._value for k, i in places]
        bare = {
            n: jax.tree.map(lambda leaf: None if type(leaf) is Packed else leaf, packed[n], is_leaf=_is_packed)
            for n in wanted
        }

        def inner(values: Any, bare: Any) -> Any:
            replaced: dict[int, dict[int, Any]] = {}
            for (k, i), value in zip(places, values, strict=True):
                replaced.setdefault(k, {})[i] = value
            inputs, number = Inputs(), 0

            def one(leaf: Any, substitute: Any = None) -> Any:
                nonlocal number
                if type(leaf) is not Packed:
                    return substitute
                fresh = list(leaf.values)
                for i, value in replaced.get(number, {}).items():
                    fresh[i] = value
                number += 1
                return inputs.add(leaf.moduledef, fresh)

            built = []
            for n, arg in enumerate(packed):
                leaves, tree = jax.tree.flatten(arg, is_leaf=_is_packed)
                if n in wanted:
                    others = iter(jax.tree.leaves(bare[n]))
                    built.append(
                        jax.tree.unflatten(
                            tree, [one(leaf, None) if type(leaf) is Packed else next(others) for leaf in leaves]
                        )
                    )
                else:
                    built.append(jax.tree.unflatten(tree, [one(leaf, leaf) for leaf in leaves]))
            named = {}
            for name, arg in packed_kwargs.items():
                leaves, tree = jax.tree.flatten(arg, is_leaf=_is_packed)
                named[name] = jax.tree.unflatten(tree, [one(leaf, leaf) for leaf in leaves])
            out, changed, outcome = run(function, inputs, built, {name: named[name] for name in kwargs})
            if has_aux:
                if not (isinstance(out, tuple) and len(out) == 2):
                    raise TypeError(f"with has_aux=True the function returns (scalar, aux), got {type(out).__name__}")
                return out[0], (out[1], changed, outcome)
            return out, (None, changed, outcome)

        (value, (aux, changed, outcome)), (value_grads, bare_grads) = jax.value_and_grad(
            inner, argnums=(0, 1), has_aux=True, holomorphic=holomorphic, allow_int=allow_int
        )(values, bare)
        aux = finish(frame, aux, changed, outcome)
        by_place = dict(zip(places, value_grads, strict=True))
        grads = tuple(_assemble(selected[n], packed[n], bare_grads[n], by_place) for n in wanted)
        gradient = grads[0] if isinstance(argnums, int) else grads
        return ((value, aux), gradient) if has_aux else (value, gradient)

    return wrapper


def _is_packed(value: Any) -> bool:
    return type(value) is Packed


def _is_selected(value: Any) -> bool:
    return type(value) is _Selected


def _assemble(selected: Any, packed: Any, bare: Any, by_place: dict[tuple[int, int], Any]) -> Any:
    """The gradient of one argument: a State for each Module, an array for each array."""
    leaves, tree = jax.tree.flatten(packed, is_leaf=_is_packed)
    states = iter([s for s in jax.tree.leaves(selected, is_leaf=_is_selected) if _is_selected(s)])
    others = iter(jax.tree.leaves(bare))
    result = []
    for leaf in leaves:
        if type(leaf) is Packed:
            item = next(states)
            result.append(State.from_columns(item.schema, [by_place[place] for place in item.places]))
        else:
            result.append(next(others))
    return jax.tree.unflatten(tree, result)


def _lift_callable(f: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A Module or a bound method of one as a function of that Module, with the Module as its first argument."""
    if isinstance(f, types.MethodType) and isinstance(f.__self__, Object):
        return f.__func__, (f.__self__,)
    if isinstance(f, Object):
        return type(f).__call__, (f,)  # type: ignore[operator]
    if not callable(f):
        raise TypeError(f"expected a callable, got {type(f).__name__}")
    return f, ()


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

    @functools.wraps(both)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return wrapper
