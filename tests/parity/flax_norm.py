"""The cases of norms, of activations and of weights against flax.nnx."""

import itertools

import jax
import numpy as np
from tests.parity.cases import Case
from tests.parity.flax_linear import DTYPES


def _mask(*shape):
    """A mask with holes, that hides the whole of no example and of no feature."""
    mask = np.random.default_rng(0).random(shape) < 0.7
    mask[0] = mask[..., 0] = True
    return mask


_SWITCHES = [
    dict(zip(("use_bias", "use_scale"), pair, strict=True)) for pair in itertools.product((True, False), repeat=2)
]

_HALF = tuple(numbers for numbers in DTYPES if numbers != "float64")

_BATCH = [
    *(
        Case("BatchNorm", (5,), switches, (shape,), {"use_running_average": running})
        for switches in _SWITCHES
        for shape in ((6, 5), (3, 4, 5))
        for running in (True, False)
    ),
    *(
        Case("BatchNorm", (5,), {"axis": axis}, (shape,), {"use_running_average": running})
        for axis, shape in ((1, (4, 5, 3)), (-2, (4, 2, 5, 3)), (0, (5, 6)))
        for running in (True, False)
    ),
    *(
        Case("BatchNorm", (5,), {name: value, "use_running_average": False}, ((6, 5),))
        for name, value in (
            ("momentum", 0.5),
            ("momentum", 0.0),
            ("momentum", 1.0),
            ("epsilon", 0.1),
            ("use_fast_variance", False),
        )
    ),
    *(
        Case("BatchNorm", (5,), {"use_fast_variance": fast}, ((6, 3, 5),), {"use_running_average": False, "mask": mask})
        for fast in (True, False)
        for mask in (_mask(6, 3, 5), _mask(6, 3, 1), _mask(6, 1, 1))
    ),
    *(
        Case("BatchNorm", (5,), {}, ((6, 5),), {"use_running_average": running}, numbers)
        for numbers in _HALF[2:]
        for running in (True, False)
    ),
    *(
        Case("BatchNorm", (5,), {"dtype": numbers}, ((6, 5),), {"use_running_average": running}, numbers)
        for numbers in _HALF[:2]
        for running in (True, False)
    ),
]

_LAYER = [
    *(
        Case(name, (5,), switches, (shape,))
        for name, choices in (("LayerNorm", _SWITCHES), ("RMSNorm", [{"use_scale": True}, {"use_scale": False}]))
        for switches in choices
        for shape in ((5,), (3, 5), (2, 3, 5))
    ),
    *(
        Case(name, (5,), {"reduction_axes": reduced, "feature_axes": features}, (shape,))
        for name in ("LayerNorm", "RMSNorm")
        for reduced, features, shape in (
            ((-2, -1), -1, (2, 3, 5)),
            ((1, 2, 3), -1, (2, 3, 4, 5)),
            (1, 1, (2, 5, 3)),
            ((1, 2), 1, (2, 5, 3)),
            (1, -1, (2, 3, 5)),
            ((0, 1), 2, (2, 3, 5)),
        )
    ),
    *(Case(name, (5,), {"epsilon": eps}, ((3, 5),)) for name in ("LayerNorm", "RMSNorm") for eps in (1e-12, 0.1)),
    Case("LayerNorm", (5,), {"use_fast_variance": False}, ((3, 5),)),
    *(
        Case(name, (5,), {"reduction_axes": reduced}, ((2, 3, 5),), {"mask": mask})
        for name in ("LayerNorm", "RMSNorm")
        for reduced, mask in ((-1, _mask(2, 3, 5)), ((1, 2), _mask(2, 3, 5)), ((1, 2), _mask(2, 3, 1)))
    ),
    *(Case(name, (5,), {}, ((3, 5),), numbers=numbers) for name in ("LayerNorm", "RMSNorm") for numbers in DTYPES),
]


def _mapped(layer, x):
    """The layer over a mapped axis, across which it takes its statistics."""
    return jax.vmap(layer, axis_name="i")(x)


_ACROSS = [
    *(
        Case(name, args, {"axis_name": "i", "use_fast_variance": fast}, ((3, 2, 4, 6),), run=_mapped)
        for name, args in (("LayerNorm", (6,)), ("GroupNorm", (6, 2)), ("InstanceNorm", (6,)))
        for fast in (True, False)
    ),
    Case("RMSNorm", (6,), {"axis_name": "i"}, ((3, 2, 6),), run=_mapped),
]

