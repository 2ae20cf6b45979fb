"""The command `nnx-examples`: what examples there are, and running one."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

__all__ = ["EXAMPLES", "main"]

EXAMPLES = (
    "linear_regression",
    "digits",
    "vae",
    "scan_over_layers",
    "char_transformer",
    "checkpointing",
    "parameter_surgery",
    "transformer_sharded",
)
"""From the simplest on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="nnx-examples", description="Programs that train on real data with nnx.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="say what there is")
    run = commands.add_parser("run", help="run one; what follows its name is handed to it", add_help=False)
    run.add_argument("name", choices=EXAMPLES, metavar="NAME", help=f"one of {', '.join(EXAMPLES)}")
    run.add_argument("options", nargs=argparse.REMAINDER, help="its options; --help lists them")
    given = parser.parse_args(arguments)
    if given.command == "list":
        for name in EXAMPLES:
            title = (importlib.import_module(f"nnx.examples.{name}").__doc__ or "").partition(": `")[0]
            print(f"{name:20} {title}")
        return 0
    result: int = importlib.import_module(f"nnx.examples.{given.name}").main(given.options)
    return result


if __name__ == "__main__":
    sys.exit(main())
