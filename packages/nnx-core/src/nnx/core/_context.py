"""Context: random streams and flags, handed from call to call."""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.core._errors import ContextError
from nnx.core._graph import ModuleDef
from nnx.core._layout import layout_of, state_of
from nnx.core._object import Object, check_object_trace
from nnx.core._state import State, check_part, path_text
from nnx.core._tracing import current_trace
from nnx.core._update import update_values
from nnx.core._variable import NO_METADATA, Cell, check_cell_trace, new_cell, set_metadata, set_owned, set_trace

__all__ = ["Context", "ContextDef", "RngStream", "context"]


@functools.partial(jax.jit, inline=True)
def _draw(key: Any, count: Any, drawn: Any) -> Any:
    return jax.random.fold_in(key, count + drawn)


@functools.partial(jax.jit, inline=True)
def _fold_name(key: Any, code: Any) -> Any:
    fold = jax.random.fold_in
    for _ in range(key.ndim):  # keys along an axis, which a transform will take apart
        fold = jax.vmap(fold, (0, None))
    return fold(key, code)


# The kind of keys is an argument, since JAX's own default is none of what it compiles a function anew for.
@functools.partial(jax.jit, static_argnums=2, inline=True)
def _seeded(seed: Any, code: Any, kind: str) -> Any:
    return jax.random.fold_in(jax.random.key(seed, impl=kind), code)


@functools.lru_cache(maxsize=1024)
def _name_code(name: str) -> np.uint32:
    return np.uint32(zlib.crc32(name.encode()))  # `hash` differs from one process to the next


_ZERO = np.uint32(0)


def _named(key: Any, name: str) -> Any:
    """The key of a stream of that name: folded in once, here, and not at each draw."""
    return key if isinstance(key, jax.ShapeDtypeStruct) else _fold_name(key, _name_code(name))


def _as_key(seed: Any, name: str) -> Any:
    """A typed key of an integer seed, a typed key, or a raw uint32 key."""
    if isinstance(seed, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) and not isinstance(seed, np.generic):
        if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
            return seed
        if seed.dtype == np.uint32 and seed.ndim >= 1:
            return jax.random.wrap_key_data(jnp.asarray(seed))
        if seed.ndim == 0 and jnp.issubdtype(seed.dtype, jnp.integer):
            return jax.random.key(seed)  # type: ignore[arg-type]
    elif isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        return jax.random.key(int(seed))
    raise ContextError(
        f"the seed of the stream `{name}` is an integer, a key (jax.random.key) or a raw uint32 key, got "
        f"{type(seed).__name__}: {seed!r}"
    )


class RngStream(Cell):
    """A stream of random keys: a base key and the number of keys drawn so far.

    The count is data: it is an input of compiled functions, so a stream that has advanced compiles nothing anew.

    `key[n] = fold_in(fold_in(seed, crc32(name)), n)`

    Args:
        seed: an integer, a typed key, or a raw uint32 key.
        count: keys drawn so far.
        name: the stream's name. Without one, the first Context that is given the stream folds in the name it has there.
    """

    __slots__ = ("_count", "_drawn", "_key", "_nameless")

    collection = "rngs"

    # `count` is a host integer outside of traces. Inside, it is a tracer and `drawn` counts on the host what the trace
    # drew:
    # that number is known when the trace ends, and is all that has to come out of it.
    _key: Any
    _count: Any
    _drawn: int
    _nameless: bool
    """Whether no name is folded into the key yet; not set on what comes out of a State or a trace."""

    def __init__(self, seed: Any, count: int = 0, *, name: str | None = None) -> None:
        set_metadata(self, NO_METADATA)
        set_owned(self, False)
        set_trace(self, current_trace())
        self._nameless = name is None
        if name is not None and type(seed) is int and 0 <= seed <= 0xFFFFFFFF:
            # One compiled call: `jax.random.key` of a Python integer is several, each as dear as this.
            kind = jax.config.jax_default_prng_impl  # type: ignore[attr-defined]
            self._value = (_seeded(np.uint32(seed), _name_code(name), kind), count)
            return
        key = _as_key(seed, name or "stream")
        self._value = (key if name is None else _named(key, name), count)

    def give_name(self, name: str) -> None:
        """Fold the name in, unless one is."""
        if getattr(self, "_nameless", False):
            check_cell_trace(self, f"RngStream {name!r}")
            self._key = _named(self._key, name)
            self._nameless = False

    @property
    def _value(self) -> Any:  # type: ignore[override]
        return self._key, self._total()

    @_value.setter
    def _value(self, value: Any) -> None:
        key, count = value
        self._key = key
        self._count = (
            int(count)
            if isinstance(count, (int, np.integer)) or (isinstance(count, np.ndarray) and count.ndim == 0)
            else count
        )
        self._drawn = 0

    def _total(self) -> Any:
        if isinstance(self._count, int):
            return np.uint32((self._count + self._drawn) & 0xFFFFFFFF)
        return self._count + np.uint32(self._drawn) if self._drawn else self._count

    @property
    def key(self) -> Any:
        """The base key, in which the stream's name is folded in."""
        return self._key

    @property
    def count(self) -> Any:
        """The number of keys drawn so far; an array inside a transform."""
        return self._count + self._drawn if isinstance(self._count, int) else self._total()

    @property
    def value(self) -> Any:
        """The pair of key and count, as a State holds it."""
        return self._value

    def next(self, name: str = "") -> jax.Array:
        """Draw a key.

        Args:
            name: what an error calls the stream.

        Raises:
            TraceContextError: the stream was made in another trace.
        """
        if self._trace is not current_trace():
            check_cell_trace(self, f"RngStream {name!r}")
        key = self.peek()
        self._drawn += 1
        return key

    def peek(self) -> jax.Array:
        """The key that `next` will give, without drawing it."""
        if isinstance(self._count, int):
            count = np.uint32((self._count + self._drawn) & 0xFFFFFFFF)
            return _draw(self._key, count, _ZERO)  # type: ignore[no-any-return]
        return _draw(self._key, self._count, np.uint32(self._drawn))  # type: ignore[no-any-return]

    def advance(self, keys: int) -> None:
        """Count keys as drawn."""
        self._drawn += keys

    def __copy__(self) -> RngStream:
        copied: RngStream = new_cell(RngStream, self._value)
        copied._nameless = getattr(self, "_nameless", False)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> RngStream:
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        return (RngStream, self._value) if getattr(self, "_nameless", False) else super().__reduce__()

    def __repr__(self) -> str:
        count = self._count + self._drawn if isinstance(self._count, int) else self._count
        return f"RngStream(count={count})"


