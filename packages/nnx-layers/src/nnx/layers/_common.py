"""What every layer does the same way: make a parameter, settle a flag, draw a key, check a shape, broadcast a bias."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from nnx.core import Context, ContextError, Module, Param, ShapeError, Variable, VariableMetadata
from nnx.layers import initializers
from nnx.layers._dtypes import promote_dtype, widest
from nnx.layers._explicit import fit_weights, is_explicit, product
from nnx.layers.initializers import Initializer

__all__: list[str] = []

# What `lax` and `jnp` take as `precision`: None, a name, a `lax.Precision`, or a pair of either.
PrecisionLike = Any
Axes = int | Sequence[int]
Names = tuple[str | None, ...]
Metadata = Mapping[str, Any]
# `promote_dtype` and what stands in its place: a tuple of arrays and None, and `dtype`, to a tuple of the same arrays.
PromoteDtype = Callable[..., Any]

NO_METADATA: Metadata = MappingProxyType({})
default_kernel_init = initializers.lecun_normal()
default_bias_init = initializers.zeros


def as_value(variable: Any) -> Any:
    """`variable` itself, for a static type checker the value: that is what reading the attribute will give."""
    return variable


class Layer(Module):
    """A layer whose rare options are attributes of its class, until the constructor is given others.

    So the structure of a model, and its repr, hold only the options that somebody chose.
    """

    promote_dtype: PromoteDtype = staticmethod(promote_dtype)

    def _choose(self, **options: Any) -> None:
        """Keeps those options that are not what the class has: functions, and the dtype of a product."""
        for name, value in options.items():
            if value is getattr(type(self), name):
                continue
            if name == "preferred_element_type":
                check_dtype(self, name, value)
            elif not callable(value):
                raise TypeError(f"{type(self).__name__}: `{name}` is a function, got {type(value).__name__}: {value!r}")
            setattr(self, name, value)


def check_dtype(layer: Module, name: str, dtype: Any) -> None:
    """Raise a TypeError that names the layer and its option unless `dtype` is one."""
    try:
        jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"{type(layer).__name__}: `{name}` is a dtype, got {dtype!r}") from None


def check_metadata(metadata: Any, shape: Sequence[int]) -> Metadata:
    """Metadata that a user gave to a parameter of that shape, or a TypeError."""
    if not isinstance(metadata, Mapping) or not all(isinstance(name, str) and name != "value" for name in metadata):
        raise TypeError(
            "the metadata of a parameter (`kernel_metadata` and its kin) are values by name, none of them called"
            f" `value`; got {metadata!r} for the parameter of shape {tuple(shape)}"
        )
    return metadata


def make_param(
    ctx: Context,
    init: Initializer,
    shape: Sequence[int],
    dtype: DTypeLike,
    kind: type[Variable[Any]] = Param,
    names: Names | None = None,
    metadata: Metadata = NO_METADATA,
) -> Any:
    """A new Param, or Variable of another kind, from the Context's stream "params".

    What the initializer returns goes to it as it is: it may be a box that carries metadata. `names` are the logical
    axes, unless the box says otherwise; `metadata` has the last word on everything.
    """
    if not isinstance(ctx, Context):
        raise ContextError(
            f"`ctx` is a Context, such as nnx.context({ctx if isinstance(ctx, int) else 0}), got {ctx!r}"
        )
    # The stream advances either way, so that which keys the others get does not depend on one parameter's initializer.
    key: Any = None
    if initializers.takes_key(init):
        key = ctx.make_rng("params")
    else:
        ctx.skip_rng("params")
    return as_value(kind(_named(init(key, tuple(shape), dtype), names), **check_metadata(metadata, shape)))


def _named(value: Any, names: Names | None) -> Any:
    if names is None or (isinstance(value, VariableMetadata) and "sharding" in value.metadata):
        return value
    return VariableMetadata(value, {"sharding": names})


class DefaultNames:
    """An initializer whose Variable has these logical axes, unless the initializer says otherwise itself.

    What a layer hands to the layers that it is made of.
    """

    def __init__(self, init: Initializer, names: Names) -> None:
        self.__wrapped__ = init
        self.names = names

    def __call__(self, key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
        """The value of the initializer, with the names."""
        return _named(self.__wrapped__(key, shape, dtype), self.names)


def make_arranged_param(
    kind: str,
    ctx: Context,
    init: Initializer,
    shape: Sequence[int],
    dtype: DTypeLike,
    arrange: Callable[[jax.Array], jax.Array],
    names: Names | None = None,
    metadata: Metadata = NO_METADATA,
) -> Any:
    """A new Param whose initializer makes `shape`, inputs before outputs as fans look for them, laid out by `arrange`.

    Metadata is about the parameter and not about what the initializer made: it stays as it is.
    """
    param = make_param(ctx, init, shape, dtype, names=names, metadata=metadata)
    if jnp.shape(param.value) != tuple(shape):
        raise ShapeError(
            f"{kind}: expected the initializer to make an array of the shape {tuple(shape)} that it was called with,"
            f" which the layer rearranges to its kernel, got {jnp.shape(param.value)}"
        )
    param.value = arrange(param.value)
    return param


def resolve_flag(
    layer: Module, name: str, call: bool | None, constructor: bool | None, ctx: Context | None, *, example: bool
) -> bool:
    """The value of a flag: from the call, else the constructor, else the Context; an error if none of them set it."""
    for value in (call, constructor, None if ctx is None or not ctx.has_flag(name) else ctx.get_flag(name)):
        if value is not None:
            return bool(value)
    kind = type(layer).__name__
    seen = "no Context was passed" if ctx is None else "the Context that was passed has no such flag"
    raise ContextError(
        f"{kind}: the flag `{name}` is not set: not in the call, not in the constructor, and {seen}. Set it in one of"
        f" the three: `layer(x, {name}={example})`, `nnx.{kind}(..., {name}={example})`, or"
        f" `layer(x, ctx=nnx.context(flags=dict({name}={example})))`."
    )


def draw_key(layer: Module, collection: str, ctx: Context | None) -> jax.Array:
    """A key from the Context's stream `collection`; an error that names the layer if there is none to draw from."""
    kind = type(layer).__name__
    remedy = f"Pass `ctx=nnx.context({collection}=seed)` in the call, or `deterministic=True` to draw nothing."
    if ctx is None:
        raise ContextError(
            f"{kind}: needs a key from the random stream {collection!r}, but no Context was passed. {remedy}"
        )
    try:
        return ctx.make_rng(collection)
    except ContextError as error:
        raise ContextError(
            f"{kind}: needs a key from the random stream {collection!r}: {error}, or pass `deterministic=True` in the "
            "call to draw nothing"
        ) from error


