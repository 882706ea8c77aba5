"""Compiled backends of the FFF op, in order of preference; `python -m fastbert_hf.kernels` lists what runs here."""

from .native import NativeBackend

KERNEL_BACKENDS: tuple = (NativeBackend(),)
