"""What each docstring of a layer, function or initializer holds: a source, an example, every argument and its shape."""

import inspect
import re

import pytest

import nnx
from nnx import layers
from nnx.layers import initializers

POOLS = {name for name in layers.__all__ if name.endswith("Pool")}
NAMES = {
    **{name: getattr(layers, name) for name in layers.__all__ if name != "initializers"},
    **{f"initializers.{name}": getattr(initializers, name) for name in initializers.__all__},
}
# JAX's own functions, which we hand on, have JAX's docstrings.
OURS = {name: thing for name, thing in NAMES.items() if thing.__module__.startswith("nnx.")}
MODULES = {
    name: thing for name, thing in OURS.items() if inspect.isclass(thing) and issubclass(thing, nnx.Module)
}  # fmt: skip


def section(doc, title):
    """The lines below `title:` that are indented further, as one text."""
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)+)", inspect.cleandoc(doc or "") + "\n", re.MULTILINE)
    return inspect.cleandoc("    " + found.group(1).strip("\n")) if found else ""


def arguments(doc):
    """What is said of each argument, by name."""
    found, names = {}, ()
    for line in section(doc, "Args").splitlines():
        if head := re.match(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)", line):
            names = [name.lstrip("*") for name in head.group(1).split(", ")]
            found.update(dict.fromkeys(names, head.group(2)))
        else:
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found


def parameters(function):
    return {name: par for name, par in inspect.signature(function).parameters.items() if name != "self"}


def methods(thing):
    """The public methods that a class defines itself, `__call__` among them."""
    return {
        name: value
        for name, value in vars(thing).items()
        if inspect.isfunction(value) and (name == "__call__" or not name.startswith("_"))
    }


def check_function(function, doc, where):
    said = arguments(doc)
    assert set(parameters(function)) <= set(said), f"{where}: {set(parameters(function)) - set(said)} are not in Args"
    for name, parameter in parameters(function).items():
        if str(parameter.annotation).startswith("jax.Array") and parameter.kind is not parameter.VAR_POSITIONAL:
            assert re.search(r"\[.*\]|shape|axes|broadcast|the key", said[name]), f"{where}: of what shape is `{name}`?"
    if str(inspect.signature(function).return_annotation) not in ("None", str(inspect.Signature.empty)):
        assert section(doc, "Returns"), f"{where}: what does it return?"


def test_names_of_ours_are_not_left_out():
    assert len(MODULES) >= 36
    assert {name for name in NAMES if name not in OURS and name.startswith("initializers.")} == {
        "initializers.ones",
        "initializers.zeros",
    }


@pytest.mark.parametrize("name", OURS)
def test_source_and_example(name):
    if isinstance(OURS[name], type) and issubclass(OURS[name], Exception):
        return
    doc = inspect.cleandoc(OURS[name].__doc__)
    assert re.search(r"^(References?|Source): \S", doc, re.MULTILINE), "where does it come from?"
    assert ">>> " in section(doc, "Example"), "an Example shows how it is used"


@pytest.mark.parametrize("name", MODULES)
def test_equation(name):
    doc = inspect.cleandoc(MODULES[name].__doc__)
    if name in POOLS:  # which name the function that says it
        doc += re.search(r"`(\w+_pool)` as a Module", doc).group(1)
    else:
        assert re.search(r"`[^`]*(=|<-)[^`]*`", doc), "what does it compute?"


@pytest.mark.parametrize("name", OURS)
def test_arguments(name):
    thing = OURS[name]
    if name not in MODULES:
        if inspect.isfunction(thing):
            check_function(thing, thing.__doc__, name)
        return
    said = {**arguments(thing.__doc__), **arguments(inspect.getdoc(thing.__init__))}
    if "__init__" in {
        attribute for base in thing.__mro__[: thing.__mro__.index(nnx.Module)] for attribute in vars(base)
    }:
        missing = set(parameters(thing.__init__)) - set(said)
        assert not missing, f"{name}: {missing} are not in Args"
    for method, function in methods(thing).items():
        check_function(function, function.__doc__, f"{name}.{method}")
