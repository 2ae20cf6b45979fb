"""Changing a live graph: values and structure from a State, a definition, or the far side of a transform."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Any

from nnx.core._errors import PathError, StructureError
from nnx.core._graph import CELL, METHOD, OBJECT, STATIC, Attribute, ModuleDef, check_equivalent, fill, walk
from nnx.core._layout import layout_of
from nnx.core._object import Object, check_object_trace, expose, invalidate, new_object, origin_of
from nnx.core._state import Path, State, near_misses, path_text
from nnx.core._static import StaticProblem, fingerprint
from nnx.core._variable import Buffer, Cell, Static, check_cell_trace, new_cell, unshared

__all__ = ["add_entries", "remove_cells", "sync", "update_from_definition", "update_values"]


def update_values(root: Object, states: Sequence[State]) -> None:
    """Write the values of States into a live graph, in place; entries that it does not have are added.

    Everything is checked before anything is written.

    Raises:
        VariableError: an entry has another type or metadata than the Variable at its path.
        PathError: an entry's path leads nowhere.
        TraceContextError: something to be written belongs to another trace.
    """
    layout = layout_of(root)
    index = layout.moduledef.schema.index
    writes: list[tuple[Cell, Any]] = []
    extra: dict[Path, tuple[Path, type[Cell], Any, Any]] = {}
    for state in states:
        for (path, kind, metadata), value in zip(state._schema.entries, state._values, strict=True):
            position = index.get(path)
            if position is None:
                extra[path] = (path, kind, metadata, value)
                continue
            cell = layout.cells[position]
            if kind is not Buffer:
                check_equivalent(path_text(path), type(cell), cell._metadata, kind, metadata)
            check_cell_trace(cell, f"{path_text(path)} of the {type(root).__name__}", origin_of(root))
            writes.append((cell, unshared(value)))
    parents = [_parent_of(root, path) for path in extra]
    for parent, path in zip(parents, extra, strict=True):
        _check_free(parent, path)
        check_object_trace(parent, path[-1])
    for cell, value in writes:
        cell._value = value
    for parent, (path, kind, metadata, value) in zip(parents, extra.values(), strict=True):
        _add(parent, path, kind, metadata, value)


def add_entries(root: Object, entries: Sequence[tuple[Path, type[Cell], Any, Any]]) -> None:
    """Add entries `(path, type, metadata, value)` to a live graph as new attributes."""
    for path, kind, metadata, value in entries:
        parent = _parent_of(root, path)
        _check_free(parent, path)
        _add(parent, path, kind, metadata, value)


def _check_free(parent: Object, path: Path) -> None:
    """Raise if a State's entry would take the place of a submodule or a static, which no State has a say in."""
    held = parent.__dict__.get(path[-1])
    if held is not None:
        what = f"a {type(held).__name__}" if isinstance(held, Object) else f"the static {held!r:.80}"
        raise StructureError(
            f"`{path_text(path)}` is {what}, but the State has data at that path: `del module.{path[-1]}` first, or "
            "update from a Pure or a Module, which takes over the structure too"
        )


def _add(parent: Object, path: Path, kind: type[Cell], metadata: Any, value: Any) -> None:
    existing = parent._nnx.cells.get(path[-1])
    if existing is not None:
        # Reached by a second path: a tied Variable, or a part of a shared Module.
        if kind is not Buffer:
            check_equivalent(path_text(path), type(existing), existing._metadata, kind, metadata)
        existing._value = unshared(value)
        return
    invalidate(parent)
    parent.__dict__.pop(path[-1], None)
    parent._nnx.cells[path[-1]] = new_cell(kind, unshared(value), metadata, owned=True)
    expose(type(parent), path[-1])


def _parent_of(root: Object, path: Path) -> Object:
    parent: Any = root
    for i, part in enumerate(path[:-1]):
        child = parent.__dict__.get(part)
        if not isinstance(child, Object):
            known = [(name,) for name, item in parent.__dict__.items() if isinstance(item, Object)]
            raise PathError(
                f"the path `{path_text(path)}` leads nowhere: the {type(parent).__name__} at "
                f"`{path_text(path[:i]) or '.'}` has no submodule `{part}`; {near_misses((part,), known)}"
            )
        parent = child
    return parent  # type: ignore[no-any-return]


def remove_cells(root: Object, gone: Sequence[Cell]) -> None:
    """Delete every attribute of the graph that holds one of the cells."""
    ids = {id(cell) for cell in gone}
    holders = []
    for instance in walk((root,)).objects:
        names = [name for name, cell in instance._nnx.cells.items() if id(cell) in ids]
        if names:
            check_object_trace(instance, names[0], "delete")
            holders.append((instance, names))
    for instance, names in holders:
        invalidate(instance)
        for name in names:
            del instance._nnx.cells[name]


def update_from_definition(root: Object, moduledef: ModuleDef[Any], values: Sequence[Any]) -> None:
    """Make a live graph equal to a definition and values, keeping the objects that stay.

    Objects and cells are matched by path, and kept where their types (and metadata) agree.
    """
    values = [unshared(value) for value in values]
    graph = walk((root,))
    if graph.moduledef is moduledef:
        for cell, path in zip(graph.cells, moduledef.schema.paths, strict=True):
            check_cell_trace(cell, path_text(path))
        for cell, value in zip(graph.cells, values, strict=True):
            cell._value = value
        return
    if type(root) is not moduledef.type:
        raise StructureError(
            f"cannot update a {type(root).__name__} from the definition of a {moduledef.type.__name__}"
        )
    by_path = dict(zip(graph.moduledef.node_paths(), graph.objects, strict=True))
    objects = []
    for path, node in zip(moduledef.node_paths(), moduledef.nodes, strict=True):
        found = by_path.get(path)
        objects.append(found if type(found) is node.type else None)
    own = graph.moduledef.schema
    cells: list[Cell | None] = []
    for entry in moduledef.schema.entries:
        position = own.index.get(entry[0])
        same = position is not None and own.entries[position] == entry
        cells.append(graph.cells[position] if same and position is not None else None)
    sync(moduledef, objects, cells, values, [True] * len(cells))


