"""The cases of convolutions and of pooling against flax.nnx."""

import itertools

import numpy as np
from tests.parity.cases import Case
from tests.parity.flax_linear import DTYPES

SHAPES = {1: (2, 11, 4), 2: (2, 7, 6, 4), 3: (1, 5, 4, 6, 4)}
"""Inputs with four channels, by the number of spatial axes."""

_KERNELS = {1: (3,), 2: (3, 2), 3: (2, 3, 1)}
_PAIRS = {1: ((2, 1),), 2: ((2, 1), (0, 3)), 3: ((1, 0), (2, 1), (0, 0))}

_CONV = [
    *(
        Case("Conv", (4, 6, _KERNELS[rank]), {"padding": padding, "strides": strides}, (SHAPES[rank],))
        for rank in (1, 2, 3)
        for padding in ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", _PAIRS[rank])
        for strides in (1, 2)
    ),
    *(Case("Conv", (4, 6, 3), {"padding": padding}, (SHAPES[1],)) for padding in ("CAUSAL", 1, [(2, 0)])),
    *(Case("Conv", (4, 6, 4), {"padding": padding}, (SHAPES[1],)) for padding in ("SAME", "CIRCULAR", "REFLECT")),
    *(Case("Conv", (4, 6, 3), {"padding": "CAUSAL", "strides": 2}, (SHAPES[1],)),),
    *(
        Case("Conv", (4, 6, kernel), {"padding": padding, "kernel_dilation": dilation}, (SHAPES[len(kernel)],))
        for kernel, dilation, padding in (
            ((3,), 2, "SAME"),
            ((3,), 3, "VALID"),
            ((3,), 2, "CAUSAL"),
            ((3,), 2, "CIRCULAR"),
            ((2,), 3, "CIRCULAR"),
            ((2,), 3, "REFLECT"),
            ((3, 2), (1, 2), "SAME"),
            ((3, 2), 2, "VALID"),
            ((3, 2), (2, 3), "CIRCULAR"),
            ((3, 2), (2, 1), "REFLECT"),
            ((2, 3, 1), (1, 2, 1), "SAME"),
        )
    ),
    *(
        Case("Conv", (4, 6, kernel), {"padding": padding, "input_dilation": dilation}, (SHAPES[len(kernel)],))
        for kernel, dilation, padding in (
            ((3,), 2, [(1, 1)]),
            ((3,), 3, [(2, 0)]),
            ((3, 2), (2, 1), _PAIRS[2]),
            ((2, 3, 1), 2, _PAIRS[3]),
        )
    ),
    *(
        Case("Conv", (4, 8, _KERNELS[rank]), {"feature_group_count": groups, "use_bias": bias}, (SHAPES[rank],))
        for rank, groups, bias in itertools.product((1, 2), (2, 4), (True, False))
    ),
    Case("Conv", (4, 4, (2, 3, 1)), {"feature_group_count": 2, "strides": (1, 2, 1)}, (SHAPES[3],)),
    *(Case("Conv", (4, 6, (3, 2)), {}, (shape,)) for shape in ((7, 6, 4), (2, 1, 7, 6, 4), (0, 7, 6, 4))),
    *(Case("Conv", (4, 6, (3, 2)), {"use_bias": False}, (SHAPES[2],), numbers=numbers) for numbers in DTYPES),
    *(Case("Conv", (4, 6, 3), {}, (SHAPES[1],), numbers=numbers) for numbers in DTYPES),
    Case(
        "Conv",
        (4, 6, (3, 2)),
        {"mask": (np.arange(3 * 2 * 4 * 6) % 3 > 0).astype(np.float32).reshape(3, 2, 4, 6)},
        (SHAPES[2],),
        concrete=True,
    ),
    Case("Conv", (1, 1, (1, 1)), {}, ((2, 3, 3, 1),)),
    Case("Conv", (4, 6, 5), {"padding": "SAME"}, ((2, 3, 4),), note="kernel above size"),
]

_POOLS = [
    *(
        Case(
            name,
            inputs=(SHAPES[len(window)],),
            call={"window_shape": window, "strides": strides, "padding": padding},
        )
        for name in ("avg_pool", "max_pool", "min_pool")
        for window, strides, padding in (
            ((3,), None, "VALID"),
            ((3,), (2,), "SAME"),
            ((2, 3), None, "SAME"),
            ((2, 2), (2, 2), "VALID"),
            ((3, 2), (2, 1), ((1, 0), (1, 1))),
            ((2, 2, 3), (2, 1, 3), "VALID"),
            ((2, 3, 2), None, "SAME"),
        )
    ),
    *(
        Case(
            "avg_pool",
            inputs=(SHAPES[2],),
            call={"window_shape": window, "padding": padding, "count_include_pad": count},
        )
        for window, padding in (((3, 2), "SAME"), ((2, 2), ((1, 1), (0, 1))))
        for count in (True, False)
    ),
    *(
        Case(name, inputs=(shape,), call={"window_shape": (2, 3)})
        for name in ("avg_pool", "max_pool", "min_pool")
        for shape in ((7, 6, 4), (2, 3, 7, 6, 4))
    ),
    *(
        Case(name, inputs=(SHAPES[2],), call={"window_shape": (2, 2), "strides": (2, 2)}, numbers=numbers)
        for name in ("avg_pool", "max_pool", "min_pool")
        for numbers in ("float64", "float16", "bfloat16")
    ),
]

CASES = [*_CONV, *_POOLS]