def check_features(layer: Module, argument: str, x: jax.Array, features: int | Sequence[int], described: str) -> None:
    """Raises ShapeError unless the last axes of `x` are `features`."""
    expected = as_tuple(features)
    if x.ndim < len(expected) or x.shape[x.ndim - len(expected) :] != expected:
        wanted = ", ".join(map(str, ("...", *expected)))
        raise ShapeError(
            f"{type(layer).__name__}: expected `{argument}` of shape [{wanted}] ({described}), got {tuple(x.shape)}"
        )


def as_tuple(value: int | Iterable[int]) -> tuple[int, ...]:
    """A tuple of plain ints from an int or an iterable of them: hashable, so fit for a static attribute."""
    if isinstance(value, Iterable):
        return tuple(operator.index(x) for x in value)
    return (operator.index(value),)


def per_dimension(value: int | Iterable[int] | None, rank: int, what: str) -> tuple[int, ...]:
    """`value` for each of `rank` dimensions, all positive: an int is repeated, None is 1."""
    values = (1,) * rank if value is None else as_tuple(value)
    if not isinstance(value, Iterable):
        values = values[:1] * rank
    if len(values) != rank:
        raise ValueError(f"{what} needs an int or {rank} ints, one to a spatial dimension, got {values}")
    if any(step < 1 for step in values):
        raise ValueError(f"{what} must be positive, got {values}")
    return values


