"""The cases of recurrent cells and layers against flax.nnx."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tests.parity.cases import Case

_CELLS = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell")
_NUMBERS = ("float64", "float16", "bfloat16", "float32 in bfloat16")
_LENGTHS = np.array([6, 1, 4], np.int32)


def _step(cell, x, *carry):
    """One step from a given carry."""
    return cell(carry if len(carry) > 1 else carry[0], x)


def _carries(name):
    return 2 if "LSTM" in name else 1


def _options(name, numbers):
    """What a cell is told in a dtype."""
    options = {}
    if numbers in ("float64", "float16", "bfloat16") and name == "SimpleCell":
        options["dtype"] = numbers  # it computes in float32 unless told otherwise
    if numbers in ("float16", "bfloat16"):
        options["recurrent_kernel_init"] = jax.nn.initializers.zeros  # flax draws no orthogonal matrix in these
    return options


def _cell(name, options=None, batch=(3,), numbers="float32"):
    return Case(
        name,
        (5, 4),
        {**(options or {}), **_options(name, numbers)},
        ((*batch, 5), *((*batch, 4),) * _carries(name)),
        numbers=numbers,
        run=_step,
    )


_STEPS = [
    *(_cell(name, batch=batch) for name in _CELLS for batch in ((3,), (), (2, 3))),
    *(
        _cell(name, {"gate_fn": jax.nn.hard_sigmoid, "activation_fn": jax.nn.soft_sign})
        for name in _CELLS
        if name != "SimpleCell"
    ),
    _cell("SimpleCell", {"residual": True}),
    _cell("SimpleCell", {"activation_fn": jax.nn.soft_sign}),
    *(_cell(name, numbers=numbers) for name in _CELLS for numbers in _NUMBERS[:3]),
]


def _real(outputs, lengths, time_axis):
    """The outputs within their sequences: what is past the end is 0 here and anything in flax."""
    carry, y = outputs
    within = np.arange(y.shape[time_axis])[:, None] < lengths
    return carry, jnp.where((within if time_axis == 0 else within.T)[..., None], y, 0)


def _rnn(name, options=None, call=None, shape=(3, 6, 5), numbers="float32", note=""):
    call = call or {}
    everything = {**(options or {}), **call}
    read = {}
    if "seq_lengths" in call:
        axis = 0 if everything.get("time_major") else 1
        read = {"read": functools.partial(_real, lengths=call["seq_lengths"], time_axis=axis)}
    return Case(
        "RNN",
        options=options or {},
        inputs=(shape,),
        call=call,
        numbers=numbers,
        make=lambda new, param_dtype="float32", dtype=None, **options: new(
            "RNN",
            new(name, 5, 4, param_dtype=param_dtype, **({"dtype": dtype} if dtype else {}), **_options(name, numbers)),
            **options,
        ),
        note=f"of {name} {note}".strip(),
        **read,
    )


_RNN = [
    *(
        _rnn(name, {"return_carry": True, **options})
        for name in _CELLS
        for options in ({}, {"reverse": True}, {"reverse": True, "keep_order": True}, {"time_major": True})
    ),
    *(
        _rnn(name, {"return_carry": True, **options}, {"seq_lengths": _LENGTHS}, shape)
        for name in ("OptimizedLSTMCell", "GRUCell", "SimpleCell")
        for options, shape in (
            ({}, (3, 6, 5)),
            ({"reverse": True}, (3, 6, 5)),
            ({"reverse": True, "keep_order": True}, (3, 6, 5)),
            ({"time_major": True}, (6, 3, 5)),
            ({"time_major": True, "reverse": True}, (6, 3, 5)),
        )
    ),
    *(_rnn("GRUCell", {}, {}, shape) for shape in ((6, 5), (2, 3, 6, 5), (3, 1, 5))),
    _rnn("GRUCell", {"unroll": 3}),
    _rnn("GRUCell", {"time_major": True}, {}, (6, 5), note="without a batch"),
    *(
        _rnn(name, {}, {"initial_carry": carry, "return_carry": True})
        for name, carry in (
            ("GRUCell", np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)),
            ("LSTMCell", (np.full((3, 4), 0.5, np.float32), np.full((3, 4), -0.3, np.float32))),
        )
    ),
    *(
        _rnn("GRUCell", {}, {name: True, "return_carry": True}, note="by the call")
        for name in ("reverse", "time_major", "keep_order")
    ),
    *(_rnn(name, {"return_carry": True}, numbers=numbers) for name in _CELLS for numbers in _NUMBERS[:3]),
]


def _both_ways(first, second, options=None, call=None, shape=(3, 6, 5), numbers="float32", note=""):
    call = call or {}
    read = {}
    if "seq_lengths" in call:
        axis = 0 if (options or {}).get("time_major") else 1
        read = {"read": functools.partial(_real, lengths=call["seq_lengths"], time_axis=axis)}

    def make(new, param_dtype="float32", **options):
        rnns = [
            new("RNN", new(name, 5, 4, param_dtype=param_dtype, **_options(name, numbers))) for name in (first, second)
        ]
        return new("Bidirectional", *rnns, **options)

    return Case(
        "Bidirectional",
        options=options or {},
        inputs=(shape,),
        call=call,
        numbers=numbers,
        make=make,
        note=f"of {first} and {second} {note}".strip(),
        **read,
    )


def _sum(forward, backward):
    return forward + 2 * backward


_BIDIRECTIONAL = [
    *(_both_ways(name, name, {"return_carry": True}) for name in _CELLS),
    *(
        _both_ways("OptimizedLSTMCell", "GRUCell", {"return_carry": True, **options}, call, shape)
        for options, call, shape in (
            ({}, {}, (3, 6, 5)),
            ({"time_major": True}, {}, (6, 3, 5)),
            ({"merge_fn": _sum}, {}, (3, 6, 5)),
            ({}, {"seq_lengths": _LENGTHS}, (3, 6, 5)),
            ({"time_major": True}, {"seq_lengths": _LENGTHS}, (6, 3, 5)),
            ({"merge_fn": _sum}, {"seq_lengths": _LENGTHS}, (3, 6, 5)),
        )
    ),
    _both_ways("GRUCell", "GRUCell", {}, {}, (6, 5)),
    *(_both_ways("GRUCell", "GRUCell", {}, numbers=numbers) for numbers in ("float64", "float16", "bfloat16")),
]

CASES = [*_STEPS, *_RNN, *_BIDIRECTIONAL]
