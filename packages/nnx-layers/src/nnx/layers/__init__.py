"""Layers: modules with parameters, the functions they are made of, and initializers."""

from __future__ import annotations

from nnx.layers import initializers
from nnx.layers._activations import (
    PReLU,
    celu,
    elu,
    gelu,
    glu,
    hard_sigmoid,
    hard_silu,
    hard_swish,
    hard_tanh,
    identity,
    leaky_relu,
    log_sigmoid,
    log_softmax,
    logsumexp,
    mish,
    normalize,
    one_hot,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    soft_sign,
    softmax,
    softplus,
    standardize,
    swish,
    tanh,
)
from nnx.layers._attention import MultiHeadAttention
from nnx.layers._conv import Conv
from nnx.layers._conv_transpose import ConvTranspose
from nnx.layers._dot_product import dot_product_attention
from nnx.layers._dropout import Dropout, DropPath
from nnx.layers._dtypes import canonicalize_dtype, promote_dtype
from nnx.layers._einsum import Einsum
from nnx.layers._embed import Embed
from nnx.layers._instance_norm import InstanceNorm
from nnx.layers._kv_cache import CacheFullError, init_cache, reorder_cache, reset_cache
from nnx.layers._linear import MLP, Linear, LinearGeneral
from nnx.layers._lora import LoRA, LoRALinear, LoRALinearGeneral, LoRAParam
from nnx.layers._lora_surgery import apply_lora, lora_merge
from nnx.layers._lstm import LSTMCell, OptimizedLSTMCell
from nnx.layers._masks import combine_masks, make_attention_mask, make_causal_mask
from nnx.layers._norm import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from nnx.layers._pool import (
    AdaptiveAvgPool,
    AdaptiveMaxPool,
    AvgPool,
    GlobalAvgPool,
    GlobalMaxPool,
    MaxPool,
    MinPool,
    adaptive_avg_pool,
    adaptive_max_pool,
    avg_pool,
    global_avg_pool,
    global_max_pool,
    max_pool,
    min_pool,
)
from nnx.layers._recurrent import RNN, Bidirectional
from nnx.layers._recurrent_cells import GRUCell, RNNCellBase, SimpleCell
from nnx.layers._rotary import RotaryEmbedding, sinusoidal_positions
from nnx.layers._weight_norms import SpectralNorm, WeightNorm

__all__ = [
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
    "AvgPool",
    "BatchNorm",
    "Bidirectional",
    "CacheFullError",
    "Conv",
    "ConvTranspose",
    "DropPath",
    "Dropout",
    "Einsum",
    "Embed",
    "GRUCell",
    "GlobalAvgPool",
    "GlobalMaxPool",
    "GroupNorm",
    "InstanceNorm",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "LinearGeneral",
    "LoRA",
    "LoRALinear",
    "LoRALinearGeneral",
    "LoRAParam",
    "MLP",
    "MaxPool",
    "MinPool",
    "MultiHeadAttention",
    "OptimizedLSTMCell",
    "PReLU",
    "RMSNorm",
    "RNN",
    "RNNCellBase",
    "RotaryEmbedding",
    "SimpleCell",
    "SpectralNorm",
    "WeightNorm",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "apply_lora",
    "avg_pool",
    "canonicalize_dtype",
    "celu",
    "combine_masks",
    "dot_product_attention",
    "elu",
    "gelu",
    "global_avg_pool",
    "global_max_pool",
    "glu",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "identity",
    "init_cache",
    "initializers",
    "leaky_relu",
    "log_sigmoid",
    "log_softmax",
    "logsumexp",
    "lora_merge",
    "make_attention_mask",
    "make_causal_mask",
    "max_pool",
    "min_pool",
    "mish",
    "normalize",
    "one_hot",
    "promote_dtype",
    "relu",
    "relu6",
    "reorder_cache",
    "reset_cache",
    "selu",
    "sigmoid",
    "silu",
    "sinusoidal_positions",
    "soft_sign",
    "softmax",
    "softplus",
    "standardize",
    "swish",
    "tanh",
]
