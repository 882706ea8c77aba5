"""What both ops promise alike: the numbers of an independent dense oracle, and PyTorch's machinery around them."""

import copy
import subprocess
import sys

import pytest
import torch

from fastbert_hf.backends_fastbert import BACKENDS, use_backend
from tests.forms import FORMS, LEAVES, NODES, leaves_of, with_gradients

# N, H, H_out, trees, depth
SHAPES = [
    (7, 8, 8, 1, 3),
    (5, 7, 3, 2, 2),
    (1, 16, 5, 1, 11),
    (3, 4, 4, 5, 0),
    (40, 33, 17, 4, 4),
    (2, 1, 1, 64, 1),
]


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def form(request):
    return request.param


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_every_gradient_equal_the_dense_oracle(form, shape, activation, bias):
    *_, trees, depth = shape
    inputs = form.inputs(*shape, bias=bias)
    ours, theirs = with_gradients(inputs), with_gradients(inputs)
    y = form.function(*ours, trees, depth, activation)
    expected = form.oracle(*theirs, trees, depth, activation)
    torch.testing.assert_close(y, expected)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    expected.backward(grad_y)
    for name, a, b in zip(("x", *form.parameter_names), ours, theirs):
        if a is not None:
            wanted = torch.zeros_like(b) if b.grad is None else b.grad
            torch.testing.assert_close(a.grad, wanted, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("bias", [True, False])
def test_float64_gradcheck_and_opcheck(form, bias):
    inputs = with_gradients(form.inputs(3, 4, 3, 2, 2, bias=bias))
    wanted = [t for t in inputs if t is not None]

    def call(*tensors):
        given = iter(tensors)
        return form.op(*(t if t is None else next(given) for t in inputs), 2, 2, "gelu")[0]

    assert torch.autograd.gradcheck(call, wanted)
    torch.library.opcheck(form.op.default, (*inputs, 2, 2, "gelu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_accumulate_in_float32(form, dtype):
    inputs = form.inputs(50, 24, 24, 2, 5, dtype=dtype)
    wide = [t.double() for t in inputs]
    # the same path: only rows whose decisions rounding of the inputs leaves clear are compared
    clear = ~form.near_ties(wide[0], dict(zip(form.parameter_names, wide[1:])), 2, 5)
    assert clear.sum() > 20
    y, *routes, logits = form.op(*inputs, 2, 5, "gelu")
    _, *wide_routes, wide_logits = form.op(*wide, 2, 5, "gelu")
    assert y.dtype == dtype and logits.dtype == torch.float32
    for narrow, expected in zip((*routes, logits), (*wide_routes, wide_logits)):
        torch.testing.assert_close(narrow[clear].to(expected.dtype), expected[clear], atol=2e-5, rtol=1e-5)
    expected = form.function(*wide, 2, 5).to(dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y[clear], expected[clear], atol=2e-5, rtol=2 * eps)


@pytest.mark.parametrize("depth", [0, 3])
def test_no_rows_give_no_gradient(form, depth):
    x, *parameters = with_gradients(form.inputs(0, 6, 5, 1, depth))
    y = form.function(x, *parameters, 1, depth)
    assert y.shape == (0, 5)
    y.sum().backward()
    assert x.grad.shape == (0, 6)
    assert all(t.grad.shape == t.shape and (t.grad == 0).all() for t in parameters)


@pytest.mark.parametrize(("width", "width_out"), [(0, 4), (4, 0), (0, 0)])
def test_empty_widths_work(form, width, width_out):
    """As they do in a matrix product: without columns every logit is its bias."""
    shapes = form.shapes(width, width_out, 2, 2)
    x, *parameters = (torch.randn(shape, requires_grad=True) for shape in [(3, width), *shapes.values()])
    for backend in BACKENDS[form.name].values():
        if backend.unavailable() is None and backend.supports(x, x, x, 2, 2, "gelu") is None:
            with use_backend(backend.name):
                y = form.function(x, *parameters, 2, 2)
                y.sum().backward()
            expected = form.oracle(*(t.detach() for t in (x, *parameters)), 2, 2)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_bad_row_stays_alone_and_parameters_off_its_path_do_not_matter(form):
    x, *parameters = form.inputs(6, 8, 8, 1, 4, dtype=torch.float32)
    expected = form.function(x, *parameters, 1, 4)
    poisoned = x.clone()
    poisoned[2], poisoned[4] = float("nan"), float("inf")
    y = form.function(poisoned, *parameters, 1, 4)
    others = [0, 1, 3, 5]
    assert torch.equal(y[others], expected[others]) and y[2].isnan().all() and not y[4].isfinite().any()
    asked = with_gradients((x, *parameters))
    form.function(*asked, 1, 4).sum().backward()
    unused = [(t.grad == 0).view(len(t), -1).all(1) for t in asked[1:]]
    assert all(rows.any() and not rows.all() for rows in unused)
    walked = form.op(x, *parameters, 1, 4, "gelu")[1]
    for name, parameter in zip(form.parameter_names, parameters):
        parameter[rows_off_every_path(form, name, walked, 4)] = float("nan")
    assert torch.equal(form.function(x, *parameters, 1, 4), expected)


def rows_off_every_path(form, name, walked, depth):
    """Rows of a parameter of one tree that no row reaches; `walked`: visited nodes, or leaves."""
    if form.leaf_width is None:
        used, count = walked, 2 ** (depth + 1) - 1
    elif name in ("router", "threshold"):
        levels = torch.arange(depth)
        used, count = 2**levels - 1 + (walked >> (depth - levels)), 2**depth - 1
    elif name == "bias_out":
        used, count = walked, 2**depth
    else:
        used = walked * form.leaf_width + torch.arange(form.leaf_width)
        count = 2**depth * form.leaf_width
    off = torch.ones(count, dtype=torch.bool)
    off[used.flatten().long()] = False
    assert off.any()
    return off


def test_strided_inputs_equal_contiguous_ones(form):
    inputs = form.inputs(6, 8, 5, 1, 3)
    y = form.function(*with_gradients(inputs), 1, 3)
    gradients = []
    for strided in (False, True):
        leaves = with_gradients(inputs)
        call = [spread(t) for t in leaves] if strided else leaves
        y = form.function(*call, 1, 3)
        torch.testing.assert_close(y, form.function(*inputs, 1, 3))
        y.square().sum().backward()
        gradients.append([t.grad for t in leaves])
    for given, expected in zip(*gradients):
        torch.testing.assert_close(given, expected)


def spread(tensor):
    """The same values with every second column unused, or as columns of another matrix."""
    if tensor.dim() == 1:
        return tensor.repeat_interleave(2)[::2]
    return tensor.T.contiguous().T if tensor.shape[1] % 2 else tensor.repeat_interleave(2, 1)[:, ::2]


def test_only_wanted_gradients_are_computed(form):
    inputs = form.inputs(5, 8, 8, 1, 3)
    asked = with_gradients(inputs)
    form.function(*asked, 1, 3).sum().backward()
    for index in range(len(inputs)):
        call = [t.clone() for t in inputs]
        call[index].requires_grad_()
        form.function(*call, 1, 3).sum().backward()
        torch.testing.assert_close(call[index].grad, asked[index].grad)
        assert all(t.grad is None for place, t in enumerate(call) if place != index)


def test_routes_are_not_differentiable_and_double_backward_raises(form):
    inputs = with_gradients(form.inputs(3, 6, 6, 1, 2))
    y, *saved = form.op(*inputs, 1, 2, "gelu")
    assert y.requires_grad and not any(t.requires_grad for t in saved)
    (gradient,) = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_forward_mode_derivatives_are_refused(form):
    x, *parameters = form.inputs(4, 8, 8, 1, 3)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: form.function(x, *parameters, 1, 3), (x,), (x,))


def test_autocast_casts_every_input(form):
    inputs = form.inputs(4, 8, 8, 1, 3, dtype=torch.float32)
    asked = with_gradients(inputs)
    for dtype in (torch.bfloat16, torch.float16):
        expected = form.function(*(t.to(dtype) for t in inputs), 1, 3)
        with torch.autocast("cpu", dtype=dtype):
            with torch.no_grad():
                assert torch.equal(form.function(*inputs, 1, 3), expected)
            y = form.function(*asked, 1, 3)
        assert y.dtype == dtype and torch.equal(y, expected)
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in asked)


def test_compiled_layer_equals_eager_with_gradients(form):
    layer = form.layer(12, 10, 4, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows in (5, 9):
        results = []
        x = torch.randn(num_rows, 3, 12, requires_grad=True)
        for run in (layer, compiled):
            x.grad = None
            layer.zero_grad()
            y = run(x)
            y.square().sum().backward()
            results.append([y, x.grad, *(p.grad for p in layer.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_state_of_a_layer_survives_copies_and_dtypes(form):
    layer = form.layer(8, 8, 2, bias=False)
    assert all(getattr(layer, name) is None for name in form.biases)
    assert set(layer.state_dict()) == set(form.parameter_names) - set(form.biases)
    x = torch.randn(3, 8)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_meta_and_fake_tensors_have_the_shapes_of_a_call(form):
    """Every output, backward included, under dtypes of both kinds of sum."""
    for dtype in (torch.bfloat16, torch.float64):
        inputs = form.inputs(3, 8, 6, 2, 2, dtype=dtype)
        real = form.op(*inputs, 2, 2, "gelu")
        meta = [t.to("meta").requires_grad_() for t in inputs]
        for given, expected in zip(form.op(*meta, 2, 2, "gelu"), real, strict=True):
            assert (given.shape, given.dtype, given.device.type) == (expected.shape, expected.dtype, "meta")
        form.function(*meta, 2, 2).sum().backward()
        assert all(t.grad.shape == t.shape and t.grad.dtype == dtype for t in meta)


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


def test_tensor_subclasses_and_negative_views_go_through_the_dispatcher(form):
    inputs = form.inputs(4, 8, 8, 1, 3, dtype=torch.float32)
    expected = form.function(*inputs, 1, 3)
    for index, tensor in enumerate(inputs):
        for other in (Wrapper(tensor), torch._neg_view(-tensor)):
            call = [*inputs[:index], other, *inputs[index + 1 :]]
            assert torch.equal(form.function(*call, 1, 3), expected)
    x, *parameters = inputs
    conjugate = torch.complex(torch.zeros_like(x), -x).conj()
    assert conjugate.imag.is_neg() and torch.equal(form.function(conjugate.imag, *parameters, 1, 3), expected)


def test_negative_views_have_the_gradients_of_what_they_show(form):
    inputs = form.inputs(4, 8, 8, 1, 3, dtype=torch.float32)
    grad_y = torch.randn(4, 8)
    expected, negated = with_gradients(inputs), with_gradients([-t for t in inputs])
    form.function(*expected, 1, 3).backward(grad_y)
    form.function(*map(torch._neg_view, negated), 1, 3).backward(torch._neg_view(-grad_y))
    for ours, theirs in zip(negated, expected, strict=True):
        assert torch.equal(ours.grad, -theirs.grad)


@pytest.mark.parametrize("form", [NODES, leaves_of(1), LEAVES], ids=lambda form: f"{form.name}-{form.leaf_width}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_traceable_form_equals_the_op(form, shape):
    *_, trees, depth = shape
    inputs = form.inputs(*shape)
    results = []
    for function in (form.function, form.traceable):
        asked = with_gradients(inputs)
        y = function(*asked, trees, depth, "gelu")
        y.square().sum().backward()
        results.append([y, *(torch.zeros_like(t) if t.grad is None else t.grad for t in asked)])
    for given, expected in zip(*results):
        torch.testing.assert_close(given, expected)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_exported_and_traced_layers_give_the_numbers_of_the_op(form):
    layer = form.layer(8, 6, 3, 2, initializer_range=0.5).eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(5, 8),), dynamic_shapes=({0: rows},))
    assert not any("fastbert" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    traced = torch.jit.trace(layer, torch.randn(5, 8), check_trace=False)
    for num_rows in (2, 33):
        x = torch.randn(num_rows, 8)
        torch.testing.assert_close(program.module()(x), layer(x))
        torch.testing.assert_close(traced(x), layer(x))


def test_references_hold_no_dense_intermediates():
    """20 000 rows would need 328 MB for all logits at depth 11, and 655 MB for the neurons of all 256 leaves; the
    walk, and then the leaves, stay under 64 MB above their results."""
    code = """
import resource, torch
from fastbert_hf import fff, leaf_trees, use_backend

def grown(call, few):
    few()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024

use_backend("reference"); torch.set_num_threads(1)
x, w_in, w_out = torch.randn(20000, 16), torch.randn(4095, 16), torch.randn(4095, 16)
nodes = (w_in, None, w_out, 1, 11)
router, w_in, w_out = torch.randn(255, 16), torch.randn(8192, 16), torch.randn(8192, 16)
leaves = (router, torch.zeros(255), w_in, None, w_out, None, 1, 8)
print(grown(lambda: fff(x, *nodes), lambda: fff(x[:10], *nodes)))
print(grown(lambda: leaf_trees(x, *leaves), lambda: leaf_trees(x[:10], *leaves)))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(int(megabytes) < 64 for megabytes in output.split()[-2:])


BAD_CALLS = {
    "activation is 'tanh'": {"activation": "tanh"},
    "trees is 0": {"trees": 0},
    "depth is -1": {"depth": -1},
    "must be matrices": {"x": torch.zeros(2, 3, 8)},
    r"bias_in has shape \(4,\)": {"bias_in": torch.zeros(4)},
    "dtypes are": {"x": torch.zeros(2, 8, dtype=torch.bfloat16)},
    "devices are": {"x": torch.zeros(2, 8, device="meta")},
}


def good_call(form):
    tensors = {name: torch.zeros(shape) for name, shape in form.shapes(8, 8, 1, 3).items()}
    return {"x": torch.zeros(2, 8), **tensors, "trees": 1, "depth": 3, "activation": "gelu"}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_raise_a_value_error_that_names_them(form, message):
    with pytest.raises(ValueError, match=message):
        form.function(**good_call(form) | BAD_CALLS[message])


def test_every_tensor_of_another_dtype_device_or_number_of_dimensions_raises(form):
    good = good_call(form)
    form.function(**good)
    for name in ("x", *form.parameter_names):
        for change, message in (
            (good[name].double(), "dtypes are .*float64"),
            (good[name].long(), "dtypes are .*int64"),
            (good[name].to("meta"), "devices are .*meta"),
            (good[name].unsqueeze(0), f"{name} (has shape|.*must be matrices)|must be matrices"),
        ):
            with pytest.raises(ValueError, match=message):
                form.function(**good | {name: change})
    whole_numbers = {name: t.long() for name, t in good.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(ValueError, match=r"dtypes are .*int64"):
        form.function(**good | whole_numbers)
