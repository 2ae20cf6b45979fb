"""The one mechanism behind every lifted transform: Modules go in whole, and only what changed comes out."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from nnx.core._context import Context
from nnx.core._errors import AttributeKindError
from nnx.core._graph import Handle, ModuleDef
from nnx.core._layout import Layout, layout_after, layout_of, values_of
from nnx.core._object import Hidden, Object

__all__ = [
    "Frame",
    "Initializing",
    "Packed",
    "as_packed",
    "enter",
    "first_argument",
    "is_object",
    "is_packed",
    "is_untouched",
    "lifting",
    "packed_of",
    "refuse_static",
    "register",
]


class Frame:
    """One call: the roots, in the order in which JAX meets them while it flattens the arguments, and their layouts.

    A Frame also stands for the first argument of the call. JAX flattens the arguments more than once when it has to
    compile; each time it meets the Frame first, which then begins anew, so it always holds the roots of the last
    time, each once. If the argument is a Module, the Frame flattens in its place. Calls whose Modules are arguments
    themselves need none of this: see `enter`.
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

    def known(self) -> tuple[Sequence[Object], Sequence[Layout]]:
        """The roots and their layouts, as far as JAX has come."""
        return getattr(self, "roots", ()), getattr(self, "layouts", ())


def enter(root: Object, roots: list[Object], layouts: list[Layout]) -> Any:
    """Take a root into a call, in the form in which it is handed to JAX.

    That is a dict with the definition's handle as its one key: JAX walks it without calling Python, as it would have to
    for a node of ours, and has no static argument to hash.

    Args:
        root: a Module or Context.
        roots: those before it; it is added.
        layouts: their layouts; its own is added.
    """
    hidden = root._nnx
    layout = hidden.layout
    if layout is None or not layout.valid or layout.statics or layouts:
        layout = layout_after(root, roots, layouts) if layouts else layout_of(root)
    roots.append(root)
    layouts.append(layout)
    column = layout.column
    if column is None or layout.streams:
        column = values_of(layout)
    if hidden.initializing:
        return Packed(Initializing(layout.moduledef), column)
    return {layout.handle: column}


def as_packed(argument: Any) -> Any:
    """What an argument stands for inside of the trace: a Packed in the place of a Module; any other as it is."""
    if type(argument) is dict and len(argument) == 1:
        ((handle, values),) = argument.items()
        if type(handle) is Handle:
            return Packed(handle.moduledef, values)
    return first_argument(argument)


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


class Initializing(NamedTuple):
    """The definition of a Module that `module.init` is calling: its methods may trace to something else."""

    moduledef: ModuleDef[Any]


Definition = ModuleDef[Any] | Initializing


class Packed:
    """What a traced function finds in a Module's place: the definition and the values, still to be built."""

    __slots__ = ("definition", "values")

    def __init__(self, definition: Definition, values: Sequence[Any]) -> None:
        self.definition = definition
        self.values = values

    @property
    def moduledef(self) -> ModuleDef[Any]:
        """The definition itself."""
        return self.definition.moduledef if type(self.definition) is Initializing else self.definition  # type: ignore[return-value]


jax.tree_util.register_pytree_node(
    Packed, lambda packed: ((packed.values,), packed.definition), lambda definition, items: Packed(definition, items[0])
)


def _shell(kind: type[Object], definition: Definition, children: Sequence[Any]) -> Object:
    """Unflatten: an empty instance that carries a Packed, so that flattening it again gives the same treedef."""
    instance = object.__new__(kind)
    instance.__dict__["_nnx"] = Packed(definition, children[0])
    return instance


def is_packed(value: Any) -> bool:
    """Whether a value stands for a Module that is still to be built."""
    return type(value) is Packed or (isinstance(value, Object) and type(value._nnx) is Packed)


def _is_packed_or_object(value: Any) -> bool:
    return type(value) is Packed or isinstance(value, Object)


def packed_of(value: Any) -> Packed:
    """The Packed that `is_packed` has seen."""
    return value if type(value) is Packed else value._nnx  # type: ignore[no-any-return]


def _flatten(root: Object) -> tuple[tuple[Sequence[Any]], Definition]:
    # One child, a list: JAX walks a list faster than the children of a node of ours.
    hidden: Any = root._nnx
    if type(hidden) is Packed:
        return (hidden.values,), hidden.definition
    frame = _local.frame
    if frame is None:
        raise AttributeKindError(_not_a_pytree(root))
    return _values_and_definition(hidden, frame.enter(root))


def _values_and_definition(hidden: Hidden, layout: Layout) -> tuple[tuple[Sequence[Any]], Definition]:
    values = values_of(layout)
    return (values,), (Initializing(layout.moduledef) if hidden.initializing else layout.moduledef)


def _flatten_with_keys(root: Object) -> tuple[Any, Definition]:
    (values,), definition = _flatten(root)
    return ((_VALUES_KEY, values),), definition


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


def _flatten_frame(frame: Frame) -> tuple[tuple[Any], Definition | None]:
    argument = frame.argument
    if isinstance(argument, Object):
        layout = layout_of(argument)
        frame.roots = [argument]
        frame.layouts = [layout]
        return _values_and_definition(argument._nnx, layout)
    if type(argument) is _First:  # flattened again after an unflattening, by JAX itself
        inner = argument.argument
        return ((inner.values,), inner.definition) if type(inner) is Packed else ((inner,), None)
    frame.roots = []
    frame.layouts = []
    return (argument,), None


def _flatten_frame_with_keys(frame: Frame) -> tuple[Any, Definition | None]:
    (child,), definition = _flatten_frame(frame)
    return ((_VALUES_KEY, child),), definition


def _unflatten_frame(definition: Definition | None, children: Any) -> Any:
    return Frame(_First(children[0] if definition is None else Packed(definition, children[0])))


jax.tree_util.register_pytree_with_keys(Frame, _flatten_frame_with_keys, _unflatten_frame, _flatten_frame)


def is_object(value: Any) -> bool:
    """Whether a value is a Module or a Context: a leaf to our own tree functions."""
    return isinstance(value, Object)


def refuse_static(what: str, argument: str, value: Any) -> None:
    """Raise if an argument that is handed on as it is holds a Module."""
    for leaf in jax.tree.leaves(value, is_leaf=is_object):
        if is_object(leaf):
            raise AttributeKindError(
                f"a {type(leaf).__name__} cannot be a static argument of {what}: its arrays would be constants of the "
                f"compiled code, and its changes would go unseen. Leave it out of {argument}"
            )


register(Context)