_GROUP = [
    *(
        Case("GroupNorm", (6,), {"num_groups": groups, **switches}, ((2, 3, 4, 6),))
        for groups in (1, 2, 3, 6)
        for switches in _SWITCHES
    ),
    *(Case("GroupNorm", (6,), {"num_groups": None, "group_size": size}, ((2, 3, 6),)) for size in (1, 2, 3, 6)),
    *(Case("GroupNorm", (6, 2), {}, (shape,)) for shape in ((3, 6), (2, 4, 6), (1, 2, 3, 2, 6))),
    *(Case("GroupNorm", (6, 3), options, ((2, 4, 6),)) for options in ({"epsilon": 0.1}, {"use_fast_variance": False})),
    Case("GroupNorm", (64,), {}, ((2, 3, 64),), note="32 groups"),
    *(Case("GroupNorm", (6, 2), {}, (shape,), {"mask": _mask(*shape)}) for shape in ((4, 6), (2, 3, 6), (2, 3, 2, 6))),
    *(Case("GroupNorm", (6, 2), {}, ((2, 3, 6),), numbers=numbers) for numbers in DTYPES),
]

_INSTANCE = [
    *(Case("InstanceNorm", (5,), switches, (shape,)) for switches in _SWITCHES for shape in ((2, 4, 5), (2, 3, 4, 5))),
    *(
        Case("InstanceNorm", (5,), {"feature_axes": axis}, (shape,))
        for axis, shape in ((1, (2, 5, 4)), (1, (2, 5, 3, 4)), (-2, (2, 3, 5, 4)))
    ),
    *(
        Case("InstanceNorm", (5,), options, ((2, 4, 5),))
        for options in ({"epsilon": 0.1}, {"use_fast_variance": False})
    ),
    Case("InstanceNorm", (5,), {}, ((2, 6, 5),), {"mask": _mask(2, 6, 5)}),
    Case("InstanceNorm", (5,), {}, ((2, 6, 5),), {"mask": _mask(2, 6, 1)}),
    *(Case("InstanceNorm", (5,), {}, ((2, 4, 5),), numbers=numbers) for numbers in DTYPES),
]

_WRAPPED = {
    "Linear": (("Linear", 5, 7), (3, 5)),
    "Conv": (("Conv", 4, 6, (3, 2)), (2, 5, 4, 4)),
    "LinearGeneral": (("LinearGeneral", 5, (2, 3)), (3, 5)),
}


def _weight_norm(name, wrapped, options, call=None, numbers="float32"):
    """A norm of weights around a layer."""
    inner, shape = _WRAPPED[wrapped]
    return Case(
        name,
        options=options,
        inputs=(shape,),
        call=call or {},
        numbers=numbers,
        make=lambda new, param_dtype="float32", **options: new(
            name, new(*inner, param_dtype=param_dtype), param_dtype=param_dtype, **options
        ),
        note=f"of a {wrapped}",
    )


_WEIGHTS = [
    *(
        _weight_norm("WeightNorm", wrapped, {"feature_axes": axes, "use_scale": scale})
        for wrapped, choices in (
            ("Linear", (-1, None, 0, (0, 1))),
            ("Conv", (-1, (-2, -1))),
            ("LinearGeneral", ((1, 2),)),
        )
        for axes in choices
        for scale in (True, False)
    ),
    _weight_norm("WeightNorm", "Linear", {"epsilon": 0.1}),
    *(
        _weight_norm("SpectralNorm", wrapped, {"n_steps": steps}, {"update_stats": update})
        for wrapped in _WRAPPED
        for steps in (1, 3)
        for update in (True, False)
    ),
    _weight_norm("SpectralNorm", "Linear", {"epsilon": 0.1}, {"update_stats": True}),
    _weight_norm("SpectralNorm", "Linear", {}, {"update_stats": True}, "float64"),
]

_POINTWISE = (
    *("celu", "elu", "gelu", "hard_sigmoid", "hard_silu", "hard_swish", "hard_tanh", "identity", "leaky_relu"),
    *("log_sigmoid", "relu", "relu6", "selu", "sigmoid", "silu", "soft_sign", "softplus", "swish", "tanh"),
)

_ACTIVATIONS = [
    *(Case(name, inputs=((3, 8),)) for name in _POINTWISE),
    *(Case(name, inputs=((3, 8),)) for name in ("glu", "log_softmax", "softmax", "logsumexp", "standardize")),
    *(
        Case(name, inputs=((3, 8),), call={"axis": 0})
        for name in ("log_softmax", "softmax", "logsumexp", "standardize")
    ),
    Case("gelu", inputs=((3, 8),), call={"approximate": False}),
    Case("elu", inputs=((3, 8),), call={"alpha": 0.3}),
    Case("celu", inputs=((3, 8),), call={"alpha": 0.3}),
    Case("leaky_relu", inputs=((3, 8),), call={"negative_slope": 0.3}),
    Case("one_hot", inputs=(np.array([0, 4, 2, -1, 5], np.int32),), call={"num_classes": 5}),
    Case("PReLU", (), {}, ((3, 8),)),
    Case("PReLU", (0.3,), {}, ((8,),)),
    *(Case("PReLU", (), {}, ((3, 8),), numbers=numbers) for numbers in _HALF),
]

CASES = [*_BATCH, *_LAYER, *_ACROSS, *_GROUP, *_INSTANCE, *_WEIGHTS, *_ACTIVATIONS]
