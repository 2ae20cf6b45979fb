"""What the examples share: their options, and a figure without a window."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["new_figure", "options_of", "save_figure"]


def options_of(
    name: str, description: str, arguments: Sequence[str] | None, *, steps: int, **more: dict[str, Any]
) -> argparse.Namespace:
    """Parse an example's command line.

    Args:
        name: the example.
        description: what `--help` says of it.
        arguments: the words; None for those of the process.
        steps: how many steps it takes by default.
        **more: further options by name, each with the arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m nnx.examples.{name}", description=description)
    parser.add_argument("--steps", type=int, default=steps, help="steps of training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / name, help="where everything is kept (default: %(default)s)"
    )
    for option, given in more.items():
        parser.add_argument(f"--{option.replace('_', '-')}", **given)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if options.seed < 0:
        parser.error(f"--seed must not be negative, got {options.seed}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file, not a directory")
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def new_figure(width: float, height: float) -> Any:
    """A figure to draw into, in inches; without pyplot, so with no window and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, and say where."""
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")
