"""jit: jax.jit for functions of Modules, at jax.jit's own cost."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import jax
import jax.numpy as jnp

from nnx.core._explain import TraceLog, warn_of_captures
from nnx.core._layout import layout_of
from nnx.core._object import Object
from nnx.core._variable import Cell, set_value
from nnx.core.transforms._lift import (
    NOTHING,
    Frame,
    Inputs,
    _local,
    finish,
    first_argument,
    is_object,
    is_untouched,
    lifting,
    run,
)

__all__ = ["Compiled", "JitWrapped", "Lowered", "jit"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_TRACED = "__nnx_traced__"


def _traced(
    function: Callable[..., Any], donated: tuple[int, ...], donated_names: tuple[str, ...], max_traces: int | None
) -> Callable[..., Any]:
    """The function that JAX traces for a function of Modules: one for each function and donation.

    It is kept on the function itself, so that wrapping a function again finds what was compiled for it, and so that
    nothing outlives the function.
    """
    held = function.__dict__.setdefault(_TRACED, {}) if isinstance(function, types.FunctionType) else {}
    found = held.get((donated, donated_names, max_traces))
    if found is not None:
        return found  # type: ignore[no-any-return]
    log = TraceLog(function)

    @functools.wraps(function, updated=())
    def traced(*args: Any, **kwargs: Any) -> Any:
        if any(map(is_untouched, (*args, kwargs.get("")))):
            kwargs.pop("", None)
            return function(*[arg.argument if type(arg) is Frame else arg for arg in args], **kwargs), [], NOTHING
        kwargs.pop("", None)
        args = tuple([first_argument(arg) for arg in args])
        log.note(args, kwargs, max_traces)
        if len(log.signatures) == 1:
            warn_of_captures(function, "nnx.jit")
        inputs = Inputs()
        built = [inputs.unpack(arg, donated=i in donated) for i, arg in enumerate(args)]
        # In the order in which JAX flattened them: positional arguments, then keywords by name.
        named = {name: inputs.unpack(kwargs[name], donated=name in donated_names) for name in sorted(kwargs)}
        out, values, outcome = run(function, inputs, built, {name: named[name] for name in kwargs})
        return out, values, outcome

    held[donated, donated_names, max_traces] = traced
    return traced


def _tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


class JitWrapped(Generic[P, R]):
    """A function compiled by `nnx.jit`. Call it as the function itself."""

    def __init__(self, function: Callable[P, R], options: dict[str, Any]) -> None:
        target: Any = function
        self._bound: tuple[Any, ...] = ()
        if isinstance(function, types.MethodType) and isinstance(function.__self__, Object):
            target, self._bound = function.__func__, (function.__self__,)
        elif isinstance(function, Object):
            target, self._bound = type(function).__call__, (function,)  # type: ignore[operator]
        functools.update_wrapper(self, target)
        shift = len(self._bound)
        options = dict(options)
        for name in ("static_argnums", "donate_argnums"):
            if options.get(name) is not None:
                options[name] = tuple(n + shift if n >= 0 else n for n in _tuple(options[name]))
        donated, names = _named_and_numbered(target, options.get("donate_argnums"), options.get("donate_argnames"))
        self._donates = bool(donated or names)
        self._donated, self._donated_names = donated, names
        static, _ = _named_and_numbered(target, options.get("static_argnums"), options.get("static_argnames"))
        self._static = frozenset(static)
        self._plain = not (static or self._donates or self._bound)
        if options.get("in_shardings") is not None:
            options["in_shardings"] = self._in_shardings(options["in_shardings"], shift)
        if options.get("out_shardings") is not None:
            options["out_shardings"] = (options["out_shardings"], None, None)
        self._jitted: Any = jax.jit(
            _traced(target, donated, names, options.pop("max_traces", None)),
            **{k: v for k, v in options.items() if v is not None},
        )

    def _in_shardings(self, given: Any, shift: int) -> Any:
        if not isinstance(given, (tuple, list)):
            return given
        shardings = [None] * shift + list(given)
        first = self._first_dynamic(len(shardings))
        if first is not None and not (shardings[first] is None or isinstance(shardings[first], jax.sharding.Sharding)):
            shardings[first] = Frame(shardings[first])
        return tuple(shardings)

    def _first_dynamic(self, count: int) -> int | None:
        for i in range(count):
            if i not in self._static:
                return i
        return None

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Frame, tuple[Any, ...], dict[str, Any]]:
        """Put the Frame of a call in the place of the first argument that JAX flattens."""
        args = self._bound + args
        if self._donates:
            _separate(self, args, kwargs)
        first = self._first_dynamic(len(args))
        if first is None:
            frame = Frame()
            return frame, args, {"": frame, **kwargs}
        frame = Frame(args[first])
        return frame, (*args[:first], frame, *args[first + 1 :]), kwargs

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        # The path of every call: what is spent here is the price of the library.
        if self._plain and args:
            frame = Frame(args[0])
            rest: Any = args[1:]
            local = _local
            local.frame = frame
            try:
                out, values, outcome = self._jitted(frame, *rest, **kwargs)
            finally:
                # Inside a trace the flag is None as well, and a flattening never calls a compiled function.
                local.frame = None
        else:
            frame, lifted, named = self._prepare(args, kwargs)
            with lifting(frame):
                out, values, outcome = self._jitted(*lifted, **named)
        if outcome is NOTHING:
            return out  # type: ignore[no-any-return]
        return finish(frame, out, values, outcome)  # type: ignore[no-any-return]

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> JitWrapped[P, R]: ...
    @overload
    def __get__(self: JitWrapped[Concatenate[T, P], R], instance: T, owner: type | None = None) -> BoundJit[P, R]: ...  # type: ignore[misc]
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else BoundJit(self, instance)

    def _staged(self, what: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame, args, kwargs = self._prepare(args, kwargs)
        with lifting(frame):
            return getattr(self._jitted, what)(*args, **kwargs)

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> Lowered:
        """Trace and lower for these arguments without running anything; see `jax.jit(f).lower`."""
        return Lowered(self, self._staged("lower", args, kwargs))

    def trace(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Trace for these arguments without running anything; see `jax.jit(f).trace`."""
        return self._staged("trace", args, kwargs)

    def clear_cache(self) -> None:
        """Forget every compiled version."""
        self._jitted.clear_cache()

    def _cache_size(self) -> int:
        return self._jitted._cache_size()

    def __repr__(self) -> str:
        return f"nnx.jit({getattr(self, '__qualname__', self._jitted)})"


