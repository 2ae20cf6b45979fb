"""Pooling: reductions over windows, over a fixed number of cells, or over all of space; functions and Modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nnx.core import Module, ShapeError
from nnx.layers._common import as_tuple, flatten_batch, per_dimension
from nnx.layers._conv import Padding, PaddingLike, canonicalize_padding
from nnx.layers._dtypes import canonicalize_dtype, statistics_dtype

__all__ = [
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
    "AvgPool",
    "GlobalAvgPool",
    "GlobalMaxPool",
    "MaxPool",
    "MinPool",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "avg_pool",
    "global_avg_pool",
    "global_max_pool",
    "max_pool",
    "min_pool",
]


def _lowest(dtype: np.dtype) -> Any:
    """The identity of max; a NumPy scalar, since JAX differentiates `reduce_window` only if it can see the value."""
    return np.array(-np.inf, dtype) if jnp.issubdtype(dtype, jnp.floating) else np.array(jnp.iinfo(dtype).min, dtype)


def _highest(dtype: np.dtype) -> Any:
    """The identity of min."""
    return np.array(np.inf, dtype) if jnp.issubdtype(dtype, jnp.floating) else np.array(jnp.iinfo(dtype).max, dtype)


def _check_space(kind: str, inputs: jax.Array, rank: int) -> None:
    if inputs.ndim < rank + 1:
        raise ShapeError(
            f"{kind}: expected `inputs` of shape [..., {'space, ' * rank}features], with {rank} spatial axes,"
            f" got {tuple(inputs.shape)}"
        )


def _reduce_windows(
    kind: str,
    inputs: jax.Array,
    init: Any,
    reduce: Callable[[Any, Any], Any],
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None,
    padding: PaddingLike,
) -> jax.Array:
    """Reduces each window over the spatial axes of [..., *space, features]."""
    window = as_tuple(window_shape)
    rank = len(window)
    _check_space(kind, inputs, rank)
    steps = per_dimension(strides, rank, f"{kind}: strides")
    pads = canonicalize_padding(padding, rank, kind)
    x, batch = flatten_batch(inputs, rank + 1)
    around: Any = pads if isinstance(pads, str) else ((0, 0), *pads, (0, 0))
    y = lax.reduce_window(x, init, reduce, (1, *window, 1), (1, *steps, 1), around)
    return y if len(batch) == 1 else y.reshape(batch + y.shape[1:])


def avg_pool(
    inputs: jax.Array,
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: PaddingLike = "VALID",
    count_include_pad: bool = True,
) -> jax.Array:
    """The mean of each window. Sums of half precision are taken in float32.

    Args:
        inputs: [..., *space, features], with any number of batch axes, also none.
        window_shape: size of the window along each spatial axis; an int is one axis, not several.
        strides: step between windows, in elements; an int holds for all axes, and `None` is 1, not the window.
        padding: "SAME", "SAME_LOWER", "VALID", an int, or an int or a (low, high) pair for each axis.
        count_include_pad: whether padding counts as zeros; else the mean is over the real elements alone.

    Returns:
        [..., *space, features], in the dtype of `inputs` (float32 for integers).

    Raises:
        ShapeError: `inputs` has too few axes.

    Reference: Dumoulin and Visin, 2016, A guide to convolution arithmetic for deep learning, arXiv:1603.07285.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.avg_pool(jnp.ones((1, 28, 28, 3)), (2, 2), strides=(2, 2)).shape
        (1, 14, 14, 3)
    """
    dtype = canonicalize_dtype(inputs)
    work = statistics_dtype(dtype)
    zero = np.array(0, work)
    options = (lax.add, window_shape, strides, padding)
    total = _reduce_windows("avg_pool", inputs.astype(work), zero, *options)
    if count_include_pad:
        return (total / int(np.prod(as_tuple(window_shape)))).astype(dtype)
    # The counts depend on space alone, so one batch and one feature of ones is enough.
    rank = len(as_tuple(window_shape))
    ones = jnp.ones((1, *inputs.shape[inputs.ndim - rank - 1 : -1], 1), work)
    counts = _reduce_windows("avg_pool", ones, zero, *options)
    counts = counts.reshape((1,) * (total.ndim - rank - 1) + counts.shape[1:])
    return (total / jnp.maximum(counts, 1)).astype(dtype)


def max_pool(
    inputs: jax.Array,
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: PaddingLike = "VALID",
) -> jax.Array:
    """The maximum of each window; padding never wins.

    Args:
        inputs: [..., *space, features], with any number of batch axes, also none.
        window_shape: size of the window along each spatial axis; an int is one axis, not several.
        strides: step between windows, in elements; an int holds for all axes, and `None` is 1, not the window.
        padding: "SAME", "SAME_LOWER", "VALID", an int, or an int or a (low, high) pair for each axis.

    Returns:
        [..., *space, features].

    Raises:
        ShapeError: `inputs` has too few axes.

    Reference: Dumoulin and Visin, 2016, A guide to convolution arithmetic for deep learning, arXiv:1603.07285.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.max_pool(jnp.arange(6.0).reshape(1, 6, 1), 2, strides=2).ravel().tolist()
        [1.0, 3.0, 5.0]
    """
    return _reduce_windows("max_pool", inputs, _lowest(inputs.dtype), lax.max, window_shape, strides, padding)


def min_pool(
    inputs: jax.Array,
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: PaddingLike = "VALID",
) -> jax.Array:
    """The minimum of each window; padding never wins.

    Args:
        inputs: [..., *space, features], with any number of batch axes, also none.
        window_shape: size of the window along each spatial axis; an int is one axis, not several.
        strides: step between windows, in elements; an int holds for all axes, and `None` is 1, not the window.
        padding: "SAME", "SAME_LOWER", "VALID", an int, or an int or a (low, high) pair for each axis.

    Returns:
        [..., *space, features].

    Raises:
        ShapeError: `inputs` has too few axes.

    Reference: Dumoulin and Visin, 2016, A guide to convolution arithmetic for deep learning, arXiv:1603.07285.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.min_pool(jnp.arange(6.0).reshape(1, 6, 1), 2, strides=2).ravel().tolist()
        [0.0, 2.0, 4.0]
    """
    return _reduce_windows("min_pool", inputs, _highest(inputs.dtype), lax.min, window_shape, strides, padding)


def _reduce_cells(
    kind: str, x: jax.Array, output_shape: int | Sequence[int], reduce: Callable[..., jax.Array]
) -> jax.Array:
    """Splits each spatial axis into cells and reduces them, axis by axis: mean and max over a box are separable."""
    cells = as_tuple(output_shape)
    _check_space(kind, x, len(cells))
    for axis, count in enumerate(cells, start=x.ndim - len(cells) - 1):
        size = x.shape[axis]
        if not 0 < count <= size:
            raise ShapeError(f"{kind}: cannot split {size} elements of axis {axis} into {count} cells")
        if size % count == 0:
            x = reduce(x.reshape(*x.shape[:axis], count, size // count, *x.shape[axis + 1 :]), axis=axis + 1)
        else:
            # Cell i runs from floor(i size / count) to ceil((i + 1) size / count), so neighbours may share an element.
            parts = [
                reduce(lax.slice_in_dim(x, i * size // count, -(-(i + 1) * size // count), axis=axis), axis=axis)
                for i in range(count)
            ]
            x = jnp.stack(parts, axis=axis)
    return x


def adaptive_avg_pool(inputs: jax.Array, output_shape: int | Sequence[int]) -> jax.Array:
    """The mean over each cell of a grid of `output_shape` cells laid over space.

    Cell `i` of `m` along an axis of `n` elements runs from `floor(i n / m)` to `ceil((i + 1) n / m)`.

    Args:
        inputs: [..., *space, features], with any number of batch axes, also none.
        output_shape: number of cells along each spatial axis; an int is one axis, not several.

    Returns:
        [..., *output_shape, features], in the dtype of `inputs` (float32 for integers).

    Raises:
        ShapeError: `inputs` has too few axes, or there are more cells than elements.

    Reference: He et al., 2014, Spatial Pyramid Pooling in Deep Convolutional Networks, arXiv:1406.4729.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.adaptive_avg_pool(jnp.arange(5.0).reshape(1, 5, 1), 2).ravel().tolist()
        [1.0, 3.0]
    """
    dtype = canonicalize_dtype(inputs)
    return _reduce_cells("adaptive_avg_pool", inputs.astype(statistics_dtype(dtype)), output_shape, jnp.mean).astype(
        dtype
    )


def adaptive_max_pool(inputs: jax.Array, output_shape: int | Sequence[int]) -> jax.Array:
    """The maximum over each cell of a grid of `output_shape` cells laid over space, cells as in `adaptive_avg_pool`.

    Args:
        inputs: [..., *space, features], with any number of batch axes, also none.
        output_shape: number of cells along each spatial axis; an int is one axis, not several.

    Returns:
        [..., *output_shape, features].

    Raises:
        ShapeError: `inputs` has too few axes, or there are more cells than elements.

    Reference: He et al., 2014, Spatial Pyramid Pooling in Deep Convolutional Networks, arXiv:1406.4729.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.adaptive_max_pool(jnp.arange(5.0).reshape(1, 5, 1), 2).ravel().tolist()
        [2.0, 4.0]
    """
    return _reduce_cells("adaptive_max_pool", inputs, output_shape, jnp.max)


def _spatial_axes(kind: str, inputs: jax.Array, rank: int | None) -> tuple[int, ...]:
    """The axes to reduce in global pooling: the `rank` before the features, or all between the first and the last."""
    count = inputs.ndim - 2 if rank is None else rank
    if count < 1 or inputs.ndim < count + 1:
        wanted = "at least one axis between batch and features" if rank is None else f"{rank} spatial axes and features"
        raise ShapeError(f"{kind}: expected `inputs` with {wanted}, got {tuple(inputs.shape)}")
    return tuple(range(inputs.ndim - 1 - count, inputs.ndim - 1))


def global_avg_pool(inputs: jax.Array, *, spatial_rank: int | None = None, keepdims: bool = False) -> jax.Array:
    """The mean over all of space. Sums of half precision are taken in float32.

    Args:
        inputs: [batch, *space, features].
        spatial_rank: number of spatial axes, for inputs with another number of batch axes than one.
        keepdims: whether the spatial axes stay, with size 1.

    Returns:
        [batch, features], or with the spatial axes between them.

    Raises:
        ShapeError: there is no spatial axis.

    Reference: Lin et al., 2013, Network in Network, arXiv:1312.4400.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.global_avg_pool(jnp.ones((4, 8, 8, 3))).shape
        (4, 3)
    """
    dtype = canonicalize_dtype(inputs)
    axes = _spatial_axes("global_avg_pool", inputs, spatial_rank)
    return jnp.mean(inputs.astype(statistics_dtype(dtype)), axis=axes, keepdims=keepdims).astype(dtype)


def global_max_pool(inputs: jax.Array, *, spatial_rank: int | None = None, keepdims: bool = False) -> jax.Array:
    """The maximum over all of space.

    Args:
        inputs: [batch, *space, features].
        spatial_rank: number of spatial axes, for inputs with another number of batch axes than one.
        keepdims: whether the spatial axes stay, with size 1.

    Returns:
        [batch, features], or with the spatial axes between them.

    Raises:
        ShapeError: there is no spatial axis.

    Reference: Lin et al., 2013, Network in Network, arXiv:1312.4400.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.global_max_pool(jnp.arange(6.0).reshape(1, 3, 2)).tolist()
        [[4.0, 5.0]]
    """
    return jnp.max(inputs, axis=_spatial_axes("global_max_pool", inputs, spatial_rank), keepdims=keepdims)


class _WindowPool(Module):
    """What MaxPool and MinPool share: a window, its strides and its padding."""

    def __init__(
        self,
        window_shape: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        padding: PaddingLike = "VALID",
    ) -> None:
        """Makes the layer.

        Args:
            window_shape: size of the window along each spatial axis; an int is one axis, not several.
            strides: step between windows, in elements; an int holds for all axes, and `None` is 1, not the window.
            padding: "SAME", "SAME_LOWER", "VALID", an int, or an int or a (low, high) pair for each axis.
        """
        self.window_shape: tuple[int, ...] = as_tuple(window_shape)
        rank = len(self.window_shape)
        self.strides: tuple[int, ...] = per_dimension(strides, rank, f"{type(self).__name__}: strides")
        self.padding: Padding = canonicalize_padding(padding, rank, type(self).__name__)


class AvgPool(_WindowPool):
    """`avg_pool` as a Module.

    Reference: Dumoulin and Visin, 2016, A guide to convolution arithmetic for deep learning, arXiv:1603.07285.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.AvgPool((2, 2), strides=2)(jnp.ones((1, 28, 28, 3))).shape
        (1, 14, 14, 3)
    """

    def __init__(
        self,
        window_shape: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        padding: PaddingLike = "VALID",
        count_include_pad: bool = True,
    ) -> None:
        """Makes the layer.

        Args:
            window_shape: size of the window along each spatial axis; an int is one axis, not several.
            strides: step between windows, in elements; an int holds for all axes, and `None` is 1, not the window.
            padding: "SAME", "SAME_LOWER", "VALID", an int, or an int or a (low, high) pair for each axis.
            count_include_pad: whether padding counts as zeros; else the mean is over the real elements alone.
        """
        super().__init__(window_shape, strides, padding)
        self.count_include_pad = count_include_pad

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The mean of each window.

        Args:
            inputs: [..., *space, features].

        Returns:
            [..., *new space, features], of the dtype of `inputs`.

        Raises:
            ShapeError: `inputs` have too few axes.
        """
        return avg_pool(inputs, self.window_shape, self.strides, self.padding, self.count_include_pad)


