"""The Triton kernels where there is no GPU: run by Triton's interpreter, and compiled for real hardware."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbert_hf.fff_op import BACKENDS
from fastbert_hf.kernels.triton.regimes import REGIMES, VARIABLE
from tests.kernels.cases import ACTIVATIONS
from tests.processes import CHILD_SECONDS

pytest.importorskip("triton", reason="the package triton is not installed")

ROOT = Path(__file__).parents[2]
# bytes of shared memory that a program may use, by compute capability or name of the architecture
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, "gfx942": 64 * 1024}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
PRODUCTS = {"upper_paths", "lower_paths", "path_dots", "path_sums", "sum_pieces"}
KERNELS = {
    "walk": {"walk_forward", "walk_backward", "sum_chunks", "sum_nodes"},
    "subtrees": {*PRODUCTS, "cut_groups", "add_pieces"},
}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests run on it, in this process")
def test_kernels_pass_their_tests_under_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/triton_kernels"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "FASTBERT_BACKEND": ""},
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    last = result.stdout.strip().splitlines()[-1]
    assert int(last.split(" passed")[0].split()[-1]) > 150, last


class Recorder:
    """Stands for a kernel and notes what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launches.append((self.kernel, arguments, constants))


@pytest.fixture
def launches(monkeypatch):
    """What the backend launches, instead of launching it."""
    from fastbert_hf.kernels.triton import segments, walk
    from fastbert_hf.kernels.triton.subtrees import call, groups

    recorded = []
    for module in (walk, segments, groups, call):
        for name in KERNELS["walk"] | KERNELS["subtrees"]:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Recorder(getattr(module, name), recorded))
    return recorded


def compile_launch(kernel, arguments, constants, target) -> str:
    """Compile as Triton would at this launch, for a GPU that need not be there; -> assembly."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(constants)
    warps = constants.pop("num_warps", 4)
    signature, attributes = dict.fromkeys(constants, "constexpr"), {}
    for position, (parameter, argument) in enumerate(zip(kernel.params, arguments)):
        if isinstance(argument, torch.Tensor):
            kind, aligned = "*" + TYPES[argument.dtype], argument.data_ptr() % 16 == 0
        elif argument == 1 and not parameter.do_not_specialize:
            kind, aligned = "constexpr", False
            constants[parameter.name] = 1
        else:
            kind, aligned = "i32", argument % 16 == 0 and not parameter.do_not_specialize
        signature[parameter.name] = kind
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    assert set(signature) == set(kernel.arg_names)
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, attributes)
    hip = isinstance(target, str)
    gpu = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", target, 32)
    result = triton.compile(source, target=gpu, options={"num_warps": warps})
    assert result.asm["hsaco" if hip else "cubin"] and result.metadata.shared < SHARED_MEMORY[target]
    return result.asm["amdgcn" if hip else "ptx"]


@pytest.mark.parametrize(
    ("shape", "dtype", "target"),
    [
        *itertools.product([(2048, 768, 768, 1, 11)], [torch.float32, torch.bfloat16, torch.float16], SHARED_MEMORY),
        # odd widths, one part alone, the widest and deepest: other blocks and loops, whatever the dtype
        ((2, 33, 1, 2, 7), torch.float32, 90),
        ((1, 1, 4096, 1, 3), torch.bfloat16, 90),
        ((2, 4096, 4096, 1, 12), torch.float16, 90),
    ],
    ids=str,
)
@pytest.mark.parametrize("regime", REGIMES)
def test_what_a_call_launches_compiles_for_real_hardware(launches, monkeypatch, shape, regime, dtype, target):
    monkeypatch.setenv(VARIABLE, regime)
    monkeypatch.setattr(torch.version, "hip", "7" if isinstance(target, str) else None)
    rows, width, out_width, trees, depth = shape
    x, grad_y = torch.zeros(rows, width, dtype=dtype), torch.zeros(rows, out_width, dtype=dtype)
    nodes = trees * (2 ** (depth + 1) - 1)
    weights = [torch.zeros(nodes, *columns, dtype=dtype) for columns in ((width,), (), (out_width,))]
    backend = BACKENDS["triton"]
    # activations are float32 whatever the dtype, and only their code differs between the kernels of a walk
    every = dtype == torch.float32 and depth == 11 and regime == "walk"
    for activation in ACTIVATIONS if every else ACTIVATIONS[:1]:
        _, visited, logits = backend.forward(x, *weights, trees, depth, activation)
        backend.infer(x, weights[0], None, weights[2], trees, depth, activation)
        backend.backward(grad_y, x, *weights, visited, logits, activation, [True] * 4)
    expected = KERNELS[regime] - ({"upper_paths"} if depth < 7 else set())
    assert {kernel.__name__ for kernel, _, _ in launches} == expected
    for kernel, arguments, constants in launches:
        assembly = compile_launch(kernel, arguments, constants, target)
        if dtype != torch.float32 and kernel.__name__ in PRODUCTS:
            assert "mma" in assembly or "mfma" in assembly, f"{kernel.__name__} is not on matrix units"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so():
    assert "no GPU" in BACKENDS["triton"].unavailable()
