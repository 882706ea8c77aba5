"""Trees of single neurons: recorded fixtures, paths, memory; test_both_forms.py has what leaf trees share."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert_hf import FastFeedForward, fff, use_backend
from fastbert_hf.fff_op import BACKENDS
from fastbert_hf.fff_reference import fff_forward, gathered_dots
from tests.forms import NODES, with_gradients

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY_CALL = (torch.zeros(1, 4), torch.zeros(7, 4), torch.zeros(7, 4), 1, 2, "gelu")


@pytest.mark.parametrize("name", ["1x3", "4x3", "2x5", "tie-1x3"])
@pytest.mark.parametrize("backend", [n for n, b in BACKENDS.items() if not b.supports(*TINY_CALL)])
def test_layer_fixtures_reproduce(name, backend):
    path = FIXTURES / f"fff-layer-{name}.safetensors"
    recorded = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    trees, depth = int(metadata["trees"]), int(metadata["depth"])
    layer = FastFeedForward(recorded["x"].shape[-1], recorded["w_out"].shape[0], depth, trees)
    with torch.no_grad():
        layer.weight_in.copy_(recorded["w_in"])
        layer.bias_in.copy_(recorded["b_in"])
        layer.weight_out.copy_(recorded["w_out"].T)
    x = recorded["x"].clone().requires_grad_()
    with use_backend(backend):
        y = layer(x)
        y.backward(recorded["dy"])
        assert torch.equal(layer.route(x), recorded["visited"])
        with torch.inference_mode():
            torch.testing.assert_close(layer(recorded["x"]), recorded["y"], atol=5e-6, rtol=0)
    torch.testing.assert_close(y, recorded["y"], atol=5e-6, rtol=0)
    torch.testing.assert_close(x.grad, recorded["dx"], atol=5e-6, rtol=0)
    torch.testing.assert_close(layer.weight_in.grad, recorded["dw_in"], atol=3e-5, rtol=0)
    torch.testing.assert_close(layer.bias_in.grad, recorded["db_in"], atol=3e-5, rtol=0)
    torch.testing.assert_close(layer.weight_out.grad.T, recorded["dw_out"], atol=3e-5, rtol=0)


def test_ties_and_nan_go_left():
    weight_in = torch.zeros(7, 2)
    weight_in[:, 0] = 1.0
    x = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [float("nan"), 0.0], [1.0, 0.0], [-1.0, 0.0]])
    visited = torch.ops.fastbert.fff_v1(x, weight_in, None, torch.ones(7, 2), 1, 2, "gelu")[1]
    assert visited[:, 0].tolist() == [[0, 1, 3], [0, 1, 3], [0, 1, 3], [0, 2, 6], [0, 1, 3]]


def test_unvisited_parameter_rows_get_exactly_zero_gradient():
    x, weight_in, bias_in, weight_out = with_gradients(NODES.inputs(3, 8, 8, 1, 5))
    visited = torch.ops.fastbert.fff_v1(x, weight_in, bias_in, weight_out, 1, 5, "gelu")[1].unique().long()
    fff(x, weight_in, bias_in, weight_out, 1, 5).sum().backward()
    unvisited = torch.ones(63, dtype=torch.bool)
    unvisited[visited] = False
    for gradient in (weight_in.grad, bias_in.grad, weight_out.grad):
        assert (gradient[unvisited] == 0).all() and (gradient[visited] != 0).any()


class CountGathers(TorchDispatchMode):
    """Counts how often rows of a weight are gathered."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.index.Tensor
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("device", "visits", "expected"), [("cpu", 1, 4), ("cpu", 12, 49), ("meta", 1, 1), ("meta", 12, 1)]
)
def test_chunks_fit_a_cache_on_cpus_and_fill_other_devices(device, visits, expected):
    vectors, weight = torch.zeros(2048, 32, device=device), torch.zeros(4095, 32, device=device)
    rows = torch.zeros(2048, visits, dtype=torch.int64, device=device)
    with CountGathers() as gathers:
        assert gathered_dots(vectors, weight, rows).shape == (2048, visits)
    assert gathers.count == expected


def test_chunks_on_other_devices_are_bounded_by_memory():
    vectors, weight = torch.zeros(16384, 768, device="meta"), torch.zeros(4095, 768, device="meta")
    rows = torch.zeros(16384, 12, dtype=torch.int64, device="meta")  # 604 MB if gathered at once
    with CountGathers() as gathers:
        gathered_dots(vectors, weight, rows)
    assert gathers.count == 3


def test_chunks_change_nothing(monkeypatch):
    inputs = NODES.inputs(40, 16, 8, 2, 4, dtype=torch.float32)
    expected = fff_forward(*inputs, 2, 4, "gelu")
    monkeypatch.setattr("fastbert_hf.fff_reference.GATHERED_ROWS", 14)
    assert all(torch.equal(a, b) for a, b in zip(fff_forward(*inputs, 2, 4, "gelu"), expected, strict=True))


BAD_CALLS = {
    "3 trees of depth 3 have 45 nodes": {"trees": 3},
    "x is 9 wide and weight_in 8": {"x": torch.zeros(2, 9)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_raise_a_value_error_that_names_them(message):
    call = {
        "x": torch.zeros(2, 8),
        "weight_in": torch.zeros(15, 8),
        "bias_in": torch.zeros(15),
        "weight_out": torch.zeros(15, 8),
        "trees": 1,
        "depth": 3,
        "activation": "gelu",
    } | BAD_CALLS[message]
    with pytest.raises(ValueError, match=message):
        fff(**call)
