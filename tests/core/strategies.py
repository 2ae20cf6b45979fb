"""What the property tests of the core share: random module graphs, programs on them, and a look at the result."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import nnx
from nnx.core._object import Object, plain_attributes
from nnx.core._variable import Cell, Static

_DATA = ("d1", "d2", "d10", "w")
_CHILDREN = ("c1", "c2", "c10")
_STATICS = ("s1", "s2")
_LISTS = ("l1", "l2")

Op = tuple[Any, ...]


class Red(nnx.Module):
    """A Module without attributes of its own."""

    def hook(self) -> str:
        return type(self).__name__


class Blue(nnx.Module):
    """Another type, with a class attribute that a Variable of the same name must not be hidden by."""

    w = None

    def hook(self) -> str:
        return type(self).__name__


_KINDS = (Red, Blue)

_VARIABLES: dict[str, Callable[[Any], Any]] = {
    "param": nnx.Param,
    "named": lambda value: nnx.Param(value, sharding=("rows",)),
    "stat": nnx.BatchStat,
    "intermediate": nnx.Intermediate,
    "count": lambda value: nnx.var("counts", value),
    "container": lambda value: nnx.Cache({"keys": [value, value + 1], "index": value}),
    "node": lambda value: nnx.Node([value, (value,)]),
    "buffer": jnp.asarray,
    "numpy": np.asarray,
}

static_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.sampled_from([0.0, -0.0, 1.0, float("nan"), 0.5]),
    st.text("ab", max_size=2),
    st.tuples(st.integers(0, 2), st.booleans()),
    st.frozensets(st.integers(0, 3), max_size=2),
)
mutable_values = st.one_of(
    st.lists(st.integers(0, 2), max_size=2),
    st.dictionaries(st.sampled_from("ab"), st.integers(0, 2), max_size=2),
    st.sets(st.integers(0, 2), max_size=2),
)

_small = st.integers(0, 7)
_value = st.integers(-3, 3)

_attributes = st.one_of(
    st.tuples(st.just("data"), st.sampled_from(_DATA), st.sampled_from(sorted(_VARIABLES)), _value),
    st.tuples(st.just("child"), st.sampled_from(_CHILDREN), _small),
    st.tuples(st.just("items"), st.sampled_from(_CHILDREN), st.lists(_small, max_size=3)),
    st.tuples(
        st.just("names"),
        st.sampled_from(_CHILDREN),
        st.dictionaries(st.sampled_from(["x", "y2", "y10"]), _small, min_size=1),
    ),
    st.tuples(st.just("static"), st.sampled_from(_STATICS), static_values),
    st.tuples(st.just("mutable"), st.sampled_from(_LISTS), mutable_values),
    st.tuples(st.just("tie"), st.sampled_from(_DATA), _small),
    st.tuples(st.just("method"), st.just("m1"), st.booleans()),
)

plans = st.lists(st.tuples(st.sampled_from([0, 1]), st.lists(_attributes, max_size=6)), min_size=1, max_size=5)
"""Module graphs to be: by Module its type and its attributes. References are numbers: cycles and sharing come up."""


def build(plan: list[tuple[int, list[Op]]]) -> nnx.Module:
    """Make the graph of a plan; each time anew, each time the same."""
    modules = [_KINDS[kind]() for kind, _ in plan]
    variables: list[Any] = []
    for module, (_, attributes) in zip(modules, plan, strict=True):
        for kind, name, *rest in attributes:
            if name in plain_attributes(module) or name in module._nnx.cells:
                continue
            if kind == "data":
                setattr(module, name, _VARIABLES[rest[0]](np.float32(rest[1])))
            elif kind == "child":
                setattr(module, name, modules[rest[0] % len(modules)])
            elif kind == "items":
                setattr(module, name, nnx.Sequence([modules[i % len(modules)] for i in rest[0]]))
            elif kind == "names":
                setattr(module, name, {key: modules[i % len(modules)] for key, i in rest[0].items()})
            elif kind == "tie":
                setattr(module, name, variables[rest[0] % len(variables)] if variables else nnx.Param(np.float32(0)))
            elif kind == "method":
                setattr(module, name, (module if rest[0] else modules[0]).hook)
            else:
                setattr(module, name, _copied(rest[0]))
            cell = module._nnx.cells.get(name)
            if isinstance(cell, (nnx.Variable, nnx.Node)):
                variables.append(cell)
    return modules[0]


def _copied(value: Any) -> Any:
    return type(value)(value) if isinstance(value, (list, dict, set)) else value


graphs = plans.map(build)


def parts(root: nnx.Module) -> tuple[list[Any], list[Any]]:
    """The objects and cells of a graph in the order of a walk of our own, which owes nothing to the library's."""
    objects: list[Any] = []
    cells: list[Any] = []
    stack = [root]
    while stack:
        item = stack.pop()
        if any(item is other for other in objects):
            continue
        objects.append(item)
        for name in sorted(item._nnx.cells):
            cell = item._nnx.cells[name]
            if not isinstance(cell, Static) and not any(cell is other for other in cells):
                cells.append(cell)
        stack += [
            child for _, child in sorted(plain_attributes(item).items(), reverse=True) if isinstance(child, Object)
        ]
    return objects, cells


