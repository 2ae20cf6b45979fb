"""diff: what two States, definitions or Modules do not have in common, by path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.models import Everything, Leaf

import nnx


def lines(a, b):
    return str(nnx.diff(a, b)).splitlines()


def test_equal_models_have_no_difference():
    assert not nnx.diff(Everything(), Everything())
    assert not nnx.diff(Everything().get_state(), Everything().get_state())
    assert not nnx.diff(Everything().get_module_def(), Everything().get_module_def())
    assert str(nnx.diff(Leaf(), Leaf())) == "no difference"


def test_values():
    a = nnx.State({"w": nnx.Param(jnp.array([1.0, 2.0, 3.0])), "n": nnx.Param(jnp.float32(1))})
    b = nnx.State({"w": nnx.Param(jnp.array([1.0, 1.5, 3.25])), "n": nnx.Param(jnp.float32(1))})
    (entry,) = nnx.diff(a, b)
    assert (entry.path, entry.kind, entry.largest) == (("w",), "value", 0.5)
    assert lines(a, b) == ["w: value: differs by up to 0.5 (Param float32[3])"]
    assert not nnx.diff(a, a.map(lambda _, value: value + 0))


@pytest.mark.parametrize(
    ("a", "b", "largest"),
    [
        (jnp.array([jnp.nan, 1.0]), jnp.array([jnp.nan, 1.0]), None),
        (jnp.array([jnp.nan, 1.0]), jnp.array([0.0, 1.0]), np.inf),
        (jnp.array([jnp.inf]), jnp.array([jnp.inf]), None),
        (jnp.array([jnp.inf]), jnp.array([1.0]), np.inf),
        (jnp.array([1.0], jnp.bfloat16), jnp.array([1.5], jnp.bfloat16), 0.5),
        (np.array([1], np.uint8), np.array([255], np.uint8), 254.0),
        (np.array([2**62]), np.array([2**62 + 1]), np.finfo(np.float64).tiny),
        (jnp.array([1 + 1j]), jnp.array([1 - 1j]), 2.0),
        (jnp.array([True]), jnp.array([False]), 1.0),
        (jnp.zeros((0, 2)), jnp.zeros((0, 2)), None),
        (jax.random.key(1), jax.random.key(1), None),
        (3, 3, None),
        (3, 5, 2.0),
    ],
)
def test_numbers_of_every_kind(a, b, largest):
    found = nnx.diff(nnx.State({"v": nnx.Param(a)}), nnx.State({"v": nnx.Param(b)}))
    assert [entry.largest for entry in found] == ([] if largest is None else [largest])
    again = nnx.diff(nnx.State({"v": nnx.Param(b)}), nnx.State({"v": nnx.Param(a)}))
    assert [entry.largest for entry in again] == [entry.largest for entry in found]


def test_keys():
    found = nnx.diff(nnx.State({"v": nnx.Param(jax.random.key(1))}), nnx.State({"v": nnx.Param(jax.random.key(2))}))
    assert [entry.kind for entry in found] == ["value"]


def test_entries_of_one_side_and_forms():
    a = nnx.State(
        {
            "10": nnx.Param(jnp.zeros(2)),
            "2": nnx.Param(jnp.zeros(2)),
            "kind": nnx.Param(1.0),
            "meta": nnx.Param(1.0, tag="x"),
        }
    )
    b = nnx.State(
        {
            "2": nnx.Param(jnp.zeros(3, jnp.bfloat16)),
            "kind": nnx.BatchStat(1.0),
            "meta": nnx.Param(1.0, tag="y"),
            "new/bias": jnp.zeros(1),
        }
    )
    assert lines(a, b) == [
        "2: shape: float32[2] -> bfloat16[3]",
        "10: only in a: Param float32[2]",
        "kind: type: Param -> BatchStat",
        "meta: metadata: {'tag': 'x'} -> {'tag': 'y'}",
        "new/bias: only in b: array float32[1]",
    ]


def test_abstract_values_compare_by_form():
    concrete, abstract = Leaf(), nnx.eval_shape(Leaf)
    assert not nnx.diff(concrete, abstract)
    abstract.w = jax.ShapeDtypeStruct((2,), jnp.float32)
    assert lines(concrete, abstract) == ["w: shape: float32[] -> float32[2]"]


def test_definitions():
    class Other(Leaf):
        pass

    a, b = Everything(), Everything()
    b.integer = 4
    b.child = Other()
    b.listing.append(5)
    del b.text
    b.extra = Leaf()
    expected = [
        "child: type: Leaf -> Other",
        "extra: only in b: Leaf",
        "integer: static: 3 -> 4",
        "listing: static: [1, 2, [3]] -> [1, 2, [3], 5]",
        "text: only in a: 'gelu'",
    ]
    # The data of what is on one side only has no line of its own in a comparison of definitions.
    assert lines(a.get_module_def(), b.get_module_def()) == expected
    assert lines(a, b) == [*expected[:2], "extra/w: only in b: Param float32[]", *expected[2:]]


def test_data_in_definitions():
    a, b = Leaf(), Leaf()
    del b.w
    b.w = nnx.BatchStat(1.0)
    b.bias = nnx.Param(2.0)
    assert lines(a.get_module_def(), b.get_module_def()) == ["bias: only in b: Param", "w: type: Param -> BatchStat"]


def test_sharing():
    def pair(*, tied):
        module = nnx.Module()
        module.a, module.b = Leaf(), Leaf()
        if tied == "modules":
            module.b = module.a
        elif tied == "variables":
            module.b.w = module.a.get_variable("w")
        return module

    assert lines(pair(tied=None), pair(tied="modules")) == [
        "b: sharing: on its own -> shared with a",
        "b/w: only in a: Param float32[]",
    ]
    assert lines(pair(tied="variables"), pair(tied=None)) == [
        "b/w: sharing: shared with a/w -> on its own",
        "b/w: only in b: Param float32[]",
    ]
    cyclic = pair(tied=None)
    cyclic.a.parent = cyclic
    assert lines(pair(tied=None), cyclic) == ["a/parent: only in b: Module"]


def test_what_cannot_be_compared():
    with pytest.raises(nnx.StructureError, match="got State and Leaf"):
        nnx.diff(Leaf().get_state(), Leaf())


def test_it_is_a_tuple_that_fits_the_screen():
    a = nnx.State({f"v{i}": nnx.Param(0.0) for i in range(150)})
    found = nnx.diff(a, a.map(lambda _, value: value + 1))
    assert len(found) == 150
    assert isinstance(found, tuple)
    assert str(found).splitlines()[-1] == "... and 50 more"
    assert found[2].path == ("v2",)
