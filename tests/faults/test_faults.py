"""The short form of the campaign: `hatch run faults` is the long one."""

import pytest
from tests.faults.damage import damages
from tests.faults.kills import kills


# What reads the arrays leaves callbacks behind when a file is damaged, and their event loop is gone when they come.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seed", range(3))
def test_damage_is_found_and_the_checkpoint_before_it_is_used(seed):
    outcomes = damages(8, seed)
    assert sum(outcomes.values()) == 8
    assert outcomes["found, the one before restored"] >= 1


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_run_that_is_not():
    said = []
    kills(5, steps=16, per_run=5, say=said.append)
    assert said[-2].startswith("5 kills of")
