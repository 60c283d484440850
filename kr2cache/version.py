"""The version of the package, below everything: caches record it."""

__version__ = "0.1.0"
