"""The op and its reference backend against the dense-and-mask oracle and the recorded layer fixtures."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert_hf import FastFeedForward, fff, use_backend
from fastbert_hf.fff_op import BACKENDS
from fastbert_hf.fff_reference import fff_forward, fff_traceable, gathered_dots, nodes_per_tree
from tests.oracle import dense_and_mask

FIXTURES = Path(__file__).parents[1] / "fixtures"
# N, H, H_out, trees, depth
SHAPES = [
    (7, 8, 8, 1, 3),
    (5, 7, 3, 2, 2),
    (1, 16, 5, 1, 11),
    (3, 4, 4, 5, 0),
    (40, 33, 17, 4, 4),
    (2, 1, 1, 64, 1),
]


def make_inputs(num_rows, width, width_out, trees, depth, *, bias=True, dtype=torch.float64, seed=0):
    """Random inputs whose decisions keep a margin: rows with a logit near 0 on any node are drawn again."""
    generator = torch.Generator().manual_seed(seed)
    rows = trees * nodes_per_tree(depth)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight_in, weight_out = draw(rows, width), draw(rows, width_out)
    bias_in = draw(rows) * 0.1 if bias else None
    x = draw(num_rows, width)
    for _ in range(200):
        logits = x @ weight_in.T + (bias_in if bias else 0)
        near = logits.abs().amin(dim=1) < 1e-4
        if not near.any():
            break
        x[near] = draw(int(near.sum()), width)
    tensors = (x, weight_in, bias_in, weight_out)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def leaves(tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_every_gradient_equal_dense_and_mask(shape, activation, bias):
    *_, trees, depth = shape
    inputs = make_inputs(*shape, bias=bias)
    ours, theirs = leaves(inputs), leaves(inputs)
    y = fff(*ours, trees, depth, activation)
    expected, nodes = dense_and_mask(*theirs, trees, activation)
    torch.testing.assert_close(y, expected)
    visited = torch.ops.fastbert.fff_v1(*inputs, trees, depth, activation)[1]
    assert torch.equal(visited.long(), nodes)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    expected.backward(grad_y)
    for a, b in zip(ours, theirs):
        if a is not None:
            torch.testing.assert_close(a.grad, b.grad)


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


@pytest.mark.parametrize("bias", [True, False])
def test_float64_gradcheck_and_opcheck(bias):
    inputs = leaves(make_inputs(4, 6, 5, 2, 3, bias=bias))
    wanted = [t for t in inputs if t is not None]

    def call(*tensors):
        x, weight_in, *rest = tensors
        bias_in, weight_out = rest if bias else (None, rest[0])
        return torch.ops.fastbert.fff_v1(x, weight_in, bias_in, weight_out, 2, 3, "gelu")[0]

    assert torch.autograd.gradcheck(call, wanted)
    torch.library.opcheck(torch.ops.fastbert.fff_v1.default, (*inputs, 2, 3, "gelu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_accumulate_in_float32(dtype):
    inputs = make_inputs(50, 24, 24, 2, 5, dtype=dtype)
    wide = [t.double() for t in inputs]
    # the same path: only rows whose decisions rounding of the inputs leaves clear are compared
    _, nodes, logits = torch.ops.fastbert.fff_v1(*wide, 2, 5, "gelu")
    clear = logits.abs().amin(dim=(1, 2)) > 1e-3
    assert clear.sum() > 20
    y, visited, narrow_logits = torch.ops.fastbert.fff_v1(*inputs, 2, 5, "gelu")
    assert y.dtype == dtype and narrow_logits.dtype == torch.float32
    assert torch.equal(visited[clear], nodes[clear])
    torch.testing.assert_close(narrow_logits[clear].double(), logits[clear], atol=2e-5, rtol=1e-5)
    expected = fff(*wide, 2, 5).to(dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y[clear], expected[clear], atol=2e-5, rtol=2 * eps)


def test_no_rows_and_no_gradient_rows():
    x, weight_in, bias_in, weight_out = leaves(make_inputs(0, 6, 5, 1, 3))
    y = fff(x, weight_in, bias_in, weight_out, 1, 3)
    assert y.shape == (0, 5)
    y.sum().backward()
    assert x.grad.shape == (0, 6) and weight_in.grad.abs().sum() == 0 and weight_out.grad.abs().sum() == 0


def test_ties_and_nan_go_left():
    weight_in = torch.zeros(7, 2)
    weight_in[:, 0] = 1.0
    x = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [float("nan"), 0.0], [1.0, 0.0], [-1.0, 0.0]])
    visited = torch.ops.fastbert.fff_v1(x, weight_in, None, torch.ones(7, 2), 1, 2, "gelu")[1]
    assert visited[:, 0].tolist() == [[0, 1, 3], [0, 1, 3], [0, 1, 3], [0, 2, 6], [0, 1, 3]]


def test_nan_and_inf_stay_in_their_row_and_unvisited_nodes_do_not_matter():
    x, weight_in, bias_in, weight_out = make_inputs(6, 8, 8, 1, 4, dtype=torch.float32)
    expected = fff(x, weight_in, bias_in, weight_out, 1, 4)
    poisoned = x.clone()
    poisoned[2], poisoned[4] = float("nan"), float("inf")
    y = fff(poisoned, weight_in, bias_in, weight_out, 1, 4)
    others = [0, 1, 3, 5]
    assert torch.equal(y[others], expected[others]) and y[2].isnan().all()
    visited = torch.ops.fastbert.fff_v1(x, weight_in, bias_in, weight_out, 1, 4, "gelu")[1]
    unvisited = torch.ones(31, dtype=torch.bool)
    unvisited[visited.flatten().long()] = False
    assert unvisited.any()
    for weight in (weight_in, weight_out):
        weight[unvisited] = float("nan")
    bias_in[unvisited] = float("inf")
    assert torch.equal(fff(x, weight_in, bias_in, weight_out, 1, 4), expected)


def test_strided_inputs_equal_contiguous_ones():
    x, weight_in, bias_in, weight_out = make_inputs(6, 8, 5, 1, 3)
    expected = fff(x, weight_in, bias_in, weight_out, 1, 3)
    wide = torch.zeros(6, 16, dtype=x.dtype)
    wide[:, ::2] = x
    columns = weight_out.T.contiguous()
    assert torch.equal(fff(wide[:, ::2], weight_in, bias_in, columns.T, 1, 3), expected)


def test_unvisited_parameter_rows_get_exactly_zero_gradient():
    x, weight_in, bias_in, weight_out = leaves(make_inputs(3, 8, 8, 1, 5))
    visited = torch.ops.fastbert.fff_v1(x, weight_in, bias_in, weight_out, 1, 5, "gelu")[1].unique().long()
    fff(x, weight_in, bias_in, weight_out, 1, 5).sum().backward()
    unvisited = torch.ones(63, dtype=torch.bool)
    unvisited[visited] = False
    for gradient in (weight_in.grad, bias_in.grad, weight_out.grad):
        assert (gradient[unvisited] == 0).all() and (gradient[visited] != 0).any()


def test_only_wanted_gradients_are_computed():
    x, weight_in, bias_in, weight_out = make_inputs(5, 8, 8, 1, 3)
    x.requires_grad_()
    fff(x, weight_in, bias_in, weight_out, 1, 3).sum().backward()
    asked = leaves((x, weight_in, bias_in, weight_out))
    fff(*asked, 1, 3).sum().backward()
    torch.testing.assert_close(x.grad, asked[0].grad)
    assert weight_in.grad is None and weight_out.grad is None


def test_nodes_and_logits_are_not_differentiable_and_double_backward_raises():
    inputs = leaves(make_inputs(3, 6, 6, 1, 2))
    y, visited, logits = torch.ops.fastbert.fff_v1(*inputs, 1, 2, "gelu")
    assert y.requires_grad and not visited.requires_grad and not logits.requires_grad
    (gradient,) = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_autocast_casts_every_input():
    inputs = make_inputs(4, 8, 8, 1, 3, dtype=torch.float32)
    asked = leaves(inputs)
    for dtype in (torch.bfloat16, torch.float16):
        expected = fff(*(t.to(dtype) for t in inputs), 1, 3)
        with torch.autocast("cpu", dtype=dtype):
            with torch.no_grad():
                assert torch.equal(fff(*inputs, 1, 3), expected)
            y = fff(*asked, 1, 3)
        assert y.dtype == dtype and torch.equal(y, expected)
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in asked)


def test_compiled_op_equals_eager_with_gradients():
    layer = FastFeedForward(12, 10, depth=4, trees=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows in (5, 9):
        x = torch.randn(num_rows, 3, 12, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        expected = [x.grad.clone(), layer.weight_in.grad.clone()]
        x.grad = None
        layer.zero_grad()
        z = compiled(x)
        z.sum().backward()
        assert torch.equal(z, y) and torch.equal(x.grad, expected[0])
        assert torch.equal(layer.weight_in.grad, expected[1])
        layer.zero_grad()


class Wrapper(torch.Tensor):
    """A tensor subclass without storage of its own, as quantised and distributed parameters are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrap = lambda value: value.inner if isinstance(value, cls) else value  # noqa: E731
        return function(*map(unwrap, args), **(kwargs or {}))


