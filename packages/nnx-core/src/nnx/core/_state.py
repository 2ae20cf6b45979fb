"""State: an immutable mapping from paths to Variables and arrays, stored as a schema and a tuple of values."""

from __future__ import annotations

import difflib
import functools
import itertools
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, overload

import jax

from nnx.core._errors import FilterError, PathError, StructureError
from nnx.core._filters import Filter, FilterLike, Path, to_filters
from nnx.core._variable import NO_METADATA, Buffer, Cell, Metadata, decode_type, encode_type, interning, new_cell

__all__ = ["Entry", "Path", "Schema", "State", "natural_key", "near_misses", "path_text"]


Entry = tuple[Path, type[Cell], Metadata]


@functools.lru_cache(maxsize=65536)
def _part_key(part: str) -> tuple[tuple[int, int, str], ...]:
    return tuple(
        (0, int(piece), piece) if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"([0-9]+)", part) if piece
    )


def natural_key(part: str) -> tuple[tuple[int, int, str], ...]:
    """The sort key of one part of a path: numbers in it count as numbers, so 2 comes before 10."""
    return _part_key(part)


def path_key(path: Path) -> tuple[Any, ...]:
    """The sort key of a path."""
    return tuple(_part_key(part) for part in path)


def path_text(path: Sequence[str]) -> str:
    """A path as users read it: parts joined by `/`."""
    return "/".join(path)


def near_misses(path: Sequence[str], known: Sequence[Sequence[str]]) -> str:
    """A sentence that names what was probably meant, or what there is."""
    texts = [path_text(item) for item in known]
    wanted = path_text(path)
    close = difflib.get_close_matches(wanted, texts, n=3, cutoff=0.6)
    inside = [text for text in texts if text.startswith(wanted + "/")]
    if inside:
        return f"`{wanted}` is a part of the way to: {_listing(inside)}"
    if close:
        return f"did you mean {_listing(close)}?"
    return f"there are: {_listing(texts)}" if texts else "there are none"


def _listing(texts: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(f"`{text}`" for text in texts[:limit])
    return shown + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


class Schema:
    """What a State knows besides its values: paths, types and metadata, in order. Interned, so equality is identity.

    Attributes:
        entries: for each value its path, the type of its Variable (`Buffer` for a bare array) and its metadata.
        paths: the paths alone.
    """

    __slots__ = ("__weakref__", "_index", "_keys", "_selections", "entries", "paths")

    entries: tuple[Entry, ...]
    paths: tuple[Path, ...]
    _interned: ClassVar[weakref.WeakValueDictionary[tuple[Entry, ...], Schema]] = weakref.WeakValueDictionary()

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Schema:
        """Return the one Schema of `entries`, which must be in natural order of their paths."""
        key = tuple(entries)
        found = cls._interned.get(key)
        if found is None:
            with interning:
                found = cls._interned.get(key)
                if found is None:
                    found = object.__new__(cls)
                    found.entries = key
                    found.paths = tuple(entry[0] for entry in key)
                    found._index = None
                    found._keys = None
                    found._selections = {}
                    cls._interned[key] = found
        return found

    _index: dict[Path, int] | None
    _keys: tuple[Any, ...] | None
    _selections: dict[Any, tuple[tuple[tuple[int, ...], Schema], ...]]

    @property
    def index(self) -> dict[Path, int]:
        """Path to position."""
        if self._index is None:
            self._index = {path: i for i, path in enumerate(self.paths)}
        return self._index

    @property
    def keys(self) -> tuple[Any, ...]:  # jax gives its key classes no types
        """The JAX key of each value: `DictKey('encoder/kernel')`."""
        if self._keys is None:
            self._keys = tuple(jax.tree_util.DictKey(path_text(path)) for path in self.paths)
        return self._keys

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        inside = ", ".join(f"{path_text(path)}: {_kind_text(kind)}" for path, kind, _ in self.entries[:20])
        return f"Schema({inside}{', ...' if len(self) > 20 else ''})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            _unpickle_schema,
            (tuple((path, encode_type(kind), metadata) for path, kind, metadata in self.entries),),
        )

    def __copy__(self) -> Schema:
        return self

    def __deepcopy__(self, memo: object) -> Schema:
        return self

    def subset(self, indices: Sequence[int]) -> Schema:
        """The Schema of some of the entries."""
        return Schema.of([self.entries[i] for i in indices])

    def select(self, filters: tuple[Filter, ...], values: Sequence[Any]) -> tuple[tuple[tuple[int, ...], Schema], ...]:
        """Deal the entries out to filters, the first that matches taking each; the last group holds the rest."""
        cacheable = not any(item.uses_node for item in filters)
        if cacheable:
            found = self._selections.get(filters)
            if found is not None:
                return found
        groups: list[list[int]] = [[] for _ in range(len(filters) + 1)]
        for i, (path, kind, metadata) in enumerate(self.entries):
            node = functools.partial(make_node, kind, values[i], metadata)
            for group, item in zip(groups, filters, strict=False):
                if item.match(path, kind, node):
                    group.append(i)
                    break
            else:
                groups[-1].append(i)
        result = tuple((tuple(group), self.subset(group)) for group in groups)
        if cacheable:
            if len(self._selections) > 64:
                self._selections.clear()
            self._selections[filters] = result
        return result


