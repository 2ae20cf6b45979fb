"""Layers against those of flax.nnx with the same name, arguments and parameters."""

import pytest
from tests.parity.flax_table import FLAX, why_not
from tests.parity.sides import check_flax


@pytest.mark.parametrize("case", FLAX, ids=str)
def test_flax(case):
    if reason := why_not(case):
        pytest.skip(reason)
    check_flax(case)