class BoundJit(Generic[P, R]):
    """A compiled method together with its Module."""

    __slots__ = ("__self__", "__wrapped__")

    def __init__(self, wrapped: JitWrapped[..., R], instance: Any) -> None:
        self.__wrapped__ = wrapped
        self.__self__ = instance

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.__wrapped__(self.__self__, *args, **kwargs)

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> Lowered:
        """See `JitWrapped.lower`."""
        return self.__wrapped__.lower(self.__self__, *args, **kwargs)

    def trace(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """See `JitWrapped.trace`."""
        return self.__wrapped__.trace(self.__self__, *args, **kwargs)

    def clear_cache(self) -> None:
        """Forget every compiled version, for all instances."""
        self.__wrapped__.clear_cache()


class Lowered:
    """A lowered function of Modules: `jax.stages.Lowered` with `compile()` giving a function that takes Modules."""

    def __init__(self, wrapped: JitWrapped[..., Any], lowered: Any) -> None:
        self._wrapped = wrapped
        self._lowered = lowered

    def compile(self, *args: Any, **kwargs: Any) -> Compiled:
        """Compile."""
        return Compiled(self._wrapped, self._lowered.compile(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowered, name)


class Compiled:
    """A compiled function of Modules; call it with arguments of the same structure and shapes."""

    def __init__(self, wrapped: JitWrapped[..., Any], compiled: Any) -> None:
        self._wrapped = wrapped
        self._compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame, args, kwargs = self._wrapped._prepare(args, kwargs)
        with lifting(frame):
            out, values, outcome = self._compiled(*args, **kwargs)
        return finish(frame, out, values, outcome)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


def _named_and_numbered(target: Any, numbers: Any, names: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Arguments by number and by name, where one is not given inferred from the other, as jax.jit does."""
    own_numbers, own_names = _tuple(numbers), _tuple(names)
    if not own_numbers and not own_names:
        return (), ()
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # builtins have no signature
        return own_numbers, own_names
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    own_numbers = tuple(n if n >= 0 else n + len(positional) for n in own_numbers)
    if names is None:
        own_names = tuple(positional[n] for n in own_numbers if n < len(positional))
    elif numbers is None:
        own_numbers = tuple(positional.index(name) for name in own_names if name in positional)
    return own_numbers, own_names


def _separate(wrapped: JitWrapped[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Give each cell of the donated Modules an array of its own, since a buffer can be donated but once."""
    every: list[Any] = []
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, Object):
            every += [cell._value for cell in layout_of(arg).cells]
        elif isinstance(arg, jax.Array):
            every.append(arg)
        else:
            cells, bare = _cells_and_leaves(arg)
            every += [cell._value for cell in cells] + bare
    if len(set(map(id, every))) == len(every):
        return  # as it is nearly always: no array is in two places
    donated: list[Any] = []
    others: list[Any] = []
    for i, arg in enumerate(args):
        (donated if i in wrapped._donated else others).append(arg)
    for name, arg in kwargs.items():
        (donated if name in wrapped._donated_names else others).append(arg)
    cells, bare = _cells_and_leaves(others)
    own_cells, own_bare = _cells_and_leaves(donated)
    used = {id(value) for value in [*(cell._value for cell in cells), *bare, *own_bare]}
    beside = set(cells)
    for cell in dict.fromkeys(own_cells):
        value = cell._value
        if isinstance(value, jax.Array) and cell not in beside:
            if id(value) in used:
                set_value(cell, jnp.copy(value))
            used.add(id(value))


def _cells_and_leaves(tree: Any) -> tuple[list[Cell], list[Any]]:
    """The cells of the Modules in a pytree, and its other leaves."""
    cells: list[Cell] = []
    bare = []
    for leaf in jax.tree.leaves(tree, is_leaf=is_object):
        if isinstance(leaf, Object):
            cells += layout_of(leaf).cells
        else:
            bare.append(leaf)
    return cells, bare


@overload
def jit(
    f: Callable[P, R],
    /,
    *,
    in_shardings: Any = None,
    out_shardings: Any = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    keep_unused: bool | None = None,
    inline: bool | None = None,
    max_traces: int | None = None,
) -> JitWrapped[P, R]: ...
@overload
def jit(
    f: None = None,
    /,
    *,
    in_shardings: Any = None,
    out_shardings: Any = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    keep_unused: bool | None = None,
    inline: bool | None = None,
    max_traces: int | None = None,
) -> Callable[[Callable[P, R]], JitWrapped[P, R]]: ...
def jit(
    f: Any = None,
    /,
    *,
    in_shardings: Any = None,
    out_shardings: Any = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    keep_unused: bool | None = None,
    inline: bool | None = None,
    max_traces: int | None = None,
) -> Any:
    """Compile a function that takes and returns Modules and Contexts, anywhere in its arguments and output.

    Changes that the function makes to its arguments come out: new values, and new, removed or changed attributes.
    References shared between arguments stay shared, and an argument that is returned is the same object. If the
    function raises, every Module is as it was. Only values that change are outputs of the compiled function.

    Args:
        f: the function; a Module or a bound method of one is lifted together with that Module. Without it, a decorator.
        in_shardings: as for `jax.jit`.
        out_shardings: as for `jax.jit`.
        static_argnums: as for `jax.jit`.
        static_argnames: as for `jax.jit`.
        donate_argnums: arguments whose buffers may be reused. A donated Module stays usable: it gets new arrays.
        donate_argnames: the same by name.
        keep_unused: as for `jax.jit`.
        inline: as for `jax.jit`.
        max_traces: how often the function may be traced; once more is a RetraceError that says what differed.

    Returns:
        The compiled function, with `lower`, `trace` and `clear_cache`.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Counter(nnx.Module):
        ...     def __init__(self):
        ...         self.count = nnx.var("counts", 0)
        >>> @nnx.jit
        ... def step(counter, x):
        ...     counter.count += 1
        ...     return x * 2
        >>> counter = Counter()
        >>> float(step(counter, 1.5)), int(counter.count)
        (3.0, 1)
    """
    options = {
        "in_shardings": in_shardings,
        "out_shardings": out_shardings,
        "static_argnums": static_argnums,
        "static_argnames": static_argnames,
        "donate_argnums": donate_argnums,
        "donate_argnames": donate_argnames,
        "keep_unused": keep_unused,
        "inline": inline,
        "max_traces": max_traces,
    }
    if f is None:
        return lambda function: JitWrapped(function, options)
    if not callable(f):
        raise TypeError(f"nnx.jit takes a callable, got {type(f).__name__}")
    return JitWrapped(f, options)
