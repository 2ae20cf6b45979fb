"""Four wheels that share one namespace and never a file."""

import email
import re
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
PARTS = ("core", "layers", "train", "examples")

# Each worker would build the wheels anew.
pytestmark = pytest.mark.xdist_group("wheels")


def test_no_file_is_in_two_wheels(wheel_files: Mapping[str, list[str]]) -> None:
    owners: dict[str, str] = {}
    for part, files in wheel_files.items():
        for file in files:
            assert file not in owners, f"{file} is in nnx-{owners.get(file)} and in nnx-{part}"
            owners[file] = part


def test_only_core_holds_the_facade(wheel_files: Mapping[str, list[str]]) -> None:
    assert [part for part, files in wheel_files.items() if "nnx/__init__.py" in files] == ["core"]


@pytest.mark.parametrize("part", PARTS)
def test_a_wheel_holds_its_own_package_and_nothing_else(part: str, wheel_files: Mapping[str, list[str]]) -> None:
    facade = {"nnx/__init__.py", "nnx/py.typed", "nnx/testing.py"} if part == "core" else set()
    code = {file for file in wheel_files[part] if ".dist-info/" not in file}
    assert facade <= code
    assert all(file.startswith(f"nnx/{part}/") for file in code - facade)
    assert {f"nnx/{part}/__init__.py", f"nnx/{part}/py.typed"} <= code


@pytest.mark.parametrize("part", PARTS)
def test_a_wheel_states_its_license_version_and_python(part: str, wheels: Mapping[str, Path]) -> None:
    with zipfile.ZipFile(wheels[part]) as archive:
        (metadata_file,) = [file for file in archive.namelist() if file.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(metadata_file))
        license_text = archive.read(metadata_file.replace("METADATA", "licenses/LICENSE")).decode()
        about = archive.read(f"nnx/{part}/__about__.py").decode()
    assert "Apache License" in license_text
    assert "END OF TERMS AND CONDITIONS" in license_text
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert f'"{metadata["Version"]}"' in about
    assert metadata["Description-Content-Type"] == "text/markdown"


@pytest.mark.parametrize("part", PARTS)
def test_the_newest_heading_of_the_changelog_is_the_version(part: str, wheels: Mapping[str, Path]) -> None:
    changelog = (ROOT / "packages" / f"nnx-{part}" / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = re.search(r"^## \[(?!Unreleased)(.+?)\]", changelog, re.MULTILINE)
    assert heading is not None
    assert wheels[part].name.startswith(f"nnx_{part}-{heading.group(1)}-")


@pytest.mark.parametrize("part", PARTS)
def test_dependencies_are_ranges(part: str) -> None:
    project = tomllib.loads((ROOT / "packages" / f"nnx-{part}" / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert ">=" in operators, f"{requirement} has no lower bound"
        assert not operators & {"==", "===", "~="}
        # A sibling's next minor version may change what this one calls.
        assert ("<" in operators) == requirement.name.startswith("nnx-")


def test_core_depends_on_jax_and_numpy_alone() -> None:
    project = tomllib.loads((ROOT / "packages" / "nnx-core" / "pyproject.toml").read_text())["project"]
    assert {Requirement(text).name for text in project["dependencies"]} == {"jax", "jaxlib", "numpy"}
