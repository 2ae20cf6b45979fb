"""`import nnx` costs next to nothing over `import jax`, and brings in nothing that it does not need."""

import statistics
import subprocess
from collections.abc import Callable

import pytest

RunPython = Callable[..., subprocess.CompletedProcess[str]]

BOUND_MS = 80
HEAVY = ("optax", "orbax", "matplotlib", "rich", "tqdm", "sklearn", "pandas", "IPython", "treescope")
# Processor time, not the clock: what else the machine does at the moment is not the import's cost.
MEASURE = "import time, jax; start = time.process_time(); import nnx; print(time.process_time() - start)"


def test_import_is_cheap(run_python: RunPython) -> None:
    run_python(MEASURE)  # writes the bytecode
    times = [1000 * float(run_python(MEASURE).stdout) for _ in range(5)]
    assert statistics.median(times) <= BOUND_MS, times


def test_import_brings_in_nothing_heavy(run_python: RunPython) -> None:
    # What `import jax` itself imports where it is installed is not ours.
    listing = "[m for m in sys.modules if m.partition('.')[0] in {heavy} or m in {siblings}]"
    listing = listing.format(heavy=HEAVY, siblings=("nnx.layers", "nnx.train", "nnx.examples"))
    result = run_python(f"import sys, jax; before = set({listing}); import nnx; print(sorted(set({listing}) - before))")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_training_imports_orbax_only_for_a_checkpoint(run_python: RunPython) -> None:
    result = run_python("import sys, nnx; nnx.TrainState; print(any(m.startswith('orbax') for m in sys.modules))")
    assert result.stdout.strip() == "False", result.stdout + result.stderr


@pytest.mark.parametrize("part", ["core", "layers", "train"])
def test_a_part_can_be_imported_first(part: str, run_python: RunPython) -> None:
    result = run_python(f"import nnx.{part}; print(nnx.{part}.__name__)")
    assert result.stdout.strip() == f"nnx.{part}", result.stderr
