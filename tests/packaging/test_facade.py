"""`nnx` shows every installed name, and says which package is missing for one that is not."""

import importlib
import inspect
import sys
import textwrap
from pathlib import Path

import pytest

import nnx

PARTS = ("layers", "train", "examples")


@pytest.fixture
def uninstall(monkeypatch: pytest.MonkeyPatch):
    """Makes the named parts, and what the facade has kept of them, unavailable for one test."""

    def without(*parts: str) -> None:
        for part in parts:
            kept = getattr(importlib.import_module(f"nnx.{part}"), "__all__", ())
            for name in {part, *kept} - {*nnx.core.__all__}:
                if name in vars(nnx):
                    monkeypatch.delattr(nnx, name)
            # How the import system itself marks a module that must not be found.
            monkeypatch.setitem(sys.modules, f"nnx.{part}", None)

    return without


@pytest.fixture
def replace_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uninstall):
    """Puts another `nnx.layers` in the place of the installed one, for one test."""

    def replace(source: str) -> None:
        uninstall("layers")
        monkeypatch.delitem(sys.modules, "nnx.layers")
        package = tmp_path / "layers"
        package.mkdir()
        (package / "__init__.py").write_text(textwrap.dedent(source))
        monkeypatch.setattr(nnx, "__path__", [str(tmp_path)])

    yield replace
    sys.modules.pop("nnx.layers", None)
    vars(nnx).pop("layers", None)


@pytest.mark.parametrize("part", ["layers", "train"])
def test_every_name_of_a_part_is_found(part: str) -> None:
    module = importlib.import_module(f"nnx.{part}")
    for name in module.__all__:
        if name not in nnx.core.__all__:
            assert getattr(nnx, name) is getattr(module, name)


def test_parts_are_attributes() -> None:
    for part in PARTS:
        assert getattr(nnx, part) is sys.modules[f"nnx.{part}"]


def test_a_found_name_is_kept() -> None:
    linear = nnx.Linear
    assert vars(nnx)["Linear"] is linear


def test_dir_lists_every_installed_name() -> None:
    names = dir(nnx)
    assert names == sorted(names)
    assert {*nnx.core.__all__, *nnx.layers.__all__, *nnx.train.__all__, *PARTS, "core", "__version__"} <= {*names}
    assert [name for name in names if name.startswith("_") and not name.startswith("__")] == []


def test_dir_works_with_parts_missing(uninstall) -> None:
    uninstall("layers", "train", "examples")
    assert {*nnx.core.__all__} <= {*dir(nnx)}
    assert not {"Linear", "TrainState", *PARTS} & {*dir(nnx)}


def test_version_is_the_cores() -> None:
    from nnx.core.__about__ import __version__

    assert nnx.__version__ == __version__


@pytest.mark.parametrize(
    ("missing", "name", "hint"),
    [
        (["layers"], "Linear", "nnx-layers is not installed (pip install nnx-layers)"),
        (["train"], "TrainState", "nnx-train is not installed (pip install nnx-train)"),
        (
            ["layers", "train"],
            "Linear",
            "nnx-layers is not installed (pip install nnx-layers); nor is nnx-train (pip install nnx-train)",
        ),
        (["layers"], "layers", "nnx-layers is not installed (pip install nnx-layers)"),
        (["layers", "train"], "train", "nnx-train is not installed (pip install nnx-train)"),
        (["examples"], "examples", "nnx-examples is not installed (pip install nnx-examples)"),
    ],
)
def test_a_missing_package_is_named(uninstall, missing: list[str], name: str, hint: str) -> None:
    uninstall(*missing)
    with pytest.raises(AttributeError) as caught:
        getattr(nnx, name)
    assert str(caught.value) == f"module 'nnx' has no attribute {name!r}: {hint}"
    assert caught.value.name == name


def test_a_name_of_an_installed_package_needs_no_other(uninstall) -> None:
    uninstall("train")
    assert nnx.Linear is nnx.layers.Linear


def test_a_misspelt_name_is_a_plain_error_with_the_nearest() -> None:
    with pytest.raises(AttributeError) as caught:
        nnx.Lineer
    assert str(caught.value) == "module 'nnx' has no attribute 'Lineer'. Did you mean 'Linear'?"


def test_an_unknown_name_is_a_plain_error() -> None:
    with pytest.raises(AttributeError) as caught:
        nnx.qqqqqqqq
    assert str(caught.value) == "module 'nnx' has no attribute 'qqqqqqqq'"


def test_an_error_inside_a_part_is_that_error(replace_layers) -> None:
    replace_layers("import a_module_that_does_not_exist")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_does_not_exist"):
        nnx.Linear
    with pytest.raises(ModuleNotFoundError, match="a_module_that_does_not_exist"):
        nnx.layers


def test_a_part_that_raises_is_that_error(replace_layers) -> None:
    replace_layers("raise ValueError('not on this machine')")
    with pytest.raises(ValueError, match="not on this machine"):
        nnx.Linear


def test_the_names_of_a_part_are_its_all(replace_layers) -> None:
    replace_layers("""
        __all__ = ["New"]
        New = "new"
        other = "other"
    """)
    assert nnx.New == "new"
    vars(nnx).pop("New")
    with pytest.raises(AttributeError, match=r"has no attribute 'other'$"):
        nnx.other


def test_a_folder_left_behind_is_not_a_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uninstall) -> None:
    uninstall("layers")
    monkeypatch.delitem(sys.modules, "nnx.layers")
    (tmp_path / "layers" / "__pycache__").mkdir(parents=True)
    monkeypatch.setattr(nnx, "__path__", [str(tmp_path)])
    with pytest.raises(AttributeError, match="nnx-layers is not installed"):
        nnx.Linear
    sys.modules.pop("nnx.layers")
    vars(nnx).pop("layers", None)


def test_underscored_names_import_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        pytest.fail(f"{name} was imported")

    monkeypatch.setattr(importlib, "import_module", refuse)
    for name in ("__wrapped__", "__file__x", "_repr_html_", "_private"):
        with pytest.raises(AttributeError, match=f"^module 'nnx' has no attribute '{name}'$"):
            getattr(nnx, name)


def test_inspection_works() -> None:
    assert inspect.unwrap(nnx) is nnx
    assert inspect.getdoc(nnx)
    assert not hasattr(nnx, "__wrapped__")
