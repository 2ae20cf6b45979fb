"""Why a function was traced again, and what it captured: the answers that a slow or wrong compiled function needs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from nnx.core._errors import NnxError, RetraceError
from nnx.core._graph import CELL, METHOD, OBJECT, ModuleDef
from nnx.core._layout import layout_of
from nnx.core._object import Object
from nnx.core._state import Path, path_text
from nnx.core._variable import Buffer

__all__ = ["CaptureWarning", "RetraceWarning", "TraceLog", "explain_retraces", "unnoted", "warn_of_captures"]

logger = logging.getLogger("nnx")


class RetraceWarning(UserWarning):
    """A function is traced again for a static that can only be compared by identity, as each new one will be."""


class CaptureWarning(UserWarning):
    """A function that is compiled closes over a Module, whose arrays become constants of the compiled code."""


_explaining: set[int] = set()
"""The `explain_retraces` that are on."""


class explain_retraces(contextlib.ContextDecorator):  # noqa: N801 - read as a function
    """Log why functions are traced again, from now on, or within a `with` block.

    Each time that an `nnx.jit` function is traced for other arguments than before, the logger `nnx` says what
    differs, by path: ``train_step retraced: static `encoder.dropout.rate` 0.5 -> 0.1``.

    Example:
        >>> import logging, nnx
        >>> with nnx.explain_retraces():
        ...     pass
    """

    def __init__(self) -> None:
        _explaining.add(id(self))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop logging."""
        _explaining.discard(id(self))


class Signature(NamedTuple):
    """What one trace was made for: definitions of Modules, abstract values of arrays, static arguments."""

    modules: dict[str, ModuleDef[Any]]
    arrays: dict[str, str]
    statics: dict[str, str]


_quiet = threading.local()


@contextlib.contextmanager
def unnoted() -> Iterator[None]:
    """What this thread traces inside compiles nothing, and so counts for no `max_traces` and explains no retrace."""
    before = getattr(_quiet, "on", False)
    _quiet.on = True
    try:
        yield
    finally:
        _quiet.on = before


