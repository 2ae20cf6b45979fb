"""Attention against a loop over batch, heads and queries in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


def reference(query, key, value, *, bias=None, mask=None, is_causal=False, scale=None):
    """Attention of [*batch, length, heads, dim], one query at a time."""
    *batch, length, heads, dim = query.shape
    key_length, kv_heads = key.shape[-3:-1]
    shape = (*batch, heads, length, key_length)
    bias = np.zeros(shape) if bias is None else np.broadcast_to(bias, shape)
    mask = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape).astype(bool)
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    for b in np.ndindex(*batch):
        for h in range(heads):
            k, v = (a[b][:, h // (heads // kv_heads)].astype(np.float64) for a in (key, value))
            for t in range(length):
                logits = k @ query[b][t, h].astype(np.float64) * (dim**-0.5 if scale is None else scale) + bias[b][h, t]
                see = mask[b][h, t] & (np.arange(key_length) <= t if is_causal else True)
                weights = np.exp(logits - logits[see].max()) * see
                out[b][t, h] = weights / weights.sum() @ v
    return out


def operands(rng, batch=(2,), length=5, key_length=6, heads=4, kv_heads=4, dim=8, value_dim=8):
    return [
        rng.normal(size=(*batch, *shape)).astype(np.float32)
        for shape in ((length, heads, dim), (key_length, kv_heads, dim), (key_length, kv_heads, value_dim))
    ]


# Compiled as one, since op by op each shape compiles a dozen times.
attend = jax.jit(
    nnx.dot_product_attention,
    static_argnames=("broadcast_dropout", "dropout_rate", "deterministic", "precision", "is_causal", "scale"),
)

# The precise one takes the path with explicit weights, the other JAX's own.
PATHS = pytest.mark.parametrize("precision", [None, "highest"], ids=["fused", "explicit"])


@PATHS
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_against_loop(batch, is_causal, kv_heads, precision, rng):
    q, k, v = operands(rng, batch, kv_heads=kv_heads)
    y = attend(*map(jnp.asarray, (q, k, v)), is_causal=is_causal, precision=precision)
    np.testing.assert_allclose(y, reference(q, k, v, is_causal=is_causal), rtol=1e-4, atol=1e-5)


@PATHS
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (2, 3, 1, 5, 6), (2, 1, 4, 1, 6), (1, 1, 1, 1, 6), (4, 5, 6), (6,)])
def test_masks_and_biases_broadcast(shape, with_bias, precision, rng):
    q, k, v = operands(rng, (2, 3), kv_heads=2)
    mask = rng.random(shape) < 0.6
    mask[..., 0] = True
    options = {"mask": mask}
    if with_bias:
        options["bias"] = rng.normal(size=shape).astype(np.float32)
    y = attend(*map(jnp.asarray, (q, k, v)), precision=precision, is_causal=True, **jax.tree.map(jnp.asarray, options))
    np.testing.assert_allclose(y, reference(q, k, v, is_causal=True, **options), rtol=1e-4, atol=1e-5)


@PATHS
def test_scale_and_number_masks(precision, rng):
    q, k, v = operands(rng)
    mask = (rng.random((1, 1, 5, 6)) < 0.5).astype(np.float32)
    mask[..., 0] = 1
    y = attend(*map(jnp.asarray, (q, k, v)), mask=jnp.asarray(mask), scale=0.3, precision=precision)
    np.testing.assert_allclose(y, reference(q, k, v, mask=mask, scale=0.3), rtol=1e-4, atol=1e-5)


def test_values_of_another_size(rng):
    q, k, v = operands(rng, value_dim=3)
    y = attend(*map(jnp.asarray, (q, k, v)))
    assert y.shape == (2, 5, 4, 3)
    np.testing.assert_allclose(y, reference(q, k, v), rtol=1e-4, atol=1e-5)


@PATHS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_query_without_keys_gets_the_mean_and_finite_gradients(precision, dtype, rng):
    q, k, v = (jnp.asarray(x, dtype) for x in operands(rng))

    def run(q, k, v):
        return attend(q, k, v, mask=jnp.zeros((5, 6), bool), precision=precision)

    expected = np.broadcast_to(np.asarray(v, np.float32).mean(1, keepdims=True), (2, 5, 4, 8))
    np.testing.assert_allclose(run(q, k, v).astype(jnp.float32), expected, atol=1e-2)
    gradients = jax.grad(lambda *a: run(*a).sum().astype(jnp.float32), argnums=(0, 1, 2))(q, k, v)
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)


@PATHS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(precision, dtype, rng):
    q, k, v = (jnp.asarray(x, dtype) for x in operands(rng, kv_heads=2))
    bias = jnp.asarray(rng.normal(size=(5, 6)), dtype)
    with jax.numpy_dtype_promotion("strict"):
        y = attend(q, k, v, bias, is_causal=True, precision=precision)
    assert y.dtype == dtype
    expected = reference(
        *(np.asarray(x, np.float32) for x in (q, k, v)), bias=np.asarray(bias, np.float32), is_causal=True
    )
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.03)


def test_large_logits_do_not_overflow_half_precision():
    q = jnp.full((1, 2, 1, 64), 60.0, jnp.float16)
    for precision in (None, "highest"):
        y = attend(q, q, jnp.ones_like(q), is_causal=True, precision=precision)
        np.testing.assert_allclose(y.astype(jnp.float32), 1, rtol=1e-2)


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout(broadcast, rng):
    n = 40
    query = jnp.zeros((3, n, 2, n))
    value = jnp.broadcast_to(jnp.eye(n).reshape(1, n, 1, n), (3, n, 2, n))
    # With equal logits and an identity for values, the output is the weights.
    weights = attend(query, query, value, None, None, broadcast, jax.random.key(0), 0.3)
    kept = np.asarray(weights != 0)
    np.testing.assert_allclose(np.asarray(weights)[kept], 1 / n / 0.7, rtol=1e-5)
    assert kept.mean() == pytest.approx(0.7, abs=0.05)
    assert np.array_equal(kept, np.broadcast_to(kept[:1, :, :1], kept.shape)) == broadcast
    certain = attend(query, query, value, dropout_rate=0.3, deterministic=True)
    np.testing.assert_allclose(certain, 1 / n, rtol=1e-5)


def test_function_errors(rng):
    q, k, v = map(jnp.asarray, operands(rng))
    for args, message in [
        ((q, k[..., :4], v), r"same head_dim, got query \(2, 5, 4, 8\), key \(2, 6, 4, 4\)"),
        ((q, k, v[:, :3]), "same length and number of heads"),
        ((q, k[:1], v[:1]), "batch axes must be equal"),
        ((q, k[..., :3, :], v[..., :3, :]), "must divide the number of query heads"),
        ((q[0], k, v), "of one rank"),
        ((q[0, 0], k[0, 0], v[0, 0]), r"expected \[\*batch, length, heads, head_dim\]"),
        ((q, k, v, None, jnp.ones((2, 4, 5, 7))), r"`mask` must broadcast to .* \(2, 4, 5, 6\), got \(2, 4, 5, 7\)"),
        ((q, k, v, jnp.ones((1, 2, 4, 5, 6))), "`bias` must broadcast to"),
    ]:
        with pytest.raises(nnx.ShapeError, match=message):
            nnx.dot_product_attention(*args)
    with pytest.raises(ValueError, match=r"dropout_rate=0\.5 needs `dropout_rng`"):
        nnx.dot_product_attention(q, k, v, dropout_rate=0.5)
    with pytest.raises(ValueError, match="'cudnn' has neither dropout"):
        nnx.dot_product_attention(q, k, v, precision="highest", implementation="cudnn")


def project(x, linear):
    return np.einsum("...i,ihd->...hd", x, np.asarray(linear.kernel)) + np.asarray(linear.bias)


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_self_attention(kv_heads, is_causal, rng, both):
    layer = nnx.MultiHeadAttention(4, 6, 8, 5, num_kv_heads=kv_heads, ctx=nnx.context(0), **both)
    x = rng.normal(size=(2, 7, 6)).astype(np.float32)
    heads = reference(*(project(x, part) for part in (layer.query, layer.key, layer.value)), is_causal=is_causal)
    expected = np.einsum("bthd,hdo->bto", heads, np.asarray(layer.out.kernel)) + np.asarray(layer.out.bias)
    y = layer(jnp.asarray(x), is_causal=is_causal)
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)
    by_constructor = nnx.MultiHeadAttention(
        4, 6, 8, 5, num_kv_heads=kv_heads, is_causal=is_causal, ctx=nnx.context(0), **both
    )
    np.testing.assert_array_equal(by_constructor(jnp.asarray(x)), y)


def test_cross_attention(rng, both):
    layer = nnx.MultiHeadAttention(2, 6, 8, in_kv_features=3, ctx=nnx.context(0), **both)
    x, keys, values = (rng.normal(size=s).astype(np.float32) for s in ((2, 5, 6), (2, 7, 3), (2, 7, 3)))
    mask = rng.random((2, 1, 5, 7)) < 0.7
    mask[..., 0] = True
    heads = reference(project(x, layer.query), project(keys, layer.key), project(values, layer.value), mask=mask)
    expected = np.einsum("bthd,hdo->bto", heads, np.asarray(layer.out.kernel)) + np.asarray(layer.out.bias)
    args = list(map(jnp.asarray, (x, keys, values)))
    np.testing.assert_allclose(layer(*args, mask=jnp.asarray(mask)), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(layer(args[0], args[1]), layer(args[0], args[1], args[1]))


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_batch_axes(batch, rng, both):
    layer = nnx.MultiHeadAttention(2, 6, ctx=nnx.context(0), **both)
    x = jnp.asarray(rng.normal(size=(*batch, 5, 6)).astype(np.float32))
    y = layer(x, is_causal=True)
    for index in np.ndindex(batch):
        np.testing.assert_allclose(y[index], layer(x[index], is_causal=True), rtol=1e-4, atol=1e-5)


def test_causal_flag_equals_causal_mask(rng, both):
    layer = nnx.MultiHeadAttention(2, 6, ctx=nnx.context(0), **both)
    x = jnp.asarray(rng.normal(size=(2, 5, 6)).astype(np.float32))
    mask = nnx.make_causal_mask(jnp.ones((2, 5)))
    np.testing.assert_allclose(layer(x, is_causal=True), layer(x, mask=mask), rtol=1e-5, atol=1e-6)


def test_parameter_shapes(both):
    layer = nnx.MultiHeadAttention(4, 12, 16, 20, 2, 8, normalize_qk=True, ctx=nnx.context(0), **both)
    shapes = {name: getattr(layer, name).kernel.shape for name in ("query", "key", "value", "out")}
    assert shapes == {"query": (12, 4, 4), "key": (8, 2, 4), "value": (8, 2, 4), "out": (4, 4, 20)}
    biases = {name: getattr(layer, name).bias.shape for name in shapes}
    assert biases == {"query": (4, 4), "key": (2, 4), "value": (2, 4), "out": (20,)}
    assert layer.query_ln.scale.shape == layer.key_ln.scale.shape == (4,)
    assert layer.query_ln.bias is None
    bare = nnx.MultiHeadAttention(4, 12, use_bias=False, ctx=nnx.context(0), **both)
    assert bare.query.bias is bare.out.bias is None


def test_out_initializers(both):
    ones, zeros = nnx.initializers.ones, nnx.initializers.zeros
    layer = nnx.MultiHeadAttention(2, 4, out_kernel_init=zeros, out_bias_init=ones, ctx=nnx.context(0), **both)
    np.testing.assert_array_equal(layer(jnp.ones((1, 3, 4))), 1)
    assert float(jnp.abs(layer.query.kernel).sum()) > 0


def test_normalize_qk(rng, both):
    layer = nnx.MultiHeadAttention(2, 6, normalize_qk=True, ctx=nnx.context(0), **both)
    x = rng.normal(size=(2, 5, 6)).astype(np.float32)

    def norm(a):
        return (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)

    heads = reference(norm(project(x, layer.query)), norm(project(x, layer.key)), project(x, layer.value))
    expected = np.einsum("bthd,hdo->bto", heads, np.asarray(layer.out.kernel)) + np.asarray(layer.out.bias)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-3, atol=1e-4)


def test_sown_weights(rng, both):
    layer = nnx.MultiHeadAttention(2, 6, dropout_rate=0.5, ctx=nnx.context(0), **both)
    x = jnp.asarray(rng.normal(size=(2, 5, 6)).astype(np.float32))
    layer(x, deterministic=False, is_causal=True, sow_weights=True, ctx=nnx.context(dropout=0))
    sown = layer.pop_state(nnx.Intermediate)
    (weights,) = jax.tree.leaves(sown)
    assert weights.shape == (2, 2, 5, 5)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(jnp.triu(weights, 1), 0)


def test_module_dropout(rng, both):
    layer = nnx.MultiHeadAttention(2, 6, dropout_rate=0.5, ctx=nnx.context(0), **both)
    x = jnp.asarray(rng.normal(size=(2, 5, 6)).astype(np.float32))
    first, second = (layer(x, deterministic=False, ctx=nnx.context(dropout=seed)) for seed in (0, 1))
    assert not np.allclose(first, second)
    plain = nnx.MultiHeadAttention(2, 6, ctx=nnx.context(0), **both)
    np.testing.assert_array_equal(layer(x, deterministic=True), plain(x))
    np.testing.assert_array_equal(layer(x, ctx=nnx.context(flags={"deterministic": True})), plain(x))
    with pytest.raises(nnx.ContextError, match="MultiHeadAttention: the flag `deterministic` is not set"):
        layer(x)
    with pytest.raises(nnx.ContextError, match="MultiHeadAttention: needs a key from the random stream 'dropout'"):
        layer(x, deterministic=False)


def test_gradients_with_everything_on(rng, both):
    options = {"num_kv_heads": 2, "dropout_rate": 0.3, "normalize_qk": True, "dtype": jnp.bfloat16}
    layer = nnx.MultiHeadAttention(4, 8, ctx=nnx.context(0), **options, **both)
    x = jnp.asarray(rng.normal(size=(2, 5, 8)).astype(np.float32))
    mask = jnp.arange(5)[None, None, None, :] < jnp.array([0, 3])[:, None, None, None]

    def loss(layer, ctx):
        y = layer(x, mask=mask, is_causal=True, deterministic=False, ctx=ctx)
        return (y.astype(jnp.float32) ** 2).mean()

    gradients = nnx.jit(nnx.grad(loss))(layer, nnx.context(dropout=0))
    assert all(np.isfinite(np.asarray(g)).all() for g in jax.tree.leaves(gradients))


def test_attention_fn_gets_only_the_options_in_use(rng, both):
    seen = []

    def attention_fn(
        query,
        key,
        value,
        *,
        mask,
        broadcast_dropout,
        dropout_rng,
        dropout_rate,
        deterministic,
        dtype,
        precision,
        module,
    ):
        seen.append((mask, dropout_rng, module))
        return value

    layer = nnx.MultiHeadAttention(2, 6, attention_fn=attention_fn, ctx=nnx.context(0), **both)
    assert layer(jnp.ones((2, 5, 6))).shape == (2, 5, 6)
    assert seen == [(None, None, None)]
    with pytest.raises(TypeError, match="is_causal"):
        layer(jnp.ones((2, 5, 6)), is_causal=True)


def test_module_errors():
    layer = nnx.MultiHeadAttention(2, 6, in_kv_features=4, ctx=nnx.context(0))
    q, kv = jnp.ones((2, 5, 6)), jnp.ones((2, 5, 4))
    with pytest.raises(nnx.ShapeError, match=r"MultiHeadAttention: expected `inputs_q` .*6\].*got \(2, 5, 4\)"):
        layer(kv, kv)
    with pytest.raises(nnx.ShapeError, match=r"expected `inputs_k` .*\(in_kv_features=4\), got \(2, 5, 6\)"):
        layer(q)
    with pytest.raises(nnx.ShapeError, match="expected `inputs_v`"):
        layer(q, kv, q)
    with pytest.raises(ValueError, match="`inputs_v` was given without `inputs_k`"):
        layer(q, None, kv)
    with pytest.raises(ValueError, match="num_heads=4 does not divide qkv_features=6"):
        nnx.MultiHeadAttention(4, 6, ctx=nnx.context(0))
    with pytest.raises(ValueError, match="num_kv_heads=3 does not divide num_heads=4"):
        nnx.MultiHeadAttention(4, 8, num_kv_heads=3, ctx=nnx.context(0))
    with pytest.raises(ValueError, match="between 0 and 1"):
        nnx.MultiHeadAttention(4, 8, dropout_rate=2, ctx=nnx.context(0))


def test_masks():
    lengths = jnp.array([[1, 1, 0], [1, 1, 1]])
    mask = nnx.make_attention_mask(lengths, jnp.ones((2, 4)))
    assert mask.shape == (2, 1, 3, 4)
    assert mask.dtype == jnp.float32
    np.testing.assert_array_equal(mask[0, 0], [[1] * 4, [1] * 4, [0] * 4])
    assert nnx.make_attention_mask(lengths, lengths, extra_batch_dims=2).shape == (1, 1, 2, 1, 3, 3)
    segments = jnp.array([[1, 1, 2]])
    same = nnx.make_attention_mask(segments, segments, jnp.equal, dtype=bool)
    np.testing.assert_array_equal(same[0, 0], [[True, True, False], [True, True, False], [False, False, True]])

    causal = nnx.make_causal_mask(lengths, dtype=jnp.bool_)
    np.testing.assert_array_equal(causal, np.broadcast_to(np.tril(np.ones((3, 3), bool)), (2, 1, 3, 3)))
    assert nnx.make_causal_mask(jnp.ones(3)).shape == (1, 3, 3)

    both = nnx.combine_masks(causal, None, nnx.make_attention_mask(lengths, lengths))
    assert both.dtype == jnp.float32
    np.testing.assert_array_equal(both[0, 0], [[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(nnx.combine_masks(causal[:1], jnp.ones((2, 1, 1, 3)), dtype=bool), causal)
    assert nnx.combine_masks(None, None) is None
    for other in (jnp.ones((3, 3)), jnp.ones((2, 1, 3, 4))):
        with pytest.raises(nnx.ShapeError, match=r"combine_masks: expected masks of one rank.*\(2, 1, 3, 3\)"):
            nnx.combine_masks(causal, other)


@pytest.mark.parametrize("window", [0, 2, (3, 1), (0, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("precision", [None, "highest"])
def test_windows(window, is_causal, precision, rng):
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, 3, 4)), jnp.float32) for _ in range(3))
    before, after = (window, window) if isinstance(window, int) else window
    ahead = jnp.arange(6)[None, :] - jnp.arange(6)[:, None]
    mask = (ahead >= -before) & (ahead <= (0 if is_causal else after))
    options = {"precision": precision}
    got = nnx.dot_product_attention(q, k, v, is_causal=is_causal, local_window_size=window, **options)
    expected = nnx.dot_product_attention(q, k, v, mask=mask, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_wrong_windows():
    q = jnp.ones((1, 2, 1, 4))
    for window in (-1, (1, 2, 3), (1, -1)):
        with pytest.raises(ValueError, match=r"a number of positions, or a pair \(before, after\), got"):
            nnx.dot_product_attention(q, q, q, local_window_size=window)


def test_input_positions_need_something_that_takes_them(init):
    layer = nnx.MultiHeadAttention(2, 4, kernel_init=init, ctx=nnx.context(0))
    with pytest.raises(ValueError, match="MultiHeadAttention: `input_positions` are for rotary positions, which"):
        layer(jnp.ones((1, 3, 4)), input_positions=jnp.arange(3))


def test_an_attention_fn_gets_the_input_positions(init):
    seen = []

    def attend(query, key, value, *, input_positions, **options):
        seen.append(input_positions)
        return nnx.dot_product_attention(query, key, value, **options)

    layer = nnx.MultiHeadAttention(2, 4, attention_fn=attend, kernel_init=init, ctx=nnx.context(0))
    layer(jnp.ones((1, 3, 4)), input_positions=jnp.arange(3))
    assert seen[0].tolist() == [0, 1, 2]
