"""WeightNorm and SpectralNorm against NumPy in float64: weights, statistics, gradients, and layers left as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import nnx


@pytest.fixture
def linear(both):
    def make(**options):
        return nnx.Linear(3, 4, **both, **options, ctx=nnx.context(0))

    return make


class Block(nnx.Module):
    """A layer with everything that a wrapped one may have: submodules, running averages, captures, and `ctx`."""

    def __init__(self, make):
        self.layers = [make(), nnx.BatchNorm(4, ctx=nnx.context(0)), nnx.Dropout(0.5)]

    def __call__(self, x, scale=1.0, *, ctx=None):
        self.sow(nnx.Intermediate, "seen", x.shape)
        return scale * self.layers(x, ctx=ctx)


def effective(layer):
    """The kernel that a wrapped Linear without bias is called with."""
    return np.asarray(layer(jnp.eye(3, dtype=layer.layer_instance.kernel.dtype)))


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize(("axes", "reduced"), [(-1, 0), (0, 1), (None, (0, 1)), ((0, 1), ())])
def test_weight_norm(axes, reduced, use_scale, linear, init):
    inner = linear(use_bias=False)
    layer = nnx.WeightNorm(inner, feature_axes=axes, use_scale=use_scale, scale_init=init, ctx=nnx.context(1))
    kernel = np.asarray(inner.kernel, np.float64)
    scale = np.expand_dims(layer.scales.kernel, reduced) if use_scale else 1
    expected = scale * kernel / np.sqrt((kernel**2).sum(reduced, keepdims=True))
    np.testing.assert_allclose(effective(layer), expected, atol=1e-6)
    np.testing.assert_array_equal(inner.kernel, kernel)
    if not use_scale:
        assert layer.scales is None


def test_weight_norm_chooses_parameters_by_path(linear):
    block = Block(linear)
    layer = nnx.WeightNorm(block, ctx=nnx.context(0))
    assert layer.filter(nnx.All(nnx.Param, nnx.PathGlob("scales/**"))).paths == (("scales", "layers", "0", "kernel"),)
    both = nnx.WeightNorm(linear(), feature_axes=None, variable_filter=..., ctx=nnx.context(0))
    assert set(both.paths) == {("kernel",), ("bias",)}
    assert both.scales.bias.shape == ()
    with pytest.raises(ValueError, match=r"WeightNorm: variable_filter matches no parameter of the Linear, .*bias, ke"):
        nnx.WeightNorm(linear(), variable_filter=nnx.PathGlob("**/kernels"), ctx=nnx.context(0))


def test_spectral_norm(linear):
    inner = linear(use_bias=False)
    layer = nnx.SpectralNorm(inner, n_steps=30, ctx=nnx.context(1))
    kernel = np.asarray(inner.kernel, np.float64)
    _, values, right = np.linalg.svd(kernel)
    np.testing.assert_allclose(effective(layer), kernel / values[0], atol=1e-5)
    np.testing.assert_allclose(layer.batch_stats.kernel.sigma, values[0], rtol=1e-5)
    np.testing.assert_allclose(np.abs(layer.batch_stats.kernel.u[0]), np.abs(right[0]), atol=1e-3)
    np.testing.assert_array_equal(inner.kernel, kernel)


def test_one_step_a_call_finds_the_same(linear):
    layer = nnx.SpectralNorm(linear(use_bias=False), ctx=nnx.context(1))
    for _ in range(30):
        kernel = effective(layer)
    np.testing.assert_allclose(np.linalg.norm(kernel, ord=2), 1, rtol=1e-5)


def test_spectral_norm_of_a_convolution_flattens_all_axes_but_the_last(both):
    inner = nnx.Conv(2, 4, (3,), **both, ctx=nnx.context(0))
    layer = nnx.SpectralNorm(inner, n_steps=30, ctx=nnx.context(1))
    layer(jnp.ones((1, 5, 2)))
    matrix = np.asarray(inner.kernel, np.float64).reshape(-1, 4)
    np.testing.assert_allclose(layer.batch_stats.kernel.sigma, np.linalg.norm(matrix, ord=2), rtol=1e-5)
    assert layer.batch_stats.kernel.u.shape == (1, 4)
    with pytest.raises(nnx.ShapeError, match=r"SpectralNorm: expected matrices, got `kernel` of shape \(3, 2, 4\)"):
        nnx.SpectralNorm(inner, error_on_non_matrix=True, ctx=nnx.context(1))


@pytest.mark.parametrize("call", [None, True, False])
@pytest.mark.parametrize("constructor", [None, True, False])
@pytest.mark.parametrize("running", [None, True, False])
def test_who_says_whether_statistics_are_kept(call, constructor, running, linear):
    layer = nnx.SpectralNorm(linear(), update_stats=constructor, ctx=nnx.context(1))
    flags = {} if running is None else {"use_running_average": running}
    before = np.asarray(layer.batch_stats.kernel.u)
    layer(jnp.ones((2, 3)), call, ctx=nnx.context(flags=flags))
    said = [value for value in (call, constructor, None if running is None else not running) if value is not None]
    assert np.array_equal(layer.batch_stats.kernel.u, before) != (said[0] if said else True)


@pytest.mark.parametrize("wrap", [nnx.WeightNorm, nnx.SpectralNorm])
def test_what_else_a_call_changes_is_kept(wrap, linear, normal):
    block = Block(linear)
    layer, x = wrap(block, ctx=nnx.context(1)), normal(8, 3)
    ctx = nnx.context(dropout=0, flags={"use_running_average": False, "deterministic": False})
    y = layer(x, scale=2.0, ctx=ctx)
    assert np.any(np.asarray(y) == 0)
    assert np.any(np.asarray(block.layers[1].mean) != 0)
    assert block.pop_state(nnx.Intermediate)["seen"].value == ((8, 3),)
    definition, mean = layer.get_module_def(), np.asarray(block.layers[1].mean)
    ctx = nnx.context(flags={"use_running_average": True, "deterministic": True})
    layer(x, ctx=ctx)
    block.pop_state(nnx.Intermediate)
    assert layer.get_module_def() is definition
    np.testing.assert_array_equal(block.layers[1].mean, mean)


@pytest.mark.parametrize("wrap", [nnx.WeightNorm, nnx.SpectralNorm])
def test_a_wrapped_layer_may_be_called_in_other_traces(wrap, linear, normal):
    layer, x = wrap(linear(), ctx=nnx.context(1)), normal(5, 2, 3)
    options = {} if wrap is nnx.WeightNorm else {"update_stats": False}
    np.testing.assert_allclose(jax.vmap(lambda x: layer(x, **options))(x), layer(x, **options), atol=1e-6)
    np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x, **options))(layer, x), layer(x, **options), atol=1e-6)


def test_compiled_steps_find_the_largest_singular_value(linear):
    layer = nnx.SpectralNorm(linear(), ctx=nnx.context(1))
    step = nnx.jit(lambda layer, x: layer(x))
    for _ in range(30):
        step(layer, jnp.ones((2, 3)))
    expected = np.linalg.norm(np.asarray(layer.layer_instance.kernel), ord=2)
    np.testing.assert_allclose(layer.batch_stats.kernel.sigma, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("wrap", [nnx.WeightNorm, nnx.SpectralNorm])
def test_a_kernel_of_zeros_stays_finite(wrap, dtype):
    inner = nnx.Linear(3, 4, kernel_init=nnx.initializers.zeros, param_dtype=dtype, ctx=nnx.context(0))
    layer, x = wrap(inner, dtype=dtype, ctx=nnx.context(1)), jnp.ones((2, 3), dtype)
    np.testing.assert_array_equal(layer(x), np.zeros((2, 4)))
    gradient = nnx.grad(lambda layer: jnp.sum(layer(x).astype(jnp.float32) ** 2))(layer)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    # And it is no trap: with other weights the statistics are found again.
    inner.kernel = jnp.ones((3, 4), dtype)
    lengths = np.linalg.norm(effective(layer).astype(np.float32), axis=0)
    np.testing.assert_allclose(lengths, 1 if wrap is nnx.WeightNorm else 0.5, rtol=1e-2)
    if wrap is nnx.SpectralNorm:
        np.testing.assert_allclose(layer.batch_stats.kernel.sigma, np.sqrt(12), rtol=1e-3)


@pytest.mark.parametrize("low", ["float16", "bfloat16"])
@pytest.mark.parametrize("wrap", [nnx.WeightNorm, nnx.SpectralNorm])
def test_half_precision(wrap, low, linear, normal):
    x = normal(5, 3)
    exact = wrap(linear(), ctx=nnx.context(1))(x)
    layer = wrap(linear(param_dtype=low), dtype=low, ctx=nnx.context(1))
    with jax.numpy_dtype_promotion("strict"):
        y = layer(x.astype(low))
    assert y.dtype == low
    np.testing.assert_allclose(np.asarray(y).astype(np.float32), exact, atol=0.05, rtol=0.05)
    gradient = nnx.grad(lambda layer: jnp.sum(layer(x.astype(low)).astype(jnp.float32) ** 2))(layer)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    if wrap is nnx.SpectralNorm:
        # Statistics are kept in float32, and the weights in their own type without being told.
        assert layer.batch_stats.kernel.u.dtype == layer.batch_stats.kernel.sigma.dtype == jnp.float32
        assert wrap(linear(param_dtype=low), ctx=nnx.context(1))(x.astype(low)).dtype == low


def test_weight_norm_gradients_by_finite_differences(linear, rng):
    with jax.enable_x64(True):
        inner = linear(param_dtype=jnp.float64)
        state, definition = nnx.WeightNorm(inner, param_dtype=jnp.float64, ctx=nnx.context(1)).partition()
        x = jnp.asarray(rng.normal(size=(2, 3)))
        check_grads(lambda state, x: definition.merge(state)(x), (state, x), order=1, modes=("rev",), rtol=1e-6)


def test_spectral_norm_gradients_by_finite_differences(linear, rng):
    with jax.enable_x64(True):
        # `u` is held constant: only once it has converged, where sigma is stationary in it, differences agree.
        layer = nnx.SpectralNorm(linear(param_dtype=jnp.float64), n_steps=200, update_stats=False, ctx=nnx.context(1))
        (params, stats), definition = layer.partition(nnx.Param, ...)
        x = jnp.asarray(rng.normal(size=(2, 3)))
        run = jax.jit(lambda params, x: definition.merge(params, stats)(x))
        check_grads(run, (params, x), order=1, modes=("rev",), rtol=1e-5)


def test_wrong_arguments(linear):
    ctx = nnx.context(0)
    for wrap in (nnx.WeightNorm, nnx.SpectralNorm):
        with pytest.raises(TypeError, match=f"{wrap.__name__}: expected `layer_instance` to be a Module, got function"):
            wrap(lambda x: x, ctx=ctx)
        layer = wrap(linear(), ctx=ctx)
        del layer.layer_instance.kernel
        with pytest.raises(nnx.StructureError, match=f"{wrap.__name__}: the layer has no parameter `kernel` any more"):
            layer(jnp.ones((2, 3)))
    with pytest.raises(nnx.ShapeError, match=r"WeightNorm: feature_axes \(2,\) do not exist in an array with 2"):
        nnx.WeightNorm(linear(), feature_axes=2, ctx=ctx)
    with pytest.raises(ValueError, match="SpectralNorm: n_steps must be at least 1, got 0"):
        nnx.SpectralNorm(linear(), n_steps=0, ctx=ctx)
    with pytest.raises(ValueError, match="SpectralNorm: the LayerNorm has no parameter with two axes"):
        nnx.SpectralNorm(nnx.LayerNorm(3, ctx=ctx), ctx=ctx)
