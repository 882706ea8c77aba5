"""The ops around an encoder's feed-forward blocks, in inference: their definitions, PyTorch's machinery, errors."""

import pytest
import torch
from torch import nn

from fastbert_hf.backends_fastbert import use_backend
from fastbert_hf.encoder_op import add_norm, attention, attention_int8, linear_int8
from fastbert_hf.quantized_weights import unpack
from tests.kernels.encoder_cases import (
    attention_call,
    exact_attention,
    linear_call,
    norm_call,
    quantized_attention_call,
)

CALLS = {
    "attention": (attention, lambda dtype: attention_call(3, 7, 2, 4, dtype=dtype)),
    "attention_int8": (attention_int8, lambda dtype: quantized_attention_call(3, 7, 2, 4, dtype=dtype)),
    "linear_int8": (linear_int8, lambda dtype: linear_call(5, 12, 10, dtype=dtype)),
    "add_norm": (add_norm, lambda dtype: norm_call(5, 12, dtype=dtype)),
}
# the argument that sets the number of texts or rows
ROWS = {"attention": (0, 1), "attention_int8": (0, 1), "linear_int8": (0,), "add_norm": (0, 1)}


@pytest.fixture(params=CALLS)
def op(request):
    return request.param


class Module(nn.Module):
    """A call as a module of its tensors with rows."""

    def __init__(self, op, arguments):
        super().__init__()
        self.op, self.arguments = CALLS[op][0], arguments[len(ROWS[op]) :]

    def forward(self, *tensors):
        return self.op(*tensors, *self.arguments)


def arguments_of(op, dtype=torch.float32):
    return CALLS[op][1](dtype).arguments


# ---- definitions ----


