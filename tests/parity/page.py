"""The page that says what is compared with what, made of the tables of cases: `python -m tests.parity.page`."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.parity.arguments import DIFFERENT
from tests.parity.cases import NUMBERS, TOLERANCES, Case
from tests.parity.drawn import DRAWN, EXAMPLES
from tests.parity.sides import is_function
from tests.parity.tables import EQUINOX, FLAX, IN_NO_TABLE, TORCH

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"

_HEAD = """\
# Parity with other libraries

Each layer of nnx is held to the same layer of flax.nnx, torch and equinox, on the same values: {total:,} fixed cases,
and {drawn} layers with sizes that hypothesis draws, {examples} draws each.

```bash
hatch run parity       # run the comparisons, at both ends of what flax and JAX offer
hatch run parity:page  # write this page anew, from the tables of cases
```

A case is a layer with one set of options and inputs. Both libraries make it, the parameters of one are put into the
other (with flax.nnx at the same paths, and with the same shapes and dtypes), and all of this is compared:

- the outputs, with flax.nnx also their dtype;
- the gradients by each parameter and by each floating point input, along a fixed direction in the outputs;
- what a call leaves behind: running averages, singular vectors.

Differences are counted in units of the largest value of an array, or of 1 if that is more, and may be as large as the
coarsest dtype of the case allows:

{tolerances}

A case in "bfloat16 by float32" has bfloat16 inputs and float32 parameters; in "float32 in bfloat16" it has float32
inputs and parameters, and computes in bfloat16.

## Layers and functions

How many cases there are against each library, and what of it they are against, where the name is another one. The last
column is what differs between the cases: options of the constructor, arguments of the call, shapes, and dtypes.

{rows}

Decoding with a cache is compared with `nnx.MultiHeadAttention(decode=True)` of flax token by token, and so is how much
`Dropout` keeps and what it is scaled by.

## In no comparison

{excuses}

## Arguments

Names, order, kinds and defaults of all arguments, of constructors, of calls and of the other methods, are those of the
newest flax.nnx, with `ctx` for `rngs`; what we have besides is optional and given by name. `tests/parity` holds them
there, but for these:

{arguments}
"""

_FLAX_NAMES = {"RotaryEmbedding": "RoPE"}


def render() -> str:
    """The page."""
    counted = [*FLAX, *TORCH, *EQUINOX]
    tables = (FLAX, TORCH, EQUINOX)
    rows = [("", "flax.nnx", "torch", "equinox", "drawn", "what varies")]
    for name in sorted({case.layer for case in counted} | set(DRAWN), key=_order):
        cases = [[case for case in table if case.layer == name] for table in tables]
        flax_cell, *others = (_cell(name, found) for found in cases)
        varied = _varied([case for found in cases for case in found])
        rows.append((f"`{name}`", flax_cell, *others, str(EXAMPLES) if name in DRAWN else "", varied))
    return _HEAD.format(
        total=len(counted),
        drawn=len(DRAWN),
        examples=EXAMPLES,
        tolerances=_table([("dtype", "largest difference"), *((k, f"{v:g}") for k, v in TOLERANCES.items())]),
        rows=_table([*rows, _totals(tables)]),
        arguments=_table([("of", "argument", "why it differs"), *_arguments()]),
        excuses=_table([("", "why"), *((f"`{name}`", why) for name, why in sorted(IN_NO_TABLE.items()))]),
    )


def _arguments() -> list[tuple[str, str, str]]:
    """The arguments that differ from those of flax.nnx: a row for each reason and what it is the reason of."""
    of_each: dict[tuple[str, str, str], list[str]] = {}
    for (name, method, argument), why in DIFFERENT.items():
        of_each.setdefault((name, method, why), []).append(f"`{argument}`" if argument else "the method itself")
    rows: dict[tuple[str, str], list[str]] = {}
    for (name, method, why), found in of_each.items():
        where = f"`{name}`" if method == "__init__" else f"`{name}.{method}`"
        rows.setdefault((", ".join(found), why), []).append(where)
    return [(", ".join(names), found, why) for (found, why), names in rows.items()]


def _order(name: str) -> tuple[bool, str]:
    return is_function(name), name.lower()


def _totals(tables: Iterable[Sequence[Case]]) -> tuple[str, ...]:
    return ("all", *(str(len(table)) for table in tables), str(len(DRAWN) * EXAMPLES), "")


def _cell(name: str, cases: Sequence[Case]) -> str:
    """How many, and the other library's names if there are any but ours."""
    if not cases:
        return ""
    names = Counter(getattr(case, "named", "") or _FLAX_NAMES.get(name, "") for case in cases)
    others = [f"`{other}`" for other in sorted(names) if other and other != name]
    return f"{len(cases)}{': ' if others else ''}{', '.join(others)}"


def _varied(cases: Sequence[Case]) -> str:
    """The options, arguments, ranks and dtypes that differ between cases."""
    names = sorted({name for case in cases for name in {**case.options, **case.call}})
    differing = [f"`{name}`" for name in names if len({_seen(case, name) for case in cases}) > 1]
    ranks = sorted({len(x if isinstance(x, tuple) else x.shape) for case in cases for x in case.inputs[:1]})
    parts = [*differing]
    if len(ranks) > 1:
        parts.append(f"{ranks[0]} to {ranks[-1]} axes")
    numbers = [name for name in NUMBERS if any(case.numbers == name for case in cases)]
    return ", ".join([*parts, *(numbers if numbers != ["float32"] else [])])


def _seen(case: Case, name: str) -> str:
    return str({**case.options, **case.call}.get(name, "its default"))


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or with `--check` say whether it is what would be written."""
    parser = argparse.ArgumentParser(prog="hatch run parity:page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    given = parser.parse_args(arguments)
    text = render()
    if given.check:
        return 0 if PAGE.exists() and PAGE.read_text() == text else 1
    PAGE.write_text(text)
    sys.stdout.write(f"wrote {PAGE}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
