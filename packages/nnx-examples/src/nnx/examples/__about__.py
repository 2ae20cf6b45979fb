"""The one place that holds the version of nnx-examples."""

__version__ = "0.1.0"
