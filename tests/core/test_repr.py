"""repr of Modules: it fits the screen however large the model is."""

import jax.numpy as jnp
from tests.core.models import Leaf

import nnx


class Block(nnx.Module):
    def __init__(self, width=2, rate=0.1):
        self.inner = nnx.Sequence([Leaf(), Leaf(), Leaf()])
        self.kernel = nnx.Param(jnp.zeros((width, 3)))
        self.rate = rate


def test_items_that_are_built_alike_are_shown_once():
    model = nnx.Sequence([Block(), Block(), Block(), Block(width=3), Block(width=3, rate=0.2), Leaf(), Leaf()])
    assert repr(model).splitlines() == [
        "Sequence(",
        "  0=Block(",
        "    inner=Sequence(",
        "      0=Leaf(",
        "        w=Param(value=Array(1., dtype=float32))",
        "      )",
        "      # 1 to 2: Leaf, built like 0",
        "    )",
        "    kernel=Param(value=Array(float32[2, 3]))",
        "    rate=0.1",
        "  )",
        "  # 1 to 2: Block, built like 0",
        "  3=Block(",
        "    inner=Sequence(",
        "      0=Leaf(",
        "        w=Param(value=Array(1., dtype=float32))",
        "      )",
        "      # 1 to 2: Leaf, built like 0",
        "    )",
        "    kernel=Param(value=Array(float32[3, 3]))",
        "    rate=0.1",
        "  )",
        "  4=Block(",
        "    inner=Sequence(",
        "      0=Leaf(",
        "        w=Param(value=Array(1., dtype=float32))",
        "      )",
        "      # 1 to 2: Leaf, built like 0",
        "    )",
        "    kernel=Param(value=Array(float32[3, 3]))",
        "    rate=0.2",
        "  )",
        "  5=Leaf(",
        "    w=Param(value=Array(1., dtype=float32))",
        "  )",
        "  # 6: Leaf, built like 5",
        ")",
    ]


def test_what_is_shared_is_told_apart():
    shared = Leaf()
    model = nnx.Module()
    model.blocks = [Leaf(), shared, shared, Leaf(), Leaf()]
    model.first = shared
    assert repr(model).splitlines() == [
        "Module(",
        "  blocks=Sequence(",
        "    0=Leaf(",
        "      w=Param(value=Array(1., dtype=float32))",
        "    )",
        "    # 1: Leaf, built like 0",
        "    2=Leaf(...)  # shared with blocks/1",
        "    3=Leaf(",
        "      w=Param(value=Array(1., dtype=float32))",
        "    )",
        "    # 4: Leaf, built like 3",
        "  )",
        "  first=Leaf(...)  # shared with blocks/1",
        ")",
    ]


def test_a_large_model_is_shown_as_deep_as_there_is_room():
    model = nnx.Sequence([Block(rate=i) for i in range(20)])
    lines = repr(model).splitlines()
    assert len(lines) == 2 + 20 * 5
    assert lines[1:6] == [
        "  0=Block(",
        "    inner=Sequence(...)",
        "    kernel=Param(value=Array(float32[2, 3]))",
        "    rate=0",
        "  )",
    ]
    deep = model
    for _ in range(500):
        deep = nnx.Sequence([deep])
    assert len(repr(deep).splitlines()) <= 121
    wide = nnx.Module()
    for i in range(500):
        setattr(wide, f"a{i}", i)
    assert repr(wide).splitlines()[-1] == "  ..."
    assert len(repr(wide).splitlines()) == 121


def test_a_model_that_cannot_be_partitioned_has_a_repr():
    model = nnx.Sequence([Leaf(), Leaf(), Leaf()])
    for leaf in model:
        leaf.listing = []
        leaf.listing.append(Leaf())
    assert "2=Leaf(" in repr(model)
