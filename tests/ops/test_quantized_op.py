"""The ops of trees with int8 weights: the packed layout, quantisation, error bounds, PyTorch's machinery, errors."""

import pytest
import torch

from fastbert_hf import FastFeedForward, LeafFeedForward
from fastbert_hf.backends_fastbert import use_backend
from fastbert_hf.quantized_layer import QuantizedFastFeedForward, QuantizedLeafFeedForward
from fastbert_hf.quantized_op import fff_int8, leaf_trees_int8
from fastbert_hf.quantized_weights import pack, padded_columns, quantize_rows, quantize_weights, unpack
from tests.oracle import ACTIVATIONS, dense_and_mask, dense_leaves

STEEPEST = {"relu": 1.0, "gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1}  # slope of an activation


def leaves(*sizes, activation="gelu", bias=True, seed=0, **options):
    return _layer(QuantizedLeafFeedForward, LeafFeedForward, sizes, activation, bias, seed, options)


def nodes(*sizes, activation="gelu", bias=True, seed=0, **options):
    return _layer(QuantizedFastFeedForward, FastFeedForward, sizes, activation, bias, seed, options)


def _layer(quantized, floating, sizes, activation, bias, seed, options):
    torch.manual_seed(seed)
    layer = floating(*sizes, activation=activation, bias=bias, initializer_range=0.4)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 1 or name == "bias_out":
                parameter.normal_(std=0.3)
    return quantized.from_float(layer, **options)


LAYERS = {
    "leaves": lambda **options: leaves(12, 10, 3, 7, 2, **options),
    "nodes": lambda **o: nodes(12, 10, 3, 2, **o),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


def op_of(layer):
    name = "leaf_trees_int8_v1" if isinstance(layer, QuantizedLeafFeedForward) else "fff_int8_v1"
    return getattr(torch.ops.fastbert, name)


# ---- the packed layout ----


@pytest.mark.parametrize("columns", [1, 4, 7, 64])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 37, 48])
def test_every_value_lies_where_the_layout_says(rows, columns):
    matrix = torch.randint(-127, 128, (2, rows, columns), dtype=torch.int8)
    packed = pack(matrix)
    width = padded_columns(columns)
    assert width % 4 == 0 and 0 <= width - columns < 4 and packed.shape == (2, rows * width)
    seen = torch.zeros_like(packed, dtype=torch.bool)
    for row in range(rows):
        first, in_block = row // 16 * 16, min(16, rows - row // 16 * 16)
        for column in range(columns):
            place = first * width + column // 4 * in_block * 4 + (row - first) * 4 + column % 4
            assert torch.equal(packed[:, place], matrix[:, row, column])
            seen[:, place] = True
    assert (packed[~seen] == 0).all()
    assert torch.equal(unpack(packed, rows, columns), matrix)


# ---- quantisation ----


def test_weights_are_off_by_half_a_step_at_most():
    matrix = torch.randn(5, 40) * torch.tensor([1e-30, 1e-3, 1, 1e3, 0]).unsqueeze(1)
    q, scale = quantize_weights(matrix)
    assert q.dtype == torch.int8 and q.abs().amax(1).tolist() == [127, 127, 127, 127, 0]
    error = (q.double() * scale.double().unsqueeze(1) - matrix.double()).abs()
    assert (error <= 0.5001 * scale.double().unsqueeze(1)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_raise(bad):
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize_weights(torch.tensor([[1.0, bad]]))


def test_rows_are_off_by_a_step_at_most_and_zero_is_exact():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 33, generator=generator) + torch.linspace(-4, 4, 400).unsqueeze(1)
    rows[:, 5] = 0
    rows[7] = 0
    q, scale, zero = quantize_rows(rows)
    assert q.min() == 0 and q.max() == 255 and (zero >= 0).all() and (zero <= 255).all()
    restored = scale * (q - zero)
    assert ((restored - rows).abs() <= 1.0001 * scale).all() and (restored[:, 5] == 0).all()
    assert ((restored - rows).abs() <= 0.5001 * scale).double().mean() > 0.98  # where nothing is cut to 255
    assert (scale[7] == 0) and (rows.amax(1) - rows.amin(1) <= 255.001 * scale.squeeze(1)).all()


def test_rows_that_are_not_finite_have_no_scale_and_tiny_ones_count_as_zeros():
    inf = float("inf")
    rows = torch.tensor([[1.0, inf], [-inf, 1.0], [float("nan"), 1.0], [3e38, -3e38], [1e-40, 0.0], [1.0, 2.0]])
    q, scale, zero = quantize_rows(rows)
    assert q.isfinite().all() and zero.isfinite().all()
    assert scale.isnan().flatten().tolist() == [True] * 4 + [False] * 2
    assert scale[4] == 0 and scale[5] > 0


