"""The one place that holds the version of nnx-train."""

__version__ = "0.1.0"