def test_tensor_subclasses_and_negative_views_go_through_the_dispatcher():
    x, weight_in, bias_in, weight_out = make_inputs(4, 8, 8, 1, 3, dtype=torch.float32)
    expected = fff(x, weight_in, bias_in, weight_out, 1, 3)
    for index in range(4):
        call = [x, weight_in, bias_in, weight_out]
        call[index] = Wrapper(call[index])
        assert torch.equal(fff(*call, 1, 3), expected)
        call[index] = torch._neg_view(-[x, weight_in, bias_in, weight_out][index])
        assert call[index].is_neg() and torch.equal(fff(*call, 1, 3), expected)
    conjugate = torch.complex(torch.zeros_like(x), -x).conj()
    assert torch.equal(fff(conjugate.imag, weight_in, bias_in, weight_out, 1, 3), expected)


def test_negative_views_have_the_gradients_of_what_they_show():
    inputs = make_inputs(4, 8, 8, 1, 3, dtype=torch.float32)
    grad_y = torch.randn(4, 8)
    expected, negated = leaves(inputs), leaves([-t for t in inputs])
    fff(*expected, 1, 3).backward(grad_y)
    fff(*map(torch._neg_view, negated), 1, 3).backward(torch._neg_view(-grad_y))
    for ours, theirs in zip(negated, expected, strict=True):
        assert torch.equal(ours.grad, -theirs.grad)


