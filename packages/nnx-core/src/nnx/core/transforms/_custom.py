"""custom_vjp: a gradient of one's own for a function of Modules."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from nnx.core._errors import StructureError, VariableError
from nnx.core._layout import layout_of
from nnx.core._object import Object
from nnx.core._state import State, near_misses, path_text
from nnx.core.transforms._callable import lift_callable
from nnx.core.transforms._inputs import Call, Inputs, pack, run
from nnx.core.transforms._join import Join
from nnx.core.transforms._lift import Frame, refuse_static
from nnx.core.transforms._outcome import NOTHING, finish
from nnx.core.transforms._staging import Operands

__all__ = ["custom_vjp"]

P = ParamSpec("P")
R = TypeVar("R")


class custom_vjp(Generic[P, R]):  # noqa: N801 - as in JAX
    """Give a function of Modules, Contexts and arrays a gradient of its own, as `jax.custom_vjp` does.

    `defvjp(fwd, bwd)` sets it: `fwd(*args)` returns `(output, residuals)`, and `bwd(residuals, cotangent)` a tuple with
    a part for each argument: a State of gradients for a Module (a Variable that it does not name has the gradient
    zero), an array for an array, None for zero. What `fwd` writes to Modules comes out, so statistics survive; no
    gradient flows through it. Residuals may hold Modules, as they were when `fwd` ended.

    Args:
        f: the function.
        nondiff_argnums: arguments that are not differentiated and come first in `bwd`.

    Raises:
        StructureError: `bwd` returns gradients that do not fit the arguments, or `fwd` leaves other structures than
            `f`.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.w = nnx.Param(jnp.float32(3))
        >>> @nnx.custom_vjp
        ... def f(m, x):
        ...     return m.w * x
        >>> def fwd(m, x):
        ...     return f(m, x), (m, x)
        >>> def bwd(residuals, g):
        ...     m, x = residuals
        ...     return nnx.State({"w": nnx.Param(10 * g * x)}), g * m.w
        >>> f.defvjp(fwd, bwd)
        >>> float(nnx.grad(f)(Scale(), 2.0)["w"].value)
        20.0
    """

    def __init__(self, f: Callable[P, R], nondiff_argnums: int | Sequence[int] = ()) -> None:
        target, self._bound = lift_callable(f, "nnx.custom_vjp")
        functools.update_wrapper(self, target, updated=())
        self._function = target
        numbers = (nondiff_argnums,) if isinstance(nondiff_argnums, int) else tuple(nondiff_argnums)
        self._still = tuple(n + len(self._bound) for n in numbers)
        self._rules: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        """Set the function that runs forward where a gradient is wanted, and the one that gives the gradient.

        Args:
            fwd: takes the arguments, returns `(output, residuals)`.
            bwd: takes the arguments of `nondiff_argnums`, the residuals and the output's cotangent; returns a tuple
                with a part for each other argument.
        """
        self._rules = (fwd, bwd)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function."""
        name = getattr(self._function, "__qualname__", repr(self._function))
        if self._rules is None:
            raise TypeError(f"nnx.custom_vjp: `{name}` has no gradient yet, call `{name}.defvjp(fwd, bwd)`")
        fwd, bwd = self._rules
        everything = self._positional(self._bound + args, kwargs)
        still = {n: everything[n] for n in self._still if n < len(everything)}
        refuse_static("nnx.custom_vjp", "nondiff_argnums, and return None as its gradient", list(still.values()))
        call = Call([None if n in still else arg for n, arg in enumerate(everything)], {})
        operands = Operands(call, "flags")

        def full(args: Sequence[Any]) -> list[Any]:
            return [still.get(n, arg) for n, arg in enumerate(args)]

        def forward(*args: Any) -> Any:
            result = fwd(*full(args))
            if not isinstance(result, tuple) or len(result) != 2:
                raise StructureError(
                    f"the forward function of `{name}` returns (output, residuals), got {result!r:.80}"
                )
            return result[0], pack(result[1], Frame().begin())

        def plain(dynamic: Any) -> Any:
            return call.run(lambda *args: self._function(*full(args)), operands.leaves(dynamic))

        seen: list[Any] = []

        @jax.custom_vjp
        def value(dynamic: Any) -> Any:
            result = plain(dynamic)
            seen.append(jax.tree.map(jax.typeof, result))
            return result

        def value_forward(dynamic: Any) -> Any:
            (out, residuals), values, own = call.run(forward, operands.leaves(dynamic))
            if not seen:  # JAX wants the gradient at once, and never runs the function itself
                return (out, values, own), residuals
            names = [f"`{name}`", "its forward function"]
            join = Join(operands, [seen[-1], (out, values, own)], names, "nnx.custom_vjp")
            if join.outcome != seen[-1][2]:
                raise VariableError(
                    f"the forward function of `{name}` changes Variables that `{name}` itself leaves alone, or draws "
                    "more random keys: both must change the same"
                )
            return (out, join.values(1, values, dynamic), join.outcome), residuals

        def value_backward(residuals: Any, cotangent: Any) -> Any:
            inputs = Inputs()
            held = inputs.unpack(residuals)
            parts, _, changed = run(bwd, inputs, (*still.values(), held, cotangent[0]), {})
            if changed is not NOTHING:
                raise VariableError(
                    f"the backward function of `{name}` changes a Module of its residuals, which no one would see. "
                    "Make the change in the forward function"
                )
            return (_cotangents(name, call, operands, parts, still),)

        value.defvjp(value_forward, value_backward)
        out, values, outcome = value(operands.dynamic)
        return finish(call.frame, out, values, outcome)  # type: ignore[no-any-return]

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if not kwargs:
            return args
        bound = inspect.signature(self._function).bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.kwargs:
            raise TypeError(
                f"a function with a custom gradient takes positional arguments, and {', '.join(bound.kwargs)} can be "
                "given by name alone"
            )
        return bound.args


