"""The one mechanism behind every lifted transform: Modules go in whole, and only what changed comes out."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nnx.core._context import Context, RngStream
from nnx.core._errors import AttributeKindError, VariableError
from nnx.core._graph import Graph, ModuleDef, build, walk
from nnx.core._layout import Layout, layout_after, layout_of, walk_in_turn
from nnx.core._object import Object, set_layout
from nnx.core._state import path_text
from nnx.core._tracing import current_trace
from nnx.core._update import sync
from nnx.core._variable import Cell, check_cell_trace, set_value, unshared

__all__ = [
    "Frame",
    "Inputs",
    "Outcome",
    "Packed",
    "finish",
    "is_object",
    "is_packed",
    "lifting",
    "pack",
    "register",
    "run",
]


class Frame:
    """One call: the roots, in the order in which JAX meets them while it flattens the arguments, and their layouts.

    A Frame also stands for the first argument of the call. JAX flattens the arguments more than once when it has to
    compile; each time it meets the Frame first, which then begins anew, so it always holds the roots of the last
    time, each once. If the argument is a Module, the Frame flattens in its place, so that the usual call pays for one
    Python callback, not two.
    """

    __slots__ = ("argument", "layouts", "roots")

    roots: list[Object]
    layouts: list[Layout]

    def __init__(self, argument: Any = None) -> None:
        self.argument = argument  # the flattening, or `begin`, does the rest

    def begin(self) -> Frame:
        """Make ready for roots that are entered by hand."""
        self.roots, self.layouts = [], []
        return self

    def enter(self, root: Object) -> Layout:
        """Add a root."""
        layout = layout_after(root, self.roots, self.layouts) if self.roots else layout_of(root)
        self.roots.append(root)
        self.layouts.append(layout)
        return layout


class _Local(threading.local):
    frame: Frame | None = None


_local = _Local()


class lifting:  # noqa: N801 - read as a function
    """While it is entered, Modules can be flattened, and the frame collects them. Each thread has its own."""

    __slots__ = ("frame", "outer")

    def __init__(self, frame: Frame | None) -> None:
        self.frame = frame

    def __enter__(self) -> Frame | None:
        self.outer = _local.frame
        _local.frame = self.frame
        return self.frame

    def __exit__(self, *exc: object) -> None:
        _local.frame = self.outer


class Packed:
    """What a traced function finds in a Module's place: the definition and the values, still to be built."""

    __slots__ = ("moduledef", "values")

    def __init__(self, moduledef: ModuleDef[Any], values: Sequence[Any]) -> None:
        self.moduledef = moduledef
        self.values = values


def _shell(kind: type[Object], moduledef: ModuleDef[Any], children: Sequence[Any]) -> Object:
    """Unflatten: an empty instance that carries a Packed, so that flattening it again gives the same treedef."""
    instance = object.__new__(kind)
    set_layout(instance, Packed(moduledef, children[0]))
    return instance


def is_packed(value: Any) -> bool:
    """Whether a value stands for a Module that is still to be built."""
    return type(value) is Packed or (isinstance(value, Object) and type(value._nnx_layout) is Packed)


def _is_packed_or_object(value: Any) -> bool:
    return type(value) is Packed or isinstance(value, Object)


def packed_of(value: Any) -> Packed:
    """The Packed that `is_packed` has seen."""
    return value if type(value) is Packed else value._nnx_layout  # type: ignore[no-any-return]


def _flatten(root: Object) -> tuple[tuple[Sequence[Any]], ModuleDef[Any]]:
    # One child, a list: JAX walks a list faster than the children of a node of ours.
    if type(root._nnx_layout) is Packed:
        return (root._nnx_layout.values,), root._nnx_layout.moduledef
    frame = _local.frame
    if frame is None:
        raise AttributeKindError(_not_a_pytree(root))
    layout = frame.enter(root)
    return ([cell._value for cell in layout.cells],), layout.moduledef


