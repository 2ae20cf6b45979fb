"""The cases of recurrent layers, attention and norms of weights against torch."""

import numpy as np
import torch
from tests.parity.cases import Case
from tests.parity.torch_side import (
    TorchCase,
    at,
    features_first,
    features_last,
    kernel,
    of_function,
    of_module,
    transposed,
)
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

IN, HIDDEN = 5, 4


def _gates(prefix, source, what):
    """The four layers of an LSTMCell side by side, as torch has them; `source` is "i" or "h"."""
    paths = [(*prefix, "if_" if source + gate == "if" else source + gate, what) for gate in "ifgo"]
    if what == "bias":
        return lambda values: torch.cat([values[path] for path in paths])
    return lambda values: torch.cat([values[path].T for path in paths])


def _names(cell, prefix=(), suffix=""):
    """The parameters of torch's cell, made of ours. Where torch has a second bias, which ours spares, it is 0."""
    inputs, carry = f"weight_ih{suffix}", f"weight_hh{suffix}"
    biases = f"bias_ih{suffix}", f"bias_hh{suffix}"
    if cell == "LSTMCell":
        return {
            inputs: _gates(prefix, "i", "kernel"),
            carry: _gates(prefix, "h", "kernel"),
            biases[0]: lambda values: torch.zeros(4 * HIDDEN, dtype=values[(*prefix, "hi", "bias")].dtype),
            biases[1]: _gates(prefix, "h", "bias"),
        }
    ours, other = ("dense_h", biases) if cell == "OptimizedLSTMCell" else ("dense_i", biases[::-1])
    return {
        inputs: transposed(*prefix, "dense_i", "kernel"),
        carry: transposed(*prefix, "dense_h", "kernel"),
        other[1]: at(*prefix, ours, "bias"),
        other[0]: lambda values: torch.zeros_like(values[(*prefix, ours, "bias")]),
    }


_CELL = {"LSTMCell": nn.LSTMCell, "OptimizedLSTMCell": nn.LSTMCell, "GRUCell": nn.GRUCell, "SimpleCell": nn.RNNCell}
_LAYER = {"LSTMCell": nn.LSTM, "OptimizedLSTMCell": nn.LSTM, "GRUCell": nn.GRU, "SimpleCell": nn.RNN}


def _dtype(name, numbers):
    return {"dtype": numbers} if name == "SimpleCell" and numbers != "float32" else {}


def _step(cell, x, *carry):
    """One step; ours gives the carry as (c, h)."""
    return cell(carry if len(carry) > 1 else carry[0], x)


def _torch_step(name):
    module = _CELL[name](IN, HIDDEN)
    names = _names(name)

    def run(params, stats, inputs):
        x, *carry = inputs
        values = {key: make(params) for key, make in names.items()}
        if len(carry) == 1:
            h = torch.func.functional_call(module, values, (x, carry[0]))
            return (h, h), {}
        h, c = torch.func.functional_call(module, values, (x, (carry[1], carry[0])))
        return ((c, h), h), {}

    return run


_STEPS = [
    TorchCase(
        name,
        (IN, HIDDEN),
        _dtype(name, numbers),
        ((3, IN), *((3, HIDDEN),) * (2 if "LSTM" in name else 1)),
        numbers=numbers,
        run=_step,
        torch=_torch_step(name),
        named=f"nn.{_CELL[name].__name__}",
    )
    for name in _CELL
    for numbers in ("float32", "float64")
]

_LENGTHS = np.array([6, 1, 4], np.int32)


def _carry_of(name, carry, direction):
    """One direction's last carry as ours has it."""
    if "LSTM" in name:
        h, c = carry
        return c[direction], h[direction]
    return carry[direction]


def _torch_layer(name, *, both, time_major, lengths):
    module = _LAYER[name](IN, HIDDEN, batch_first=not time_major, bidirectional=both)
    ways = (("forward_rnn", "cell"), ("backward_rnn", "cell")) if both else (("cell",),)
    names = {}
    for way, suffix in zip(ways, ("_l0", "_l0_reverse"), strict=False):
        names |= _names(name, way, suffix)

    def run(params, stats, inputs):
        (x,) = inputs
        values = {key: make(params) for key, make in names.items()}
        if lengths is not None:
            steps = x.shape[0 if time_major else 1]
            x = pack_padded_sequence(x, torch.tensor(lengths), not time_major, enforce_sorted=False)
        y, carry = torch.func.functional_call(module, values, (x,))
        if lengths is not None:
            y, _ = pad_packed_sequence(y, not time_major, total_length=steps)
        carries = tuple(_carry_of(name, carry, i) for i in range(len(ways)))
        return (carries if both else carries[0], y), {}

    return run


