"""Linear, LinearGeneral and MLP against NumPy."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 4, 5, 3), (0, 3)])
def test_linear(shape, rng, both):
    layer = nnx.Linear(3, 4, ctx=nnx.context(0), **both)
    x = rng.normal(size=shape).astype(np.float32)
    expected = x @ np.asarray(layer.kernel) + np.asarray(layer.bias)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_linear_without_bias(rng):
    layer = nnx.Linear(3, 4, use_bias=False, ctx=nnx.context(0))
    assert layer.bias is None
    x = rng.normal(size=(2, 3)).astype(np.float32)
    np.testing.assert_allclose(layer(jnp.asarray(x)), x @ np.asarray(layer.kernel), rtol=1e-5, atol=1e-5)


def test_parameters():
    layer = nnx.Linear(3, 4, param_dtype=jnp.bfloat16, ctx=nnx.context(0))
    assert layer.kernel.shape == (3, 4)
    assert layer.bias.shape == (4,)
    assert layer.kernel.dtype == layer.bias.dtype == jnp.bfloat16
    assert not np.any(np.asarray(layer.bias, np.float32))


def test_seeds_decide_the_parameters():
    same = [nnx.Linear(3, 4, ctx=nnx.context(1)).kernel for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert not np.array_equal(same[0], nnx.Linear(3, 4, ctx=nnx.context(2)).kernel)
    ctx = nnx.context(1)
    assert not np.array_equal(nnx.Linear(3, 4, ctx=ctx).kernel, nnx.Linear(3, 4, ctx=ctx).kernel)


def test_integers_are_accepted():
    layer = nnx.Linear(3, 4, ctx=nnx.context(0))
    np.testing.assert_allclose(layer(jnp.arange(3)), layer(jnp.arange(3.0)))


@pytest.mark.parametrize("shape", [(), (4,), (3, 2), (2, 3, 5)])
def test_linear_wrong_features(shape):
    with pytest.raises(
        nnx.ShapeError, match=r"Linear: expected `inputs` of shape \[\.\.\., 3\] \(in_features=3\), got"
    ):
        nnx.Linear(3, 4, ctx=nnx.context(0))(jnp.ones(shape))


def test_error_names_the_subclass_and_both_shapes():
    class Head(nnx.Linear):
        pass

    with pytest.raises(ValueError, match=r"Head: .*\[\.\.\., 3\].*got \(7, 2\)"):
        Head(3, 4, ctx=nnx.context(0))(jnp.ones((7, 2)))


def test_needs_a_params_stream():
    with pytest.raises(nnx.ContextError, match="params"):
        nnx.Linear(3, 4, ctx=nnx.context(dropout=0))


def test_precision_reaches_the_product():
    layer = nnx.Linear(3, 4, precision="highest", ctx=nnx.context(0))
    assert "HIGHEST" in str(jax.make_jaxpr(lambda x: nnx.Linear.__call__(layer, x))(jnp.ones((2, 3))))


@pytest.mark.parametrize(
    ("n_in", "n_out", "axis", "shape", "equation"),
    [
        (3, 4, -1, (5, 3), "bi,io->bo"),
        (3, (4, 2), -1, (5, 3), "bi,iop->bop"),
        ((3, 2), 4, (-2, -1), (5, 3, 2), "bij,ijo->bo"),
        ((2, 3), (4, 5), (-1, 1), (6, 3, 7, 2), "bjci,ijop->bcop"),
        ((3, 2), (4,), (0, 1), (3, 2), "ij,ijo->o"),
    ],
)
def test_linear_general(n_in, n_out, axis, shape, equation, rng, both):
    layer = nnx.LinearGeneral(n_in, n_out, axis=axis, ctx=nnx.context(0), **both)
    x = rng.normal(size=shape).astype(np.float32)
    expected = np.einsum(equation, x, np.asarray(layer.kernel)) + np.asarray(layer.bias)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_linear_general_fans_count_all_inputs():
    layer = nnx.LinearGeneral(100, (10, 50), ctx=nnx.context(0))
    assert float(jnp.var(layer.kernel)) == pytest.approx(1 / 100, rel=0.05)
    layer = nnx.LinearGeneral((10, 50), 100, axis=(-2, -1), ctx=nnx.context(0))
    assert float(jnp.var(layer.kernel)) == pytest.approx(1 / 500, rel=0.05)


def test_linear_general_is_linear_where_they_meet():
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(
        nnx.LinearGeneral(3, 4, ctx=nnx.context(0))(x), nnx.Linear(3, 4, ctx=nnx.context(0))(x)
    )


def test_linear_general_errors():
    layer = nnx.LinearGeneral((3, 2), 4, axis=(-2, -1), ctx=nnx.context(0))
    with pytest.raises(nnx.ShapeError, match=r"sizes \(3, 2\) at the axes \(-2, -1\).*got \(5, 2, 3\)"):
        layer(jnp.ones((5, 2, 3)))
    with pytest.raises(nnx.ShapeError, match=r"axes \(-2, -1\) do not exist in an array with 1 dimensions"):
        layer(jnp.ones(2))
    with pytest.raises(ValueError, match="same length"):
        nnx.LinearGeneral((3, 2), 4, ctx=nnx.context(0))
    with pytest.raises(ValueError, match="name a dimension twice"):
        nnx.LinearGeneral((3, 3), 4, axis=(-1, 1), ctx=nnx.context(0))(jnp.ones((3, 3)))


def test_mlp(rng, both):
    model = nnx.MLP(3, (5, 4), 2, activation=jnp.tanh, ctx=nnx.context(0), **both)
    x = rng.normal(size=(7, 3)).astype(np.float32)
    expected = x
    for i, layer in enumerate(model.layers):
        expected = expected @ np.asarray(layer.kernel) + np.asarray(layer.bias)
        expected = np.tanh(expected) if i < 2 else expected
    np.testing.assert_allclose(model(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_mlp_activation_by_name():
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)
    named, function = (nnx.MLP(3, 5, 2, activation=activation, ctx=nnx.context(0)) for activation in ("gelu", nnx.gelu))
    np.testing.assert_array_equal(named(x), function(x))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(named))(x), named(x))
    with pytest.raises(ValueError, match="nnx has no activation 'rellu'"):
        nnx.MLP(3, 5, 2, activation="rellu", ctx=nnx.context(0))


def test_mlp_without_hidden_layers_is_linear():
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(nnx.MLP(3, (), 2, ctx=nnx.context(0))(x), nnx.Linear(3, 2, ctx=nnx.context(0))(x))


def test_mlp_dropout():
    model = nnx.MLP(3, 64, 2, dropout_rate=0.5, ctx=nnx.context(0))
    x = jnp.ones((2, 3))
    first, second = (model(x, deterministic=False, ctx=nnx.context(dropout=seed)) for seed in (0, 1))
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(model(x, deterministic=True), model(x, deterministic=True))
    with pytest.raises(nnx.ContextError, match="`deterministic` is not set"):
        model(x)


def test_parameters_are_found_by_path():
    params, _ = nnx.MLP(3, (5,), 2, ctx=nnx.context(0)).partition(nnx.Param)
    assert sorted(params) == [
        ("layers", "0", "bias"),
        ("layers", "0", "kernel"),
        ("layers", "1", "bias"),
        ("layers", "1", "kernel"),
    ]


def test_a_model_built_twice_compiles_once():
    traces = []

    @nnx.jit
    def run(model, x):
        traces.append(1)
        return model(x)

    for seed in range(3):
        run(nnx.MLP(3, (5,), 2, ctx=nnx.context(seed)), jnp.ones((2, 3)))
    assert len(traces) == 1


@pytest.mark.parametrize("ctx", [0, None, jax.random.key(0)])
def test_ctx_must_be_a_context(ctx):
    with pytest.raises(nnx.ContextError, match=r"`ctx` is a Context, such as nnx.context\(0\), got"):
        nnx.Linear(2, 3, ctx=ctx)


def test_a_map_for_each_index(rng, both):
    layer = nnx.LinearGeneral((3, 4), (2, 5), axis=(3, -1), batch_axis={1: 6, 0: 2}, ctx=nnx.context(0), **both)
    assert layer.kernel.shape == (2, 6, 3, 4, 2, 5)
    assert layer.bias.shape == (2, 6, 2, 5)
    x = rng.normal(size=(2, 6, 7, 3, 4)).astype(np.float32)
    expected = np.einsum("abtij,abijop->abtop", x, np.asarray(layer.kernel)) + np.asarray(layer.bias)[:, :, None]
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_each_map_has_a_draw_of_its_own_whose_fans_are_those_of_one():
    layer = nnx.LinearGeneral(64, 64, batch_axis={0: 8}, kernel_init=nnx.initializers.orthogonal(), ctx=nnx.context(0))
    products = np.einsum("bio,bjo->bij", *[np.asarray(layer.kernel)] * 2)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(64), products.shape), atol=1e-5)
    assert not np.array_equal(layer.kernel[0], layer.kernel[1])
    normal = nnx.LinearGeneral(64, 64, batch_axis={0: 8}, ctx=nnx.context(0)).kernel
    np.testing.assert_allclose(np.var(normal), 1 / 64, rtol=0.05)


def test_names_of_a_map_for_each_index():
    init = nnx.with_metadata(nnx.initializers.zeros, sharding=("expert", "embed", "mlp"), tag=1)
    layer = nnx.LinearGeneral(3, 4, batch_axis={0: 2}, kernel_init=init, ctx=nnx.context(0))
    assert layer.get_variable("kernel").sharding == ("expert", "embed", "mlp")
    assert layer.get_variable("kernel").metadata["tag"] == 1
    assert layer.get_variable("bias").sharding == (None, "out")


@pytest.mark.parametrize("axes", [{1: 2}, {-1: 2}, {0: 2, 2: 3}])
def test_batch_axis_is_of_the_first_axes(axes):
    with pytest.raises(ValueError, match=r"LinearGeneral: batch_axis gives the sizes of the first axes, .* got \{"):
        nnx.LinearGeneral(3, 4, batch_axis=axes, ctx=nnx.context(0))


@pytest.mark.parametrize(("axis", "shape"), [(-1, (3, 5)), (-1, (3,)), (0, (3, 2)), (0, (2, 3))])
def test_batch_axis_wrong_inputs(axis, shape):
    layer = nnx.LinearGeneral(3, 4, axis=axis, batch_axis={0: 2}, ctx=nnx.context(0))
    with pytest.raises(nnx.ShapeError, match="LinearGeneral: expected `inputs` with"):
        layer(jnp.ones(shape))