class TraceLog:
    """The signatures that one function was traced for."""

    __slots__ = ("name", "parameters", "signatures", "traces")

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = getattr(function, "__qualname__", type(function).__name__)
        self.signatures: list[Signature] = []
        self.traces = 0
        try:
            self.parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # builtins have no signature
            self.parameters = []

    def note(self, args: Sequence[Any], kwargs: Mapping[str, Any], max_traces: int | None) -> Signature:
        """Note one more trace, and say why it was needed where someone asked or where it will happen forever.

        Returns:
            What the trace is made for.

        Raises:
            RetraceError: there are more than `max_traces`.
        """
        if getattr(_quiet, "on", False):
            return Signature({}, {}, {})
        signature = self._signature(args, kwargs)
        if self.signatures:
            nearest = min((differences(old, signature) for old in self.signatures), key=_distance)
            lines = nearest or ["the arguments are the same; the mesh, a sharding or JAX's configuration is not"]
            if _explaining:
                logger.warning("%s retraced: %s", self.name, "; ".join(lines))
            elif max_traces is None or len(self.signatures) < max_traces:
                self._warn_of_identity(nearest)
            if max_traces is not None and len(self.signatures) >= max_traces:
                raise RetraceError(
                    f"{self.name} would be traced {len(self.signatures) + 1} times, and max_traces={max_traces}: "
                    f"{'; '.join(lines)}"
                )
        self.signatures.append(signature)
        self.traces += 1
        return signature

    def forget(self, signature: Signature) -> None:
        """Take back a trace that raised: it compiled nothing."""
        self.signatures = [item for item in self.signatures if item is not signature]

    def _warn_of_identity(self, lines: Sequence[str]) -> None:
        named = [line for line in lines if _BY_IDENTITY in line]
        if named and len(named) == len(lines):
            warnings.warn(
                f"{self.name} retraced: {'; '.join(named)}. Define it once, outside of what is called repeatedly",
                RetraceWarning,
                stacklevel=2,
            )

    def _label(self, number: int) -> str:
        for position, parameter in enumerate(self.parameters):
            if parameter.kind is parameter.VAR_POSITIONAL:
                return f"{parameter.name}[{number - position}]"
            if position == number:
                return parameter.name
        return f"argument {number}"

    def _signature(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Signature:
        from nnx.core.transforms._lift import is_packed, packed_of

        signature = Signature({}, {}, {})
        labelled = [(self._label(i), arg) for i, arg in enumerate(args)] + sorted(kwargs.items())
        for label, arg in labelled:
            for keys, leaf in jax.tree_util.tree_leaves_with_path(arg, is_leaf=is_packed):
                where = label + jax.tree_util.keystr(keys)
                if is_packed(leaf):
                    packed = packed_of(leaf)
                    signature.modules[where] = packed.moduledef
                    for path, value in zip(packed.moduledef.schema.paths, packed.values, strict=True):
                        for inner, item in jax.tree_util.tree_leaves_with_path(value):
                            signature.arrays[f"{where}.{'.'.join(path)}{jax.tree_util.keystr(inner)}"] = _abstract(item)
                elif isinstance(leaf, (jax.Array, np.ndarray)):
                    signature.arrays[where] = _abstract(leaf)
                else:
                    signature.statics[where] = repr(leaf)[:120]
        return signature


def _abstract(value: Any) -> str:
    aval = jax.typeof(value)
    return f"{aval.str_short()}{' (weak)' if getattr(aval, 'weak_type', False) else ''}"


_BY_IDENTITY = "compared by identity"


def differences(old: Signature, new: Signature) -> list[str]:
    """What differs between two signatures, as sentences."""
    lines: list[str] = []
    for label in sorted({*old.modules, *new.modules}):
        first, second = old.modules.get(label), new.modules.get(label)
        if first is None or second is None:
            lines.append(f"`{label}` {'became' if first is None else 'is no longer'} a Module")
        elif first is not second:
            lines += definition_differences(first, second)
    lines += _changed("argument", old.arrays, new.arrays)
    lines += _changed("static argument", old.statics, new.statics)
    return lines


def _distance(lines: Sequence[str]) -> tuple[int, int]:
    """How far apart two signatures are; of equally near ones the one that differs in an identity tells more."""
    return len(lines), sum(_BY_IDENTITY not in line for line in lines)


def _changed(what: str, old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    for label in [*old, *(name for name in new if name not in old)]:
        if old.get(label) != new.get(label):
            yield f"{what} `{label}` {old.get(label, 'absent')} -> {new.get(label, 'absent')}"


def definition_differences(old: ModuleDef[Any], new: ModuleDef[Any]) -> list[str]:
    """What differs between two definitions, by path."""
    return attribute_differences(old, new) or ["the order or sharing of Modules changed"]


def attribute_differences(old: ModuleDef[Any], new: ModuleDef[Any]) -> list[str]:
    """The attributes that differ between two definitions."""
    lines = []
    many = len(old.roots) > 1 or len(new.roots) > 1
    first, second = _attributes(old, many), _attributes(new, many)
    for path in [*first, *(path for path in second if path not in first)]:
        text = ".".join(path) or "the Module"
        before, after = first.get(path), second.get(path)
        if before is None:
            lines.append(f"`{text}` appeared")
        elif after is None:
            lines.append(f"`{text}` disappeared")
        elif before[0] != after[0]:
            lines.append(f"`{text}` {before[1]} -> {after[1]}")
        elif before[2] != after[2]:
            identity = f" ({_BY_IDENTITY})" if before[3] and after[3] else ""
            lines.append(f"{before[0]} `{text}` {before[1]} -> {after[1]}{identity}")
    return lines


def _attributes(moduledef: ModuleDef[Any], many: bool) -> dict[Path, tuple[str, str, Any, bool]]:
    """For each path what is there: its kind, a text, a key to compare, and whether it is compared by identity.

    The paths begin with the number of the root if there are `many`.
    """
    result: dict[Path, tuple[str, str, Any, bool]] = {}
    prefix = ("0",) if many and len(moduledef.roots) == 1 else ()
    node_paths = [(*prefix, *path) for path in moduledef.node_paths()]
    for path, (kind, attributes) in zip(node_paths, moduledef.nodes, strict=True):
        result[path] = ("Module", kind.__qualname__, kind, False)
        for name, how, payload in attributes:
            here = (*path, name)
            if how is OBJECT:
                if payload < 0 or node_paths[payload] != here:
                    other = path_text(node_paths[payload]) if payload >= 0 else "another argument"
                    result[here] = ("shared Module", f"shared with `{other}`", payload, False)
            elif how is CELL:
                if payload < 0:
                    result[here] = ("Variable", "tied to another argument", payload, False)
                    continue
                first, cell, metadata = moduledef.schema.entries[payload]
                target = (*prefix, *first)
                text = "array" if cell is Buffer else cell.__name__
                tied = f" tied to `{path_text(target)}`" if target != here else ""
                extra = f" {dict(metadata)}" if metadata else ""
                result[here] = ("Variable", f"{text}{extra}{tied}", (cell, metadata, target), False)
            elif how is METHOD:
                result[here] = ("method", getattr(payload[1], "__qualname__", "?"), payload, False)
            else:
                result[here] = ("static", repr(payload.value)[:120], payload.key, bool(payload.by_identity))
    return result


def warn_of_captures(function: Any, what: str) -> None:
    """Warn if a function that is about to be traced would bake the arrays of a Module in.

    Args:
        function: the function.
        what: the transform's name.
    """
    for name, module in captured_objects(function):
        try:
            cells = layout_of(module).cells
        except NnxError:  # what is wrong with it is for those to hear who use it as a Module
            continue
        size = sum(
            leaf.nbytes
            for cell in cells
            for leaf in jax.tree.leaves(cell._value)
            if isinstance(leaf, (jax.Array, np.ndarray))
            and not isinstance(leaf, jax.core.Tracer)
            and not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended)
        )
        if size:
            warnings.warn(
                f"{what}: `{getattr(function, '__qualname__', function)}` uses the {type(module).__name__} `{name}` "
                f"from outside: its {size:,} bytes become constants of the compiled code, later changes to it go "
                "unseen, and writing to it is an error. Pass it as an argument",
                CaptureWarning,
                stacklevel=3,
            )


def captured_objects(function: Any) -> list[tuple[str, Object]]:
    """The Modules that a function reaches without being given them: by closure, global name, default or partial."""
    found: dict[int, tuple[str, Object]] = {}
    stack, seen = [function], set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if hasattr(item, "func") and hasattr(item, "keywords"):
            held = [("partial", value) for value in (*item.args, *item.keywords.values())]
            stack.append(item.func)
        elif isinstance(item, types.FunctionType):
            held = list(_held_by(item))
        else:
            continue
        for name, value in held:
            if isinstance(value, Object):
                found.setdefault(id(value), (name, value))
    return list(found.values())


def _held_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not bound yet
            continue
    for value in function.__defaults__ or ():
        yield "a default", value
    yield from (function.__kwdefaults__ or {}).items()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes.extend(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
        for name in _loaded_globals(code):
            if name in function.__globals__:
                yield name, function.__globals__[name]


@functools.lru_cache(maxsize=4096)
def _loaded_globals(code: types.CodeType) -> frozenset[str]:
    import dis

    loads = {"LOAD_GLOBAL", "LOAD_NAME"}
    return frozenset({str(item.argval) for item in dis.get_instructions(code) if item.opname in loads})
