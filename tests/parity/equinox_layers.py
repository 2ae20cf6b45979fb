"""The cases against equinox: features first, one example at a time, and no state."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tests.parity.cases import NUMBERS, Case, Path, Result, compare, differentiate
from tests.parity.sides import QUICK, evaluate_ours

Maker = Callable[[Mapping[Path, Any]], Any]


@dataclasses.dataclass(frozen=True)
class EquinoxCase(Case):
    """A case whose other side is in equinox.

    Attributes:
        module: makes the module of equinox, of which only the structure is kept; it takes a key.
        filled: its arrays, by their paths, each made of our parameters.
        called: how it is called with our inputs: a function of the module and the inputs.
        named: what it is compared with, as the page says it.
    """

    module: Callable[..., Any] | None = None
    filled: Mapping[tuple[Any, ...], Maker] = dataclasses.field(default_factory=dict)
    called: Callable[..., Any] = lambda module, *inputs: module(*inputs)
    named: str = ""


def check_equinox(case: EquinoxCase) -> dict[str, float]:
    """Compares a layer with one of equinox: outputs and gradients."""
    with jax.enable_x64(NUMBERS[case.numbers].wide):
        ours, params, _, inputs = evaluate_ours(case)
        module = eqx.filter_eval_shape(case.module, key=jax.random.key(0)) if case.filled else case.module()

        def call(params: Mapping[Path, Any], inputs: tuple[Any, ...]) -> tuple[Any, dict[Path, Any]]:
            made = [make(params) for make in case.filled.values()]
            model = eqx.tree_at(lambda m: [_at(m, path) for path in case.filled], module, made) if made else module
            return case.called(model, *inputs), {}

        def theirs(params: dict[Path, Any], inputs: tuple[Any, ...]) -> Result:
            # What equinox broadcasts between ranks is its own affair.
            with jax.numpy_rank_promotion("allow"):
                return differentiate(call, params, inputs)

        found = jax.jit(theirs, compiler_options=QUICK)(params, inputs)
        return compare(dataclasses.replace(ours, state={}), found, case.tolerance)


def _at(module: Any, path: tuple[Any, ...]) -> Any:
    return functools.reduce(lambda x, part: x[part] if isinstance(part, int) else getattr(x, part), path, module)


def _same(*path: str) -> Maker:
    return lambda params: params[path]


def _transposed(*path: str) -> Maker:
    return lambda params: params[path].T


def _kernel(*path: str) -> Maker:
    return lambda params: jnp.moveaxis(params[path], (-1, -2), (0, 1))


def _rows(module: Any, x: Any) -> Any:
    """The module over all axes but the last."""
    for _ in range(x.ndim - 1):
        module = jax.vmap(module)
    return module(x)


def _space(module: Any, x: Any) -> Any:
    """The module over the batch, with features first."""
    return jnp.moveaxis(jax.vmap(module)(jnp.moveaxis(x, -1, 1)), 1, -1)


_NUMBERS = ("float32", "float64")
_SHAPES = {1: (2, 11, 4), 2: (2, 7, 6, 4), 3: (1, 5, 4, 6, 4)}
_CONV = {1: eqx.nn.Conv1d, 2: eqx.nn.Conv2d, 3: eqx.nn.Conv3d}

_LINEAR = [
    *(
        EquinoxCase(
            "Linear",
            (5, 7),
            {"use_bias": bias},
            (shape,),
            numbers=numbers,
            module=functools.partial(eqx.nn.Linear, 5, 7, use_bias=bias),
            filled={("weight",): _transposed("kernel"), **({("bias",): _same("bias")} if bias else {})},
            called=_rows,
            named="nn.Linear",
        )
        for bias in (True, False)
        for shape in ((5,), (2, 3, 5))
        for numbers in _NUMBERS
    ),
    *(
        EquinoxCase(
            "MLP",
            (5, (6,) * depth, 7),
            {"activation": name, "use_bias": bias},
            ((3, 5),),
            module=functools.partial(
                eqx.nn.MLP, 5, 7, 6, depth, getattr(jax.nn, name), use_bias=bias, use_final_bias=bias
            ),
            filled={
                key: make
                for i in range(depth + 1)
                for key, make in (
                    (("layers", i, "weight"), _transposed("layers", str(i), "kernel")),
                    *(((("layers", i, "bias"), _same("layers", str(i), "bias")),) if bias else ()),
                )
            },
            called=_rows,
            named="nn.MLP",
        )
        for depth, name in ((0, "relu"), (1, "relu"), (2, "tanh"), (3, "gelu"))
        for bias in (True, False)
    ),
    *(
        EquinoxCase(
            "Embed",
            (9, 4),
            inputs=(np.array([0, 3, 8, 3], np.int32),),
            numbers=numbers,
            module=functools.partial(eqx.nn.Embedding, 9, 4),
            filled={("weight",): _same("embedding")},
            called=lambda module, x: jax.vmap(module)(x),
            named="nn.Embedding",
        )
        for numbers in _NUMBERS
    ),
    EquinoxCase(
        "PReLU",
        (0.3,),
        inputs=((3, 8),),
        module=lambda key: eqx.nn.PReLU(0.3),
        filled={("negative_slope",): _same("negative_slope")},
        named="nn.PReLU",
    ),
]


def _conv(rank, size, padding, *, strides=1, dilation=1, groups=1, bias=True, numbers="float32"):
    told = (
        {"padding": padding} if padding not in ("CIRCULAR", "REFLECT") else {"padding": "SAME", "padding_mode": padding}
    )
    more = {"dilation": dilation, "groups": groups, "use_bias": bias}
    return EquinoxCase(
        "Conv",
        (4, 6, size),
        {
            "padding": padding,
            "strides": strides,
            "kernel_dilation": dilation,
            "feature_group_count": groups,
            "use_bias": bias,
        },
        (_SHAPES[rank],),
        numbers=numbers,
        module=functools.partial(_CONV[rank], 4, 6, size, strides, **told, **more),
        filled={
            ("weight",): _kernel("kernel"),
            **({("bias",): lambda params: params["bias",].reshape(-1, *(1,) * rank)} if bias else {}),
        },
        called=_space,
        named=f"nn.Conv{rank}d",
    )


_SIZES = {1: (3,), 2: (3, 2), 3: (2, 3, 1)}

_CONVS = [
    *(
        _conv(rank, _SIZES[rank], padding, strides=strides)
        for rank in (1, 2, 3)
        for padding in ("SAME", "VALID", ((2, 1), (0, 3), (1, 1))[:rank])
        for strides in (1, 2)
    ),
    *(_conv(rank, _SIZES[rank], padding) for rank in (1, 2) for padding in ("CIRCULAR", "REFLECT")),
    *(_conv(2, (2, 3), padding, dilation=(2, 1)) for padding in ("SAME", "VALID", "CIRCULAR")),
    *(_conv(rank, _SIZES[rank], "SAME", groups=2, bias=False) for rank in (1, 2)),
    *(_conv(rank, _SIZES[rank], "SAME", numbers="float64") for rank in (1, 2)),
]

_POOLS = [
    *(
        EquinoxCase(
            f"{kind}Pool",
            (window,),
            {"strides": strides, "padding": padding},
            (_SHAPES[rank],),
            module=functools.partial(getattr(eqx.nn, f"{kind}Pool{rank}d"), window, strides, padding),
            called=_space,
            named=f"nn.{kind}Pool{rank}d",
        )
        for kind in ("Avg", "Max")
        for rank, window in ((1, (3,)), (2, (3, 2)), (3, (2, 2, 3)))
        for strides, padding in ((1, 0), (2, 1))
    ),
    *(
        EquinoxCase(
            f"Adaptive{kind}Pool",
            (cells,),
            inputs=((2, 6, 8, 4),),
            module=functools.partial(getattr(eqx.nn, f"Adaptive{kind}Pool2d"), cells),
            called=_space,
            named=f"nn.Adaptive{kind}Pool2d",
        )
        for kind in ("Avg", "Max")
        for cells in ((3, 4), (1, 2))
    ),
]

_NORMS = [
    *(
        EquinoxCase(
            name,
            (5,),
            {"epsilon": epsilon, "use_scale": scale, **({"use_bias": bias} if name == "LayerNorm" else {})},
            ((2, 3, 5),),
            numbers=numbers,
            module=lambda key, made=made, scale=scale, bias=bias, epsilon=epsilon: made(
                5, epsilon, use_weight=scale, use_bias=bias
            ),
            filled={
                **({("weight",): _same("scale")} if scale else {}),
                **({("bias",): _same("bias")} if bias else {}),
            },
            called=_rows,
            named=f"nn.{name}",
        )
        for name, made, choices in (
            ("LayerNorm", eqx.nn.LayerNorm, ((True, True), (True, False), (False, True))),
            ("RMSNorm", eqx.nn.RMSNorm, ((True, False),)),
        )
        for scale, bias in choices
        for epsilon, numbers in ((1e-5, "float32"), (0.1, "float32"), (1e-5, "float64"))
    ),
    *(
        EquinoxCase(
            "GroupNorm",
            (6, groups),
            {"epsilon": 1e-5},
            (shape,),
            numbers=numbers,
            module=lambda key, groups=groups: eqx.nn.GroupNorm(groups, 6),
            filled={("weight",): _same("scale"), ("bias",): _same("bias")},
            called=_space,
            named="nn.GroupNorm",
        )
        for groups in (1, 2, 6)
        for shape in ((2, 4, 6), (2, 3, 4, 6))
        for numbers in _NUMBERS
    ),
    *(
        EquinoxCase(
            "WeightNorm",
            inputs=((3, 5),),
            numbers=numbers,
            make=lambda new, **dtypes: new("WeightNorm", new("Linear", 5, 7, **dtypes), **dtypes),
            note="of a Linear",
            module=lambda key: eqx.nn.WeightNorm(eqx.nn.Linear(5, 7, key=key)),
            filled={
                ("layer", "weight"): _transposed("layer_instance", "kernel"),
                ("layer", "bias"): _same("layer_instance", "bias"),
                ("g",): lambda params: params["scales", "kernel"][:, None],
            },
            called=_rows,
            named="nn.WeightNorm",
        )
        for numbers in _NUMBERS
    ),
]


def _lstm(module, x, c, h):
    h, c = jax.vmap(module)(x, (h, c))
    return (c, h), h


def _gru(module, x, h):
    h = jax.vmap(module)(x, h)
    return h, h


def _step(cell, x, *carry):
    """One step; ours gives the carry as (c, h)."""
    return cell(carry if len(carry) > 1 else carry[0], x)


_CELLS = [
    *(
        EquinoxCase(
            "OptimizedLSTMCell",
            (5, 4),
            inputs=((3, 5), (3, 4), (3, 4)),
            numbers=numbers,
            run=_step,
            module=functools.partial(eqx.nn.LSTMCell, 5, 4),
            filled={
                ("weight_ih",): _transposed("dense_i", "kernel"),
                ("weight_hh",): _transposed("dense_h", "kernel"),
                ("bias",): _same("dense_h", "bias"),
            },
            called=_lstm,
            named="nn.LSTMCell",
        )
        for numbers in _NUMBERS
    ),
    *(
        EquinoxCase(
            "GRUCell",
            (5, 4),
            inputs=((3, 5), (3, 4)),
            numbers=numbers,
            run=_step,
            module=functools.partial(eqx.nn.GRUCell, 5, 4),
            filled={
                ("weight_ih",): _transposed("dense_i", "kernel"),
                ("weight_hh",): _transposed("dense_h", "kernel"),
                ("bias",): _same("dense_i", "bias"),
                ("bias_n",): lambda params: jnp.zeros_like(params["dense_i", "bias"][:4]),
            },
            called=_gru,
            named="nn.GRUCell",
        )
        for numbers in _NUMBERS
    ),
]

_MASK = np.random.default_rng(0).random((5, 7)) < 0.7
_MASK[:, 0] = True


def _attention(*, bias, inputs, mask=None, out=12):
    filled = {}
    for theirs, ours in (("query_proj", "query"), ("key_proj", "key"), ("value_proj", "value")):
        filled[theirs, "weight"] = lambda params, ours=ours: params[ours, "kernel"].reshape(12, -1).T
        if bias:
            filled[theirs, "bias"] = lambda params, ours=ours: params[ours, "bias"].reshape(-1)
    filled["output_proj", "weight"] = lambda params: params["out", "kernel"].reshape(12, -1).T
    if bias:
        filled["output_proj", "bias"] = _same("out", "bias")
    biases = {f"use_{name}_bias": bias for name in ("query", "key", "value", "output")}
    return EquinoxCase(
        "MultiHeadAttention",
        options={"num_heads": 4, "in_features": 12, "out_features": out, "use_bias": bias},
        inputs=inputs,
        call={} if mask is None else {"mask": mask[None, None]},
        module=functools.partial(eqx.nn.MultiheadAttention, 4, 12, output_size=out, **biases),
        filled=filled,
        called=lambda module, q, k, v: jax.vmap(lambda q, k, v: module(q, k, v, mask=mask))(q, k, v),
        named="nn.MultiheadAttention",
    )


_ATTENTION = [
    _attention(bias=bias, inputs=((2, 5, 12), (2, 7, 12), (2, 7, 12)), mask=mask, out=out)
    for bias in (True, False)
    for mask in (None, _MASK)
    for out in (12, 9)
]

CASES = [*_LINEAR, *_CONVS, *_POOLS, *_NORMS, *_CELLS, *_ATTENTION]