def _sequence(name, *, both=False, time_major=False, lengths=None, numbers="float32"):
    """A whole layer, with the last carry."""

    def make(new, param_dtype="float32", **options):
        cells = [new(name, IN, HIDDEN, param_dtype=param_dtype, **_dtype(name, numbers)) for _ in range(1 + both)]
        if both:
            return new("Bidirectional", *(new("RNN", cell) for cell in cells), **options)
        return new("RNN", cells[0], **options)

    return TorchCase(
        "Bidirectional" if both else "RNN",
        options={"return_carry": True, "time_major": time_major},
        inputs=((6, 3, IN) if time_major else (3, 6, IN),),
        call={} if lengths is None else {"seq_lengths": lengths},
        numbers=numbers,
        make=make,
        note=f"of {name}",
        torch=_torch_layer(name, both=both, time_major=time_major, lengths=lengths),
        named=f"nn.{_LAYER[name].__name__}",
    )


_SEQUENCES = [
    *(
        _sequence(name, both=both, time_major=time_major, lengths=lengths)
        for name in ("OptimizedLSTMCell", "GRUCell", "SimpleCell")
        for both in (False, True)
        for time_major in (False, True)
        for lengths in (None, _LENGTHS)
    ),
    *(_sequence("LSTMCell", both=both) for both in (False, True)),
    *(_sequence(name, numbers="float64") for name in _LAYER),
]

_RANDOM = np.random.default_rng(0)


def _mask(*shape):
    """A mask that hides a third, and never the first key."""
    mask = _RANDOM.random(shape) < 0.7
    mask[..., 0] = True
    return mask


def _heads_first(function, **told):
    return of_function(lambda q, k, v: function(*(x.transpose(1, 2) for x in (q, k, v)), **told).transpose(1, 2))


def _exact(numbers):
    """In float64 a `precision` keeps ours from the function of JAX, which computes in float32 whatever it gets."""
    return {"precision": "highest"} if numbers == "float64" else {}


def _attend(inputs, call=None, numbers="float32", **told):
    return TorchCase(
        "dot_product_attention",
        inputs=inputs,
        call={**(call or {}), **_exact(numbers)},
        numbers=numbers,
        torch=_heads_first(functional.scaled_dot_product_attention, **told),
        named="F.scaled_dot_product_attention",
    )


_HEADS = ((2, 5, 4, 6), (2, 7, 4, 6), (2, 7, 4, 6))
_GROUPED = ((2, 5, 4, 6), (2, 7, 2, 6), (2, 7, 2, 6))
_SHOWN = _mask(2, 4, 5, 7)
_BIAS = _RANDOM.normal(size=(2, 4, 5, 7))

_PRODUCTS = [
    *(
        case
        for numbers in ("float32", "float64")
        for case in (
            _attend(_HEADS, {}, numbers),
            _attend(_HEADS, {"mask": _SHOWN}, numbers, attn_mask=torch.tensor(_SHOWN)),
            _attend(_HEADS, {"bias": _BIAS.astype(numbers)}, numbers, attn_mask=torch.tensor(_BIAS.astype(numbers))),
            _attend(_HEADS, {"is_causal": True}, numbers, is_causal=True),
            _attend(_GROUPED, {}, numbers, enable_gqa=True),
        )
    ),
    _attend(((2, 6, 4, 6),) * 3, {"is_causal": True}, is_causal=True),
    _attend(_HEADS, {"scale": 0.3}, scale=0.3),
    _attend(_GROUPED, {"mask": _SHOWN}, attn_mask=torch.tensor(_SHOWN), enable_gqa=True),
    _attend((*_HEADS[:2], (2, 7, 4, 3)), {"mask": _SHOWN}, attn_mask=torch.tensor(_SHOWN)),
]


def _heads(name, what):
    """A projection of all heads: [in, heads, head_dim] here, [heads * head_dim, in] in torch."""
    if what == "bias":
        return lambda values: values[name, what].reshape(-1)
    return lambda values: values[name, what].flatten(1).T


