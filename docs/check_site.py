"""Every public name has a place in the built documentation: run by `hatch run docs`."""

import importlib
import sys
import zlib
from pathlib import Path

INVENTORY = Path(__file__).parent.parent / "site" / "objects.inv"
PAGES = Path(__file__).parent / "api"
PARTS = ("nnx.core", "nnx.layers", "nnx.layers.initializers", "nnx.train", "nnx.testing")


def documented() -> set[str]:
    """The names in the inventory of the site."""
    content = INVENTORY.read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(content).decode().splitlines()}


def main() -> int:
    """Say which names are missing.

    Returns:
        The exit code: 1 if any is.
    """
    found = documented()
    # What is JAX's own, or another name of something, is in the text of the page.
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES.glob("*.md"))
    wanted = [(part, name) for part in PARTS for name in importlib.import_module(part).__all__]
    missing = [f"{part}.{name}" for part, name in wanted if f"{part}.{name}" not in found and f"`{name}`" not in text]
    for name in missing:
        print(f"{name} is not in the documentation", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
