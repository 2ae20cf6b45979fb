"""jit: jax.jit for functions of Modules, at jax.jit's own cost."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import jax

from nnx.core._errors import AttributeKindError
from nnx.core._explain import TraceLog, definition_differences, warn_of_captures
from nnx.core._graph import ModuleDef
from nnx.core._layout import Layout, walk_in_turn
from nnx.core._object import Object
from nnx.core._tracing import is_eager
from nnx.core.transforms._callable import lift_callable
from nnx.core.transforms._donate import separate
from nnx.core.transforms._inputs import Inputs, run
from nnx.core.transforms._lift import Frame, as_packed, enter, is_object, is_untouched, lifting
from nnx.core.transforms._outcome import NOTHING
from nnx.core.transforms._report import Report
from nnx.core.transforms._stages import Lowered, Traced
from nnx.core.transforms._values import explain

__all__ = ["JitWrapped", "jit", "kept_on"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
M = TypeVar("M")

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
        if is_eager() or any(map(is_untouched, (*args, kwargs.get("")))):
            raise _NotTracedError
        kwargs.pop("", None)
        args = tuple([as_packed(arg) for arg in args])
        kwargs = {name: as_packed(arg) for name, arg in kwargs.items()}
        signature = log.note(args, kwargs, max_traces)
        if len(log.signatures) == 1:
            warn_of_captures(function, "nnx.jit")
        try:
            inputs = Inputs()
            built = [inputs.unpack(arg, donated=i in donated) for i, arg in enumerate(args)]
            # In the order in which JAX flattened them: positional arguments, then keywords by name.
            named = {name: inputs.unpack(kwargs[name], donated=name in donated_names) for name in sorted(kwargs)}
            out, values, outcome = run(function, inputs, built, {name: named[name] for name in kwargs})
        except BaseException:
            log.forget(signature)
            raise
        if outcome is NOTHING:
            return out, None
        report = Report(outcome, inputs.spans)
        return out, {report: report.split(values)}

    return traced, log


_OFTEN = 4
"""After so many donated calls with one array in two places it is looked for at every call."""


class _NotTracedError(Exception):
    """JAX calls functions as they are (`jax.disable_jit`), and so shall we call the user's."""


def _tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


