"""Layers against those of flax.nnx with the same name, arguments and parameters."""

import pytest
from tests.parity.sides import check_flax
from tests.parity.tables import FLAX


@pytest.mark.parametrize("case", FLAX, ids=str)
def test_flax(case):
    check_flax(case)
