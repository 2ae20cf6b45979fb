"""Layers against those of equinox, on the same values."""

import pytest
from tests.parity.equinox_layers import CASES, check_equinox


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equinox(case):
    check_equinox(case)
