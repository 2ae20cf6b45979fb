"""Explicit axes: every layer gives what it gives on one device, forward and backward, however its inputs are split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.sharding.eight import KINDS, MESHES, make_mesh, needs_devices, put
from tests.sharding.hlo import by_kind

import nnx

BATCH = (("data", "fsdp"),)
SPLIT = {"conv_in": "fsdp", "conv_out": "tensor", "in": "fsdp", "out": "tensor"}
PERIODIC = {"strides": 2, "padding": "CIRCULAR"}
WHOLE = nnx.with_logical_partitioning(nnx.initializers.lecun_normal(), None)
EXPERTS = nnx.with_logical_partitioning(nnx.initializers.lecun_normal(), ("batch", None, "mlp"))

# For each the layer, the shape of its inputs, how these are split, and how its outputs are.
LAYERS = {
    "rnn": (lambda ctx: nnx.RNN(nnx.OptimizedLSTMCell(16, 16, ctx=ctx)), (8, 6, 16), BATCH, (*BATCH, None, "tensor")),
    "attention": (
        lambda ctx: nnx.MultiHeadAttention(4, 16, num_kv_heads=2, normalize_qk=True, rotary=True, ctx=ctx),
        (8, 6, 16),
        BATCH,
        BATCH,
    ),
    "group_norm": (lambda ctx: nnx.GroupNorm(16, num_groups=4, ctx=ctx), (8, 6, 16), BATCH, BATCH),
    "weight_norm": (lambda ctx: nnx.WeightNorm(nnx.Linear(16, 8, ctx=ctx), ctx=ctx), (8, 6, 16), BATCH, None),
    "spectral_norm": (lambda ctx: nnx.SpectralNorm(nnx.Linear(16, 8, ctx=ctx), ctx=ctx), (8, 6, 16), BATCH, None),
    "spectral_norm of conv": (
        lambda ctx: nnx.SpectralNorm(nnx.Conv(8, 16, (3,), ctx=ctx), error_on_non_matrix=False, ctx=ctx),
        (8, 6, 8),
        BATCH,
        None,
    ),
    "lora": (lambda ctx: nnx.LoRALinear(16, 8, lora_rank=2, ctx=ctx), (8, 6, 16), BATCH, (*BATCH, None, "tensor")),
    "conv": (lambda ctx: nnx.Conv(8, 16, (3,), ctx=ctx), (8, 6, 8), BATCH, (*BATCH, None, "tensor")),
    # What is split over the mesh axis of the outputs takes it away from them, and is summed over.
    "conv of split features": (
        lambda ctx: nnx.Conv(8, 16, (3,), ctx=ctx),
        (8, 6, 8),
        ("data", None, "tensor"),
        ("data",),
    ),
    "masked 2-d conv": (
        lambda ctx: nnx.Conv(8, 16, (3, 3), mask=np.eye(16)[:8] * np.ones((3, 3, 1, 1)), **PERIODIC, ctx=ctx),
        (8, 6, 6, 8),
        BATCH,
        (*BATCH, None, None, "tensor"),
    ),
    "conv of split space": (
        lambda ctx: nnx.Conv(8, 16, (3,), ctx=ctx),
        (8, 6, 8),
        ("data", "tensor"),
        ("data", None, "tensor"),
    ),
    "conv in groups": (
        lambda ctx: nnx.Conv(8, 16, (3,), feature_group_count=4, strides=2, kernel_dilation=2, ctx=ctx),
        (8, 9, 8),
        BATCH,
        BATCH,
    ),
    "depthwise conv of split features": (
        lambda ctx: nnx.Conv(8, 8, (3, 2), feature_group_count=8, kernel_init=WHOLE, ctx=ctx),
        (8, 4, 4, 8),
        ("data", None, None, "tensor"),
        ("data", None, None, "tensor"),
    ),
    "transposed": (
        lambda ctx: nnx.ConvTranspose(8, 16, (3,), transpose_kernel=True, **PERIODIC, ctx=ctx),
        (8, 6, 8),
        BATCH,
        (*BATCH, None, "tensor"),
    ),
    "einsum": (
        lambda ctx: nnx.Einsum("...a,hab->...hb", (4, 8, 6), (4, 6), ctx=ctx),
        (8, 6, 8),
        BATCH,
        (*BATCH, None, "tensor"),
    ),
    "einsum of split features": (
        lambda ctx: nnx.Einsum("...a,ab->...b", (8, 16), (16,), ctx=ctx),
        (8, 6, 8),
        ("data", None, "tensor"),
        ("data",),
    ),
    "einsum of experts": (
        lambda ctx: nnx.Einsum("ebd,edf->ebf", (4, 8, 6), (4, 6), kernel_init=EXPERTS, ctx=ctx),
        (4, 6, 8),
        BATCH,
        (*BATCH, None, "tensor"),
    ),
}


@nnx.jit
def forward_and_backward(model, x):
    grads = nnx.grad(lambda model, x: (model(x) ** 2).sum(), argnums=(0, 1))(model, x)
    return model(x), grads


@needs_devices
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in LAYERS])
def test_a_layer_is_that_of_one_device(name, rng):
    make, shape, spec, out_spec = LAYERS[name]
    mesh = make_mesh(MESHES["combined"], "explicit")
    rules = nnx.sharding_rules("combined", mesh, **SPLIT)
    x = rng.normal(size=shape).astype(np.float32)
    expected, expected_grads = forward_and_backward(make(nnx.context(0)), x)
    model = nnx.sharded_init(lambda: make(nnx.context(0)), mesh, rules)
    with jax.set_mesh(mesh):
        y, grads = forward_and_backward(model, put(x, mesh, *spec))
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=1e-5)
    if out_spec is not None:
        assert y.sharding.is_equivalent_to(put(np.zeros(y.shape), mesh, *out_spec).sharding, y.ndim)
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-4)
    for found, kept in zip(grads[0].raw_values, model.filter(nnx.Param).raw_values, strict=True):
        assert found.sharding.is_equivalent_to(kept.sharding, kept.ndim)


@needs_devices
def test_the_gradient_of_a_kernel_in_groups_counts_no_copies(rng):
    # XLA's own is too large by the number of devices that hold the same part of the batch.
    conv = nnx.Conv(4, 8, (3,), feature_group_count=2, use_bias=False, ctx=nnx.context(0))
    x = rng.normal(size=(4, 5, 4)).astype(np.float32)

    def of_first_and_second_order(conv, x):
        state, definition = conv.partition()

        def loss(kernel):
            return (definition.merge(state.replace_values([kernel]))(x) ** 3).sum()

        return jax.grad(loss)(conv.kernel), jax.grad(lambda k: jax.jvp(loss, (k,), (k,))[1])(conv.kernel)

    expected = nnx.jit(of_first_and_second_order)(conv, x)
    mesh = make_mesh({"data": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        found = nnx.jit(of_first_and_second_order)(conv, put(x, mesh, "data"))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@nnx.jit
def extend(layer, x, lengths=None):
    return layer(x, decode=True, lengths=lengths)


def decoded(layer, x, lengths, place):
    """What a cache gives after a prefill of rows of several lengths, a token, a reset and a change of order."""
    outs = [extend(layer, place(x), place(lengths)), extend(layer, place(x[:, :1]))]
    nnx.reset_cache(layer, place(np.arange(8) % 2 == 0))
    nnx.reorder_cache(layer, place(np.array([1, 1, 0, 3, 2, 5, 4, 7])))
    outs.append(extend(layer, place(x[:, 1:2])))
    return outs, layer.cache_index


def cached_layer(max_length):
    options = {"num_kv_heads": 2, "normalize_qk": True, "rotary": True, "local_window_size": 3}
    layer = nnx.MultiHeadAttention(4, 16, **options, ctx=nnx.context(0))
    nnx.init_cache(layer, batch=8, max_length=max_length)
    return layer


@needs_devices
def test_decoding_with_a_cache_is_that_of_one_device(rng):
    create = functools.partial(cached_layer, 10)
    mesh = make_mesh(MESHES["combined"], "explicit")
    x, lengths = rng.normal(size=(8, 5, 16)).astype(np.float32), rng.integers(0, 6, 8)
    expected, index = decoded(create(), x, lengths, jnp.asarray)
    layer = nnx.sharded_init(create, mesh, nnx.sharding_rules("combined", mesh))
    before = layer.cached_key.sharding
    assert tuple(before.spec) == (("data", "fsdp"), None, "tensor", None)
    with jax.set_mesh(mesh):
        found, found_index = decoded(layer, x, lengths, lambda array: put(array, mesh, *BATCH))
    for y, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(found_index, index)
    assert layer.cached_key.sharding.is_equivalent_to(before, 4)


@needs_devices
@pytest.mark.slow
@pytest.mark.parametrize("axes", list(KINDS))
def test_a_token_moves_weights_and_sums_and_nothing_of_the_cache(axes):
    mesh = make_mesh(MESHES["combined"], axes)
    moved = []
    for max_length in (8, 16):
        layer = nnx.sharded_init(
            functools.partial(cached_layer, max_length), mesh, nnx.sharding_rules("combined", mesh)
        )
        with jax.set_mesh(mesh):
            token = put(np.zeros((8, 1, 16), np.float32), mesh, *BATCH)
            moved.append(by_kind(extend.lower(layer, token).compile().as_text()))
    assert moved[0] == moved[1]
    assert set(moved[0][0]) == {"all-gather", "all-reduce"}
