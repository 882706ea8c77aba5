"""Compiled backends by op, in order of preference; `python -m fastbert_hf.kernels` lists what runs here."""

from .native import (
    NativeAddNormBackend,
    NativeAttentionBackend,
    NativeBackend,
    NativeLeafBackend,
    NativeQuantizedAttentionBackend,
    NativeQuantizedBackend,
    NativeQuantizedLeafBackend,
    NativeQuantizedLinearBackend,
)
from .triton import TritonBackend

KERNEL_BACKENDS: tuple = (NativeBackend(), TritonBackend())  # the name that code saved with older models imports
BACKENDS_BY_OP: dict[str, tuple] = {
    "fff": KERNEL_BACKENDS,
    "leaf_trees": (NativeLeafBackend(),),
    "fff_int8": (NativeQuantizedBackend(),),
    "leaf_trees_int8": (NativeQuantizedLeafBackend(),),
    "linear_int8": (NativeQuantizedLinearBackend(),),
    "add_norm": (NativeAddNormBackend(),),
    "attention": (NativeAttentionBackend(),),
    "attention_int8": (NativeQuantizedAttentionBackend(),),
}
