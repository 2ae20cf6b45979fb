"""The lowest versions that the packages allow: of each other, and of what the oldest environment installs."""

import email
import re
import subprocess
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import uv
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent.parent
PARTS = ("core", "layers", "train", "examples")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheels")]


@pytest.fixture(scope="session")
def lowest(wheels: Mapping[str, Path]) -> dict[str, Version]:
    """What a resolver takes when it takes the lowest version of everything that a package names itself."""
    wanted = []
    for wheel in wheels.values():
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [file for file in archive.namelist() if file.endswith(".dist-info/METADATA")]
            metadata = email.message_from_bytes(archive.read(name))
        wanted += [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    done = subprocess.run(
        [
            *(
                uv.find_uv_bin(),
                "pip",
                "compile",
                "--quiet",
                "--no-header",
                "--no-annotate",
                "--python-version",
                "3.11",
            ),
            *("--resolution", "lowest-direct", "--find-links", str(wheels["core"].parent), "-"),
        ],
        input="\n".join(wanted),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {name: Version(version) for name, version in re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE)}


def requirements(part: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / f"packages/nnx-{part}/pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in project["dependencies"]]


def lower_bound(requirement: Requirement) -> Version:
    return max(Version(item.version) for item in requirement.specifier if item.operator == ">=")


def test_the_lowest_siblings_go_together(lowest: dict[str, Version]) -> None:
    for part in PARTS[1:]:
        siblings = [item for item in requirements(part) if item.name.startswith("nnx-")]
        assert siblings
        for sibling in siblings:
            assert lowest[sibling.name] in sibling.specifier, f"nnx-{part} takes {sibling}"
            # A range that begins below what is resolved names a version that this package was never tried with.
            assert lower_bound(sibling).release[:2] == lowest[sibling.name].release[:2], f"nnx-{part} takes {sibling}"


def test_a_package_allows_its_siblings_as_they_are_here(wheels: Mapping[str, Path]) -> None:
    for part in PARTS:
        for sibling in requirements(part):
            if sibling.name.startswith("nnx-"):
                version = wheels[sibling.name.removeprefix("nnx-")].name.split("-")[1]
                assert sibling.specifier.contains(version, prereleases=True), f"nnx-{part} does not take {version}"


def test_the_oldest_environment_is_the_lowest_resolution(lowest: dict[str, Version]) -> None:
    overrides = tomllib.loads((ROOT / "hatch.toml").read_text())["envs"]["test-matrix"]["overrides"]
    pinned = [
        Requirement(item["value"])
        for item in overrides["matrix"]["versions"]["extra-dependencies"]
        if item["if"] == ["oldest"]
    ]
    assert {item.name for item in pinned} >= {"jax", "jaxlib", "optax", "orbax-checkpoint"}
    for item in pinned:
        assert lowest[item.name] in item.specifier, f"{item} is tested, and {lowest[item.name]} is allowed"
