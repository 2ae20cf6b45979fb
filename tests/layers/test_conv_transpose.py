"""ConvTranspose against kernels added up around each input, `jax.lax.conv_transpose`, and the transpose of Conv."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

import nnx

# One program to compile instead of one to an operation.
call = nnx.jit(lambda layer, x: layer(x))


def spread(value, rank):
    return (value,) * rank if isinstance(value, int) else value


def reference(x, kernel, *, strides, dilation, padding, transpose):
    """The sum in float64: every input adds the whole kernel to an empty canvas, of which the padding keeps a part."""
    rank = x.ndim - 2
    size, space = kernel.shape[:rank], x.shape[1:-1]
    kernel = np.swapaxes(kernel, -1, -2) if transpose else np.flip(kernel, tuple(range(rank)))
    extents = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    canvas = [(n - 1) * s + e for n, s, e in zip(space, strides, extents, strict=True)]
    y = np.zeros((x.shape[0], *canvas, kernel.shape[-1]))
    for place, offset in itertools.product(np.ndindex(space), np.ndindex(size)):
        at = tuple(p * s + k * d for p, s, k, d in zip(place, strides, offset, dilation, strict=True))
        y[(slice(None), *at)] += x[(slice(None), *place)].astype(np.float64) @ kernel[offset]
    for axis, (n, s, e) in enumerate(zip(space, strides, extents, strict=True), start=1):
        period, excess, have = n * s, max(e - s, 0), (n - 1) * s + e
        start, stop = {
            "SAME": (excess // 2, excess // 2 + period),
            "VALID": (0, period + excess),
            "CAUSAL": (0, period),
            "CIRCULAR": (0, have),
        }.get(padding) or (e - 1 - padding[axis - 1][0], (n - 1) * s + 1 + padding[axis - 1][1])
        taken = [y.take(j, axis) if 0 <= j < have else 0 * y.take(0, axis) for j in range(start, stop)]
        if padding == "CIRCULAR":
            before = (excess + transpose) // 2
            taken = [sum(taken[(j + before) % period :: period], 0 * taken[0]) for j in range(period)]
        y = np.stack(taken, axis)
    return y


GRID = [
    ((5,), (4,), 1, 1),
    ((4,), (3,), 2, 3),
    ((3,), (2,), 4, 1),
    ((3,), (7,), 2, 1),
    ((3, 4), (3, 2), (2, 1), (1, 2)),
    ((2, 3, 2), (2, 3, 1), (1, 2, 3), 1),
    ((2, 2, 3, 2), (2, 1, 2, 2), (2, 1, 1, 2), 1),
]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", "pairs"])
@pytest.mark.parametrize(("space", "size", "strides", "dilation"), GRID)
def test_ranks_paddings_strides_dilations(space, size, strides, dilation, padding, transpose, rng, both):
    rank = len(space)
    every, dilate = spread(strides, rank), spread(dilation, rank)
    if padding == "pairs":
        padding = tuple(((i + 2) % 3, (i + 1) % 3) for i in range(rank))
    layer = nnx.ConvTranspose(
        2,
        3,
        size,
        strides,
        padding=padding,
        kernel_dilation=dilation,
        transpose_kernel=transpose,
        ctx=nnx.context(0),
        **both,
    )
    assert layer.kernel.shape == (*size, *((3, 2) if transpose else (2, 3)))
    x = rng.normal(size=(2, *space, 2)).astype(np.float32)
    options = {"strides": every, "dilation": dilate, "padding": padding, "transpose": transpose}
    expected = reference(x, np.asarray(layer.kernel), **options) + np.asarray(layer.bias)
    y = call(layer, jnp.asarray(x))
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    if padding in ("SAME", "CIRCULAR"):
        assert y.shape[1:-1] == tuple(n * s for n, s in zip(space, every, strict=True))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 2), (2, 2)), ((2, 0), (0, 3))])
def test_is_that_of_lax(padding, transpose, normal, both):
    options = {"kernel_dilation": (2, 1), "transpose_kernel": transpose, **both}
    given = 2 if padding == ((2, 2), (2, 2)) else padding
    layer = nnx.ConvTranspose(2, 3, (3, 4), (3, 2), padding=given, ctx=nnx.context(0), **options)
    x = normal(2, 4, 5, 2)
    expected = lax.conv_transpose(
        x, layer.kernel, (3, 2), padding, rhs_dilation=(2, 1), transpose_kernel=transpose
    ) + layer.bias.reshape(1, 1, 1, 3)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("padding", "size", "strides", "dilation"),
    [
        ("SAME", 3, 1, 1),
        ("SAME", 4, 3, 1),
        ("VALID", 5, 2, 2),
        ("VALID", 2, 3, 1),
        ("CIRCULAR", 5, 1, 1),
        ("CIRCULAR", 5, 2, 1),
        ("CIRCULAR", 6, 2, 1),
        ("CIRCULAR", 6, 3, 1),
        ("CIRCULAR", 3, 2, 2),
    ],
)
def test_is_the_transpose_of_a_convolution(padding, size, strides, dilation, rng, both):
    options = {"padding": padding, "kernel_dilation": dilation, "use_bias": False}
    layer = nnx.ConvTranspose(2, 3, size, strides, transpose_kernel=True, ctx=nnx.context(0), **options, **both)
    conv = nnx.Conv(3, 2, size, strides, ctx=nnx.context(0), **options, **both)
    assert layer.kernel.shape == conv.kernel.shape
    conv.kernel = layer.kernel
    y = jnp.asarray(rng.normal(size=(2, 4, 2)).astype(np.float32))
    x = jnp.asarray(rng.normal(size=layer(y).shape).astype(np.float32))
    assert conv(x).shape == y.shape
    np.testing.assert_allclose(jnp.vdot(layer(y), x), jnp.vdot(y, conv(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "strides"), [(2, 1), (4, 1), (5, 3), (7, 4)])
def test_circular_is_else_the_transpose_rolled(size, strides, normal, both):
    options = {"padding": "CIRCULAR", "use_bias": False}
    layer = nnx.ConvTranspose(2, 3, size, strides, transpose_kernel=True, ctx=nnx.context(0), **options, **both)
    conv = nnx.Conv(3, 2, size, strides, ctx=nnx.context(0), **options, **both)
    conv.kernel = layer.kernel
    y = normal(1, 4, 2)
    _, transpose = jax.vjp(conv, jnp.zeros((1, 4 * strides, 3)))
    shift = (size - 1) // 2 - (max(size - strides, 0) + 1) // 2
    assert shift != 0
    np.testing.assert_allclose(layer(y), jnp.roll(transpose(y)[0], shift, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("transpose", [False, True])
def test_causal(transpose, strides, rng, both):
    options = {"padding": "CAUSAL", "kernel_dilation": 2, "transpose_kernel": transpose}
    layer = nnx.ConvTranspose(2, 3, 3, strides, **options, ctx=nnx.context(0), **both)
    x = rng.normal(size=(2, 6, 2)).astype(np.float32)
    rest = {"strides": (strides,), "dilation": (2,), "padding": "CAUSAL", "transpose": transpose}
    y = layer(jnp.asarray(x))
    np.testing.assert_allclose(
        y, reference(x, np.asarray(layer.kernel), **rest) + np.asarray(layer.bias), rtol=1e-4, atol=1e-4
    )
    later = x.copy()
    later[:, 4:] = 7
    changed = np.abs(np.asarray(layer(jnp.asarray(later)) - y)).max((0, 2))
    np.testing.assert_array_equal(changed[: 4 * strides], 0)
    assert changed[4 * strides] > 0


def test_circular_commutes_with_rolling(normal, both):
    layer = nnx.ConvTranspose(2, 3, (4, 7), (2, 3), padding="CIRCULAR", ctx=nnx.context(0), **both)
    x = normal(1, 3, 2, 2)
    rolled = layer(jnp.roll(x, (1, 1), (1, 2)))
    np.testing.assert_allclose(rolled, jnp.roll(layer(x), (2, 3), (1, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR", "CAUSAL", [(1, 0)]])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 0)])
def test_any_number_of_batch_axes(batch, padding, normal, both):
    layer = nnx.ConvTranspose(2, 3, 3, 2, padding=padding, ctx=nnx.context(0), **both)
    x = normal(*batch, 4, 2)
    y = layer(x)
    assert y.shape[:-2] == batch
    for index in np.ndindex(batch):
        np.testing.assert_allclose(y[index], layer(x[index]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transpose", [False, True])
def test_mask_multiplies_the_kernel_and_its_gradient(transpose, normal, both):
    mask = np.tril(np.ones((3, 3, 3)))[:, :2] if not transpose else np.tril(np.ones((3, 3, 2)))
    options = {"transpose_kernel": transpose, **both}
    layer = nnx.ConvTranspose(2, 3, 3, mask=mask, ctx=nnx.context(0), **options)
    plain = nnx.ConvTranspose(2, 3, 3, ctx=nnx.context(0), **options)
    plain.kernel = plain.kernel * jnp.asarray(mask, jnp.float32)
    x = normal(2, 8, 2)
    np.testing.assert_allclose(layer(x), plain(x), rtol=1e-6)
    gradient = np.asarray(nnx.grad(lambda m: (m(x) ** 2).sum(), wrt=nnx.Param)(layer)["kernel"].value)
    np.testing.assert_array_equal(gradient != 0, mask != 0)


def test_without_bias(both):
    layer = nnx.ConvTranspose(2, 3, 3, use_bias=False, ctx=nnx.context(0), **both)
    assert layer.bias is None
    np.testing.assert_array_equal(layer(jnp.zeros((1, 5, 2))), 0)


@pytest.mark.parametrize("transpose", [False, True])
def test_fan_in_counts_inputs_and_the_receptive_field(transpose):
    layer = nnx.ConvTranspose(20, 400, (3, 3), transpose_kernel=transpose, ctx=nnx.context(0))
    assert float(jnp.var(layer.kernel)) == pytest.approx(1 / (9 * 20), rel=0.05)


def test_metadata_is_about_the_kernel_as_it_is(init):
    named = nnx.with_metadata(init, sharding=(None, "out", "in"))
    layer = nnx.ConvTranspose(2, 3, 4, transpose_kernel=True, kernel_init=named, ctx=nnx.context(0))
    assert layer.get_variable("kernel").sharding == (None, "out", "in")
    assert layer.kernel.shape == (4, 3, 2)


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
@pytest.mark.parametrize("padding", ["CIRCULAR", "CAUSAL"])
def test_half_precision_with_a_mask(padding, low, normal, both):
    options = {"padding": padding, "mask": np.ones((5, 3, 4)), "transpose_kernel": True, **both}
    x = normal(2, 3, 4)
    exact = nnx.ConvTranspose(4, 3, 5, 2, ctx=nnx.context(0), **options)(x)
    layer = nnx.ConvTranspose(4, 3, 5, 2, param_dtype=low, ctx=nnx.context(0), **options)
    with jax.numpy_dtype_promotion("strict"):
        y = layer(x.astype(low))
    assert y.dtype == layer.kernel.dtype == low
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.05, rtol=0.05)


def test_precision_reaches_the_products(both):
    layer = nnx.ConvTranspose(2, 3, 3, precision="highest", ctx=nnx.context(0), **both)
    assert "HIGHEST" in str(jax.make_jaxpr(lambda x: nnx.ConvTranspose.__call__(layer, x))(jnp.ones((1, 5, 2))))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
def test_gradients_by_finite_differences(padding, transpose, rng, both):
    with jax.enable_x64(True):
        options = {"padding": padding, "transpose_kernel": transpose, "param_dtype": jnp.float64}
        layer = nnx.ConvTranspose(2, 3, 4, 2, ctx=nnx.context(0), **options, **both)
        state, definition = layer.partition()
        x = jnp.asarray(rng.normal(size=(1, 3, 2)))
        run = jax.jit(lambda state, x: definition.merge(state)(x))
        check_grads(run, (state, x), order=1, modes=("rev",), rtol=1e-6)


def test_defaults_are_steps_of_one(normal, both):
    x = normal(2, 5, 2)
    layers = [
        nnx.ConvTranspose(2, 3, 4, **options, ctx=nnx.context(0), **both)
        for options in ({}, {"strides": 1, "kernel_dilation": 1, "padding": "same"})
    ]
    np.testing.assert_array_equal(*(layer(x) for layer in layers))


@pytest.mark.parametrize("shape", [(8, 8, 2), (8, 3), (2, 8, 8, 4), (3,)])
def test_wrong_inputs(shape, both):
    layer = nnx.ConvTranspose(3, 4, (3, 3), ctx=nnx.context(0), **both)
    wanted = (
        r"ConvTranspose: expected `inputs` of shape \[\.\.\., space, space, 3\]"
        r" \(kernel_size=\(3, 3\), in_features=3\), got \("
    )
    with pytest.raises(nnx.ShapeError, match=wanted):
        layer(jnp.ones(shape))


def test_nothing_to_repeat(both):
    layer = nnx.ConvTranspose(3, 4, 3, padding="CIRCULAR", ctx=nnx.context(0), **both)
    with pytest.raises(nnx.ShapeError, match=r"ConvTranspose: CIRCULAR padding repeats .* got \(1, 0, 3\)"):
        layer(jnp.ones((1, 0, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "CAUSAL"}, "ConvTranspose: CAUSAL padding needs one spatial axis"),
        ({"padding": "REFLECT"}, "unknown padding 'REFLECT': use one of CAUSAL, CIRCULAR, SAME, VALID, an int, or"),
        ({"padding": [(1, 1)]}, "ConvTranspose: padding needs .* for each of 2 spatial dimensions"),
        ({"kernel_size": (3, 0)}, r"ConvTranspose: kernel_size must be positive, got \(3, 0\)"),
        ({"strides": (1, 2, 3)}, "ConvTranspose: strides needs an int or 2 ints"),
        ({"strides": (1, 0)}, r"ConvTranspose: strides must be positive, got \(1, 0\)"),
        ({"kernel_dilation": (2,)}, "ConvTranspose: kernel_dilation needs an int or 2 ints"),
        ({"mask": np.ones((3, 3))}, r"expected `mask` of the kernel's shape \(3, 3, 3, 4\), got \(3, 3\)"),
        (
            {"kernel_init": lambda *_: jnp.ones((3, 3, 4, 3)), "transpose_kernel": True},
            r"ConvTranspose: expected the initializer to make an array of the shape \(3, 3, 3, 4\) that it was",
        ),
    ],
)
def test_wrong_options(options, message, both):
    with pytest.raises(ValueError, match=message):
        nnx.ConvTranspose(3, 4, ctx=nnx.context(0), **{"kernel_size": (3, 3)} | both | options)