def sync(
    moduledef: ModuleDef[Any],
    objects: Sequence[Object | None],
    cells: Sequence[Cell | None],
    values: Sequence[Any],
    written: Sequence[bool],
) -> tuple[list[Object], list[Cell]]:
    """Bring live objects to the structure of a definition.

    Args:
        moduledef: the structure to reach.
        objects: for each of its nodes the live object that plays it, or None to make one.
        cells: for each of its entries the live cell, or None to make one.
        values: for each of its entries the value; ignored where `written` is false.
        written: whether a live cell takes the value.

    Returns:
        The objects and cells, live and new.
    """
    for cell, path, write in zip(cells, moduledef.schema.paths, written, strict=True):
        if cell is not None and write:
            check_cell_trace(cell, path_text(path))
    all_cells = [
        new_cell(kind, value, metadata, owned=True) if cell is None else cell
        for cell, (_, kind, metadata), value in zip(cells, moduledef.schema.entries, values, strict=True)
    ]
    all_objects = [
        new_object(node.type) if item is None else item for item, node in zip(objects, moduledef.nodes, strict=True)
    ]
    live = _live_statics(moduledef, objects)
    changed = []
    for instance, old, node in zip(all_objects, objects, moduledef.nodes, strict=True):
        if old is None or _differs(instance, node.attributes, all_objects, all_cells, live):
            if old is not None:
                check_object_trace(instance, "")
            changed.append((instance, node.attributes))
    copies = {id(entry.value): live[entry.alias] for _, _, entry in _mutable_statics(moduledef) if entry.alias in live}
    for instance, attributes in changed:
        kept = _unchanged_statics(instance, attributes)
        invalidate(instance)
        hidden = instance._nnx
        instance.__dict__.clear()
        object.__setattr__(instance, "_nnx", hidden)
        instance._nnx.cells.clear()
        fill(instance, attributes, all_objects, all_cells, (), (), copies)
        instance.__dict__.update(kept)
    for cell, old_cell, value, write in zip(all_cells, cells, values, written, strict=True):
        if write and old_cell is not None:
            cell._value = value
    return all_objects, all_cells


def _mutable_statics(moduledef: ModuleDef[Any]) -> Iterator[tuple[int, str, Any]]:
    """The mutable statics of a definition, as (number of the node, attribute, entry)."""
    for number, node in enumerate(moduledef.nodes):
        for name, kind, payload in node.attributes:
            if kind is STATIC and payload.mutable:
                yield number, name, payload


def _live_statics(moduledef: ModuleDef[Any], objects: Sequence[Object | None]) -> dict[int, Any]:
    """The live objects that play mutable statics of a definition, by alias: where one is unchanged, it stays itself."""
    live: dict[int, Any] = {}
    taken: set[int] = set()
    for number, name, entry in _mutable_statics(moduledef):
        instance = objects[number]
        if instance is None or entry.alias in live:
            continue
        held = instance._nnx.cells.get(name, instance.__dict__.get(name, _ABSENT))
        if _same_static(held, entry):
            value = held._value if entry.explicit else held
            if id(value) not in taken:
                taken.add(id(value))
                live[entry.alias] = value
    return live


def _differs(
    instance: Object,
    attributes: Sequence[Attribute],
    objects: Sequence[Object],
    cells: Sequence[Cell],
    live: dict[int, Any],
) -> bool:
    current = dict(instance._nnx_children())
    if len(current) != len(attributes):
        return True
    for name, kind, payload in attributes:
        held = current.get(name, _ABSENT)
        if kind is OBJECT:
            same = held is objects[payload]
        elif kind is CELL:
            same = held is cells[payload]
        elif kind is METHOD:
            same = (
                isinstance(held, types.MethodType)
                and held.__self__ is objects[payload[0]]
                and held.__func__ is payload[1]
            )
        else:
            same = _same_static(held, payload)
            if same and payload.mutable:
                same = live.get(payload.alias) is (held._value if payload.explicit else held)
        if not same:
            return True
    return False


_ABSENT: Any = object()


def _same_static(held: Any, entry: Any) -> bool:
    if held is _ABSENT or isinstance(held, Object) or (isinstance(held, Cell) and not isinstance(held, Static)):
        return False
    explicit = isinstance(held, Static)
    try:
        mark = fingerprint(held._value if explicit else held, forbidden=(Object, Cell), arrays=explicit)
    except StaticProblem:
        return False
    return (mark.key, explicit) == entry.key


def _unchanged_statics(instance: Object, attributes: Sequence[Attribute]) -> dict[str, Any]:
    kept = {}
    for name, kind, payload in attributes:
        if kind is STATIC and not payload.explicit and not payload.mutable:
            held = instance.__dict__.get(name, _ABSENT)
            if _same_static(held, payload):
                kept[name] = held
    return kept
