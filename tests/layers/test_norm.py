"""Norms against NumPy in float64: outputs, running statistics, masks, mapped axes, low precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx

TRAIN = {"use_running_average": False}


def standardize(x, axes, epsilon, where=None):
    x = x.astype(np.float64)
    where = np.broadcast_to(True if where is None else where, x.shape)
    mean = x.mean(axes, where=where, keepdims=True)
    var = x.var(axes, where=where, keepdims=True)
    return (x - mean) / np.sqrt(var + epsilon), mean, var


@pytest.mark.parametrize("axis", [-1, 1, 0])
@pytest.mark.parametrize("fast", [True, False])
def test_batch_norm_output(axis, fast, rng, init):
    x = rng.normal(2, 3, size=(6, 6, 6)).astype(np.float32)
    layer = nnx.BatchNorm(6, axis=axis, use_fast_variance=fast, ctx=nnx.context(0), scale_init=init, bias_init=init)
    shape = [1, 1, 1]
    shape[axis] = 6
    normal, _, _ = standardize(x, tuple(i for i in range(3) if i != axis % 3), 1e-5)
    expected = normal * np.asarray(layer.scale).reshape(shape) + np.asarray(layer.bias).reshape(shape)
    np.testing.assert_allclose(layer(jnp.asarray(x), **TRAIN), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("momentum", "dtype"), [(0.99, "float32"), (0.9, "float32"), (0.0, "float32"), (0.9, "float16"), (0.9, "bfloat16")]
)
def test_batch_norm_running_statistics_over_many_steps(momentum, dtype, rng):
    layer = nnx.BatchNorm(3, momentum=momentum, dtype=dtype, param_dtype=dtype, ctx=nnx.context(0))
    step = nnx.jit(lambda layer, x: layer(x, use_running_average=False))
    mean, var = np.zeros(3), np.ones(3)
    for i in range(200):
        x = rng.normal([0.0, 5.0, -2.0], [1.0, 0.1, 7.0], size=(16, 3)).astype(np.float32) * (1 + 0.01 * i)
        given = jnp.asarray(x, dtype)
        assert step(layer, given).dtype == dtype
        wide = np.asarray(given).astype(np.float64)  # of the very numbers that the layer sees, whatever their digits
        mean = momentum * mean + (1 - momentum) * wide.mean(0)
        var = momentum * var + (1 - momentum) * wide.var(0)
    np.testing.assert_allclose(layer.mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.var, var, rtol=2e-3)
    assert layer.mean.dtype == layer.var.dtype == jnp.float32
    if dtype != "float32":
        return
    x = rng.normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_allclose(
        layer(jnp.asarray(x), use_running_average=True), (x - mean) / np.sqrt(var + 1e-5), rtol=2e-3, atol=1e-4
    )


def test_batch_norm_evaluation_changes_nothing(rng):
    layer = nnx.BatchNorm(3, ctx=nnx.context(0))
    layer(jnp.asarray(rng.normal(size=(8, 3)).astype(np.float32)), **TRAIN)
    before = np.asarray(layer.mean), np.asarray(layer.var)
    layer(jnp.ones((8, 3)), use_running_average=True)
    np.testing.assert_array_equal(layer.mean, before[0])
    np.testing.assert_array_equal(layer.var, before[1])


def test_batch_norm_collections():
    layer = nnx.BatchNorm(3, ctx=nnx.context(0))
    (params, stats), _ = layer.partition(nnx.Param, nnx.BatchStat)
    assert set(params) == {("scale",), ("bias",)}
    assert set(stats) == {("mean",), ("var",)}
    bare = nnx.BatchNorm(3, use_bias=False, use_scale=False, ctx=nnx.context(0))
    assert bare.scale is None
    assert bare.bias is None
    np.testing.assert_allclose(bare(jnp.array([[1.0] * 3, [3.0] * 3]), **TRAIN), [[-1.0] * 3, [1.0] * 3], rtol=1e-4)


@pytest.mark.parametrize("call", [None, True, False])
@pytest.mark.parametrize("constructor", [None, True, False])
@pytest.mark.parametrize("flag", [None, True, False])
def test_flag_comes_from_call_then_constructor_then_context(call, constructor, flag):
    layer = nnx.BatchNorm(2, use_running_average=constructor, ctx=nnx.context(0))
    ctx = nnx.context(flags={} if flag is None else {"use_running_average": flag})
    first = next((value for value in (call, constructor, flag) if value is not None), None)
    x = jnp.arange(6.0).reshape(3, 2)
    if first is None:
        with pytest.raises(
            nnx.ContextError, match=r"BatchNorm: the flag `use_running_average` is not set.*no such flag"
        ):
            layer(x, call, ctx=ctx)
    else:
        layer(x, call, ctx=ctx)
        assert bool((layer.mean == 0).all()) == first


def test_flag_error_says_how_to_set_it():
    with pytest.raises(nnx.ContextError) as caught:
        nnx.BatchNorm(2, ctx=nnx.context(0))(jnp.ones((3, 2)))
    for remedy in (
        "no Context was passed",
        "`layer(x, use_running_average=True)`",
        "`nnx.BatchNorm(..., use_running_average=True)`",
        "`layer(x, ctx=nnx.context(flags=dict(use_running_average=True)))`",
    ):
        assert remedy in str(caught.value)


@pytest.mark.parametrize("fast", [True, False])
def test_batch_norm_mask(fast, rng):
    x = rng.normal(1, 2, size=(4, 5, 3)).astype(np.float32)
    real = rng.random((4, 5, 1)) < 0.6
    padded = np.where(real, x, np.nan)
    layer = nnx.BatchNorm(3, use_fast_variance=fast, momentum=0.5, ctx=nnx.context(0))
    y = layer(jnp.asarray(padded), mask=jnp.asarray(real), **TRAIN)
    normal, mean, var = standardize(x, (0, 1), 1e-5, where=real)
    keep = np.broadcast_to(real, x.shape)
    np.testing.assert_allclose(np.asarray(y)[keep], normal[keep], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.mean, 0.5 * mean.ravel(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.var, 0.5 + 0.5 * var.ravel(), rtol=1e-4)


def test_batch_norm_with_everything_masked_keeps_its_averages():
    layer = nnx.BatchNorm(2, ctx=nnx.context(0))
    y = layer(jnp.ones((3, 2)), mask=jnp.array([[True, False]] * 3), **TRAIN)
    assert bool(jnp.isfinite(y).all())
    np.testing.assert_allclose(layer.mean, [0.01, 0], rtol=1e-5)
    np.testing.assert_allclose(layer.var, [0.99, 1], rtol=1e-5)


def test_batch_norm_over_a_mapped_axis_is_that_of_the_whole_batch(rng):
    x = jnp.asarray(rng.normal(3, 2, size=(4, 5, 3)).astype(np.float32))
    real = jnp.asarray(rng.random((4, 5, 1)) < 0.5)

    def run(x, mask, axis_name, groups=None):
        layer = nnx.BatchNorm(3, axis_name=axis_name, axis_index_groups=groups, ctx=nnx.context(0))
        y = layer(x, mask=mask, **TRAIN)
        return y, layer.mean, layer.var

    for mask in (None, real):
        whole = run(x.reshape(20, 3), None if mask is None else mask.reshape(20, 1), None)
        mapped = jax.vmap(lambda x, m: run(x, m, "i"), axis_name="i", in_axes=(0, None if mask is None else 0))(x, mask)
        np.testing.assert_allclose(mapped[0].reshape(20, 3), whole[0], rtol=1e-4, atol=1e-5)
        for i in (1, 2):
            np.testing.assert_allclose(mapped[i], np.broadcast_to(whole[i], (4, 3)), rtol=1e-5, atol=1e-6)


def test_batch_norm_index_groups_are_static_tuples():
    layer = nnx.BatchNorm(3, axis_name="i", axis_index_groups=[[0, 1], [2, 3]], ctx=nnx.context(0))
    assert layer.axis_index_groups == ((0, 1), (2, 3))


def test_gradient_goes_through_the_statistics_of_the_batch(rng):
    x = jnp.asarray(rng.normal(size=(5, 2)).astype(np.float32))
    weights = jnp.asarray(rng.normal(size=(5, 2)).astype(np.float32))

    def ours(x):
        return (weights * nnx.BatchNorm(2, ctx=nnx.context(0))(x, **TRAIN)).sum()

    def plain(x):
        mean = x.mean(0, keepdims=True)
        var = ((x - mean) ** 2).mean(0, keepdims=True)
        return (weights * (x - mean) / jnp.sqrt(var + 1e-5)).sum()

    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-4, atol=1e-5)


def test_running_averages_stay_float32():
    layer = nnx.BatchNorm(2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, ctx=nnx.context(0))
    assert layer.scale.dtype == jnp.bfloat16
    layer(jnp.ones((4, 2), jnp.bfloat16), **TRAIN)
    assert layer.mean.dtype == layer.var.dtype == jnp.float32


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        layer = nnx.BatchNorm(2, param_dtype=jnp.float64, ctx=nnx.context(0))
        assert layer(jnp.ones((4, 2), jnp.float64), **TRAIN).dtype == jnp.float64
        assert layer.mean.dtype == jnp.float64
        single = nnx.BatchNorm(2, ctx=nnx.context(0))
        assert single(jnp.ones((4, 2), jnp.float64), **TRAIN).dtype == jnp.float64
        assert single.mean.dtype == jnp.float32


NORMS = {
    "BatchNorm": lambda **kw: nnx.BatchNorm(4, **TRAIN, **kw),
    "LayerNorm": lambda **kw: nnx.LayerNorm(4, **kw),
    "RMSNorm": lambda **kw: nnx.RMSNorm(4, **kw),
    "GroupNorm": lambda **kw: nnx.GroupNorm(4, 2, **kw),
    "InstanceNorm": lambda **kw: nnx.InstanceNorm(4, **kw),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", NORMS)
def test_no_nan_at_zero_variance(name, dtype):
    def run(x):
        return NORMS[name](dtype=dtype, ctx=nnx.context(0))(x)

    both = jax.jit(lambda x: (run(x), jax.grad(lambda x: run(x).sum().astype(jnp.float32))(x)))
    for value in (0.0, 3.0, 60000.0):
        for result in both(jnp.full((8, 4), value, dtype)):
            assert np.isfinite(np.asarray(result).astype(np.float32)).all()


@pytest.mark.parametrize("name", NORMS)
def test_half_precision_statistics_are_those_of_single(name, rng):
    x = jnp.asarray(rng.normal(100, 30, size=(64, 4)), jnp.float16)
    low = NORMS[name](dtype=jnp.float16, ctx=nnx.context(0))(x)
    single = NORMS[name](ctx=nnx.context(0))(x.astype(jnp.float32))
    np.testing.assert_array_equal(low, single.astype(jnp.float16))


def test_slow_variance_keeps_its_digits(rng):
    x = (1e4 + rng.normal(size=(64, 256))).astype(np.float32)
    normal, _, _ = standardize(x, (-1,), 1e-6)
    layer = nnx.LayerNorm(256, use_fast_variance=False, ctx=nnx.context(0))
    np.testing.assert_allclose(layer(jnp.asarray(x)), normal, atol=3e-3)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4)])
def test_layer_norm(shape, fast, rng, init):
    x = rng.normal(1, 2, size=shape).astype(np.float32)
    layer = nnx.LayerNorm(4, use_fast_variance=fast, ctx=nnx.context(0), scale_init=init, bias_init=init)
    normal, _, _ = standardize(x, (-1,), 1e-6)
    expected = normal * np.asarray(layer.scale) + np.asarray(layer.bias)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


def test_layer_norm_over_several_axes(rng, init):
    x = rng.normal(1, 2, size=(2, 3, 4)).astype(np.float32)
    normal, _, _ = standardize(x, (1, 2), 1e-6)
    layer = nnx.LayerNorm(
        (3, 4), reduction_axes=(-2, -1), feature_axes=(-2, -1), ctx=nnx.context(0), scale_init=init, bias_init=init
    )
    assert layer.scale.shape == (3, 4)
    expected = normal * np.asarray(layer.scale) + np.asarray(layer.bias)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)
    # Scale and bias along another axis than the reduced ones.
    layer = nnx.LayerNorm(3, reduction_axes=(1, 2), feature_axes=1, ctx=nnx.context(0), scale_init=init, bias_init=init)
    expected = normal * np.asarray(layer.scale)[:, None] + np.asarray(layer.bias)[:, None]
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


def test_rms_norm(rng, init):
    x = rng.normal(1, 2, size=(2, 3, 4)).astype(np.float32)
    layer = nnx.RMSNorm(4, scale_init=init, ctx=nnx.context(0))
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * np.asarray(layer.scale)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)
    assert layer.bias is None
    assert nnx.RMSNorm(4, use_scale=False, ctx=nnx.context(0)).scale is None


@pytest.mark.parametrize("shape", [(5, 6), (3, 7, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize(
    "options", [{"num_groups": 3}, {"num_groups": None, "group_size": 2}, {"num_groups": 1}, {"num_groups": 6}]
)
def test_group_norm(shape, options, rng, init):
    x = rng.normal(1, 2, size=shape).astype(np.float32)
    layer = nnx.GroupNorm(6, ctx=nnx.context(0), **options, scale_init=init, bias_init=init)
    grouped = x.reshape(shape[0], -1, layer.num_groups, layer.group_size)
    normal = standardize(grouped, (1, 3), 1e-6)[0].reshape(shape)
    expected = normal * np.asarray(layer.scale) + np.asarray(layer.bias)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


def test_group_norm_over_chosen_axes(rng):
    x = rng.normal(1, 2, size=(2, 3, 4, 6)).astype(np.float32)
    layer = nnx.GroupNorm(6, 3, reduction_axes=(2, -1), ctx=nnx.context(0))
    normal = standardize(x.reshape(2, 3, 4, 3, 2), (2, 4), 1e-6)[0].reshape(x.shape)
    np.testing.assert_allclose(layer(jnp.asarray(x)), normal, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm"])
def test_masks_leave_out_elements(name, rng):
    x = rng.normal(1, 2, size=(3, 5, 4)).astype(np.float32)
    if name == "GroupNorm":
        real = np.arange(5)[None, :, None] < np.array([1, 3, 5])[:, None, None]
    else:
        real = np.broadcast_to(np.arange(4) < 3, (1, 1, 4))
    padded = np.where(real, x, np.nan)
    y = NORMS[name](ctx=nnx.context(0))(jnp.asarray(padded), mask=jnp.asarray(real))
    keep = np.broadcast_to(real, x.shape)
    if name == "GroupNorm":
        grouped, where = x.reshape(3, 5, 2, 2), keep.reshape(3, 5, 2, 2)
        expected = standardize(grouped, (1, 3), 1e-6, where)[0].reshape(x.shape)
    elif name == "LayerNorm":
        expected = standardize(x, (-1,), 1e-6, keep)[0]
    else:
        expected = x / np.sqrt((x**2).mean(-1, where=keep, keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.asarray(y)[keep], expected[keep], rtol=1e-4, atol=1e-4)


def test_layer_norm_over_a_mapped_axis(rng):
    x = rng.normal(1, 2, size=(2, 3, 4)).astype(np.float32)
    normal, _, _ = standardize(x, (0, 2), 1e-6)

    def run(x):
        return nnx.LayerNorm(4, axis_name="i", ctx=nnx.context(0))(x)

    np.testing.assert_allclose(jax.vmap(run, axis_name="i")(jnp.asarray(x)), normal, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NORMS)
def test_wrong_features(name):
    with pytest.raises(nnx.ShapeError, match=rf"{name}: expected `x` .*4.*num_features.*got \(2, 3\)"):
        NORMS[name](ctx=nnx.context(0))(jnp.ones((2, 3)))


def test_wrong_options():
    ctx = nnx.context(0)
    with pytest.raises(nnx.ShapeError, match=r"BatchNorm: axis \(3,\) do not exist in an array with 2 dimensions"):
        nnx.BatchNorm(4, axis=3, ctx=ctx)(jnp.ones((2, 4)), **TRAIN)
    with pytest.raises(nnx.ShapeError, match=r"BatchNorm: `mask` of shape \(3,\) does not broadcast .* \(2, 4\)"):
        nnx.BatchNorm(4, ctx=ctx)(jnp.ones((2, 4)), mask=jnp.ones(3), **TRAIN)
    with pytest.raises(ValueError, match="must have the same length"):
        nnx.LayerNorm((3, 4), ctx=ctx)
    with pytest.raises(ValueError, match="in increasing order"):
        nnx.LayerNorm((3, 4), feature_axes=(-1, -2), ctx=ctx)
    with pytest.raises(ValueError, match="num_groups=4 does not divide num_features=6"):
        nnx.GroupNorm(6, 4, ctx=ctx)
    with pytest.raises(ValueError, match="either num_groups or group_size"):
        nnx.GroupNorm(6, 2, 3, ctx=ctx)
    with pytest.raises(ValueError, match="must contain the last axis"):
        nnx.GroupNorm(6, 2, reduction_axes=(1,), ctx=ctx)(jnp.ones((2, 3, 6)))


def test_a_mean_square_has_no_fast_way(rng):
    x, mask = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), jnp.asarray(rng.random((3, 4)) < 0.7)
    fast, slow = (nnx.RMSNorm(4, use_fast_variance=fast, ctx=nnx.context(0)) for fast in (True, False))
    np.testing.assert_array_equal(fast(x, mask), slow(x, mask=mask))
