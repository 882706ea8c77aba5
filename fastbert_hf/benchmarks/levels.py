"""Load the paper's Level 1 and Level 2 forms, compiled here for this machine."""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastbert_hf.kernels.native.build import BuildError, find_compiler

SOURCE = Path(__file__).with_name("levels.cpp")
NAMES = ("dense_level1", "dense_level2", "fff_level1", "fff_level2")


def compile_levels() -> ctypes.CDLL | str:
    """The compiled forms, or a sentence that says why there are none."""
    try:
        compiler = find_compiler()
    except BuildError as error:
        return str(error)
    with tempfile.TemporaryDirectory(prefix="fastbert-levels-") as folder:
        compiled, target = Path(folder) / "levels.o", Path(folder) / "levels.so"
        # linked without -ffast-math: with it GCC adds code that has the loading thread flush numbers next to zero
        for step in (
            ["-O3", "-march=native", "-ffast-math", "-fopenmp-simd", "-fPIC", "-c", str(SOURCE), "-o", str(compiled)],
            ["-shared", str(compiled), "-o", str(target)],
        ):
            result = subprocess.run([*compiler, *step], capture_output=True, text=True)
            if result.returncode:
                return f"{compiler[0]} failed: {result.stderr.strip().splitlines()[-1:]}"
        return ctypes.CDLL(str(target))  # stays mapped when the file is gone


def level_form(library: ctypes.CDLL, name: str) -> Callable[..., Tensor]:
    """One form as a call (x (N, H), weight_in, bias_in, weight_out, y (N, H)) on contiguous float32 -> y."""
    function = getattr(library, name)
    function.restype = None

    def call(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, y: Tensor) -> Tensor:
        tensors = (x, weight_in, bias_in, weight_out, y)
        assert all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in tensors)
        sizes = (ctypes.c_int64(v) for v in (x.shape[0], x.shape[1], weight_in.shape[0]))
        function(*pointers, *sizes)
        return y

    return call
