"""Which axis of each Variable a transform maps over: the rules that vmap and scan share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from nnx.core._context import RngStream
from nnx.core._errors import StructureError, VariableError
from nnx.core._filters import Filter, to_filter
from nnx.core._graph import ModuleDef
from nnx.core._layout import layout_of
from nnx.core._state import Path, Schema, make_node, path_text
from nnx.core._variable import Cell, Intermediate, Metadata, check_cell_trace
from nnx.core.transforms._inputs import Call
from nnx.core.transforms._join import live_places
from nnx.core.transforms._lift import Frame, Packed
from nnx.core.transforms._outcome import Outcome

__all__ = [
    "BROADCAST",
    "CARRY",
    "CARRY_ALL",
    "FRESH",
    "PARTITION_NAME",
    "SPLIT",
    "Category",
    "Change",
    "Rules",
    "Split",
    "axes_like",
    "changes",
    "common_size",
    "mapped_definition",
    "mapped_sizes",
    "unmapped_definition",
    "without",
]

PARTITION_NAME: Final = "partition_name"
"""The key of `metadata_params` for the name of the axis that a transform adds to the `sharding` of Variables."""


class Category:
    """How a Variable that has no axis takes part."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


BROADCAST: Final = Category("broadcast")
"""Each run sees the same value."""
CARRY: Final = Category("carry")
"""A run sees what the run before it left."""
CARRY_ALL: Final = Category("carry, streams included")
"""The default of a Module or Context that is the carry itself."""
FRESH: Final = Category("fresh")
"""Each run sees the same value and leaves its own: what is sown."""
SPLIT: Final = Category("split")
"""A random stream that differs from run to run."""


class Rules:
    """The axis or the category of each Variable, by filters."""

    def __init__(self, what: str, axes: Mapping[Any, int | None], broadcast: Any, carry: Any, split_rngs: Any) -> None:
        self.what = what
        if not isinstance(axes, Mapping):
            raise TypeError(f"variable_axes of {what} is a mapping from filters to axes, got {axes!r}")
        self.axes = list(axes.values())
        for axis in self.axes:
            if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool)):
                raise TypeError(f"variable_axes of {what} maps filters to an axis or None, got {axis!r}")
        self._rules: list[tuple[Filter, Any]] = [
            (to_filter(key), BROADCAST if axis is None else axis) for key, axis in axes.items()
        ]
        self._rules += [(to_filter(key), CARRY) for key in ([carry] if carry is not None else [])]
        self._rules += [(to_filter(key), BROADCAST) for key in ([broadcast] if broadcast is not None else [])]
        self._split = _names(what, split_rngs)

    def explicit(self, path: Path, kind: type[Cell], metadata: Metadata, value: Any) -> Any:
        """What a filter says of a Variable; None if none matches."""
        for item, category in self._rules:
            if item.match(path, kind, lambda: make_node(kind, value, metadata)):
                return category
        return None

    def of(self, path: Path, kind: type[Cell], metadata: Metadata, value: Any, default: Any) -> Any:
        """What a Variable is, given what its Module's Variables are by default."""
        if issubclass(kind, RngStream):
            if default is CARRY_ALL:
                return CARRY
            return SPLIT if self.splits(path[-1]) else BROADCAST
        found = self.explicit(path, kind, metadata, value)
        if found is not None:
            return found
        if issubclass(kind, Intermediate):
            return FRESH
        return CARRY if default is CARRY_ALL else default

    def splits(self, name: str) -> bool:
        """Whether the stream of that name differs along the axis."""
        return self._split if isinstance(self._split, bool) else name in self._split

    def assign(self, call: Call, defaults: Sequence[Any]) -> list[list[Any]]:
        """What each cell of each root of a call is.

        Raises:
            VariableError: a Variable that two arguments share would be one thing by one and another by the other.
        """
        assigned = []
        seen: dict[int, tuple[Any, str]] = {}
        for root, layout, default in zip(call.frame.roots, call.frame.layouts, defaults, strict=True):
            entries = layout.moduledef.schema.entries
            assigned.append(
                [self.of(*entry, cell._value, default) for entry, cell in zip(entries, layout.cells, strict=True)]
            )
            if len(call.frame.roots) == 1:
                break
            whole = layout_of(root)
            for entry, cell in zip(whole.moduledef.schema.entries, whole.cells, strict=True):
                name = f"`{path_text(entry[0])}` of the {type(root).__name__}"
                category = self.of(*entry, cell._value, default)
                other, other_name = seen.setdefault(id(cell), (category, name))
                if other != category:
                    raise VariableError(
                        f"{other_name} is {describe(other)} in {self.what}, and the same Variable is "
                        f"{describe(category)} as {name}: a shared Variable has one axis. Give both arguments the same "
                        "axis, or settle it with variable_axes"
                    )
        return assigned


def describe(category: Any) -> str:
    """A category in words."""
    return f"mapped over axis {category}" if isinstance(category, int) else repr(category)


