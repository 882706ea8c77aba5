"""The `native` backends: C++ kernels for CPUs behind a plain C ABI."""

from .fff_backend import NativeBackend
from .int8_backend import NativeQuantizedBackend, NativeQuantizedLeafBackend
from .leaf_backend import NativeLeafBackend

__all__ = ["NativeBackend", "NativeLeafBackend", "NativeQuantizedBackend", "NativeQuantizedLeafBackend"]