def test_forward_mode_derivatives_are_refused():
    x, weight_in, bias_in, weight_out = make_inputs(4, 8, 8, 1, 3)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: fff(x, weight_in, bias_in, weight_out, 1, 3), (x,), (x,))


def test_traceable_form_equals_the_op():
    for shape in SHAPES:
        *_, trees, depth = shape
        inputs = make_inputs(*shape)
        torch.testing.assert_close(fff_traceable(*inputs, trees, depth, "gelu"), fff(*inputs, trees, depth, "gelu"))


def test_reference_holds_no_dense_intermediates():
    """At depth 11, 20 000 rows would need 328 MB for all logits; the walk stays under 64 MB above its results."""
    code = """
import resource, torch
from fastbert_hf import fff, use_backend
use_backend("reference"); torch.set_num_threads(1)
x, w_in, w_out = torch.randn(20000, 16), torch.randn(4095, 16), torch.randn(4095, 16)
fff(x[:10], w_in, None, w_out, 1, 11)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fff(x, w_in, None, w_out, 1, 11)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output.strip().splitlines()[-1]) < 64


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
    inputs = make_inputs(40, 16, 8, 2, 4, dtype=torch.float32)
    expected = fff_forward(*inputs, 2, 4, "gelu")
    monkeypatch.setattr("fastbert_hf.fff_reference.GATHERED_ROWS", 14)
    assert all(torch.equal(a, b) for a, b in zip(fff_forward(*inputs, 2, 4, "gelu"), expected, strict=True))


BAD_CALLS = {
    "activation is 'tanh'": {"activation": "tanh"},
    "trees is 0": {"trees": 0},
    "depth is -1": {"depth": -1},
    "3 trees of depth 3 have 45 nodes": {"trees": 3},
    "must be matrices": {"x": torch.zeros(2, 3, 8)},
    "x is 9 wide and weight_in 8": {"x": torch.zeros(2, 9)},
    r"bias_in has shape \(4,\)": {"bias_in": torch.zeros(4)},
    "dtypes are": {"x": torch.zeros(2, 8, dtype=torch.bfloat16)},
    "dtypes are .*int64": {
        "x": torch.zeros(2, 8).long(),
        "weight_in": torch.zeros(15, 8).long(),
        "bias_in": None,
        "weight_out": torch.zeros(15, 8).long(),
    },
    "devices are": {"x": torch.zeros(2, 8, device="meta")},
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


def test_backends_are_listed_with_reasons():
    output = subprocess.run(
        [sys.executable, "-m", "fastbert_hf.kernels"], capture_output=True, text=True, check=True
    ).stdout
    assert "reference  available" in output and "cpu float32:" in output
