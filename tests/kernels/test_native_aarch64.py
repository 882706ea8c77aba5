"""The C++ kernels for 64-bit Arm: cross-compiled, run by an emulator, compared with the reference."""

import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbert_hf.kernels.native import NativeBackend, NativeLeafBackend, build
from fastbert_hf.kernels.native.kernels import ACTIVATION_CODES, DTYPE_CODES
from tests.kernels.cases import check, make_leaf_problem, make_problem
from tests.processes import CHILD_SECONDS

TARGET = "aarch64-linux-gnu"
COMPILER = shutil.which(f"{TARGET}-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
DRIVER = Path(__file__).parent / "aarch64" / "driver.cpp"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator runs programs of Linux"),
    pytest.mark.skipif(COMPILER is None, reason=f"no cross compiler ({TARGET}-g++)"),
    pytest.mark.skipif(EMULATOR is None, reason="no emulator (qemu-aarch64)"),
]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A folder with the library, built as everywhere, and the driver."""
    folder = tmp_path_factory.mktemp("aarch64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", COMPILER)
        build.build(folder / build.LIBRARY_NAME)
    link = ["-L", str(folder), "-Wl,--no-as-needed", f"-l:{build.LIBRARY_NAME}", "-ldl"]
    subprocess.run([COMPILER, "-std=c++17", "-O1", str(DRIVER), *link, "-o", str(folder / "driver")], check=True)
    return folder


class Emulated:
    """A native backend whose calls of the library run on the emulated machine; all else is as ever."""

    machine: Path

    def _load(self):
        self._forward, self._backward = self.forward_symbol, self.backward_symbol

    def _call(self, function, x, tensors, out_width, sizes, activation):
        sizes, depth = sizes[:-1], sizes[-1]
        arguments = bytearray()
        for tensor in tensors:
            held = b"" if tensor is None else bytes(tensor.reshape(-1).view(torch.uint8).tolist())
            arguments += struct.pack("<q", -1 if tensor is None else len(held)) + held
        numbers = (*x.shape, out_width, *sizes)
        arguments += struct.pack(f"<{len(numbers)}q", *numbers)
        arguments += struct.pack("<4i", depth, ACTIVATION_CODES[activation], DTYPE_CODES[x.dtype], 1)
        source, target = self.machine / "in", self.machine / "out"
        source.write_bytes(arguments)
        command = [EMULATOR, "-L", f"/usr/{TARGET}", "-E", f"LD_LIBRARY_PATH={self.machine}", self.machine / "driver"]
        counts = (str(len(tensors)), str(len(numbers)))
        subprocess.run([*command, function, *counts, source, target], check=True, timeout=CHILD_SECONDS)
        results = target.read_bytes()
        (status,), start = struct.unpack_from("<i", results), 4
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                end = start + tensor.numel() * tensor.element_size()
                written = torch.frombuffer(bytearray(results[start:end]), dtype=tensor.dtype)
                tensor.copy_(written.view(tensor.shape))
                start = end
        assert start == len(results)
        if status:
            self._raise_status(status)


class EmulatedBackend(Emulated, NativeBackend):
    pass


class EmulatedLeafBackend(Emulated, NativeLeafBackend):
    pass


CASES = {
    "one row": dict(rows=1, width=37, out_width=29, depth=4, activation="gelu"),
    "many rows": dict(rows=150, width=33, out_width=21, trees=2, depth=3, activation="silu"),
    "no bias": dict(rows=17, width=16, out_width=8, depth=1, activation="relu", bias=False),
    "tanh": dict(rows=9, width=5, out_width=3, depth=0, activation="gelu_tanh"),
    "bfloat16": dict(rows=40, width=37, out_width=29, depth=3, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("form", ["nodes", "leaves"])
def test_results_are_those_of_the_reference(machine, form, sizes):
    backend = EmulatedBackend() if form == "nodes" else EmulatedLeafBackend()
    backend.machine = machine
    check(backend, make_problem(**sizes) if form == "nodes" else make_leaf_problem(**sizes))


def test_sums_of_products_are_fused_vector_instructions(machine):
    """`fmla v.4s` is the fused product of four floats, of NEON."""
    dump = [f"{TARGET}-objdump", "-d", "--no-show-raw-insn", str(machine / build.LIBRARY_NAME)]
    listing = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    fused = len(re.findall(r"\tfmla\tv\d+\.4s", listing))
    separate = len(re.findall(r"\tfmul\tv\d+\.4s", listing))
    assert fused > separate, f"{fused} fused, {separate} separate products"
