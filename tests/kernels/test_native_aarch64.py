"""The C++ kernels for 64-bit Arm: cross-compiled, run by an emulator, compared with the reference."""

import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbert_hf.backends_fastbert import BACKENDS
from fastbert_hf.kernels import native
from fastbert_hf.kernels.native import build
from tests.kernels import quantized_cases
from tests.kernels.cases import check, make_leaf_problem, make_problem
from tests.kernels.encoder_cases import (
    attention_call,
    check_attention,
    check_norm,
    linear_call,
    norm_call,
    parts_of,
    quantized_attention_call,
)
from tests.kernels.properties import DTYPES
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
    """A native backend whose calls of the library run on the emulated machine, on one thread; all else is as ever."""

    machine: Path

    def _load(self):
        self._forward, self._backward = self.forward_symbol, self.backward_symbol

    def _call(self, function, tensors, *words):
        numbers = (*words, 1)
        arguments = bytearray()
        for tensor in tensors:
            held = b"" if tensor is None else bytes(tensor.reshape(-1).view(torch.uint8).tolist())
            arguments += struct.pack("<q", -1 if tensor is None else len(held)) + held
        arguments += struct.pack(f"<{len(numbers)}q", *numbers)
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


def emulated(backend: type, machine: Path) -> Emulated:
    return type(backend.__name__, (Emulated, backend), {"machine": machine})()


ENCODER_BACKENDS = {
    "linear_int8": native.NativeQuantizedLinearBackend,
    "attention": native.NativeAttentionBackend,
    "attention_int8": native.NativeQuantizedAttentionBackend,
    "add_norm": native.NativeAddNormBackend,
}
TREES = {
    "nodes": (native.NativeBackend, make_problem),
    "leaves": (native.NativeLeafBackend, make_leaf_problem),
    "int8 nodes": (native.NativeQuantizedBackend, quantized_cases.quantized_nodes),
    "int8 leaves": (native.NativeQuantizedLeafBackend, quantized_cases.quantized_leaves),
}
CASES = {
    "one row": dict(rows=1, width=37, out_width=29, depth=4, activation="gelu"),
    "many rows": dict(rows=150, width=33, out_width=21, trees=2, depth=3, activation="silu"),
    "no bias": dict(rows=17, width=16, out_width=8, depth=1, activation="relu", bias=False),
    "tanh": dict(rows=9, width=5, out_width=3, depth=0, activation="gelu_tanh"),
    "bfloat16": dict(rows=40, width=37, out_width=29, depth=3, dtype=torch.bfloat16),
}


@pytest.fixture
def encoder_ops(machine, monkeypatch):
    """The ops around feed-forward blocks run on the emulated machine where "native" is asked for."""
    for op, backend in ENCODER_BACKENDS.items():
        monkeypatch.setitem(BACKENDS[op], "native", emulated(backend, machine))


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("form", TREES)
def test_results_are_those_of_the_reference(machine, form, sizes):
    backend, make = TREES[form]
    if form.startswith("int8"):
        quantized_cases.check(*make(**sizes), emulated(backend, machine))
    else:
        check(emulated(backend, machine), make(**sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 50), (65, 31, 17), (70, 384, 96)], ids=str)
def test_linear_layers_equal_their_reference(encoder_ops, shape, dtype):
    call = linear_call(*shape, bias=shape[0] > 1, dtype=dtype)
    assert torch.equal(call.run(), call.run("reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("visible", ["all", "some", "none"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 6, 2, 16), (2, 17, 3, 20), (1, 131, 1, 65)], ids=str)
def test_attention_matches_float64(encoder_ops, shape, visible, dtype):
    check_attention(attention_call(*shape, visible, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("visible", ["all", "some"])
def test_attention_with_its_linear_layers_equals_the_three_ops(encoder_ops, visible, dtype):
    call = quantized_attention_call(2, 17, 3, 20, visible, dtype)
    assert torch.equal(call.run(), parts_of(call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (70, 96)], ids=str)
def test_norms_match_float64(encoder_ops, shape, dtype):
    check_norm(norm_call(*shape, dtype))


def test_sums_of_products_are_fused_vector_instructions(machine):
    """`fmla v.4s` is the fused product of four floats, of NEON."""
    dump = [f"{TARGET}-objdump", "-d", "--no-show-raw-insn", str(machine / build.LIBRARY_NAME)]
    listing = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    fused = len(re.findall(r"\tfmla\tv\d+\.4s", listing))
    separate = len(re.findall(r"\tfmul\tv\d+\.4s", listing))
    assert fused > separate, f"{fused} fused, {separate} separate products"
