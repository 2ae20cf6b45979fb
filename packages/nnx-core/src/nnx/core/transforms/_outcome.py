"""What a trace learned about the Modules it was given, and how that is written back into the live ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from nnx.core._graph import ModuleDef
from nnx.core._layout import walk_in_turn
from nnx.core._object import Object
from nnx.core._state import Path, path_text
from nnx.core._tracing import current_trace
from nnx.core._update import sync
from nnx.core._variable import check_cell_trace
from nnx.core.transforms._lift import Frame

__all__ = ["NOTHING", "Hole", "HoleNode", "Outcome", "distinct", "finish", "identity_differences"]


class Outcome(NamedTuple):
    """What a trace learned, as static data.

    It travels in the output's treedef and never on the side, since JAX keeps several traces of one function.
    Where the structure stands, `writes` and `draws` say all. Where it changed, `post` describes the whole graph
    afterwards.

    Attributes:
        writes: for each root with changed cells its number and the positions of these cells in its layout.
        draws: for each stream that was drawn from the root's number, its position, and the number of keys.
        streams: whether streams are among the cells written.
        holes: whether Modules are part of the output.
        post: the structure afterwards, of the distinct roots and of the Modules returned; None if it stands.
        objects: for each object of `post` its number in the walk over the roots, or -1 for a new one.
        cells: the same for its cells.
        written: for each cell of `post` whether a value comes with it.
        lost: cells of the walk over the roots that were written before the graph let go of them.
    """

    writes: tuple[tuple[int, tuple[int, ...]], ...] = ()
    draws: tuple[tuple[int, int, int], ...] = ()
    streams: bool = False
    holes: bool = False
    post: ModuleDef[Any] | None = None
    objects: tuple[int, ...] = ()
    cells: tuple[int, ...] = ()
    written: tuple[bool, ...] = ()
    lost: tuple[int, ...] = ()


# As a pytree an Outcome has no leaves. What comes out of the unflattening must flatten to the same again, or JAX leaves
# its fast path.
jax.tree_util.register_pytree_node(Outcome, lambda outcome: ((), outcome), lambda outcome, _: outcome)


def identity_differences(before: ModuleDef[Any], one: Outcome, other: Outcome) -> list[str]:
    """Where two traces leave different Modules or Variables in one place, by path.

    Args:
        before: the definition of the distinct roots, before either.
        one: what the one trace learned.
        other: what the other did.
    """
    first, second = _identities(before, one), _identities(before, other)
    lines: dict[Path, str] = {}
    for path in first:
        inside = any(path[:length] in lines for length in range(len(path)))
        if path in second and first[path] != second[path] and not inside:
            lines[path] = f"`{path_text(path)}` is {first[path]} -> {second[path]}"
    return list(lines.values())


def _identities(before: ModuleDef[Any], outcome: Outcome) -> dict[Path, str]:
    """For each path what is there, by where it was before."""
    paths, entries = before.node_paths(), before.schema.entries
    if outcome.post is None:
        found = {path: f"what was `{path_text(path)}`" for path in paths}
        return found | {path: f"what was `{path_text(path)}`" for path, _, _ in entries}
    post = outcome.post
    found = {
        path: f"what was `{path_text(paths[origin])}`" if origin >= 0 else f"a new {node.type.__name__}"
        for path, node, origin in zip(post.node_paths(), post.nodes, outcome.objects, strict=True)
    }
    for (path, kind, _), origin in zip(post.schema.entries, outcome.cells, strict=True):
        found[path] = f"what was `{path_text(entries[origin][0])}`" if origin >= 0 else f"a new {kind.__name__}"
    return found


NOTHING = Outcome()
"""Nothing changed: the one Outcome that a call can tell by identity."""


class Hole(NamedTuple):
    """Stands for a Module in an output: a root by its number, or an object of the walk by its number."""

    root: int
    number: int


class HoleNode:
    """A Hole as a pytree without leaves."""

    __slots__ = ("hole",)

    def __init__(self, hole: Hole) -> None:
        self.hole = hole


jax.tree_util.register_pytree_node(HoleNode, lambda node: ((), node.hole), lambda hole, _: HoleNode(hole))


def _is_hole(value: Any) -> bool:
    return type(value) is HoleNode


def distinct(items: Sequence[Object]) -> list[Object]:
    """The objects, each once."""
    seen: set[int] = set()
    return [item for item in items if not (id(item) in seen or seen.add(id(item)))]  # type: ignore[func-returns-value]


def finish(frame: Frame, out: Any, values: Sequence[Any], outcome: Outcome) -> Any:
    """Write what changed into the live Modules, and put them into the output.

    Everything is checked before anything is written.
    """
    if outcome.post is not None:
        return _finish_structure(frame, out, values, outcome)
    for number, position, _ in outcome.draws:
        check_cell_trace(frame.layouts[number].cells[position], "RngStream")
    if outcome.writes:
        _write(frame, values, outcome.writes, outcome.streams)
    for number, position, keys in outcome.draws:
        frame.layouts[number].cells[position].advance(keys)  # type: ignore[attr-defined]
    if not outcome.holes:
        return out
    objects: list[Object] = []

    def fill(leaf: Any) -> Any:
        if type(leaf) is not HoleNode:
            return leaf
        if leaf.hole.root >= 0:
            return frame.roots[leaf.hole.root]
        if not objects:
            objects.extend(item for graph in walk_in_turn(distinct(frame.roots)) for item in graph.objects)
        return objects[leaf.hole.number]

    return jax.tree.map(fill, out, is_leaf=_is_hole)


def _write(frame: Frame, values: Sequence[Any], writes: tuple[tuple[int, tuple[int, ...]], ...], streams: bool) -> None:
    trace = current_trace()
    for number, positions in writes:
        frame.layouts[number].check_trace(trace, positions)
    start = 0
    for number, positions in writes:
        part = values[start : start + len(positions)]
        start += len(positions)
        frame.layouts[number].write(positions, part, streams=streams)


def _finish_structure(frame: Frame, out: Any, values: Sequence[Any], outcome: Outcome) -> Any:
    graphs = walk_in_turn(distinct(frame.roots))
    live_objects = [item for graph in graphs for item in graph.objects]
    live_cells = [item for graph in graphs for item in graph.cells]
    post = outcome.post
    assert post is not None
    for _, position, _ in outcome.draws:
        origin = outcome.cells[position]
        if origin >= 0:
            check_cell_trace(live_cells[origin], path_text(post.schema.paths[position]))
    for number in outcome.lost:
        check_cell_trace(live_cells[number], f"{type(live_cells[number]).__name__}.value")
    remaining = iter(values)
    all_values = [next(remaining) if write else None for write in outcome.written]
    objects, cells = sync(
        post,
        [live_objects[i] if i >= 0 else None for i in outcome.objects],
        [live_cells[i] if i >= 0 else None for i in outcome.cells],
        all_values,
        outcome.written,
    )
    for number, value in zip(outcome.lost, remaining, strict=True):
        live_cells[number]._value = value
    for _, position, keys in outcome.draws:
        cells[position].advance(keys)  # type: ignore[attr-defined]
    if not outcome.holes:
        return out
    return jax.tree.map(
        lambda leaf: objects[leaf.hole.number] if type(leaf) is HoleNode else leaf, out, is_leaf=_is_hole
    )
