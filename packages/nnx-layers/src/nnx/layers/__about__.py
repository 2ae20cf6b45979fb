"""The one place that holds the version of nnx-layers."""

__version__ = "0.1.0"
