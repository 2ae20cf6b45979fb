"""What JAX cannot take among the values of Modules, named by path where JAX itself can only count."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from nnx.core._errors import VariableError
from nnx.core._layout import Layout
from nnx.core._object import Object
from nnx.core._state import path_text
from nnx.core._variable import PLAIN

__all__ = ["check_deleted", "check_values", "explain"]


def explain(roots: Sequence[Object], layouts: Sequence[Layout], error: Exception) -> None:
    """Raise an error of ours for one of JAX's, if the values of the call's Modules are its reason."""
    if isinstance(error, TypeError):
        check_values(roots, layouts)
    elif "deleted" in str(error):
        check_deleted(roots, layouts, error)


def check_values(roots: Sequence[Object], layouts: Sequence[Layout]) -> None:
    """Raise if a Variable holds what JAX cannot take."""
    for name, leaf in _leaves(roots, layouts):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise VariableError(
                f"{name} holds {leaf}, a shape and no array: the Module came out of `nnx.eval_shape` or the like. Give "
                "it values before it is called, `module.update_state(state)` or a restored checkpoint; `lower`, "
                "`trace` and `eval_shape` take it as it is"
            )
        if not isinstance(leaf, (np.ndarray, *PLAIN)):
            raise VariableError(
                f"{name} holds a {type(leaf).__name__} ({leaf!r:.60}): a Variable that goes into a transform holds "
                "arrays or numbers"
            )


def check_deleted(roots: Sequence[Object], layouts: Sequence[Layout], error: Exception) -> None:
    """Raise if the array of a Variable is gone."""
    for name, leaf in _leaves(roots, layouts):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
            raise VariableError(
                f"the array of {name} is gone: it was donated to a compiled function (donate_argnums), through another "
                "Module or variable that held the same array, or deleted. Give each its own array where one of them is "
                "donated (`jnp.copy`), or do not donate"
            ) from error


def _leaves(roots: Sequence[Object], layouts: Sequence[Layout]) -> list[tuple[str, object]]:
    return [
        (f"`{path_text(path)}` of the {type(root).__name__}", leaf)
        for root, layout in zip(roots, layouts, strict=True)
        for cell, path in zip(layout.cells, layout.moduledef.schema.paths, strict=True)
        for leaf in jax.tree.leaves(cell._value)
    ]
