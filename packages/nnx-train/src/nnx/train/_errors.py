"""What can go wrong with checkpoints."""

from __future__ import annotations

from nnx.core import NnxError

__all__ = ["CheckpointError", "CheckpointNotFoundError", "CheckpointWarning", "CorruptError"]


class CheckpointError(NnxError, RuntimeError):
    """A checkpoint could not be written or read."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint."""


class CorruptError(CheckpointError):
    """A checkpoint is not what was saved: a file is damaged or missing.

    Attributes:
        step: the step, or None if it is not known.
        item: the part of the checkpoint, or None for the manifest.
        path: the `/`-joined path of the leaf, or None where it is not one leaf.
    """

    def __init__(self, message: str, step: int | None, item: str | None = None, path: str | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.item = item
        self.path = path


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over since it is damaged, or a run goes on without the position of its data."""
