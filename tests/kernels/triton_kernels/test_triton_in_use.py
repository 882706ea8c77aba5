"""The backend behind the op and the layer, as models use it."""

import copy
import os

import pytest
import torch

from fastbert_hf import FastFeedForward, use_backend
from fastbert_hf.benchmarks.gpu import regime_rows
from fastbert_hf.fff_op import select_backend
from fastbert_hf.kernels.triton.regimes import REGIMES, VARIABLE
from tests.kernels.triton_kernels.conftest import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU: the interpreter has neither streams nor graphs")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return FastFeedForward(12, 10, 2, trees=2).to(DEVICE)


def step(layer, x):
    layer.zero_grad()
    y = layer(x)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in layer.parameters())]


def test_the_layer_trains_as_with_the_reference(layer):
    x = torch.randn(2, 2, 12, device=DEVICE)
    with use_backend("triton"):
        results = step(layer, x)
    with use_backend("reference"):
        expected = step(layer, x)
    for value, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def test_opcheck_passes(layer):
    x = torch.randn(3, 12, device=DEVICE, requires_grad=True)
    arguments = (x, layer.weight_in, layer.bias_in, layer.weight_out, 2, 2, "gelu")
    with use_backend("triton"):
        torch.library.opcheck(torch.ops.fastbert.fff_v1, arguments)


def test_compiled_layer_equals_eager(layer):
    x = torch.randn(2, 2, 12, device=DEVICE)
    with use_backend("triton"):
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(step(layer, x), step(compiled, x), strict=True))


def test_autocast_trains_in_bfloat16(layer):
    with use_backend("triton"), torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, *gradients = step(layer, torch.randn(4, 12, device=DEVICE))
    assert y.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("change", "width", "depth", "reason"),
    [
        ({"dtype": torch.float64, "device": DEVICE}, 4, 2, "float64"),
        ({"device": "meta"}, 4, 2, "meta"),
        ({"device": DEVICE}, 4097, 0, "4097 wide; at most 4096"),
        ({"device": DEVICE}, 2, 13, "depth is 13; at most 12"),
    ],
    ids=str,
)
def test_declines_with_a_reason(change, width, depth, reason):
    x, weight = torch.zeros(2, width, **change), torch.zeros(2 ** (depth + 1) - 1, width, **change)
    with use_backend("triton"), pytest.raises(ValueError, match=reason):
        select_backend(x, weight, weight, 1, depth, "gelu")


def test_both_regimes_are_timed_and_checked(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    rows = regime_rows(2, 1, torch.float32, DEVICE, rounds=1)
    assert [(row.entry, row.entry_point) for row in rows] == [
        (regime, point) for point in ("module call", "op with autograd") for regime in REGIMES
    ]
    assert all(row.match.startswith("ok") and row.median_ms > 0 for row in rows)
    assert VARIABLE not in os.environ


@needs_gpu
def test_a_training_step_is_captured_by_a_cuda_graph(layer):
    x = torch.randn(300, 12, device=DEVICE)
    with use_backend("triton"):
        for _ in range(3):
            expected = step(layer, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(layer, x)
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@needs_gpu
@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_settings_change_nothing(layer, allowed):
    x = torch.randn(64, 12, device=DEVICE)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = allowed
        with use_backend("triton"), torch.inference_mode():
            y = layer(x)
        with use_backend("reference"), torch.inference_mode():
            expected = layer.double()(x.double()).float()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
