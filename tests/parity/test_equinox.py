"""Layers against those of equinox, on the same values."""

import pytest
from tests.parity.equinox_layers import check_equinox
from tests.parity.tables import EQUINOX


@pytest.mark.parametrize("case", EQUINOX, ids=str)
def test_equinox(case):
    check_equinox(case)
