"""The cases against flax.nnx, and which of them the flax at hand is too old for."""

import functools

import jax
from flax import nnx as flax_nnx
from tests.parity import (
    flax_attention,
    flax_conv,
    flax_linear,
    flax_norm,
    flax_options,
    flax_recurrent,
    flax_transposed,
)
from tests.parity.cases import Case

FLAX: list[Case] = [
    *flax_linear.CASES,
    *flax_conv.CASES,
    *flax_transposed.CASES,
    *flax_norm.CASES,
    *flax_attention.CASES,
    *flax_recurrent.CASES,
    *flax_options.CASES,
]


def why_not(case: Case) -> str | None:
    """Why this flax cannot be compared in a case, if so: the newest for Python 3.11 lacks what later ones have."""
    if (case.layer == "RotaryEmbedding" or case.note == "rotary") and not hasattr(flax_nnx, "RoPE"):
        return "this flax has no RoPE"
    if case.layer == "WeightNorm" and case.options.get("use_scale", True) and not _scales_are_params():
        return "this flax keeps WeightNorm's scales as plain arrays, not as Params"
    return None


@functools.cache
def _scales_are_params() -> bool:
    def make() -> flax_nnx.WeightNorm:
        rngs = flax_nnx.Rngs(0)
        return flax_nnx.WeightNorm(flax_nnx.Linear(1, 1, use_bias=False, rngs=rngs), rngs=rngs)

    return len(jax.tree.leaves(flax_nnx.state(flax_nnx.eval_shape(make), flax_nnx.Param))) == 2
