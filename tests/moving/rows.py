"""The tables of "Moving to nnx" and what each of their rows claims, as a pair of programs with one result."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "moving.md"

_SPAN = re.compile(r"`([^`]+)`")


class Line(NamedTuple):
    """A row of a table: what the peer has, and what stands for it here."""

    theirs: str
    ours: str


def tables(text: str) -> dict[str, list[Line]]:
    """The rows of each table of the page, by the peer that heads it."""
    found: dict[str, list[Line]] = {}
    heading = None
    for line in text.splitlines():
        if not line.startswith("|"):
            heading = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if heading is None:
            heading = cells[0]
            assert heading not in found, f"two tables are headed {heading}"
            found[heading] = []
        elif set(cells[0]) != {"-", " "} and set(cells[0]) != {"-"}:
            found[heading].append(Line(*cells[:2]))
    return found


class Row:
    """What one row claims: `theirs` and `ours` do the same, each with the code that the page shows."""

    line: str
    """The first cell of the row, as it stands in the page."""

    @staticmethod
    def theirs() -> Any:
        """Runs the peer's code, and returns what is to be the same."""
        raise NotImplementedError

    @staticmethod
    def ours() -> Any:
        """Runs ours."""
        raise NotImplementedError


def rows(namespace: dict[str, Any]) -> list[type[Row]]:
    """The rows that a module defines."""
    return [x for x in namespace.values() if isinstance(x, type) and issubclass(x, Row) and x is not Row]


def missing(cell: str, function: Callable[[], Any]) -> list[str]:
    """The code of a cell that a function does not hold, but for white space; `...` stands for anything."""
    source = _squeezed(inspect.getsource(function))
    return [
        span
        for span in _SPAN.findall(cell)
        if re.search(".*".join(map(re.escape, _squeezed(span).split("..."))), source) is None
    ]


def _squeezed(code: str) -> str:
    return re.sub(r"\s", "", code)


def assert_same(theirs: Any, ours: Any) -> None:
    """Whether two results are one: dicts and sequences by their items, arrays by their numbers, the rest by `==`."""
    if isinstance(theirs, dict):
        assert theirs.keys() == ours.keys()
        for key in theirs:
            assert_same(theirs[key], ours[key])
    elif isinstance(theirs, list | tuple):
        assert len(theirs) == len(ours)
        for a, b in zip(theirs, ours, strict=True):
            assert_same(a, b)
    elif hasattr(theirs, "shape") or hasattr(ours, "shape"):
        a, b = np.asarray(theirs), np.asarray(ours)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    else:
        assert type(theirs) is type(ours)
        assert theirs == ours


def numbers(*shape: int) -> np.ndarray:
    """Numbers that no initializer would give, the same on both sides."""
    return np.cos(np.arange(np.prod(shape, dtype=int), dtype=np.float32) * 1.7).reshape(shape)
