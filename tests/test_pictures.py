"""The pictures of the guides are what their script draws."""

import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"


def test_the_pictures_are_those_of_the_script():
    made = runpy.run_path(str(PICTURES / "draw.py"))["PICTURES"]
    assert {path.stem for path in PICTURES.glob("*.svg")} == set(made)
    for name, make in made.items():
        text = make().svg()
        assert (PICTURES / f"{name}.svg").read_text(encoding="utf-8") == text, f"run docs/pictures/draw.py ({name})"
        ET.fromstring(text)


def test_each_picture_is_shown_on_a_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in PICTURES.parent.glob("guides/*.md"))
    for path in PICTURES.glob("*.svg"):
        assert f"](../pictures/{path.name})" in pages
