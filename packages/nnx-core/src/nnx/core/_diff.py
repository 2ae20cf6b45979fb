"""diff: how two States, definitions or Modules differ, path by path."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nnx.core._errors import StructureError
from nnx.core._graph import CELL, METHOD, OBJECT, STATIC, ModuleDef
from nnx.core._module import Module
from nnx.core._repr import summarize
from nnx.core._state import Path, State, path_key, path_text
from nnx.core._summary import abstract
from nnx.core._table import value_text
from nnx.core._variable import Buffer

__all__ = ["Diff", "DiffEntry", "diff"]

Kind = Literal["only in a", "only in b", "type", "metadata", "shape", "static", "sharing", "value"]


@dataclasses.dataclass(frozen=True)
class DiffEntry:
    """One difference.

    Attributes:
        path: where.
        kind: what differs: the entry is there on one side only, or its type, metadata, shape (or dtype), static value,
            sharing with other places, or value does.
        a: what the one side has there, as text; empty where it has nothing.
        b: the same of the other side.
        largest: for numbers the largest absolute change, infinite where one side has a NaN and the other none; None for
            anything else.
    """

    path: Path
    kind: Kind
    a: str = ""
    b: str = ""
    largest: float | None = None

    def __str__(self) -> str:
        where = path_text(self.path) or "(the root)"
        if self.kind.startswith("only"):
            return f"{where}: {self.kind}: {self.a or self.b}"
        if self.largest is not None:
            return f"{where}: value: differs by up to {self.largest:.3g} ({self.a})"
        return f"{where}: {self.kind}: {self.a} -> {self.b}"


class Diff(tuple[DiffEntry, ...]):
    """The differences in the natural order of their paths: empty, and so false, where there is none."""

    __slots__ = ()

    def __repr__(self) -> str:
        if not self:
            return "no difference"
        more = [f"... and {len(self) - 100} more"] if len(self) > 100 else []
        return "\n".join([*map(str, self[:100]), *more])

    __str__ = __repr__


def diff(a: Any, b: Any, /) -> Diff:
    """Compare two States, two ModuleDefs or two Modules by path.

    Numbers differ where they are not equal; a NaN equals a NaN. Values that are abstract on one side
    (`jax.ShapeDtypeStruct`) are compared by shape and dtype alone.

    Args:
        a: a State, a ModuleDef or a Module.
        b: another of the same.

    Returns:
        A tuple of `DiffEntry`, empty if there is no difference; printing it prints a line for each.

    Raises:
        StructureError: the two are not of one of these kinds.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> a, b = nnx.Module(), nnx.Module()
        >>> a.kernel, a.rate = nnx.Param(jnp.zeros(3)), 0.5
        >>> b.kernel, b.rate, b.bias = nnx.Param(jnp.array([0.0, 0.25, 0.0])), 0.1, nnx.Param(jnp.zeros(2))
        >>> nnx.diff(a, b)
        bias: only in b: Param float32[2]
        kernel: value: differs by up to 0.25 (Param float32[3])
        rate: static: 0.5 -> 0.1
    """
    if isinstance(a, State) and isinstance(b, State):
        entries = _diff_states(a, b)
    elif isinstance(a, ModuleDef) and isinstance(b, ModuleDef):
        entries = list(_diff_definitions(a, b, schema=True))
    elif isinstance(a, Module) and isinstance(b, Module):
        left, right = a.partition(), b.partition()
        entries = [
            *_diff_definitions(left.moduledef, right.moduledef, schema=False),
            *_diff_states(a.get_state(), b.get_state()),
        ]
    else:
        raise StructureError(
            f"nnx.diff takes two States, two ModuleDefs or two Modules, got {type(a).__name__} and {type(b).__name__}"
        )
    return Diff(sorted(entries, key=lambda entry: path_key(entry.path)))


def _diff_states(a: State, b: State) -> list[DiffEntry]:
    entries: list[DiffEntry] = []
    for path in {**a.schema.index, **b.schema.index}:
        i, j = a.schema.index.get(path), b.schema.index.get(path)
        if i is None or j is None:
            entries.append(
                DiffEntry(path, "only in b", b=_data_text(b, j))
                if j is not None
                else DiffEntry(path, "only in a", a=_data_text(a, i))
            )
            continue
        (_, kind, metadata), (_, other_kind, other_metadata) = a.schema.entries[i], b.schema.entries[j]
        if kind is not other_kind:
            entries.append(DiffEntry(path, "type", _kind_text(kind), _kind_text(other_kind)))
        if metadata != other_metadata:
            entries.append(DiffEntry(path, "metadata", repr(dict(metadata)), repr(dict(other_metadata))))
        entries += _diff_values(path, a.raw_values[i], b.raw_values[j], _data_text(a, i))
    return entries


def _kind_text(kind: type) -> str:
    return "array" if kind is Buffer else kind.__name__


def _data_text(state: State, index: int | None) -> str:
    assert index is not None
    return f"{_kind_text(state.schema.entries[index][1])} {value_text(abstract(state.raw_values[index]))}"


def _diff_values(path: Path, a: Any, b: Any, what: str) -> Iterator[DiffEntry]:
    if a is b:
        return
    shapes = abstract(a), abstract(b)
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
    forms, other_forms = [_form(leaf) for leaf in leaves], [_form(leaf) for leaf in others]
    if (jax.tree.structure(a), forms) != (jax.tree.structure(b), other_forms):
        yield DiffEntry(path, "shape", value_text(shapes[0]), value_text(shapes[1]))
        return
    largest, unequal = 0.0, False
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(leaf, jax.ShapeDtypeStruct) or isinstance(other, jax.ShapeDtypeStruct) or leaf is other:
            continue
        change = _largest_change(leaf, other)
        unequal = unequal or change != 0
        largest = max(largest, change or 0.0)
    if unequal:
        yield DiffEntry(path, "value", what, what, largest=largest)


def _form(leaf: Any) -> Any:
    return (jnp.shape(leaf), str(leaf.dtype)) if hasattr(leaf, "dtype") else (jnp.shape(leaf), type(leaf))


def _largest_change(a: Any, b: Any) -> float:
    """The largest absolute change, computed where the arrays are when they are not all here."""
    if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    if not all(getattr(item, "is_fully_addressable", True) for item in (a, b)):
        equal = (a == b) | ((a != a) & (b != b))  # noqa: PLR0124 - a NaN
        change = jnp.where(equal, 0.0, jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)))
        return _finite(float(jnp.max(change, initial=0.0)))
    left, right = np.asarray(a), np.asarray(b)
    unequal = (left != right) & ~((left != left) & (right != right))  # noqa: PLR0124 - a NaN
    if not unequal.any():
        return 0.0
    wide = np.complex128 if np.iscomplexobj(left) else np.float64
    change = np.abs(left[unequal].astype(wide) - right[unequal].astype(wide))
    # Whole numbers beyond 2**53 may differ and be one double.
    return max(_finite(float(change.max())), float(np.finfo(np.float64).tiny))


def _finite(change: float) -> float:
    return float("inf") if np.isnan(change) else change


def _diff_definitions(a: ModuleDef[Any], b: ModuleDef[Any], *, schema: bool) -> Iterator[DiffEntry]:
    if a is b:
        return
    left, right = dict(_places(a)), dict(_places(b))
    gone: set[Path] = set()
    for path in sorted({**left, **right}, key=path_key):
        if any(path[:end] in gone for end in range(len(path))):
            continue  # all of what it is part of is on one side only, which is said already
        one, other = left.get(path), right.get(path)
        if one is None or other is None:
            there = one or other
            assert there is not None
            if there.kind != "data" or schema:
                text = there.text
                yield DiffEntry(path, "only in a", a=text) if other is None else DiffEntry(path, "only in b", b=text)
            if there.kind == "module":
                gone.add(path)
        elif one.kind == other.kind == "data":
            if one.key != other.key and schema:
                same = one.key[0] is other.key[0]
                yield DiffEntry(path, "metadata" if same else "type", one.detail(same=same), other.detail(same=same))
            elif one.shared != other.shared:
                yield _sharing(path, one, other)
        elif one.kind != other.kind or one.key != other.key:
            both = one.kind == other.kind == "static"
            yield DiffEntry(path, "static" if both else "type", one.text, other.text)
        elif one.shared != other.shared:
            yield _sharing(path, one, other)


def _sharing(path: Path, one: _Place, other: _Place) -> DiffEntry:
    return DiffEntry(path, "sharing", one.sharing, other.sharing)


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a definition has at a path: an object, data or a static value, and where it was seen before."""

    kind: Literal["module", "data", "static"]
    key: Any
    text: str
    shared: Path | None = None

    @property
    def sharing(self) -> str:
        return "on its own" if self.shared is None else f"shared with {path_text(self.shared) or 'the root'}"

    def detail(self, *, same: bool) -> str:
        return repr(dict(self.key[1])) if same else self.text


def _places(definition: ModuleDef[Any]) -> Iterator[tuple[Path, _Place]]:
    first: dict[int, Path] = {}
    cells: dict[int, Path] = {}
    stack: list[tuple[int, Path]] = [(definition.roots[0], ())]
    while stack:
        index, path = stack.pop()
        node = definition.nodes[index]
        yield path, _Place("module", node.type, node.type.__name__, first.get(index))
        if index in first:
            continue
        first[index] = path
        for name, kind, payload in node.attributes:
            own = (*path, name)
            if kind == STATIC:
                yield own, _Place("static", payload, summarize(payload.value))
            elif kind == METHOD:
                target, function = payload
                yield own, _Place("static", (function, first.get(target)), getattr(function, "__qualname__", "method"))
            elif kind == CELL:
                _, cell_type, metadata = definition.schema.entries[payload]
                yield own, _Place("data", (cell_type, metadata), _kind_text(cell_type), cells.get(payload))
                cells.setdefault(payload, own)
        stack.extend((payload, (*path, name)) for name, kind, payload in reversed(node.attributes) if kind == OBJECT)