def normalize_axes(axes: Axes, ndim: int, what: str) -> tuple[int, ...]:
    """Axes counted from the front, in the order given; an error for an axis that is absent or named twice."""
    given = as_tuple(axes)
    found = tuple(axis + ndim if axis < 0 else axis for axis in given)
    if any(not 0 <= axis < ndim for axis in found):
        raise ShapeError(f"{what} {given} do not exist in an array with {ndim} dimensions")
    if len(set(found)) != len(found):
        raise ValueError(f"{what} {given} name a dimension twice")
    return found


def project(
    x: jax.Array,
    kernel: jax.Array,
    *,
    axes: tuple[int, ...] | None = None,
    batch: int = 0,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
    dot_general: Callable[..., Any] = lax.dot_general,
) -> jax.Array:
    """Contract `axes` of `x` (the last by default) with the first axes of `kernel`, behind `batch` axes of both."""
    options: dict[str, Any] = {}
    if batch:
        options["batch"] = batch
    if preferred_element_type is not None:
        options["preferred_element_type"] = preferred_element_type
    if out_sharding is not None:
        options["out_sharding"] = out_sharding
    if dot_general is lax.dot_general:
        return _project(x, kernel, axes=axes, precision=precision, **options)
    # Traced each time, and not kept: it may hold state, such as scales that it learns.
    return _contract(x, kernel, axes=axes, precision=precision, dot_general=dot_general, **options)


def _contract(
    x: jax.Array,
    kernel: jax.Array,
    *,
    axes: tuple[int, ...] | None,
    precision: Any,
    batch: int = 0,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
    dot_general: Callable[..., Any] = lax.dot_general,
) -> jax.Array:
    axes = (x.ndim - 1,) if axes is None else axes
    if is_explicit(x) or is_explicit(kernel):
        kernel, known = product(x, kernel, axes, batch)
        out_sharding = known if out_sharding is None else out_sharding
    shared = tuple(range(batch))
    dimensions = ((axes, tuple(range(batch, batch + len(axes)))), (shared, shared))
    # Only what is asked for, so that a function of the user's need not know every option.
    options = {"preferred_element_type": preferred_element_type, "out_sharding": out_sharding}
    asked = {name: value for name, value in options.items() if value is not None}
    out: jax.Array = dot_general(x, kernel, dimensions, precision=precision, **asked)
    return out


# Compiled functions of their own, inlined where they are used: JAX keeps their jaxprs and derivatives, so a deep model
# is traced and differentiated in two thirds of the time that bare primitives take.
_project = functools.partial(
    jax.jit, static_argnames=("axes", "batch", "precision", "preferred_element_type", "out_sharding"), inline=True
)(_contract)


@functools.partial(jax.jit, inline=True)
def add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`y + bias` over the last axes, with the broadcast spelled out (rank promotion may be an error)."""
    if bias is None:
        return y
    bias = fit_weights(bias, y)
    return add(y, bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape))


def add(y: jax.Array, bias: jax.Array) -> jax.Array:
    """`y + bias` in their common type, which differs from that of `bias` only by `preferred_element_type`."""
    if y.dtype != bias.dtype:
        common = widest(y, bias)
        y, bias = y.astype(common), bias.astype(common)
    return y + bias


def flatten_batch(x: jax.Array, inner: int) -> tuple[jax.Array, tuple[int, ...]]:
    """`x` with all but its last `inner` axes merged into one, and the axes that were merged."""
    batch = x.shape[: x.ndim - inner]
    if len(batch) == 1:
        return x, batch
    return jnp.reshape(x, (math.prod(batch), *x.shape[x.ndim - inner :])), batch