def observe(
    root: nnx.Module, originals: tuple[list[Any], list[Any]] | None = None, *, dtypes: bool = True
) -> list[Any]:
    """All that can be seen of a graph, as plain comparable data: types, statics, values, metadata, and sharing.

    Args:
        root: the graph.
        originals: the `parts` of an earlier time: those that are still there are named by their number then.
        dtypes: whether to tell dtypes apart.
    """
    objects, cells = parts(root)
    old_objects, old_cells = originals or ([], [])
    seen: list[Any] = []
    for item in objects:
        attributes: list[Any] = []
        for name, child in sorted({**plain_attributes(item), **item._nnx.cells}.items()):
            if isinstance(child, Object):
                attributes.append((name, "object", _number(child, objects), _number(child, old_objects)))
            elif isinstance(child, Cell) and not isinstance(child, Static):
                metadata = dict(child._metadata)
                content = _content(child._value, dtypes=dtypes)
                number, old = _number(child, cells), _number(child, old_cells)
                attributes.append((name, type(child).__name__, metadata, content, number, old))
            elif isinstance(child, types.MethodType):
                attributes.append((name, "method", child.__func__, _number(child.__self__, objects)))
            else:
                attributes.append((name, "static", type(child).__name__, repr(child)))
        seen.append((type(item).__name__, attributes))
    return seen


def _number(item: Any, among: list[Any]) -> int:
    return next((i for i, other in enumerate(among) if other is item), -1)


def _content(value: Any, *, dtypes: bool) -> Any:
    leaves, tree = jax.tree.flatten(value)
    shown = []
    for leaf in leaves:
        array = np.asarray(leaf)
        shown.append((array.shape, array.tolist(), array.dtype.name if dtypes else None))
    return str(tree), shown


_ops = st.one_of(
    st.tuples(st.just("write"), _small, _small, _value),
    st.tuples(st.just("write"), _small, _small, _value),
    st.tuples(st.just("rewrite"), _small, _small),
    st.tuples(
        st.just("add"), _small, st.sampled_from(_DATA), st.sampled_from(sorted(set(_VARIABLES) - {"numpy"})), _value
    ),
    st.tuples(st.just("delete"), _small, _small),
    st.tuples(st.just("retype"), _small, _small),
    st.tuples(st.just("static"), _small, st.sampled_from(_STATICS), static_values),
    st.tuples(st.just("static"), _small, st.sampled_from(_LISTS), mutable_values),
    st.tuples(st.just("edit"), _small, _small, _value),
    st.tuples(st.just("inside"), _small, _small, _value),
    st.tuples(st.just("new child"), _small, st.sampled_from(_CHILDREN), _value),
    st.tuples(st.just("link"), _small, st.sampled_from(_CHILDREN), _small),
    st.tuples(st.just("swap"), _small, _small, _small),
    st.tuples(st.just("tie"), _small, st.sampled_from(_DATA), _small),
    st.tuples(st.just("append"), _small, _value),
    st.tuples(st.just("shrink"), _small, _small),
    st.tuples(st.just("sow"), _small, _value),
    st.tuples(st.just("pop")),
    st.tuples(st.just("update"), _small, _value),
)

programs = st.lists(_ops, max_size=6)
"""Programs of attribute writes: values, adds, deletes, statics, list edits, submodule swaps, ties."""


