"""Dataclass-style Modules: fields that say what their values become."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

from nnx.core._errors import VariableError
from nnx.core._variable import Cell, Node, Param, Static, collection_type

__all__ = ["dataclass", "field", "node_field", "param_field", "static_field", "var_field"]

A = TypeVar("A")

field = dataclasses.field


def _wrapping(kind: type[Any], metadata: Mapping[str, Any] | None, options: dict[str, Any]) -> Any:
    def wrap(name: str, value: Any) -> Any:
        if not isinstance(value, Cell):
            return kind(value)
        if not isinstance(value, kind):
            raise VariableError(
                f"the field `{name}` holds a {kind.__name__}, got a {type(value).__name__}: pass its value, or "
                f"declare the field as nnx.var_field({type(value).__name__})"
            )
        return value

    return dataclasses.field(metadata={**(metadata or {}), "nnx_wrap": wrap}, **options)


def var_field(collection: str | type[Any], *, metadata: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """A field whose value is put into a Variable.

    Args:
        collection: the Variable type, or its collection's name.
        metadata: the dataclass field's metadata.
        **options: as for `dataclasses.field`.
    """
    kind = collection_type(collection) if isinstance(collection, str) else collection
    return _wrapping(kind, metadata, options)


def param_field(**options: Any) -> Any:
    """A field whose value is put into a Param."""
    return var_field(Param, **options)


def node_field(*, metadata: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """A field whose value, any pytree of arrays, is put into a Node."""
    return _wrapping(Node, metadata, options)


def static_field(*, metadata: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """A field whose value is static, whatever its type."""
    return _wrapping(Static, metadata, options)


@dataclass_transform(field_specifiers=(dataclasses.field, var_field, param_field, node_field, static_field))
def dataclass(cls: type[A] | None = None, /, **options: Any) -> Any:
    """`dataclasses.dataclass` for Modules: as there, except that Modules stay hashable and compare by identity.

    Args:
        cls: the class.
        **options: as for `dataclasses.dataclass`; `eq` and `repr` are off unless asked for.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> @nnx.dataclass
        ... class Scale(nnx.Module):
        ...     w: object = nnx.param_field()
        ...     power: int = 1
        >>> Scale(jnp.ones(2)).filter(nnx.Param).paths
        (('w',),)
    """
    options = {"eq": False, "repr": False, **options}

    def decorate(kind: type[A]) -> type[A]:
        return dataclasses.dataclass(**options)(kind)

    return decorate if cls is None else decorate(cls)
