"""A directory of checkpoints that survives being killed: what counts is renamed into place, and removed by renaming."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nnx.train._errors import CheckpointError
from nnx.train._manifest import Manifest

__all__ = ["MANIFEST", "Storage", "flush"]

MANIFEST = "nnx_manifest.json"
_ITEMS = {"state", "context"}
_WRITING, _REMOVED, _CORRUPT = ".writing-", ".removed-", "corrupt-"


class Storage:
    """The directory.

    A checkpoint is a folder named by its step that holds the manifest. It is written under another name, every file of
    it is flushed to the disk, and then it gets its name: so it is there as a whole or not at all.

    Args:
        root: the directory, absolute.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: IO[str] | None = None

    def folder(self, step: int) -> Path:
        """Where a step is."""
        return self.root / str(step)

    def writing_folder(self, step: int) -> Path:
        """Where a step is while it is being written."""
        return self.root / f"{_WRITING}{step}"

    def steps(self) -> list[int]:
        """The steps that are there, in rising order."""
        try:
            folders = [folder for folder in self.root.iterdir() if folder.name.isdecimal()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"cannot read {self.root}: {error}") from error
        return sorted(int(folder.name) for folder in folders if (folder / MANIFEST).exists())

    def others(self) -> list[str]:
        """Folders named by a step that another program wrote."""
        return [name for name in self._without_manifest() if not self._is_stray(self.root / name)]

    def strays(self) -> list[int]:
        """The steps, in rising order, that have lost their manifest: what a damage or half a removal has left."""
        return sorted(int(name) for name in self._without_manifest() if self._is_stray(self.root / name))

    def _without_manifest(self) -> list[str]:
        with contextlib.suppress(OSError):
            return sorted(
                folder.name
                for folder in self.root.iterdir()
                # In this order: a step that is renamed away in between has no manifest, and is no longer there.
                if folder.name.isdecimal() and not (folder / MANIFEST).exists() and folder.exists()
            )
        return []

    def _is_stray(self, folder: Path) -> bool:
        """Whether a folder holds nothing but what a Checkpointer writes. orbax's own managers write more."""
        try:
            return {entry.name for entry in folder.iterdir()} <= _ITEMS
        except OSError:
            return False

    def read_manifest(self, step: int) -> Manifest:
        """The manifest of a step.

        Raises:
            ValueError: it is damaged.
            FutureFormatError: it is of a later version.
            OSError: it cannot be read.
        """
        found = Manifest.from_text((self.folder(step) / MANIFEST).read_text(encoding="utf-8"))
        if found.step != step:
            raise ValueError(f"the manifest is that of step {found.step}")
        return found

    def lock(self) -> None:
        """Become the one process that writes here, and clear away what one that was killed has left.

        Raises:
            CheckpointError: another process writes here, or the directory cannot be made or written.
        """
        if self._lock is not None:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / ".lock").open("w", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot keep checkpoints in {self.root}: {error}") from error
        if not _lock_file(file):
            file.close()
            raise CheckpointError(
                f"another process or Checkpointer is saving in {self.root}: two would remove each other's "
                "checkpoints. Give each a directory of its own, or end the other one"
            )
        self._lock = file
        for folder in self.root.iterdir():
            if folder.name.startswith((_WRITING, _REMOVED)):
                shutil.rmtree(folder, ignore_errors=True)

    def unlock(self) -> None:
        """Let others write here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def check_free(self, step: int) -> None:
        """Raise if a folder that is not ours has the name of a step."""
        if self.folder(step).exists() and step not in self.strays():
            raise CheckpointError(
                f"cannot save step {step} in {self.root}: there is a folder {step} that no Checkpointer has saved. "
                "Move it, or save in another directory"
            )

    def begin(self, step: int) -> Path:
        """Make an empty folder to write a step to. It counts for nothing until it is committed."""
        self.abandon(step)
        folder = self.writing_folder(step)
        folder.mkdir()
        return folder

    def commit(self, step: int, manifest: Manifest) -> None:
        """Make what was written to the folder the step: flushed to the disk first, then renamed."""
        folder = self.writing_folder(step)
        (folder / MANIFEST).write_text(manifest.to_text(), encoding="utf-8")
        for parent, _, files in os.walk(folder):
            for name in files:
                flush(Path(parent) / name)
            flush(Path(parent))
        folder.rename(self.folder(step))
        flush(self.root)

    def abandon(self, step: int) -> None:
        """Remove what was written to the folder of a step."""
        shutil.rmtree(self.writing_folder(step), ignore_errors=True)

    @contextlib.contextmanager
    def writing(self, step: int, manifest: Manifest) -> Iterator[Path]:
        """A folder to write a step to, which becomes the step when the block ends well."""
        try:
            yield self.begin(step)
            self.commit(step, manifest)
        except BaseException:
            self.abandon(step)
            raise

    def remove(self, step: int) -> None:
        """Remove a step: at once by name, its files after that."""
        self.remove_folder(self.folder(step))

    def remove_folder(self, folder: Path) -> None:
        """Remove a folder in the directory, in the same way."""
        gone = self._rename_away(folder, _REMOVED)
        shutil.rmtree(gone, ignore_errors=True)

    def quarantine(self, step: int) -> Path:
        """Put a damaged step out of the way, and keep it.

        Raises:
            OSError: it cannot be renamed.
        """
        return self._rename_away(self.folder(step), _CORRUPT)

    def _rename_away(self, folder: Path, prefix: str) -> Path:
        number = 0
        while True:
            target = self.root / f"{prefix}{folder.name}{f'-{number}' if number else ''}"
            if not target.exists():
                break
            number += 1
        folder.rename(target)
        return target


def _lock_file(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have none.
        return error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
    return True


def flush(path: Path) -> None:
    """Have the disk hold a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what cannot be flushed, such as folders on some systems
            raise
    finally:
        os.close(descriptor)
