"""Stack, Scan and Remat: transforms as Modules, which build their layers and call them under one transform."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, Self

import jax

from nnx.core._graph import build
from nnx.core._layout import layout_of
from nnx.core._module import Module
from nnx.core._object import new_object
from nnx.core._variable import set_trace
from nnx.core.transforms._axes import CARRY, PARTITION_NAME, mapped_definition
from nnx.core.transforms._lift import is_object
from nnx.core.transforms._remat import remat as lifted_remat
from nnx.core.transforms._scan import Carry, scan

__all__ = ["Remat", "Scan", "Stack"]

P = ParamSpec("P")


class _Builder:
    """A transform of a constructor, waiting for the constructor's arguments."""

    __slots__ = ("_make", "_text")

    def __init__(self, text: str, make: Callable[..., Any]) -> None:
        self._text = text
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._make(*args, **kwargs)

    def __repr__(self) -> str:
        return self._text


def _text(name: str, constructor: Any, *rest: Any) -> str:
    parts = [getattr(constructor, "__qualname__", repr(constructor)), *map(repr, rest)]
    return f"nnx.{name}({', '.join(parts)}), to be called with the arguments of the constructor"


def _check_constructor(name: str, constructor: Any) -> None:
    if is_object(constructor) or not callable(constructor):
        raise TypeError(f"nnx.{name} takes a Module class, or a function that makes a Module, got {constructor!r:.80}")