class ContextDef:
    """The static half of a Context: the names of its streams, and its flags."""

    __slots__ = ("_definition",)

    def __init__(self, definition: ModuleDef[Any]) -> None:
        self._definition = definition

    def merge(self, *states: State) -> Context:
        """Make the Context of the States that its `partition` gave."""
        return self._definition.merge(*states)  # type: ignore[no-any-return]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ContextDef) and self._definition is other._definition

    def __hash__(self) -> int:
        return hash(self._definition)

    def __repr__(self) -> str:
        return f"ContextDef({self._definition!r})"


jax.tree_util.register_pytree_node(ContextDef, lambda definition: ((), definition), lambda definition, _: definition)


class Context(Object):
    """Named random streams and flags.

    In a constructor a Context makes the parameters; in a call it carries random streams and flags. It changes in
    place: every
    `make_rng` advances a stream. Hand it to functions as an argument; every lifted transform accepts it.

    Args:
        rngs: streams by name: integers, keys, or RngStreams.
        flags: static values by name, such as `deterministic` and `use_running_average`.

    Raises:
        ContextError: `rngs` or `flags` is no mapping, or a seed is none.
    """

    def __init__(self, rngs: Mapping[str, Any] | None = None, *, flags: Mapping[str, Any] | None = None) -> None:
        for what, given in (("rngs", rngs), ("flags", flags)):
            if given is not None and not isinstance(given, Mapping):
                raise ContextError(
                    f"`{what}` of a Context are values by name, got {type(given).__name__}. "
                    f"nnx.context makes one of seeds: nnx.context(0, dropout=1, flags=dict(deterministic=True))"
                )
        cells = self._nnx.cells
        for name, seed in (rngs or {}).items():
            check_part(name)
            stream = seed if isinstance(seed, RngStream) else RngStream(seed, name=name)
            stream.give_name(name)
            set_owned(stream, True)
            cells[name] = stream
        for name in flags or {}:
            check_part(name)
        self.__dict__["_flags"] = tuple((flags or {}).items())

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Context has no attribute to set ({name!r}); make another one with nnx.context(...)")

    @property
    def flags(self) -> Mapping[str, Any]:
        """The flags."""
        return MappingProxyType(dict(self.__dict__["_flags"]))

    @property
    def rngs(self) -> Mapping[str, RngStream]:
        """The streams."""
        return MappingProxyType(self._nnx.cells)  # type: ignore[arg-type]

    def make_rng(self, name: str) -> jax.Array:
        """Draw a key from the stream `name`: a new one at each call.

        Returns:
            A typed key, `key<fry>[]`.

        Raises:
            ContextError: there is no such stream.
            TraceContextError: the Context was made in another trace.
        """
        return self._stream(name).next(name)

    def skip_rng(self, name: str) -> None:
        """Count a key of the stream `name` as drawn, for a use that does not need it after all."""
        self._stream(name).advance(1)

    def _stream(self, name: str) -> RngStream:
        stream = self._nnx.cells.get(name)
        if stream is None:
            known = ", ".join(f"`{item}`" for item in self._nnx.cells) or "none"
            raise ContextError(
                f"no random stream `{name}` in this Context (it has: {known}). Give it one where the Context is made: "
                f"nnx.context({name}=seed)"
            )
        if self._nnx.trace is not current_trace():
            check_object_trace(self, f"make_rng({name!r})", "draw from")
        return stream  # type: ignore[return-value]

    def has_rng(self, name: str) -> bool:
        """Whether there is a stream of that name."""
        return name in self._nnx.cells

    def get_flag(self, name: str, default: Any = None) -> Any:
        """The flag's value, or `default` where it is not set."""
        for key, value in self.__dict__["_flags"]:
            if key == name:
                return value
        return default

    def has_flag(self, name: str) -> bool:
        """Whether the flag is set."""
        return any(key == name for key, _ in self.__dict__["_flags"])

    def fork(self) -> Context:
        """Make a Context whose streams start anew from a key drawn of each of these; the flags are the same.

        Each stream of this Context advances by one. Nothing that the fork draws is ever drawn by this Context.
        """
        return Context({name: self.make_rng(name) for name in self._nnx.cells}, flags=dict(self.__dict__["_flags"]))

    def copy(self, **flags: Any) -> Context:
        """Make a Context that shares these streams, with some flags changed."""
        return Context(dict(self._nnx.cells), flags={**dict(self.__dict__["_flags"]), **flags})

    def partition(self) -> tuple[State, ContextDef]:
        """Split into a State of the streams, to hand to any JAX transform, and the rest.

        Example:
            >>> import jax, nnx
            >>> state, contextdef = nnx.context(dropout=0).partition()
            >>> jax.jit(lambda state: contextdef.merge(state).make_rng("dropout"))(state).shape
            ()
        """
        layout = layout_of(self)
        return state_of(layout), ContextDef(layout.moduledef)

    def merge(self, *states: State) -> Context:
        """Make a Context with these flags and the streams of `states`."""
        return self.partition()[1].merge(*states)

    def update_state(self, state: State) -> None:
        """Take over the keys and counts of a State that `partition` gave, in place.

        Raises:
            ContextError: the State is of other streams than these.
            TraceContextError: the Context was made in another trace.
        """
        own = {(name,) for name in self._nnx.cells}
        if set(state.paths) != own:
            raise ContextError(
                f"the State holds the streams {sorted(path_text(path) for path in state.paths)}, this Context "
                f"{sorted(self._nnx.cells)}"
            )
        update_values(self, [state])

    def __copy__(self) -> Context:
        return Context({name: stream.__copy__() for name, stream in self._nnx.cells.items()}, flags=self.flags)

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        memo[id(self)] = copied = self.__copy__()
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return (_unpickle_context, (dict(self._nnx.cells), self.__dict__["_flags"]))

    def __repr__(self) -> str:
        streams = ", ".join(f"{name}={stream!r}" for name, stream in self._nnx.cells.items())
        flags = f"flags={dict(self.__dict__['_flags'])!r}" if self.__dict__["_flags"] else ""
        return f"Context({', '.join(part for part in (streams, flags) if part)})"