def _flatten_with_keys(root: Object) -> tuple[Any, ModuleDef[Any]]:
    (values,), moduledef = _flatten(root)
    return ((_VALUES_KEY, values),), moduledef


_VALUES_KEY = jax.tree_util.GetAttrKey("values")


def _not_a_pytree(root: Object) -> str:
    name = type(root).__name__
    if isinstance(root, Context):
        return (
            "a Context is not a pytree, so raw JAX transforms and tree functions cannot take it: pass it through a "
            "lifted transform (nnx.jit, nnx.grad, ...), or split it: `state, contextdef = ctx.partition()` outside, "
            "`contextdef.merge(state)` inside"
        )
    return (
        f"a {name} is an nnx.Module and not a pytree, so raw JAX transforms and tree functions cannot take it. Pass it "
        "through a lifted transform (nnx.jit, nnx.grad, ...), or partition it: `state, moduledef = "
        "module.partition()` outside, `module = moduledef.merge(state)` inside"
    )


def register(kind: type[Object]) -> None:
    """Register a Module class with JAX: lifted transforms can flatten its instances, all else gets our error."""
    jax.tree_util.register_pytree_with_keys(kind, _flatten_with_keys, functools.partial(_shell, kind), _flatten)


class _First:
    """The Frame inside the trace: the first argument, or the Packed of it."""

    __slots__ = ("argument",)

    def __init__(self, argument: Any) -> None:
        self.argument = argument


def first_argument(argument: Any) -> Any:
    """What a Frame stands for inside the trace; any other argument as it is."""
    return argument.argument.argument if type(argument) is Frame else argument


def is_untouched(argument: Any) -> bool:
    """Whether an argument is a Frame that JAX has not flattened: `jax.disable_jit` calls the function as it is."""
    return type(argument) is Frame and type(argument.argument) is not _First


def _flatten_frame(frame: Frame) -> tuple[tuple[Any], ModuleDef[Any] | None]:
    argument = frame.argument
    if isinstance(argument, Object):
        layout = layout_of(argument)
        frame.roots = [argument]
        frame.layouts = [layout]
        return ([cell._value for cell in layout.cells],), layout.moduledef
    if type(argument) is _First:  # flattened again after an unflattening, by JAX itself
        inner = argument.argument
        return ((inner.values,), inner.moduledef) if type(inner) is Packed else ((inner,), None)
    frame.roots = []
    frame.layouts = []
    return (argument,), None


def _flatten_frame_with_keys(frame: Frame) -> tuple[Any, ModuleDef[Any] | None]:
    (child,), moduledef = _flatten_frame(frame)
    return ((_VALUES_KEY, child),), moduledef


def _unflatten_frame(moduledef: ModuleDef[Any] | None, children: Any) -> Any:
    return Frame(_First(children[0] if moduledef is None else Packed(moduledef, children[0])))


jax.tree_util.register_pytree_with_keys(Frame, _flatten_frame_with_keys, _unflatten_frame, _flatten_frame)