def _names(what: str, split_rngs: Any) -> bool | frozenset[str]:
    if split_rngs is None or isinstance(split_rngs, bool):
        return bool(split_rngs)
    if isinstance(split_rngs, str):
        return frozenset((split_rngs,))
    if isinstance(split_rngs, Mapping):
        return frozenset(name for name, split in split_rngs.items() if split)
    names = frozenset(split_rngs)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"split_rngs of {what} is True, False, or names of random streams, got {split_rngs!r}")
    return names


def axes_like(what: str, prefix: Any, call: Call, number: int, argument: str) -> list[Any]:
    """The axis of each leaf of a positional argument, from a pytree prefix of axes."""
    tree: Any = call.structure(number)
    marks = jax.tree.unflatten(tree, [_LEAF] * tree.num_leaves)
    try:
        spread = jax.tree.map(
            lambda axis, below: [_Box(axis)] * len(jax.tree.leaves(below)),
            prefix,
            marks,
            is_leaf=lambda item: item is None,
        )
    except ValueError:
        raise ValueError(
            f"in_axes of {what} does not fit {argument}: {prefix!r} is no prefix of its structure {tree}"
        ) from None
    return [box.axis for box in jax.tree.leaves(spread)]


_LEAF: Final = object()


class _Box:
    __slots__ = ("axis",)

    def __init__(self, axis: Any) -> None:
        self.axis = axis


def mapped_sizes(call: Call, axes: Sequence[Any], assigned: Sequence[Sequence[Any]]) -> list[tuple[str, Any, int]]:
    """What of a call is mapped over, as `common_size` takes it.

    Args:
        call: the call.
        axes: the axis of each of its leaves.
        assigned: what each cell of each root is.
    """
    sizes: list[tuple[str, Any, int]] = []
    for i, (leaf, axis) in enumerate(zip(call.leaves, axes, strict=True)):
        if type(leaf) is not Packed:
            if isinstance(axis, int):
                sizes.append((f"leaf {i} of the arguments", leaf, axis))
            continue
        root = call.packed.index(i)
        kind = type(call.frame.roots[root]).__name__
        paths = call.frame.layouts[root].moduledef.schema.paths
        for path, value, category in zip(paths, leaf.values, assigned[root], strict=True):
            if isinstance(category, int):
                sizes.append((f"`{path_text(path)}` of the {kind}", value, category))
    return sizes


def common_size(what: str, sizes: Sequence[tuple[str, Any, int]], given: int | None) -> int:
    """The size of the axis that is mapped over.

    Args:
        what: the transform.
        sizes: for each mapped value its name, itself (a pytree of arrays), and its axis.
        given: the size that the user gave.

    Raises:
        StructureError: the sizes differ, a value lacks the axis, or there is no mapped value.
    """
    found: dict[int, str] = {} if given is None else {given: "the size that was given"}
    for name, value, axis in sizes:
        for leaf in jax.tree.leaves(value):
            shape = np.shape(leaf)
            if not -len(shape) <= axis < len(shape):
                raise StructureError(f"{what} maps over axis {axis} of {name}, whose shape is {list(shape)}: {_REMEDY}")
            found.setdefault(shape[axis], name)
    if len(found) > 1:
        (size, name), (other, other_name) = list(found.items())[:2]
        raise StructureError(
            f"{what} got axes of different sizes: {size} ({name}) and {other} ({other_name}). {_REMEDY}"
        )
    if not found:
        raise StructureError(
            f"{what} maps over nothing: no argument and no Variable has an axis, so give the size (`length=` of a "
            "scan, `axis_size=` of a vmap), or an axis to one of them by in_axes or variable_axes"
        )
    return next(iter(found))


_REMEDY: Final = (
    "in_axes says which arguments have the axis, and variable_axes which Variables; None stands for those that are "
    "shared by all"
)


class Split:
    """The random streams of a call that differ along the axis: each run gets a key of its own.

    The keys come from one draw of each stream, which counts once the transform is done.
    """

    def __init__(self, call: Call, assigned: Sequence[Sequence[Any]], size: int) -> None:
        self._cells: list[Any] = []
        self.keys: dict[tuple[int, int], Any] = {}
        for root, (layout, categories) in enumerate(zip(call.frame.layouts, assigned, strict=True)):
            for position, category in enumerate(categories):
                if category is not SPLIT:
                    continue
                name = layout.moduledef.schema.paths[position][-1]
                cell: Any = layout.cells[position]
                check_cell_trace(cell, f"RngStream {name!r}")
                self._cells.append(cell)
                self.keys[root, position] = jax.random.split(cell.peek(), size)

    def finish(self) -> None:
        """Count the draws."""
        for cell in self._cells:
            cell.advance(1)


class Change(NamedTuple):
    """A value that comes out of a trace.

    Attributes:
        place: the root and position of the cell that it is for; None for a new one.
        number: its number in `Outcome.post`; None if the structure stands or let go of the cell.
        entry: the path, type and metadata.
    """

    place: tuple[int, int] | None
    number: int | None
    entry: tuple[Path, type[Cell], Metadata]

    @property
    def name(self) -> str:
        """What an error calls it."""
        path, kind, _ = self.entry
        return f"`{path_text(path)}` ({kind.__name__})"