def _cotangents(name: str, call: Call, operands: Operands, parts: Any, still: dict[int, Any]) -> list[Any]:
    """The gradients that a backward function returned, for each of the operands."""
    moving = [n for n in range(len(call.spans) - 1) if n not in still]
    if not isinstance(parts, (tuple, list)) or len(parts) != len(moving):
        raise StructureError(
            f"the backward function of `{name}` returns a tuple with a part for each of the {len(moving)} arguments, "
            f"got {f'{len(parts)} parts' if isinstance(parts, (tuple, list)) else type(parts).__name__}"
        )
    given: dict[int, Any] = {}
    for n, part in zip(moving, parts, strict=True):
        span = range(*call.spans[n])
        if part is None:
            continue
        try:
            given.update(zip(span, call.structure(n).flatten_up_to(part), strict=True))
        except ValueError:
            raise StructureError(
                f"the backward function of `{name}` returns for argument {n} something that is not of its structure "
                f"{call.structure(n)}: {part!r:.80}"
            ) from None
    by_cell = _by_cell(name, call, given)
    result: list[Any] = []
    roots = {position: k for k, position in enumerate(call.packed)}
    for place, own in zip(operands.places, operands.dynamic, strict=True):
        if place in roots:
            root = roots[place]
            result.append([_fitting(by_cell.get((root, i)), value) for i, value in enumerate(own)])
        else:
            result.append(_fitting(given.get(place), own))
    return result


def _by_cell(name: str, call: Call, given: dict[int, Any]) -> dict[tuple[int, int], Any]:
    where = {id(cell): (k, i) for k, layout in enumerate(call.frame.layouts) for i, cell in enumerate(layout.cells)}
    found: dict[tuple[int, int], Any] = {}
    for k, position in enumerate(call.packed):
        state = given.get(position)
        if state is None:
            continue
        root: Object = call.frame.roots[k]
        if not isinstance(state, State):
            raise StructureError(
                f"the backward function of `{name}` returns a {type(state).__name__} for a {type(root).__name__}, "
                "whose gradient is a State"
            )
        layout = layout_of(root)
        schema = layout.moduledef.schema
        for path, value in zip(state.paths, state._values, strict=True):
            if path not in schema.index:
                raise StructureError(
                    f"the backward function of `{name}` gives a gradient for `{path_text(path)}`, which the "
                    f"{type(root).__name__} does not have; {near_misses(path, schema.paths)}"
                )
            cell = layout.cells[schema.index[path]]
            if _types(value) != _types(cell._value):
                raise StructureError(
                    f"the backward function of `{name}` gives `{path_text(path)}` a gradient of shapes "
                    f"{_types(value)}, and the Variable has {_types(cell._value)}"
                )
            place = where[id(cell)]
            found[place] = value if place not in found else jax.tree.map(jnp.add, found[place], value)
    return found


def _types(value: Any) -> list[Any]:
    return [np.shape(leaf) for leaf in jax.tree.leaves(value)]


def _fitting(gradient: Any, value: Any) -> Any:
    """A gradient, or zeros, as JAX wants them for a value."""

    def zero(leaf: Any) -> Any:
        aval = jax.typeof(leaf)
        if jnp.issubdtype(aval.dtype, jnp.inexact):
            return jnp.zeros(aval.shape, aval.dtype)
        return np.zeros(aval.shape, jax.dtypes.float0)

    if gradient is None:
        return jax.tree.map(zero, value)
    return jax.tree.map(
        lambda leaf, own: leaf if jnp.issubdtype(jax.typeof(own).dtype, jnp.inexact) else zero(own), gradient, value
    )
