"""The options that many layers have alike: metadata, `promote_dtype`, functions for the product, `out_sharding`."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx
from nnx import layers

# Each layer with its arguments, inputs of a call, and the parameters that each `*_metadata` is of.
LINEAR = {"kernel_metadata": ["kernel"], "bias_metadata": ["bias"]}
AFFINE = {"scale_metadata": ["scale"], "bias_metadata": ["bias"]}
CELL = {
    "kernel_metadata": ["dense_i/kernel"],
    "recurrent_kernel_metadata": ["dense_h/kernel"],
    "bias_metadata": ["dense_i/bias"],
}
GATES = {
    "kernel_metadata": ["ii/kernel", "if_/kernel", "ig/kernel", "io/kernel"],
    "recurrent_kernel_metadata": ["hi/kernel", "hf/kernel", "hg/kernel", "ho/kernel"],
    "bias_metadata": ["hi/bias", "hf/bias", "hg/bias", "ho/bias"],
}
PARTS = ("query", "key", "value")
ATTENTION = {
    "kernel_metadata": [f"{part}/kernel" for part in (*PARTS, "out")],
    "out_kernel_metadata": ["out/kernel"],
    "bias_metadata": [f"{part}/bias" for part in (*PARTS, "out")],
    "out_bias_metadata": ["out/bias"],
    "query_ln_scale_metadata": ["query_ln/scale"],
    "key_ln_scale_metadata": ["key_ln/scale"],
}
LORA = {"a_metadata": ["lora/lora_a"], "b_metadata": ["lora/lora_b"]}
STATE = ((2, 4), (2, 3))
LAYERS = {
    "Linear": ((3, 4), {}, [(2, 3)], LINEAR),
    "LinearGeneral": ((3, (2, 4)), {"batch_axis": {0: 2}}, [(2, 5, 3)], LINEAR),
    "Einsum": (("ab,bc->ac", (3, 4), (4,)), {}, [(2, 3)], LINEAR),
    "Conv": ((3, 4, 2), {}, [(2, 5, 3)], LINEAR),
    "ConvTranspose": ((3, 4, 2), {"transpose_kernel": True}, [(2, 5, 3)], LINEAR),
    "Embed": ((7, 4), {}, [np.array([1, 2])], {"embedding_metadata": ["embedding"]}),
    "PReLU": ((), {}, [(2, 3)], {"negative_slope_metadata": ["negative_slope"]}),
    "BatchNorm": ((4,), {"use_running_average": False}, [(2, 4)], AFFINE),
    "LayerNorm": ((4,), {}, [(2, 4)], AFFINE),
    "GroupNorm": ((4, 2), {}, [(2, 5, 4)], AFFINE),
    "InstanceNorm": ((4,), {}, [(2, 5, 4)], AFFINE),
    "RMSNorm": ((4,), {}, [(2, 4)], {"scale_metadata": ["scale"]}),
    "LoRA": ((3, 2, 4), {}, [(2, 3)], {"a_metadata": ["lora_a"], "b_metadata": ["lora_b"]}),
    "LoRALinear": ((3, 4), {"lora_rank": 2}, [(2, 3)], LORA),
    "LoRALinearGeneral": ((3, (2, 4)), {"lora_rank": 2}, [(2, 3)], LORA),
    "SimpleCell": ((3, 4), {"dtype": None}, STATE, CELL),
    "GRUCell": ((3, 4), {}, STATE, CELL),
    "OptimizedLSTMCell": ((3, 4), {}, [(STATE[0], STATE[0]), STATE[1]], {**CELL, "bias_metadata": ["dense_h/bias"]}),
    "LSTMCell": ((3, 4), {}, [(STATE[0], STATE[0]), STATE[1]], GATES),
    "MultiHeadAttention": ((2, 4), {"normalize_qk": True}, [(2, 3, 4)], ATTENTION),
}


def parameters(name):
    return inspect.signature(getattr(layers, name).__init__).parameters


def make(name, **options):
    """The layer, and its inputs."""
    args, fixed, inputs, _ = LAYERS[name]
    ctx = {"ctx": nnx.context(0)} if "ctx" in parameters(name) else {}

    def array(x):
        if isinstance(x, np.ndarray):
            return jnp.asarray(x)
        return jnp.ones(x) if isinstance(x[0], int) else tuple(map(array, x))

    return getattr(layers, name)(*args, **ctx, **{**fixed, **options}), tuple(map(array, inputs))


def shapes(name, **options):
    """The State of the layer, with nothing drawn."""
    return nnx.eval_shape(lambda: make(name, **options)[0]).get_state()


def test_no_layer_is_left_out():
    asking = {
        name
        for name in layers.__all__
        if isinstance(getattr(layers, name), type)
        and issubclass(getattr(layers, name), nnx.Module)
        and any(option.endswith(("metadata", "promote_dtype")) for option in parameters(name))
    }
    assert asking == set(LAYERS)
    for name, (_, _, _, metadata) in LAYERS.items():
        assert {option for option in parameters(name) if option.endswith("_metadata")} == set(metadata)


@pytest.mark.parametrize("name", LAYERS)
def test_metadata_reach_their_parameters_and_no_others(name):
    metadata = LAYERS[name][3]
    plain = shapes(name)
    for option, paths in metadata.items():
        marked = shapes(name, **{option: {"tag": 7}})
        found = {"/".join(path): v.metadata for path, v in marked.items() if isinstance(v, nnx.Variable)}
        assert sorted(path for path, data in found.items() if data.get("tag") == 7) == sorted(paths)
        # The layer's names of axes stay beside them.
        assert all(v.sharding == marked[path].sharding for path, v in plain.items() if isinstance(v, nnx.Variable))
        path = tuple(paths[0].split("/"))
        names = tuple("abcd"[: plain[path].value.ndim])
        assert shapes(name, **{option: {"sharding": names}})[path].sharding == names
        assert marked[path].value.shape == plain[path].value.shape


def test_metadata_of_the_output_come_before_those_of_all_projections():
    state = shapes("MultiHeadAttention", kernel_metadata={"tag": 1}, out_kernel_metadata={"tag": 2})
    assert [state[part, "kernel"].metadata["tag"] for part in (*PARTS, "out")] == [1, 1, 1, 2]


def test_metadata_win_over_the_initializer():
    init = nnx.with_metadata(nnx.initializers.zeros, sharding=("a", "b"), tag=1, other=2)
    layer = nnx.Linear(2, 3, kernel_init=init, kernel_metadata={"sharding": None, "tag": 3}, ctx=nnx.context(0))
    variable = layer.get_variable("kernel")
    assert variable.sharding is None
    assert dict(variable.metadata) == {"tag": 3, "other": 2}


def test_metadata_are_static():
    with pytest.raises(nnx.VariableError, match="metadata `tag` is"):
        nnx.Linear(2, 3, kernel_metadata={"tag": jnp.ones(2)}, ctx=nnx.context(0))


def halves(arrays, *, dtype=None, inexact=True):
    """What stands for `promote_dtype` here: all in float16, whatever was asked for."""
    return tuple(None if x is None else jnp.asarray(x, jnp.float16) for x in arrays)


@pytest.mark.parametrize("name", LAYERS)
def test_promote_dtype_casts(name):
    chosen = {option: halves for option in parameters(name) if option.endswith("promote_dtype")}
    layer, inputs = make(name, dtype=None, **chosen)
    if name in ("LoRALinear", "LoRALinearGeneral"):
        # The map's own alone: what it gives is cast to the dtype of the layer.
        layer = layer.lora
    out = nnx.eval_shape(lambda layer, *inputs: layer(*inputs), layer, *inputs)
    assert (out[1] if isinstance(out, tuple) else out).dtype == jnp.float16


def test_promote_dtype_is_told_the_dtype():
    asked = []

    def record(arrays, *, dtype=None, inexact=True):
        asked.append((len(arrays), dtype))
        return layers.promote_dtype(arrays, dtype=dtype, inexact=inexact)

    layer = nnx.Linear(2, 3, use_bias=False, dtype=jnp.bfloat16, promote_dtype=record, ctx=nnx.context(0))
    assert layer(jnp.ones(2)).dtype == jnp.bfloat16
    nnx.LayerNorm(2, dtype=jnp.bfloat16, promote_dtype=record, ctx=nnx.context(0))(jnp.ones(2))
    norm = nnx.BatchNorm(2, use_running_average=True, promote_dtype=record, ctx=nnx.context(0))
    norm(jnp.ones((1, 2)))
    layers.dot_product_attention(*[jnp.ones((2, 1, 2))] * 3, promote_dtype=record)
    assert asked == [(3, jnp.bfloat16), (3, jnp.bfloat16), (5, None), (3, None)]


@pytest.mark.parametrize("name", LAYERS)
def test_options_that_nobody_chose_are_no_part_of_the_structure(name):
    given = {
        option: value.default
        for option, value in parameters(name).items()
        if option.endswith(("promote_dtype", "preferred_element_type", "_general", "_dilated", "einsum_op"))
    }
    (plain, _), (same, _) = make(name), make(name, **given)
    assert plain.get_module_def() is same.get_module_def()
    assert not set(given) & set(vars(plain))
    if "promote_dtype" in given:
        other, _ = make(name, promote_dtype=halves)
        assert other.get_module_def() is not plain.get_module_def()


class Counted(nnx.Module):
    """A product that scales its outputs by a parameter of its own, and counts its calls."""

    def __init__(self, function):
        self.function = function
        self.scale = nnx.Param(jnp.float32(3.0))
        self.calls = nnx.Variable(0)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.scale * self.function(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "option", "function"),
    [
        ("Linear", "dot_general", lax.dot_general),
        ("LinearGeneral", "dot_general", lax.dot_general),
        ("Einsum", "einsum_op", jnp.einsum),
        ("Conv", "conv_general_dilated", lax.conv_general_dilated),
    ],
)
def test_the_product_may_be_a_module(name, option, function, init):
    plain, (x,) = make(name, kernel_init=init)
    layer, _ = make(name, kernel_init=init, **{option: Counted(function)})
    np.testing.assert_allclose(layer(x), 3 * plain(x), rtol=1e-6)
    # Its state is that of any other submodule: written under jit, and learned.
    grads = nnx.jit(nnx.grad(lambda layer, x: layer(x).sum()))(layer, x)
    np.testing.assert_allclose(grads[option, "scale"].value, plain(x).sum(), rtol=1e-5)
    assert getattr(layer, option).calls == 2


def test_dot_general_cls_makes_it_anew(init):
    plain = nnx.LinearGeneral(3, 4, kernel_init=init, ctx=nnx.context(0))
    layer = nnx.LinearGeneral(
        3, 4, kernel_init=init, dot_general_cls=lambda: Counted(lax.dot_general), ctx=nnx.context(0)
    )
    np.testing.assert_allclose(layer(jnp.ones(3)), 3 * plain(jnp.ones(3)), rtol=1e-6)
    assert layer.get_state().paths == plain.get_state().paths


def test_a_projection_of_attention_may_be_given_its_product_later(init):
    layer = nnx.MultiHeadAttention(2, 4, kernel_init=init, ctx=nnx.context(0))
    before = layer(jnp.ones((1, 3, 4)))
    layer.out.dot_general = Counted(lax.dot_general)
    np.testing.assert_allclose(layer(jnp.ones((1, 3, 4))), 3 * before, rtol=1e-6)


def test_a_product_of_a_users_own_is_asked_for_no_more_than_is_needed(both):
    def exact(x, kernel, dimensions, precision=None):
        return lax.dot_general(x, kernel, dimensions, precision="highest")

    layer = nnx.Linear(3, 4, dot_general=exact, ctx=nnx.context(0), **both)
    plain = nnx.Linear(3, 4, ctx=nnx.context(0), **both)
    np.testing.assert_allclose(layer(jnp.ones(3)), plain(jnp.ones(3)), rtol=1e-6)


@pytest.mark.parametrize("name", ["Linear", "LinearGeneral", "Einsum", "Conv", "ConvTranspose"])
def test_preferred_element_type_is_that_of_the_product(name):
    layer, (x,) = make(name, param_dtype=jnp.bfloat16, preferred_element_type="float32")
    # What is added to it may be of another type, wherever promotion is strict.
    with jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(layer, x.astype(jnp.bfloat16)).dtype == jnp.float32
    if not name.startswith("Conv"):  # JAX refuses a narrower one there
        narrow, _ = make(name, preferred_element_type="bfloat16")
        assert narrow(x).dtype == jnp.float32
        narrow.bias = None
        assert narrow(x).dtype == jnp.bfloat16


def explicit_mesh():
    """A mesh of one device, on which types say how arrays are split all the same."""
    axes = (AxisType.Explicit, AxisType.Explicit)
    return jax.make_mesh((1, 1), ("data", "model"), axis_types=axes, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("Linear", {"out_sharding": P("data", "model")}),
        ("LinearGeneral", {"out_sharding": P("data", None, None, "model")}),
        ("Einsum", {"out_sharding": P("data", "model")}),
        ("Conv", {"out_sharding": P("data", None, "model")}),
        ("Embed", {"out_sharding": P("data", "model")}),
        ("LoRALinear", {"out_sharding": P("data", "model")}),
        ("LoRALinearGeneral", {"out_sharding": P("data", "model", None)}),
        (
            "MultiHeadAttention",
            {"out_sharding": P("data", None, "model"), "qkv_sharding": P("data", None, "model", None)},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_out_sharding_splits_the_outputs(name, call):
    mesh = explicit_mesh()
    layer, inputs = make(name)
    state, definition = layer.partition()
    with jax.set_mesh(mesh):
        state = jax.device_put(state, NamedSharding(mesh, P()))
        inputs = jax.device_put(inputs, NamedSharding(mesh, P("data")))

        def run(state, *inputs, **call):
            return definition.merge(state)(*inputs, **call)

        def loss(state, *inputs):
            return run(state, *inputs, **call).sum()

        assert "model" not in tuple(jax.eval_shape(run, state, *inputs).sharding.spec)
        split = jax.eval_shape(lambda *args: run(*args, **call), state, *inputs)
        assert tuple(split.sharding.spec) == tuple(call["out_sharding"])
        jax.eval_shape(jax.grad(loss, allow_int=True), state, *inputs)


def test_out_sharding_of_a_convolution_with_several_batch_axes(init):
    mesh = explicit_mesh()
    layer = nnx.Conv(3, 4, 2, kernel_init=init, ctx=nnx.context(0))
    x = jnp.ones((2, 3, 5, 3))
    expected = layer(x)
    with jax.set_mesh(mesh):
        y = layer(jax.device_put(x, NamedSharding(mesh, P("data"))), P("data", None, None, "model"))
        assert tuple(jax.typeof(y).sharding.spec) == ("data", None, None, "model")
        np.testing.assert_array_equal(y, expected)


def test_out_sharding_of_logits():
    mesh = explicit_mesh()
    layer = nnx.Embed(7, 4, ctx=nnx.context(0))
    with jax.set_mesh(mesh):
        query = jax.device_put(jnp.ones((2, 4)), NamedSharding(mesh, P("data")))
        logits = jax.eval_shape(lambda query: layer.attend(query, P(None, "model")), query)
    assert tuple(logits.sharding.spec) == (None, "model")


@pytest.mark.parametrize("metadata", [[("a", 1)], {"value": 1}, {1: "a"}, None])
def test_metadata_that_are_none_are_refused(metadata):
    for make in (
        lambda: nnx.Linear(2, 3, kernel_metadata=metadata, ctx=nnx.context(0)),
        lambda: nnx.PReLU(negative_slope_metadata=metadata),
    ):
        with pytest.raises(TypeError, match=r"`kernel_metadata` and its kin\) are values by name.*of shape \("):
            make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ctx: nnx.Linear(2, 3, dot_general="fast", ctx=ctx), r"Linear: `dot_general` is a function, got str"),
        (lambda ctx: nnx.BatchNorm(2, promote_dtype=None, ctx=ctx), r"BatchNorm: `promote_dtype` is a function, got"),
        (
            lambda ctx: nnx.GRUCell(2, 3, carry_init=1.0, ctx=ctx),
            r"GRUCell: `carry_init` is a function, got float: 1.0",
        ),
        (
            lambda ctx: nnx.Conv(2, 3, 3, preferred_element_type="int7", ctx=ctx),
            r"Conv: `preferred_element_type` is a dtype, got 'int7'",
        ),
    ],
)
def test_options_that_are_none_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make(nnx.context(0))