def _kind_text(kind: type[Cell]) -> str:
    return "array" if kind is Buffer else kind.__name__


def _unpickle_schema(entries: Any) -> Schema:
    return Schema.of([(path, decode_type(code), metadata) for path, code, metadata in entries])


def make_node(kind: type[Cell], value: Any, metadata: Metadata) -> Any:
    """What a State shows for one of its values: a frozen Variable, or the bare array."""
    return value if kind is Buffer else new_cell(kind, value, metadata, frozen=True)


def check_part(part: str) -> str:
    """Return `part` if it can be a part of a path.

    Raises:
        PathError: it is empty, no string, or holds a `/`.
    """
    if not isinstance(part, str) or not part or "/" in part:
        raise PathError(f"{part!r} cannot be a part of a path: parts are non-empty strings without '/'")
    return part


def to_path(path: Any) -> Path:
    """Make a path of `'a/b'`, `'a'`, `('a', 'b')` or `('a', 0)`."""
    if isinstance(path, str):
        return tuple([check_part(part) for part in path.split("/")])
    if isinstance(path, int):
        return (str(path),)
    if isinstance(path, Sequence) and path:
        return tuple(check_part(str(part) if isinstance(part, int) else part) for part in path)
    raise PathError(f"a path is a tuple of strings or a string with '/', got {path!r}")


def _check_paths(ordered: Sequence[Path]) -> None:
    for path, following in itertools.pairwise(ordered):
        if path == following:
            raise StructureError(f"two entries for the path `{path_text(path)}`")
        if following[: len(path)] == path:
            raise StructureError(
                f"the path `{path_text(path)}` is the beginning of `{path_text(following)}`: a node holds no nodes"
            )


