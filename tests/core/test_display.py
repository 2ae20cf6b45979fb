"""display: through treescope in IPython, and by repr anywhere else."""

import sys
import types

import jax
import jax.numpy as jnp
import pytest
import treescope
from tests.core.models import Everything, Leaf

import nnx
from nnx.core import _display

# treescope reads every name of NumPy once, deprecated ones too.
deprecated = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def in_ipython(monkeypatch):
    shown = []
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=object))
    monkeypatch.setattr(treescope, "display", shown.append)
    return shown


def test_a_terminal_shows_the_repr(capsys):
    nnx.display(Leaf(), 3)
    assert capsys.readouterr().out == f"{Leaf()!r}\n3\n"


def test_ipython_shows_trees(in_ipython, capsys):
    leaf = Leaf()
    nnx.display(leaf, 3)
    assert in_ipython == [leaf, 3]
    assert capsys.readouterr().out == ""


def test_ipython_without_treescope(in_ipython, capsys, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(_display.importlib, "import_module", absent)
    nnx.display(3)
    assert (in_ipython, capsys.readouterr().out) == ([], "3\n")


def test_a_broken_treescope_says_so(in_ipython, monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(_display.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        nnx.display(3)


@deprecated
def test_what_treescope_makes_of_modules():
    model = Everything()
    model.again = model.child
    model.itself = model
    text = treescope.render_to_text(model)
    assert text.startswith("Everything(")
    assert "param=Param(value=" in text
    assert "again=Leaf(" in text
    assert "Repeated python obj" in text
    assert "cyclic reference" in text
    assert "floating=0.5" in text
    assert "treescope-container" in treescope.render_to_html(model)


@deprecated
def test_what_treescope_makes_of_states_and_variables():
    state = nnx.State({"a/w": nnx.Param(jnp.ones(2), sharding=("x",)), "b": jnp.zeros(1)})
    text = treescope.render_to_text(state)
    assert text.startswith("State({")
    assert "'a/w': Param(" in text
    assert "sharding=('x',)" in text
    assert "ShapeDtypeStruct" in treescope.render_to_text(nnx.eval_shape(Leaf))
    assert "Param(" in treescope.render_to_text(nnx.Param(jax.random.key(0)))
