"""Source distributions and wheels: the same bytes wherever and whenever they are built, and nothing that stands by."""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parent.parent.parent / "packages"
PARTS = ("core", "layers", "train", "examples")

# Each worker would build the wheels anew.
pytestmark = pytest.mark.xdist_group("wheels")


def build(folder: Path, out: Path) -> dict[str, bytes]:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--directory", str(out)],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("part", PARTS)
def test_builds_are_reproducible_and_hold_what_they_should(
    part: str, wheels: Mapping[str, Path], tmp_path: Path
) -> None:
    source = PACKAGES / f"nnx-{part}"
    copy = shutil.copytree(source, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.rglob("*"):
        os.utime(path, (10**9, 10**9))
    (copy / "notes.txt").write_text("what nobody means to publish")
    first = build(copy, tmp_path / "first")
    (wheel_name,) = [name for name in first if name.endswith(".whl")]
    (archive_name,) = [name for name in first if name.endswith(".tar.gz")]
    assert wheel_name == wheels[part].name
    assert first[wheel_name] == wheels[part].read_bytes()

    with tarfile.open(tmp_path / "first" / archive_name) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    code = {str(path.relative_to(source)) for path in (source / "src").rglob("*.py")}
    marks = {f"src/nnx/{part}/py.typed"}
    assert code | marks | {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "PKG-INFO"} <= names
    assert "notes.txt" not in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]

    # What is built from the source distribution, as other packagers do, is the same again.
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert build(unpacked, tmp_path / "second") == first