def changes(frame: Frame, outcome: Outcome) -> list[Change]:
    """What each value of an Outcome is for, in the order of the values."""
    layouts = frame.layouts
    if outcome.post is None:
        return [
            Change((root, position), None, layouts[root].moduledef.schema.entries[position])
            for root, positions in outcome.writes
            for position in positions
        ]
    at = live_places(frame)
    result = []
    for i, (entry, origin, written) in enumerate(
        zip(outcome.post.schema.entries, outcome.cells, outcome.written, strict=True)
    ):
        if written:
            result.append(Change(at[origin] if origin >= 0 else None, i, entry))
    for number in outcome.lost:
        root, position = at[number]
        result.append(Change((root, position), None, layouts[root].moduledef.schema.entries[position]))
    return result


def without(frame: Frame, outcome: Outcome, gone: Callable[[Change], bool]) -> tuple[Outcome, list[bool]]:
    """An Outcome without some of its values, and for each value of the old one whether it is kept.

    Draws from streams that are gone are gone too.
    """
    every = changes(frame, outcome)
    kept = [not gone(change) for change in every]
    if outcome.post is None:
        entries = [layout.moduledef.schema.entries for layout in frame.layouts]
        writes: dict[int, list[int]] = {}
        for change, keep in zip(every, kept, strict=True):
            if keep and change.place is not None:
                writes.setdefault(change.place[0], []).append(change.place[1])
        draws = tuple(
            (root, position, keys)
            for root, position, keys in outcome.draws
            if not gone(Change((root, position), None, entries[root][position]))
        )
        return outcome._replace(
            writes=tuple((root, tuple(positions)) for root, positions in writes.items()), draws=draws
        ), kept
    at = live_places(frame)
    flags = list(outcome.written)
    for change, keep in zip(every, kept, strict=True):
        if change.number is not None and not keep:
            flags[change.number] = False
    lost = [keep for change, keep in zip(every, kept, strict=True) if change.number is None]
    draws = tuple(
        (root, i, keys)
        for root, i, keys in outcome.draws
        if not gone(Change(at[outcome.cells[i]], i, outcome.post.schema.entries[i]))
    )
    return outcome._replace(
        written=tuple(flags),
        lost=tuple(number for number, keep in zip(outcome.lost, lost, strict=True) if keep),
        draws=draws,
    ), kept


def mapped_definition(moduledef: ModuleDef[Any], axes: Sequence[Any]) -> ModuleDef[Any]:
    """A definition as a single run sees it: the names of the mapped axes are gone from the metadata."""
    return _with_metadata(
        moduledef,
        [
            _drop(metadata, axis) if isinstance(axis, int) else metadata
            for (_, _, metadata), axis in zip(moduledef.schema.entries, axes, strict=True)
        ],
    )


def unmapped_definition(
    moduledef: ModuleDef[Any], axes: Sequence[Any], originals: Sequence[Metadata | None], name: str | None
) -> ModuleDef[Any]:
    """The definition that a run left as the transform's caller sees it: with the axes that came from all the runs.

    Args:
        moduledef: the definition.
        axes: for each entry the axis of its value, or another category.
        originals: for each entry the caller's metadata, of which the run's were made; None for a new Variable.
        name: what to call the axis in `sharding`.
    """
    metadata = []
    for (_, _, own), axis, original in zip(moduledef.schema.entries, axes, originals, strict=True):
        if not isinstance(axis, int):
            metadata.append(own)
        elif original is not None and _drop(original, axis) is own:
            metadata.append(original)
        else:
            metadata.append(_add(own, axis, name))
    return _with_metadata(moduledef, metadata)


def _with_metadata(moduledef: ModuleDef[Any], metadata: Sequence[Metadata]) -> ModuleDef[Any]:
    entries = moduledef.schema.entries
    if all(new is entry[2] for new, entry in zip(metadata, entries, strict=True)):
        return moduledef
    fresh = [(path, kind, new) for (path, kind, _), new in zip(entries, metadata, strict=True)]
    return ModuleDef.of(moduledef.nodes, Schema.of(fresh), moduledef.roots)


def _drop(metadata: Metadata, axis: int) -> Metadata:
    names = metadata.get("sharding")
    if not isinstance(names, tuple) or not -len(names) <= axis < len(names):
        return metadata
    at = axis % len(names)
    return Metadata.of({**metadata, "sharding": names[:at] + names[at + 1 :]})


def _add(metadata: Metadata, axis: int, name: str | None) -> Metadata:
    names = metadata.get("sharding")
    if not isinstance(names, tuple):
        return metadata
    at = axis if axis >= 0 else len(names) + 1 + axis
    return Metadata.of({**metadata, "sharding": (*names[:at], name, *names[at:])})
