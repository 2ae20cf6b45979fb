"""nnx-checkpoint: looks at checkpoints, compares, checks, exports and removes them, those of orbax alone included."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from nnx.core import NnxError, PathGlob
from nnx.train._errors import CheckpointError
from nnx.train._foreign import Found, folders_of, open_checkpoint
from nnx.train._keep import Keep
from nnx.train._storage import Storage
from nnx.train.interop._safetensors import write_leaves

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those of the command line; None takes them from there.

    Returns:
        The exit code: 1 if checkpoints differ or are damaged, 2 if the command could not be carried out.
    """
    given = _parser().parse_args(arguments)
    # orbax notes what it misses in directories that are not laid out by its newest version.
    logging.getLogger("absl").setLevel(logging.ERROR)
    command: Callable[[Any], int] = given.command
    try:
        return command(given)
    except (NnxError, OSError, ValueError, TypeError) as error:
        print(f"nnx-checkpoint: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nnx-checkpoint", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def add(name: str, command: Callable[[Any], int], text: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, description=text)
        own.set_defaults(command=command)
        return own

    one = "a directory of checkpoints (the newest is taken), or one of them; DIRECTORY@STEP names a step"
    add("ls", _ls, "the checkpoints in a directory").add_argument("directory", type=Path)
    show = add("show", _show, "what a checkpoint holds, without reading any array")
    show.add_argument("checkpoint", help=one)
    show.add_argument("--only", metavar="GLOB", help="paths such as 'model/**/kernel'")
    diff = add("diff", _diff, "what differs between two checkpoints, by path; exits with 1 if anything does")
    diff.add_argument("a", help=one)
    diff.add_argument("b", help="the same")
    diff.add_argument("--only", metavar="GLOB", help="paths such as 'model/**/kernel'")
    verify = add("verify", _verify, "read checkpoints whole, and check their sums; exits with 1 on damage")
    verify.add_argument(
        "checkpoint", help="a directory of checkpoints (all of them), or one; DIRECTORY@STEP names a step"
    )
    export = add("export", _export, "write the arrays of a checkpoint to a safetensors file")
    export.add_argument("checkpoint", help=one)
    export.add_argument("file", type=Path)
    export.add_argument("--item", help="the part of it; needed only if there are several")
    export.add_argument("--only", metavar="GLOB", help="paths such as 'model/**'")
    prune = add("prune", _prune, "remove checkpoints that no rule keeps")
    prune.add_argument("directory", type=Path)
    prune.add_argument("--keep-last", type=int, required=True, metavar="N", help="how many of the newest are kept")
    prune.add_argument("--keep-best", type=int, metavar="N", help="how many of the best")
    prune.add_argument("--best-mode", choices=("min", "max"), default="min")
    prune.add_argument("--best-metric", metavar="NAME", help="the metric that decides; by default the first")
    prune.add_argument("--keep-every", type=int, metavar="N", help="the multiples of so many steps are kept")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    return parser


def _open(text: str) -> Found:
    path, at, step = text.rpartition("@")
    return open_checkpoint(Path(path), int(step)) if at and step.isdecimal() else open_checkpoint(Path(text))


def _glob(text: str | None) -> Any:
    return None if text is None else PathGlob(text)


def _ls(given: Any) -> int:
    rows = [("step", "saved", "leaves", "size", "by", "metrics")]
    for step, folder in folders_of(given.directory).items():
        when = dt.datetime.fromtimestamp(folder.stat().st_mtime).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        try:
            found = open_checkpoint(given.directory, step)
        except CheckpointError as error:
            rows.append((str(step), when, "", "", "", f"damaged: {error}"))
            continue
        metrics = found.manifest.metrics if found.manifest is not None else {}
        shown = " ".join(f"{name}={value:.6g}" for name, value in metrics.items())
        by = "orbax" if found.manifest is None else "nnx"
        rows.append((str(step), when, str(len(found.paths())), _size(found.nbytes), by, shown))
    _table(rows)
    for folder in sorted(given.directory.glob("corrupt-*")):
        print(f"put aside: {folder.name}")
    return 0


def _show(given: Any) -> int:
    found = _open(given.checkpoint)
    print(f"{found.folder}, {_size(found.nbytes)}")
    if found.manifest is not None:
        for name, value in found.manifest.metrics.items():
            print(f"metric {name}: {value:.6g}")
        for name, given_along in (("extra", found.manifest.extra), ("data iterator", found.manifest.data_iter)):
            if given_along is not None:
                text = json.dumps(given_along)
                print(f"{name}: {text[:200]}{' ...' if len(text) > 200 else ''}")
    only = _glob(given.only)
    rows = [("item", "path", "type", "collection", "bytes", "checksum")]
    for item, path, entry in found.paths():
        if only is None or found.matches(path, only):
            spec = entry.spec
            shown = f" {spec.value!r}" if spec.value is not None else ""
            total = f"{entry.sum:016x}" if entry.sum is not None else "" if entry.crc is None else f"{entry.crc:08x}"
            rows.append((item, path, f"{spec}{shown}", spec.collection or "", f"{entry.nbytes:,}", total))
    _table(rows)
    return 0


def _diff(given: Any) -> int:
    a, b = _open(given.a), _open(given.b)
    only = _glob(given.only)
    rows = [("item", "path", "difference")]
    equal = 0
    for item in dict.fromkeys((*a.items, *b.items)):
        ours, theirs = a.items.get(item, {}), b.items.get(item, {})
        arrays = [found.arrays(item, only=only) if item in found.items else {} for found in (a, b)]
        for path in dict.fromkeys((*ours, *theirs)):
            if only is not None and not a.matches(path, only):
                continue
            if path not in theirs or path not in ours:
                rows.append((item, path, f"only in {'A' if path in ours else 'B'}"))
            elif (str(ours[path].spec), ours[path].spec.value) != (str(theirs[path].spec), theirs[path].spec.value):
                rows.append((item, path, f"{_described(ours[path])} -> {_described(theirs[path])}"))
            elif path in arrays[0] and (changed := _change(arrays[0][path], arrays[1][path])):
                rows.append((item, path, changed))
            else:
                equal += 1
    if len(rows) > 1:
        _table(rows)
    print(f"{len(rows) - 1} differ, {equal} are equal")
    return int(len(rows) > 1)


def _described(entry: Any) -> str:
    return f"{entry.spec}{f' {entry.spec.value!r}' if entry.spec.value is not None else ''}"


def _change(a: Any, b: Any) -> str:
    """How two arrays of one type differ; nothing if they are equal in every bit."""
    a, b = np.asarray(a), np.asarray(b)
    if a.tobytes() == b.tobytes():
        return ""
    differ = int((a != b).sum())
    kinds = jnp.issubdtype(a.dtype, jnp.number)
    if not kinds:
        return f"{differ} of {a.size} differ"
    wide = np.complex128 if jnp.issubdtype(a.dtype, jnp.complexfloating) else np.float64
    with np.errstate(all="ignore"):
        distance = np.abs(a.astype(wide) - b.astype(wide))
    finite = distance[np.isfinite(distance)]
    largest = f"largest change {finite.max():.3g}" if finite.size else "no change is a number"
    return f"{differ} of {a.size} differ, {largest}"


def _verify(given: Any) -> int:
    text = given.checkpoint
    path = Path(text)
    folders = folders_of(path) if path.is_dir() else {}
    names = [f"{path}@{step}" for step in folders] or [text]
    bad = 0
    for name in names:
        try:
            found = _open(name)
            damages = list(found.damages())
        except CheckpointError as error:
            damages, found = [str(error)], None
        if damages:
            bad += 1
        elif found is not None:
            sums = sum(entry.checked for _, _, entry in found.paths())
            how = f"{sums} checksums hold" if sums else "it can be read whole; there are no checksums"
            print(f"{name}: {len(found.paths())} leaves, {_size(found.nbytes)}: {how}")
        for line in damages:
            print(f"{name}: DAMAGED: {line}")
    return int(bad > 0)


def _export(given: Any) -> int:
    found = _open(given.checkpoint)
    items = list(found.items)
    item: str = given.item or ("state" if found.manifest is not None else items[0] if len(items) == 1 else "")
    if item not in found.items:
        raise CheckpointError(f"{found.folder} has the items {', '.join(items)}: name one with --item")
    only = _glob(given.only)
    arrays = found.arrays(item, only=only)
    entries = {path: e for path, e in found.items[item].items() if only is None or found.matches(path, only)}
    for path, entry in entries.items():
        if path in arrays and entry.checked:
            found.check(item, path, arrays[path])
    specs = {path: entry.spec for path, entry in entries.items()} if found.manifest is not None else {}
    write_leaves(given.file, {path: np.asarray(array) for path, array in arrays.items()}, specs, {})
    print(f"{given.file}: {len(arrays)} arrays, {_size(given.file.stat().st_size)}")
    return 0


def _prune(given: Any) -> int:
    keep = Keep(given.keep_last, given.keep_best, given.best_mode, given.keep_every, given.best_metric)
    folders = folders_of(given.directory)
    storage = Storage(given.directory.absolute())
    if not given.dry_run:
        storage.lock()
    try:
        metrics = {}
        for step in folders:
            with contextlib.suppress(CheckpointError):  # a damaged one has none
                found = open_checkpoint(given.directory, step)
                metrics[step] = {} if found.manifest is None else dict(found.manifest.metrics)
        gone = keep.removable(list(folders), metrics)
        for step in gone:
            print(f"{'would remove' if given.dry_run else 'removed'} {folders[step]}")
            if not given.dry_run:
                storage.remove_folder(folders[step].absolute())
    finally:
        storage.unlock()
    print(f"kept: {', '.join(str(step) for step in folders if step not in gone)}")
    return 0


def _size(nbytes: int) -> str:
    if nbytes < 1000:
        return f"{nbytes} B"
    power = min((len(str(nbytes)) - 1) // 3, 4)
    return f"{nbytes / 1000**power:.3g} {('', 'kB', 'MB', 'GB', 'TB')[power]}"


def _table(rows: Iterable[Sequence[str]]) -> None:
    every = list(rows)
    widths = [max(len(row[column]) for row in every) for column in range(len(every[0]))]
    for row in every:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
