"""The errors of nnx.train that nnx.core has no name for."""

from __future__ import annotations

from nnx.core import NnxError

__all__ = ["CheckpointError", "CheckpointNotFoundError"]


class CheckpointError(NnxError, RuntimeError):
    """A checkpoint could not be written, or what was found is not one of ours."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The directory holds no checkpoint, or none of the step that was asked for."""
