"""The one place that holds the version of nnx-core."""

__version__ = "0.1.0"
