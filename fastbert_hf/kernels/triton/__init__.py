"""The `triton` backend: kernels for GPUs, compiled when they are first called."""

from .backend import TritonBackend

__all__ = ["TritonBackend"]
