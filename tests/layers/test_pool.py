"""Pooling against loops over windows."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


def windows(shape, size, strides, pads):
    """The slices of each window, clipped to the array, as index tuples into the output and the input."""
    counts = [(n + lo + hi - k) // s + 1 for n, k, s, (lo, hi) in zip(shape, size, strides, pads, strict=True)]
    for out in itertools.product(*map(range, counts)):
        starts = [i * s - lo for i, s, (lo, _) in zip(out, strides, pads, strict=True)]
        inside = tuple(slice(max(a, 0), min(a + k, n)) for a, k, n in zip(starts, size, shape, strict=True))
        yield out, inside


def reference(x, size, strides, pads, reduce):
    space = x.shape[1:-1]
    cells = {
        out: reduce(x[(slice(None), *inside)].astype(np.float64)) for out, inside in windows(space, size, strides, pads)
    }
    shape = [max(index[axis] for index in cells) + 1 for axis in range(len(space))]
    y = np.zeros((x.shape[0], *shape, x.shape[-1]))
    for out, value in cells.items():
        y[(slice(None), *out)] = value
    return y


def same_pads(shape, size, strides):
    totals = [max((math.ceil(n / s) - 1) * s + k - n, 0) for n, k, s in zip(shape, size, strides, strict=True)]
    return [(t // 2, t - t // 2) for t in totals]


GRID = [((9,), (3,), (2,)), ((6, 7), (2, 3), (1, 1)), ((6, 7), (3, 2), (3, 2)), ((4, 5, 6), (2, 2, 2), (2, 1, 2))]


@pytest.mark.parametrize("padding", ["VALID", "SAME", 1])
@pytest.mark.parametrize(("space", "size", "strides"), GRID)
def test_windows(space, size, strides, padding, rng):
    x = rng.normal(size=(2, *space, 3)).astype(np.float32)
    rank = len(space)
    pads = {"VALID": [(0, 0)] * rank, "SAME": same_pads(space, size, strides), 1: [(1, 1)] * rank}[padding]
    axes = tuple(range(1, rank + 1))
    volume = math.prod(size)
    for function, module, options, reduce in [
        (nnx.max_pool, nnx.MaxPool, {}, lambda w: w.max(axes)),
        (nnx.min_pool, nnx.MinPool, {}, lambda w: w.min(axes)),
        (nnx.avg_pool, nnx.AvgPool, {}, lambda w: w.sum(axes) / volume),
        (nnx.avg_pool, nnx.AvgPool, {"count_include_pad": False}, lambda w: w.mean(axes)),
    ]:
        expected = reference(x, size, strides, pads, reduce)
        y = function(jnp.asarray(x), size, strides, padding, **options)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(module(size, strides, padding, **options)(jnp.asarray(x)), y)


def test_strides_are_one_by_default():
    x = jnp.arange(5.0).reshape(1, 5, 1)
    np.testing.assert_array_equal(nnx.max_pool(x, 3).ravel(), [2, 3, 4])
    np.testing.assert_array_equal(nnx.MaxPool(3)(x).ravel(), [2, 3, 4])


def test_explicit_pairs():
    x = jnp.arange(1.0, 5.0).reshape(1, 4, 1)
    np.testing.assert_array_equal(nnx.avg_pool(x, 2, 2, [(1, 1)]).ravel(), [0.5, 2.5, 2.0])
    np.testing.assert_array_equal(nnx.avg_pool(x, 2, 2, [(1, 1)], count_include_pad=False).ravel(), [1, 2.5, 4])
    np.testing.assert_array_equal(nnx.max_pool(-x, 2, 2, [(1, 1)]).ravel(), [-1, -2, -4])


def test_window_of_padding_alone_is_zero_and_not_nan():
    x = jnp.ones((1, 2, 1))
    np.testing.assert_array_equal(nnx.avg_pool(x, 2, 2, [(2, 0)], count_include_pad=False).ravel(), [0, 1])


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)])
@pytest.mark.parametrize("options", [{}, {"padding": "SAME", "count_include_pad": False}])
def test_any_number_of_batch_axes(batch, options, rng):
    x = jnp.asarray(rng.normal(size=(*batch, 6, 6, 2)).astype(np.float32))
    y = nnx.avg_pool(x, (3, 3), **options)
    for index in np.ndindex(batch):
        np.testing.assert_allclose(y[index], nnx.avg_pool(x[index], (3, 3), **options), rtol=1e-6)
    assert y.shape[:-3] == batch


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32", "uint8"])
def test_dtypes(dtype):
    x = jnp.arange(6).astype(dtype).reshape(1, 6, 1)
    with jax.numpy_dtype_promotion("strict"):
        assert nnx.max_pool(x, 2, padding="SAME").dtype == nnx.min_pool(x, 2, padding="SAME").dtype == dtype
        means = nnx.avg_pool(x, 2)
        assert nnx.adaptive_max_pool(x, 2).dtype == nnx.global_max_pool(x).dtype == dtype
        wide = nnx.adaptive_avg_pool(x, 2), nnx.global_avg_pool(x)
    assert means.dtype == (dtype if "float" in dtype else "float32")
    assert {y.dtype for y in wide} == {means.dtype}
    np.testing.assert_array_equal(means.ravel().astype(jnp.float32), [0.5, 1.5, 2.5, 3.5, 4.5])
    np.testing.assert_array_equal(nnx.max_pool(x, 2, padding="SAME").ravel(), jnp.array([1, 2, 3, 4, 5, 5], dtype))
    np.testing.assert_array_equal(nnx.min_pool(x, 2, padding=[(1, 0)]).ravel(), jnp.array([0, 0, 1, 2, 3, 4], dtype))


def test_sums_of_half_precision_keep_their_digits():
    x = jnp.full((1, 4096, 1), 1.0, jnp.bfloat16)
    assert float(nnx.avg_pool(x, 4096)[0, 0, 0]) == 1
    assert float(nnx.global_avg_pool(x)[0, 0]) == 1
    assert float(nnx.adaptive_avg_pool(x, 1)[0, 0, 0]) == 1


@pytest.mark.parametrize(("space", "cells"), [((8,), (4,)), ((7,), (3,)), ((5, 7), (5, 2)), ((6, 5, 4), (4, 5, 1))])
def test_adaptive(space, cells, rng):
    x = rng.normal(size=(2, *space, 3)).astype(np.float32)
    axes = tuple(range(1, len(space) + 1))
    bounds = [[(i * n // m, -(-(i + 1) * n // m)) for i in range(m)] for n, m in zip(space, cells, strict=True)]
    for function, module, reduce in [
        (nnx.adaptive_avg_pool, nnx.AdaptiveAvgPool, np.mean),
        (nnx.adaptive_max_pool, nnx.AdaptiveMaxPool, np.max),
    ]:
        expected = np.zeros((2, *cells, 3))
        for index in np.ndindex(*cells):
            box = tuple(slice(*bounds[axis][i]) for axis, i in enumerate(index))
            expected[(slice(None), *index)] = reduce(x[(slice(None), *box)], axis=axes)
        np.testing.assert_allclose(function(jnp.asarray(x), cells), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(module(cells)(jnp.asarray(x)), function(jnp.asarray(x), cells))


def test_global(rng):
    x = rng.normal(size=(2, 3, 4, 5, 6)).astype(np.float32)
    for function, module, reduce in [
        (nnx.global_avg_pool, nnx.GlobalAvgPool, np.mean),
        (nnx.global_max_pool, nnx.GlobalMaxPool, np.max),
    ]:
        np.testing.assert_allclose(function(jnp.asarray(x)), reduce(x, (1, 2, 3)), rtol=1e-5, atol=1e-6)
        kept = function(jnp.asarray(x), spatial_rank=2, keepdims=True)
        np.testing.assert_allclose(kept, reduce(x, (2, 3), keepdims=True), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(module(spatial_rank=2, keepdims=True)(jnp.asarray(x)), kept)


@pytest.mark.parametrize("function", [nnx.avg_pool, nnx.max_pool, nnx.min_pool, nnx.adaptive_avg_pool])
def test_gradients(function):
    x = jnp.arange(8.0).reshape(1, 8, 1)
    gradient = jax.grad(lambda x: function(x, 2).sum())(x)
    assert bool(jnp.isfinite(gradient).all())
    assert float(gradient.sum()) == pytest.approx(function(x, 2).size)


def test_errors():
    with pytest.raises(
        nnx.ShapeError, match=r"max_pool: expected `inputs` of shape \[\.\.\., space, space, features\]"
    ):
        nnx.max_pool(jnp.ones((4, 4)), (2, 2))
    with pytest.raises(nnx.ShapeError, match="cannot split 3 elements of axis 1 into 4 cells"):
        nnx.adaptive_avg_pool(jnp.ones((1, 3, 1)), 4)
    with pytest.raises(
        nnx.ShapeError, match=r"global_avg_pool: expected `inputs` with at least one axis.*got \(2, 3\)"
    ):
        nnx.global_avg_pool(jnp.ones((2, 3)))
    with pytest.raises(nnx.ShapeError, match="global_max_pool: expected `inputs` with 2 spatial axes and features"):
        nnx.global_max_pool(jnp.ones((2, 3)), spatial_rank=2)
    with pytest.raises(ValueError, match="unknown padding 'CIRCULAR': use one of SAME, SAME_LOWER, VALID"):
        nnx.MaxPool(2, padding="CIRCULAR")
    with pytest.raises(ValueError, match="MaxPool: strides needs an int or 2 ints"):
        nnx.MaxPool((2, 2), strides=(1, 1, 1))
