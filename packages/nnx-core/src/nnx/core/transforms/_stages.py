"""Ahead-of-time compilation: JAX's stages, whose last takes Modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

__all__ = ["Compiled", "Lowered", "Traced"]

S = TypeVar("S", bound="_Stage")


class _Wrapped(Protocol):
    def run_ahead(
        self, compiled: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, at_top: bool, definitions: Sequence[Any]
    ) -> Any: ...


class _Stage:
    """A stage of ahead-of-time compilation: JAX's own, and what it takes to call the result with Modules."""

    def __init__(
        self, wrapped: _Wrapped, stage: Any, at_top: bool, definitions: Sequence[Any], bound: tuple[Any, ...] = ()
    ) -> None:
        self._wrapped = wrapped
        self._stage = stage
        self._at_top = at_top
        self._definitions = definitions
        self._bound_to = bound

    def _next(self, kind: type[S], stage: Any) -> S:
        return kind(self._wrapped, stage, self._at_top, self._definitions, self._bound_to)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)


class Traced(_Stage):
    """A traced function of Modules: `jax.stages.Traced`, whose `lower()` leads to one that takes Modules."""

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """Lower."""
        return self._next(Lowered, self._stage.lower(*args, **kwargs))


class Lowered(_Stage):
    """A lowered function of Modules: `jax.stages.Lowered` with `compile()` giving a function that takes Modules."""

    def compile(self, *args: Any, **kwargs: Any) -> Compiled:
        """Compile."""
        return self._next(Compiled, self._stage.compile(*args, **kwargs))


class Compiled(_Stage):
    """A compiled function of Modules; call it with arguments of the same structure and shapes.

    Static arguments are part of what was compiled: leave them out, as with `jax.stages.Compiled`.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, as the function itself without its static arguments.

        Raises:
            TypeError: the structure or the shapes are others than those it was compiled for.
        """
        return self._wrapped.run_ahead(
            self._stage, self._bound_to + args, kwargs, at_top=self._at_top, definitions=self._definitions
        )
