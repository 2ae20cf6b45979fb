"""draw: a model's Modules as boxes, what holds them as arrows, what is shared as one box."""

import re

import jax.numpy as jnp
import pytest
from tests.core.models import Everything, Leaf

import nnx


@pytest.fixture
def model():
    model = nnx.Module()
    model.first, model.second = Leaf(), Leaf()
    model.blocks = [Leaf(), model.first]
    model.second.w = model.first.get_variable("w")
    model.first.parent = model
    return model


def test_mermaid(model):
    assert nnx.draw(model).splitlines() == [
        "flowchart TD",
        '  n0["Module<br/>2 parameters"]',
        '  n1["Sequence<br/>2 parameters"]',
        '  n3["Leaf<br/>1 parameter"]',
        '  n4["Leaf"]',
        '  n2["Leaf<br/>1 parameter"]',
        '  v1(["Param<br/>float32[]"])',
        '  n0 -- "blocks" --> n1',
        '  n0 -- "first" --> n3',
        '  n0 -- "second" --> n4',
        '  n1 -- "0" --> n2',
        '  n1 -- "1" --> n3',
        '  n3 -- "parent" --> n0',
        '  n3 -- "w" --> v1',
        '  n4 -- "w" --> v1',
        "  classDef shared stroke-width:3px",
        "  class n0,n3,v1 shared",
    ]


def test_dot(model):
    text = nnx.draw(model, format="dot")
    lines = text.splitlines()
    assert lines[0] == "digraph {"
    assert lines[-1] == "}"
    assert '  n3 [label="Leaf\\n1 parameter", penwidth=3];' in lines
    assert '  v1 [label="Param\\nfloat32[]", shape=ellipse, penwidth=3];' in lines
    arrows = re.findall(r"(\w+) -> (\w+)", text)
    assert len(arrows) == nnx.draw(model).count("-->") == 8
    assert {name for arrow in arrows for name in arrow} == set(re.findall(r"^  (\w+) \[label", text, re.MULTILINE))


def test_depth(model):
    text = nnx.draw(model, depth=0)
    assert text == 'flowchart TD\n  n0["Module<br/>2 parameters"]'
    text = nnx.draw(model, depth=1)
    assert '"1" --> n3' in text
    assert '"0" -->' not in text


def test_large_and_abstract_models():
    def make():
        return nnx.Sequence([Leaf(jnp.zeros((1000, 1000))) for _ in range(300)])

    text = nnx.draw(nnx.eval_shape(make))
    assert text.count("-->") == 300
    assert "300 M parameters" in text
    assert nnx.draw(Everything(), format="dot").count("->") == 11


def test_names_are_quoted():
    model = nnx.Dict({'a "b" \\': Leaf()})
    assert '"a #34;b#34; #92;"' in nnx.draw(model)
    assert '[label="a \\"b\\" \\\\"]' in nnx.draw(model, format="dot")


@pytest.mark.parametrize(
    ("name", "mermaid", "dot"),
    [
        ("a<b>&c", "a#60;b#62;#38;c", "a<b>&amp;c"),
        ("1. item", "1#46; item", "1. item"),  # a list in Markdown, which Mermaid refuses
        ("- `x` **y**", "#45; #96;x#96; #42;#42;y#42;#42;", "- `x` **y**"),
        ("#35;", "#35;35#59;", "#35;"),
        ("two\nlines", "two#10;lines", "two\\nlines"),
        ("größe [0] →", "größe [0] #8594;", "größe [0] →"),
    ],
)
def test_a_name_is_never_markup(name, mermaid, dot):
    model = nnx.Dict({name: Leaf()})
    assert f'  n0 -- "{mermaid}" --> n1' in nnx.draw(model).splitlines()
    assert f'  n0 -> n1 [label="{dot}"];' in nnx.draw(model, format="dot").splitlines()


def test_errors(model):
    with pytest.raises(ValueError, match="formats 'mermaid' and 'dot', got 'svg'"):
        nnx.draw(model, format="svg")
    with pytest.raises(nnx.StructureError, match="takes a Module, got State"):
        nnx.draw(model.get_state())