def is_object(value: Any) -> bool:
    """Whether a value is a Module or a Context: a leaf to our own tree functions."""
    return isinstance(value, Object)


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
    """

    writes: tuple[tuple[int, tuple[int, ...]], ...] = ()
    draws: tuple[tuple[int, int, int], ...] = ()
    streams: bool = False
    holes: bool = False
    post: ModuleDef[Any] | None = None
    objects: tuple[int, ...] = ()
    cells: tuple[int, ...] = ()
    written: tuple[bool, ...] = ()


# As a pytree an Outcome has no leaves. What comes out of the unflattening must flatten to the same again, or JAX
# leaves its
# fast path.
jax.tree_util.register_pytree_node(Outcome, lambda outcome: ((), outcome), lambda outcome, _: outcome)


NOTHING = Outcome()
"""Nothing changed: the one Outcome that a call can tell by identity."""


class Hole(NamedTuple):
    """Stands for a Module in an output: a root by its number, or an object of the walk by its number."""

    root: int
    number: int


class _HoleNode:
    __slots__ = ("hole",)

    def __init__(self, hole: Hole) -> None:
        self.hole = hole


jax.tree_util.register_pytree_node(_HoleNode, lambda node: ((), node.hole), lambda hole, _: _HoleNode(hole))


class Inputs:
    """The Modules that a traced function was given, and what it takes to tell what changed in them."""

    __slots__ = ("before", "cells", "donated", "objects", "pre", "roots", "spans")

    def __init__(self) -> None:
        self.objects: list[Object] = []
        self.cells: list[Cell] = []
        self.before: list[_Before] = []
        self.roots: list[Object] = []
        self.spans: list[tuple[int, int]] = []
        """For each root the range of `cells` that it brought in."""
        self.donated: set[int] = set()
        """Roots whose every value comes out again, since what they were given is gone."""
        self.pre: Graph | None = None

    def unpack(self, tree: Any, *, donated: bool = False) -> Any:
        """Put Modules in the place of the Packed in a pytree."""
        first = len(self.roots)
        tree = jax.tree.map(self._unpack_leaf, tree, is_leaf=_is_packed_or_object)
        if donated:
            self.donated.update(range(first, len(self.roots)))
        return tree

    def _unpack_leaf(self, leaf: Any) -> Any:
        if not is_packed(leaf):
            if isinstance(leaf, Object):
                raise AttributeKindError(
                    f"a {type(leaf).__name__} cannot be a static argument: its arrays would be constants of the "
                    "compiled code, and its changes would go unseen. Leave it out of static_argnums and "
                    "static_argnames"
                )
            return leaf
        packed = packed_of(leaf)
        return self.add(packed.moduledef, packed.values)

    def add(self, moduledef: ModuleDef[Any], values: Sequence[Any]) -> Object:
        """Build one more root."""
        objects, cells = build(moduledef, [unshared(value) for value in values], self.objects, self.cells)
        (root,) = moduledef.roots
        found = objects[root] if root >= 0 else self.objects[-1 - root]
        self.spans.append((len(self.cells), len(self.cells) + len(cells)))
        self.objects += objects
        self.cells += cells
        self.before += [_Before(cell) for cell in cells]
        self.roots.append(found)
        return found

    def start(self) -> None:
        """Note the structure before the function runs."""
        self.pre = walk(_distinct(self.roots))

    def outcome(self, out: Any) -> tuple[Any, list[Any], Outcome]:
        """Take stock after the function has run.

        Args:
            out: what the function returned.

        Returns:
            The output with holes for its Modules, the values that come out besides, and what the trace learned.
        """
        assert self.pre is not None
        leaves, tree = jax.tree.flatten(out, is_leaf=is_object)
        known = {id(item) for item in self.pre.objects}
        returned = [leaf for leaf in leaves if isinstance(leaf, Object)]
        fresh = _distinct([item for item in returned if id(item) not in known])
        post = walk([*_distinct(self.roots), *fresh])
        reached = {id(item) for item in post.objects}
        detached = [item for item in self.pre.objects if id(item) not in reached]
        if detached:
            # The graph has let go of them, but the caller may hold them, and sees what was done to them.
            post = walk([*_distinct(self.roots), *fresh, *detached])
        if not fresh and self._stands(post):
            outcome, values = self._changed_values()
        else:
            outcome, values = self._changed_structure(post)
        if returned:
            numbers = {id(item): i for i, item in enumerate(post.objects)}
            roots = {id(item): k for k, item in reversed(list(enumerate(self.roots)))}
            holes = [
                _HoleNode(Hole(roots.get(id(leaf), -1), numbers[id(leaf)])) if isinstance(leaf, Object) else leaf
                for leaf in leaves
            ]
            out, outcome = jax.tree.unflatten(tree, holes), outcome._replace(holes=True)
        return out, values, outcome

    def _stands(self, post: Graph) -> bool:
        pre = self.pre
        assert pre is not None
        return (
            pre.moduledef is post.moduledef
            and all(new is old for new, old in zip(post.objects, pre.objects, strict=True))
            and all(new is old for new, old in zip(post.cells, pre.cells, strict=True))
        )

    def _changed_values(self) -> tuple[Outcome, list[Any]]:
        writes, draws, values = [], [], []
        for number, (first, last) in enumerate(self.spans):
            positions = []
            for position in range(first, last):
                cell, before = self.cells[position], self.before[position]
                if number in self.donated or before.changed():
                    positions.append(position - first)
                    values.append(self._value_out(cell, position))
                elif isinstance(cell, RngStream) and cell._drawn:
                    draws.append((number, position - first, cell._drawn))
            if positions:
                writes.append((number, tuple(positions)))
        if not writes and not draws:
            return NOTHING, values
        streams = any(type(self.cells[self.spans[k][0] + i]) is RngStream for k, positions in writes for i in positions)
        return Outcome(tuple(writes), tuple(draws), streams), values

    def _changed_structure(self, post: Graph) -> tuple[Outcome, list[Any]]:
        pre = self.pre
        assert pre is not None
        object_numbers = {id(item): i for i, item in enumerate(pre.objects)}
        cell_numbers = {id(item): i for i, item in enumerate(pre.cells)}
        changed = {id(cell): before.changed() for cell, before in zip(self.cells, self.before, strict=True)}
        for number in self.donated:
            changed.update((id(cell), True) for cell in self.cells[slice(*self.spans[number])])
        origins, written, values, draws = [], [], [], []
        for i, cell in enumerate(post.cells):
            origin = cell_numbers.get(id(cell), -1)
            write = origin < 0 or changed[id(cell)]
            origins.append(origin)
            written.append(write)
            if write:
                values.append(self._value_out(cell, i, post))
            elif isinstance(cell, RngStream) and cell._drawn:
                draws.append((-1, i, cell._drawn))
        return Outcome(
            draws=tuple(draws),
            post=post.moduledef,
            objects=tuple(object_numbers.get(id(item), -1) for item in post.objects),
            cells=tuple(origins),
            written=tuple(written),
        ), values

    def _value_out(self, cell: Cell, position: int, graph: Graph | None = None) -> Any:
        value = cell._value
        for leaf in jax.tree.leaves(value, is_leaf=is_object):
            if not isinstance(leaf, _VALUES):
                definition = (graph or self.pre).moduledef  # type: ignore[union-attr]
                path = path_text(definition.schema.paths[position]) if position < len(definition.schema) else "?"
                raise VariableError(
                    f"`{path}` was given a {type(leaf).__name__} inside of a transform: what comes out of a compiled "
                    "function must be arrays or numbers. Keep other values in plain attributes"
                )
        return value


_VALUES = (jax.Array, np.ndarray, np.generic, int, float, complex, jax.ShapeDtypeStruct)


class _Before:
    """What a cell held when the function began."""

    __slots__ = ("cell", "key", "leaves", "tree", "value")

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.key = cell._key if isinstance(cell, RngStream) else None
        self.value = None if isinstance(cell, RngStream) else cell._value
        self.tree = None
        if not isinstance(self.value, jax.Array):
            # A container or a NumPy array may be edited in place, so what it holds is noted and not only itself.
            leaves, self.tree = jax.tree.flatten(self.value)
            self.leaves = [leaf.copy() if type(leaf) is np.ndarray else leaf for leaf in leaves]

    def changed(self) -> bool:
        if isinstance(self.cell, RngStream):
            return self.cell._key is not self.key
        if self.tree is None:
            return self.cell._value is not self.value
        leaves, tree = jax.tree.flatten(self.cell._value)
        return tree != self.tree or not all(map(_same_leaf, leaves, self.leaves))


def _same_leaf(new: Any, old: Any) -> bool:
    if new is old or type(old) is not np.ndarray or type(new) is not np.ndarray:
        return new is old
    return bool(new.dtype == old.dtype and new.shape == old.shape and new.tobytes() == old.tobytes())


def _distinct(items: Sequence[Object]) -> list[Object]:
    seen: set[int] = set()
    return [item for item in items if not (id(item) in seen or seen.add(id(item)))]  # type: ignore[func-returns-value]


def pack(tree: Any, frame: Frame) -> Any:
    """Put a Packed in the place of each Module of a pytree, for transforms that do not leave the flattening to JAX."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Object):
            return leaf
        layout = frame.enter(leaf)
        return Packed(layout.moduledef, [cell._value for cell in layout.cells])

    return jax.tree.map(one, tree, is_leaf=is_object)


