"""Wrong programs that people write: each gets an error of ours that names the place and the way out.

None gives a wrong number, and none leaks a tracer or changes a Module of the caller.
"""

import contextlib
import re

import jax
import numpy as np
import pytest
from tests.core import misuse_crossing, misuse_transforms
from tests.core.misuse_table import PROGRAMS, Model

import nnx

TABLES = (misuse_crossing, misuse_transforms)  # which enter their programs as they are imported


def _values(model):
    state, _ = model.partition()
    return jax.tree.map(np.asarray, jax.tree.leaves(state))


@pytest.mark.filterwarnings("ignore::nnx.CaptureWarning")  # which says before what the error says then
@pytest.mark.parametrize("leaks", [False, True], ids=["", "checking-leaks"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_misuse(name, leaks):
    function, error, patterns = PROGRAMS[name]
    if leaks and name in {"keeps_a_module_of_a_trace", "writes_to_a_module_that_left_its_trace"}:
        error, patterns = Exception, ("Leaked",)  # the program itself leaks a Module, and JAX is the first to say so
    model = Model()
    before, moduledef = _values(model), model.partition().moduledef
    with pytest.raises(error) as raised, jax.checking_leaks() if leaks else contextlib.nullcontext():
        function(model)
    for pattern in patterns:
        assert re.search(pattern, str(raised.value), re.DOTALL), f"{pattern!r} not in:\n{raised.value}"
    if name in {"reads_an_array_that_was_donated", "keeps_a_string_in_a_variable", "traces_more_than_allowed"}:
        return  # these change the Module before they go wrong
    assert model.partition().moduledef is moduledef
    for new, old in zip(_values(model), before, strict=True):
        np.testing.assert_array_equal(new, old)
    assert float(nnx.jit(lambda m: m(2.0))(model)) == 2.0


def test_the_table_is_long():
    assert len(PROGRAMS) >= 90
