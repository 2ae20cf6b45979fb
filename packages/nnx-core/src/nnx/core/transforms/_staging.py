"""Staging: a body is traced once ahead of the loop or branch that runs it, so that what it changes is known by then."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from nnx.core._explain import captured_objects
from nnx.core._static import StaticProblem, fingerprint
from nnx.core._tracing import is_eager, jit_is_disabled
from nnx.core.transforms._inputs import Call
from nnx.core.transforms._jit import JitWrapped, kept_on
from nnx.core.transforms._lift import Packed, is_object
from nnx.core.transforms._outcome import Outcome, finish

__all__ = ["Once", "Operands", "content_of", "grow", "is_array", "is_number", "stage", "zeros_of"]

_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def is_array(value: Any) -> bool:
    """Whether a value has axes."""
    return isinstance(value, _ARRAYS)


def is_number(value: Any) -> bool:
    """Whether JAX can trace a value: an array or a number, and no string or function."""
    return isinstance(value, (*_ARRAYS, bool, int, float, complex))


def _is_number_but_no_flag(value: Any) -> bool:
    return is_number(value) and not isinstance(value, bool)


_TRACES: Final[dict[str, Callable[[Any], bool]]] = {
    "arrays": is_array,
    "numbers": _is_number_but_no_flag,
    "flags": is_number,
}


class Operands:
    """The part of a call that JAX traces: for each Module the list of its values, and every array and number.

    Attributes:
        call: the call.
        places: the positions among the call's leaves of what is traced.
        dynamic: what is traced.
    """

    __slots__ = ("call", "dynamic", "places")

    def __init__(self, call: Call, traces: str = "numbers") -> None:
        """Sort out what is traced.

        Args:
            call: the call.
            traces: "arrays" alone; "numbers" as well; or "flags" too, which are `True` and `False`. The function gets
                the others as they are.
        """
        self.call = call
        traced = _TRACES[traces]
        self.places = [i for i, leaf in enumerate(call.leaves) if type(leaf) is Packed or traced(leaf)]
        self.dynamic = [
            list(leaf.values) if type(leaf) is Packed else leaf for leaf in (call.leaves[i] for i in self.places)
        ]

    def leaves(self, dynamic: Sequence[Any]) -> list[Any]:
        """The leaves of the call, with these in the place of what is traced."""
        leaves = list(self.call.leaves)
        for i, value in zip(self.places, dynamic, strict=True):
            own = leaves[i]
            leaves[i] = Packed(own.definition, value) if type(own) is Packed else value
        return leaves

    def values_of(self, root: int) -> int:
        """Where in `dynamic` the values of a root are."""
        return self.places.index(self.call.packed[root])


class Once:
    """A function traced once, to be run as often as a transform wants to.

    Attributes:
        closed: the jaxpr.
        out: its output, with abstract values for arrays; what is static in it is there as it is.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        self._tree = jax.tree.structure(shapes)
        self.out = jax.tree.unflatten(self._tree, self.closed.out_avals)
        self._run = jaxpr_as_fun(self.closed)

    def __call__(self, *args: Any) -> Any:
        return jax.tree.unflatten(self._tree, self._run(*jax.tree.leaves(args)))


def zeros_of(shape: Any) -> Any:
    """Zeros of a shape and dtype, which may be a key's."""
    return jnp.zeros(shape.shape, shape.dtype)


def _zeros(_: int, shape: Any) -> Any:
    return zeros_of(shape)


def grow(call: Call, values: Sequence[Any], outcome: Outcome, start: Callable[[int, Any], Any] = _zeros) -> None:
    """Give the Modules of a call the Variables that a trace of the body made.

    The values that the body computes for them come with its runs.

    Args:
        call: the call.
        values: the values that the trace gave.
        outcome: its Outcome.
        start: the first value for a shape, given the number of the Variable in `outcome.post`.
    """
    remaining = iter(values)
    fresh = []
    for i, (origin, write) in enumerate(zip(outcome.cells, outcome.written, strict=True)):
        value = next(remaining) if write else None
        if origin < 0:
            fresh.append(jax.tree.map(functools.partial(start, i), value))
    new = tuple(origin < 0 for origin in outcome.cells)
    finish(call.frame, None, fresh, outcome._replace(written=new, lost=(), draws=(), holes=False))


class _Statics:
    """What a staged call holds besides arrays, compared by content."""

    __slots__ = ("key", "leaves")

    def __init__(self, leaves: tuple[Any, ...], key: Hashable) -> None:
        self.leaves = leaves
        self.key = key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Statics) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


_TRACED = object()


def stage(
    what: str,
    functions: Sequence[Any],
    key: Hashable,
    implementation: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    traces: str = "numbers",
) -> Any:
    """Run `implementation(*args, **kwargs)` in a trace of its own, which is kept on a function.

    So a second call with the same function objects, structure and shapes traces nothing. Nothing is kept for a
    function that sees a Module from outside: the arrays of one are constants of the compiled code, which a later
    change of the Module would not reach.

    Args:
        what: the transform.
        functions: the user's functions; the first keeps what was compiled.
        key: the options.
        implementation: works inside a trace; depends on nothing but the function and the options.
        args: the positional arguments, with Modules.
        kwargs: the arguments by name.
        traces: what is traced, as for `Operands`.
    """
    functions = tuple(functions)
    if jit_is_disabled():
        return implementation(*args, **kwargs)
    if not is_eager():
        if any(map(_sees_objects, functions)):
            return implementation(*args, **kwargs)
        traces = "arrays"  # numbers that are known stay so: a loop over a known range has a gradient
    function = functions[0]
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=is_object)
    traced = _TRACES[traces]
    dynamic = [leaf if is_object(leaf) or traced(leaf) else None for leaf in leaves]
    static = tuple([_TRACED if value is not None else leaf for leaf, value in zip(leaves, dynamic, strict=True)])

    def make() -> JitWrapped[Any, Any]:
        return _compiled(function, implementation)

    content = _content(static, tree, key) if not any(map(_sees_objects, functions)) else None
    if content is None:
        return make()((tree, _Statics(static, object())), dynamic)
    return kept_on(function, make, what, functions, key)((tree, _Statics(static, content)), dynamic)


def _content(static: tuple[Any, ...], tree: Any, key: Hashable) -> Hashable:
    """What to compare a call's statics by; None where something in it cannot be compared by content."""
    try:
        content = tuple([fingerprint(leaf).key for leaf in static])
        hash((content, tree, key))
    except (TypeError, StaticProblem):
        return None
    return content


def content_of(options: Any) -> Hashable:
    """Options as a key: equal for equal options, or one that is equal to no other."""
    try:
        return fingerprint(options).key
    except StaticProblem:
        return object()


def _sees_objects(function: Any) -> bool:
    """Whether a function may read a Module that is not among its arguments."""
    function = inspect.unwrap(function)
    if inspect.isclass(function):
        function = function.__init__  # type: ignore[misc]
    return not isinstance(function, types.FunctionType) or any(True for _ in captured_objects(function))


def _compiled(function: Any, implementation: Callable[..., Any]) -> JitWrapped[Any, Any]:
    """Compile an implementation, in the name of the user's function."""

    @functools.wraps(function, updated=())
    def run(structure: Any, dynamic: list[Any]) -> Any:
        tree, statics = structure
        leaves = [value if static is _TRACED else static for value, static in zip(dynamic, statics.leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, leaves)
        return implementation(*args, **kwargs)

    del run.__wrapped__  # type: ignore[attr-defined]  # its signature is not the function's
    return JitWrapped(run, {"static_argnums": 0, "inline": True})