# ---- results ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(7, 8, 0, 5, 1), (33, 17, 3, 20, 2), (64, 40, 5, 3, 1)], ids=str)
@torch.no_grad()
def test_leaves_stay_within_the_error_of_their_rounding(sizes, activation, bias):
    """Against a dense oracle with the weights that the int8 ones stand for. A row of x is off by a step, which its
    products carry to the logits; activations have slopes up to 1.13; a hidden value is off by another step."""
    layer = leaves(*sizes, activation=activation, bias=bias)
    wide = layer.dequantize().double()
    x = torch.randn(60, sizes[0])
    expected, leaf, _ = dense_leaves(x.double(), *wide.op_arguments())
    y = leaf_trees_int8(x, *layer.op_arguments())
    taken, confidence = layer.route(x)
    assert torch.equal(taken, leaf)  # the paths of float32

    bound = torch.zeros_like(expected)
    step = quantize_rows(x * layer.input_scale)[1].double()
    of_q = unpack(layer.weight_in, layer.leaf_width, layer.in_features).double().abs().sum(-1)  # (P*m, w)
    of_logits = layer.scale_in.double().view_as(of_q) * of_q
    for tree in range(layer.trees):
        row_leaf = leaf[:, tree] + tree * 2**layer.depth
        weight_in = wide.weight_in.unflatten(0, (-1, layer.leaf_width))[row_leaf]
        logits = (weight_in @ x.double().unsqueeze(-1)).squeeze(-1)
        if bias:
            logits = logits + wide.bias_in.view(-1, layer.leaf_width)[row_leaf]
        hidden = ACTIVATIONS[activation](logits)
        error = STEEPEST[activation] * step * of_logits[row_leaf]  # (N, w)
        span = hidden.amax(1).clamp(min=0) - hidden.amin(1).clamp(max=0) + 2 * error.amax(1)
        error = error + span.unsqueeze(1) / 255
        weight_out = wide.weight_out.unflatten(0, (-1, layer.leaf_width))[row_leaf].abs()  # (N, w, H_out)
        bound += confidence[:, tree, None] * (error.unsqueeze(1) @ weight_out).squeeze(1)
    error = (y - expected).abs()
    assert (error <= bound + 1e-5).all()
    assert error.norm() < 0.02 * expected.norm()  # such bounds are far from what happens


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(7, 8, 0, 4), (33, 17, 3, 2), (64, 40, 5, 1)], ids=str)
@torch.no_grad()
def test_nodes_equal_the_oracle_with_dequantized_weights(sizes, activation, bias):
    layer = nodes(*sizes, activation=activation, bias=bias)
    wide = layer.dequantize().double()
    x = torch.randn(60, sizes[0])
    expected, visited = dense_and_mask(
        x.double(), wide.weight_in, wide.bias_in, wide.weight_out, layer.trees, activation
    )
    torch.testing.assert_close(fff_int8(x, *layer.op_arguments()).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.route(x), visited)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_give_the_result_of_the_same_float32_rows(layer, dtype):
    x = torch.randn(30, 12).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and torch.equal(y, layer(x.float()).to(dtype))


def test_a_bad_row_of_leaves_is_nan_and_reaches_no_other():
    layer, x = LAYERS["leaves"](), torch.randn(6, 12)
    for backend in ("reference", "auto"):
        with use_backend(backend):
            clean, bad = layer(x), x.clone()
            bad[1, 3], bad[4, 0] = float("nan"), float("inf")
            y = layer(bad)
            assert y[[1, 4]].isnan().all() and torch.equal(y[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


# ---- PyTorch's machinery ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes(layer, dtype):
    arguments = (torch.randn(5, 12, dtype=dtype), *layer.op_arguments())
    torch.library.opcheck(op_of(layer), arguments, test_utils=("test_schema", "test_faketensor"))


def test_forward_runs_where_gradients_are_recorded_and_backward_raises(layer):
    x = torch.randn(5, 12)
    expected = layer(x)
    assert not expected.requires_grad
    y = layer(x.requires_grad_())
    assert torch.equal(y, expected)
    with pytest.raises(NotImplementedError, match="has no gradient: it is for inference"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12)])
