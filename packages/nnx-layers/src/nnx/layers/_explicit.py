"""Explicit mesh axes: where JAX asks how a result is split, the activations stay where they are and the weights move.

On auto axes the compiler decides and nothing here does anything. On explicit ones every type says how its array is
split, and an operation whose inputs disagree raises. The rule is that of FSDP and of tensor parallelism alike: an axis
of the mesh that the inputs are already split over is taken away from the weights (they are gathered), the rest of the
weights' axes are those of the outputs, and sums over split axes are reduced.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

__all__ = [
    "contraction",
    "convolve",
    "fit_weights",
    "is_explicit",
    "last",
    "lead",
    "like",
    "product",
    "reordered",
    "row_product",
    "rows",
    "spec_of",
    "whole",
]


def is_explicit(x: Any) -> bool:
    """Whether the type of `x` says how it is split."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def spec_of(x: Any) -> tuple[Any, ...]:
    """The mesh axes of each dimension of `x`."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def _axes(entries: Sequence[Any]) -> set[str]:
    return {axis for entry in entries for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis is not None}


def _without(entry: Any, used: set[str]) -> Any:
    kept = tuple(axis for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis and axis not in used)
    return kept if len(kept) > 1 else kept[0] if kept else None


def _moved(x: jax.Array, spec: Sequence[Any]) -> jax.Array:
    return x if spec_of(x) == tuple(spec) else jax.sharding.reshard(x, PartitionSpec(*spec))


def product(x: jax.Array, kernel: jax.Array, axes: tuple[int, ...], batch: int = 0) -> tuple[jax.Array, PartitionSpec]:
    """The kernel as it has to be split for a product with `x`, and how the outputs are split.

    Args:
        x: the inputs.
        kernel: the weights, the axes to be summed over first, behind those of the batch.
        axes: the axes of `x` to be summed over.
        batch: how many first axes both have in common.
    """
    mine, theirs = spec_of(x), spec_of(kernel)
    outputs = [_without(entry, _axes(mine)) for entry in theirs[batch + len(axes) :]]
    moved = _moved(kernel, [*mine[:batch], *(mine[axis] for axis in axes), *outputs])
    return moved, PartitionSpec(*(entry for i, entry in enumerate(mine) if i not in axes), *outputs)


def contraction(
    x: jax.Array,
    kernel: jax.Array,
    labels: tuple[Sequence[str], Sequence[str], Sequence[str]],
) -> tuple[jax.Array, PartitionSpec]:
    """The kernel as it has to be split for an einsum with `x`, and how the outputs are split.

    Args:
        x: the inputs.
        kernel: the weights.
        labels: of the axes of the inputs, of the kernel and of the outputs.
    """
    mine = {label: entry for label, entry, size in zip(labels[0], spec_of(x), x.shape, strict=True) if size > 1}
    used = _axes(spec_of(x))
    theirs = {}
    for label, entry, size in zip(labels[1], spec_of(kernel), kernel.shape, strict=True):
        theirs[label] = None if size == 1 else mine[label] if label in mine else _without(entry, used)
    moved = _moved(kernel, [theirs[label] for label in labels[1]])
    return moved, PartitionSpec(*(mine[label] if label in mine else theirs.get(label) for label in labels[2]))


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    dimensions: lax.ConvDimensionNumbers,
    groups: int = 1,
    function: Callable[..., Any] = lax.conv_general_dilated,
    out_sharding: Any = None,
    *,
    window_strides: Sequence[int],
    padding: Any,
    preferred_element_type: DTypeLike | None = None,
    **options: Any,
) -> jax.Array:
    """`lax.conv_general_dilated`, with the kernel split as a product's.

    Args:
        x: the inputs.
        kernel: the weights.
        dimensions: the axes of inputs, kernel and outputs, as numbers.
        groups: the number of groups of features. A kernel of several is gathered: what JAX does with it in a gradient
            cuts across the shards.
        function: what is called in its place.
        out_sharding: how the outputs are split; `None` splits them as inputs and kernel are.
        window_strides: as there.
        padding: as there.
        preferred_element_type: as there.
        **options: the other arguments of `lax.conv_general_dilated`, by name.
    """
    options |= {"dimension_numbers": dimensions, "feature_group_count": groups}
    if is_explicit(x) and sum(size > 1 for size in jax.typeof(x).sharding.mesh.shape.values()) > 1:
        # XLA adds up the kernel's gradient over all devices where space is split, over those with copies too.
        x = _moved(x, [entry if axis in dimensions.lhs_spec[:2] else None for axis, entry in enumerate(spec_of(x))])
    if is_explicit(x) or is_explicit(kernel):
        plain = functools.partial(lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options)
        found = jax.eval_shape(plain, *map(_unsplit, (x, kernel))).shape
        kernel, known = _split_convolution(x, kernel, dimensions, groups, found)
        out_sharding = known if out_sharding is None else out_sharding
    # Only what is asked for, so that a function of the user's need not know every option.
    asked = {"preferred_element_type": preferred_element_type, "out_sharding": out_sharding}
    options |= {name: value for name, value in asked.items() if value is not None}
    out: jax.Array = function(x, kernel, window_strides, padding, **options)
    return out


def _split_convolution(
    x: jax.Array, kernel: jax.Array, dimensions: lax.ConvDimensionNumbers, groups: int, shape: tuple[int, ...]
) -> tuple[jax.Array, PartitionSpec]:
    """The kernel as it has to be split for a convolution of `x`, and how the outputs, of this shape, are split."""
    (_, x_in, *_), (kernel_out, kernel_in, *_), (_, out_features, *_) = dimensions
    mine, theirs = spec_of(x), spec_of(kernel)
    weights: list[Any] = [None] * kernel.ndim
    if groups == 1:
        weights[kernel_in], weights[kernel_out] = mine[x_in], _without(theirs[kernel_out], _axes(mine))
    out: list[Any] = [None] * x.ndim
    for source, target in zip(dimensions.lhs_spec, dimensions.out_spec, strict=True):
        out[target] = mine[source]
    # A strided or unpadded convolution may leave a size that the mesh does not divide.
    out[out_features] = weights[kernel_out] if groups == 1 else mine[x_in]
    out = [_dividing(entry, size, x) for entry, size in zip(out, shape, strict=True)]
    return _moved(kernel, weights), PartitionSpec(*out)


def _unsplit(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _dividing(entry: Any, size: int, like: jax.Array) -> Any:
    """The mesh axes of a dimension, or None if they do not divide its size."""
    sizes = jax.typeof(like).sharding.mesh.shape
    return None if size % math.prod(sizes[axis] for axis in _axes([entry])) else entry


def fit_weights(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Weights that broadcast against the last axes of `x`, split as these are."""
    if not is_explicit(x) or not is_explicit(weights):
        return weights
    mine = spec_of(x)[x.ndim - weights.ndim :]
    return _moved(weights, [None if size == 1 else entry for size, entry in zip(weights.shape, mine, strict=True)])


