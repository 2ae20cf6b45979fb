"""Pytree and TreeNode: immutable objects that are pytrees, for data that travels through JAX as a whole."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Generic, Self

import jax

from nnx.core._errors import AttributeKindError
from nnx.core._nodes import is_node, register_node_type
from nnx.core._variable import A, Static

__all__ = ["Pytree", "TreeNode"]


class TreeNode(Generic[A]):
    """Marks a value of a Pytree as data although its type alone would make it static, such as a list of arrays.

    Args:
        value: any pytree.
    """

    __slots__ = ("_value",)

    _value: A

    def __init__(self, value: A) -> None:
        object.__setattr__(self, "_value", value)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register_tree_node(cls)

    @property
    def value(self) -> A:
        """The value."""
        return self._value

    def replace(self, value: Any) -> Self:
        """Return a TreeNode with another value."""
        return type(self)(value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeKindError(f"a {type(self).__name__} is immutable; use `node.replace(value)`")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._value!r})"


def _register_tree_node(kind: type[TreeNode[Any]]) -> None:
    jax.tree_util.register_pytree_with_keys(
        kind,
        lambda node: (((jax.tree_util.GetAttrKey("value"), node._value),), None),
        lambda _, children: _rebuild_tree_node(kind, *children),
        lambda node: ((node._value,), None),
    )


def _rebuild_tree_node(kind: type[TreeNode[Any]], value: Any) -> TreeNode[Any]:
    node = object.__new__(kind)
    object.__setattr__(node, "_value", value)
    return node


_register_tree_node(TreeNode)
register_node_type(TreeNode)


class _PytreeMeta(abc.ABCMeta):
    if not TYPE_CHECKING:
        # Hidden from type checkers, some of which take its arguments and result for those of every constructor.
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            tree: Any = cls.__new__(cls, *args, **kwargs)
            tree.__dict__["_pytree_initializing"] = True
            tree.__init__(*args, **kwargs)
            # Gone only when the outermost __init__ has returned, so that a subclass may go on after super().__init__().
            del tree.__dict__["_pytree_initializing"]
            return tree


class Pytree(metaclass=_PytreeMeta):
    """The base of immutable objects that are pytrees: nodes among their attributes are children, all others are static.

    Attributes are set in `__init__` and never after; `replace` makes a changed copy. Subclass with `mutable=True`
    to lift that.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> class Point(nnx.Pytree):
        ...     def __init__(self, x, name):
        ...         self.x, self.name = x, name
        >>> point = jax.tree.map(lambda x: x + 1, Point(jnp.zeros(()), "p"))
        >>> float(point.x), point.name, float(point.replace(x=jnp.ones(()) * 5).x)
        (1.0, 'p', 5.0)
    """

    _pytree_mutable = False

    def __init_subclass__(cls, mutable: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._pytree_mutable = mutable or cls._pytree_mutable
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, functools.partial(_unflatten, cls), _flatten)

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        return value.value if isinstance(value, (TreeNode, Static)) else value

    def __setattr__(self, name: str, value: Any) -> None:
        held = object.__getattribute__(self, "__dict__")
        if not type(self)._pytree_mutable and name in held and "_pytree_initializing" not in held:
            raise AttributeKindError(f"a {type(self).__name__} is immutable: use `.replace({name}=...)`")
        if not type(self)._pytree_mutable and "_pytree_initializing" not in held:
            raise AttributeKindError(f"cannot add the field {name!r} to a {type(self).__name__}, which is immutable")
        held[name] = _checked(self, name, value, held.get(name))

    def __delattr__(self, name: str) -> None:
        held = object.__getattribute__(self, "__dict__")
        if not type(self)._pytree_mutable and name in held and "_pytree_initializing" not in held:
            raise AttributeKindError(f"a {type(self).__name__} is immutable: its field {name!r} cannot be deleted")
        object.__delattr__(self, name)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed.

        Raises:
            AttributeKindError: a field does not exist.
        """
        held = {
            name: item
            for name, item in object.__getattribute__(self, "__dict__").items()
            if name != "_pytree_initializing"
        }
        unknown = sorted(set(changes) - set(held))
        if unknown:
            raise AttributeKindError(
                f"{type(self).__name__} has no field {unknown[0]!r}; it has: {', '.join(sorted(held))}"
            )
        for name, value in changes.items():
            held[name] = _checked(self, name, value, held[name])
        copied = object.__new__(type(self))
        copied.__dict__.update(held)
        return copied

    def __repr__(self) -> str:
        from nnx.core._repr import summarize

        held = object.__getattribute__(self, "__dict__")
        fields = [f"{name}={summarize(value)}" for name, value in held.items() if name != "_pytree_initializing"]
        return f"{type(self).__name__}({', '.join(fields)})"


def _checked(tree: Pytree, name: str, value: Any, old: Any) -> Any:
    """What a field holds for a value: wrapped as its old value was, and no static that hides arrays."""
    if isinstance(old, (TreeNode, Static)) and not isinstance(value, type(old)):
        return type(old)(value)
    if not _is_child(value):
        for leaf in jax.tree.leaves(value, is_leaf=is_node):
            if is_node(leaf):
                raise AttributeKindError(
                    f"the field `{name}` of a {type(tree).__name__} would be static, but holds a "
                    f"{type(leaf).__name__}: wrap it, `self.{name} = nnx.TreeNode(...)`, to make it data"
                )
    return value


def _is_child(value: Any) -> bool:
    return is_node(value) or (dataclasses.is_dataclass(value) and not jax.tree_util.all_leaves([value]))


def _fields(tree: Pytree) -> dict[str, Any]:
    held = object.__getattribute__(tree, "__dict__")
    return {name: held[name] for name in sorted(held) if name != "_pytree_initializing"}


@dataclasses.dataclass(frozen=True, slots=True)
class _Aux:
    names: tuple[str, ...]
    statics: tuple[tuple[str, Static[Any]], ...]


def _split(tree: Pytree) -> tuple[tuple[str, ...], tuple[Any, ...], _Aux]:
    nodes, statics = [], []
    for name, value in _fields(tree).items():
        if _is_child(value):
            nodes.append((name, value))
        else:
            # A Static is compared by content and exact type, as the statics of a Module are.
            statics.append((name, value if isinstance(value, Static) else _Plain(value)))
    names = tuple(name for name, _ in nodes)
    return names, tuple(value for _, value in nodes), _Aux(names, tuple(statics))


class _Plain(Static[Any]):
    """A static that was assigned bare, and is given back bare."""

    __slots__ = ()


def _flatten(tree: Pytree) -> tuple[tuple[Any, ...], _Aux]:
    _, values, aux = _split(tree)
    return values, aux


def _flatten_with_keys(tree: Pytree) -> tuple[tuple[Any, ...], _Aux]:
    names, values, aux = _split(tree)
    return tuple((jax.tree_util.GetAttrKey(name), value) for name, value in zip(names, values, strict=True)), aux


def _unflatten(kind: type[Pytree], aux: _Aux, children: Any) -> Pytree:
    tree = object.__new__(kind)
    tree.__dict__.update(zip(aux.names, children, strict=True))
    tree.__dict__.update({name: item.value if isinstance(item, _Plain) else item for name, item in aux.statics})
    return tree


register_node_type(Pytree)
