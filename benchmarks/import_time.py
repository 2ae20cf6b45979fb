"""What `import nnx` adds to `import jax`, each time in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from benchmarks._measure import Options, Spread
from benchmarks._results import OURS, RAW, Result

ROUNDS = 9
PROGRAM = """
import time
start = time.process_time()
import jax
between = time.process_time()
import {module}
print(between - start, time.process_time() - between)
"""
"""Processor time: what else the machine does is not the import's cost."""


def measure(options: Options) -> Iterator[Result]:
    """The ratio of both imports to that of jax alone."""
    modules = {OURS: "nnx"}
    if options.rivals:
        from benchmarks._rivals import EQUINOX, FLAX

        modules |= {FLAX: "flax.nnx", EQUINOX: "equinox"}
    rounds = min(options.rounds, ROUNDS)
    taken: dict[str, list[tuple[float, float]]] = {library: [] for library in modules}
    for _ in range(rounds):
        for library, module in modules.items():
            program = [sys.executable, "-c", PROGRAM.format(module=module)]
            output = subprocess.run(program, check=True, capture_output=True, text=True).stdout
            jax_alone, more = map(float, output.split())
            taken[library].append((jax_alone, more))
    everything = [jax_alone for pairs in taken.values() for jax_alone, _ in pairs]
    yield Result("import_time", "import", RAW, Spread.of(everything).median, "s", Spread.of([1.0]))
    for library, pairs in taken.items():
        added = Spread.of([more for _, more in pairs]).median
        ratio = Spread.of([(jax_alone + more) / jax_alone for jax_alone, more in pairs])
        yield Result("import_time", "import", library, added, "s", ratio)
