"""Inside a trace: Modules are built from what came in, the function runs, and what it changed is taken stock of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nnx.core._context import RngStream
from nnx.core._errors import AttributeKindError, TraceContextError, VariableError
from nnx.core._graph import Graph, build, statics_changed, walk
from nnx.core._layout import Layout
from nnx.core._object import Object, origin_of
from nnx.core._state import path_text
from nnx.core._tracing import current_trace
from nnx.core._variable import PLAIN, Cell, trace_error, unshared
from nnx.core.transforms._lift import Frame, Initializing, Packed, is_object, is_packed, lifting, packed_of
from nnx.core.transforms._outcome import NOTHING, Hole, HoleNode, Outcome, distinct
from nnx.core.transforms._values import check_deleted, check_values

__all__ = ["Call", "Inputs", "pack", "run"]


class Inputs:
    """The Modules that a traced function was given, and what it takes to tell what changed in them."""

    __slots__ = ("all_out", "before", "cells", "layout", "objects", "pre", "roots", "spans")

    def __init__(self) -> None:
        self.objects: list[Object] = []
        self.cells: list[Cell] = []
        self.before: list[_Before] = []
        self.roots: list[Object] = []
        self.spans: list[tuple[int, int]] = []
        """For each root the range of `cells` that it brought in."""
        self.all_out: set[int] = set()
        """Roots whose every value comes out again: what they were given is donated."""
        self.pre: Graph | None = None
        self.layout: Layout | None = None
        """Told of any structural change, so that the usual trace need not walk the graph again to see none."""

    def unpack(self, tree: Any, *, donated: bool = False) -> Any:
        """Put Modules in the place of the Packed in a pytree."""
        first = len(self.roots)
        tree = jax.tree.map(self._unpack_leaf, tree, is_leaf=_is_packed_or_object)
        if donated:
            self.all_out.update(range(first, len(self.roots)))
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
        return self.add(packed_of(leaf))

    def add(self, packed: Packed) -> Object:
        """Build one more root."""
        moduledef = packed.moduledef
        objects, cells = build(moduledef, [unshared(value) for value in packed.values], self.objects, self.cells)
        (root,) = moduledef.roots
        found = objects[root] if root >= 0 else self.objects[-1 - root]
        for item in objects:
            item._nnx.sown = set()
            if type(packed.definition) is Initializing:
                item._nnx.initializing = 1
        self.spans.append((len(self.cells), len(self.cells) + len(cells)))
        self.objects += objects
        self.cells += cells
        self.before += [_Before(cell) for cell in cells]
        self.roots.append(found)
        return found

    def start(self) -> None:
        """Note the structure before the function runs."""
        self.pre = walk(distinct(self.roots))
        self.layout = Layout(self.pre)
        if len(self.roots) == 1:
            self.roots[0]._nnx.layout = self.layout  # a transform inside finds it

    def outcome(self, out: Any) -> tuple[Any, list[Any], Outcome]:
        """Take stock after the function has run.

        Args:
            out: what the function returned.

        Returns:
            The output with holes for its Modules, the values that come out besides, and what the trace learned.

        Raises:
            TraceContextError: a Module or Variable from outside was assigned inside, or returned.
            VariableError: what was assigned to a Variable is no array.
        """
        pre, layout = self.pre, self.layout
        assert pre is not None
        assert layout is not None
        leaves, tree = jax.tree.flatten(out, is_leaf=is_object)
        returned = [leaf for leaf in leaves if isinstance(leaf, Object)]
        known = {id(item): i for i, item in enumerate(pre.objects)}
        fresh = distinct([item for item in returned if id(item) not in known])
        if layout.valid and not fresh and not (layout.statics and statics_changed(layout.statics)):
            post = pre
            outcome, values = self._changed_values()
        else:
            post = walk([*distinct(self.roots), *fresh])
            reached = {id(item) for item in post.objects}
            detached = [item for item in pre.objects if id(item) not in reached]
            if detached:
                # The graph has let go of them, but the caller may hold them, and sees what was done to them.
                post = walk([*distinct(self.roots), *fresh, *detached])
            self._check_strangers(post, known)
            if not fresh and self._stands(post):
                outcome, values = self._changed_values()
            else:
                outcome, values = self._changed_structure(post, known)
        if returned:
            numbers = {id(item): i for i, item in enumerate(post.objects)}
            roots = {id(item): k for k, item in reversed(list(enumerate(self.roots)))}
            holes = [
                HoleNode(Hole(roots.get(id(leaf), -1), numbers[id(leaf)])) if isinstance(leaf, Object) else leaf
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

    def _check_strangers(self, post: Graph, known: dict[int, int]) -> None:
        """What was made in this trace may come out as new. What was made elsewhere would come out as a copy."""
        trace = current_trace()
        for item, path in zip(post.objects, post.moduledef.node_paths(), strict=True):
            if id(item) not in known and item._nnx.trace is not trace:
                what = f"{type(item).__name__} {path_text(path)}".rstrip()
                raise TraceContextError(trace_error(what, item._nnx.trace, trace, "assign or return", origin_of(item)))
        own = {id(cell) for cell in self.cells}
        for cell, path in zip(post.cells, post.moduledef.schema.paths, strict=True):
            if id(cell) not in own and cell._trace is not trace and cell._trace is not None:
                what = f"{type(cell).__name__} {path_text(path)}"
                raise TraceContextError(trace_error(what, cell._trace, trace, "tie"))

    def _changed_values(self) -> tuple[Outcome, list[Any]]:
        writes, draws, values = [], [], []
        for number, (first, last) in enumerate(self.spans):
            positions = []
            for position in range(first, last):
                cell, before = self.cells[position], self.before[position]
                if number in self.all_out or before.changed():
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

    def _changed_structure(self, post: Graph, known: dict[int, int]) -> tuple[Outcome, list[Any]]:
        pre = self.pre
        assert pre is not None
        cell_numbers = {id(item): i for i, item in enumerate(pre.cells)}
        changed = {id(cell): before.changed() for cell, before in zip(self.cells, self.before, strict=True)}
        for number in self.all_out:
            changed.update((id(cell), True) for cell in self.cells[slice(*self.spans[number])])
        origins, written, values, draws = [], [], [], []
        for i, cell in enumerate(post.cells):
            origin = cell_numbers.pop(id(cell), -1)
            write = origin < 0 or changed[id(cell)]
            origins.append(origin)
            written.append(write)
            if write:
                values.append(self._value_out(cell, i, post))
            elif isinstance(cell, RngStream) and cell._drawn:
                draws.append((-1, i, cell._drawn))
        lost = [i for i in cell_numbers.values() if changed[id(pre.cells[i])]]
        values += [self._value_out(pre.cells[i], i) for i in lost]
        return Outcome(
            draws=tuple(draws),
            post=post.moduledef,
            objects=tuple(known.get(id(item), -1) for item in post.objects),
            cells=tuple(origins),
            written=tuple(written),
            lost=tuple(lost),
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

    def path(self, position: int) -> str:
        """The path of a cell, as errors name it."""
        assert self.pre is not None
        return path_text(self.pre.moduledef.schema.paths[position])


_VALUES = (np.ndarray, *PLAIN)


def _is_packed_or_object(value: Any) -> bool:
    return type(value) is Packed or isinstance(value, Object)


class _Before:
    """What a cell held when the function began."""

    __slots__ = ("cell", "count", "leaves", "tree", "value")

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.tree = None
        if isinstance(cell, RngStream):
            self.value, self.count = cell._key, cell._count
            return
        self.value = cell._value
        if not isinstance(self.value, jax.Array):
            # A container or a NumPy array may be edited in place, so what it holds is noted and not only itself.
            leaves, self.tree = jax.tree.flatten(self.value)
            self.leaves = [leaf.copy() if type(leaf) is np.ndarray else leaf for leaf in leaves]

    def changed(self) -> bool:
        cell = self.cell
        if isinstance(cell, RngStream):
            # Draws alone leave both as they are: how many there were is known without an output.
            same = cell._count is self.count or (type(cell._count) is int and cell._count == self.count)
            return cell._key is not self.value or not same
        if self.tree is None:
            return cell._value is not self.value
        leaves, tree = jax.tree.flatten(cell._value)
        return tree != self.tree or not all(map(_same_leaf, leaves, self.leaves))


def _same_leaf(new: Any, old: Any) -> bool:
    if new is old or type(old) is not np.ndarray or type(new) is not np.ndarray:
        return new is old
    return bool(new.dtype == old.dtype and new.shape == old.shape and new.tobytes() == old.tobytes())


def run(function: Callable[..., Any], inputs: Inputs, args: Any, kwargs: Any) -> tuple[Any, list[Any], Outcome]:
    """Run a function on built Modules inside the trace, and take stock.

    The lifting flag is cleared: a Module handed to a raw JAX transform in there is an error as it is anywhere else.
    """
    with lifting(None):
        inputs.start()
        return inputs.outcome(function(*args, **kwargs))


class _Opaque:
    """An argument that is handed on as it is."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Call:
    """The arguments of one call, flattened: each Module as a Packed, whatever else as it is.

    For the transforms that do not leave the flattening to JAX.

    Attributes:
        frame: the roots, which `finish` writes to.
        leaves: Packed and other leaves, in the order of the arguments.
        spans: for each positional argument the range of its leaves; last for those by name.
        packed: for each root, in order, the position of its Packed among the leaves.
    """

    __slots__ = ("_names", "_trees", "frame", "leaves", "packed", "spans")

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any], take: Sequence[int] | None = None) -> None:
        """Flatten.

        Args:
            args: the positional arguments.
            kwargs: the arguments by name.
            take: which positional arguments are flattened although no Module is in them; None for all, those by name
                included. The others go to the function as the very objects they are.
        """
        self.frame = Frame().begin()
        self._names = list(kwargs)
        packed = [_pack(arg, self.frame, opaque=take is not None and i not in take) for i, arg in enumerate(args)]
        named = {name: _pack(kwargs[name], self.frame, opaque=take is not None) for name in sorted(kwargs)}
        self.leaves: list[Any] = []
        self.spans: list[tuple[int, int]] = []
        self._trees = []
        for part in [*packed, named]:
            leaves, tree = jax.tree.flatten(part, is_leaf=_is_packed)
            self.spans.append((len(self.leaves), len(self.leaves) + len(leaves)))
            self.leaves += leaves
            self._trees.append(tree)
        self.packed = [i for i, leaf in enumerate(self.leaves) if type(leaf) is Packed]

    def structure(self, number: int) -> Any:
        """The treedef of a positional argument, with Modules as leaves."""
        return self._trees[number]

    def build(self, inputs: Inputs, leaves: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Inside the trace: the arguments again, with leaves put in the place of these, and Modules built."""
        built = [inputs.add(leaf) if type(leaf) is Packed else leaf for leaf in leaves]
        *args, named = [
            jax.tree.unflatten(tree, built[slice(*span)]) for tree, span in zip(self._trees, self.spans, strict=True)
        ]
        args = [arg.value if type(arg) is _Opaque else arg for arg in args]
        return args, {name: named[name].value if type(named[name]) is _Opaque else named[name] for name in self._names}

    def run(self, function: Callable[..., Any], leaves: Sequence[Any]) -> tuple[Any, list[Any], Outcome]:
        """Build, run the function, and take stock."""
        inputs = Inputs()
        args, kwargs = self.build(inputs, leaves)
        try:
            return run(function, inputs, args, kwargs)
        except TypeError:
            if any(type(leaf) is Packed and _is_abstract(leaf.values) for leaf in leaves):
                check_values(*self.frame.known())
            raise
        except RuntimeError as error:
            if "deleted" in str(error):
                check_deleted(*self.frame.known(), error)
            raise


def _is_abstract(values: Any) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(values))


def pack(tree: Any, frame: Frame) -> Any:
    """A pytree with a Packed in the place of each Module, which the frame enters."""
    return _pack(tree, frame, opaque=False)


def _pack(tree: Any, frame: Frame, *, opaque: bool) -> Any:
    found = False

    def one(leaf: Any) -> Any:
        nonlocal found
        if not isinstance(leaf, Object):
            return leaf
        found = True
        layout = frame.enter(leaf)
        definition = Initializing(layout.moduledef) if leaf._nnx.initializing else layout.moduledef
        return Packed(definition, [cell._value for cell in layout.cells])

    packed = jax.tree.map(one, tree, is_leaf=is_object)
    return _Opaque(tree) if opaque and not found else packed


def _is_packed(value: Any) -> bool:
    return type(value) is Packed
