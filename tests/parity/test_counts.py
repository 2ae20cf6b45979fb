"""Each layer compiled, forward and backward, costs no more than flax's: operations, FLOPs, and bytes accessed.

The cases and the counts are those of `hatch run bench --only layers`, which takes the time as well.
"""

import jax
import pytest
from benchmarks._layer_cases import CASES
from benchmarks.layers import counts, sides
from flax import nnx as flax_nnx

pytestmark = pytest.mark.skipif(
    not hasattr(flax_nnx, "RoPE"), reason="an older flax on an older XLA; `hatch run parity-newest:run` counts"
)


@pytest.mark.parametrize("name", CASES)
def test_no_more_than_flax(name):
    with jax.numpy_rank_promotion("allow"):
        counted = counts(*sides(CASES[name]))
    assert set(counted) == {"operations", "FLOPs", "bytes"}
    assert all(theirs > 0 for _, theirs in counted.values()), counted
    assert {what: pair for what, pair in counted.items() if pair[0] > pair[1]} == {}
