"""The report: one table for people, one file for programs, one picture."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._results import OURS, RAW, Result, bound_of, is_past

TITLES = {
    "dispatch": "A call of a compiled function",
    "train_step": "A training step with adam",
    "trace": "Tracing and lowering a training step",
    "memory": "Memory of a compiled training step",
    "attributes": "Reading an attribute",
    "construction": "Making a model",
    "import_time": "Import",
    "layers": "Layers, forward and backward, against flax's",
    "checkpoint": "Checkpoints, against orbax alone",
    "loop": "fit against a loop by hand",
    "decode": "Decoding with a cache of keys and values",
    "sharded": "A call of a compiled function, with a model split over eight devices",
}
NOTES = {
    "layers": (
        "The reference is flax's layer; operations, FLOPs and bytes are those of the compiled HLO. What our RNN leaves",
        "out past the end of a sequence, flax's computes with: there inputs and outputs are masked by hand, for equal",
        "results.",
    ),
}
"""What must be known to read a table."""
PACKAGES = (
    "jax",
    "jaxlib",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "nnx-core",
    "nnx-layers",
    "nnx-train",
    "flax",
    "equinox",
)


def environment() -> dict[str, Any]:
    """What the figures were measured on and with."""
    import jax

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "versions": versions,
    }


def markdown(results: Sequence[Result]) -> str:
    """The tables: a row for each case, a column for each library."""
    where = environment()
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        "# Benchmarks",
        "",
        "Each figure is a ratio to the same thing written by hand in raw JAX, measured in turn with it in one process:",
        "the median of the rounds and, in brackets, their quartiles. The bound is the most that nnx may take; past it,",
        "the command fails.",
        "",
        f"Measured with `hatch run bench` on {where['cpus']} CPU cores ({where['system']}), Python {where['python']},",
        f"{versions}.",
    ]
    for benchmark in dict.fromkeys(result.benchmark for result in results):
        lines += [
            "",
            f"## {TITLES[benchmark]}",
            "",
            *((*NOTES[benchmark], "") if benchmark in NOTES else ()),
            *_table([result for result in results if result.benchmark == benchmark]),
        ]
    return "\n".join(lines) + "\n"


def _table(results: Sequence[Result]) -> list[str]:
    libraries = [library for library in dict.fromkeys(result.library for result in results) if library != RAW]
    lines = ["| | " + " | ".join([RAW, *libraries, "bound"]) + " |", "| --- |" + " --- |" * (len(libraries) + 2)]
    for case in dict.fromkeys(result.case for result in results):
        row = {result.library: result for result in results if result.case == case}
        cells = [quantity(row[RAW]) if RAW in row else ""]
        cells += [_ratio(row[library]) if library in row else "" for library in libraries]
        lines.append(f"| {case} | " + " | ".join([*cells, _bound(row[OURS])]) + " |")
    return lines


def quantity(result: Result) -> str:
    """A figure with its unit."""
    if result.unit == "s":
        for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
            if result.value * scale >= 1:
                return f"{result.value * scale:.3g} {unit}"
        return f"{result.value * 1e9:.3g} ns"
    return f"{result.value:,.0f} {result.unit}".rstrip()


def _ratio(result: Result) -> str:
    median, low, high = result.ratio
    digits = 2 if median < 10 else 1 if median < 100 else 0
    spread = "" if low == high else f" ({low:.{digits}f} to {high:.{digits}f})"
    bound = bound_of(result)
    measured = f", {quantity(result)}" if bound is not None and bound.absolute else ""
    text = f"{median:.{digits}f}{spread}{measured}"
    return f"**{text}**" if result.library == OURS else text


def _bound(result: Result) -> str:
    bound = bound_of(result)
    if bound is None:
        return ""
    most = quantity(result._replace(value=bound.most)) if bound.absolute else f"{bound.most:.2f}"
    return f"{most}, missed" if is_past(result) else most


def line(result: Result) -> str:
    """One result as the command prints it."""
    bound = bound_of(result)
    verdict = "" if bound is None else f"  [{_bound(result)}]"
    ratio = _ratio(result).strip("*")
    return f"{result.benchmark:12}  {result.case:54}  {result.library:24}  {quantity(result):>10}  {ratio}{verdict}"


def write(results: Sequence[Result], folder: Path) -> None:
    """Write `results.md`, `results.json` and `overhead.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(markdown(results), encoding="utf-8")
    rows = [result._asdict() | {"ratio": result.ratio._asdict(), "bound": _bound_data(result)} for result in results]
    content = {"environment": environment(), "results": rows}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _picture([result for result in results if result.leaves is not None], folder / "overhead.png")


EXCERPT = {
    "read, 12 blocks": "a call that reads 48 arrays",
    "read, 48 blocks": "192 arrays",
    "read, 192 blocks": "768 arrays",
    "read, 768 blocks": "3,072 arrays",
    "update, 12 blocks": "a call that writes 48 arrays",
    "update, 48 blocks": "192 arrays",
    "update, 192 blocks": "768 arrays",
    "update, 768 blocks": "3,072 arrays",
    "lifted, MLP 4x32, not donated": "a training step with adam, MLP of 4 layers of 32",
    "lifted, MLP 24x32, not donated": "24 layers of 32",
    "lifted, MLP 24x256, not donated": "24 layers of 256",
    "lifted, MLP 24x32, donated": "24 layers of 32, donated",
    "read, 48 blocks on 8 devices": "a call that reads 192 arrays, each split over 8 devices",
    "update, 48 blocks on 8 devices": "a call that writes them",
}
"""What the README shows of what was measured, and what it calls it."""


def excerpt(content: Mapping[str, Any]) -> str:
    """The table of the README, of what `write` has written to `results.json`."""
    results = [row for row in content["results"] if row["benchmark"] in ("dispatch", "train_step", "sharded")]
    libraries = [name for name in dict.fromkeys(row["library"] for row in results) if name != RAW]
    lines = ["| time over raw `jax.jit` | " + " | ".join(libraries) + " |", "| --- |" + " --- |" * len(libraries)]
    for case, title in EXCERPT.items():
        ratios = {row["library"]: row["ratio"]["median"] for row in results if row["case"] == case}
        if not ratios:
            continue
        cells = [_short(ratios[name]) if name in ratios else "" for name in libraries]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def write_excerpt(content: Mapping[str, Any], readme: Path) -> None:
    """Put the table into the README, between its marks."""
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{START}\n{excerpt(content)}\n{END}{after}", encoding="utf-8")


START, END = "<!-- the table of hatch run bench -->", "<!-- its end -->"


def _bound_data(result: Result) -> dict[str, Any] | None:
    bound = bound_of(result)
    return None if bound is None else {"most": bound.most, "of": "value" if bound.absolute else "ratio"}


def _picture(results: Sequence[Result], path: Path) -> None:
    """Overhead against the number of arrays, one line for each library."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    if not results:
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    libraries = list(dict.fromkeys(result.library for result in results))
    for axis, (kind, title) in zip(
        axes, {"read": "reads the model", "update": "writes every array"}.items(), strict=True
    ):
        for number, library in enumerate(libraries):
            series = sorted(
                (result.leaves or 0, result.ratio)
                for result in results
                if result.library == library and result.case.startswith(kind)
            )
            style: dict[str, Any] = (
                {"color": "black", "linestyle": "--", "linewidth": 1}
                if library == RAW
                else {"marker": "o", "color": f"C{number - 1}"}
            )
            if library == OURS:
                style |= {"linewidth": 2.5}
            leaves = [leaf_count for leaf_count, _ in series]
            axis.plot(leaves, [ratio.median for _, ratio in series], label=library, **style)
            if library != RAW:
                axis.fill_between(
                    leaves,
                    [ratio.low for _, ratio in series],
                    [ratio.high for _, ratio in series],
                    alpha=0.2,
                    linewidth=0,
                    color=style["color"],
                )
        axis.set(xscale="log", yscale="log", xlabel="arrays in the model", title=f"a call that {title}")
        ticks = sorted({result.leaves for result in results if result.leaves})
        axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axis.minorticks_off()
        axis.set_yticks([1, 2, 5, 10, 20, 50, 100, 200, 500], ["1", "2", "5", "10", "20", "50", "100", "200", "500"])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time over raw jax.jit")
    axes[1].legend()  # the lines of a call that writes leave room above them
    figure.savefig(path, dpi=120)
    plt.close(figure)