def like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x` split as `other`, an array of the same shape."""
    return _moved(x, spec_of(other)) if is_explicit(other) else x


def lead(x: jax.Array, other: jax.Array, axes: Sequence[int]) -> jax.Array:
    """`x` with its first axes split as `axes` of `other`, and the rest whole."""
    if not is_explicit(other):
        return x
    first = [spec_of(other)[axis] for axis in axes]
    return _moved(x, [*first, *[None] * (x.ndim - len(first))])


def whole(weights: jax.Array) -> jax.Array:
    """Weights that are split over nothing."""
    return _moved(weights, (None,) * weights.ndim) if is_explicit(weights) else weights


def last(x: jax.Array) -> jax.Array:
    """`x` split along its last axis alone, if it has more than two: so the others may be merged."""
    return _moved(x, [*[None] * (x.ndim - 1), spec_of(x)[-1]]) if is_explicit(x) and x.ndim > 2 else x


def row_product(row: jax.Array, matrix: jax.Array) -> jax.Array:
    """`row @ matrix`, where the matrix stays and the row, [1, n], goes to it."""
    if not is_explicit(matrix):
        return row @ matrix
    inputs, outputs = spec_of(matrix)
    dimensions = (((1,), (0,)), ((), ()))
    return lax.dot_general(_moved(row, (None, inputs)), matrix, dimensions, out_sharding=PartitionSpec(None, outputs))


def rows(table: jax.Array, indices: jax.Array, out_sharding: Any = None) -> jax.Array:
    """`jnp.take(table, indices, axis=0)`, with the table split over mesh axes, the indices too perhaps."""
    used = _axes(spec_of(indices))
    moved = _moved(table, [_without(entry, used) for entry in spec_of(table)])
    out = PartitionSpec(*spec_of(indices), *spec_of(moved)[1:]) if out_sharding is None else out_sharding
    return moved.at[indices].get(mode="fill", out_sharding=out)


def reordered(x: jax.Array, order: jax.Array) -> jax.Array:
    """`jnp.take(x, order, axis=0)`, split as `x` is: rows go from device to device."""
    if not is_explicit(x):
        return jnp.take(x, order, axis=0)
    first, *rest = spec_of(x)
    out = PartitionSpec(_dividing(first, order.shape[0], x), *rest)
    return x.at[whole(order)].get(mode="fill", out_sharding=out)
