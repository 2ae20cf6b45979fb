"""Dropout and DropPath: their statistics, their flag, their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


def drop(layer, x, seed=0, **kwargs):
    return layer(x, ctx=nnx.context(dropout=seed, flags={"deterministic": False}), **kwargs)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_statistics(rate):
    y = np.asarray(drop(nnx.Dropout(rate), jnp.ones((200, 500))))
    n = y.size
    assert np.mean(y == 0) == pytest.approx(rate, abs=5 * np.sqrt(rate * (1 - rate) / n))
    assert y.mean() == pytest.approx(1, abs=5 * np.sqrt(rate / (1 - rate) / n))
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)


@pytest.mark.parametrize("dims", [(0,), (1, 2), (-1,), (0, 1, 2)])
def test_broadcast_dims(dims):
    y = np.asarray(drop(nnx.Dropout(0.5, broadcast_dims=dims), jnp.ones((20, 30, 40))))
    free = [axis for axis in range(3) if axis not in {d % 3 for d in dims}]
    # Along the broadcast axes all is equal, and along each of the others something differs.
    assert np.array_equal(y, np.broadcast_to(y.max(axis=tuple(dims), keepdims=True), y.shape))
    assert np.array_equal(y.max(axis=tuple(dims)), y.min(axis=tuple(dims)))
    for axis in free:
        assert not np.array_equal(y.max(axis), y.min(axis))


def test_keys_decide_the_mask():
    layer, x = nnx.Dropout(0.5), jnp.ones(1000)
    np.testing.assert_array_equal(drop(layer, x, 0), drop(layer, x, 0))
    assert not np.array_equal(drop(layer, x, 0), drop(layer, x, 1))
    ctx = nnx.context(dropout=0)
    assert not np.array_equal(layer(x, deterministic=False, ctx=ctx), layer(x, deterministic=False, ctx=ctx))


def test_another_stream():
    layer, x = nnx.Dropout(0.5, rng_collection="noise"), jnp.ones(1000)
    y = layer(x, deterministic=False, ctx=nnx.context(noise=0))
    assert set(np.unique(y)) == {0.0, 2.0}
    with pytest.raises(nnx.ContextError, match="'noise'"):
        layer(x, deterministic=False, ctx=nnx.context(dropout=0))


def test_rate_zero_draws_nothing():
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(nnx.Dropout(0.0)(x, deterministic=False), x)
    np.testing.assert_array_equal(nnx.Dropout(0)(x, deterministic=False), x)


def test_rate_one_drops_all_with_a_zero_gradient():
    layer, x = nnx.Dropout(1.0), jnp.arange(4.0)
    np.testing.assert_array_equal(drop(layer, x), 0 * x)
    np.testing.assert_array_equal(jax.grad(lambda x: drop(layer, x).sum())(x), 0 * x)


def test_gradient_is_the_mask():
    layer, x = nnx.Dropout(0.3), jnp.ones(100)
    np.testing.assert_array_equal(jax.grad(lambda x: drop(layer, x).sum())(x), drop(layer, x))


def test_dropped_nan_is_dropped():
    y = drop(nnx.Dropout(0.5), jnp.full(100, jnp.nan))
    assert 20 < int((y == 0).sum()) < 80


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_stays(dtype):
    with jax.numpy_dtype_promotion("strict"):
        assert drop(nnx.Dropout(0.5), jnp.ones(10, dtype)).dtype == dtype


@pytest.mark.parametrize("call", [None, True, False])
@pytest.mark.parametrize("constructor", [None, True, False])
@pytest.mark.parametrize("flag", [None, True, False])
def test_flag_comes_from_call_then_constructor_then_context(call, constructor, flag):
    layer, x = nnx.Dropout(0.5, deterministic=constructor), jnp.ones(100)
    ctx = nnx.context(dropout=0, flags={} if flag is None else {"deterministic": flag})
    first = next((value for value in (call, constructor, flag) if value is not None), None)
    if first is None:
        with pytest.raises(nnx.ContextError, match=r"Dropout: the flag `deterministic` is not set.*has no such flag"):
            layer(x, deterministic=call, ctx=ctx)
    else:
        assert bool((layer(x, deterministic=call, ctx=ctx) == x).all()) == first


def test_error_without_any_context_says_how_to_set_the_flag():
    with pytest.raises(nnx.ContextError) as caught:
        nnx.Dropout(0.5)(jnp.ones(3))
    message = str(caught.value)
    assert "no Context was passed" in message
    for remedy in (
        "`layer(x, deterministic=True)`",
        "`nnx.Dropout(..., deterministic=True)`",
        "`layer(x, ctx=nnx.context(flags=dict(deterministic=True)))`",
    ):
        assert remedy in message


def test_error_without_a_stream_says_how_to_pass_one():
    with pytest.raises(
        nnx.ContextError, match=r"Dropout: .*'dropout', but no Context was passed.*nnx.context\(dropout=seed\)"
    ):
        nnx.Dropout(0.5)(jnp.ones(3), deterministic=False)
    with pytest.raises(nnx.ContextError, match=r"Dropout: .*'dropout'.*nnx.context\(dropout=seed\)"):
        nnx.Dropout(0.5)(jnp.ones(3), deterministic=False, ctx=nnx.context(0))


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_rate_is_a_probability(rate):
    with pytest.raises(ValueError, match="between 0 and 1"):
        nnx.Dropout(rate)


def test_input_errors():
    with pytest.raises(nnx.ShapeError, match="floating point `inputs`, got dtype int32"):
        drop(nnx.Dropout(0.5), jnp.arange(3))
    with pytest.raises(nnx.ShapeError, match=r"broadcast_dims \(2,\) do not exist in an array with 1 dimensions"):
        drop(nnx.Dropout(0.5, broadcast_dims=(2,)), jnp.ones(3))


def test_one_context_gives_new_masks_through_jit():
    layer, ctx, x = nnx.Dropout(0.5), nnx.context(dropout=0), jnp.ones(100)
    run = nnx.jit(lambda layer, x, ctx: layer(x, deterministic=False, ctx=ctx))
    assert not np.array_equal(run(layer, x, ctx), run(layer, x, ctx))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_drop_path_drops_whole_examples(rate):
    n = 20000
    y = np.asarray(drop(nnx.DropPath(rate), jnp.ones((n, 2, 3))))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
    assert np.mean(y[:, 0, 0] == 0) == pytest.approx(rate, abs=5 * np.sqrt(rate * (1 - rate) / n))
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)


def test_drop_path_of_examples_along_several_axes():
    y = np.asarray(drop(nnx.DropPath(0.5, batch_axes=(0, -2)), jnp.ones((20, 3, 30, 4))))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :, :1], y.shape))
    assert not np.array_equal(y, np.broadcast_to(y[:, :, :1], y.shape))
    assert not np.array_equal(y, np.broadcast_to(y[:1], y.shape))


def test_drop_path_is_the_identity_where_nothing_is_drawn():
    x = jnp.arange(6.0).reshape(2, 3)
    for layer in (nnx.DropPath(0.5, deterministic=True), nnx.DropPath(0.0, deterministic=False)):
        np.testing.assert_array_equal(layer(x), x)
    np.testing.assert_array_equal(nnx.DropPath(0.5)(x, ctx=nnx.context(flags={"deterministic": True})), x)


def test_drop_path_gradient_is_the_mask():
    layer, x = nnx.DropPath(0.3), jnp.ones((50, 2))
    np.testing.assert_array_equal(jax.grad(lambda x: drop(layer, x).sum())(x), drop(layer, x))
    np.testing.assert_array_equal(jax.grad(lambda x: drop(nnx.DropPath(1.0), x).sum())(x), 0 * x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_drop_path_keeps_the_dtype(dtype):
    with jax.numpy_dtype_promotion("strict"):
        assert drop(nnx.DropPath(0.5), jnp.ones((10, 2), dtype)).dtype == dtype


def test_drop_path_names_itself_in_errors():
    with pytest.raises(ValueError, match="DropPath: the rate is the probability of dropping, between 0 and 1, got 1.5"):
        nnx.DropPath(1.5)
    with pytest.raises(
        nnx.ContextError, match=r"DropPath: the flag `deterministic` is not set.*nnx.DropPath\(..., det"
    ):
        nnx.DropPath(0.5)(jnp.ones((2, 3)))
    with pytest.raises(nnx.ContextError, match=r"DropPath: needs a key from the random stream 'dropout'"):
        nnx.DropPath(0.5)(jnp.ones((2, 3)), deterministic=False)
    with pytest.raises(nnx.ShapeError, match=r"DropPath: batch_axes \(0,\) do not exist in an array with 0 dimensions"):
        drop(nnx.DropPath(0.5), jnp.ones(()))
    with pytest.raises(nnx.ShapeError, match="DropPath: expected floating point `inputs`, got dtype int32"):
        drop(nnx.DropPath(0.5), jnp.ones((2, 3), int))
