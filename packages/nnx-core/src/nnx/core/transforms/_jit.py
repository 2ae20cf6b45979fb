"""jit: jax.jit for functions of Modules, at jax.jit's own cost."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import jax
import numpy as np

from nnx.core._errors import VariableError
from nnx.core._explain import TraceLog, warn_of_captures
from nnx.core._state import path_text
from nnx.core._variable import PLAIN
from nnx.core.transforms._callable import lift_callable
from nnx.core.transforms._donate import separate
from nnx.core.transforms._inputs import Inputs, run
from nnx.core.transforms._lift import Frame, _local, first_argument, is_untouched, lifting
from nnx.core.transforms._outcome import NOTHING, finish
from nnx.core.transforms._stages import Lowered, Traced

__all__ = ["JitWrapped", "jit", "kept_on"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_TRACED = "__nnx_traced__"
_Traced = Callable[..., Any]


def kept_on(function: Any, make: Callable[[], Any], *key: Any) -> Any:
    """What `make` makes for a function and a key, made once for each and kept on the function itself.

    So wrapping a function again finds what was compiled for it, and nothing outlives the function. Only a plain
    function, and what a transform has made of one, keeps anything.
    """
    if isinstance(function, type):
        function, key = function.__init__, (function, *key)  # type: ignore[misc]
    if not isinstance(function, types.FunctionType) and not hasattr(function, "__wrapped__"):
        return make()
    owner, held = function.__dict__.get(_TRACED, (None, {}))
    if owner is None or owner() is not function:  # `functools.wraps` copies it to other functions
        held = {}
        function.__dict__[_TRACED] = (weakref.ref(function), held)
    found = held.get(key)
    if found is None:
        found = held[key] = make()
    return found


def _trace(
    function: Callable[..., Any], donated: tuple[int, ...], donated_names: tuple[str, ...], max_traces: int | None
) -> tuple[_Traced, TraceLog]:
    """The function that JAX traces for a function of Modules, and what it was traced for so far."""
    log = TraceLog(function)

    @functools.wraps(function, updated=())
    def traced(*args: Any, **kwargs: Any) -> Any:
        if any(map(is_untouched, (*args, kwargs.get("")))):
            kwargs.pop("", None)
            return function(*[arg.argument if type(arg) is Frame else arg for arg in args], **kwargs), [], NOTHING
        kwargs.pop("", None)
        args = tuple([first_argument(arg) for arg in args])
        signature = log.note(args, kwargs, max_traces)
        if len(log.signatures) == 1:
            warn_of_captures(function, "nnx.jit")
        try:
            inputs = Inputs()
            built = [inputs.unpack(arg, donated=i in donated) for i, arg in enumerate(args)]
            # In the order in which JAX flattened them: positional arguments, then keywords by name.
            named = {name: inputs.unpack(kwargs[name], donated=name in donated_names) for name in sorted(kwargs)}
            return run(function, inputs, built, {name: named[name] for name in kwargs})
        except BaseException:
            log.forget(signature)
            raise

    return traced, log


def _tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


class JitWrapped(Generic[P, R]):
    """A function compiled by `nnx.jit`. Call it as the function itself."""

    def __init__(self, function: Callable[P, R], options: dict[str, Any]) -> None:
        target: Any
        target, self._bound = lift_callable(function, "nnx.jit")
        functools.update_wrapper(self, target, updated=())
        shift = len(self._bound)
        options = dict(options)
        for name in ("static_argnums", "donate_argnums"):
            if options.get(name) is not None:
                options[name] = tuple(n + shift if n >= 0 else n for n in _tuple(options[name]))
        donated, names = _named_and_numbered(target, options.get("donate_argnums"), options.get("donate_argnames"))
        self._donates = bool(donated or names)
        self._donated, self._donated_names = donated, names
        static, static_names = _named_and_numbered(
            target, options.get("static_argnums"), options.get("static_argnames")
        )
        self._static, self._static_names = frozenset(static), frozenset(static_names)
        self._plain = not (static or self._bound)
        if options.get("in_shardings") is not None:
            options["in_shardings"] = _in_shardings(options["in_shardings"], shift)
        if options.get("out_shardings") is not None:
            options["out_shardings"] = (options["out_shardings"], None, None)
        max_traces = options.pop("max_traces", None)
        traced, self._log = kept_on(
            target, lambda: _trace(target, donated, names, max_traces), donated, names, max_traces
        )
        self._jitted: Any = jax.jit(traced, **{k: v for k, v in options.items() if v is not None})

    def _first_dynamic(self, count: int) -> int | None:
        for i in range(count):
            if i not in self._static:
                return i
        return None

    def _prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, static: bool = True
    ) -> tuple[Frame, tuple[Any, ...], dict[str, Any]]:
        """Put the Frame of a call in the place of the first argument that JAX flattens.

        Args:
            args: the positional arguments.
            kwargs: those by name.
            static: whether the static ones are among them.
        """
        args = self._bound + args
        if self._donates:
            separate(args, kwargs, self._donated, self._donated_names)
        first = self._first_dynamic(len(args)) if static else (0 if args else None)
        if first is None:
            frame = Frame()
            return frame, args, {"": frame, **kwargs}
        frame = Frame(args[first])
        return frame, (*args[:first], frame, *args[first + 1 :]), kwargs

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        # The path of every call: what is spent here is the price of the library.
        if self._plain and args:
            if self._donates:
                separate(args, kwargs, self._donated, self._donated_names)
            frame = Frame(args[0])
            rest: Any = args[1:]
            local = _local
            local.frame = frame
            try:
                out, values, outcome = self._jitted(frame, *rest, **kwargs)
            except TypeError:
                check_values(frame)
                raise
            finally:
                # Inside a trace the flag is None as well, and a flattening never calls a compiled function.
                local.frame = None
        else:
            frame, lifted, named = self._prepare(args, kwargs)
            with lifting(frame):
                try:
                    out, values, outcome = self._jitted(*lifted, **named)
                except TypeError:
                    check_values(frame)
                    raise
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

    def trace(self, *args: P.args, **kwargs: P.kwargs) -> Traced:
        """Trace for these arguments without running anything; see `jax.jit(f).trace`."""
        return Traced(self, self._staged("trace", args, kwargs))

    def eval_shape(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """What a call would return, with `jax.ShapeDtypeStruct` in the place of arrays; see `nnx.eval_shape`.

        The arguments are left as they are.
        """
        from nnx.core.transforms._abstract import eval_shape

        return eval_shape(self, *args, **kwargs)

    def clear_cache(self) -> None:
        """Forget every compiled version."""
        self._jitted.clear_cache()
        self._log.signatures.clear()

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
        return Lowered(self.__wrapped__, self.__wrapped__._staged("lower", self._full(args), kwargs), (self.__self__,))

    def trace(self, *args: P.args, **kwargs: P.kwargs) -> Traced:
        """See `JitWrapped.trace`."""
        return Traced(self.__wrapped__, self.__wrapped__._staged("trace", self._full(args), kwargs), (self.__self__,))

    def eval_shape(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """See `JitWrapped.eval_shape`."""
        return self.__wrapped__.eval_shape(*self._full(args), **kwargs)

    def _full(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.__self__, *args)

    def clear_cache(self) -> None:
        """Forget every compiled version, for all instances."""
        self.__wrapped__.clear_cache()


def check_values(frame: Frame) -> None:
    """Raise if a Variable holds what JAX cannot take, by path, where JAX itself can only count."""
    for root, layout in zip(
        getattr(frame, "roots", ()), frame.layouts if hasattr(frame, "layouts") else (), strict=True
    ):
        for cell, path in zip(layout.cells, layout.moduledef.schema.paths, strict=True):
            for leaf in jax.tree.leaves(cell._value):
                if not isinstance(leaf, (np.ndarray, *PLAIN)):
                    raise VariableError(
                        f"`{path_text(path)}` of the {type(root).__name__} holds a {type(leaf).__name__} "
                        f"({leaf!r:.60}): a Variable that goes into a transform holds arrays or numbers"
                    )


def _in_shardings(given: Any, shift: int) -> Any:
    if not isinstance(given, (tuple, list)):
        return given
    # JAX leaves static arguments out, so the Frame's place is always the first.
    shardings = [None] * shift + list(given)
    if shardings and not (shardings[0] is None or isinstance(shardings[0], jax.sharding.Sharding)):
        shardings[0] = Frame(shardings[0])
    return tuple(shardings)


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
    return JitWrapped(f, options)
