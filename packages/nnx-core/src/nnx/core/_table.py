"""A Summary as lines of plain text that fit the terminal."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import jax

from nnx.core._state import path_text

if TYPE_CHECKING:
    from nnx.core._summary import Summary, SummaryRow

__all__ = ["bytes_text", "count_text", "render", "value_text"]

_LEFT = 3  # the columns of text; those after it are numbers


def render(summary: Summary, *, depth: int | None, variables: bool, width: int | None, max_rows: int | None) -> str:
    """Lay out the table; see `Summary.text`."""
    width = shutil.get_terminal_size((120, 24)).columns if width is None else width
    rows = [row for row in summary.rows if variables or row.is_module]
    if depth is not None:
        rows = [row for row in rows if len(row.path) <= depth]
    hidden = 0
    if max_rows is not None and len(rows) > max_rows:
        complete = len(rows)
        deepest = max(len(row.path) for row in rows)
        while len(rows) > max_rows and deepest > 1:
            deepest -= 1
            rows = [row for row in rows if len(row.path) <= deepest]
        rows = rows[:max_rows]
        hidden = complete - len(rows)
    called = summary.flops is not None
    title = "Output or value" if called else "Value"
    heads = ["Path", "Type", title, "Parameters", "Bytes", *(["FLOPs"] if called else [])]
    cells = [_cells(row, called=called) for row in rows]
    total = ["Total", "", "", f"{summary.parameters:,}", bytes_text(summary.bytes)]
    total += [count_text(summary.flops)] if summary.flops is not None else []
    widths = [max(len(line[i]) for line in (heads, total, *cells)) for i in range(len(heads))]
    widths = _shrunk(widths, width)
    rule = "  ".join("-" * size for size in widths)
    lines = [_line(heads, widths), rule, *(_line(line, widths) for line in cells), rule, _line(total, widths)]
    others = {name: sizes for name, sizes in summary.collections.items() if name != "Param"}
    if others:
        parts = [f"{name} {count_text(count)} ({bytes_text(size)})" for name, (count, size) in others.items()]
        lines.append(_cut(f"Besides parameters: {', '.join(parts)}", width))
    if hidden:
        lines.append(_cut(f"{hidden} deeper or later rows are left out: `.text()` has all", width))
    return "\n".join(lines)


def _cells(row: SummaryRow, *, called: bool) -> list[str]:
    kind = row.type.__name__ if row.type is not jax.Array else "array"
    if row.shared_with is not None:
        seen = path_text(row.shared_with) or "the model"
        return [path_text(row.path), kind, f"shared with {seen}", "", "", *([""] if called else [])]
    shown = value_text(row.value) if row.value is not None else ""
    if row.calls > 1:
        shown += f" x{row.calls}"
    counted = f"{row.parameters:,}" if row.parameters else ""
    size = bytes_text(row.bytes) if row.bytes else ""
    flops = [count_text(row.flops) if row.flops is not None else ""] if called else []
    return [path_text(row.path), kind, shown, counted, size, *flops]


def value_text(value: Any) -> str:
    """Shapes and dtypes of an abstract value, structure and all."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if type(value) in (tuple, list):
        inside = ", ".join(map(value_text, value[:4])) + (", ..." if len(value) > 4 else "")
        return f"[{inside}]" if type(value) is list else f"({inside}{',' if len(value) == 1 else ''})"
    if type(value) is dict:
        shown = [f"{name}: {value_text(item)}" for name, item in list(value.items())[:4]]
        return f"{{{', '.join(shown)}{', ...' if len(value) > 4 else ''}}}"
    if isinstance(value, type):
        return value.__name__
    if value is None:
        return "None"
    leaves = jax.tree.leaves(value)
    if len(leaves) != 1 or leaves[0] is not value:
        return f"{type(value).__name__}({', '.join(map(value_text, leaves[:4]))}{', ...' if len(leaves) > 4 else ''})"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def count_text(count: int) -> str:
    """A count with three or four digits: 352, 1.25 k, 4.2 G."""
    return _scaled(count, 1000, ("", " k", " M", " G", " T", " P", " E"))


def bytes_text(size: int) -> str:
    """A size in decimal units: 160 B, 1.25 kB, 140 GB."""
    return _scaled(size, 1000, (" B", " kB", " MB", " GB", " TB", " PB", " EB"))


def _scaled(number: int, base: int, units: tuple[str, ...]) -> str:
    scaled, unit = float(number), 0
    while scaled >= base - 0.5 and unit < len(units) - 1:
        scaled /= base
        unit += 1
    return f"{number}{units[0]}" if unit == 0 else f"{scaled:.3g}{units[unit]}"


def _shrunk(widths: list[int], width: int) -> list[int]:
    """Take what a line has too much from the widest of the columns of text."""
    widths = list(widths)
    while sum(widths) + 2 * (len(widths) - 1) > width:
        widest = max(range(_LEFT), key=lambda i: widths[i])
        if widths[widest] <= 8:
            break
        widths[widest] -= 1
    return widths


def _line(cells: list[str], widths: list[int]) -> str:
    shown = [_cut(cell, size) for cell, size in zip(cells, widths, strict=True)]
    parts = [
        cell.ljust(size) if i < _LEFT else cell.rjust(size)
        for i, (cell, size) in enumerate(zip(shown, widths, strict=True))
    ]
    return "  ".join(parts).rstrip()


def _cut(text: str, size: int) -> str:
    """Shorten a text in its middle: both ends of a path tell where it is."""
    if len(text) <= size:
        return text
    left = (size - 1) // 2
    return f"{text[:left]}…{text[len(text) - (size - 1 - left) :]}"
