"""Run the benchmarks: `python -m benchmarks`, or `hatch run bench`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import (
    attributes,
    checkpoint,
    construction,
    decode,
    dispatch,
    import_time,
    layers,
    loop,
    memory,
    sharded,
    trace,
    train_step,
)
from benchmarks._measure import QUICK, Options
from benchmarks._report import line, write, write_excerpt
from benchmarks._results import Result, is_past

BENCHMARKS = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        dispatch,
        train_step,
        trace,
        memory,
        attributes,
        construction,
        import_time,
        layers,
        decode,
        sharded,
        checkpoint,
        loop,
    )
}
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write the report, and say whether every bound holds.

    Returns:
        The exit code: 1 if a figure of ours is past its bound.
    """
    parser = argparse.ArgumentParser(
        prog="hatch run bench", description="Measure what nnx costs beside raw JAX and its peers."
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no other libraries, no report")
    parser.add_argument(
        "--only",
        action="append",
        choices=list(BENCHMARKS),
        metavar="NAME",
        help=f"one of {', '.join(BENCHMARKS)}; no report; may be repeated",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the folder to write the report to; by default that of a whole run is benchmarks/results",
    )
    given = parser.parse_args(arguments)
    options = QUICK if given.quick else Options()
    results: list[Result] = []
    for name in given.only or BENCHMARKS:
        for result in BENCHMARKS[name].measure(options):
            results.append(result)
            print(line(result), flush=True)
    folder = given.output or (None if given.quick or given.only else RESULTS)
    if folder is not None:
        write(results, folder)
        if folder == RESULTS:
            write_excerpt(json.loads((folder / "results.json").read_text(encoding="utf-8")), README)
        print(f"wrote {folder}")
    missed = [result for result in results if is_past(result)]
    for result in missed:
        print(f"past its bound: {line(result)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
