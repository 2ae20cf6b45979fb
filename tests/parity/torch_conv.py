"""The cases of convolutions, transposed ones too, and of pooling against torch."""

import torch
from tests.parity.torch_side import TorchCase, at, features_first, features_last, kernel, of_function, of_module
from torch import nn
from torch.nn import functional

SHAPES = {1: (2, 11, 4), 2: (2, 7, 6, 4), 3: (1, 5, 4, 6, 4)}
"""Inputs with four channels, by the number of spatial axes."""

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _conv(rank, size, *, padding=0, theirs=None, strides=1, dilation=1, groups=1, bias=True, numbers="float32", **more):
    """A convolution; `theirs` is how torch is told of the padding, where that is another word."""
    options = {"padding": padding, "strides": strides, "kernel_dilation": dilation}
    options |= {"feature_group_count": groups, "use_bias": bias}
    mode = {"CIRCULAR": "circular", "REFLECT": "reflect"}.get(padding, "zeros")
    told = {"VALID": 0}.get(padding, "same") if isinstance(padding, str) else padding
    told = told if theirs is None else theirs
    module = _CONV[rank](4, 8, size, strides, told, dilation, groups, bias, mode)
    names = {"weight": kernel("kernel"), **({"bias": at("bias")} if bias else {})}
    before = features_first
    if padding == "CAUSAL":
        before = lambda x: functional.pad(features_first(x), ((size[0] - 1) * dilation, 0))  # noqa: E731
    return TorchCase(
        "Conv",
        (4, 8, size),
        options,
        (SHAPES[rank],),
        numbers=numbers,
        torch=of_module(module, names, before=before, after=features_last),
        named=f"nn.Conv{rank}d",
    )


_KERNELS = {1: (3,), 2: (3, 2), 3: (2, 3, 1)}

_CONVS = [
    *(
        _conv(rank, _KERNELS[rank], padding=padding, strides=strides)
        for rank in (1, 2, 3)
        for padding in ("VALID", 1, tuple(range(rank)))
        for strides in (1, 2)
    ),
    *(_conv(rank, _KERNELS[rank], padding=name) for rank in (1, 2, 3) for name in ("SAME", "CIRCULAR", "REFLECT")),
    *(_conv(1, (4,), padding=name) for name in ("SAME", "CIRCULAR", "REFLECT")),
    *(_conv(2, (2, 3), padding=name, dilation=(2, 1)) for name in ("SAME", "VALID", "CIRCULAR", "REFLECT", 2)),
    *(_conv(1, (3,), padding="CAUSAL", theirs=0, dilation=dilation) for dilation in (1, 2)),
    *(_conv(rank, _KERNELS[rank], groups=groups, bias=groups == 2) for rank in (1, 2, 3) for groups in (2, 4)),
    *(_conv(rank, _KERNELS[rank], padding=1, numbers="float64") for rank in (1, 2, 3)),
    # Without a bias: on a CPU, JAX adds up its gradient in half precision.
    *(_conv(2, (3, 2), padding=1, bias=False, numbers=numbers) for numbers in ("bfloat16", "float16")),
]


def _transpose(rank, size, *, padding=0, strides=1, dilation=1, bias=True, numbers="float32"):
    """A transposed convolution. torch counts what is cut off of the outputs, ours what is put around the inputs."""
    size = (size,) * rank
    module = getattr(nn, f"ConvTranspose{rank}d")(4, 8, size, strides, padding, bias=bias, dilation=dilation)
    around = [dilation * (n - 1) - padding for n in size]
    return TorchCase(
        "ConvTranspose",
        (4, 8, size),
        {
            "padding": [(n, n) for n in around] if padding else "VALID",
            "strides": strides,
            "kernel_dilation": dilation,
            "use_bias": bias,
            "transpose_kernel": True,
        },
        (SHAPES[rank],),
        numbers=numbers,
        torch=of_module(
            module,
            {"weight": kernel("kernel"), **({"bias": at("bias")} if bias else {})},
            before=features_first,
            after=features_last,
        ),
        named=f"nn.ConvTranspose{rank}d",
    )