def run(function: Callable[..., Any], inputs: Inputs, args: Any, kwargs: Any) -> tuple[Any, list[Any], Outcome]:
    """Run a function on built Modules inside the trace, and take stock.

    The lifting flag is cleared: a Module handed to a raw JAX transform in there is an error as it is anywhere else.
    """
    with lifting(None):
        inputs.start()
        return inputs.outcome(function(*args, **kwargs))


def finish(frame: Frame, out: Any, values: Sequence[Any], outcome: Outcome) -> Any:
    """Write what changed into the live Modules, and put them into the output."""
    if outcome.post is not None:
        return _finish_structure(frame, out, values, outcome)
    if outcome.writes:
        _write(frame, values, outcome.writes, outcome.streams)
    for number, position, keys in outcome.draws:
        stream = frame.layouts[number].cells[position]
        check_cell_trace(stream, "RngStream")
        stream.advance(keys)  # type: ignore[attr-defined]
    if not outcome.holes:
        return out
    objects: list[Object] = []

    def fill(leaf: Any) -> Any:
        if type(leaf) is not _HoleNode:
            return leaf
        if leaf.hole.root >= 0:
            return frame.roots[leaf.hole.root]
        if not objects:
            objects.extend(item for graph in walk_in_turn(_distinct(frame.roots)) for item in graph.objects)
        return objects[leaf.hole.number]

    return jax.tree.map(fill, out, is_leaf=_is_hole)


