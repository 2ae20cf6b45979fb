"""The cases of affine maps, embeddings, norms and activations against torch."""

import itertools

import numpy as np
import torch
from tests.parity.torch_conv import SHAPES
from tests.parity.torch_side import (
    TorchCase,
    at,
    features_first,
    features_last,
    of_function,
    of_module,
    transposed,
)
from torch import nn
from torch.nn import functional

_BATCH_NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def _linear(shape, *, use_bias=True, numbers="float32"):
    names = {"weight": transposed("kernel"), **({"bias": at("bias")} if use_bias else {})}
    theirs = of_module(nn.Linear(5, 7, bias=use_bias), names)
    return TorchCase(
        "Linear", (5, 7), {"use_bias": use_bias}, (shape,), numbers=numbers, torch=theirs, named="nn.Linear"
    )


_LINEAR = [
    *(_linear(shape, use_bias=bias) for shape in ((5,), (3, 5), (2, 3, 5)) for bias in (True, False)),
    *(_linear((3, 5), numbers=numbers) for numbers in ("float64", "bfloat16", "float16")),
]

_INDICES = np.array([[0, 3, 8], [8, 1, 3]], np.int32)

_EMBED = [
    TorchCase(
        "Embed",
        (9, 4),
        inputs=(_INDICES,),
        numbers=numbers,
        torch=of_module(nn.Embedding(9, 4), {"weight": at("embedding")}),
        named="nn.Embedding",
    )
    for numbers in ("float32", "float64", "bfloat16")
]


def _affine(use_scale=True, use_bias=True):
    return {**({"weight": at("scale")} if use_scale else {}), **({"bias": at("bias")} if use_bias else {})}


def _batch_norm(shape, *, running, momentum=0.99, epsilon=1e-5, affine=True, numbers="float32"):
    module = _BATCH_NORM[len(shape) - 2](5, epsilon, 1 - momentum, affine).train(not running)
    count = int(np.prod(shape[:-1]))

    def theirs(params, stats, inputs):
        given = {"running_mean": stats["mean",].clone(), "running_var": stats["var",].clone()}
        values = {name: make(params) for name, make in _affine(affine, affine).items()}
        y = torch.func.functional_call(module, {**values, **given}, (features_first(inputs[0]),))
        # The average of torch is of the unbiased variance, while it normalises by the biased one.
        kept = momentum * stats["var",]
        var = given["running_var"] if running else kept + (given["running_var"] - kept) * (count - 1) / count
        return features_last(y), {("mean",): given["running_mean"], ("var",): var}

    return TorchCase(
        "BatchNorm",
        (5,),
        {"momentum": momentum, "epsilon": epsilon, "use_bias": affine, "use_scale": affine},
        (shape,),
        {"use_running_average": running},
        numbers,
        torch=theirs,
        named=f"nn.{type(module).__name__}",
    )


_NORMS = [
    *(
        _batch_norm(shape, running=running, affine=affine)
        for shape in ((6, 5), (3, 4, 5), (2, 3, 4, 5), (2, 3, 2, 2, 5))
        for running in (True, False)
        for affine in (True, False)
    ),
    _batch_norm((6, 5), running=False, momentum=0.5, epsilon=0.1),
    *(_batch_norm((3, 4, 5), running=running, numbers="float64") for running in (True, False)),
    *(
        TorchCase(
            "LayerNorm",
            (shape[-count:],),
            {"reduction_axes": axes, "feature_axes": axes, "epsilon": epsilon, "use_bias": bias},
            (shape,),
            numbers=numbers,
            torch=of_module(nn.LayerNorm(shape[-count:], epsilon, bias=bias), _affine(use_bias=bias)),
            named="nn.LayerNorm",
        )
        for shape, count in (((5,), 1), ((3, 5), 1), ((2, 3, 5), 1), ((2, 3, 5), 2), ((2, 4, 3, 5), 3))
        for axes in (tuple(range(-count, 0)),)
        for epsilon, bias, numbers in ((1e-6, True, "float32"), (0.1, False, "float32"), (1e-6, True, "float64"))
    ),
    *(
        TorchCase(
            "RMSNorm",
            (shape[-count:],),
            {"reduction_axes": axes, "feature_axes": axes, "epsilon": epsilon},
            (shape,),
            numbers=numbers,
            torch=of_module(nn.RMSNorm(shape[-count:], epsilon), _affine(use_bias=False)),
            named="nn.RMSNorm",
        )
        for shape, count in (((3, 5), 1), ((2, 3, 5), 1), ((2, 3, 5), 2))
        for axes in (tuple(range(-count, 0)),)
        for epsilon, numbers in ((1e-6, "float32"), (0.1, "float32"), (1e-6, "float64"))
    ),
    *(
        TorchCase(
            "GroupNorm",
            (6, groups),
            {"epsilon": 1e-5},
            (shape,),
            numbers=numbers,
            torch=of_module(nn.GroupNorm(groups, 6), _affine(), before=features_first, after=features_last),
            named="nn.GroupNorm",
        )
        for groups in (1, 2, 3, 6)
        for shape in ((2, 4, 6), (2, 3, 4, 6))
        for numbers in ("float32", "float64")
    ),
    *(
        TorchCase(
            "InstanceNorm",
            (4,),
            {"epsilon": 1e-5, "use_bias": affine, "use_scale": affine},
            # Not of one example: for that torch's gradients are wrong where they arrive with the channels last.
            ((2, *SHAPES[rank][1:]),),
            numbers=numbers,
            torch=of_module(
                _INSTANCE_NORM[rank](4, affine=affine),
                _affine(affine, affine),
                before=features_first,
                after=features_last,
            ),
            named=f"nn.InstanceNorm{rank}d",
        )
        for rank in (1, 2, 3)
        for affine, numbers in ((True, "float32"), (False, "float32"), (True, "float64"))
    ),
]

