"""Releases of one package at a time: its version and CHANGELOG, its tag, its distributions.

Run by `hatch run bump`, `hatch run dist` and the release workflow; the standard library is all that it needs, but for
`dist`, which calls hatchling and twine.
"""

from __future__ import annotations

import argparse
import datetime as dt
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = ("major", "minor", "patch")

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)((?:a|b|rc)\d+)?")
_ABOUT = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
# `## [0.2.0] - 2026-01-31`, `## [0.2.0] - Unreleased` or `## [Unreleased]`
_HEADING = re.compile(r"^## \[(?P<name>[^\]]+)\](?: - (?P<date>.+))?$", re.MULTILINE)
_TAG = re.compile(r"(?:refs/tags/)?(?P<package>nnx-[a-z]+)-v(?P<version>.+)")


class ReleaseError(Exception):
    """What stands in the way of a release, and what to do about it."""


@dataclass(frozen=True)
class Package:
    """The files of a package that know its version."""

    folder: Path

    @classmethod
    def named(cls, name: str, root: Path = ROOT) -> Package:
        """The package of a distribution's name."""
        known = sorted(path.parent.name for path in root.glob("packages/*/pyproject.toml"))
        if name not in known:
            raise ReleaseError(f"there is no package {name!r}: there are {', '.join(known)}")
        return cls(root / "packages" / name)

    @property
    def about(self) -> Path:
        """The file that holds the version."""
        return next(self.folder.glob("src/nnx/*/__about__.py"))

    @property
    def changelog(self) -> Path:
        """The file that tells what changed."""
        return self.folder / "CHANGELOG.md"

    @property
    def version(self) -> str:
        """The version in `__about__.py`."""
        found = _ABOUT.search(self.about.read_text(encoding="utf-8"))
        if found is None:
            raise ReleaseError(f"{self.about} has no line `__version__ = ...`")
        return found.group(1)

    def newest_heading(self) -> re.Match[str]:
        """The first heading of a version in the CHANGELOG."""
        found = _HEADING.search(self.changelog.read_text(encoding="utf-8"))
        if found is None:
            raise ReleaseError(f"{self.changelog} has no heading `## [version] - date`")
        return found


def next_version(version: str, part: str) -> str:
    """The version after `version`; `part` is major, minor, patch, `release` for the same, or a version as it is."""
    if part == "release":
        return version
    if part in PARTS:
        found = _VERSION.fullmatch(version)
        if found is None:
            raise ReleaseError(f"the version {version!r} is not of the form 1.2.3: give the next one itself")
        numbers = [int(number) for number in found.groups()[:3]]
        place = PARTS.index(part)
        return ".".join(map(str, [*numbers[:place], numbers[place] + 1, *[0] * (2 - place)]))
    if _VERSION.fullmatch(part) is None:
        raise ReleaseError(f"{part!r} is none of {', '.join(PARTS)}, release, and no version such as 1.2.3 or 1.2.3rc1")
    if _order(part) <= _order(version):
        raise ReleaseError(f"{part} does not come after {version}")
    return part


def _order(version: str) -> tuple[int, int, int, bool, str]:
    found = _VERSION.fullmatch(version)
    if found is None:
        raise ReleaseError(f"the version {version!r} is not of the form 1.2.3")
    major, minor, patch, before = found.groups()
    return int(major), int(minor), int(patch), before is None, before or ""


def bump(package: Package, part: str, today: dt.date) -> tuple[str, str]:
    """Give a package its next version, and date what its CHANGELOG has as unreleased.

    Returns:
        The version before and the new one.

    Raises:
        ReleaseError: nothing is written that is unreleased, or the version does not come next.
    """
    before, after = package.version, next_version(package.version, part)
    text = package.changelog.read_text(encoding="utf-8")
    heading = package.newest_heading()
    if heading["name"] != "Unreleased" and heading["date"] != "Unreleased":
        raise ReleaseError(
            f"{package.changelog.name} of {package.folder.name} has nothing unreleased: write what changed under a "
            f"heading `## [Unreleased]` above `{heading[0]}`"
        )
    following = _HEADING.search(text, heading.end())
    if not re.search(r"^- ", text[heading.end() : following.start() if following else len(text)], re.MULTILINE):
        raise ReleaseError(f"no change is listed under `{heading[0]}` in {package.changelog}: list them as `- ...`")
    if following and following["name"] == after:
        raise ReleaseError(f"{after} is released already: give `patch`, `minor` or `major`")
    dated = f"## [{after}] - {today.isoformat()}"
    package.changelog.write_text(text[: heading.start()] + dated + text[heading.end() :], encoding="utf-8")
    about = package.about.read_text(encoding="utf-8")
    package.about.write_text(_ABOUT.sub(f'__version__ = "{after}"', about), encoding="utf-8")
    return before, after


