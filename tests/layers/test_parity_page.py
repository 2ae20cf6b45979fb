"""The page of comparisons names every layer: it is made in an environment of its own, where the other libraries are."""

import re
from pathlib import Path

from nnx import layers

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"


def test_each_public_name_has_a_row():
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    assert rows == set(layers.__all__)