def _write(frame: Frame, values: Sequence[Any], writes: tuple[tuple[int, tuple[int, ...]], ...], streams: bool) -> None:
    trace = current_trace()
    for number, positions in writes:
        layout = frame.layouts[number]
        if layout.trace is not trace:
            for position in positions:
                check_cell_trace(layout.cells[position], path_text(layout.moduledef.schema.paths[position]))
    start = 0
    for number, positions in writes:
        cells = frame.layouts[number].cells
        part = values if len(writes) == 1 else values[start : start + len(positions)]
        start += len(positions)
        if streams:
            for position, value in zip(positions, part, strict=True):
                cells[position]._value = value  # a stream's value is a property
        else:
            # A loop in C over the slot's own setter: this is all that an update costs besides jax.jit's own work.
            deque(map(set_value, map(cells.__getitem__, positions) if len(positions) < len(cells) else cells, part), 0)


def _finish_structure(frame: Frame, out: Any, values: Sequence[Any], outcome: Outcome) -> Any:
    graphs = walk_in_turn(_distinct(frame.roots))
    live_objects = [item for graph in graphs for item in graph.objects]
    live_cells = [item for graph in graphs for item in graph.cells]
    assert outcome.post is not None
    remaining = iter(values)
    all_values = [next(remaining) if write else None for write in outcome.written]
    objects, cells = sync(
        outcome.post,
        [live_objects[i] if i >= 0 else None for i in outcome.objects],
        [live_cells[i] if i >= 0 else None for i in outcome.cells],
        all_values,
        outcome.written,
    )
    for _, position, keys in outcome.draws:
        cells[position].advance(keys)  # type: ignore[attr-defined]
    if not outcome.holes:
        return out
    return jax.tree.map(
        lambda leaf: objects[leaf.hole.number] if type(leaf) is _HoleNode else leaf, out, is_leaf=_is_hole
    )


def _is_hole(value: Any) -> bool:
    return type(value) is _HoleNode


register(Context)
