"""display: values as something to unfold in a notebook where treescope is installed, and as text elsewhere."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from nnx.core._object import Object
from nnx.core._state import State, path_text
from nnx.core._variable import Buffer, Cell, Static

__all__ = ["display"]


def display(*values: Any) -> None:
    """Show values: in IPython with treescope (`pip install treescope`) as trees to unfold, else by their repr.

    Args:
        *values: Modules, States, Variables, or anything else.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> nnx.display(nnx.State({"kernel": nnx.Param(jnp.ones((8, 8)))}))
        State({
          ('kernel',): Param(value=Array(float32[8, 8])),
        })
    """
    treescope = _treescope() if _in_ipython() else None
    for value in values:
        if treescope is None:
            print(repr(value))  # noqa: T201 - what it is for
        else:
            treescope.display(value)


def _in_ipython() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def _treescope() -> Any:
    """The module treescope where it is installed, else None; what it fails to import itself is its own error."""
    try:
        return importlib.import_module("treescope")
    except ModuleNotFoundError as error:
        if error.name != "treescope":
            raise
        return None


def _treescope_repr(value: Any, path: str | None, subtree_renderer: Any) -> Any:
    """What treescope calls on a value that it renders: the class and the attributes, each foldable."""
    lib = importlib.import_module("treescope.repr_lib")
    if isinstance(value, State):
        return lib.render_dictionary_wrapper(
            object_type=type(value),
            wrapped_dict={path_text(name): node for name, node in value.items()},
            path=path,
            subtree_renderer=subtree_renderer,
            roundtrippable=False,
        )
    if isinstance(value, Object):
        attributes = {name: _shown(child) for name, child in value._nnx_children()}
    else:
        attributes = {"value": value._value, **value._metadata}
    return lib.render_object_constructor(
        object_type=type(value),
        attributes=attributes,
        path=path,
        subtree_renderer=subtree_renderer,
        roundtrippable=False,
    )


def _shown(child: Any) -> Any:
    return child._value if isinstance(child, (Buffer, Static)) else child


_KINDS: tuple[Any, ...] = (Object, Cell, State)
for _kind in _KINDS:
    _kind.__treescope_repr__ = _treescope_repr
