"""A tree of Modules without methods, which keeps Variables under the paths of a model's own."""

from __future__ import annotations

from collections.abc import Sequence

from nnx.core import Module, Variable
from nnx.train._updates import path_list

__all__ = ["attribute_name", "changed_parameters", "nested"]

Path = tuple[str, ...]


class Branch(Module):
    """A level of the tree. Not an `nnx.Dict`, which refuses some names that a parameter may have: `_w`."""


def attribute_name(part: str) -> str:
    """A part of a path as the name of an attribute: one that would hide a method of Module gets a dot at its end."""
    return f"{part}." if not part or hasattr(Branch, part) or part.startswith("_nnx_") else part


def nested(items: Sequence[tuple[Path, Variable]]) -> Branch:
    """Make the tree of Variables by path; the parts of the paths are names of attributes."""
    root = Branch()
    branches: dict[Path, Branch] = {(): root}
    for path, variable in items:
        for end in range(1, len(path)):
            if path[:end] not in branches:
                branches[path[:end]] = Branch()
                setattr(branches[path[: end - 1]], path[end - 1], branches[path[:end]])
        setattr(branches[path[:-1]], path[-1], variable)
    return root


def changed_parameters(owner: str, before: Sequence[Path], now: Sequence[Path]) -> str:
    """The message for a model whose parameters are not those that `owner` was made for."""
    problems = []
    if gone := [path for path in before if path not in set(now)]:
        problems.append(f"gone: {path_list(map('/'.join, gone))}")
    if new := [path for path in now if path not in set(before)]:
        problems.append(f"new: {path_list(map('/'.join, new))}")
    return (
        f"{owner}.update: the model's parameters are not those that this {owner} was made for "
        f"({'; '.join(problems)}). Make a new {owner} after a change of the model's structure"
    )