def shut_out(package: Package, version: str, root: Path = ROOT) -> list[str]:
    """The siblings whose ranges do not allow a version of a package, with those ranges."""
    found = []
    for path in sorted(root.glob("packages/*/pyproject.toml")):
        for requirement in tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]:
            name = re.match(r"[A-Za-z0-9-]+", requirement)
            limit = re.search(r"<\s*([\d.]+)", requirement)
            if name is None or name[0] != package.folder.name or limit is None:
                continue
            numbers = [int(number) for number in limit[1].split(".")]
            if list(_order(version)[: len(numbers)]) >= numbers:
                found.append(f"{path.parent.name} ({requirement})")
    return found


def check_tag(tag: str, root: Path = ROOT) -> Package:
    """The package that a tag such as `nnx-layers-v0.2.0` releases.

    Raises:
        ReleaseError: the tag, the version and the newest heading of the CHANGELOG are not one.
    """
    found = _TAG.fullmatch(tag)
    if found is None:
        raise ReleaseError(f"a release's tag is a package and its version, `nnx-layers-v0.2.0`, got {tag!r}")
    package = Package.named(found["package"], root)
    if package.version != found["version"]:
        raise ReleaseError(f"the tag {tag} is for {found['version']}, but {package.about.name} says {package.version}")
    heading = package.newest_heading()
    if heading["name"] != package.version:
        raise ReleaseError(f"the newest heading of the CHANGELOG is `{heading[0]}`, not that of {package.version}")
    try:
        dt.date.fromisoformat(heading["date"] or "")
    except ValueError:
        raise ReleaseError(
            f"`{heading[0]}` has no date: `hatch run bump {package.folder.name} release` gives it today's"
        ) from None
    return package


def dist(packages: list[Package], out: Path) -> list[Path]:
    """Build the source distribution and the wheel of packages into a folder, and have twine check them."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("nnx_*.whl"), *out.glob("nnx_*.tar.gz")):
        old.unlink()
    for package in packages:
        command = [sys.executable, "-m", "hatchling", "build", "--directory", str(out.resolve())]
        subprocess.run(command, cwd=package.folder, check=True)
    files = sorted((*out.glob("nnx_*.whl"), *out.glob("nnx_*.tar.gz")))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, files)], check=True)
    return files


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    bumping = commands.add_parser("bump", help="edit a package's version and CHANGELOG for its next release")
    bumping.add_argument("package", help="nnx-core, nnx-layers, nnx-train or nnx-examples")
    bumping.add_argument("part", help="major, minor, patch, release (the version stays, its date is set), or a version")
    tagging = commands.add_parser("tag", help="check a tag and print the package that it releases")
    tagging.add_argument("tag", help="such as nnx-layers-v0.2.0")
    building = commands.add_parser("dist", help="build distributions and check them")
    building.add_argument("packages", nargs="*", help="all by default")
    building.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder, dist/ by default")
    given = parser.parse_args(arguments)
    try:
        if given.command == "bump":
            package = Package.named(given.package)
            before, after = bump(package, given.part, dt.datetime.now(tz=dt.UTC).date())
            print(f"{given.package}: {before} -> {after}")
            for sibling in shut_out(package, after):
                print(f"  not allowed by {sibling}: widen its range, and release it too")
            print(f"Commit this, then: git tag {given.package}-v{after} && git push origin {given.package}-v{after}")
        elif given.command == "tag":
            print(check_tag(given.tag).folder.name)
        else:
            names = given.packages or sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
            for file in dist([Package.named(name) for name in names], given.out):
                print(file)
    except ReleaseError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