class MaxPool(_WindowPool):
    """`max_pool` as a Module.

    Reference: Dumoulin and Visin, 2016, A guide to convolution arithmetic for deep learning, arXiv:1603.07285.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.MaxPool((2, 2), strides=2)(jnp.ones((1, 28, 28, 3))).shape
        (1, 14, 14, 3)
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The maximum of each window.

        Args:
            inputs: [..., *space, features].

        Returns:
            [..., *new space, features], of the dtype of `inputs`.

        Raises:
            ShapeError: `inputs` have too few axes.
        """
        return max_pool(inputs, self.window_shape, self.strides, self.padding)


class MinPool(_WindowPool):
    """`min_pool` as a Module.

    Reference: Dumoulin and Visin, 2016, A guide to convolution arithmetic for deep learning, arXiv:1603.07285.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.MinPool(3, padding="SAME")(jnp.arange(4.0).reshape(1, 4, 1)).ravel().tolist()
        [0.0, 0.0, 1.0, 2.0]
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The minimum of each window.

        Args:
            inputs: [..., *space, features].

        Returns:
            [..., *new space, features], of the dtype of `inputs`.

        Raises:
            ShapeError: `inputs` have too few axes.
        """
        return min_pool(inputs, self.window_shape, self.strides, self.padding)