_TRANSPOSED = [
    *(
        _transpose(rank, size, padding=padding, strides=strides)
        for rank in (1, 2, 3)
        for size, strides in ((2, 2), (3, 1), (3, 2), (4, 2))
        for padding in (0, 1)
    ),
    *(_transpose(rank, 3, dilation=2, strides=2, bias=False) for rank in (1, 2)),
    *(_transpose(rank, 3, padding=1, numbers="float64") for rank in (1, 2)),
]


def _least(x, **told):
    """What torch has no function for."""
    return -getattr(functional, f"max_pool{x.ndim - 2}d")(-x, **told)


def _over(function, **options):
    """A function of torch over the spatial axes."""
    return of_function(lambda x: features_last(function(features_first(x), **options)))


class _NegatedMaxPool2d(nn.MaxPool2d):
    """torch has no pooling by the least."""

    def forward(self, x):
        return -super().forward(-x)


def _pool(kind, rank, window, *, numbers="float32", **options):
    """Pooling as a function, or as a Module of ours with the same arguments."""
    theirs = {"kernel_size": window, "stride": options.get("strides") or 1, "padding": options.get("padding", 0)}
    if "count_include_pad" in options:
        theirs["count_include_pad"] = options["count_include_pad"]
    function = _least if kind == "min" else getattr(functional, f"{kind}_pool{rank}d")
    return TorchCase(
        f"{kind}_pool",
        inputs=(SHAPES[rank],),
        call={"window_shape": window, **options},
        numbers=numbers,
        torch=_over(function, **theirs),
        named=f"F.{'max' if kind == 'min' else kind}_pool{rank}d",
    )


_WINDOWS = {1: (3,), 2: (3, 2), 3: (2, 3, 2)}

_POOLS = [
    *(
        _pool(kind, rank, _WINDOWS[rank], strides=strides, padding=padding)
        for kind in ("avg", "max", "min")
        for rank in (1, 2, 3)
        for strides, padding in ((None, 0), (2, 0), (2, 1))
    ),
    *(_pool("avg", rank, _WINDOWS[rank], padding=1, count_include_pad=False) for rank in (1, 2, 3)),
    *(_pool(kind, 2, (3, 2), padding=1, numbers="float64") for kind in ("avg", "max", "min")),
    *(
        TorchCase(
            f"adaptive_{kind}_pool",
            inputs=(SHAPES[len(cells)],),
            call={"output_shape": cells},
            numbers=numbers,
            torch=_over(getattr(functional, f"adaptive_{kind}_pool{len(cells)}d"), output_size=cells),
            named=f"F.adaptive_{kind}_pool{len(cells)}d",
        )
        for kind in ("avg", "max")
        for cells in ((1,), (3,), (4,), (11,), (3, 2), (5, 4), (7, 6), (2, 3, 4))
        for numbers in (("float32", "float64") if cells == (5, 4) else ("float32",))
    ),
    *(
        TorchCase(
            f"global_{kind}_pool",
            inputs=(SHAPES[rank],),
            torch=_over(f, dim=tuple(range(2, rank + 2))),
            named=f"torch.{f.__name__}",
        )
        for kind, f in (("avg", torch.mean), ("max", torch.amax))
        for rank in (1, 2, 3)
    ),
    *(
        TorchCase(
            name,
            options=options,
            inputs=(SHAPES[2],),
            torch=_over(module),
            named=f"nn.{type(module).__name__.removeprefix('_Negated')}",
        )
        for name, options, module in (
            ("AvgPool", {"window_shape": (3, 2), "strides": 2}, nn.AvgPool2d((3, 2), 2)),
            ("MaxPool", {"window_shape": (3, 2), "strides": 2, "padding": 1}, nn.MaxPool2d((3, 2), 2, 1)),
            ("AdaptiveAvgPool", {"output_shape": (3, 4)}, nn.AdaptiveAvgPool2d((3, 4))),
            ("AdaptiveMaxPool", {"output_shape": (3, 4)}, nn.AdaptiveMaxPool2d((3, 4))),
            ("MinPool", {"window_shape": (3, 2), "strides": 2}, _NegatedMaxPool2d((3, 2), 2)),
            ("GlobalAvgPool", {"keepdims": True}, nn.AdaptiveAvgPool2d(1)),
            ("GlobalMaxPool", {"keepdims": True}, nn.AdaptiveMaxPool2d(1)),
        )
    ),
]

CASES = [*_CONVS, *_TRANSPOSED, *_POOLS]
