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
    """A Module as an indented tree, each Module once, however deep or cyclic the graph is.

    Items of a Sequence that are built alike are shown once. What still takes more lines than `max_lines` is shown as
    deep as there is room for.
    """
    alike: dict[int, Any] = {}
    lines = _tree(module, None, max_lines, alike)
    if len(lines) > max_lines:
        cut = lines
        for depth in range(1, max_lines):
            shallower = _tree(module, depth, max_lines, alike)
            if len(shallower) > max_lines:
                break
            cut = shallower
        lines = cut if len(cut) <= max_lines else [*cut[:max_lines], "  ..."]
    return "\n".join(lines)


def _tree(module: Any, max_depth: int | None, max_lines: int, alike: dict[int, Any]) -> list[str]:
    """The lines of a tree, one more than `max_lines` at most."""
    from nnx.core._object import Object

    lines: list[str] = []
    seen: dict[int, str] = {}
    # Iterative, as graphs may be deeper than Python's stack. A plain string on the stack is a line to print.
    stack: list[tuple[int, str, Any, str]] = [(0, "", module, "")]
    while stack and len(lines) <= max_lines:
        depth, label, item, path = stack.pop()
        pad = "  " * depth
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
        if depth == max_depth:
            lines.append(f"{pad}{label}{type(item).__name__}(...)")
            continue
        lines.append(f"{pad}{label}{type(item).__name__}(")
        stack.append((depth, "", ")", ""))
        entries: list[tuple[int, str, Any, str]] = []
        for name, run in _runs(children, seen, alike):
            child, own = run[0][1], f"{path}/{name}" if path else name
            shown = child if isinstance(child, Object) else _attribute_text(child)
            entries.append((depth + 1, f"{name}=", shown, own))
            if len(run) > 1:
                seen.update({id(item): f"{path}/{other}" if path else other for other, item in run[1:]})
                where = f"{run[1][0]} to {run[-1][0]}" if len(run) > 2 else run[1][0]
                entries.append((depth + 1, "", f"# {where}: {type(child).__name__}, built like {name}", ""))
        stack.extend(reversed(entries))
    return lines


def _runs(
    children: list[tuple[str, Any]], seen: dict[int, str], alike: dict[int, Any]
) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Attributes by the first of a run: of a list's items those that are built alike and not seen before are one."""
    runs: list[tuple[str, list[tuple[str, Any]]]] = []
    before: Any = None
    met: set[int] = set()
    for name, child in children:
        known = id(child) in seen or id(child) in met
        own = _build(child, alike) if name.isdecimal() and len(children) > 2 and not known else None
        met.add(id(child))
        if own is not None and own == before:
            runs[-1][1].append((name, child))
        else:
            runs.append((name, [(name, child)]))
        before = own
    return runs


def _build(child: Any, alike: dict[int, Any]) -> Any:
    """What is equal for two Modules that are built alike; None for anything else."""
    from nnx.core._errors import NnxError
    from nnx.core._graph import walk
    from nnx.core._object import Object

    if not isinstance(child, Object):
        return None
    if id(child) not in alike:
        try:
            graph = walk((child,))
        except NnxError:  # a repr is also for looking at what is wrong
            alike[id(child)] = None
        else:
            leaves = jax.tree.leaves([cell._value for cell in graph.cells])
            forms = tuple((np.shape(leaf), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves)
            alike[id(child)] = (graph.moduledef, forms)
    return alike[id(child)]


def _attribute_text(value: Any) -> str:
    from nnx.core._variable import Buffer, Cell, Static

    if isinstance(value, Cell):
        return summarize(value._value) if isinstance(value, (Buffer, Static)) else summarize(value)
    return summarize(value)
