"""What the packages export, and the one direction in which they import each other."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Each may import itself and those before it.
ORDER = ("core", "layers", "train", "examples")
EXPORTING = ("core", "layers", "train")
SOURCES = {part: sorted((ROOT / f"packages/nnx-{part}/src/nnx/{part}").rglob("*.py")) for part in ORDER}


def exported_names(part: str) -> list[str]:
    """What a package exports; each also exports its own `__version__`."""
    return [name for name in importlib.import_module(f"nnx.{part}").__all__ if name != "__version__"]


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, `from a import b` counting as `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", EXPORTING)
def test_all_is_sorted_public_and_true(part: str) -> None:
    module = importlib.import_module(f"nnx.{part}")
    assert list(module.__all__) == sorted(set(module.__all__))
    for name in module.__all__:
        assert hasattr(module, name), f"nnx.{part}.__all__ holds {name}, which nnx.{part} does not"
    assert [name for name in exported_names(part) if name.startswith("_")] == []


@pytest.mark.parametrize("part", EXPORTING)
def test_what_a_package_imports_for_its_users_is_in_all(part: str) -> None:
    module = importlib.import_module(f"nnx.{part}")
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    public = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"nnx.{part}")
        for alias in node.names
    }
    assert {name for name in public if not name.startswith("_")} <= {*module.__all__}


def test_no_name_is_exported_twice() -> None:
    owners: dict[str, str] = {}
    for part in EXPORTING:
        for name in exported_names(part):
            assert name not in owners, f"nnx.{name} is exported by nnx.{owners.get(name)} and by nnx.{part}"
            owners[name] = part
    assert not {*owners} & {*ORDER}, "an exported name hides a package"


@pytest.mark.parametrize("part", ORDER)
def test_imports_go_one_way(part: str) -> None:
    later = tuple(f"nnx.{other}" for other in ORDER[ORDER.index(part) + 1 :])
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES[part]
        for name in imported_modules(path)
        if any(name == module or name.startswith(f"{module}.") for module in later)
    ]
    assert wrong == []


def test_the_core_does_not_import_its_own_facade() -> None:
    wrong = [path for path in SOURCES["core"] if "nnx" in set(imported_modules(path))]
    assert wrong == []


def test_one_file_touches_private_jax() -> None:
    allowed = ROOT / "packages/nnx-core/src/nnx/core/_tracing.py"
    files = [path for paths in SOURCES.values() for path in paths]
    assert allowed in files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        if path != allowed
        for name in imported_modules(path)
        if name.startswith(("jax._src", "jaxlib._"))
    ]
    assert wrong == []
