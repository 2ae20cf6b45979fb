"""What of a checkpoint goes where in a value: every difference found before any array is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nnx.core import StructureError
from nnx.train._leaves import Flat, Spec, spec_of
from nnx.train._manifest import Entry

__all__ = ["ANY_COLLECTION", "Match", "RestoreReport", "castable", "match", "pattern_of", "renamed_paths"]

ANY_COLLECTION = "*"
"""The collection of what comes from a file that knows of none: it goes into any."""


@dataclasses.dataclass(frozen=True)
class RestoreReport:
    """What a restore does, or would do.

    Attributes:
        step: the step.
        loaded: the paths that are restored.
        kept: the paths of the value that stay as they are, since `only` leaves them out or `partial` allows it.
        missing: the paths of the value that are not in the checkpoint.
        unexpected: the paths of the checkpoint that are not in the value.
        renamed: for each renamed path of the checkpoint where it goes.
        cast: for each path that changes its dtype, from what and to what.
        resharded: the paths whose number of devices changes.
        problems: a line for each reason not to restore.
        nbytes: the bytes that are read.
    """

    step: int
    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    renamed: dict[str, str]
    cast: dict[str, tuple[str, str]]
    resharded: tuple[str, ...]
    problems: tuple[str, ...]
    nbytes: int

    @property
    def fits(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"step {self.step}: {len(self.loaded)} leaves, {self.nbytes:,} bytes"]
        for name in ("kept", "missing", "unexpected", "resharded"):
            paths = getattr(self, name)
            if paths:
                lines.append(f"  {name}: {', '.join(paths[:10])}{' ...' if len(paths) > 10 else ''}")
        lines += [f"  renamed: {old} -> {new}" for old, new in self.renamed.items()]
        lines += [f"  cast: {path} {old} -> {new}" for path, (old, new) in self.cast.items()]
        lines += [f"  problem: {line}" for line in self.problems]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Match:
    """How one item is restored.

    Attributes:
        sources: for each path of the value that is restored, its path in the checkpoint and its entry.
        report: what that means.
    """

    sources: dict[str, tuple[str, Entry]]
    report: RestoreReport


def match(
    step: int,
    item: str,
    flat: Flat,
    saved: Mapping[str, Entry],
    *,
    only: Any = None,
    rename: Mapping[str, str] | None = None,
    partial: bool = False,
    cast: bool = False,
) -> Match:
    """Relate what is saved to what is wanted.

    Args:
        step: the step.
        item: the item; errors in another than "state" are named by it.
        flat: the value.
        saved: the entries of the checkpoint.
        only: a filter of what is restored; None for everything.
        rename: patterns of saved paths and what becomes of them.
        partial: whether what is missing may stay as it is, and what is unexpected may be left.
        cast: whether dtypes may differ.
    """
    mark = "" if item == "state" else f"{item}: "
    renamed = renamed_paths(saved, rename or {})
    targets: dict[str, str] = {}
    problems: list[str] = []
    for source in saved:
        target = renamed.get(source, source)
        if target in targets:
            problems.append(f"{mark}two saved leaves become `{target}`: `{targets[target]}` and `{source}`")
        targets[target] = source
    wanted = {leaf.path: leaf for leaf in flat.leaves}
    chosen = set(wanted) if only is None else flat.select(only)
    missing = [path for path in wanted if path in chosen and path not in targets]
    unexpected = [source for target, source in targets.items() if target not in wanted] if only is None else []
    casts: dict[str, tuple[str, str]] = {}
    sources: dict[str, tuple[str, Entry]] = {}
    resharded = []
    for path, leaf in wanted.items():
        if path not in chosen or path not in targets:
            continue
        source = targets[path]
        spec, own = saved[source].spec, spec_of(leaf)
        line = _difference(path, spec, own, cast=cast)
        if line is not None:
            problems.append(mark + line)
            continue
        if spec.dtype != own.dtype:
            casts[path] = (spec.dtype, own.dtype)
        sources[path] = (source, saved[source])
        if saved[source].spec.devices not in (None, own.devices or 1) and own.devices is not None:
            resharded.append(path)
    if not partial:
        absent = [f"{mark}missing in the checkpoint: `{path}` ({spec_of(wanted[path])})" for path in missing]
        absent += [f"{mark}unexpected in the checkpoint: `{path}` ({saved[path].spec})" for path in unexpected]
        problems = absent + problems
    kept = [path for path in wanted if path not in chosen or (partial and path in missing)]
    problems += [
        f"{mark}`{path}` is abstract in `like` and not restored, so there is no value for it"
        for path in kept
        if isinstance(wanted[path].value, jax.ShapeDtypeStruct)
    ]
    report = RestoreReport(
        step,
        tuple(sources),
        tuple(kept),
        tuple(missing),
        tuple(unexpected),
        {old: new for old, new in renamed.items() if old != new},
        casts,
        tuple(resharded),
        tuple(problems),
        sum(entry.nbytes for _, entry in sources.values()),
    )
    return Match(sources, report)


def _difference(path: str, saved: Spec, own: Spec, *, cast: bool) -> str | None:
    if (saved.kind, saved.shape) != (own.kind, own.shape) or (saved.dtype != own.dtype and not cast):
        hint = ""
        if (saved.kind, saved.shape) == (own.kind, own.shape) and castable(saved, own):
            hint = "; cast=True converts it"
        return f"different: `{path}` is saved as {saved}, `like` has {own}{hint}"
    if saved.collection not in (own.collection, ANY_COLLECTION):
        return f"different: `{path}` is saved as one of `{saved.collection}`, `like` has it in `{own.collection}`"
    if saved.dtype != own.dtype and not castable(saved, own):
        return f"different: `{path}` is saved as {saved}, `like` has {own}, and no cast keeps what it means"
    return None


def castable(saved: Spec, own: Spec) -> bool:
    """Floats to floats, integers to integers or floats."""
    if saved.kind != "array":
        return False
    old, new = jnp.dtype(saved.dtype), jnp.dtype(own.dtype)
    floating = jnp.issubdtype(new, jnp.inexact)
    if jnp.issubdtype(old, jnp.complexfloating) and not jnp.issubdtype(new, jnp.complexfloating):
        return False
    if jnp.issubdtype(old, jnp.inexact):
        return bool(floating)
    return bool(jnp.issubdtype(old, jnp.integer) and (floating or jnp.issubdtype(new, jnp.integer)))


def renamed_paths(saved: Mapping[str, Any], rename: Mapping[str, str]) -> dict[str, str]:
    """What each path that a pattern matches becomes, by the first pattern that does."""
    rules = [(pattern_of(old), new) for old, new in rename.items()]
    result = {}
    used = set()
    for path in saved:
        for number, (pattern, new) in enumerate(rules):
            found = pattern.fullmatch(path)
            if found:
                used.add(number)
                result[path] = _filled(new, found.groups())
                break
    unused = [old for number, old in enumerate(rename) if number not in used]
    if unused:
        raise StructureError(
            f"rename: no path of the checkpoint matches {', '.join(map(repr, unused))}; `*` stands for one part of a "
            "path, `**` for any number of them"
        )
    return result


def pattern_of(text: str) -> re.Pattern[str]:
    """A pattern of paths: `*` for any text in one part, `**` for any text."""
    pieces = re.split(r"(\*\*|\*)", text)
    return re.compile("".join({"**": "(.*)", "*": "([^/]*)"}.get(piece, re.escape(piece)) for piece in pieces))


def _filled(text: str, groups: tuple[str, ...]) -> str:
    remaining = iter(groups)
    try:
        return re.sub(r"\*\*|\*", lambda _: next(remaining), text)
    except (StopIteration, RuntimeError):
        raise StructureError(f"rename: {text!r} has more `*` than the pattern that it is for") from None
