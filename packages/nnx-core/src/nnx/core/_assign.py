"""The write rules: what an assignment to a Module's attribute does, by what is there and what comes."""

from __future__ import annotations

import difflib
from typing import Any

import jax
import numpy as np

from nnx.core._errors import AttributeKindError, VariableError
from nnx.core._graph import check_equivalent
from nnx.core._nodes import is_data
from nnx.core._object import (
    Object,
    attribute_name,
    check_object_trace,
    class_attribute,
    expose,
    invalidate,
    origin_of,
)
from nnx.core._static import StaticProblem, fingerprint, is_plain_scalar
from nnx.core._variable import (
    PLAIN,
    Buffer,
    Cell,
    Node,
    Static,
    Variable,
    check_cell_trace,
    new_cell,
    set_owned,
)

__all__ = ["assign", "check_no_modules", "container_leaves", "leaf_types", "missing_attribute"]


def missing_attribute(module: Object, name: str) -> Any:
    """Raise the AttributeError for an attribute that the normal lookup did not find."""
    descriptor = class_attribute(type(module), name)
    if descriptor is not None:
        # It exists, so its own code raised: run it again for its own error rather than report the property as missing.
        return object.__getattribute__(module, name)
    known = [item for item in {*module.__dict__, *module._nnx.cells} if not item.startswith("_")]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean `{close[0]}`?" if close else f" (it has: {', '.join(sorted(known)[:12])})" if known else ""
    raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}{hint}", name=name, obj=module)


def assign(module: Object, name: str, value: Any) -> None:
    """The general case of an assignment: the attribute appears, or its kind or structure may change."""
    descriptor = class_attribute(type(module), name)
    if (descriptor is not None and hasattr(type(descriptor), "__set__")) or name == "__orig_class__":
        object.__setattr__(module, name, value)
        return
    cells, plain = module._nnx.cells, module.__dict__
    existing = cells.get(name)
    if existing is None and (name not in plain or name == "_nnx"):
        if not name or "/" in name or name.startswith("_nnx"):
            raise AttributeKindError(
                f"{name!r} cannot be an attribute of a Module: names are parts of paths and hold no '/'"
            )
        value = _wrap_field(type(module), name, value)
    if isinstance(value, Cell):
        _assign_cell(module, name, value, existing)
        return
    if isinstance(value, Object):
        if isinstance(existing, (Variable, Node)):
            raise AttributeKindError(
                f"cannot assign a {type(value).__name__} to `{attribute_name(module, name)}`, which is a "
                f"{type(existing).__name__}: `del module.{name}` first"
            )
        if plain.get(name) is not value:
            _put_plain(module, name, value)
        return
    if existing is not None:
        if isinstance(existing, Static):
            _put_cell(module, name, Static(value))
            return
        if not (is_data(value) or value is None or isinstance(value, (int, float, complex, np.generic))):
            raise AttributeKindError(
                f"cannot assign a {type(value).__name__} to `{attribute_name(module, name)}`, which holds an array: an "
                f"attribute keeps its kind. `del module.{name}` first, or use another name"
            )
        check_cell_trace(existing, attribute_name(module, name), origin_of(module))
        existing._value = value
        return
    if is_plain_scalar(value):
        _assign_static(module, name, value)
    elif is_data(value):
        _put_cell(module, name, new_cell(Buffer, value, owned=True))
    else:
        converted = _convert(value, module, name)
        if isinstance(converted, Object):
            _put_plain(module, name, converted)
        else:
            _assign_static(module, name, value)


def _assign_cell(module: Object, name: str, value: Any, existing: Cell | None) -> None:
    if existing is value:
        return
    if isinstance(value, (Variable, Node)):
        check_no_modules(value._value, module, name)
    if isinstance(existing, (Variable, Node)) and not isinstance(value, Static):
        if not existing.is_equivalent(value):  # asked first, as finding the attribute's path for the error takes time
            check_equivalent(
                attribute_name(module, name), type(existing), existing._metadata, type(value), value._metadata
            )
        if not value._owned:
            check_cell_trace(existing, attribute_name(module, name), origin_of(module))
            existing._value = value._value
            return
    elif isinstance(existing, (Variable, Node)):
        raise VariableError(
            f"`{attribute_name(module, name)}` is a {type(existing).__name__} and cannot become static: `del "
            f"module.{name}` first"
        )
    if value._trace is None:
        value = new_cell(type(value), value._value, value._metadata)
    _put_cell(module, name, value)