class State(Mapping[Path, Any]):
    """A flat, immutable mapping from paths to Variables and bare arrays, in the natural order of the paths.

    A State is a pytree whose leaves are the values; `jax.tree.map` over States with the same paths works as over dicts.

    Args:
        items: a mapping (or pairs) from path to Variable or array. A path is a tuple of strings, or one string with
            `/`.

    Raises:
        PathError: a path is malformed.
        StructureError: two paths are equal, or one is the beginning of another.

    Example:
        >>> import nnx
        >>> state = nnx.State({("encoder", "kernel"): nnx.Param(1.0), ("count",): nnx.var("counts", 2)})
        >>> state["encoder", "kernel"].value
        1.0
        >>> state.filter(nnx.Param).paths
        (('encoder', 'kernel'),)
    """

    __slots__ = ("__weakref__", "_schema", "_values")

    _schema: Schema
    _values: tuple[Any, ...]

    def __init__(self, items: Mapping[Any, Any] | Sequence[tuple[Any, Any]] = (), /) -> None:
        pairs = [(to_path(path), node) for path, node in (items.items() if isinstance(items, Mapping) else items)]
        pairs.sort(key=lambda pair: path_key(pair[0]))
        _check_paths([path for path, _ in pairs])
        entries: list[Entry] = []
        values: list[Any] = []
        for path, node in pairs:
            if isinstance(node, Cell):
                entries.append((path, type(node), node._metadata))
                values.append(node._value)
            else:
                entries.append((path, Buffer, NO_METADATA))
                values.append(node)
        self._schema = Schema.of(entries)
        self._values = tuple(values)

    @staticmethod
    def from_columns(schema: Schema, values: Sequence[Any]) -> State:
        """Make a State of a Schema and one value for each of its entries."""
        state = object.__new__(State)
        state._schema = schema
        state._values = values if type(values) is tuple else tuple(values)
        return state

    @property
    def schema(self) -> Schema:
        """Paths, types and metadata, hashable and interned."""
        return self._schema

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths, in natural order."""
        return self._schema.paths

    @property
    def raw_values(self) -> tuple[Any, ...]:
        """The values alone, in the order of `paths`, without the Variables that `values()` wraps around them."""
        return self._values

    def __getitem__(self, path: Any) -> Any:
        parts = to_path(path)
        index = self._schema.index.get(parts)
        if index is None:
            raise PathError(f"no entry `{path_text(parts)}` in this State: {near_misses(parts, self.paths)}")
        _, kind, metadata = self._schema.entries[index]
        return make_node(kind, self._values[index], metadata)

    def __contains__(self, path: object) -> bool:
        try:
            return to_path(path) in self._schema.index
        except PathError:
            return False

    def __iter__(self) -> Iterator[Path]:
        return iter(self._schema.paths)

    def __len__(self) -> int:
        return len(self._values)

    if not TYPE_CHECKING:  # an assignment is no type
        __eq__ = object.__eq__
        __hash__ = object.__hash__

    @overload
    def partition(self) -> State: ...
    @overload
    def partition(self, first: FilterLike, /) -> State: ...
    @overload
    def partition(self, first: FilterLike, second: FilterLike, /, *filters: FilterLike) -> tuple[State, ...]: ...
    def partition(self, *filters: FilterLike) -> State | tuple[State, ...]:
        """Split the State by filters that together must cover it; the first that matches takes a node.

        Args:
            *filters: see `nnx.to_filter`; `...` only as the last.

        Returns:
            One State for one filter, else a tuple with one State for each.

        Raises:
            FilterError: a node is matched by none, or `...` is not the last.
        """
        if not filters:
            return self
        wanted = to_filters(filters)
        *groups, (rest, _) = self._schema.select(wanted, self._values)
        if rest:
            missed = [f"`{path_text(self.paths[i])}` ({_kind_text(self._schema.entries[i][1])})" for i in rest[:5]]
            raise FilterError(
                f"{len(rest)} of {len(self)} nodes are matched by none of the filters "
                f"({', '.join(map(repr, wanted))}): {', '.join(missed)}{' ...' if len(rest) > 5 else ''}. Add `...` as "
                "the last filter to take the rest, or use `filter`, which leaves it out"
            )
        states = tuple(self._pick(group) for group in groups)
        return states[0] if len(states) == 1 else states

    @overload
    def filter(self, first: FilterLike, /) -> State: ...
    @overload
    def filter(self, first: FilterLike, second: FilterLike, /, *filters: FilterLike) -> tuple[State, ...]: ...
    def filter(self, *filters: FilterLike) -> State | tuple[State, ...]:
        """Take the nodes that the filters match and leave out the rest.

        Raises:
            FilterError: no filter is given, or `...` is not the last.
        """
        if not filters:
            raise FilterError("filter takes at least one filter")
        groups = self._schema.select(to_filters(filters), self._values)[:-1]
        states = tuple(self._pick(group) for group in groups)
        return states[0] if len(states) == 1 else states

    def _pick(self, group: tuple[tuple[int, ...], Schema]) -> State:
        indices, schema = group
        if len(indices) == len(self._values):
            return self
        values = self._values
        return State.from_columns(schema, tuple([values[i] for i in indices]))

    def merge(self, *states: State) -> State:
        """Return the union with `states`; where paths meet, the later one wins. `State.merge(a, b)` reads the same."""
        if not states:
            return self
        merged: dict[Path, tuple[Entry, Any]] = {}
        for state in (self, *states):
            if not isinstance(state, State):
                raise StructureError(f"State.merge takes States, got {type(state).__name__}")
            merged.update(zip(state.paths, zip(state._schema.entries, state._values, strict=True), strict=True))
        ordered = sorted(merged.items(), key=lambda item: path_key(item[0]))
        _check_paths([path for path, _ in ordered])
        return State.from_columns(Schema.of([entry for _, (entry, _) in ordered]), [value for _, (_, value) in ordered])

    def __or__(self, other: State) -> State:
        return self.merge(other) if isinstance(other, State) else NotImplemented

    def __sub__(self, other: State) -> State:
        if not isinstance(other, State):
            return NotImplemented
        gone = other._schema.index
        return self._pick(self._keep([i for i, path in enumerate(self.paths) if path not in gone]))

    def _keep(self, indices: list[int]) -> tuple[tuple[int, ...], Schema]:
        return tuple(indices), self._schema.subset(indices)

    def map(self, function: Callable[[Path, Any], Any]) -> State:
        """Return a State with `function(path, value)` in the place of each value; types and metadata stay."""
        return State.from_columns(self._schema, [function(p, v) for p, v in zip(self.paths, self._values, strict=True)])

    def replace_values(self, values: Sequence[Any]) -> State:
        """Return a State with the same paths, types and metadata and other values, in the order of `paths`."""
        if len(values) != len(self._values):
            raise StructureError(f"expected {len(self._values)} values, got {len(values)}")
        return State.from_columns(self._schema, values)

    def to_nested_dict(self) -> dict[str, Any]:
        """Return nested dicts, a level for each part of the paths, with Variables and arrays at the ends."""
        result: dict[str, Any] = {}
        for path, node in self.items():
            level = result
            for part in path[:-1]:
                level = level.setdefault(part, {})
            level[path[-1]] = node
        return result

    @staticmethod
    def from_nested_dict(nested: Mapping[str, Any]) -> State:
        """Make a State of nested dicts; the inverse of `to_nested_dict`."""
        pairs: list[tuple[Path, Any]] = []
        stack: list[tuple[Path, Any]] = [((), nested)]
        while stack:
            path, item = stack.pop()
            if isinstance(item, Mapping) and not isinstance(item, State):
                stack.extend(
                    ((*path, check_part(str(part) if isinstance(part, int) else part)), sub)
                    for part, sub in item.items()
                )
            else:
                pairs.append((path, item))
        return State(pairs)

    def __repr__(self) -> str:
        from nnx.core._repr import summarize

        if not self:
            return "State({})"
        lines = []
        for (path, kind, metadata), value in list(zip(self._schema.entries, self._values, strict=True))[:60]:
            extra = "".join(f", {name}={item!r}" for name, item in metadata.items())
            text = summarize(value) if kind is Buffer else f"{kind.__name__}(value={summarize(value)}{extra})"
            lines.append(f"  {path!r}: {text},\n")
        more = f"  ... and {len(self) - 60} more\n" if len(self) > 60 else ""
        return "State({\n" + "".join(lines) + more + "})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (State.from_columns, (self._schema, self._values))


def _flatten_with_keys(state: State) -> tuple[Any, Any]:
    return tuple(zip(state._schema.keys, state._values, strict=True)), state._schema


def _unflatten(schema: Schema, values: Iterable[Any]) -> State:
    # `from_columns` once more: a call of a compiled function comes here for each State that it returns.
    state = object.__new__(State)
    state._schema = schema
    state._values = values if type(values) is tuple else tuple(values)
    return state


jax.tree_util.register_pytree_with_keys(
    State,
    _flatten_with_keys,
    _unflatten,
    lambda state: (state._values, state._schema),
)
