"""Which values are nodes: data of a Module rather than part of its definition."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from nnx.core._object import Object
from nnx.core._state import State
from nnx.core._variable import Cell, Static

__all__ = ["is_node", "is_node_type", "register_node_type"]

_types: tuple[type, ...] = (jax.Array, np.ndarray, jax.ShapeDtypeStruct, State)


def register_node_type(kind: type) -> type:
    """Declare that instances of `kind`, a registered pytree, are nodes: data of the Module that holds them.

    Returns:
        `kind`, so that it can be used as a decorator.
    """
    global _types  # noqa: PLW0603 - a registry, and `isinstance` takes no list
    if not isinstance(kind, type):
        raise TypeError(f"register_node_type takes a class, got {kind!r}")
    if kind not in _types:
        _types = (*_types, kind)
    return kind


def is_node(value: Any) -> bool:
    """Whether `value`, assigned to a Module, becomes a node: a Variable, Node, array, Module or registered type."""
    return isinstance(value, (Object, *_types)) or (isinstance(value, Cell) and not isinstance(value, Static))


def is_node_type(kind: type) -> bool:
    """Whether instances of `kind` are nodes."""
    return issubclass(kind, (Object, *_types)) or (issubclass(kind, Cell) and not issubclass(kind, Static))


def is_data(value: Any) -> bool:
    """Whether `value` is a bare node that a Buffer holds."""
    return isinstance(value, _types)
