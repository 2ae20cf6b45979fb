"""Text for people: how values, Modules and their parts are printed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

__all__ = ["module_repr", "summarize"]


def summarize(value: Any, limit: int = 80) -> str:
    """One short line for any value: small arrays by content, large ones by dtype and shape."""
    if isinstance(value, jax.core.Tracer):
        return f"Traced<{value.aval.str_short()}>"
    if isinstance(value, (jax.Array, np.ndarray)):
        if jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
            return f"Array({value.dtype}{list(value.shape)})"
        name = "array" if isinstance(value, np.ndarray) else "Array"
        if value.size <= 4 and (isinstance(value, np.ndarray) or value.is_fully_addressable) and not _deleted(value):
            text = np.array2string(np.asarray(value), separator=", ", precision=4).replace("\n", "")
            return f"{name}({text}, dtype={value.dtype})"
        return f"{name}({value.dtype}{list(value.shape)})"
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        inside = ", ".join(summarize(item) for item in value[:6]) + (", ..." if len(value) > 6 else "")
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    if type(value) is dict:
        inside = ", ".join(f"{k!r}: {summarize(v)}" for k, v in list(value.items())[:6]) + (
            ", ..." if len(value) > 6 else ""
        )
        return f"{{{inside}}}"
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _deleted(value: Any) -> bool:
    return bool(getattr(value, "is_deleted", lambda: False)())


def module_repr(module: Any, max_lines: int = 120) -> str:
    """A Module as an indented tree, each Module once, however deep or cyclic the graph is."""
    from nnx.core._object import Object

    lines: list[str] = []
    seen: dict[int, str] = {}
    # Iterative, as graphs may be deeper than Python's stack. A plain string on the stack is a line to print.
    stack: list[tuple[int, str, Any, str]] = [(0, "", module, "")]
    while stack:
        depth, label, item, path = stack.pop()
        pad = "  " * depth
        if len(lines) >= max_lines:
            lines.append("  ...")
            break
        if not isinstance(item, Object):
            lines.append(f"{pad}{label}{item}")
            continue
        if id(item) in seen:
            lines.append(f"{pad}{label}{type(item).__name__}(...)  # shared with {seen[id(item)] or 'the root'}")
            continue
        seen[id(item)] = path
        children = list(item._nnx_children())
        if not children:
            lines.append(f"{pad}{label}{type(item).__name__}()")
            continue
        lines.append(f"{pad}{label}{type(item).__name__}(")
        stack.append((depth, "", ")", ""))
        for name, child in reversed(children):
            shown = child if isinstance(child, Object) else _attribute_text(child)
            stack.append((depth + 1, f"{name}=", shown, f"{path}/{name}" if path else name))
    return "\n".join(lines)


def _attribute_text(value: Any) -> str:
    from nnx.core._variable import Buffer, Cell, Static

    if isinstance(value, Cell):
        return summarize(value._value) if isinstance(value, (Buffer, Static)) else summarize(value)
    return summarize(value)
