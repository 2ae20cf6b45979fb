"""The comparison itself: it finds every kind of difference, and no layer is left out of it."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from tests.parity import sides
from tests.parity.cases import Case, Result, compare
from tests.parity.drawn import DRAWN
from tests.parity.sides import check_flax
from tests.parity.tables import EQUINOX, FLAX, IN_NO_TABLE, TORCH

from nnx import layers


def _other(monkeypatch, name, **options):
    """Makes flax's layer with other options than ours."""
    made = getattr(flax_nnx, name)
    monkeypatch.setitem(
        sides.FLAX_MADE, name, lambda *args, rngs, **given: made(*args, rngs=rngs, **{**given, **options})
    )


@pytest.mark.parametrize(
    ("case", "options", "part"),
    [
        (Case("LayerNorm", (5,), {}, ((3, 5),)), {"epsilon": 1e-3}, "outputs"),
        (Case("LayerNorm", (5,), {}, ((3, 5),)), {"epsilon": 1e-3}, "by_inputs"),
        (Case("LayerNorm", (5,), {}, ((3, 5),)), {"epsilon": 1e-3}, "by_parameters"),
        (Case("BatchNorm", (5,), {}, ((3, 5),), {"use_running_average": False}), {"momentum": 0.98}, "state"),
        (Case("Linear", (5, 7), {}, ((3, 5),)), {"dtype": "bfloat16"}, "dtypes"),
        (Case("Linear", (5, 7), {}, ((3, 5),)), {"use_bias": False}, "bias"),
    ],
    ids=str,
)
def test_a_difference_is_found(monkeypatch, case, options, part):
    check_flax(case)
    _other(monkeypatch, case.layer, **options)
    with pytest.raises(AssertionError, match=part):
        check_flax(case)


def test_each_part_of_a_result_counts():
    same = Result(jnp.ones(2), {("kernel",): jnp.ones(2)}, (jnp.ones(2),), {("mean",): jnp.ones(2)})
    compare(same, same, 1e-6)
    for part in dataclasses.fields(Result):
        value = getattr(same, part.name)
        wrong = jax.tree.map(lambda x: 2 * x, value)
        with pytest.raises(AssertionError, match=part.name):
            compare(dataclasses.replace(same, **{part.name: wrong}), same, 1e-6)
    with pytest.raises(AssertionError, match="outputs"):
        compare(dataclasses.replace(same, outputs=jnp.array([1.0, np.nan])), same, 1e-6)


@pytest.mark.parametrize("table", [FLAX, TORCH, EQUINOX], ids=["flax", "torch", "equinox"])
def test_no_case_is_there_twice(table):
    names = collections.Counter(map(str, table))
    assert [name for name, count in names.items() if count > 1] == []


def test_every_layer_that_flax_has_is_compared_with_it():
    shared = {name for name in layers.__all__ if hasattr(flax_nnx, name)}
    assert shared - {case.layer for case in FLAX} - set(IN_NO_TABLE) == set()


def test_every_other_name_is_compared_or_excused():
    compared = {case.layer for case in (*FLAX, *TORCH, *EQUINOX)} | set(DRAWN)
    assert compared | set(IN_NO_TABLE) == set(layers.__all__)
    assert compared & set(IN_NO_TABLE) == set()
