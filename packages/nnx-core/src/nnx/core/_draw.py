"""draw: the graph of a model's Modules, with what they share, as Mermaid or Graphviz text."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from nnx.core._errors import StructureError
from nnx.core._graph import CELL, OBJECT, ModuleDef, walk
from nnx.core._object import Object
from nnx.core._summary import tabulate
from nnx.core._table import count_text, value_text

__all__ = ["draw"]


class _Box(NamedTuple):
    lines: tuple[str, ...]
    is_module: bool
    is_shared: bool


def draw(model: Any, /, *, format: Literal["mermaid", "dot"] = "mermaid", depth: int | None = None) -> str:
    """Draw the graph of a model's Modules as text that Mermaid or Graphviz turns into a picture.

    Each Module is a box with its type, and the number of its parameters where it has any; an arrow carries the name of
    the attribute that holds it. What several places hold (a shared Module, a tied Variable, a cycle) is one box with
    several arrows and a thick frame.

    Args:
        model: a Module, abstract or not.
        format: "mermaid", which GitHub and notebooks show within a fenced block of that name, or "dot" for Graphviz.
        depth: how many levels below the model are drawn; all by default.

    Returns:
        The text of the drawing.

    Raises:
        StructureError: `model` is no Module.
        ValueError: there is no such format.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> model, part = nnx.Module(), nnx.Module()
        >>> part.kernel = nnx.Param(jnp.ones((2, 3)))
        >>> model.encoder = model.decoder = part
        >>> print(nnx.draw(model))
        flowchart TD
          n0["Module<br/>6 parameters"]
          n1["Module<br/>6 parameters"]
          n0 -- "decoder" --> n1
          n0 -- "encoder" --> n1
          classDef shared stroke-width:3px
          class n1 shared
    """
    if format not in ("mermaid", "dot"):
        raise ValueError(f"nnx.draw knows the formats 'mermaid' and 'dot', got {format!r}")
    if not isinstance(model, Object):
        raise StructureError(f"nnx.draw takes a Module, got {type(model).__name__}")
    boxes, arrows = _graph(model, depth)
    return _mermaid(boxes, arrows) if format == "mermaid" else _dot(boxes, arrows)


def _graph(model: Any, depth: int | None) -> tuple[dict[str, _Box], list[tuple[str, str, str]]]:
    definition: ModuleDef[Any] = walk((model,)).moduledef
    rows = {row.path: row for row in tabulate(model).rows}
    users: dict[int, int] = {}
    for node in definition.nodes:
        for _, kind, payload in node.attributes:
            if kind == CELL:
                users[payload] = users.get(payload, 0) + 1
    levels, paths = {definition.roots[0]: 0}, definition.node_paths()
    order, arrows = [definition.roots[0]], []
    tied: dict[str, _Box] = {}
    for index in order:  # level by level; what is found is appended
        for name, kind, payload in definition.nodes[index].attributes:
            if kind == OBJECT and (payload in levels or depth is None or levels[index] < depth):
                if payload not in levels:
                    levels[payload] = levels[index] + 1
                    order.append(payload)
                arrows.append((f"n{index}", name, f"n{payload}"))
            elif kind == CELL and users[payload] > 1:
                path, cell_type, _ = definition.schema.entries[payload]
                tied[f"v{payload}"] = _Box((cell_type.__name__, value_text(rows[path].value)), False, True)
                arrows.append((f"n{index}", name, f"v{payload}"))
    held = [target for _, _, target in arrows]
    boxes = {}
    for index in order:
        row = rows[paths[index]]
        noun = "parameter" if row.parameters == 1 else "parameters"
        count = (f"{count_text(row.parameters)} {noun}",) if row.parameters else ()
        entered = held.count(f"n{index}") + (index == definition.roots[0])
        boxes[f"n{index}"] = _Box((row.type.__name__, *count), True, entered > 1)
    return {**boxes, **tied}, arrows


def _mermaid(boxes: dict[str, _Box], arrows: list[tuple[str, str, str]]) -> str:
    def quoted(text: str) -> str:
        # Within quotes too, Mermaid reads HTML, Markdown (also lists: `1. x`) and entities, and refuses some of each.
        return "".join(c if c.isalnum() or c in "_ ,[]()" else f"#{ord(c)};" for c in text)

    lines = ["flowchart TD"]
    for name, box in boxes.items():
        text = "<br/>".join(map(quoted, box.lines))
        lines.append(f'  {name}["{text}"]' if box.is_module else f'  {name}(["{text}"])')
    lines += [f'  {source} -- "{quoted(label)}" --> {target}' for source, label, target in arrows]
    shared = [name for name, box in boxes.items() if box.is_shared]
    if shared:
        lines += ["  classDef shared stroke-width:3px", f"  class {','.join(shared)} shared"]
    return "\n".join(lines)


def _dot(boxes: dict[str, _Box], arrows: list[tuple[str, str, str]]) -> str:
    def quoted(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;").replace("\n", "\\n")

    lines = ["digraph {", "  node [shape=box];"]
    for name, box in boxes.items():
        text = "\\n".join(map(quoted, box.lines))
        style = ("" if box.is_module else ", shape=ellipse") + (", penwidth=3" if box.is_shared else "")
        lines.append(f'  {name} [label="{text}"{style}];')
    lines += [f'  {source} -> {target} [label="{quoted(label)}"];' for source, label, target in arrows]
    return "\n".join([*lines, "}"])
