"""Layers against those of torch, on the same values."""

import pytest
from tests.parity.tables import TORCH
from tests.parity.torch_side import check_torch


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", TORCH, ids=str)
def test_torch(case):
    check_torch(case)