@pytest.mark.parametrize("visible", ["all", "some", "one", "none"])
def test_attention_equals_a_mask_in_float64(visible):
    call = attention_call(3, 9, 2, 4, visible)
    with use_backend("reference"):
        y = attention(*call.arguments)
    torch.testing.assert_close(y.double(), exact_attention(*call.arguments), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_linear_layer_stays_within_the_error_of_its_rounding():
    call = linear_call(40, 24, 30)
    x, packed, scale, _, bias = call.arguments
    step = (x.clamp(min=0).amax(1) - x.clamp(max=0).amin(1)) / 255
    weight = unpack(packed, 30, 24).float() * scale.unsqueeze(1)
    for backend in ("reference", "auto"):
        with use_backend(backend):
            y = linear_int8(*call.arguments)
        bound = step.unsqueeze(1) * weight.abs().sum(1) + 1e-4
        assert ((y - (x @ weight.T + bias)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_keep_their_dtype(op, dtype):
    arguments = arguments_of(op, dtype)
    y = CALLS[op][0](*arguments)
    assert y.dtype == (torch.float32 if op == "add_norm" else dtype)
    wide = [t.float() if isinstance(t, torch.Tensor) and t.dtype == dtype else t for t in arguments]
    expected = CALLS[op][0](*wide).float()
    assert (y.float() - expected).norm() <= 0.02 * expected.norm()


# ---- PyTorch's machinery ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes(op, dtype):
    registered = getattr(torch.ops.fastbert, f"{op}_v1")
    torch.library.opcheck(registered, arguments_of(op, dtype), test_utils=("test_schema", "test_faketensor"))


def test_forward_runs_where_gradients_are_recorded_and_backward_raises(op):
    x, *rest = arguments_of(op)
    expected = CALLS[op][0](x, *rest)
    y = CALLS[op][0](x.clone().requires_grad_(), *rest)
    assert torch.equal(y, expected) and not expected.requires_grad
    with pytest.raises(NotImplementedError, match=f"{op}_v1 has no gradient: it is for inference"):
        y.sum().backward()


@torch.no_grad()
def test_compiled_calls_equal_eager_ones(op):
    arguments = arguments_of(op)
    module = Module(op, arguments)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    rows = arguments[: len(ROWS[op])]
    assert torch.equal(compiled(*rows), module(*rows))


@torch.no_grad()
def test_an_exported_program_has_no_op_of_ours_and_any_number_of_rows(op):
    arguments = arguments_of(op)
    module, count = Module(op, arguments), len(ROWS[op])
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(module, arguments[:count], dynamic_shapes=(tuple({0: rows} for _ in range(count)),))
    assert "fastbert" not in program.graph_module.code
    more = [torch.cat([t, t]) for t in arguments[:count]]
    torch.testing.assert_close(program.module()(*more), module(*more), rtol=1e-2, atol=1e-2)


# ---- wrong arguments ----

BYTES, HALF = torch.zeros(120, dtype=torch.int8), torch.zeros(5, 12, dtype=torch.bfloat16)
WRONG = [
    ("attention", 0, torch.zeros(3, 7, 2, 2, 4), r"query_key_value has shape \(3, 7, 2, 2, 4\); expected \(B, T, 3"),
    ("attention", 0, torch.zeros(3, 7, 3, 2, 4).double(), "query_key_value is torch.float64; expected one of"),
    ("attention", 1, torch.ones(3, 7), r"visible is \(3, 7\) torch.float32 on cpu; expected \(3, 7\) torch.bool"),
    ("attention", 1, torch.ones(3, 6).bool(), r"visible is \(3, 6\) torch.bool on cpu; expected \(3, 7\)"),
    ("attention_int8", 0, torch.zeros(3, 8), r"x has shape \(3, 8\) and there are 2 heads"),
    ("attention_int8", 0, torch.zeros(3, 7, 8).double(), "x is torch.float64; expected one of"),
    ("attention_int8", 0, torch.zeros(3, 7, 12), r"weight has shape \(192,\); expected \(288,\)"),
    ("attention_int8", 1, torch.ones(7, 3).bool(), r"visible is \(7, 3\)"),
    ("attention_int8", 3, torch.zeros(23), r"weight has shape \(192,\); expected \(184,\)"),
    ("attention_int8", 10, 3, r"there are 3 heads; expected \(B, T, H\) with H a multiple"),
    ("linear_int8", 0, torch.zeros(2, 3, 12), r"x has shape \(2, 3, 12\); expected \(N, H\)"),
    ("linear_int8", 0, torch.zeros(2, 0), r"x has shape \(2, 0\) .* rows of 1 to 66311"),
    ("linear_int8", 0, torch.zeros(2, 12).double(), "x is torch.float64"),
    ("linear_int8", 1, BYTES.float(), "weight is torch.float32 on cpu; expected torch.int8"),
    ("linear_int8", 1, BYTES[1:], r"weight has shape \(119,\); expected \(120,\)"),
    ("linear_int8", 2, torch.zeros(10, 1), r"scale \(10, 1\); expected .* a scale for each output"),
    ("linear_int8", 3, torch.zeros(10), "sum is torch.float32 on cpu; expected torch.int32"),
    ("linear_int8", 4, torch.zeros(9), r"bias has shape \(9,\); expected \(10,\)"),
    ("add_norm", 0, HALF, r"x is \(5, 12\) torch.bfloat16; expected \(..., H\) torch.float32"),
    ("add_norm", 1, torch.zeros(5, 11), r"y is \(5, 11\) torch.float32 on cpu; expected \(5, 12\)"),
    ("add_norm", 1, torch.zeros(5, 12).double(), r"y is \(5, 12\) torch.float64"),
    ("add_norm", 2, torch.zeros(11), r"weight is \(11,\) torch.float32 on cpu; expected \(12,\)"),
    ("add_norm", 3, torch.zeros(12).bfloat16(), r"bias is \(12,\) torch.bfloat16"),
]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("name", "place", "value", "message"), WRONG, ids=[f"{w[0]}-{w[3][:24]}" for w in WRONG])
def test_wrong_arguments_raise(name, place, value, message, backend):
    arguments = list(arguments_of(name))
    arguments[place] = value
    with use_backend(backend), pytest.raises(ValueError, match=message):
        CALLS[name][0](*arguments)
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.fastbert, f"{name}_v1")(*arguments)
