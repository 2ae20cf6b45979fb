"""The cases of affine maps, embeddings and low-rank maps against flax.nnx."""

import jax.numpy as jnp
import numpy as np
from tests.parity.cases import Case

DTYPES = ("float64", "float16", "bfloat16", "float32 in bfloat16", "bfloat16 in float32", "bfloat16 by float32")

_LINEAR = [
    *(
        Case("Linear", (5, 7), {"use_bias": bias}, (shape,))
        for bias in (True, False)
        for shape in ((5,), (3, 5), (2, 3, 5), (0, 5))
    ),
    *(Case("Linear", (5, 7), {}, ((3, 5),), numbers=numbers) for numbers in DTYPES),
    Case("Linear", (5, 7), {"precision": "highest"}, ((3, 5),)),
    Case("Linear", (1, 1), {}, ((4, 1),)),
    Case("Linear", (5, 7), {}, (np.arange(15, dtype=np.int32).reshape(3, 5),)),
]

_LINEAR_GENERAL = [
    *(
        Case("LinearGeneral", (inputs, outputs), {"axis": axis, "use_bias": bias}, (shape,))
        for bias in (True, False)
        for inputs, outputs, axis, shape in (
            (5, 7, -1, (3, 5)),
            (5, (2, 3), -1, (3, 5)),
            ((4, 5), 7, (-2, -1), (3, 4, 5)),
            ((4, 5), (2, 3), (-2, -1), (3, 4, 5)),
            ((4, 5), (2, 3), (1, 2), (3, 4, 5, 2)),
            ((4, 5), 3, (0, 2), (4, 3, 5)),
            (4, (2, 1, 3), 0, (4, 5)),
        )
    ),
    *(Case("LinearGeneral", ((4, 5), (2, 3)), {"axis": (-2, -1)}, ((3, 4, 5),), numbers=numbers) for numbers in DTYPES),
]

_INDICES = np.array([[0, 3, 8], [8, 1, 3]], np.int32)


def _attend(layer, query):
    return layer.attend(query)


def _without_nan(y):
    return jnp.nan_to_num(y, nan=7.0)


_EMBED = [
    *(
        Case("Embed", (9, 4), {}, (indices,), note=note)
        for indices, note in (
            (_INDICES, ""),
            (_INDICES[0, 0], "scalar"),
            (_INDICES.astype(np.uint8), "bytes"),
            (np.array([-1, -9], np.int32), "from the end"),
            (np.zeros((0,), np.int32), "none"),
        )
    ),
    Case("Embed", (9, 4), {}, (np.array([9, -10, 2], np.int32),), read=_without_nan, note="past the end"),
    *(
        Case("Embed", (9, 4), {}, (_INDICES,), numbers=numbers)
        for numbers in ("float64", "float16", "bfloat16", "float32 in bfloat16")
    ),
    *(Case("Embed", (9, 4), {}, (shape,), run=_attend, note="attend") for shape in ((4,), (3, 4), (2, 3, 4))),
    *(Case("Embed", (9, 4), {}, ((3, 4),), run=_attend, note="attend", numbers=numbers) for numbers in DTYPES),
]

_LORA = [
    *(Case("LoRA", (5, 2, 7), {}, (shape,)) for shape in ((5,), (3, 5), (2, 3, 5))),
    *(Case("LoRA", (5, 2, 7), {}, ((3, 5),), numbers=numbers) for numbers in DTYPES),
    *(
        Case(
            "LoRA",
            inputs=((3, 5),),
            options={"use_bias": bias},
            make=lambda new, use_bias: new("LoRA", 5, 2, 7, base_module=new("Linear", 5, 7, use_bias=use_bias)),
            note="of a Linear",
        )
        for bias in (True, False)
    ),
    *(
        Case("LoRALinear", (5, 7), {"lora_rank": rank, "use_bias": bias}, ((3, 5),))
        for rank in (1, 2, 5)
        for bias in (True, False)
    ),
    *(
        Case(
            "LoRALinear",
            (5, 7),
            {"lora_rank": 2, "lora_param_dtype": numbers},
            ((3, 5),),
            numbers=numbers,
        )
        for numbers in ("float16", "bfloat16")
    ),
]

CASES = [*_LINEAR, *_LINEAR_GENERAL, *_EMBED, *_LORA]