def test_compiled_layer_equals_eager(layer, shape):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@torch.no_grad()
def test_exported_program_has_no_op_of_ours_and_any_number_of_rows(layer):
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(4, 12),), dynamic_shapes=({0: rows},))
    assert "fastbert" not in program.graph_module.code
    x = torch.randn(9, 12)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_autocast_leaves_the_rows_as_they_are(layer):
    x = torch.randn(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(layer(x), layer(x.clone())) and layer(x).dtype == torch.float32
        assert layer(x.bfloat16()).dtype == torch.bfloat16


# ---- wrong arguments ----

WRONG = {
    "leaves": [
        ({"x": torch.zeros(2, 11)}, r"router has shape \(14, 12\); expected \(14, 11\)"),
        ({"x": torch.zeros(2, 12, dtype=torch.float64)}, "x is torch.float64; expected one of torch.float32"),
        ({"x": torch.zeros(2, 2, 12)}, r"x has shape \(2, 2, 12\); expected \(N, H\)"),
        ({"x": torch.zeros(2, 0)}, "x is 0 wide; expected 1 to 66311"),
        ({"x": torch.zeros(2, 66312)}, "x is 66312 wide; expected 1 to 66311, as sums are int32"),
        ({"router": torch.zeros(14, 12).bfloat16()}, "router is torch.bfloat16 on cpu; expected torch.float32"),
        ({"threshold": torch.zeros(15)}, r"threshold has shape \(15,\); expected \(14,\)"),
        ({"input_scale": torch.zeros(1)}, r"input_scale has shape \(1,\); expected \(12,\)"),
        ({"weight_in": torch.zeros(16, 84)}, "weight_in is torch.float32 on cpu; expected torch.int8"),
        (
            {"weight_in": torch.zeros(112, 12, dtype=torch.int8)},
            r"weight_in has shape \(112, 12\); expected \(16, 84\)",
        ),
        ({"scale_in": torch.zeros(113)}, r"scale_in has shape \(113,\); .* multiple of 16, the leaves of 2 trees"),
        ({"sum_in": torch.zeros(112)}, "sum_in is torch.float32 on cpu; expected torch.int32"),
        ({"bias_in": torch.zeros(111)}, r"bias_in has shape \(111,\); expected \(112,\)"),
        ({"weight_out": torch.zeros(16, 70, dtype=torch.int8)}, r"weight_out has .* expected \(16, 80\)"),
        ({"scale_out": torch.zeros(10)}, r"scale_out has shape \(10,\); expected \(16, 10\)"),
        ({"scale_out": torch.zeros(16, 0)}, "y is 0 wide"),
        ({"sum_out": torch.zeros(16, 10, device="meta")}, "sum_out is torch.float32 on meta"),
        ({"bias_out": torch.zeros(16, 9)}, r"bias_out has shape \(16, 9\); expected \(16, 10\)"),
        ({"trees": 0}, "trees is 0"),
        ({"depth": -1}, "depth is -1"),
        ({"activation": "swish"}, "activation is 'swish'"),
    ],
    "nodes": [
        ({"x": torch.zeros(2, 11)}, r"weight_in has shape \(30, 12\); expected \(30, 11\)"),
        ({"x": torch.zeros(2, 12, dtype=torch.float64)}, "x is torch.float64"),
        ({"x": torch.zeros(2, 0)}, "x is 0 wide and y is 10 wide"),
        ({"weight_in": torch.zeros(30, 12).bfloat16()}, "weight_in is torch.bfloat16 on cpu; expected torch.float32"),
        ({"bias_in": torch.zeros(29)}, r"bias_in has shape \(29,\); expected \(30,\)"),
        ({"weight_out": torch.zeros(30, 10)}, "weight_out is torch.float32 on cpu; expected torch.int8"),
        ({"weight_out": torch.zeros(30, 9, dtype=torch.int8)}, r"weight_out has .* expected \(30, 10\)"),
        ({"scale_out": torch.zeros(10)}, r"scale_out has shape \(10,\); expected \(30,\)"),
        ({"output_scale": torch.zeros(10, 1)}, r"output_scale has shape \(10, 1\); expected \(10,\)"),
        ({"trees": 0}, "trees is 0"),
        ({"activation": "swish"}, "activation is 'swish'"),
    ],
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    ("form", "change", "message"),
    [(form, *case) for form, cases in WRONG.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_wrong_arguments_raise(form, change, message, backend):
    layer = LAYERS[form]()
    names = ("x", *layer._buffers, "trees", "depth", "activation")
    arguments = dict(zip(names, (torch.zeros(2, 12), *layer.op_arguments()), strict=True)) | change
    function = leaf_trees_int8 if form == "leaves" else fff_int8
    with use_backend(backend), pytest.raises(ValueError, match=message):
        function(*arguments.values())
    with pytest.raises(ValueError, match=message):
        op_of(layer)(*arguments.values())