class Stack(Module):
    """`n` layers of one kind, one after another, compiled as one body however many they are.

    `nnx.Stack(Block, n)(*args, ctx=ctx)` makes the layers as `Block(*args, ctx=ctx)` would, each with random keys of
    its own, and stacks their Variables along a new first axis. Calling it carries `x` through the layers and equals
    the loop over `n` separate Blocks with the same parameters.

    Args:
        constructor: a Module class, or a function that makes a Module.
        n: the number of layers.
        remat: True to compute the layers' activations again for the gradient, or a policy of
            `jax.checkpoint_policies` that says what to keep.
        unroll: as for `jax.lax.scan`.

    Attributes:
        layers: the layers as one Module: each Variable has the axis of the layers first.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> class Block(nnx.Module):
        ...     def __init__(self, dim, *, ctx):
        ...         self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (dim, dim)))
        ...     def __call__(self, x):
        ...         return jnp.tanh(x @ self.w)
        >>> stack = nnx.Stack(Block, 12)(4, ctx=nnx.context(0))
        >>> stack(jnp.ones((2, 4))).shape, stack.layers.w.shape, stack[3].w.shape
        ((2, 4), (12, 4, 4), (4, 4))
    """

    layers: Any
    n: int
    remat: Any
    unroll: int | bool

    def __new__(  # type: ignore[misc]  # what it gives makes an instance
        cls,
        constructor: Callable[P, Any],
        n: int,
        *,
        remat: bool | Callable[..., bool] = False,
        unroll: int | bool = 1,
    ) -> Callable[P, Self]:
        """Return what is called with the constructor's arguments to make the Stack."""
        _check_constructor("Stack", constructor)
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"nnx.Stack takes the number of layers, at least 1, got {n!r}")
        metadata = {PARTITION_NAME: "layers"}

        def make(*args: Any, **kwargs: Any) -> Stack:
            stack: Stack = new_object(cls)
            stack.n, stack.remat, stack.unroll = n, remat, unroll
            stack.layers = scan(_constructor(constructor), length=n, metadata_params=metadata)(*args, **kwargs)
            return stack

        return _Builder(_text("Stack", constructor, n), make)  # type: ignore[return-value]

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Carry `x` through the layers.

        Args:
            x: what the first layer takes and each returns: a pytree of arrays that keep their shapes and dtypes.
            *args: handed to each layer as they are. Modules among them are shared by the layers, and a Context's
                streams are split: each layer draws keys of its own.
            **kwargs: the same by name.

        Returns:
            What the last layer returned.
        """
        shared = [jax.tree.map(lambda leaf: CARRY if is_object(leaf) else None, arg, is_leaf=is_object) for arg in args]
        run = scan(
            _layer(self.remat),
            in_axes=(0, Carry, *shared),
            out_axes=None,
            length=self.n,
            unroll=self.unroll,
            metadata_params={PARTITION_NAME: "layers"},
        )
        return run(self.layers, x, *args, **kwargs)

    def __len__(self) -> int:
        return int(self.n)

    def __getitem__(self, index: int) -> Any:
        """Layer `index` as a Module of its own, to read: its Variables refuse to be written."""
        if not -self.n <= index < self.n:
            raise IndexError(f"layer {index} of a Stack of {self.n} layers")
        layout = layout_of(self.layers)
        moduledef = mapped_definition(layout.moduledef, [0] * len(layout.cells))
        values = [jax.tree.map(lambda leaf: leaf[index], cell._value) for cell in layout.cells]
        objects, cells = build(moduledef, values)
        for cell in cells:
            set_trace(cell, None)
        return objects[moduledef.roots[0]]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self.n))


@functools.lru_cache(maxsize=256)
def _layer(policy: Any) -> Callable[..., Any]:
    """What a Stack scans: one function object for each policy, so that what was compiled for it is found again."""

    def layer(module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return module(x, *args, **kwargs)

    if not policy:
        return layer
    return lifted_remat(layer, policy=None if policy is True else policy, prevent_cse=False)


def _constructor(constructor: Any) -> Any:
    """A function that makes a Module, told apart from one that has a carry."""
    if isinstance(constructor, type):
        return constructor

    @functools.wraps(constructor, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        return constructor(*args, **kwargs)

    make.__name__ = "__init__"
    return make


class Scan(Module):
    """Layers that are built and called under `nnx.scan`.

    `nnx.Scan(Block, length=n, ...)(*args, ctx=ctx)` makes the layers; calling it, `scanned(carry, *xs)`, runs
    `block(carry, x) -> (carry, y)` for each.

    Args:
        constructor: a Module class, or a function that makes a Module.
        length: the number of layers.
        variable_axes: as for `nnx.scan`; Variables that no rule names have axis 0.
        variable_broadcast: as for `nnx.scan`.
        variable_carry: as for `nnx.scan`.
        split_rngs: as for `nnx.scan`.
        in_axes: the axis of each argument after the carry.
        out_axes: the axis of `y`; None if a layer returns the carry alone.
        reverse: whether to run the last layer first.
        unroll: as for `nnx.scan`.
        metadata_params: as for `nnx.scan`.

    Attributes:
        layers: the layers as one Module.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> class Block(nnx.Module):
        ...     def __init__(self, dim, *, ctx):
        ...         self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (dim, dim)))
        ...     def __call__(self, x, shift):
        ...         x = jnp.tanh(x @ self.w + shift)
        ...         return x, x.mean()
        >>> layers = nnx.Scan(Block, length=3)(4, ctx=nnx.context(0))
        >>> y, means = layers(jnp.ones((2, 4)), jnp.arange(3.0))
        >>> y.shape, means.shape
        ((2, 4), (3,))
    """

    layers: Any
    length: int
    in_axes: Any
    out_axes: Any
    reverse: bool
    unroll: int | bool
    variables: Any

    def __new__(  # type: ignore[misc]  # what it gives makes an instance
        cls,
        constructor: Callable[P, Any],
        *,
        length: int,
        variable_axes: Mapping[Any, int | None] | None = None,
        variable_broadcast: Any = None,
        variable_carry: Any = None,
        split_rngs: Any = True,
        in_axes: Any = 0,
        out_axes: Any = 0,
        reverse: bool = False,
        unroll: int | bool = 1,
        metadata_params: Mapping[str, Any] | None = None,
    ) -> Callable[P, Self]:
        """Return what is called with the constructor's arguments to make the Scan."""
        _check_constructor("Scan", constructor)
        variables: dict[str, Any] = {
            "variable_axes": variable_axes,
            "variable_broadcast": variable_broadcast,
            "variable_carry": variable_carry,
            "split_rngs": split_rngs,
            "metadata_params": metadata_params,
        }

        def make(*args: Any, **kwargs: Any) -> Scan:
            scanned: Scan = new_object(cls)
            scanned.length, scanned.in_axes, scanned.out_axes = length, _frozen(in_axes), _frozen(out_axes)
            scanned.reverse, scanned.unroll = reverse, unroll
            scanned.variables = _frozen(variables)
            scanned.layers = scan(_constructor(constructor), length=length, **variables)(*args, **kwargs)
            return scanned

        return _Builder(_text("Scan", constructor), make)  # type: ignore[return-value]

    def __call__(self, carry: Any, *xs: Any, **kwargs: Any) -> Any:
        """Run the layers.

        Args:
            carry: what the first layer takes and each returns.
            *xs: what each layer takes a slice of, along the axes of `in_axes`.
            **kwargs: handed to each layer as they are.

        Returns:
            The carry that the last layer returned, and the stacked `y` of each.
        """
        axes = self.in_axes if isinstance(self.in_axes, tuple) else (self.in_axes,) * len(xs)
        if len(axes) != len(xs):
            raise ValueError(f"in_axes of nnx.Scan has {len(axes)} entries, and {len(xs)} arguments follow the carry")
        axes = tuple(
            CARRY if is_object(x) and axis == 0 and self.in_axes == 0 else axis
            for axis, x in zip(axes, xs, strict=True)
        )
        options = {name: dict(value) if name in _MAPPINGS and value else value for name, value in self.variables}
        run = scan(
            _layer(False),
            in_axes=(0, Carry, *axes),
            out_axes=None if self.out_axes is None else (Carry, self.out_axes),
            length=self.length,
            reverse=self.reverse,
            unroll=self.unroll,
            **options,
        )
        return run(self.layers, carry, *xs, **kwargs)


