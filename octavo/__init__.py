"""Octavo: an LLM inference server that is complete, fast, exact and small enough to read.

The sub-packages `server`, `models` and `kernels` are the repository's top-level directories,
linked here so that they are always imported as `octavo.server` and so on.
"""

__version__ = "0.1.0"
