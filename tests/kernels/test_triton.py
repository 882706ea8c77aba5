"""The Triton kernels where there is no GPU: run by Triton's interpreter, and compiled for real hardware."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbert_hf.fff_op import BACKENDS
from fastbert_hf.kernels.triton.backend import ACTIVATION_NAMES, _blocks

pytest.importorskip("triton", reason="the package triton is not installed")

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may use, by compute capability
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests run on it, in this process")
def test_kernels_pass_their_tests_under_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/triton_kernels"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "FASTBERT_BACKEND": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    last = result.stdout.strip().splitlines()[-1]
    assert int(last.split(" passed")[0].split()[-1]) > 180, last


def compiled(kernel, signature, constants, capability, warps, aligned=()):
    """The kernel for a GPU that need not be there; ptxas comes with triton.

    aligned: names of arguments that are multiples of 16, as pointers mostly are and Triton finds out at a call.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


SIZES = dict.fromkeys(("width", "out_width", "trees", "nodes", "visits_per_row"), "i32")


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", POINTERS)
@pytest.mark.parametrize(("width", "out_width"), [(768, 768), (4096, 4096), (33, 1)])
def test_walks_compile_for_real_hardware(capability, dtype, width, out_width):
    from fastbert_hf.kernels.triton.walk import walk_backward, walk_forward

    blocks = _blocks(width, out_width)
    warps = blocks.pop("num_warps")
    names = {*walk_forward.arg_names, *walk_backward.arg_names}
    signature = {name: POINTERS[dtype] for name in names if name.endswith("_ptr")} | SIZES
    signature |= {
        "visited_ptr": "*i32",
        "logits_ptr": "*fp32",
        "grad_logits_ptr": "*fp32",
        "activations_ptr": "*fp32",
    }
    for code in range(len(ACTIVATION_NAMES)):
        common = {"DEPTH": 11, "ACTIVATION": code, **blocks}
        forward = compiled(walk_forward, signature, {**common, "HAS_BIAS": True, "SAVE": True}, capability, warps)
        backward = compiled(walk_backward, signature, {**common, "WANT_X": True}, capability, warps)
        for kernel in (forward, backward):
            assert kernel.asm["cubin"] and kernel.metadata.shared < SHARED_MEMORY[capability]


@pytest.mark.parametrize(
    ("width", "depth", "dtype", "capability"),
    [(768, 11, dtype, capability) for dtype in POINTERS for capability in SHARED_MEMORY]
    + [(4096, 12, "bfloat16", 90), (33, 3, "float32", 80)],
)
def test_subtrees_compile_for_real_hardware(width, depth, dtype, capability):
    from fastbert_hf.kernels.triton import subtree_nodes, subtree_rows, subtrees

    upper, lower = subtrees.split_levels(depth)
    element = getattr(torch, dtype)
    tile = {"BLOCK_N": subtrees.TILE_ROWS, "BLOCK_K": subtrees.block_columns(element, width), "WIDEN": False}
    upper_nodes, lower_nodes = subtrees.padded(upper), subtrees.padded(lower)
    whole = {"DEPTH": depth, "UPPER": upper}
    groups = {**whole, "LOWER": lower, "GROUPS": subtrees.table_columns(upper)}
    parts = {**groups, "UPPER_NODES": upper_nodes, "LOWER_NODES": lower_nodes}
    precision = subtrees.precision(element, tf32=False)
    nodes = {**groups, "NODES": max(upper_nodes, lower_nodes)}
    pieces = {
        **nodes,
        "PIECE": subtrees.PIECE_ROWS,
        **precision,
        **tile,
        "BLOCK_K": subtrees.node_columns(element, width),
    }
    table = {"UPPER": upper, "GROUPS": groups["GROUPS"], "TILE": subtrees.TILE_ROWS, "PIECE": subtrees.PIECE_ROWS}
    variants = [
        (subtree_rows.cut_groups, table),
        (subtree_rows.lower_paths, {**groups, "NODES": lower_nodes, "HAS_BIAS": True, **tile}),
        (subtree_rows.path_dots, {**parts, "ROUNDING": precision["ROUNDING"], **tile}),
        (subtree_rows.path_sums, {**parts, "ADD": True, **precision, **tile}),
        (subtree_nodes.sum_pieces, pieces),
        (subtree_nodes.add_pieces, {**nodes, "WITH_VALUES": True, "BLOCK_K": tile["BLOCK_K"]}),
    ]
    if upper:
        upper_paths = {**whole, "NODES": upper_nodes, "HAS_BIAS": True, **tile}
        variants.append((subtree_rows.upper_paths, upper_paths))
    for kernel, constants in variants:
        signature = {name: POINTERS[dtype] for name in kernel.arg_names if name.endswith("_ptr")}
        signature |= dict.fromkeys(("logits_ptr", "values_ptr", "dots_ptr"), "*fp32")
        signature |= dict.fromkeys(("weight_sum_ptr", "partial_ptr", "partial_values_ptr"), "*fp32")
        signature |= {"visited_ptr": "*i32", "entered_ptr": "*i8"}
        signature |= dict.fromkeys(("order_ptr", "table_ptr"), "*i64")
        signature |= dict.fromkeys(("rows", "steps", "width", "trees", "tree"), "i32")
        aligned = [name for name in kernel.arg_names if name.endswith("_ptr") or name == "width"]
        warps = subtrees.WARPS if "BLOCK_N" in constants else 4
        options = {"aligned": aligned if width % 16 == 0 else ()}
        result = compiled(kernel, signature, constants, capability, warps, **options)
        assert result.asm["cubin"] and result.metadata.shared < SHARED_MEMORY[capability]
        if dtype != "float32" and "BLOCK_N" in constants:
            assert "mma" in result.asm["ptx"], "not on tensor cores"


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", POINTERS)
def test_segment_sums_compile_for_real_hardware(capability, dtype):
    from fastbert_hf.kernels.triton.segments import BLOCK, CHUNK, ROWS, sum_chunks, sum_nodes

    names = {*sum_chunks.arg_names, *sum_nodes.arg_names}
    signature = {name: "*i64" for name in names if name.endswith("_ptr")} | SIZES
    signature |= {"coefficients_ptr": "*fp32", "partial_ptr": "*fp32"}
    signature |= {"vectors_ptr": POINTERS[dtype], "result_ptr": POINTERS[dtype]}
    for kernel, constants in (
        (sum_chunks, {"CHUNK": CHUNK, "ROWS": ROWS, "BLOCK": BLOCK}),
        (sum_nodes, {"BLOCK": BLOCK}),
    ):
        result = compiled(kernel, signature, constants, capability, 4)
        assert result.asm["cubin"] and result.metadata.shared < SHARED_MEMORY[capability]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so():
    assert "no GPU" in BACKENDS["triton"].unavailable()
