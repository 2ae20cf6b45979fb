"""The four distributions as a user gets them: built wheels, and an interpreter that sees installed files alone."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import uv

PACKAGES = Path(__file__).parent.parent.parent / "packages"
PARTS = ("core", "layers", "train", "examples")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The path of each distribution's wheel, by the name of its part."""
    folder = tmp_path_factory.mktemp("wheels")
    built = {}
    for part in PARTS:
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
            cwd=PACKAGES / f"nnx-{part}",
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (built[part],) = folder.glob(f"nnx_{part}-*.whl")
    return built


@pytest.fixture(scope="session")
def wheel_files(wheels: Mapping[str, Path]) -> Mapping[str, list[str]]:
    """The names of the files in each distribution's wheel."""
    files = {}
    for part, path in wheels.items():
        with zipfile.ZipFile(path) as archive:
            files[part] = archive.namelist()
    return files


@pytest.fixture(scope="session")
def core_environment(wheels: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment into which nothing but the core's wheel was asked for."""
    environment = tmp_path_factory.mktemp("core") / "venv"
    uv_command = uv.find_uv_bin()
    subprocess.run([uv_command, "venv", "--quiet", "--python", sys.executable, environment], check=True)
    subprocess.run(
        [uv_command, "pip", "install", "--quiet", "--python", environment, wheels["core"]],
        check=True,
    )
    return environment


@pytest.fixture(scope="session")
def run_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code in an interpreter: `run_python(code, python=path)`; the interpreter of the tests by default."""
    bytecode = tmp_path_factory.mktemp("bytecode")

    def run(code: str, *, python: Path | str = sys.executable) -> subprocess.CompletedProcess[str]:
        # What points Python at source trees would hide what is missing from an installation. Bytecode is kept, as it is
        # for users, and beside neither the sources nor the packages.
        dropped = {"PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV"} | ({"PYTHONPATH"} if python != sys.executable else set())
        environment = {name: value for name, value in os.environ.items() if name not in dropped}
        environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
        return subprocess.run(
            [python, "-c", code], check=False, capture_output=True, text=True, env=environment, timeout=300
        )

    return run
