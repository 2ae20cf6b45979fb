"""The script that releases packages: what it edits, what it refuses, and the tags that it accepts."""

import datetime as dt
import importlib.util
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TODAY = dt.date(2026, 3, 1)


@pytest.fixture(scope="module")
def release():
    spec = importlib.util.spec_from_file_location("release", ROOT / "scripts/release.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["release"] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["release"]


@pytest.fixture
def repository(tmp_path):
    """The files that know versions, in a folder of their own, with layers in the middle of its life."""
    for source in ROOT.glob("packages/*"):
        target = tmp_path / "packages" / source.name
        for path in (*source.glob("src/nnx/*/__about__.py"), source / "pyproject.toml", source / "CHANGELOG.md"):
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / path.relative_to(source))
    layers = tmp_path / "packages/nnx-layers"
    (layers / "src/nnx/layers/__about__.py").write_text('"""The version."""\n\n__version__ = "0.3.1"\n')
    (layers / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A layer.\n\n"
        "## [0.3.1] - 2026-02-01\n\n### Fixed\n\n- An error.\n"
    )
    return tmp_path


def bump(release, repository, part, package="nnx-layers"):
    return release.bump(release.Package.named(package, repository), part, TODAY)


@pytest.mark.parametrize(
    ("part", "after"),
    [("major", "1.0.0"), ("minor", "0.4.0"), ("patch", "0.3.2"), ("0.4.0rc1", "0.4.0rc1"), ("0.10.0", "0.10.0")],
)
def test_bump_edits_the_version_and_the_changelog(release, repository, part, after):
    assert bump(release, repository, part) == ("0.3.1", after)
    layers = repository / "packages/nnx-layers"
    assert (layers / "src/nnx/layers/__about__.py").read_text() == f'"""The version."""\n\n__version__ = "{after}"\n'
    assert (layers / "CHANGELOG.md").read_text() == (
        f"# Changelog\n\n## [{after}] - 2026-03-01\n\n### Added\n\n- A layer.\n\n"
        "## [0.3.1] - 2026-02-01\n\n### Fixed\n\n- An error.\n"
    )
    assert release.check_tag(f"refs/tags/nnx-layers-v{after}", repository).folder.name == "nnx-layers"


def test_the_first_release_of_what_is_here(release, repository):
    for package in ("nnx-core", "nnx-train", "nnx-examples"):
        version = release.Package.named(package, repository).version
        with pytest.raises(release.ReleaseError, match="has no date: `hatch run bump .* release`"):
            release.check_tag(f"{package}-v{version}", repository)
        assert bump(release, repository, "release", package) == (version, version)
        assert release.check_tag(f"{package}-v{version}", repository).version == version


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("tiny", "'tiny' is none of major, minor, patch, release"),
        ("0.3.0", "0.3.0 does not come after 0.3.1"),
        ("0.3.1rc1", "0.3.1rc1 does not come after 0.3.1"),
        ("release", "0.3.1 is released already"),
    ],
)
def test_versions_that_do_not_come_next(release, repository, part, message):
    before = (repository / "packages/nnx-layers/CHANGELOG.md").read_text()
    with pytest.raises(release.ReleaseError, match=message):
        bump(release, repository, part)
    assert (repository / "packages/nnx-layers/CHANGELOG.md").read_text() == before


def test_a_release_without_a_change(release, repository):
    changelog = repository / "packages/nnx-layers/CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("- A layer.\n", ""))
    with pytest.raises(release.ReleaseError, match=r"no change is listed under `## \[Unreleased\]`"):
        bump(release, repository, "minor")
    changelog.write_text("# Changelog\n\n## [0.3.1] - 2026-02-01\n\n- An error.\n")
    with pytest.raises(release.ReleaseError, match=r"nothing unreleased: write what changed under .* \[Unreleased\]"):
        bump(release, repository, "minor")


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("v0.3.1", "a release's tag is a package and its version"),
        ("nnx-rings-v0.3.1", "there is no package 'nnx-rings': there are nnx-core, "),
        ("nnx-layers-v0.3.2", "for 0.3.2, but __about__.py says 0.3.1"),
        ("nnx-layers-v0.3.1", r"the newest heading of the CHANGELOG is `## \[Unreleased\]`"),
    ],
)
def test_tags_that_release_nothing(release, repository, tag, message):
    with pytest.raises(release.ReleaseError, match=message):
        release.check_tag(tag, repository)


def test_siblings_that_a_version_leaves_behind(release, repository):
    core = release.Package.named("nnx-core", repository)
    assert release.shut_out(core, "0.1.7", repository) == []
    left = release.shut_out(core, "0.2.0", repository)
    assert left == [f"{name} (nnx-core>=0.1,<0.2)" for name in ("nnx-examples", "nnx-layers", "nnx-train")]


def test_the_command_line(release, repository, monkeypatch, capsys):
    monkeypatch.setattr(release, "ROOT", repository)
    monkeypatch.setattr(release.Package.named.__func__, "__defaults__", (repository,))
    monkeypatch.setattr(release.shut_out, "__defaults__", (repository,))
    release.main(["bump", "nnx-layers", "minor"])
    assert capsys.readouterr().out.splitlines() == [
        "nnx-layers: 0.3.1 -> 0.4.0",
        "  not allowed by nnx-examples (nnx-layers>=0.1,<0.2): widen its range, and release it too",
        "Commit this, then: git tag nnx-layers-v0.4.0 && git push origin nnx-layers-v0.4.0",
    ]
    with pytest.raises(SystemExit, match="error: CHANGELOG.md of nnx-layers has nothing unreleased"):
        release.main(["bump", "nnx-layers", "minor"])


def test_workflows_run_commands_that_exist() -> None:
    environments = tomllib.loads((ROOT / "hatch.toml").read_text())["envs"]
    found = {}
    for path in sorted((ROOT / ".github/workflows").glob("*.yml")):
        text = re.sub(r"\$\{\{[^}]*\}\}", "any", path.read_text())
        found |= dict.fromkeys(re.findall(r"hatch run (\S+)", text), path.name)
    assert {"check", "dist", "docs", "train", "test-matrix.pyany-any:test"} <= {*found}
    for command, name in found.items():
        environment, _, script = command.rpartition(":")
        scripts = environments["default"]["scripts"] | environments[environment.partition(".")[0] or "default"].get(
            "scripts", {}
        )
        assert script in scripts, f"{name} runs {command}"


def test_the_release_workflow_publishes_without_a_secret() -> None:
    text = (ROOT / ".github/workflows/release.yml").read_text()
    assert 'tags: ["nnx-*-v*"]' in text
    assert "id-token: write" in text
    assert "secrets." not in text
    assert "scripts/release.py tag" in text


def test_the_matrix_of_ci_is_that_of_hatch() -> None:
    matrix = tomllib.loads((ROOT / "hatch.toml").read_text())["envs"]["test-matrix"]["matrix"]
    expected = {(python, versions) for row in matrix for python in row["python"] for versions in row["versions"]}
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    assert set(re.findall(r'\{ python: "([\d.]+)", versions: (\w+) \}', text)) == expected
