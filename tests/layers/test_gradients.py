"""Every layer's gradients, by parameters and inputs, against finite differences in float64."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.test_util import check_grads

import nnx
from nnx import layers

F64 = {"param_dtype": jnp.float64}
LAYERS = {
    "Linear": (lambda ctx: nnx.Linear(4, 3, ctx=ctx, **F64), (2, 4)),
    "LinearGeneral": (lambda ctx: nnx.LinearGeneral((2, 2), (3, 2), axis=(-2, -1), ctx=ctx, **F64), (3, 2, 2)),
    "MLP": (lambda ctx: nnx.MLP(4, 5, 3, ctx=ctx, **F64), (2, 4)),
    "BatchNorm": (lambda ctx: nnx.BatchNorm(3, use_running_average=False, ctx=ctx, **F64), (5, 3)),
    "BatchNorm, running": (lambda ctx: nnx.BatchNorm(3, use_running_average=True, ctx=ctx, **F64), (5, 3)),
    "LayerNorm": (lambda ctx: nnx.LayerNorm(4, ctx=ctx, **F64), (3, 4)),
    "LayerNorm, slow": (lambda ctx: nnx.LayerNorm(4, use_fast_variance=False, ctx=ctx, **F64), (3, 4)),
    "RMSNorm": (lambda ctx: nnx.RMSNorm(4, ctx=ctx, **F64), (3, 4)),
    "GroupNorm": (lambda ctx: nnx.GroupNorm(4, num_groups=2, ctx=ctx, **F64), (2, 3, 4)),
    "AvgPool": (lambda ctx: nnx.AvgPool((2,)), (2, 4, 3)),
    "MaxPool": (lambda ctx: nnx.MaxPool((2,)), (2, 4, 3)),
    "MinPool": (lambda ctx: nnx.MinPool((2,)), (2, 4, 3)),
    "AdaptiveAvgPool": (lambda ctx: nnx.AdaptiveAvgPool((3,)), (2, 5, 3)),
    "AdaptiveMaxPool": (lambda ctx: nnx.AdaptiveMaxPool((3,)), (2, 5, 3)),
    "GlobalAvgPool": (lambda ctx: nnx.GlobalAvgPool(), (2, 5, 3)),
    "GlobalMaxPool": (lambda ctx: nnx.GlobalMaxPool(), (2, 5, 3)),
    "Dropout": (lambda ctx: _Dropping(nnx.Dropout(0.4)), (4, 5)),
    "DropPath": (lambda ctx: _Dropping(nnx.DropPath(0.4)), (6, 5)),
    "Bidirectional": (lambda ctx: nnx.Bidirectional(_rnn(ctx), _rnn(ctx)), (2, 3, 4)),
    "RotaryEmbedding": (lambda ctx: _Turned(), (4, 2, 4)),
    "MultiHeadAttention": (
        lambda ctx: nnx.MultiHeadAttention(
            4, 8, num_kv_heads=2, normalize_qk=True, rotary=True, is_causal=True, local_window_size=2, ctx=ctx, **F64
        ),
        (2, 5, 8),
    ),
    "MultiHeadAttention, plain": (
        lambda ctx: nnx.MultiHeadAttention(2, 4, precision="highest", ctx=ctx, **F64),
        (2, 3, 4),
    ),
}


class _Turned(nnx.Module):
    def __init__(self):
        self.rotary = nnx.RotaryEmbedding(4)

    def __call__(self, x):
        return self.rotary(x, jnp.arange(x.shape[-3]))


class _Dropping(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x, deterministic=False, ctx=nnx.context(dropout=3))


def _rnn(ctx):
    return nnx.RNN(nnx.SimpleCell(4, 3, dtype=jnp.float64, ctx=ctx, **F64))


_FINITE = "test_gradients_by_finite_differences"
ELSEWHERE = {
    "Conv": ("test_conv.py", _FINITE),
    "ConvTranspose": ("test_conv_transpose.py", _FINITE),
    "Einsum": ("test_einsum.py", _FINITE),
    "Embed": ("test_gradients.py", "test_embeddings"),
    "GRUCell": ("test_recurrent.py", _FINITE),
    "InstanceNorm": ("test_instance_norm.py", _FINITE),
    "LSTMCell": ("test_recurrent.py", _FINITE),
    "LoRA": ("test_lora.py", _FINITE),
    "LoRALinear": ("test_lora.py", _FINITE),
    "LoRALinearGeneral": ("test_lora.py", _FINITE),
    "OptimizedLSTMCell": ("test_recurrent.py", _FINITE),
    "PReLU": ("test_activations.py", "test_prelu_gradients_by_finite_differences"),
    "RNN": ("test_recurrent.py", _FINITE),
    "SimpleCell": ("test_recurrent.py", _FINITE),
    "SpectralNorm": ("test_weight_norms.py", "test_spectral_norm_gradients_by_finite_differences"),
    "WeightNorm": ("test_weight_norms.py", "test_weight_norm_gradients_by_finite_differences"),
}
"""Where the layers are checked that the table above leaves out: a file and a test in it, which names the layer."""


def test_no_layer_is_left_out():
    modules = {
        name
        for name in layers.__all__
        if isinstance(made := getattr(layers, name), type) and issubclass(made, nnx.Module)
    }
    here = {name.partition(",")[0] for name in LAYERS}
    assert {*here, *ELSEWHERE} == modules - {"RNNCellBase"}
    assert not here & set(ELSEWHERE)
    for name, (file, test) in ELSEWHERE.items():
        source = (Path(__file__).parent / file).read_text(encoding="utf-8")
        tests = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        assert "check_grads" in {node.id for node in ast.walk(tests[test]) if isinstance(node, ast.Name)}, name
        assert re.search(rf"\b{name}\b", source), f"{file} does not name {name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_against_finite_differences(name):
    make, shape = LAYERS[name]
    with jax.enable_x64(True):
        layer = make(nnx.context(0))
        (params, rest), moduledef = layer.partition(nnx.Param, ...)
        x = jax.random.normal(jax.random.key(1), shape, jnp.float64)

        def run(params, x):
            return moduledef.merge(params, rest)(x)

        # Angles and the statistics of a rotation are in float32 whatever the inputs are.
        tolerance = 1e-3 if "Attention" in name or "Rotary" in name else 1e-6
        check_grads(jax.jit(run), (params, x), order=1, modes=("rev",), rtol=tolerance, atol=tolerance)


def test_embeddings():
    with jax.enable_x64(True):
        layer = nnx.Embed(5, 3, ctx=nnx.context(0), **F64)
        params, moduledef = layer.partition()
        tokens = jnp.array([[0, 3, 3], [4, 1, 0]])

        def run(params):
            module = moduledef.merge(params)
            return module.attend(module(tokens))

        check_grads(run, (params,), order=1, modes=("rev",), rtol=1e-6)
