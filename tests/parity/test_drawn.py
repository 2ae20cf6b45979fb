"""Layers of sizes that nobody chose, against the other libraries."""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from tests.parity.drawn import DRAWN, EXAMPLES
from tests.parity.sides import check_flax
from tests.parity.torch_side import TorchCase, check_torch


@pytest.mark.parametrize("layer", DRAWN)
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_drawn_sizes(layer, data):
    case = data.draw(DRAWN[layer])
    check_torch(case) if isinstance(case, TorchCase) else check_flax(case)
