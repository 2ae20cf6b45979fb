"""LoRA layers against NumPy; surgery that keeps Variables, sharing and outputs, and merging that keeps them too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import nnx


@pytest.fixture
def drawn(init):
    """Initializers for both matrices of LoRA: what has been trained is no longer zero."""
    return {"a_initializer": init, "b_initializer": init}


class Model(nnx.Module):
    """Layers in a list, one of them twice, one of a class of its own, and attention."""

    def __init__(self, both):
        ctx = nnx.context(0)
        first, second = (nnx.Linear(4, 4, **both, ctx=ctx) for _ in range(2))
        self.blocks = [first, second, first]
        self.again = second
        self.attention = nnx.MultiHeadAttention(2, 4, **both, ctx=ctx)
        self.special = Doubled(4, 2, **both, ctx=ctx)
        self.head = nnx.Linear(2, 3, **both, ctx=ctx)
        self.head.extra = jnp.ones(2)

    def __call__(self, x):
        x = self.again(self.blocks(x))
        return self.head(self.special(self.attention(x)))


class Doubled(nnx.Linear):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


@pytest.fixture
def model(both):
    return Model(both)


def test_lora_is_a_product_of_two_matrices(drawn, normal):
    x = normal(5, 2, 3)
    for alpha, scale in ((None, 1), (8.0, 4)):
        layer = nnx.LoRA(3, 2, 4, alpha=alpha, **drawn, ctx=nnx.context(0))
        assert (layer.lora_a.shape, layer.lora_b.shape) == ((3, 2), (2, 4))
        matrix = scale * np.asarray(layer.lora_a, np.float64) @ np.asarray(layer.lora_b, np.float64)
        np.testing.assert_allclose(layer(x), np.asarray(x) @ matrix, atol=1e-5)
        np.testing.assert_allclose(layer.delta(), matrix, atol=1e-6)
    with pytest.raises(nnx.ShapeError, match=r"LoRA: expected `x` of shape \[..., 3\] \(in_features=3\), got \(2, 4\)"):
        layer(jnp.ones((2, 4)))


def test_lora_is_added_to_its_base(drawn, both, normal):
    base, x = nnx.Linear(3, 4, **both, ctx=nnx.context(0)), normal(5, 3)
    layer = nnx.LoRA(3, 2, 4, base_module=base, **drawn, ctx=nnx.context(1))
    np.testing.assert_allclose(layer(x), base(x) + x @ layer.delta(), atol=1e-6)
    assert nnx.LoRA(3, 2, 4, base_module=base, dtype=jnp.float16, ctx=nnx.context(1))(x).dtype == jnp.float32
    dropout = nnx.LoRA(3, 2, 3, base_module=nnx.Dropout(1.0), ctx=nnx.context(1))
    np.testing.assert_array_equal(dropout(x, deterministic=False, ctx=nnx.context(dropout=0)), np.zeros((5, 3)))
    with pytest.raises(TypeError, match="LoRA: base_module must be callable, got a Dict"):
        nnx.LoRA(3, 2, 4, base_module=nnx.Dict(), ctx=nnx.context(1))


def test_lora_linear(drawn, both, normal):
    x = normal(5, 3)
    layer = nnx.LoRALinear(3, 4, lora_rank=2, alpha=4, **drawn, **both, ctx=nnx.context(0))
    plain = nnx.Linear(3, 4, **both, ctx=nnx.context(0))
    np.testing.assert_array_equal(layer.kernel, plain.kernel)
    np.testing.assert_allclose(layer(x), plain(x) + 2 * x @ layer.lora.lora_a @ layer.lora.lora_b, atol=1e-5)
    assert layer.get_state().paths == (("bias",), ("kernel",), ("lora", "lora_a"), ("lora", "lora_b"))


@pytest.mark.parametrize(
    ("shape", "sizes", "axis", "out"),
    [((5, 3), 3, -1, (2, 2)), ((2, 5, 3), (2, 3), (0, -1), 4), ((2, 5, 3), (3, 2), (-1, 0), (4,))],
)
def test_lora_linear_general(shape, sizes, axis, out, drawn, both, normal):
    x = normal(*shape)
    layer = nnx.LoRALinearGeneral(sizes, out, axis=axis, lora_rank=2, **drawn, **both, ctx=nnx.context(0))
    merged = nnx.LinearGeneral(sizes, out, axis=axis, **both, ctx=nnx.context(0))
    merged.kernel = merged.kernel + layer.lora.delta().reshape(merged.kernel.shape)
    np.testing.assert_allclose(layer(x), merged(x), atol=1e-5)


@pytest.mark.parametrize("rank", [0, -1])
def test_ranks_are_positive(rank):
    for make in (
        lambda: nnx.LoRA(3, rank, 4, ctx=nnx.context(0)),
        lambda: nnx.LoRALinear(3, 4, lora_rank=rank, ctx=nnx.context(0)),
    ):
        with pytest.raises(ValueError, match=f"LoRA: lora_rank must be at least 1, got {rank}"):
            make()


def test_surgery_shares_variables_and_keeps_outputs(model, init, normal):
    x = normal(2, 5, 4)
    before, definition, head = model(x), model.get_module_def(), model.head
    kernel, paths = model.head.get_variable("kernel"), set(model.get_state().paths)
    assert ("head", "extra") in paths
    replaced = nnx.apply_lora(model, ..., 2, a_initializer=init, ctx=nnx.context(1))
    assert set(replaced) == {
        ("blocks", "0"), ("again",), ("head",), *(("attention", name) for name in ("query", "key", "value", "out")),
    }  # fmt: skip
    assert type(model.head) is nnx.LoRALinear
    assert type(model.attention.query) is nnx.LoRALinearGeneral
    assert type(model.special) is Doubled
    assert model.head.get_variable("kernel") is kernel
    # One layer in several places is one layer in all of them.
    assert model.blocks[0] is model.blocks[2]
    assert model.again is model.blocks[1]
    assert paths < set(model.get_state().paths)
    np.testing.assert_array_equal(model(x), before)
    np.testing.assert_array_equal(model.clone()(x), before)
    assert type(head) is nnx.Linear

    assert set(nnx.lora_merge(model)) == set(replaced)
    assert model.get_module_def() is definition
    assert model.head.get_variable("kernel") is kernel
    np.testing.assert_array_equal(model(x), before)
    assert nnx.lora_merge(model) == ()


def test_merging_keeps_what_was_learned(model, drawn, normal):
    x = normal(2, 5, 4)
    before = model(x)
    nnx.apply_lora(model, ..., 2, alpha=1, **drawn, ctx=nnx.context(1))
    adapted, definition = model(x), model.get_module_def()
    assert np.abs(adapted - before).max() > 0.1
    nnx.lora_merge(model)
    assert model.get_module_def() is not definition
    assert not model.filter(nnx.LoRAParam)
    np.testing.assert_allclose(model(x), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        (nnx.PathGlob("attention/*"), {"attention/query", "attention/key", "attention/value", "attention/out"}),
        (nnx.PathGlob("blocks/2"), {"blocks/0"}),
        (nnx.LinearGeneral, {"attention/query", "attention/key", "attention/value", "attention/out"}),
        (lambda path, layer: getattr(layer, "in_features", None) == 2, {"head"}),
        ((nnx.PathGlob("head"), nnx.PathGlob("again")), {"head", "again"}),
    ],
)
def test_filters_choose_layers(filter, expected, model, init):
    replaced = nnx.apply_lora(model, filter, 1, a_initializer=init, ctx=nnx.context(1))
    assert {"/".join(path) for path in replaced} == expected


def test_only_lora_is_trained(model, drawn, normal):
    x = normal(2, 5, 4)
    nnx.apply_lora(model, nnx.PathGlob("head"), 2, **drawn, ctx=nnx.context(1))

    def loss(model):
        return jnp.square(model(x)).mean()

    frozen = model.filter(nnx.Not(nnx.LoRAParam))
    first = loss(model)
    for _ in range(3):
        gradient = nnx.jit(nnx.grad(loss, wrt=nnx.LoRAParam))(model)
        assert gradient.paths == (("head", "lora", "lora_a"), ("head", "lora", "lora_b"))
        model.update_state(jax.tree.map(lambda p, g: p - 0.05 * g, model.filter(nnx.LoRAParam), gradient))
    assert loss(model) < first
    jax.tree.map(np.testing.assert_array_equal, model.filter(nnx.Not(nnx.LoRAParam)), frozen)
    # They are Params too, and a collection with a name.
    assert model.filter("lora_params").paths == gradient.paths
    assert set(gradient.paths) < set(model.filter(nnx.Param).paths)


def test_surgery_inside_of_jit(model, normal):
    x = normal(2, 5, 4)
    ones = dict.fromkeys(("a_initializer", "b_initializer"), nnx.initializers.ones)

    @nnx.jit
    def adapt(model, ctx):
        nnx.apply_lora(model, nnx.PathGlob("blocks/*"), 2, **ones, ctx=ctx)

    @nnx.jit
    def merge(model):
        nnx.lora_merge(model)

    definition = model.get_module_def()
    adapt(model, nnx.context(1))
    assert type(model.blocks[0]) is nnx.LoRALinear
    assert model.blocks[0] is model.blocks[2]
    adapted = model(x)
    merge(model)
    assert model.get_module_def() is definition
    np.testing.assert_allclose(model(x), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision(dtype, both, drawn, normal):
    x = normal(5, 4)
    single = nnx.Sequence([nnx.Linear(4, 4, **both, ctx=nnx.context(0))])
    low = nnx.Sequence([nnx.Linear(4, 4, **both, dtype=dtype, param_dtype=dtype, ctx=nnx.context(0))])
    for model in (single, low):
        nnx.apply_lora(model, ..., 2, **drawn, ctx=nnx.context(1))
    with jax.numpy_dtype_promotion("strict"):
        y = low(jnp.asarray(x, dtype))
    assert y.dtype == dtype
    assert low[0].lora.lora_a.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(y).astype(np.float32), single(x), atol=0.05, rtol=0.05)
    gradient = nnx.grad(lambda model: jnp.sum(model(x).astype(jnp.float32) ** 2))(low)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    nnx.lora_merge(low)
    assert low[0].kernel.dtype == dtype
    np.testing.assert_allclose(np.asarray(low(x)).astype(np.float32), single(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", [nnx.LoRALinear, nnx.LoRALinearGeneral])
def test_gradients_by_finite_differences(kind, both, drawn, rng):
    with jax.enable_x64(True):
        options = {"param_dtype": jnp.float64, "lora_param_dtype": jnp.float64, "lora_rank": 2, "alpha": 3}
        state, definition = kind(3, 4, **both, **drawn, **options, ctx=nnx.context(0)).partition()
        x = jnp.asarray(rng.normal(size=(2, 3)))
        check_grads(lambda state, x: definition.merge(state)(x), (state, x), order=1, modes=("rev",), rtol=1e-6)


def test_what_cannot_be_replaced(model, both):
    ctx = nnx.context(1)
    with pytest.raises(
        ValueError, match=r"matches no Linear or LinearGeneral of the Model.*paths of layers.*head \(Lin"
    ):
        nnx.apply_lora(model, nnx.PathGlob("**/kernel"), 2, ctx=ctx)
    linear = nnx.Linear(2, 3, **both, ctx=ctx)
    with pytest.raises(ValueError, match=r"apply_lora: the model itself is the Linear .*nnx.Sequence\(\[layer\]\)"):
        nnx.apply_lora(linear, ..., 2, ctx=ctx)
    with pytest.raises(ValueError, match="lora_merge: the model itself is the LoRALinear"):
        nnx.lora_merge(nnx.LoRALinear(2, 3, lora_rank=1, ctx=ctx))
    nnx.apply_lora(model, nnx.PathGlob("head"), 2, ctx=ctx)
    with pytest.raises(ValueError, match=r"head \(LoRALinear\)"):
        nnx.apply_lora(model, nnx.PathGlob("head"), 2, ctx=ctx)


def test_a_tied_kernel_is_not_merged(both):
    ctx = nnx.context(0)
    model = nnx.Sequence([nnx.Linear(3, 3, **both, ctx=ctx), nnx.Linear(3, 3, **both, ctx=ctx)])
    model[1].kernel = model[0].get_variable("kernel")
    nnx.apply_lora(model, nnx.PathGlob("0"), 2, ctx=ctx)
    before = model.get_module_def()
    with pytest.raises(
        ValueError, match="lora_merge: the kernel of `0` is also `1/kernel`, which merging would change"
    ):
        nnx.lora_merge(model)
    assert model.get_module_def() is before
    value = model[0].kernel
    del model[0].kernel
    model[0].kernel = nnx.Param(value)
    assert nnx.lora_merge(model) == (("0",),)


def test_layers_with_a_map_for_each_index_are_left_alone():
    ctx = nnx.context(0)
    model = nnx.Sequence([nnx.LinearGeneral(3, 3, batch_axis={0: 2}, ctx=ctx), nnx.LinearGeneral(3, 4, ctx=ctx)])
    assert nnx.apply_lora(model, ..., 1, ctx=ctx) == (("1",),)
    with pytest.raises(ValueError, match="LoRALinearGeneral: the map of low rank is one for all, so `batch_axis`"):
        nnx.LoRALinearGeneral(3, 4, lora_rank=1, batch_axis={0: 2}, ctx=ctx)
