"""nnx-core alone, in a fresh environment: JAX and NumPy arrive with it, and it works."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import uv

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheels")]

# nnx-core's own, and what JAX needs.
EXPECTED = {"nnx-core", "jax", "jaxlib", "numpy", "ml-dtypes", "opt-einsum", "scipy"}

USE = """
import jax, jax.numpy as jnp
import nnx

class Count(nnx.Variable):
    pass

class Linear(nnx.Module):
    def __init__(self, din, dout, *, ctx):
        self.kernel = nnx.Param(jax.random.uniform(ctx.make_rng("params"), (din, dout)))
        self.count = Count(0)

    def __call__(self, x):
        self.count += 1
        return x @ self.kernel

@nnx.jit
def forward(model, x):
    return model(x)

model = Linear(3, 2, ctx=nnx.context(0))
assert forward(model, jnp.ones((4, 3))).shape == (4, 2)
assert model.count == 1
(params, counts), moduledef = model.partition(nnx.Param, Count)
assert moduledef.merge(params, counts).count == 1
grads = nnx.grad(lambda model: model(jnp.ones((4, 3))).sum(), wrt=nnx.Param)(model)
assert grads["kernel"].value.shape == (3, 2)
"""


def test_only_what_jax_needs_arrives(core_environment: Path) -> None:
    listing = subprocess.run(
        [uv.find_uv_bin(), "pip", "list", "--quiet", "--format", "json", "--python", core_environment],
        check=True,
        capture_output=True,
        text=True,
    )
    assert {distribution["name"] for distribution in json.loads(listing.stdout)} == EXPECTED


def test_the_core_works(core_environment: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run_python(USE, python=core_environment / "bin" / "python")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (
            "Linear",
            "nnx-layers is not installed (pip install nnx-layers); nor is nnx-train (pip install nnx-train)",
        ),
        ("layers", "nnx-layers is not installed (pip install nnx-layers)"),
        ("train", "nnx-train is not installed (pip install nnx-train)"),
    ],
)
def test_a_name_of_another_package_says_what_to_install(
    core_environment: Path, name: str, hint: str, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = run_python(f"import nnx; nnx.{name}", python=core_environment / "bin" / "python")
    assert result.stderr.splitlines()[-1] == f"AttributeError: module 'nnx' has no attribute {name!r}: {hint}"


def test_dir_lists_the_core_alone(
    core_environment: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = "import nnx, nnx.core; print({*nnx.core.__all__} <= {*dir(nnx)}, {'layers', 'train'} & {*dir(nnx)})"
    result = run_python(code, python=core_environment / "bin" / "python")
    assert result.stdout.split() == ["True", "set()"], result.stderr