_POINTWISE = {
    "celu": functional.celu,
    "elu": functional.elu,
    "glu": functional.glu,
    "hard_sigmoid": functional.hardsigmoid,
    "hard_silu": functional.hardswish,
    "hard_swish": functional.hardswish,
    "hard_tanh": functional.hardtanh,
    "leaky_relu": functional.leaky_relu,
    "log_sigmoid": functional.logsigmoid,
    "mish": functional.mish,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "selu": functional.selu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "soft_sign": functional.softsign,
    "softplus": functional.softplus,
    "swish": functional.silu,
    "tanh": torch.tanh,
}


def _activation(name, function, call=None, numbers="float32", inputs=((3, 8),), named="", **told):
    return TorchCase(
        name,
        inputs=inputs,
        call=call or {},
        numbers=numbers,
        torch=of_function(lambda x: function(x, **told)),
        named=named or (f"torch.{function.__name__}" if function.__module__ == "torch" else f"F.{function.__name__}"),
    )


_ACTIVATIONS = [
    *(
        _activation(name, f, numbers=numbers, named="F.logsigmoid" if f is functional.logsigmoid else "")
        for name, f in _POINTWISE.items()
        # For hardsigmoid torch has 1/6 as a float32, in float64 too.
        for numbers in (("float32", "float64") if name != "hard_sigmoid" else ("float32",))
    ),
    *(
        _activation(
            "gelu",
            functional.gelu,
            {"approximate": approximate},
            numbers,
            approximate="tanh" if approximate else "none",
        )
        for approximate, numbers in itertools.product((True, False), ("float32", "float64"))
    ),
    *(
        _activation(name, f, {"axis": axis}, dim=axis)
        for name, f in (
            ("softmax", functional.softmax),
            ("log_softmax", functional.log_softmax),
            ("logsumexp", torch.logsumexp),
        )
        for axis in (-1, 0)
    ),
    *(
        _activation(name, f, {"alpha": 0.3}, alpha=0.3)
        for name, f in (("elu", functional.elu), ("celu", functional.celu))
    ),
    *(
        _activation(name, functional.layer_norm, numbers=numbers, normalized_shape=(8,))
        for name in ("standardize", "normalize")
        for numbers in ("float32", "float64")
    ),
    _activation("leaky_relu", functional.leaky_relu, {"negative_slope": 0.3}, negative_slope=0.3),
    _activation(
        "one_hot",
        lambda x: functional.one_hot(x.long(), 5).float(),
        {"num_classes": 5},
        inputs=(np.array([0, 4, 2], np.int32),),
        named="F.one_hot",
    ),
    *(
        TorchCase(
            "PReLU",
            (0.3,),
            inputs=((3, 8),),
            numbers=numbers,
            torch=of_module(nn.PReLU(), {"weight": lambda values: values["negative_slope",].reshape(1)}),
            named="nn.PReLU",
        )
        for numbers in ("float32", "float64")
    ),
]

CASES = [*_LINEAR, *_EMBED, *_NORMS, *_ACTIVATIONS]
