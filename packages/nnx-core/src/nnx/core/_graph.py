"""The object graph as data: Modules to a ModuleDef (types, statics, sharing) and a list of cells, and back."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import jax

from nnx.core._errors import StaticError, StructureError, VariableError
from nnx.core._object import Object, expose, new_object
from nnx.core._state import Entry, Path, Schema, State, path_text
from nnx.core._static import StaticProblem, copy_static, fingerprint
from nnx.core._variable import Buffer, Cell, Static, interning, new_cell, unshared

__all__ = ["Graph", "ModuleDef", "build", "merge_states", "walk"]

if TYPE_CHECKING:
    import typing_extensions

    # With a default, so that strict checkers take the bare class; Python itself has defaults since 3.13.
    M = typing_extensions.TypeVar("M", default=Any)
else:
    M = TypeVar("M")

# How an attribute is held.
OBJECT, CELL, STATIC, METHOD = "object", "cell", "static", "method"


class StaticEntry:
    """A static value in a ModuleDef: equal by its fingerprint, copied out whenever it can change in place.

    One object in several places is one object again after `merge`, so which of the mutable statics are one is
    compared as well: by `alias`, their number in the order of the walk (-1 for what cannot change), and by `parts`, the
    numbers of the mutable objects inside.
    """

    __slots__ = ("alias", "by_identity", "explicit", "key", "mutable", "parts", "value")

    def __init__(
        self,
        value: Any,
        key: Hashable,
        by_identity: tuple[str, ...],
        explicit: bool,
        alias: int,
        parts: tuple[int, ...],
    ) -> None:
        self.value = value
        self.key = (key, explicit)
        self.mutable = bool(parts)
        self.by_identity = by_identity
        self.explicit = explicit
        self.alias = alias
        self.parts = parts

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, StaticEntry)
            and self.key == other.key
            and self.alias == other.alias
            and self.parts == other.parts
        )

    def __hash__(self) -> int:
        return hash((self.key, self.alias, self.parts))

    def __repr__(self) -> str:
        return repr(self.value)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_unpickle_static, (self.value, self.explicit, self.alias, self.parts))


def _unpickle_static(value: Any, explicit: bool, alias: int, parts: tuple[int, ...]) -> StaticEntry:
    mark = fingerprint(value, arrays=explicit)
    return StaticEntry(value, mark.key, mark.by_identity, explicit, alias, parts)


class Attribute(NamedTuple):
    """One attribute of one object: how it is held, and the index of the object or cell, or the static itself."""

    name: str
    kind: str
    payload: Any


class NodeDef(NamedTuple):
    """One object: its type and its attributes in natural order."""

    type: type
    attributes: tuple[Attribute, ...]


class Graph(NamedTuple):
    """What one walk found: the definition, and the live objects, cells and mutable statics behind it."""

    moduledef: ModuleDef[Any]
    objects: list[Object]
    cells: list[Cell]
    statics: list[tuple[Any, Hashable, bool]]


class ModuleDef(Generic[M]):
    """The static half of a Module: types, static values, submodules, sharing and the schema of its State.

    A ModuleDef is interned: Modules of equal structure have the same one, so hashing and comparing it cost nothing
    however large the model. It is a pytree without leaves.
    """

    __slots__ = ("__weakref__", "_handle", "_key", "nodes", "roots", "schema")

    _handle: weakref.ref[Handle] | None
    nodes: tuple[NodeDef, ...]
    schema: Schema
    roots: tuple[int, ...]
    _key: Hashable
    _interned: ClassVar[weakref.WeakValueDictionary[Hashable, ModuleDef[Any]]] = weakref.WeakValueDictionary()

    @classmethod
    def of(cls, nodes: tuple[NodeDef, ...], schema: Schema, roots: tuple[int, ...] = (0,)) -> ModuleDef[Any]:
        """Return the one ModuleDef of this structure."""
        key = _Key((nodes, schema, roots))
        found = cls._interned.get(key)
        if found is None:
            with interning:
                found = cls._interned.get(key)
                if found is None:
                    found = object.__new__(cls)
                    found.nodes, found.schema, found.roots, found._key = nodes, schema, roots, key
                    found._handle = None
                    cls._interned[key] = found
        return found

    @property
    def type(self) -> type[M]:
        """The class of the Module that `merge` makes."""
        return self.nodes[self.roots[0]].type

    def merge(self, *states: State) -> M:
        """Make a Module of States that together hold a value for each of its Variables and arrays.

        Args:
            *states: States; where they meet, the later one wins. Entries that the definition does not know (an
                Intermediate captured since, say) become attributes of the Module that their path leads to.

        Raises:
            StructureError: values are missing, or a path leads nowhere.
            VariableError: a Variable in a State has another type or metadata than here.
        """
        definition, values, extra = merge_states(self, states)
        objects, _ = build(definition, [unshared(value) for value in values])
        root: Any = objects[self.roots[0]]
        if extra:
            from nnx.core._update import add_entries

            add_entries(root, extra)
        return root

    def apply(self, *states: State) -> Any:
        """Call the Module, one of its methods or submodules, as a pure function of its State.

        Returns:
            A caller: `moduledef.apply(state)(x)`, `.apply(state).method(x)`, `.apply(state).layers[0](x)`. Calling it
            returns `(output, (new_state, new_moduledef))`.
        """
        from nnx.core._pure import Pure, caller

        def run(access: Callable[[Any], Any], args: Any, kwargs: Any) -> Any:
            module: Any = self.merge(*states)
            out = access(module)(*args, **kwargs)
            return out, Pure.of(module)

        return caller(run)

    def __repr__(self) -> str:
        lines: list[str] = []
        stack: list[tuple[int, str, int | str]] = [(0, "", self.roots[0])]
        seen: set[int] = set()
        while stack and len(lines) < 200:
            depth, label, item = stack.pop()
            pad = "  " * depth
            if isinstance(item, str):
                lines.append(f"{pad}{label}{item}")
                continue
            node = self.nodes[item]
            if item in seen:
                lines.append(f"{pad}{label}{node.type.__name__}(...)  # shared")
                continue
            seen.add(item)
            lines.append(f"{pad}{label}{node.type.__name__}(")
            stack.append((depth, "", ")"))
            for name, kind, payload in reversed(node.attributes):
                if kind is OBJECT:
                    stack.append((depth + 1, f"{name}=", payload))
                elif kind is CELL:
                    _, cell_type, _ = self.schema.entries[payload]
                    stack.append((depth + 1, f"{name}=", "array" if cell_type is Buffer else cell_type.__name__))
                else:
                    stack.append(
                        (depth + 1, f"{name}=", _method_text(payload) if kind is METHOD else repr(payload)[:80])
                    )
        return "ModuleDef(" + "\n".join(lines) + ")"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_unpickle_moduledef, (self.nodes, self.schema, self.roots))

    def __copy__(self) -> ModuleDef[M]:
        return self

    def __deepcopy__(self, memo: object) -> ModuleDef[M]:
        return self

    def statics(self) -> Iterator[tuple[Path, Any]]:
        """The static values with their paths, each once."""
        for index, path in enumerate(self.node_paths()):
            for name, kind, payload in self.nodes[index].attributes:
                if kind is STATIC:
                    yield (*path, name), payload.value

    def node_paths(self) -> list[Path]:
        """The first path to each object."""
        paths: list[Path | None] = [None] * len(self.nodes)
        starts: list[Path] = [(str(i),) if len(self.roots) > 1 else () for i in range(len(self.roots))]
        stack = list(zip(self.roots, starts, strict=True))[::-1]
        while stack:
            index, path = stack.pop()
            if index < 0 or paths[index] is not None:
                continue
            paths[index] = path
            children = [
                (payload, (*path, name)) for name, kind, payload in self.nodes[index].attributes if kind is OBJECT
            ]
            stack.extend(reversed(children))
        return [path if path is not None else () for path in paths]


def _unpickle_moduledef(nodes: Any, schema: Schema, roots: tuple[int, ...]) -> ModuleDef[Any]:
    # The kinds are compared by identity, which a pickle does not keep.
    kinds = {kind: kind for kind in (OBJECT, CELL, STATIC, METHOD)}
    fresh = tuple(NodeDef(n.type, tuple(a._replace(kind=kinds[a.kind]) for a in n.attributes)) for n in nodes)
    return ModuleDef.of(fresh, schema, roots)


class Handle:
    """Stands for a definition as the key of a dict: JAX compares it by identity, and nobody else's dict has such a key.

    It knows its definition, which knows it weakly.
    """

    __slots__ = ("__weakref__", "moduledef")

    def __init__(self, moduledef: ModuleDef[Any]) -> None:
        self.moduledef = moduledef

    def __repr__(self) -> str:
        (root,) = self.moduledef.roots
        return self.moduledef.nodes[root].type.__name__ if root >= 0 else "a part of an argument before it"


def handle_of(moduledef: ModuleDef[Any]) -> Handle:
    """The one Handle of a definition."""
    with interning:
        found = moduledef._handle() if moduledef._handle is not None else None
        if found is None:
            found = Handle(moduledef)
            moduledef._handle = weakref.ref(found)
        return found


class _Key:
    """A structure with its hash, taken once: structures are long, and the interning table asks twice."""

    __slots__ = ("content", "hash")

    def __init__(self, content: Hashable) -> None:
        self.content = content
        self.hash = hash(content)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.hash == other.hash and self.content == other.content


jax.tree_util.register_pytree_node(ModuleDef, lambda moduledef: ((), moduledef), lambda moduledef, _: moduledef)


def _method_text(payload: tuple[int, Any]) -> str:
    return f"<bound method {getattr(payload[1], '__qualname__', payload[1])}>"


def walk(roots: Sequence[Object], known: Graph | None = None) -> Graph:
    """Walk the graph of `roots` and describe it.

    Args:
        roots: Modules or Contexts.
        known: what an earlier walk of other roots found. Objects and cells in it are not walked again; they are
            referred to by negative indices, -1 for its first.

    Raises:
        StaticError: a static value reaches a Module, a Variable or an array, or cannot be compared.
    """
    object_index: dict[int, int] = {}
    cell_index: dict[int, int] = {}
    if known is not None:
        object_index = {id(item): -1 - i for i, item in enumerate(known.objects)}
        cell_index = {id(item): -1 - i for i, item in enumerate(known.cells)}
    objects: list[Object] = []
    cells: list[Cell] = []
    entries: list[Entry] = []
    nodes: list[Any] = []
    statics: dict[int, tuple[Any, Hashable, bool, int]] = {}
    methods: list[tuple[int, list[Attribute], int, Path]] = []
    parts: dict[int, int] = {}
    copies: dict[int, Any] = {}
    root_indices: list[int] = []

    def enter(item: Object, path: Path) -> tuple[int, Iterator[tuple[str, Any]], list[Attribute], Path]:
        index = len(objects)
        object_index[id(item)] = index
        objects.append(item)
        nodes.append(None)
        return index, item._nnx_children(), [], path

    for number, root in enumerate(roots):
        if id(root) in object_index:
            root_indices.append(object_index[id(root)])
            continue
        root_indices.append(len(objects))
        # Depth first with a stack of our own, as graphs may be deeper than Python's stack. Attributes come in natural
        # order,
        # so cells are met in the natural order of their first paths.
        stack = [enter(root, (str(number),) if len(roots) > 1 else ())]
        while stack:
            index, children, attributes, path = stack[-1]
            for name, child in children:
                if isinstance(child, Object):
                    found = object_index.get(id(child))
                    if found is None:
                        attributes.append(Attribute(name, OBJECT, len(objects)))
                        stack.append(enter(child, (*path, name)))
                        break
                    attributes.append(Attribute(name, OBJECT, found))
                elif isinstance(child, Cell) and not isinstance(child, Static):
                    found = cell_index.get(id(child))
                    if found is None:
                        found = cell_index[id(child)] = len(cells)
                        cells.append(child)
                        entries.append(((*path, name), type(child), child._metadata))
                    attributes.append(Attribute(name, CELL, found))
                elif isinstance(child, types.MethodType) and isinstance(child.__self__, Object):
                    # Its Module may come later in the walk: settled at the end.
                    methods.append((index, attributes, len(attributes), (*path, name)))
                    attributes.append(Attribute(name, METHOD, child))
                else:
                    attributes.append(
                        Attribute(name, STATIC, _static_entry(child, (*path, name), statics, parts, copies))
                    )
            else:
                nodes[index] = (type(objects[index]), attributes)
                stack.pop()
    for _, attributes, position, path in methods:
        name, _, method = attributes[position]
        found = object_index.get(id(method.__self__))
        if found is None:
            raise StaticError(
                f"the static attribute `{path_text(path)}` is a bound method of a {type(method.__self__).__name__} "
                "that is not part of the same Module: it would be baked in as a constant. Make that Module an "
                "attribute too"
            )
        attributes[position] = Attribute(name, METHOD, (found, method.__func__))
    definition = ModuleDef.of(
        tuple(NodeDef(kind, tuple(attributes)) for kind, attributes in nodes), Schema.of(entries), tuple(root_indices)
    )
    return Graph(definition, objects, cells, [(value, key, explicit) for value, key, explicit, _ in statics.values()])


def _static_entry(
    value: Any,
    path: Path,
    statics: dict[int, tuple[Any, Hashable, bool, int]],
    parts: dict[int, int],
    copies: dict[int, Any],
) -> StaticEntry:
    explicit = isinstance(value, Static)
    held = value._value if explicit else value
    try:
        mark = fingerprint(held, forbidden=(Object, Cell), arrays=explicit)
    except StaticProblem as problem:
        name = f"{path_text(path)}{problem.where}"
        raise StaticError(
            f"the static attribute `{path_text(path)}` holds {problem.reason} (at `{name}`): it would be a constant, "
            "and its changes and gradients would be lost. Assign a list or dict of Modules as a whole (it becomes an "
            "nnx.Sequence or nnx.Dict), put arrays into an nnx.Param, another Variable or an nnx.Node, or wrap a "
            "constant in nnx.Static"
        ) from None
    alias = -1
    if mark.mutable:
        if id(held) not in statics:
            statics[id(held)] = (held, mark.key, explicit, len(statics))
        alias = statics[id(held)][3]
        held = copy_static(held, copies)
    numbers = tuple([parts.setdefault(id(part), len(parts)) for part in mark.parts])
    return StaticEntry(held, mark.key, mark.by_identity, explicit, alias, numbers)


def statics_changed(statics: Sequence[tuple[Any, Hashable, bool]]) -> bool:
    """Whether a mutable static was edited in place since the walk that found it."""
    try:
        return any(
            fingerprint(value, forbidden=(Object, Cell), arrays=explicit).key != key for value, key, explicit in statics
        )
    except StaticProblem:
        return True  # the next walk says what and where


def build(
    moduledef: ModuleDef[Any],
    values: Sequence[Any],
    known_objects: Sequence[Object] = (),
    known_cells: Sequence[Cell] = (),
) -> tuple[list[Object], list[Cell]]:
    """Make the objects and cells that a definition describes, in the current trace.

    Args:
        moduledef: the definition.
        values: a value for each entry of its schema.
        known_objects: what negative indices refer to, as in `walk`.
        known_cells: the same for cells.
    """
    cells = [
        new_cell(kind, value, metadata, owned=True)
        for (_, kind, metadata), value in zip(moduledef.schema.entries, values, strict=True)
    ]
    objects = [new_object(node.type) for node in moduledef.nodes]
    copies: dict[int, Any] = {}
    for instance, node in zip(objects, moduledef.nodes, strict=True):
        fill(instance, node.attributes, objects, cells, known_objects, known_cells, copies)
    return objects, cells


def fill(
    instance: Object,
    attributes: Sequence[Attribute],
    objects: Sequence[Object],
    cells: Sequence[Cell],
    known_objects: Sequence[Object],
    known_cells: Sequence[Cell],
    copies: dict[int, Any],
) -> None:
    """Give an empty object its attributes."""
    plain, held = instance.__dict__, instance._nnx.cells
    for name, kind, payload in attributes:
        if kind is CELL:
            held[name] = cells[payload] if payload >= 0 else known_cells[-1 - payload]
            expose(type(instance), name)
        elif kind is OBJECT:
            plain[name] = objects[payload] if payload >= 0 else known_objects[-1 - payload]
        elif kind is METHOD:
            index, function = payload
            plain[name] = types.MethodType(function, objects[index] if index >= 0 else known_objects[-1 - index])
        elif payload.explicit:
            held[name] = Static(copy_static(payload.value, copies) if payload.mutable else payload.value)
            expose(type(instance), name)
        else:
            plain[name] = copy_static(payload.value, copies) if payload.mutable else payload.value


def merge_states(
    moduledef: ModuleDef[Any], states: Sequence[State]
) -> tuple[ModuleDef[Any], Sequence[Any], list[tuple[Path, type[Cell], Any, Any]]]:
    """Put the values of `states` in the order of a definition's schema.

    Returns:
        The definition (without the temporary Variables that no State has a value for), the values, and the entries
        that the schema does not know as `(path, type, metadata, value)`.
    """
    schema = moduledef.schema
    if len(states) == 1 and isinstance(states[0], State) and states[0]._schema is schema:
        return moduledef, states[0]._values, []
    values: list[Any] = [_MISSING] * len(schema)
    extra: dict[Path, tuple[Path, type[Cell], Any, Any]] = {}
    index = schema.index
    for state in states:
        if not isinstance(state, State):
            hint = " (unpack the tuple with `*`)" if isinstance(state, tuple) else ""
            raise StructureError(f"expected a State, got {type(state).__name__}{hint}")
        if state._schema is schema:
            values = list(state._values)
            continue
        for (path, kind, metadata), value in zip(state._schema.entries, state._values, strict=True):
            position = index.get(path)
            if position is None:
                extra[path] = (path, kind, metadata, value)
                continue
            _, own_kind, own_metadata = schema.entries[position]
            if kind is not Buffer:
                check_equivalent(path_text(path), own_kind, own_metadata, kind, metadata)
            values[position] = value
    missing = {i for i, value in enumerate(values) if value is _MISSING}
    if missing:
        lost = [i for i in sorted(missing) if not schema.entries[i][1].temporary]
        if lost:
            shown = ", ".join(f"`{path_text(schema.paths[i])}` ({schema.entries[i][1].__name__})" for i in lost[:5])
            raise StructureError(
                f"merge of a {moduledef.type.__name__}: {len(lost)} of {len(schema)} values are missing: "
                f"{shown}{' ...' if len(lost) > 5 else ''}. Pass every State that the Module was partitioned into; to "
                "leave a collection out for good, take it out with `pop_state`, or set `temporary = True` on its "
                "Variable class"
            )
        moduledef = without_cells(moduledef, missing)
        values = [value for value in values if value is not _MISSING]
    return moduledef, values, list(extra.values())


_MISSING: Any = object()


def without_cells(moduledef: ModuleDef[Any], gone: set[int]) -> ModuleDef[Any]:
    """The same definition without some of its cells."""
    kept = [i for i in range(len(moduledef.schema)) if i not in gone]
    number = {old: new for new, old in enumerate(kept)}
    nodes = []
    for kind, attributes in moduledef.nodes:
        remaining = []
        for attribute in attributes:
            if attribute.kind is CELL and attribute.payload >= 0:
                if attribute.payload in gone:
                    continue
                remaining.append(attribute._replace(payload=number[attribute.payload]))
            else:
                remaining.append(attribute)
        nodes.append(NodeDef(kind, tuple(remaining)))
    return ModuleDef.of(tuple(nodes), moduledef.schema.subset(kept), moduledef.roots)


def check_equivalent(what: str, kind: type[Cell], metadata: Any, other_kind: type[Cell], other_metadata: Any) -> None:
    """Raise unless a Variable of one type and metadata may take the value of a Variable of another."""
    if other_kind is kind and other_metadata is metadata:
        return
    # `what` is a path with slashes, or a class and its attribute with a dot.
    name = what.rpartition("/" if "/" in what else ".")[2]
    if other_kind is not kind:
        raise VariableError(
            f"`{what}` is a {kind.__name__}, but the value given for it is in a {other_kind.__name__}: "
            f"delete the attribute first (`del module.{name}`) to change its collection"
        )
    raise VariableError(
        f"`{what}` has metadata {dict(metadata)}, but the {kind.__name__} given for it has {dict(other_metadata)}: "
        f"assign the array itself (`module.{name} = array`) to keep the metadata, or delete the attribute first "
        f"(`del module.{name}`) to change it"
    )
