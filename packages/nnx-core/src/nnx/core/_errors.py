"""The exception tree: every error of ours is an `NnxError` and the builtin that a user would catch."""

from __future__ import annotations

__all__ = [
    "AttributeKindError",
    "ContextError",
    "FilterError",
    "NnxError",
    "PathError",
    "RetraceError",
    "ShapeError",
    "ShardingError",
    "StaticError",
    "StructureError",
    "TraceContextError",
    "VariableError",
]


class NnxError(Exception):
    """The root of every error that nnx raises on purpose."""


class TraceContextError(NnxError, RuntimeError):
    """A Module, Variable or Context was used by a JAX trace other than the one it was made in."""


class AttributeKindError(NnxError, TypeError):
    """A value cannot be the attribute that it was assigned to, or a Module was used as a plain pytree."""


class VariableError(NnxError, ValueError):
    """A Variable was made, replaced or written in a way that would lose its type, metadata or value."""


class StaticError(NnxError, TypeError):
    """A static attribute holds what cannot be part of a ModuleDef."""


class FilterError(NnxError, ValueError):
    """A filter is malformed, misplaced, or the filters together do not cover the State."""


class StructureError(NnxError, ValueError):
    """A State and a ModuleDef, or two structures, do not fit each other."""


class PathError(NnxError, KeyError):
    """A path does not exist."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class ContextError(NnxError, ValueError):
    """A Context lacks the random stream or the flag that was asked for."""


class RetraceError(NnxError, RuntimeError):
    """A function was traced more often than `max_traces` allows."""


class ShapeError(NnxError, ValueError):
    """An argument has another shape or dtype than the callee expects."""


class ShardingError(NnxError, ValueError):
    """Logical axes, rules, a mesh and the sizes of an array do not fit each other."""
