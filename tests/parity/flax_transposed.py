"""The cases of transposed convolutions and of einsum layers against flax.nnx."""

import itertools

import numpy as np
from tests.parity.cases import Case
from tests.parity.flax_conv import SHAPES
from tests.parity.flax_linear import DTYPES

_KERNELS = {1: (3,), 2: (3, 2), 3: (2, 3, 1)}
_PAIRS = {1: ((2, 1),), 2: ((2, 1), (1, 3)), 3: ((1, 0), (2, 1), (0, 0))}


def _transpose(size, numbers="float32", shape=None, **options):
    size = (size,) if isinstance(size, int) else size
    return Case("ConvTranspose", (4, 6, size), options, (shape or SHAPES[len(size)],), numbers=numbers)


_CONV_TRANSPOSE = [
    *(
        _transpose(_KERNELS[rank], padding=padding, strides=strides, transpose_kernel=transposed)
        for rank in (1, 2, 3)
        for padding in ("SAME", "VALID", "CIRCULAR", _PAIRS[rank])
        for strides, transposed in ((1, False), (2, False), (2, True))
    ),
    *(
        _transpose(size, padding=padding, strides=strides, transpose_kernel=transposed)
        for size, strides in ((1, 2), (2, 3), (4, 2), (5, 1), (5, 3))
        for padding in ("SAME", "VALID", "CIRCULAR")
        for transposed in (False, True)
    ),
    *(
        _transpose(size, padding=padding, strides=strides, kernel_dilation=dilation)
        for size, strides, dilation in ((3, 1, 2), (3, 2, 3), ((3, 2), (2, 1), (1, 2)), ((2, 3), 2, 2))
        for padding in ("SAME", "VALID", "CIRCULAR")
    ),
    *(_transpose((3, 2), strides=2, use_bias=False, shape=shape) for shape in ((7, 6, 4), (2, 1, 7, 6, 4))),
    *(
        _transpose((3, 2), numbers, strides=2, padding=padding)
        for numbers in DTYPES
        for padding in ("SAME", "CIRCULAR")
    ),
    Case(
        "ConvTranspose",
        (4, 6, (3, 2)),
        {"strides": 2, "mask": (np.arange(3 * 2 * 4 * 6) % 3 > 0).astype(np.float32).reshape(3, 2, 4, 6)},
        (SHAPES[2],),
        concrete=True,
    ),
]

_EQUATIONS = (
    ("nta,hab->nthb", (4, 3, 5), (4, 5), (2, 6, 3)),
    ("...a,ab->...b", (3, 5), (5,), (2, 6, 3)),
    ("...a,ab->...b", (3, 5), (5,), (3,)),
    ("... a , a b -> ... b", (3, 5), (5,), (6, 3)),
    ("ab,bc->ca", (3, 5), (5,), (2, 3)),
    ("nab,cab->nc", (4, 3, 5), (4,), (2, 3, 5)),
    ("btd,dhk->bhtk", (3, 4, 5), (4, 5), (2, 6, 3)),
)

_EINSUM = [
    *(
        Case("Einsum", (equation, kernel, bias if biased else None), {}, (shape,))
        for (equation, kernel, bias, shape), biased in itertools.product(_EQUATIONS, (True, False))
    ),
    *(Case("Einsum", (*_EQUATIONS[0][:3],), {}, (_EQUATIONS[0][3],), numbers=numbers) for numbers in DTYPES),
    Case("Einsum", ("...a,ab->...b", (3, 5)), {"precision": "highest"}, ((2, 3),)),
]

CASES = [*_CONV_TRANSPOSE, *_EINSUM]