def _put_cell(module: Object, name: str, cell: Cell) -> None:
    check_object_trace(module, name)
    invalidate(module)
    set_owned(cell, True)
    module.__dict__.pop(name, None)
    module._nnx.cells[name] = cell
    expose(type(module), name)


def _put_plain(module: Object, name: str, value: Any) -> None:
    check_object_trace(module, name)
    invalidate(module)
    module._nnx.cells.pop(name, None)
    module.__dict__[name] = value


def _assign_static(module: Object, name: str, value: Any) -> None:
    plain = module.__dict__
    if name in plain:
        old = plain[name]
        if old is value or (not isinstance(old, Object) and _equal_statics(old, value)):
            # The structure stands, but not if the new object may later be edited behind the old one's back.
            if old is not value:
                check_object_trace(module, name)
                if not is_plain_scalar(value):
                    invalidate(module)
                plain[name] = value
            return
    _put_plain(module, name, value)


def _equal_statics(old: Any, new: Any) -> bool:
    try:
        return fingerprint(old, forbidden=(Object, Cell)).key == fingerprint(new, forbidden=(Object, Cell)).key
    except StaticProblem:
        return False


leaf_types: set[type] = set()
"""Types met so far whose values hold no others: what the write of a value asks first."""


def check_no_modules(value: Any, module: Object, name: str) -> None:
    """Raise if a Module or Variable hides in what is to be the value of a Variable or Node."""
    if isinstance(value, (np.ndarray, *PLAIN)) or is_plain_scalar(value):
        leaf_types.add(type(value))
        return
    for leaf in container_leaves(value):
        if isinstance(leaf, (Object, Cell)):
            raise AttributeKindError(
                f"the value of `{attribute_name(module, name)}` holds a {type(leaf).__name__}: a Variable or Node "
                "holds arrays. Assign the Module to an attribute of its own, or use nnx.Sequence or nnx.Dict"
            )


def container_leaves(value: Any) -> list[Any]:
    """The leaves of a value as a pytree, with Modules and Variables as leaves."""
    leaves: list[Any] = []
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        if type(item) in (list, tuple, dict):
            if id(item) not in seen:
                seen.add(id(item))
                stack.extend(item.values() if type(item) is dict else item)
        elif is_plain_scalar(item) or isinstance(item, (Object, Cell)):
            leaves.append(item)
        else:
            leaves.extend(jax.tree.leaves(item, is_leaf=lambda leaf: isinstance(leaf, (Object, Cell))))
    return leaves


def _convert(value: Any, module: Object, name: str) -> Any:
    """Turn a container of Modules into a Sequence or Dict; refuse one that mixes in data; leave other values."""
    leaves = container_leaves(value)
    modules = [leaf for leaf in leaves if isinstance(leaf, Object)]
    data = [leaf for leaf in leaves if (isinstance(leaf, Cell) and not isinstance(leaf, Static)) or is_data(leaf)]
    if not modules and not data:
        return value
    if modules and not data:
        from nnx.core._containers import to_container

        converted = to_container(value)
        if converted is not None:
            return converted
    culprit = (data or modules)[0]
    kind = (
        "JAX array"
        if isinstance(culprit, jax.Array)
        else "NumPy array"
        if isinstance(culprit, np.ndarray)
        else type(culprit).__name__
    )
    fix = (
        f"nnx.Sequence(...) or nnx.Dict(...) for Modules and Variables by position or name: `self.{name} = "
        "nnx.Sequence([...])`"
        if modules or isinstance(culprit, Cell)
        else f"nnx.Node to hold the whole pytree as data: `self.{name} = nnx.Node(...)`; nnx.Param to train it; "
        "nnx.Static for constants"
    )
    raise AttributeKindError(
        f"cannot assign a {type(value).__name__} that holds a {kind} to `{attribute_name(module, name)}`: it would be "
        f"static, so its changes and gradients would be lost. Use {fix}"
    )


def _wrap_field(kind: type, name: str, value: Any) -> Any:
    fields = getattr(kind, "__dataclass_fields__", None)
    if not fields or name not in fields:
        return value
    wrap = fields[name].metadata.get("nnx_wrap")
    return value if wrap is None else wrap(name, value)
