"""Draw the pictures of the guides: `python docs/pictures/draw.py` writes an SVG file for each beside this one.

A picture is a list of boxes, arrows and notes on a grid; what a box holds gives its colour.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent
UNIT = 20
COLOURS = {
    "param": ("#dbe9ff", "#2f6fd0"),
    "stat": ("#ffe6cc", "#c96a10"),
    "stream": ("#d8f3dc", "#2d8a4e"),
    "array": ("#eceff3", "#5b6573"),
    "code": ("#ffffff", "#222222"),
    "module": ("#fafafa", "#999999"),
}


class Picture:
    """A picture of `width` by `height` grid units."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.size = (width * UNIT, height * UNIT)
        self.title = title
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, text: str, kind: str) -> None:
        """A box with lines of text in it."""
        fill, line = COLOURS[kind]
        dash = ' stroke-dasharray="5 4"' if kind == "module" else ""
        self.parts.append(
            f'<rect x="{x * UNIT:g}" y="{y * UNIT:g}" width="{width * UNIT:g}" height="{height * UNIT:g}" rx="5" '
            f'fill="{fill}" stroke="{line}" stroke-width="1.5"{dash}/>'
        )
        lines = text.split("\n")
        middle = y + height / 2 if kind != "module" else y + 0.8 + (len(lines) - 1) * 0.25
        for i, part in enumerate(lines):
            self.text(x + width / 2, middle + (i - (len(lines) - 1) / 2) * 0.9 + 0.25, part, code=kind != "module")

    def text(self, x: float, y: float, text: str, *, code: bool = False, anchor: str = "middle") -> None:
        """A line of text; its baseline is at `y`."""
        family = "monospace" if code else "sans-serif"
        self.parts.append(
            f'<text x="{x * UNIT:g}" y="{y * UNIT:g}" font-family="DejaVu Sans Mono, {family}" font-size="13" '
            f'text-anchor="{anchor}" fill="#222222">{escape(text)}</text>'
            if code
            else f'<text x="{x * UNIT:g}" y="{y * UNIT:g}" font-family="DejaVu Sans, {family}" font-size="13" '
            f'text-anchor="{anchor}" fill="#444444">{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """A line through points with a head at its end."""
        path = " ".join(f"{x * UNIT:g},{y * UNIT:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="#444444" stroke-width="1.5" marker-end="url(#head)"{dash}/>'
        )

    def svg(self) -> str:
        """The file's text."""
        width, height = self.size
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" role="img" aria-label="{escape(self.title)}">\n'
            f"<title>{escape(self.title)}</title>\n"
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path d="M 0 0 L 10 5 L 0 10 z" fill="#444444"/></marker></defs>\n'
            f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


def module(picture: Picture, x: float, y: float, title: str, *, values: tuple[str, str] = ("", "")) -> None:
    """A Module with a Param and a BatchStat."""
    picture.box(x, y, 7, 5.5, title, "module")
    picture.box(x + 0.5, y + 1.4, 6, 1.6, f"Param{values[0]}", "param")
    picture.box(x + 0.5, y + 3.4, 6, 1.6, f"BatchStat{values[1]}", "stat")


def transforms() -> Picture:
    """What every lifted transform does."""
    p = Picture(40, 15, "A Module goes into a transform as values, is rebuilt inside, and takes back what changed")
    module(p, 1, 1, "model")
    p.box(1, 7.5, 7, 1.6, "Context", "stream")
    p.box(1, 10, 7, 1.6, "arrays", "array")
    p.box(11, 1.4, 5, 10.2, "values,\nin one list", "array")
    p.box(19, 3.4, 9, 6.2, "your function,\non Modules rebuilt\nfrom traced values", "code")
    p.box(31, 1.4, 8, 2.2, "values that\nchanged", "stat")
    p.box(31, 5, 8, 2.2, "structure, if\nit changed", "module")
    p.box(31, 8.6, 8, 2.2, "what it returned", "array")
    for y in (4, 8.3, 10.8):
        p.arrow((8, y), (11, y))
    p.arrow((16, 6.5), (19, 6.5))
    for y in (2.5, 6.1, 9.7):
        p.arrow((28, 6.5), (31, y))
    p.arrow((35, 1.4), (35, 0.5), (4.5, 0.5), (4.5, 1), dashed=True)
    p.text(20, 14, "What changed is written back in place: the model outside is the model that your function had.")
    p.text(23.5, 2.7, "raw jax.jit, grad, vmap, scan ...")
    return p


def jit() -> Picture:
    """The first call of a compiled function, and the others."""
    p = Picture(38, 13, "The first call of nnx.jit walks the graph and traces, the others gather, run and scatter")
    p.text(1, 1.3, "the first call", anchor="start")
    p.text(5, 8.5, "every other call", anchor="start")
    names = [
        "walk, keep\na layout",
        "trace your\nfunction",
        "XLA compiles",
        "run",
        "write back\nwhat changed",
    ]
    for i, name in enumerate(names):
        p.box(1 + 7.5 * i, 2, 6, 3, name, "array" if i in (0, 1, 2) else "code")
        if i:
            p.arrow((7.5 * i - 0.5, 3.5), (7.5 * i + 1, 3.5))
    for i, name in ((0, "layout good?\ngather values"), (3, "run"), (4, "write back\nwhat changed")):
        p.box(1 + 7.5 * i, 9, 6, 3, name, "code")
    p.arrow((7, 10.5), (23.5, 10.5))
    p.arrow((29.5, 10.5), (31, 10.5))
    p.text(15.2, 10, "no walk, no trace, no compilation")
    p.arrow((4, 5), (4, 9), dashed=True)
    p.text(5, 6.5, "kept on the Module until its structure changes", anchor="start")
    return p


def gradients() -> Picture:
    """What grad gives and what it writes."""
    p = Picture(38, 12, "nnx.grad gives a State of gradients for the selected Variables and writes the others in place")
    module(p, 1, 1, "model")
    p.box(1, 8, 7, 1.8, "Context", "stream")
    p.box(13, 3, 10, 5, "nnx.value_and_grad(\n  loss_fn,\n  wrt=nnx.Param)", "code")
    p.arrow((8, 3.2), (13, 4.2))
    p.arrow((8, 8.9), (13, 7.2))
    p.box(28, 1, 9, 1.8, "loss", "array")
    p.box(28, 4, 9, 2.6, "State of gradients:\na Param for a Param", "param")
    p.box(28, 8, 9, 2.6, "statistics, written;\nstreams, counted", "stat")
    for y in (1.9, 5.3, 9.3):
        p.arrow((23, 5.5), (28, y))
    p.text(11.2, 2.4, "derived by: Param")
    p.arrow((32.5, 10.6), (32.5, 11.4), (0.4, 11.4), (0.4, 5), (1, 5), dashed=True)
    p.text(16, 11.1, "in place, once")
    return p


def mapping() -> Picture:
    """Variables by axis in vmap."""
    p = Picture(38, 15, "nnx.vmap hands each lane a slice or the whole of each Variable")
    p.text(4.5, 1, "the model outside")
    p.text(18, 1, "lanes")
    p.text(33, 1, "the model afterwards")
    p.box(1, 2, 7, 2.4, "Param[3, ...]\naxis 0", "param")
    p.box(1, 6.2, 7, 2.4, "BatchStat[...]\nNone: shared", "stat")
    p.box(1, 10.4, 7, 2.4, "stream\nsplit", "stream")
    for i in range(3):
        x = 12 + 4.2 * i
        p.box(x, 1.6, 3.6, 11.6, "", "module")
        p.box(x + 0.3, 2.4, 3, 1.6, f"[{i}]", "param")
        p.box(x + 0.3, 6.6, 3, 1.6, "whole", "stat")
        p.box(x + 0.3, 10.8, 3, 1.6, f"key {i}", "stream")
    for y in (3.2, 7.4, 11.6):
        p.arrow((8, y), (11.9, y))
        p.arrow((24.2, y), (28, y))
    p.box(28, 2, 9, 2.4, "Param[3, ...]\nstacked again", "param")
    p.box(28, 6.2, 9, 2.4, 'one, by variable_\nreduce: "mean"', "stat")
    p.box(28, 10.4, 9, 2.4, "stream, advanced\nby one", "stream")
    p.text(19, 14.4, "A shared Variable that is written with values that differ needs a reduction, or it is an error.")
    return p


def loops() -> Picture:
    """What is sliced, carried and shared in a scan."""
    p = Picture(40, 16, "nnx.scan slices, carries or shares each Variable from run to run")
    for i in range(3):
        x = 6 + 11 * i
        p.box(x, 5, 7, 6, "", "module")
        p.text(x + 1.7, 6.1, f"run {i}")
        p.box(x + 0.8, 6.6, 5.4, 3.8, "the body", "code")
        p.box(x + 0.5, 1, 6, 1.8, f"Param[{i}]  x[{i}]", "param")
        p.arrow((x + 3.5, 2.8), (x + 3.5, 6.6))
        p.box(x + 0.5, 12.6, 6, 1.8, f"y[{i}]  Param[{i}]", "param")
        p.arrow((x + 3.5, 10.4), (x + 3.5, 12.6))
    p.box(0.4, 7.6, 4, 1.8, "carry", "array")
    p.arrow((4.4, 8.5), (6.8, 8.5))
    p.arrow((12.2, 8.5), (17.8, 8.5))
    p.arrow((23.2, 8.5), (28.8, 8.5))
    p.arrow((34.2, 8.5), (37.4, 8.5))
    p.text(15, 7.9, "carry and")
    p.text(15, 9.5, "Variables")
    p.text(26, 7.9, "carry and")
    p.text(26, 9.5, "Variables")
    p.text(38.4, 8.7, "out")
    p.text(
        20,
        15.6,
        "variable_axes: a slice for each run.  Otherwise carried, as in a Python loop.  variable_broadcast: shared.",
    )
    return p


def branches() -> Picture:
    """Two branches and what comes out of either."""
    p = Picture(38, 12, "nnx.cond: whichever branch runs, what either may write comes out")
    module(p, 1, 2.6, "model")
    p.box(13, 1, 10, 3.6, "true_fun\nwrites BatchStat", "code")
    p.box(13, 7, 10, 3.6, "false_fun\nwrites Param", "code")
    p.arrow((8, 5.4), (13, 2.8))
    p.arrow((8, 5.4), (13, 8.8))
    p.box(28, 1, 9, 3, "BatchStat: new;\nParam: as it was", "stat")
    p.box(28, 7.4, 9, 3, "BatchStat: as it was;\nParam: new", "param")
    p.arrow((23, 2.8), (28, 2.5))
    p.arrow((23, 8.8), (28, 8.9))
    p.text(18, 5.9, "pred?")
    p.text(19, 11.6, "Both must leave the same structure: the paths that differ are named otherwise.")
    return p


def remat() -> Picture:
    """What is kept and what is computed again."""
    p = Picture(38, 10, "nnx.remat keeps what goes in, and computes the rest again for the gradient")
    for i, name in enumerate(["block 0", "block 1", "block 2"]):
        p.box(7 + 8 * i, 1.4, 5, 2.2, name, "code")
        p.box(7 + 8 * i, 6, 5, 2.2, f"{name}\nagain, grad", "code")
        p.arrow((9.5 + 8 * i, 3.6), (9.5 + 8 * i, 6), dashed=True)
        p.text(10 + 8 * i, 5.1, "its input", anchor="start")
        if i:
            p.arrow((4 + 8 * i, 2.5), (7 + 8 * i, 2.5))
            p.arrow((7 + 8 * i, 7.1), (4 + 8 * i, 7.1))
    p.box(1, 1.6, 4, 1.8, "x", "array")
    p.arrow((5, 2.5), (7, 2.5))
    p.box(31, 1.6, 5, 1.8, "loss", "array")
    p.arrow((28, 2.5), (31, 2.5))
    p.arrow((33.5, 3.4), (33.5, 7.1), (28, 7.1))
    p.text(19, 9.4, "Kept: what goes into each block. The second time draws the same keys and writes no statistics.")
    return p


def abstract() -> Picture:
    """A constructor and a call without arrays."""
    p = Picture(38, 8, "nnx.eval_shape runs a constructor or a call on shapes alone")
    p.box(1, 2, 9, 3.4, "Model(\n  70e9 parameters,\n  ctx=ctx)", "code")
    p.arrow((10, 3.7), (14, 3.7))
    p.text(12, 3.1, "eval_shape")
    p.box(14, 1, 9, 5.4, "model", "module")
    p.box(14.5, 2.4, 8, 3, "ShapeDtypeStruct,\nsharding names", "param")
    p.arrow((23, 3.7), (28, 3.7))
    p.text(25.5, 3.1, "eval_shape")
    p.box(28, 2.2, 9, 3, "shapes of\nmodel(x)", "array")
    p.text(19, 7.5, "Nothing is allocated and nothing is computed; the arguments stay as they are.")
    return p


PICTURES = {
    function.__name__: function for function in (transforms, jit, gradients, mapping, loops, branches, remat, abstract)
}


if __name__ == "__main__":
    for name, make in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(make().svg(), encoding="utf-8")
