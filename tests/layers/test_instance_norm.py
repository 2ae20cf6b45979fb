"""InstanceNorm against NumPy in float64: outputs, masks, mapped axes, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import nnx


def expected_output(x, axes, layer, shape, where=True):
    x = x.astype(np.float64)
    where = np.broadcast_to(where, x.shape)
    mean, var = (stat(axes, where=where, keepdims=True) for stat in (x.mean, x.var))
    normal = (x - mean) / np.sqrt(var + layer.epsilon)
    return normal * np.asarray(layer.scale).reshape(shape) + np.asarray(layer.bias).reshape(shape)


@pytest.fixture
def make(init):
    def layer(**options):
        return nnx.InstanceNorm(4, scale_init=init, bias_init=init, **options, ctx=nnx.context(0))

    return layer


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("axis", "shape", "axes"), [(-1, (2, 5, 4), (1,)), (3, (2, 3, 2, 4), (1, 2)), (1, (2, 4, 5), 2)]
)
def test_output(axis, shape, axes, fast, make, rng):
    x = rng.normal(3, 2, size=shape).astype(np.float32)
    layer = make(feature_axes=axis, use_fast_variance=fast)
    affine = [1] * len(shape)
    affine[axis] = 4
    expected = expected_output(x, axes, layer, affine)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


def test_it_is_group_norm_with_a_group_to_each_channel(rng):
    x = jnp.asarray(rng.normal(size=(2, 5, 4)).astype(np.float32))
    group = nnx.GroupNorm(4, num_groups=4, ctx=nnx.context(0))
    np.testing.assert_allclose(nnx.InstanceNorm(4, ctx=nnx.context(0))(x), group(x), atol=1e-6)


def test_mask(make, rng):
    x = rng.normal(1, 2, size=(3, 5, 4)).astype(np.float32)
    real = np.arange(5)[None, :, None] < np.array([1, 3, 5])[:, None, None]
    layer = make()
    y = layer(jnp.asarray(np.where(real, x, np.nan)), mask=jnp.asarray(real))
    keep = np.broadcast_to(real, x.shape)
    expected = expected_output(x, (1,), layer, (1, 1, 4), real)
    np.testing.assert_allclose(np.asarray(y)[keep], expected[keep], rtol=1e-4, atol=1e-4)


def test_without_space_there_is_nothing_but_the_bias(make):
    layer = make()
    np.testing.assert_array_equal(layer(jnp.full((2, 4), 7.0)), np.broadcast_to(layer.bias, (2, 4)))


def test_over_a_mapped_axis(make, rng):
    x = rng.normal(1, 2, size=(3, 2, 5, 4)).astype(np.float32)
    layer = make(axis_name="i")
    expected = expected_output(x, (0, 2), layer, (1, 1, 1, 4))
    np.testing.assert_allclose(jax.vmap(layer, axis_name="i")(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


def test_parameters():
    layer = nnx.InstanceNorm(4, ctx=nnx.context(0))
    assert layer.scale.shape == layer.bias.shape == (4,)
    bare = nnx.InstanceNorm(4, use_scale=False, use_bias=False, ctx=nnx.context(0))
    assert bare.scale is None
    assert bare.bias is None


def test_gradients_by_finite_differences(make, rng):
    with jax.enable_x64(True):
        state, definition = make(param_dtype=jnp.float64).partition()
        x = jnp.asarray(rng.normal(size=(2, 5, 4)))
        mask = jnp.arange(5)[None, :, None] < jnp.array([3, 5])[:, None, None]

        def run(state, x):
            return definition.merge(state)(x, mask=mask)

        check_grads(jax.jit(run), (state, x), order=1, modes=("rev",), atol=1e-6, rtol=1e-6)


def test_wrong_arguments(make):
    with pytest.raises(ValueError, match=r"InstanceNorm: feature_axes must be one axis, .* got \(1, 2\)"):
        make(feature_axes=(1, 2))
    with pytest.raises(ValueError, match=r"InstanceNorm: the channels, feature_axes=\(0,\), cannot be the first axis"):
        make(feature_axes=0)(jnp.ones((4, 5)))
    with pytest.raises(nnx.ShapeError, match=r"InstanceNorm: expected `x` with 4 channels at axis 1 .*got \(2, 5, 4\)"):
        make(feature_axes=1)(jnp.ones((2, 5, 4)))
    with pytest.raises(nnx.ShapeError, match=r"InstanceNorm: feature_axes \(3,\) do not exist"):
        make(feature_axes=3)(jnp.ones((2, 4)))
    with pytest.raises(nnx.ShapeError, match=r"InstanceNorm: `mask` of shape \(3,\) does not broadcast"):
        make()(jnp.ones((2, 5, 4)), mask=jnp.ones(3))
