"""The `native` backends: C++ kernels for CPUs behind a plain C ABI."""

from .encoder_backend import (
    NativeAddNormBackend,
    NativeAttentionBackend,
    NativeQuantizedAttentionBackend,
    NativeQuantizedLinearBackend,
)
from .fff_backend import NativeBackend
from .int8_backend import NativeQuantizedBackend, NativeQuantizedLeafBackend
from .leaf_backend import NativeLeafBackend

__all__ = [
    "NativeAddNormBackend",
    "NativeAttentionBackend",
    "NativeBackend",
    "NativeLeafBackend",
    "NativeQuantizedAttentionBackend",
    "NativeQuantizedBackend",
    "NativeQuantizedLeafBackend",
    "NativeQuantizedLinearBackend",
]
