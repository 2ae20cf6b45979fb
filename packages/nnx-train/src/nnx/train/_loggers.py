"""Loggers: where the numbers of a run go, so that a run that was resumed reads like one that was not."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

__all__ = ["CSVLogger", "JSONLinesLogger", "Logger", "TensorBoardLogger", "TerminalLogger"]


class Logger(Protocol):
    """What `fit` writes to."""

    def resume(self, step: int) -> None:
        """Forget what was logged after a step, from which the run goes on."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""

    def close(self) -> None:
        """Write what is still to be written."""


class TerminalLogger:
    """A line for each step that is logged.

    Args:
        file: where to; the standard output if None.

    Example:
        >>> import nnx
        >>> nnx.TerminalLogger().log(100, {"loss": 0.12345, "accuracy": 0.5})
        step 100  loss 0.1235  accuracy 0.5
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file

    def resume(self, step: int) -> None:
        """A terminal forgets nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Print the numbers of a step."""
        numbers = "".join(f"  {name} {value:.4g}" for name, value in values.items())
        print(f"step {step}{numbers}", file=self._file or sys.stdout, flush=True)

    def close(self) -> None:
        """Nothing is left to be written."""


class JSONLinesLogger:
    """A JSON object in a line of its own for each step that is logged.

    Numbers that are not finite are written as strings ("nan"), which JSON has no numbers for.

    Args:
        path: the file; made with its folder, and continued if it is there.

    Example:
        >>> import pathlib, tempfile, nnx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     logger = nnx.JSONLinesLogger(pathlib.Path(folder) / "log.jsonl")
        ...     logger.log(1, {"loss": 0.5})
        ...     logger.close()
        ...     print((pathlib.Path(folder) / "log.jsonl").read_text().strip())
        {"step": 1, "loss": 0.5}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._file: TextIO | None = None

    def resume(self, step: int) -> None:
        """Drop the lines after a step, and one that a kill cut short."""
        _rewrite(self._path, (line for line in _lines(self._path) if _step_of(line) <= step))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _rewrite(path: Path, lines: Iterable[str]) -> None:
    """Replace a file's content, at once."""
    if not path.exists():
        return
    fresh = path.with_name(path.name + ".new")
    fresh.write_text("".join(lines), encoding="utf-8")
    fresh.replace(path)


class CSVLogger:
    """A row for each step that is logged; a name that comes up later makes a column, for which the file is rewritten.

    Args:
        path: the file; made with its folder, and continued if it is there.

    Example:
        >>> import pathlib, tempfile, nnx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     logger = nnx.CSVLogger(pathlib.Path(folder) / "log.csv")
        ...     logger.log(1, {"loss": 0.5})
        ...     logger.log(2, {"loss": 0.25, "accuracy": 0.75})
        ...     logger.close()
        ...     print((pathlib.Path(folder) / "log.csv").read_text().strip())
        step,loss,accuracy
        1,0.5,
        2,0.25,0.75
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._file: TextIO | None = None
        self._columns: list[str] = []

    def resume(self, step: int) -> None:
        """Drop the rows after a step, and one that a kill cut short."""
        columns, rows = self._read()
        self._columns = columns
        if columns:
            self._write([row for row in rows if _number(row.get("step")) <= step])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        if self._file is None and not self._columns:
            self._columns, _ = self._read()
        fresh = [name for name in ("step", *values) if name not in self._columns]
        if fresh:
            _, rows = self._read()
            self.close()
            self._columns += fresh
            self._write(rows)
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8", newline="")
        csv.DictWriter(self._file, self._columns, restval="", lineterminator="\n").writerow({"step": step, **values})
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        if not self._path.exists():
            return [], []
        with self._path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or ()), list(reader)

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_name(self._path.name + ".new")
        with fresh.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="", lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        fresh.replace(self._path)


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return float("inf")


_writers = itertools.count()


class TensorBoardLogger:
    """Scalars for TensorBoard; needs `pip install nnx-train[tensorboard]`.

    Args:
        folder: where the event files go.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            if error.name != "tensorboardX":
                raise
            raise ImportError("TensorBoardLogger needs tensorboardX: pip install nnx-train[tensorboard]") from None
        self._folder = os.fspath(folder)
        self._kind: Any = SummaryWriter
        self._writer: Any = None
        self._purge: int | None = None

    def resume(self, step: int) -> None:
        """Let TensorBoard hide what was logged after a step."""
        self._purge = step + 1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        if self._writer is None:
            # Files are named by the second, and of two lives in one the later would overwrite what the earlier wrote.
            suffix = f".{os.getpid()}.{next(_writers)}"
            self._writer = self._kind(self._folder, purge_step=self._purge, filename_suffix=suffix)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still to be written."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
