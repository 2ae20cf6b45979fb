"""What the comparisons share: one thread for torch, as each of the two workers has one core."""

import importlib.util

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    if importlib.util.find_spec("torch") is not None:  # the environment of the newest flax has none
        import torch

        torch.set_num_threads(1)
