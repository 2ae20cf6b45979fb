"""Module: an ordinary, mutable Python class whose attributes are data, submodules or statics."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, overload

import jax
import numpy as np

from nnx.core._assign import assign, check_no_modules, leaf_types, missing_attribute
from nnx.core._errors import AttributeKindError, FilterError, StructureError, VariableError
from nnx.core._filters import FilterLike, to_filters
from nnx.core._graph import ModuleDef, build, merge_states, walk
from nnx.core._layout import layout_of, state_of
from nnx.core._object import (
    Object,
    attribute_name,
    check_object_trace,
    class_attribute,
    expose,
    invalidate,
    new_object,
    origin_of,
    plain_attributes,
)
from nnx.core._pure import Pure, caller, states_of
from nnx.core._repr import module_repr
from nnx.core._state import Path, State, path_text
from nnx.core._static import copy_static
from nnx.core._tracing import current_trace
from nnx.core._update import add_entries, remove_cells, update_from_definition, update_values
from nnx.core._variable import (
    Buffer,
    Cell,
    Node,
    Static,
    Variable,
    check_cell_trace,
    collection_type,
    new_cell,
)
from nnx.core.transforms._lift import register

__all__ = ["Module", "MutableLeaf"]

T = TypeVar("T")
N = TypeVar("N", bound="Module")


class _Init:
    """`Cls.init(...)` makes and partitions a Module; `module.init(...)` calls it while `is_initializing()` is true."""

    def __get__(self, instance: Module | None, owner: type[Module]) -> Any:
        if instance is None:

            def make(*args: Any, **kwargs: Any) -> Pure[Any, Any]:
                return owner(*args, **kwargs).partition()

            return make

        def run(access: Callable[[Any], Any], args: Any, kwargs: Any) -> Any:
            marked: list[Object] = [item for item in walk((instance,)).objects if isinstance(item, Module)]
            for item in marked:
                item._nnx.initializing = item._nnx.initializing + 1
            try:
                return access(instance)(*args, **kwargs)
            finally:
                for item in marked:
                    item._nnx.initializing = item._nnx.initializing - 1

        return caller(run)


class Module(Object):
    """The base of all neural network modules: a plain Python class with an `__init__` of its own.

    What an attribute becomes is fixed by the first value assigned to it:

    - a `Variable` (or `Node`): data. Reading the attribute gives the value, assigning to it writes the value in place.
    - a JAX or NumPy array: data, read and written the same way.
    - a Module or Context: held by reference; sharing and cycles are kept.
    - a list, tuple or dict of Modules: an `nnx.Sequence` or `nnx.Dict`.
    - anything else: static, a part of the ModuleDef, compared by type and content.

    A Module is no pytree: partition it, or hand it to one of the lifted transforms, to use it with JAX.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> class Linear(nnx.Module):
        ...     def __init__(self, din, dout, *, ctx):
        ...         self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (din, dout)))
        ...         self.count = nnx.var("counts", 0)
        ...     def __call__(self, x):
        ...         self.count += 1
        ...         return x @ self.w
        >>> model = Linear(3, 2, ctx=nnx.context(0))
        >>> model(jnp.ones((4, 3))).shape, model.count
        ((4, 2), 1)
    """

    _nnx_exposed: ClassVar[set[str]] = set()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._nnx_exposed = set()
        slots = cls.__dict__.get("__slots__", ())
        if slots and set((slots,) if isinstance(slots, str) else slots) - {"__weakref__", "__dict__"}:
            raise AttributeKindError(
                f"{cls.__qualname__} declares __slots__: attributes kept in slots are out of sight of partition. "
                "Remove the slots"
            )
        register(cls)

    if not TYPE_CHECKING:
        # On Python 3.11 a class with `__getattr__` reads all attributes slowly, so there the message is Python's own.
        if sys.version_info >= (3, 12):

            def __getattr__(self, name: str) -> Any:
                return missing_attribute(self, name)

        def __setattr__(self, name: str, value: Any) -> None:
            cell = self._nnx.cells.get(name)
            if (
                cell is not None
                and type(cell) is not Buffer
                and not isinstance(value, (Cell, Object))
                and not cell.structural
            ):
                if cell._trace is not current_trace():
                    check_cell_trace(cell, attribute_name(self, name), origin_of(self))
                if type(value) not in leaf_types:
                    check_no_modules(value, self, name)
                place = cell._place
                place[0][place[1]] = value
                if cell._place is not place:
                    cell._value = value
            else:
                assign(self, name, value)

        def __delattr__(self, name: str) -> None:
            held = self.__dict__
            descriptor = class_attribute(type(self), name)
            if name not in self._nnx.cells and hasattr(type(descriptor), "__delete__"):
                object.__delattr__(self, name)
                return
            if name not in self._nnx.cells and name not in held:
                missing_attribute(self, name)
            check_object_trace(self, name, "delete")
            invalidate(self)
            if name in self._nnx.cells:
                del self._nnx.cells[name]
            else:
                del held[name]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._nnx.cells})

    @overload
    def partition(self) -> Pure[State, Self]: ...
    @overload
    def partition(self, first: FilterLike, /) -> Pure[State, Self]: ...
    @overload
    def partition(
        self, first: FilterLike, second: FilterLike, /, *filters: FilterLike
    ) -> Pure[tuple[State, ...], Self]: ...
    def partition(self, *filters: FilterLike) -> Pure[Any, Self]:
        """Split the Module into its data and its definition.

        Args:
            *filters: split the data further, as `State.partition` does.

        Returns:
            A pair `(state, moduledef)`, or `(states, moduledef)` for several filters, with methods of its own (see
            `Pure`).

        Raises:
            FilterError: the filters do not cover the State, or `...` is not the last.
            StaticError: a static attribute holds a Module or an array, which would have become a constant.
        """
        layout = layout_of(self)
        state = state_of(layout)
        return Pure((state.partition(*filters) if filters else state, layout.moduledef))

    def get_state(self) -> State:
        """The data: every Variable, Node and array, each once."""
        return state_of(layout_of(self))

    def get_module_def(self) -> ModuleDef[Self]:
        """The definition: types, statics, submodules and sharing."""
        return layout_of(self).moduledef

    @overload
    def filter(self, first: FilterLike, /) -> State: ...
    @overload
    def filter(self, first: FilterLike, second: FilterLike, /, *filters: FilterLike) -> tuple[State, ...]: ...
    def filter(self, *filters: FilterLike) -> State | tuple[State, ...]:
        """The data that the filters match; see `State.filter`."""
        return self.get_state().filter(*filters)

    def pop_state(self, *filters: FilterLike) -> Any:
        """Take data out of the Module: the attributes that hold it are deleted.

        Returns:
            A State for one filter, else a tuple of States.

        Raises:
            FilterError: no filter is given, or `...` is not the last.
            TraceContextError: an attribute belongs to another trace.
        """
        if not filters:
            raise FilterError("pop_state takes at least one filter")
        layout = layout_of(self)
        state = state_of(layout)
        groups = state._schema.select(to_filters(filters), state._values)[:-1]
        remove_cells(self, [layout.cells[i] for indices, _ in groups for i in indices])
        states = tuple(state._pick(group) for group in groups)
        return states[0] if len(states) == 1 else states

    def update_state(self, updates: Any, /, *more: Any) -> None:
        """Write new data into the Module, in place.

        Args:
            updates: a State or a tuple of States: their values are written, and entries that the Module lacks become
                attributes. A Pure or a Module: the structure is taken over too, so attributes disappear and statics
                change as well.
            *more: further updates, applied in turn.

        Raises:
            VariableError: an entry has another type or metadata than the Variable at its path.
            PathError: a path leads nowhere.
            TraceContextError: what would be written belongs to another trace.
        """
        for given in (updates, *more):
            update = Pure.of(given) if isinstance(given, Object) else given
            if isinstance(update, Pure):
                moduledef, values, extra = merge_states(update.moduledef, update._states())
                update_from_definition(self, moduledef, values)
                add_entries(self, extra)
                continue
            states = states_of(update)
            if states is None:
                raise StructureError(
                    f"update_state takes a State, a tuple of States, a Pure or a Module, got {type(update).__name__}"
                )
            update_values(self, states)

    def clone(self) -> Self:
        """Make an independent copy; sharing inside it is kept.

        The copy holds the same JAX arrays, which nobody can change. But a call that donates the one deletes those of
        the other, as it does for every reference that it does not see; `jax.tree.map(jnp.copy, module.get_state())`
        copies them.
        """
        layout = layout_of(self)
        return build(layout.moduledef, [_copy_value(cell._value) for cell in layout.cells])[0][0]  # type: ignore[return-value]

    @property
    def apply(self) -> Any:
        """Call a copy of the Module: `module.apply(x)`, `module.apply.method(x)` give `(output, changed copy)`."""

        def run(access: Callable[[Any], Any], args: Any, kwargs: Any) -> Any:
            module = self.clone()
            return access(module)(*args, **kwargs), module

        return caller(run)

    init: ClassVar[_Init] = _Init()

    def is_initializing(self) -> bool:
        """Whether the call under way came through `module.init(...)`: parameters may be made from its inputs."""
        return self._nnx.initializing > 0

    def get_variable(self, name: str) -> Any:
        """The Variable (or Node) itself behind an attribute; assigned to another attribute, it ties the two.

        Raises:
            AttributeError: there is no such attribute, or it is neither a Variable nor a Node.
        """
        cell = self._nnx.cells.get(name)
        if isinstance(cell, (Variable, Node)):
            return cell
        if cell is not None or name in self.__dict__:
            raise AttributeError(f"`{attribute_name(self, name)}` is not a Variable")
        return missing_attribute(self, name)

    def sow(
        self,
        collection: str | type[Variable[Any]],
        name: str,
        value: Any,
        *,
        reduce_fn: Callable[[Any, Any], Any] = lambda values, value: (*values, value),
        init_fn: Callable[[], Any] = tuple,
    ) -> None:
        """Keep a value under an attribute, together with those kept there before.

        Args:
            collection: the Variable type to keep it in, or its collection's name.
            name: the attribute.
            value: the value.
            reduce_fn: joins what is there with the value; by default it appends to a tuple.
            init_fn: makes what is there at first; by default an empty tuple.

        Inside a lifted transform the first value sown takes the place of what an earlier call left there: a tuple that
        grew from call to call would be another structure each time, and compile anew. Take values out between calls
        with `pop_state`.

        Raises:
            VariableError: the attribute is in use for something else.

        Example:
            >>> import nnx
            >>> module = nnx.Module()
            >>> module.sow("intermediates", "y", 1); module.sow("intermediates", "y", 2)
            >>> module.y
            (1, 2)
        """
        kind = collection_type(collection) if isinstance(collection, str) else collection
        cell = self._nnx.cells.get(name)
        if cell is None:
            if name in self.__dict__ or class_attribute(type(self), name) is not None:
                raise VariableError(
                    f"cannot sow into `{attribute_name(self, name)}`: the name is already an attribute or a method"
                )
            setattr(self, name, kind(reduce_fn(init_fn(), value)))
            self._note_sown(name)
            return
        if type(cell) is not kind:
            raise VariableError(
                f"cannot sow a {kind.__name__} into `{attribute_name(self, name)}`, which is a "
                f"{type(cell).__name__}: use another name"
            )
        sown = self._nnx.sown
        afresh = sown is not None and name not in sown
        try:
            joined = reduce_fn(init_fn() if afresh else cell._value, value)
        except TypeError as error:
            raise VariableError(
                f"cannot sow into `{attribute_name(self, name)}`: it holds a {type(cell._value).__name__}"
            ) from error
        setattr(self, name, joined)
        self._note_sown(name)

    def _note_sown(self, name: str) -> None:
        if self._nnx.sown is not None:
            self._nnx.sown.add(name)

    def for_each(self, module_type: type[N], fn: Callable[[N], Any]) -> None:
        """Call `fn` on each Module of a type in the graph, this one included, each once, parents first."""
        for item in walk((self,)).objects:
            if isinstance(item, module_type):
                fn(item)

    @overload
    def mutable_state_dict(self) -> dict[Path, MutableLeaf]: ...
    @overload
    def mutable_state_dict(self, sep: str) -> dict[str, MutableLeaf]: ...
    def mutable_state_dict(self, sep: str | None = None) -> Any:
        """Every leaf by its path, to be read and written in place.

        Args:
            sep: joins the parts of the paths to strings; without it the keys are tuples.
        """
        layout = layout_of(self)
        leaves = zip(layout.moduledef.schema.paths, layout.cells, strict=True)
        return {path if sep is None else sep.join(path): MutableLeaf(cell, path) for path, cell in leaves}

    def __copy__(self) -> Self:
        instance = new_object(type(self))
        instance.__dict__.update(plain_attributes(self))
        for name, item in instance.__dict__.items():
            if isinstance(item, types.MethodType) and item.__self__ is self:
                instance.__dict__[name] = types.MethodType(item.__func__, instance)
        for name, cell in self._nnx.cells.items():
            instance._nnx.cells[name] = new_cell(type(cell), cell._value, cell._metadata, owned=True)
        return instance  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Not one attribute after the other: the graph may be deeper than Python's stack.
        graph = walk((self,))
        copied: dict[int, Any] = {}
        fresh = []
        for item in graph.objects:
            found = memo.get(id(item))
            fresh.append(found is None)
            copied[id(item)] = new_object(type(item)) if found is None else found
            memo[id(item)] = copied[id(item)]
        for cell in graph.cells:
            if id(cell) not in memo:
                memo[id(cell)] = new_cell(type(cell), _copy_value(cell._value), cell._metadata, owned=True)
        for item, is_new in zip(graph.objects, fresh, strict=True):
            if not is_new:
                continue
            instance = copied[id(item)]
            for name, child in item._nnx_children():
                if isinstance(child, Static):
                    instance._nnx.cells[name] = Static(copy_static(child._value, memo))
                elif isinstance(child, Cell):
                    instance._nnx.cells[name] = memo[id(child)]
                elif isinstance(child, Object):
                    instance.__dict__[name] = copied[id(child)]
                elif isinstance(child, types.MethodType) and id(child.__self__) in copied:
                    instance.__dict__[name] = types.MethodType(child.__func__, copied[id(child.__self__)])
                else:
                    instance.__dict__[name] = copy_static(child, memo)
        return copied[id(self)]  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        # One flat list: a level of nesting less for each Module keeps deep graphs within pickle's recursion.
        state: list[Any] = [len(self._nnx.cells)]
        for name, cell in self._nnx.cells.items():
            state += (name, cell)
        for name, value in plain_attributes(self).items():
            state += (name, value)
        return (new_object, (type(self),), state)

    def __setstate__(self, state: Any) -> None:
        (count, *items) = state
        pairs = list(zip(items[::2], items[1::2], strict=True))
        self._nnx.cells.update(pairs[:count])
        self.__dict__.update(pairs[count:])
        for name in self._nnx.cells:
            expose(type(self), name)

    def __repr__(self) -> str:
        return module_repr(self)


register(Module)


class MutableLeaf:
    """One leaf of a live Module, to be read and written in place.

    Attributes:
        path: where it is.
    """

    __slots__ = ("_cell", "path")

    def __init__(self, cell: Cell, path: Path) -> None:
        self._cell = cell
        self.path: Path = path

    @property
    def value(self) -> Any:
        """The value; assigning writes it into the Module."""
        return self._cell._value

    @value.setter
    def value(self, value: Any) -> None:
        check_cell_trace(self._cell, path_text(self.path))
        self._cell._value = value

    @property
    def collection(self) -> str | None:
        """The name of its Variable's collection; None for a bare array."""
        return None if isinstance(self._cell, Buffer) else type(self._cell).collection  # type: ignore[attr-defined, no-any-return]

    @property
    def sharding(self) -> Any:
        """The logical axis names of its dimensions, or None."""
        return self._cell._metadata.get("sharding")

    def __repr__(self) -> str:
        return f"MutableLeaf({path_text(self.path)}, {self._cell!r})"


def _copy_value(value: Any) -> Any:
    """A value that shares nothing mutable with the original; JAX arrays are immutable and shared."""
    if isinstance(value, jax.Array):
        return value
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, value)