class JitWrapped(Generic[P, R]):
    """A function compiled by `nnx.jit`. Call it as the function itself."""

    # What a call reads is in slots, which are read faster than a `__dict__`.
    __slots__ = ("__dict__", "__weakref__", "_apart", "_bound", "_direct", "_donates", "_jitted")

    _apart: list[object]
    """Tokens of the layouts of the last donated call."""

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
        static, _ = _named_and_numbered(target, options.get("static_argnums"), options.get("static_argnames"))
        self._static = frozenset(static)
        # Whether Modules are looked for among the arguments themselves; else JAX finds them, wherever they are.
        self._at_top = not static and options.get("in_shardings") is None
        self._direct = self._at_top
        self._apart = []
        self._given_twice = 0
        self._were_apart: set[frozenset[object]] = set()
        # An argument that JAX leaves out as unused may hold an array that another one gives away, unseen.
        self._prunes = options.get("keep_unused") is False
        if self._donates and options.get("keep_unused") is None:
            options["keep_unused"] = True
        if options.get("in_shardings") is not None:
            options["in_shardings"] = _in_shardings(options["in_shardings"], shift)
        if options.get("out_shardings") is not None:
            options["out_shardings"] = (options["out_shardings"], None)
        max_traces = options.pop("max_traces", None)
        traced, self._log = kept_on(
            target, lambda: _trace(target, donated, names, max_traces), donated, names, max_traces
        )
        self._function = target
        self._jitted: Any = jax.jit(traced, **{k: v for k, v in options.items() if v is not None})

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        # The path of every call: what is spent here is the price of the library. So the usual case of `enter` and of
        # `Report.write` is written out.
        if not self._direct:
            return self._call_elsewise(args, kwargs)  # type: ignore[no-any-return]
        full: Any = self._bound + args if self._bound else args
        layouts: list[Layout] = []
        given: list[Any] = []
        usual = True
        for arg in full:
            if isinstance(arg, Object):
                hidden = arg._nnx
                layout = hidden.layout
                if (
                    layout is None
                    or (entered := layout.given) is None
                    or hidden.initializing
                    or (layouts and (len(layouts) > 1 or layout.after.get(layouts[0].token, layout) is not None))
                ):
                    entered = enter(arg, _roots(full, kwargs)[: len(layouts)], layouts)
                    usual = False
                else:
                    layouts.append(layout)
                given.append(entered)
            else:
                given.append(arg)
        if kwargs:
            named: Any = _enter_named(kwargs, _roots(full, {}), layouts)
            usual = False
        if self._donates and [layout.token for layout in layouts] != self._apart:
            given, named, layouts = self._separated(full, kwargs)
            usual = False
        try:
            out, report = self._jitted(*given, **named) if kwargs else self._jitted(*given)
        except Exception as error:
            again = self._instead(error, args, kwargs, layouts)
            if again is None:
                raise
        else:
            if report is None:
                return out  # type: ignore[no-any-return]
            report, values = report.popitem()
            if usual and report.whole is not None and is_eager():
                i = 0  # `zip` and `enumerate` take longer to begin than the whole loop
                for number in report.whole:
                    layout = layouts[number]
                    column = layout.column
                    if column is not None:
                        column[:] = values[i]
                    if column is None or layout.column is not column:  # another thread has moved the cells
                        layout.write(None, values[i], streams=False)
                    i += 1  # noqa: SIM113
                return out  # type: ignore[no-any-return]
            roots = _roots(full, kwargs)
            return report.finish(roots, layouts, out, values)  # type: ignore[no-any-return]
        return again()  # type: ignore[no-any-return]

    def _separated(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any], list[Layout]]:
        """See to it that no array is in two places, and give the arguments as JAX takes them, and the layouts.

        For one set of graphs that is done once: what a call writes is apart by itself, and where a write since then
        has put one array in two places, JAX finds it.
        """
        for separated in (False, True):
            roots: list[Object] = []
            layouts: list[Layout] = []
            given = [enter(arg, roots, layouts) if isinstance(arg, Object) else arg for arg in args]
            named = _enter_named(kwargs, roots, layouts)
            tokens = frozenset([layout.token for layout in layouts])
            if not separated and (self._prunes or tokens not in self._were_apart):
                separate(args, kwargs, self._donated, self._donated_names)
                if len(self._were_apart) > 64:
                    self._were_apart.clear()
                self._were_apart.add(tokens)
                continue
            break
        if not self._prunes:
            self._apart = [layout.token for layout in layouts]
        return given, named, layouts

    def _instead(
        self,
        error: Exception,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layouts: Sequence[Layout],
    ) -> Callable[[], Any] | None:
        """What to do instead of a call that has failed before it changed anything; None to let it fail."""
        if isinstance(error, _NotTracedError):
            return functools.partial(self._function, *self._bound, *args, **kwargs)
        if isinstance(error, AttributeKindError) and _hold_objects((*args, *kwargs.values())):
            self._at_top = self._direct = False
            return functools.partial(self._call_elsewise, args, kwargs)
        if self._donates and _is_given_twice(error):
            self._given_twice += 1
            self._direct = self._direct and self._given_twice < _OFTEN
            return functools.partial(self._call_elsewise, args, kwargs, by_buffer=True)
        explain(_roots((*self._bound, *args), kwargs)[: len(layouts)], layouts, error)
        return None

    def _call_elsewise(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, by_buffer: bool = False) -> Any:
        """Call with arguments that hold Modules, with static ones, or with arrays that are in two places."""
        by_buffer = by_buffer or self._given_twice >= _OFTEN
        if by_buffer:
            separate(self._bound + args, kwargs, self._donated, self._donated_names, by_buffer=True)
        try:
            return self.run(self._jitted, args, kwargs, at_top=self._at_top)
        except _NotTracedError:
            pass
        except Exception as error:
            if by_buffer or not self._donates or not _is_given_twice(error):
                raise
            self._given_twice += 1
            by_buffer = True
        if by_buffer:
            return self._call_elsewise(args, kwargs, by_buffer=True)
        return self._function(*self._bound, *args, **kwargs)

    def run(self, jitted: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, at_top: bool) -> Any:
        """Call a compiled function with Modules, and write back what it changed."""
        return self._finished(self.give(jitted, args, kwargs, at_top=at_top))

    def run_ahead(
        self,
        compiled: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        at_top: bool,
        definitions: Sequence[ModuleDef[Any]],
    ) -> Any:
        """Call what was compiled ahead of time, for Modules of these definitions, without the static arguments."""
        try:
            given = self.give(compiled, args, kwargs, at_top=at_top, static=False)
        except TypeError:
            roots = [leaf for leaf in jax.tree.leaves((args, kwargs), is_leaf=is_object) if isinstance(leaf, Object)]
            refuse_others(definitions, [graph.moduledef for graph in walk_in_turn([*self._bound, *roots])])
            raise
        return self._finished(given)

    def _finished(self, given: tuple[Sequence[Object], Sequence[Layout], Any]) -> Any:
        roots, layouts, (out, report) = given
        if report is None:
            return out
        ((report, values),) = report.items()
        return report.finish(roots, layouts, out, values)

    def give(
        self, jitted: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, at_top: bool, static: bool = True
    ) -> tuple[Sequence[Object], Sequence[Layout], Any]:
        """Hand arguments to a function of JAX's in the form that it takes.

        Args:
            jitted: the function.
            args: the positional arguments.
            kwargs: those by name.
            at_top: whether Modules are arguments themselves, and in no container.
            static: whether the static arguments are among them.

        Returns:
            The Modules, their layouts, and what the function has returned.
        """
        args = self._bound + args
        if self._donates:
            separate(args, kwargs, self._donated, self._donated_names)
        if at_top:
            roots: list[Object] = []
            layouts: list[Layout] = []
            given = [enter(arg, roots, layouts) if isinstance(arg, Object) else arg for arg in args]
            named = _enter_named(kwargs, roots, layouts)
            try:
                return roots, layouts, jitted(*given, **named)
            except (TypeError, RuntimeError) as error:
                explain(roots, layouts, error)
                raise
        # JAX meets the Modules while it flattens the arguments, the Frame before all others.
        first = next((i for i in range(len(args)) if not static or i not in self._static), None)
        if first is None:
            frame = Frame()
            kwargs = {"": frame, **kwargs}
        else:
            frame = Frame(args[first])
            args = (*args[:first], frame, *args[first + 1 :])
        with lifting(frame):
            try:
                result = jitted(*args, **kwargs)
            except (TypeError, RuntimeError) as error:
                explain(*frame.known(), error)
                raise
        return *frame.known(), result

    def _staged(self, what: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool, list[Any]]:
        """A stage of JAX's, whether it takes Modules as arguments themselves, and their definitions."""
        at_top = self._at_top and not _hold_objects((*args, *kwargs.values()))
        _, layouts, stage = self.give(getattr(self._jitted, what), args, kwargs, at_top=at_top)
        return stage, at_top, [layout.moduledef for layout in layouts]

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> JitWrapped[P, R]: ...
    @overload
    def __get__(self: Callable[Concatenate[M, Q], R], instance: M, owner: type | None = None) -> BoundJit[Q, R]: ...
    @overload
    def __get__(self, instance: Any, owner: type | None = None) -> JitWrapped[P, R]: ...  # static
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else BoundJit(self, instance)

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> Lowered:
        """Trace and lower for these arguments without running anything; see `jax.jit(f).lower`."""
        return Lowered(self, *self._staged("lower", args, kwargs))

    def trace(self, *args: P.args, **kwargs: P.kwargs) -> Traced:
        """Trace for these arguments without running anything; see `jax.jit(f).trace`."""
        return Traced(self, *self._staged("trace", args, kwargs))

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
        self.__wrapped__: JitWrapped[..., R] = wrapped
        self.__self__: Any = instance

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.__wrapped__(self.__self__, *args, **kwargs)

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> Lowered:
        """See `JitWrapped.lower`."""
        return Lowered(self.__wrapped__, *self.__wrapped__._staged("lower", self._full(args), kwargs), self._given())

    def trace(self, *args: P.args, **kwargs: P.kwargs) -> Traced:
        """See `JitWrapped.trace`."""
        return Traced(self.__wrapped__, *self.__wrapped__._staged("trace", self._full(args), kwargs), self._given())

    def eval_shape(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """See `JitWrapped.eval_shape`."""
        return self.__wrapped__.eval_shape(*self._full(args), **kwargs)

    def _full(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.__self__, *args)

    def _given(self) -> tuple[Any, ...]:
        """What a function compiled ahead of time is given of the instance: nothing, if that is a static argument."""
        return () if 0 in self.__wrapped__._static else (self.__self__,)

    def clear_cache(self) -> None:
        """Forget every compiled version, for all instances."""
        self.__wrapped__.clear_cache()


def _roots(args: Iterable[Any], kwargs: dict[str, Any]) -> list[Object]:
    """The Modules among arguments, in the order in which they are entered."""
    return [arg for arg in (*args, *[kwargs[name] for name in sorted(kwargs)]) if isinstance(arg, Object)]


def _enter_named(kwargs: dict[str, Any], roots: list[Object], layouts: list[Layout]) -> dict[str, Any]:
    """Enter the Modules among arguments by name, in the order in which JAX flattens these."""
    return {
        name: enter(arg, roots, layouts) if isinstance(arg, Object) else arg for name, arg in sorted(kwargs.items())
    }


def _hold_objects(args: Iterable[Any]) -> bool:
    """Whether Modules are in containers among the arguments, where JAX alone finds them."""
    return any(
        isinstance(leaf, Object)
        for arg in args
        if not isinstance(arg, Object)
        for leaf in jax.tree.leaves(arg, is_leaf=is_object)
    )


def refuse_others(expected: Sequence[ModuleDef[Any]], given: Sequence[ModuleDef[Any]]) -> None:
    """Raise if Modules are of other definitions than a function was compiled for."""
    if len(expected) != len(given):
        raise TypeError(f"this function was compiled for {len(expected)} Modules, and got {len(given)}")
    for number, (old, new) in enumerate(zip(expected, given, strict=True)):
        if old is not new:
            lines = "\n  ".join(definition_differences(old, new))
            raise TypeError(
                f"Module {number + 1} of the arguments does not match the one that this function was compiled for:\n"
                f"  {lines}\n"
                "What is compiled ahead of time takes one structure. Compile it for this one too, or call the "
                "function that was lowered"
            )


def _is_given_twice(error: Exception) -> bool:
    """Whether JAX has refused to give an array away that is elsewhere in the call as well."""
    return "donate(a)" in str(error)


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
        in_shardings: as for `jax.jit`; an argument that is or holds a Module takes one sharding for all its arrays, or
            None for those that they have.
        out_shardings: as for `jax.jit`, for what is returned besides Modules.
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
