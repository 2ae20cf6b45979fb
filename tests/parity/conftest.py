"""What the comparisons share: one thread for torch, as each of the two workers has one core."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
