"""The `native` backend: C++ kernels for CPUs behind a plain C ABI."""

from .backend import NativeBackend

__all__ = ["NativeBackend"]
