"""What every test shares: strictness, and randomness that repeats."""

import os
import shutil
import tempfile

import hypothesis
import jax
import numpy as np
import pytest

# It needs flax, torch and equinox, which are in an environment of its own: `hatch run parity` names the folder.
collect_ignore = ["parity"]

# A silent broadcast between ranks is how a wrong shape stays unseen. Users' own code is not held to it: the tests that
# run it as written use `with jax.numpy_rank_promotion("allow")`.
jax.config.update("jax_numpy_rank_promotion", "raise")

# An example that compiles takes longer than any deadline that would say something about the code, and the first example
# of each test does.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config: pytest.Config) -> None:
    """Keep what a process of the run compiles until it ends: many tests compile one program.

    Each has a folder of its own, as JAX does not write such files at once: another process may read half of one.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # whoever runs the tests keeps it longer
        return
    folder = tempfile.mkdtemp(prefix="nnx-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def seed() -> int:
    """The seed of a test's randomness."""
    return 0


@pytest.fixture
def key(seed: int) -> jax.Array:
    """A JAX key for a test's own arrays."""
    return jax.random.key(seed)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A NumPy generator for a test's own arrays."""
    return np.random.default_rng(seed)
