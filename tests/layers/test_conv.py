"""Conv against a direct sum over the kernel's elements."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import nnx


def reference(x, kernel, bias, *, strides, pads, dilation, groups=1, mode="constant"):
    """Cross-correlation of [batch, *space, features] in float64, one kernel element at a time."""
    rank = x.ndim - 2
    x = np.pad(x.astype(np.float64), [(0, 0), *pads, (0, 0)], mode=mode)
    size = kernel.shape[:rank]
    extents = [(k - 1) * d for k, d in zip(size, dilation, strict=True)]
    out = [(n - e - 1) // s + 1 for n, e, s in zip(x.shape[1:-1], extents, strides, strict=True)]
    per_in, per_out = kernel.shape[-2], kernel.shape[-1] // groups
    y = np.zeros((x.shape[0], *out, kernel.shape[-1]))
    for offset in itertools.product(*map(range, size)):
        window = tuple(
            slice(o * d, o * d + (n - 1) * s + 1, s) for o, d, n, s in zip(offset, dilation, out, strides, strict=True)
        )
        patch = x[(slice(None), *window)]
        for g in range(groups):
            ins, outs = slice(g * per_in, (g + 1) * per_in), slice(g * per_out, (g + 1) * per_out)
            y[..., outs] += patch[..., ins] @ kernel[offset][:, outs].astype(np.float64)
    return y + (0 if bias is None else bias)


def same_pads(shape, size, strides, dilation):
    pads = []
    for n, k, s, d in zip(shape, size, strides, dilation, strict=True):
        total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pads.append((total // 2, total - total // 2))
    return pads


def check(layer, x, **options):
    expected = reference(x, np.asarray(layer.kernel), None if layer.bias is None else np.asarray(layer.bias), **options)
    y = layer(jnp.asarray(x))
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


GRID = [
    ((11,), (4,), 1, 1),
    ((11,), (3,), 2, 3),
    ((7, 8), (3, 2), 1, 1),
    ((7, 8), (3, 2), (2, 1), (1, 2)),
    ((5, 6, 4), (2, 3, 1), (1, 2, 3), 1),
    ((5, 4, 3, 4), (2, 1, 2, 2), 1, 1),
]


def spread(value, rank):
    return (value,) * rank if isinstance(value, int) else value


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", "REFLECT", 1, "pairs"])
@pytest.mark.parametrize(("space", "size", "strides", "dilation"), GRID)
def test_ranks_paddings_strides_dilations(space, size, strides, dilation, padding, rng, both):
    rank = len(space)
    every, dilate = spread(strides, rank), spread(dilation, rank)
    extents = [(k - 1) * d for k, d in zip(size, dilate, strict=True)]
    if padding == "pairs":
        padding = [(i % 3, (i + 1) % 3) for i in range(rank)]
    pads = {
        "SAME": same_pads(space, size, every, dilate),
        "VALID": [(0, 0)] * rank,
        "CIRCULAR": [(e // 2, e - e // 2) for e in extents],
        "REFLECT": [(e // 2, e - e // 2) for e in extents],
        1: [(1, 1)] * rank,
    }.get(padding if isinstance(padding, str | int) else None, padding)
    layer = nnx.Conv(2, 3, size, strides, padding=padding, kernel_dilation=dilation, ctx=nnx.context(0), **both)
    mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}.get(padding if isinstance(padding, str) else None, "constant")
    x = rng.normal(size=(2, *space, 2)).astype(np.float32)
    check(layer, x, strides=every, pads=pads, dilation=dilate, mode=mode)


@pytest.mark.parametrize("dilation", [1, 2])
def test_causal(dilation, rng, both):
    layer = nnx.Conv(2, 3, 3, padding="CAUSAL", kernel_dilation=dilation, ctx=nnx.context(0), **both)
    x = rng.normal(size=(2, 10, 2)).astype(np.float32)
    check(layer, x, strides=(1,), pads=[(2 * dilation, 0)], dilation=(dilation,))
    later = x.copy()
    later[:, 6:] = 7
    np.testing.assert_array_equal(layer(jnp.asarray(x))[:, :6], layer(jnp.asarray(later))[:, :6])


@pytest.mark.parametrize(("n_in", "n_out", "groups"), [(4, 6, 2), (4, 4, 4), (4, 8, 4)])
def test_groups(n_in, n_out, groups, rng, both):
    layer = nnx.Conv(n_in, n_out, (3, 3), feature_group_count=groups, ctx=nnx.context(0), **both)
    assert layer.kernel.shape == (3, 3, n_in // groups, n_out)
    x = rng.normal(size=(2, 5, 6, n_in)).astype(np.float32)
    check(layer, x, strides=(1, 1), pads=[(1, 1), (1, 1)], dilation=(1, 1), groups=groups)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CAUSAL", "CIRCULAR", "REFLECT", 1, [(2, 1)]])
@pytest.mark.parametrize(("size", "strides", "dilation", "gap"), [(4, 1, 1, 2), (3, 2, 2, 3)])
def test_input_dilation_puts_zeros_between_inputs(size, strides, dilation, gap, padding, rng, both):
    options = {"padding": padding, "kernel_dilation": dilation, **both}
    layer = nnx.Conv(2, 3, size, strides, input_dilation=gap, ctx=nnx.context(0), **options)
    x = rng.normal(size=(1, 5, 2)).astype(np.float32)
    # A period has a gap after its last element too.
    spaced = np.zeros((1, 5 * gap if padding == "CIRCULAR" else 4 * gap + 1, 2), np.float32)
    spaced[:, ::gap] = x
    plain = nnx.Conv(2, 3, size, strides, ctx=nnx.context(0), **options)
    np.testing.assert_allclose(layer(jnp.asarray(x)), plain(jnp.asarray(spaced)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR", "REFLECT", ((1, 0), 2)])
def test_everything_at_once(padding, rng, both):
    options = {"padding": padding, "kernel_dilation": (1, 2), "feature_group_count": 2}
    layer = nnx.Conv(4, 6, (3, 2), (2, 1), input_dilation=(2, 3), **options, ctx=nnx.context(0), **both)
    x = rng.normal(size=(2, 4, 3, 4)).astype(np.float32)
    full = (8, 9) if padding == "CIRCULAR" else (7, 7)
    spaced = np.zeros((2, *full, 4), np.float32)
    spaced[:, ::2, ::3] = x
    pads = {"SAME": same_pads(full, (3, 2), (2, 1), (1, 2)), ((1, 0), 2): [(1, 0), (2, 2)]}.get(padding, [(1, 1)] * 2)
    mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}.get(padding, "constant")
    kernel, bias = np.asarray(layer.kernel), np.asarray(layer.bias)
    expected = reference(spaced, kernel, bias, strides=(2, 1), pads=pads, dilation=(1, 2), groups=2, mode=mode)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", [np.int64(1), [np.int32(1)], np.array([[1, 1]]), [1], ((1, 1),)])
def test_padding_by_numbers(padding, normal, both):
    x = normal(2, 6, 2)
    expected = nnx.Conv(2, 3, 3, padding=1, ctx=nnx.context(0), **both)(x)
    np.testing.assert_array_equal(nnx.Conv(2, 3, 3, padding=padding, ctx=nnx.context(0), **both)(x), expected)


@pytest.mark.parametrize(("padding", "mode"), [("CIRCULAR", "wrap"), ("REFLECT", "reflect")])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_kernel_longer_than_its_inputs_repeats_them(n, padding, mode, rng, both):
    layer = nnx.Conv(2, 3, 8, padding=padding, ctx=nnx.context(0), **both)
    x = rng.normal(size=(1, n, 2)).astype(np.float32)
    check(layer, x, strides=(1,), pads=[(3, 4)], dilation=(1,), mode=mode)


def test_same_lower_puts_the_odd_element_before(rng, both):
    layer = nnx.Conv(2, 3, 4, padding="SAME_LOWER", ctx=nnx.context(0), **both)
    check(layer, rng.normal(size=(1, 9, 2)).astype(np.float32), strides=(1,), pads=[(2, 1)], dilation=(1,))


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR", "CAUSAL", [(1, 0)]])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 0)])
def test_any_number_of_batch_axes(batch, padding, rng, both):
    layer = nnx.Conv(2, 3, 3, padding=padding, ctx=nnx.context(0), **both)
    x = jnp.asarray(rng.normal(size=(*batch, 8, 2)).astype(np.float32))
    y = layer(x)
    assert y.shape[:-2] == batch
    if x.size:
        for index in np.ndindex(batch):
            np.testing.assert_allclose(y[index], layer(x[index]), rtol=1e-5, atol=1e-6)


def test_mask_multiplies_the_kernel_and_its_gradient(rng, both):
    mask = np.tril(np.ones((3, 2, 3)))
    layer = nnx.Conv(2, 3, 3, mask=mask, ctx=nnx.context(0), **both)
    x = jnp.asarray(rng.normal(size=(2, 8, 2)).astype(np.float32))
    plain = nnx.Conv(2, 3, 3, ctx=nnx.context(0), **both)
    plain.kernel = plain.kernel * jnp.asarray(mask, jnp.float32)
    np.testing.assert_allclose(layer(x), plain(x), rtol=1e-6)
    gradients = nnx.grad(lambda layer: (layer(x) ** 2).sum(), wrt=nnx.Param)(layer)
    np.testing.assert_array_equal(np.asarray(gradients["kernel"].value)[mask == 0], 0)
    assert np.all(np.asarray(gradients["kernel"].value)[mask == 1] != 0)


def test_without_bias(both):
    layer = nnx.Conv(2, 3, 3, use_bias=False, ctx=nnx.context(0), **both)
    assert layer.bias is None
    np.testing.assert_array_equal(layer(jnp.zeros((1, 5, 2))), 0)


def test_fan_in_counts_the_receptive_field():
    layer = nnx.Conv(50, 100, (3, 3), ctx=nnx.context(0))
    assert float(jnp.var(layer.kernel)) == pytest.approx(1 / (9 * 50), rel=0.05)


def test_fan_in_is_that_of_a_group():
    layer = nnx.Conv(40, 400, (3, 3), feature_group_count=4, ctx=nnx.context(0))
    assert float(jnp.var(layer.kernel)) == pytest.approx(1 / (9 * 10), rel=0.05)


def test_precision_reaches_the_products(both):
    layer = nnx.Conv(2, 3, 3, precision="highest", ctx=nnx.context(0), **both)
    assert "HIGHEST" in str(jax.make_jaxpr(lambda x: nnx.Conv.__call__(layer, x))(jnp.ones((1, 5, 2))))


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
@pytest.mark.parametrize("padding", ["CIRCULAR", "CAUSAL"])
def test_half_precision_with_a_mask(padding, low, normal, both):
    options = {"padding": padding, "mask": np.tril(np.ones((3, 4, 3))), **both}
    x = normal(2, 6, 4)
    exact = nnx.Conv(4, 3, 3, ctx=nnx.context(0), **options)(x)
    layer = nnx.Conv(4, 3, 3, param_dtype=low, ctx=nnx.context(0), **options)
    with jax.numpy_dtype_promotion("strict"):
        y = layer(x.astype(low))
    assert y.dtype == layer.kernel.dtype == low
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.05, rtol=0.05)


def test_options_are_static_and_a_second_model_compiles_nothing(both):
    traces = []

    @nnx.jit
    def run(layer, x):
        traces.append(1)
        return layer(x)

    for strides, padding in [([1, 2], [1, (0, 1)]), ((1, 2), ((1, 1), (0, 1)))]:
        run(nnx.Conv(1, 2, [3, 3], strides, padding=padding, ctx=nnx.context(0), **both), jnp.ones((1, 8, 8, 1)))
    assert len(traces) == 1


@pytest.mark.parametrize("padding", ["SAME", "CAUSAL", "CIRCULAR", "REFLECT"])
def test_gradients_by_finite_differences(padding, rng, both):
    with jax.enable_x64(True):
        options = {"padding": padding, "strides": 2, "input_dilation": 2, "feature_group_count": 2}
        layer = nnx.Conv(2, 4, 3, param_dtype=jnp.float64, ctx=nnx.context(0), **options, **both)
        state, definition = layer.partition()
        x = jnp.asarray(rng.normal(size=(1, 4, 2)))
        run = jax.jit(lambda state, x: definition.merge(state)(x))
        check_grads(run, (state, x), order=1, modes=("rev",), rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8, 2), (8, 3), (2, 8, 8, 4), (3,)])
def test_wrong_inputs(shape, both):
    layer = nnx.Conv(3, 4, (3, 3), ctx=nnx.context(0), **both)
    wanted = (
        r"Conv: expected `inputs` of shape \[\.\.\., space, space, 3\] \(kernel_size=\(3, 3\), in_features=3\), got \("
    )
    with pytest.raises(nnx.ShapeError, match=wanted):
        layer(jnp.ones(shape))


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT"])
def test_nothing_to_repeat(padding, both):
    layer = nnx.Conv(3, 4, (3, 3), padding=padding, ctx=nnx.context(0), **both)
    with pytest.raises(nnx.ShapeError, match=rf"Conv: {padding} padding repeats .* got \(1, 5, 0, 3\)"):
        layer(jnp.ones((1, 5, 0, 3)))


@pytest.mark.parametrize("padding", ["SAME", "VALID", 1])
def test_empty_space(padding, both):
    layer = nnx.Conv(3, 4, 3, padding=padding, ctx=nnx.context(0), **both)
    assert layer(jnp.ones((2, 0, 3))).shape == (2, 0, 4)
    dilated = nnx.Conv(3, 4, 3, padding=padding, input_dilation=2, ctx=nnx.context(0), **both)
    assert dilated(jnp.ones((2, 0, 3))).shape == (2, 0, 4)


def test_errors_name_the_subclass():
    class Stem(nnx.Conv):
        pass

    with pytest.raises(ValueError, match="Stem: strides must be positive"):
        Stem(3, 4, 3, 0, ctx=nnx.context(0))
    with pytest.raises(ValueError, match="Stem: unknown padding 'FULL'"):
        Stem(3, 4, 3, padding="FULL", ctx=nnx.context(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "CAUSAL"}, "CAUSAL padding needs one spatial axis"),
        ({"padding": "FULL"}, "unknown padding 'FULL': use one of CAUSAL, CIRCULAR, REFLECT, SAME, SAME_LOWER, VALID"),
        ({"padding": [(1, 1)]}, "for each of 2 spatial dimensions"),
        ({"padding": [(1, 1, 1), (1, 1)]}, "for each of 2 spatial dimensions"),
        ({"padding": [1.5, 1]}, "Conv: padding needs an int, or .* for each of 2 spatial dimensions, got"),
        ({"padding": None}, "Conv: padding needs an int, .* got None"),
        ({"padding": ["SAME", "VALID"]}, "Conv: padding needs an int, .* got"),
        ({"strides": 0}, r"Conv: strides must be positive, got \(0, 0\)"),
        ({"input_dilation": (1, -1)}, r"Conv: input_dilation must be positive, got \(1, -1\)"),
        ({"feature_group_count": 0}, "Conv: feature_group_count must be positive, got 0"),
        ({"strides": (1, 2, 3)}, "strides needs an int or 2 ints"),
        ({"kernel_dilation": (2,)}, "kernel_dilation needs an int or 2 ints"),
        ({"feature_group_count": 2}, "feature_group_count=2 must divide in_features=3 and out_features=4"),
        ({"mask": np.ones((3, 3))}, r"expected `mask` of the kernel's shape \(3, 3, 3, 4\), got \(3, 3\)"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        nnx.Conv(3, 4, (3, 3), ctx=nnx.context(0), **options)
