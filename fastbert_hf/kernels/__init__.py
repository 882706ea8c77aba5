"""Compiled backends of the FFF op, in order of preference; `python -m fastbert_hf.kernels` lists what runs here."""

from .native import NativeBackend
from .triton import TritonBackend

KERNEL_BACKENDS: tuple = (NativeBackend(), TritonBackend())