class _AdaptivePool(Module):
    """What the adaptive layers share: the number of cells along each axis."""

    def __init__(self, output_shape: int | Sequence[int]) -> None:
        """Makes the layer.

        Args:
            output_shape: number of cells along each spatial axis; an int is one axis, not several.
        """
        self.output_shape: tuple[int, ...] = as_tuple(output_shape)


class AdaptiveAvgPool(_AdaptivePool):
    """`adaptive_avg_pool` as a Module.

    Reference: He et al., 2014, Spatial Pyramid Pooling in Deep Convolutional Networks, arXiv:1406.4729.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.AdaptiveAvgPool((2, 2))(jnp.ones((1, 7, 9, 3))).shape
        (1, 2, 2, 3)
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The mean over each cell.

        Args:
            inputs: [..., *space, features].

        Returns:
            [..., *output_shape, features], of the dtype of `inputs`.

        Raises:
            ShapeError: `inputs` have too few axes.
        """
        return adaptive_avg_pool(inputs, self.output_shape)


class AdaptiveMaxPool(_AdaptivePool):
    """`adaptive_max_pool` as a Module.

    Reference: He et al., 2014, Spatial Pyramid Pooling in Deep Convolutional Networks, arXiv:1406.4729.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.AdaptiveMaxPool((2, 2))(jnp.ones((1, 7, 9, 3))).shape
        (1, 2, 2, 3)
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The maximum over each cell.

        Args:
            inputs: [..., *space, features].

        Returns:
            [..., *output_shape, features], of the dtype of `inputs`.

        Raises:
            ShapeError: `inputs` have too few axes.
        """
        return adaptive_max_pool(inputs, self.output_shape)