def _attention(*, inputs=((2, 5, 12),), in_kv=12, bias=True, out=None, numbers="float32", call=None, **told):
    module = nn.MultiheadAttention(12, 4, bias=bias, kdim=in_kv, vdim=in_kv, batch_first=True)
    projections = [_heads(name, "kernel") for name in ("query", "key", "value")]
    if in_kv == 12:
        names = {"in_proj_weight": lambda values: torch.cat([make(values) for make in projections])}
    else:
        names = dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), projections, strict=True))
    names["out_proj.weight"] = lambda values: values["out", "kernel"].flatten(0, 1).T
    if bias:
        biases = [_heads(name, "bias") for name in ("query", "key", "value")]
        names["in_proj_bias"] = lambda values: torch.cat([make(values) for make in biases])
        names["out_proj.bias"] = at("out", "bias")

    def run(params, stats, inputs):
        q, k = inputs[0], inputs[min(1, len(inputs) - 1)]
        values = {key: make(params) for key, make in names.items()}
        told_too = {"need_weights": False, **told}
        y, _ = torch.func.functional_call(module, values, (q, k, inputs[-1]), told_too)
        return y, {}

    return TorchCase(
        "MultiHeadAttention",
        options={
            "num_heads": 4,
            "in_features": 12,
            "use_bias": bias,
            **_exact(numbers),
            **({} if in_kv == 12 else {"in_kv_features": in_kv}),
        },
        inputs=inputs,
        call=call or {},
        numbers=numbers,
        torch=run,
        named="nn.MultiheadAttention",
    )


_KEYS = _mask(2, 1, 1, 7)
_PAIRS = _mask(5, 5)
_CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
_CROSS = ((2, 5, 12), (2, 7, 12))

_ATTENTION = [
    *(
        case
        for numbers in ("float32", "float64")
        for bias in (True, False)
        for case in (
            _attention(bias=bias, numbers=numbers),
            _attention(bias=bias, numbers=numbers, call={"is_causal": True}, attn_mask=_CAUSAL, is_causal=True),
            _attention(bias=bias, numbers=numbers, inputs=_CROSS),
        )
    ),
    _attention(call={"mask": _PAIRS[None, None]}, attn_mask=~torch.tensor(_PAIRS)),
    _attention(inputs=_CROSS, call={"mask": _KEYS}, key_padding_mask=~torch.tensor(_KEYS[:, 0, 0])),
    _attention(inputs=((2, 5, 12), (2, 7, 6)), in_kv=6),
    _attention(inputs=((2, 5, 12), (2, 7, 6), (2, 7, 6)), in_kv=6, numbers="float64"),
    _attention(inputs=((2, 5, 12), (2, 7, 12), (2, 7, 12))),
]

_STORED = "parametrizations.weight.original"


def _weight_norm(layer, inner, shape, module, turn, rank, numbers="float32"):
    """Length and direction of each output feature. `turn` is how torch has the kernel."""
    path = ("layer_instance", "kernel")
    names = {
        f"{_STORED}0": lambda values: values["scales", "kernel"].reshape(-1, *(1,) * (rank + 1)),
        f"{_STORED}1": turn(*path),
        "bias": at("layer_instance", "bias"),
    }
    first, last = (features_first, features_last) if rank else (lambda x: x, lambda y: y)
    return TorchCase(
        "WeightNorm",
        inputs=(shape,),
        numbers=numbers,
        make=lambda new, **dtypes: new("WeightNorm", new(*inner, **dtypes), **dtypes),
        note=f"of a {layer}",
        torch=of_module(parametrizations.weight_norm(module), names, before=first, after=last),
        named="parametrizations.weight_norm",
    )


def _spectral_norm(numbers):
    """Both after so many steps that the largest singular value is known: torch takes half a step more in each."""
    steps = 100
    module = parametrizations.spectral_norm(nn.Linear(5, 7), n_power_iterations=steps, eps=1e-12)

    def run(params, stats, inputs):
        values = {f"{_STORED}": params["layer_instance", "kernel"].T, "bias": params["layer_instance", "bias"]}
        buffers = {
            f"parametrizations.weight.0._{name}": torch.ones(size, dtype=inputs[0].dtype)
            for name, size in (("u", 7), ("v", 5))
        }
        return torch.func.functional_call(module, {**values, **buffers}, (inputs[0],)), None

    return TorchCase(
        "SpectralNorm",
        options={"n_steps": steps},
        inputs=((3, 5),),
        numbers=numbers,
        make=lambda new, n_steps, **dtypes: new(
            "SpectralNorm", new("Linear", 5, 7, **dtypes), n_steps=n_steps, **dtypes
        ),
        note="of a Linear",
        torch=run,
        named="parametrizations.spectral_norm",
    )


_WEIGHTS = [
    *(
        _weight_norm("Linear", ("Linear", 5, 7), (3, 5), nn.Linear(5, 7), transposed, 0, n)
        for n in ("float32", "float64")
    ),
    _weight_norm("Conv", ("Conv", 4, 6, (3, 3)), (2, 5, 4, 4), nn.Conv2d(4, 6, 3, padding=1), kernel, 2),
    *(_spectral_norm(numbers) for numbers in ("float32", "float64")),
]

CASES: list[Case] = [*_STEPS, *_SEQUENCES, *_PRODUCTS, *_ATTENTION, *_WEIGHTS]
