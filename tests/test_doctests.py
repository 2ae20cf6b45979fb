"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("packages/*/src"))
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def module_names() -> list[str]:
    # From the files and not by walking the packages, which would import them all before the first test runs.
    names = []
    for source in SOURCES:
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if not name.endswith("__main__")]


@pytest.mark.parametrize("name", module_names())
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    results = doctest.testmod(
        module, extraglobs={"nnx": nnx, "jax": jax, "jnp": jnp, "np": np}, optionflags=OPTIONS, verbose=False
    )
    assert results.failed == 0