class _GlobalPool(Module):
    """What the global layers share: how many axes are space, and whether they stay."""

    def __init__(self, *, spatial_rank: int | None = None, keepdims: bool = False) -> None:
        """Makes the layer.

        Args:
            spatial_rank: number of spatial axes; `None` takes all between the first and the last.
            keepdims: whether the spatial axes stay, with size 1.
        """
        self.spatial_rank = spatial_rank
        self.keepdims = keepdims


class GlobalAvgPool(_GlobalPool):
    """`global_avg_pool` as a Module.

    Reference: Lin et al., 2013, Network in Network, arXiv:1312.4400.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.GlobalAvgPool()(jnp.ones((4, 8, 8, 3))).shape
        (4, 3)
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The mean over all of space.

        Args:
            inputs: [batch, *space, features].

        Returns:
            [batch, features], or with axes of size 1 in the place of space if `keepdims`; of the dtype of `inputs`.

        Raises:
            ShapeError: `inputs` have too few axes.
        """
        return global_avg_pool(inputs, spatial_rank=self.spatial_rank, keepdims=self.keepdims)


class GlobalMaxPool(_GlobalPool):
    """`global_max_pool` as a Module.

    Reference: Lin et al., 2013, Network in Network, arXiv:1312.4400.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> nnx.GlobalMaxPool()(jnp.ones((4, 8, 8, 3))).shape
        (4, 3)
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The maximum over all of space.

        Args:
            inputs: [batch, *space, features].

        Returns:
            [batch, features], or with axes of size 1 in the place of space if `keepdims`; of the dtype of `inputs`.

        Raises:
            ShapeError: `inputs` have too few axes.
        """
        return global_max_pool(inputs, spatial_rank=self.spatial_rank, keepdims=self.keepdims)