_MAPPINGS = ("variable_axes", "metadata_params")


def _frozen(value: Any) -> Any:
    """Options as a static attribute that nobody can edit in place."""
    if isinstance(value, Mapping):
        return tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return value


class Remat(Module):
    """A Module whose activations are computed again for its gradient.

    `nnx.Remat(Block, policy=...)(*args, ctx=ctx)` makes the Module; calling it calls the Module under `nnx.remat`.

    Args:
        constructor: a Module class, or a function that makes a Module.
        policy: as for `nnx.remat`.
        prevent_cse: as for `nnx.remat`.
        static_argnums: arguments of the Module that it sees as they are.

    Attributes:
        module: the Module.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> class Block(nnx.Module):
        ...     def __init__(self, dim, *, ctx):
        ...         self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (dim, dim)))
        ...     def __call__(self, x):
        ...         return jnp.tanh(x @ self.w)
        >>> block = nnx.Remat(Block)(4, ctx=nnx.context(0))
        >>> block(jnp.ones((2, 4))).shape
        (2, 4)
    """

    module: Any
    policy: Any
    prevent_cse: bool
    static_argnums: Any

    def __new__(  # type: ignore[misc]  # what it gives makes an instance
        cls,
        constructor: Callable[P, Any],
        *,
        policy: Callable[..., bool] | None = None,
        prevent_cse: bool = True,
        static_argnums: int | tuple[int, ...] = (),
    ) -> Callable[P, Self]:
        """Return what is called with the constructor's arguments to make the Remat."""
        _check_constructor("Remat", constructor)

        def make(*args: Any, **kwargs: Any) -> Remat:
            made: Remat = new_object(cls)
            made.policy, made.prevent_cse, made.static_argnums = policy, prevent_cse, static_argnums
            made.module = constructor(*args, **kwargs)
            return made

        return _Builder(_text("Remat", constructor), make)  # type: ignore[return-value]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the Module."""
        options: dict[str, Any] = {
            "policy": self.policy,
            "prevent_cse": self.prevent_cse,
            "static_argnums": self.static_argnums,
        }
        return lifted_remat(self.module, **options)(*args, **kwargs)
