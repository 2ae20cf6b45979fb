"""What `hatch run bench` has measured last, as a page of the documentation: a hook of mkdocs."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
PICTURE = "![Time over raw jax.jit against the number of arrays: nnx lies on the line at 1](pictures/overhead.png)"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the tables and their picture to the pages."""
    title, _, tables = (RESULTS / "results.md").read_text(encoding="utf-8").partition("\n")
    content = f"{title}\n\n{PICTURE}\n\nWhy, and what makes a call slow: [performance](performance.md).\n{tables}"
    files.append(File.generated(config, "benchmarks.md", content=content))
    files.append(File.generated(config, "pictures/overhead.png", abs_src_path=str(RESULTS / "overhead.png")))
    return files
