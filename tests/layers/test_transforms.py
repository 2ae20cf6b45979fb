"""Every layer in the transforms: abstract evaluation, statistics under vmap, dropout in scans, layers in stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx

# A layer, what it takes, and the names of the streams that its call draws from.
LAYERS = {
    "Linear": (lambda ctx: nnx.Linear(4, 3, ctx=ctx), (2, 4)),
    "LinearGeneral": (lambda ctx: nnx.LinearGeneral((2, 2), (3, 2), axis=(-2, -1), ctx=ctx), (5, 2, 2)),
    "MLP": (lambda ctx: nnx.MLP(4, 8, 3, ctx=ctx), (2, 4)),
    "Einsum": (lambda ctx: nnx.Einsum("nta,hab->nthb", (2, 4, 3), (2, 3), ctx=ctx), (2, 5, 4)),
    "Conv": (lambda ctx: nnx.Conv(4, 3, (3, 3), ctx=ctx), (2, 5, 5, 4)),
    "ConvTranspose": (
        lambda ctx: nnx.ConvTranspose(4, 3, (3, 2), 2, padding="CIRCULAR", transpose_kernel=True, ctx=ctx),
        (2, 3, 2, 4),
    ),
    "BatchNorm": (lambda ctx: nnx.BatchNorm(4, use_running_average=False, ctx=ctx), (3, 4)),
    "LayerNorm": (lambda ctx: nnx.LayerNorm(4, ctx=ctx), (3, 4)),
    "RMSNorm": (lambda ctx: nnx.RMSNorm(4, ctx=ctx), (3, 4)),
    "GroupNorm": (lambda ctx: nnx.GroupNorm(4, num_groups=2, ctx=ctx), (3, 4)),
    "InstanceNorm": (lambda ctx: nnx.InstanceNorm(4, ctx=ctx), (3, 5, 4)),
    "WeightNorm": (lambda ctx: nnx.WeightNorm(nnx.Linear(4, 3, ctx=ctx), ctx=ctx), (2, 4)),
    "SpectralNorm": (lambda ctx: nnx.SpectralNorm(nnx.Linear(4, 3, ctx=ctx), ctx=ctx), (2, 4)),
    "PReLU": (lambda ctx: nnx.PReLU(), (2, 4)),
    "AdaptiveMaxPool": (lambda ctx: nnx.AdaptiveMaxPool((2,)), (2, 5, 4)),
    "Bidirectional": (
        lambda ctx: nnx.Bidirectional(*(nnx.RNN(nnx.GRUCell(4, 3, ctx=ctx)) for _ in range(2))),
        (2, 5, 4),
    ),
    "MultiHeadAttention": (lambda ctx: nnx.MultiHeadAttention(2, 4, ctx=ctx), (2, 5, 4)),
    "RNN": (lambda ctx: nnx.RNN(nnx.LSTMCell(4, 3, ctx=ctx)), (2, 5, 4)),
    "LoRALinear": (lambda ctx: nnx.LoRALinear(4, 3, lora_rank=2, ctx=ctx), (2, 4)),
    "Dropout": (lambda ctx: nnx.Dropout(0.5, deterministic=True), (2, 4)),
}


def shapes(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", LAYERS)
def test_eval_shape_of_a_layer_and_of_its_call(name):
    make, shape = LAYERS[name]
    abstract = nnx.eval_shape(lambda: make(nnx.context(0)))
    state, moduledef = abstract.partition()
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
    concrete = make(nnx.context(0))
    real, real_moduledef = concrete.partition()
    assert moduledef is real_moduledef
    assert shapes(state) == shapes(real)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    out = nnx.eval_shape(lambda layer, x: layer(x), abstract, x)
    got = concrete(jnp.ones(shape))
    assert shapes(out) == shapes(got)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_under_jit_vmap_and_remat_is_the_layer(name):
    make, shape = LAYERS[name]
    layer, same = make(nnx.context(0)), make(nnx.context(0))
    x = jax.random.normal(jax.random.key(1), shape)
    expected = same(x)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, x), expected, rtol=1e-5, atol=1e-5)
    layer = make(nnx.context(0))
    np.testing.assert_allclose(nnx.remat(layer)(x), expected, rtol=1e-5, atol=1e-5)
    layer = make(nnx.context(0))
    mapped = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0), variable_reduce={nnx.BatchStat: "mean"})
    np.testing.assert_allclose(mapped(layer, x[None])[0], expected, rtol=1e-5, atol=1e-5)
    states = [jax.tree.map(np.asarray, jax.tree.leaves(m.partition()[0])) for m in (layer, same)]
    for new, old in zip(*states, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)


def test_batch_norm_under_vmap_says_how_statistics_become_one():
    norm = nnx.BatchNorm(3, use_running_average=False, ctx=nnx.context(0))
    x = jax.random.normal(jax.random.key(0), (4, 5, 3))
    with pytest.raises(nnx.VariableError, match=r"`mean` \(BatchStat\), `var` \(BatchStat\).*variable_reduce"):
        nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(norm, x)
    np.testing.assert_array_equal(norm.mean, np.zeros(3))
    nnx.vmap(lambda m, x: m(x), in_axes=(None, 0), variable_reduce={nnx.BatchStat: "mean"})(norm, x)
    np.testing.assert_allclose(norm.mean, 0.01 * x.mean((0, 1)), rtol=1e-4, atol=1e-6)


def test_batch_norm_under_vmap_with_an_axis_name_has_the_statistics_of_the_whole_batch():
    whole = nnx.BatchNorm(3, use_running_average=False, ctx=nnx.context(0))
    split = nnx.BatchNorm(3, use_running_average=False, axis_name="batch", ctx=nnx.context(0))
    x = jax.random.normal(jax.random.key(0), (4, 5, 3))
    expected = whole(x.reshape(20, 3)).reshape(4, 5, 3)
    # The values are the same along the axis, and JAX knows it: no reduction is asked for.
    got = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0), axis_name="batch")(split, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(split.mean, whole.mean, rtol=1e-5, atol=1e-6)


class Block(nnx.Module):
    def __init__(self, dim, *, ctx):
        self.linear = nnx.Linear(dim, dim, ctx=ctx)
        self.norm = nnx.BatchNorm(dim, ctx=ctx)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, *, ctx):
        x = self.dropout(nnx.relu(self.norm(self.linear(x), ctx=ctx)), ctx=ctx)
        self.sow("intermediates", "zeros", (x == 0).sum())
        return x


TRAINING = {"deterministic": False, "use_running_average": False}
N, DIM = 3, 8


def test_a_stack_is_the_loop_over_its_layers():
    stack = nnx.Stack(Block, N)(DIM, ctx=nnx.context(0))
    ctx = nnx.context(flags={"deterministic": True, "use_running_average": False})
    x = jax.random.normal(jax.random.key(1), (5, DIM))
    blocks = []
    for i in range(N):
        block = Block(DIM, ctx=nnx.context(1))
        state, _ = stack[i].partition()
        block.update_state(state)
        blocks.append(block)
    expected = x
    for block in blocks:
        expected = block(expected, ctx=ctx)
    np.testing.assert_allclose(stack(x, ctx=ctx), expected, rtol=1e-5, atol=1e-5)
    for i, block in enumerate(blocks):
        np.testing.assert_allclose(stack.layers.norm.mean[i], block.norm.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stack[i].linear.kernel, block.linear.kernel)


def test_dropout_in_a_stack_differs_by_layer_and_by_call():
    class Masks(nnx.Module):
        def __init__(self, *, ctx):
            self.dropout = nnx.Dropout(0.5)

        def __call__(self, x, *, ctx):
            self.sow("intermediates", "mask", self.dropout(jnp.ones(64), ctx=ctx) > 0)
            return x

    stack = nnx.Stack(Masks, N)(ctx=nnx.context(0))
    ctx = nnx.context(dropout=0, flags=TRAINING)
    masks = []
    for _ in range(2):
        stack(jnp.zeros(()), ctx=ctx)
        (mask,) = stack.layers.mask
        assert mask.shape == (N, 64)
        masks += [row.tobytes() for row in np.asarray(mask)]
    assert len(set(masks)) == 2 * N
    assert int(ctx.rngs["dropout"].count) == 2


def test_the_layers_axis_has_a_name_in_the_sharding():
    class Sharded(nnx.Module):
        def __init__(self, *, ctx):
            self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (2, 3)), sharding=("in", "out"))

        def __call__(self, x):
            seen.append(self.get_variable("w").sharding)
            return x

    seen = []
    stack = nnx.Stack(Sharded, 4)(ctx=nnx.context(0))
    assert stack.layers.get_variable("w").sharding == ("layers", "in", "out")
    stack(jnp.ones(()))
    assert seen == [("in", "out")]
    assert stack[0].get_variable("w").sharding == ("in", "out")


def test_compiling_ninety_six_layers_takes_what_four_take():
    ctx = nnx.context(dropout=1, flags=TRAINING)
    x = jnp.ones((5, DIM))
    texts = []
    for n in (4, 96):
        stack = nnx.Stack(Block, n)(DIM, ctx=nnx.context(0))
        lowered = nnx.jit(lambda stack, x, ctx: stack(x, ctx=ctx)).lower(stack, x, ctx)
        texts.append(len(lowered.as_text().splitlines()))
    assert texts[0] == texts[1]  # one body, however often it runs


def test_remat_in_a_stack_takes_less_memory_and_gives_the_same_gradient():
    x = jax.random.normal(jax.random.key(1), (64, 32))
    sizes, norms = [], []
    for remat in (False, True):
        stack = nnx.Stack(Block, 16, remat=remat)(32, ctx=nnx.context(0))
        ctx = nnx.context(dropout=1, flags=TRAINING)
        step = nnx.jit(nnx.grad(lambda stack, x, ctx: (stack(x, ctx=ctx) ** 2).sum()))
        sizes.append(step.lower(stack, x, ctx).compile().memory_analysis().temp_size_in_bytes)
        norms.append(step(stack, x, ctx)["layers", "linear", "kernel"].value)
        assert int(ctx.rngs["dropout"].count) == 1
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4, atol=1e-5)
    assert sizes[1] < sizes[0]
