"""The code that the READMEs and the documentation show runs as written."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md"))]
PAGES = [*READMES, *sorted(ROOT.glob("docs/**/*.md"))]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("readme", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_blocks_run(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    namespace = {"__name__": "readme"}
    with jax.numpy_rank_promotion("allow"):
        for block in PYTHON_BLOCK.finditer(text):
            # Blank lines in front make a traceback's line numbers those of the README.
            source = "\n" * text.count("\n", 0, block.start(1)) + block.group(1)
            exec(compile(source, str(readme), "exec"), namespace)


def test_every_package_has_a_readme() -> None:
    assert len(READMES) == 1 + len(list(ROOT.glob("packages/*/pyproject.toml")))


@pytest.mark.parametrize("command", ["train", "test", "check"])
def test_the_commands_of_the_readme_exist(command: str) -> None:
    import tomllib

    scripts = tomllib.loads((ROOT / "hatch.toml").read_text())["envs"]["default"]["scripts"]
    assert f"hatch run {command}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert command in scripts


def test_the_table_of_the_readme_is_what_was_measured() -> None:
    import json

    from benchmarks._report import END, START, excerpt

    content = json.loads((ROOT / "benchmarks" / "results" / "results.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.partition(START)[2].partition(END)[0].strip() == excerpt(content)