def execute(program: list[Op], root: nnx.Module, x: Any) -> Any:
    """Run a program on a graph. What it touches depends on structure alone, so it runs alike in a trace and outside.

    Returns:
        A value that depends on all data, an object of the graph, and a new Module.
    """
    for op, *rest in program:
        objects, cells = parts(root)
        plain = [item for item in objects if not isinstance(item, (nnx.Sequence, nnx.Dict))]
        item = plain[rest[0] % len(plain)] if rest and plain else root
        if isinstance(item, (nnx.Sequence, nnx.Dict)) and op not in ("append", "shrink", "pop", "update"):
            continue
        data = sorted(item._nnx.cells)
        if op in ("write", "rewrite", "inside", "retype") and not data:
            continue
        if op == "write":
            name = data[rest[1] % len(data)]
            setattr(item, name, jax.tree.map(lambda value: value + rest[-1] * x, getattr(item, name)))  # noqa: B023
        elif op == "rewrite":
            name = data[rest[1] % len(data)]
            setattr(item, name, getattr(item, name))
        elif op == "add" and rest[1] not in item._nnx.cells:
            setattr(item, rest[1], _VARIABLES[rest[2]](rest[3] * x))
        elif op == "delete":
            names = sorted({*plain_attributes(item), *item._nnx.cells})
            if names:
                delattr(item, names[rest[1] % len(names)])
        elif op == "retype":
            name = data[rest[1] % len(data)]
            value = getattr(item, name)
            delattr(item, name)
            setattr(item, name, nnx.BatchStat(value))
        elif op == "static":
            setattr(item, rest[1], _copied(rest[2]))
        elif op == "edit":
            lists = [name for name in _LISTS if isinstance(plain_attributes(item).get(name), list)]
            if lists:
                getattr(item, lists[rest[1] % len(lists)]).append(rest[2])
        elif op == "inside":
            name = data[rest[1] % len(data)]
            value = getattr(item, name)
            if isinstance(value, list):
                value[0] = value[0] + rest[2] * x
            elif isinstance(value, dict):
                value["keys"].append(x)
                value["index"] = value["index"] + rest[2]
        elif op == "new child":
            child = Red()
            child.d1 = nnx.Param(rest[2] * x)
            setattr(item, rest[1], child)
        elif op == "link":
            setattr(item, rest[1], objects[rest[2] % len(objects)])
        elif op == "swap":
            names = sorted(name for name, child in plain_attributes(item).items() if isinstance(child, Object))
            if names:
                first, second = names[rest[1] % len(names)], names[rest[2] % len(names)]
                one, two = getattr(item, first), getattr(item, second)
                setattr(item, first, two)
                setattr(item, second, one)
        elif op == "tie":
            variables = [cell for cell in cells if isinstance(cell, nnx.Param) and not cell.metadata]
            if variables and rest[1] not in item._nnx.cells:
                setattr(item, rest[1], variables[rest[2] % len(variables)])
        elif op == "append":
            sequences = [each for each in objects if isinstance(each, nnx.Sequence)]
            if sequences:
                child = Blue()
                child.w = nnx.Param(rest[1] * x)
                sequences[rest[0] % len(sequences)].append(child)
        elif op == "shrink":
            sequences = [each for each in objects if isinstance(each, nnx.Sequence) and len(each)]
            if sequences:
                sequence = sequences[rest[0] % len(sequences)]
                del sequence[rest[1] % len(sequence)]
        elif op == "sow":
            if "y" not in item._nnx.cells or isinstance(item._nnx.cells["y"], nnx.Intermediate):
                item.sow(nnx.Intermediate, "y", rest[1] * x)
        elif op == "pop":
            root.pop_state(nnx.Intermediate)
        elif op == "update":
            state = root.filter(nnx.Param)
            if state:
                path = state.paths[rest[0] % len(state)]
                root.update_state(state.filter(lambda p, _: p == path).map(lambda _, v: v + rest[1] * x))  # noqa: B023
    objects, cells = parts(root)
    total = sum(jnp.sum(leaf) for cell in cells for leaf in jax.tree.leaves(cell._value)) + x
    fresh = Blue()
    fresh.w = nnx.Param(total)
    return total, objects[-1], fresh