def _unpickle_context(cells: dict[str, Any], flags: Any) -> Context:
    return Context(cells, flags=dict(flags))


def context(params: Any = None, /, *, flags: Mapping[str, Any] | None = None, **rngs: Any) -> Context:
    """Make a Context.

    Args:
        params: the seed of the stream `params`, which makes parameters: an integer, a key, or a raw uint32 key.
        flags: static values by name, such as `dict(deterministic=True)`.
        **rngs: seeds of further streams by name, `dropout=1`; None leaves a stream out.

    Example:
        >>> import nnx
        >>> ctx = nnx.context(0, dropout=1, flags=dict(deterministic=False))
        >>> ctx.has_rng("dropout"), ctx.get_flag("deterministic")
        (True, False)
    """
    streams = {name: seed for name, seed in rngs.items() if seed is not None}
    if params is not None:
        if "params" in streams:
            raise ContextError("the stream `params` is given twice: as the first argument and by name")
        streams = {"params": params, **streams}
    for name, seed in streams.items():
        if isinstance(seed, Mapping):
            raise ContextError(
                f"the seed of the stream `{name}` is a {type(seed).__name__}; flags are given as flags=dict(...)"
            )
    made = Context(streams, flags=flags)
    frame = sys._getframe(1)
    made._nnx.origin = (frame.f_code, frame.f_lineno)
    return made
