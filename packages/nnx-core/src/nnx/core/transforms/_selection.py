"""What a derivative is taken by: of each Module the Variables that a filter selects, of anything else all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx.core._errors import StructureError, VariableError
from nnx.core._filters import Filter
from nnx.core._graph import check_equivalent
from nnx.core._layout import Layout, layout_of
from nnx.core._object import Object
from nnx.core._state import Path, Schema, State, near_misses, path_text
from nnx.core.transforms._inputs import Call
from nnx.core.transforms._lift import Packed

__all__ = ["Selection"]


class _Gradient:
    """The cells of one Module that are differentiated: the gradient's Schema, and each cell's place in the call."""

    __slots__ = ("places", "schema")

    def __init__(self, schema: Schema, places: list[tuple[int, int]]) -> None:
        self.schema = schema
        self.places = places


class Selection:
    """What a derivative is taken by: cells of the Modules in some arguments, and all else in these arguments.

    Attributes:
        call: the call.
        wanted: the positional arguments to differentiate by.
        places: the cells, each once, as (root, position).
        values: their values.
        bare: the leaves of `wanted` that are no Modules.
    """

    __slots__ = ("_bare_at", "_gradients", "bare", "call", "places", "values", "wanted")

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any], argnums: Sequence[int]) -> None:
        self.wanted = [_position(n, len(args)) for n in argnums]
        self.call = Call(args, kwargs, take=self.wanted)
        self._gradients: dict[int, _Gradient] = {}
        self._bare_at = [
            i
            for n in dict.fromkeys(self.wanted)
            for i in range(*self.call.spans[n])
            if type(self.call.leaves[i]) is not Packed
        ]
        self.bare = [self.call.leaves[i] for i in self._bare_at]
        self.places: list[tuple[int, int]] = []
        self.values: list[Any] = []

    def by_filter(self, wrt: Filter, *, check_dtypes: bool) -> Selection:
        """Select the cells that a filter matches."""
        for i in self._modules():
            root, layout = self._root_at(i)
            values = [cell._value for cell in layout.cells]
            positions, schema = layout.moduledef.schema.select((wrt,), values)[0]
            self._select(i, schema, positions)
            if check_dtypes:
                _check_dtypes(root, schema, [values[position] for position in positions])
        return self._settle()

    def by_states(self, tangents: Sequence[Any]) -> tuple[Selection, list[Any], list[Any]]:
        """Select the cells that States name, one State for each Module.

        Returns:
            This, the tangents of `values`, and the tangents of `bare`.
        """
        given: dict[tuple[int, int], Any] = {}
        bare = []
        for n, tangent in zip(self.wanted, tangents, strict=True):
            span = range(*self.call.spans[n])
            parts = jax.tree.leaves(tangent, is_leaf=lambda leaf: isinstance(leaf, State))
            if len(parts) != len(span):
                raise StructureError(
                    f"the tangent of argument {n} has {len(parts)} leaves, and the argument {len(span)}: it takes a "
                    "State for each Module and an array for each array"
                )
            for i, part in zip(span, parts, strict=True):
                if type(self.call.leaves[i]) is not Packed:
                    bare.append(part)
                    continue
                root, layout = self._root_at(i)
                if not isinstance(part, State):
                    raise StructureError(
                        f"the tangent of a {type(root).__name__} is a State of its Variables' tangents, got "
                        f"{type(part).__name__}"
                    )
                schema, positions = layout.moduledef.schema, []
                for (path, kind, metadata), value in zip(part._schema.entries, part._values, strict=True):
                    if path not in schema.index:
                        raise StructureError(
                            f"the tangent of a {type(root).__name__} names `{path_text(path)}`, which it does not "
                            f"have; {near_misses(path, schema.paths)}"
                        )
                    _, own_kind, own_metadata = schema.entries[schema.index[path]]
                    check_equivalent(path_text(path), own_kind, own_metadata, kind, metadata)
                    positions.append(schema.index[path])
                    _check_tangent(path, layout.cells[positions[-1]]._value, value)
                self._select(i, part._schema, positions)
                given.update(zip(self._gradients[i].places, part._values, strict=True))
        self._settle()
        return self, [given[place] for place in self.places], bare

    def _modules(self) -> list[int]:
        """The positions of the Modules among the leaves of `wanted`."""
        leaves = self.call.leaves
        return [i for n in self.wanted for i in range(*self.call.spans[n]) if type(leaves[i]) is Packed]

    def _root_at(self, leaf: int) -> tuple[Object, Layout]:
        number = self.call.packed.index(leaf)
        root = self.call.frame.roots[number]
        # As a root of its own: what another argument brought in as well is among its Variables too.
        return root, layout_of(root)

    def _select(self, leaf: int, schema: Schema, positions: Sequence[int]) -> None:
        _, layout = self._root_at(leaf)
        where = {
            id(cell): (k, i) for k, part in enumerate(self.call.frame.layouts) for i, cell in enumerate(part.cells)
        }
        self._gradients[leaf] = _Gradient(schema, [where[id(layout.cells[i])] for i in positions])

    def _settle(self) -> Selection:
        self.places = list(dict.fromkeys(place for item in self._gradients.values() for place in item.places))
        self.values = [self.call.frame.layouts[k].cells[i]._value for k, i in self.places]
        return self

    def leaves(self, values: Sequence[Any], bare: Sequence[Any]) -> list[Any]:
        """The leaves of the call with others in the place of those selected."""
        leaves = list(self.call.leaves)
        for i, leaf in zip(self._bare_at, bare, strict=True):
            leaves[i] = leaf
        replaced: dict[int, list[Any]] = {}
        for (k, i), value in zip(self.places, values, strict=True):
            position = self.call.packed[k]
            replaced.setdefault(position, list(self.call.leaves[position].values))[i] = value
        for position, fresh in replaced.items():
            leaves[position] = Packed(self.call.leaves[position].definition, fresh)
        return leaves

    def gradients(self, values: Sequence[Any], bare: Sequence[Any]) -> tuple[Any, ...]:
        """The derivatives of each wanted argument: a State for each Module, an array for each array."""
        by_place = dict(zip(self.places, values, strict=True))
        by_leaf = dict(zip(self._bare_at, bare, strict=True))
        result = []
        for n in self.wanted:
            tree = self.call.structure(n)
            parts = []
            for i in range(*self.call.spans[n]):
                gradient = self._gradients.get(i)
                if gradient is None:
                    parts.append(by_leaf[i])
                else:
                    parts.append(State.from_columns(gradient.schema, [by_place[place] for place in gradient.places]))
            result.append(jax.tree.unflatten(tree, parts))
        return tuple(result)


def _position(number: int, count: int) -> int:
    position = number if number >= 0 else number + count
    if not 0 <= position < count:
        raise ValueError(
            f"argnums names argument {number}, but the function was called with {count} positional arguments"
        )
    return position


def _check_tangent(path: Path, value: Any, tangent: Any) -> None:
    def texts(leaves: Any, of: Callable[[Any], Any]) -> list[str]:
        return [f"{aval.dtype}[{','.join(map(str, aval.shape))}]" for aval in map(of, jax.tree.leaves(leaves))]

    wanted = texts(value, lambda leaf: jax.typeof(leaf).to_tangent_aval())
    got = texts(tangent, lambda leaf: leaf if hasattr(leaf, "dtype") else jax.typeof(leaf))
    if wanted != got:
        raise StructureError(
            f"the tangent of `{path_text(path)}` is {', '.join(got) or 'nothing'}, and by the Variable it is "
            f"{', '.join(wanted)}: a tangent has the shape and dtype of its value, and float0 for integers"
        )


def _check_dtypes(root: Object, schema: Schema, values: Sequence[Any]) -> None:
    for (path, kind, _), value in zip(schema.entries, values, strict=True):
        for leaf in jax.tree.leaves(value):
            dtype = jnp.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype
            if not jnp.issubdtype(dtype, jnp.inexact):
                raise VariableError(
                    f"cannot differentiate with respect to `{path_text(path)}` ({kind.__name__}) of the "
                    f"{type(root).__name__}: its dtype is {dtype}. Keep it in another Variable type than the one that "
                    "is differentiated, or narrow the filter `wrt`"
                )
