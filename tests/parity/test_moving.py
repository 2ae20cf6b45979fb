"""Both sides of each row of "Moving to nnx": the peer's code and ours give one result."""

import importlib.util
import warnings

import jax
import pytest
from tests.moving.rows import assert_same
from tests.moving.test_moving import EACH, ROWS

MODULES = {"flax.nnx": "flax", "equinox": "equinox", "PyTorch": "torch"}


def test_every_peer_is_known():
    assert MODULES.keys() == ROWS.keys()


@pytest.mark.parametrize(("peer", "row"), EACH)
def test_both_sides_agree(peer, row):
    if importlib.util.find_spec(MODULES[peer]) is None:
        pytest.skip(f"{peer} is not in this environment")
    with jax.numpy_rank_promotion("allow"):
        ours = row.ours()
        with warnings.catch_warnings():
            # What a peer warns of is no affair of ours.
            warnings.simplefilter("ignore")
            theirs = row.theirs()
    assert_same(theirs, ours)
