"""The native kernels of trees with int8 weights against their reference, and what they promise beyond the numbers."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert_hf.backends_fastbert import BACKENDS
from fastbert_hf.kernels.native.library import load_library
from fastbert_hf.quantized_layer import QuantizedLeafFeedForward
from fastbert_hf.quantized_weights import pack, quantize_rows
from tests.kernels.cases import ACTIVATIONS, LEAF_SHAPES
from tests.kernels.concurrency import check_fork, check_threads
from tests.kernels.properties import BAD_VALUES, DRAWS, DTYPES, FUNCTIONS, embedded
from tests.kernels.quantized_cases import backend_of, check, quantized_leaves, quantized_nodes

NODE_SHAPES = [
    (0, 8, 8, 1, 2),
    (1, 33, 31, 1, 11),
    (2, 16, 16, 2, 3),
    (3, 1, 1, 1, 0),
    (7, 65, 130, 1, 2),
    (90, 24, 17, 40, 0),
    (300, 17, 70, 1, 4),
    (700, 9, 35, 3, 3),
]
MAKERS = {"leaves": (quantized_leaves, LEAF_SHAPES), "nodes": (quantized_nodes, NODE_SHAPES)}
CASES = [(make, shape) for make, shapes in MAKERS.values() for shape in shapes]


def names(value):
    return getattr(value, "__name__", str(value))


@pytest.fixture(autouse=True)
def two_threads(native):
    """Of torch, whatever the machine."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("make", "shape"), CASES, ids=names)
def test_matches_reference_on_every_instruction_set(instruction_set, make, shape, dtype):
    check(*make(*shape, dtype=dtype))


@pytest.mark.parametrize("leaf_width", [1, 7, 96])
@pytest.mark.parametrize("depth", range(0, 13, 3))
def test_every_width_and_depth_matches_reference(depth, leaf_width):
    check(*quantized_leaves(20 if depth < 9 else 3, 3, 2, 1, depth, leaf_width))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_match_reference(instruction_set, activation, bias, dtype):
    options = {"activation": activation, "bias": bias, "dtype": dtype}
    layer, x = quantized_leaves(60, 24, 20, 2, 3, 9, **options)
    layer.scale_in *= 4  # logits up to about 15: the tails too
    check(layer, x)
    check(*quantized_nodes(60, 24, 20, 2, 3, **options))


@pytest.mark.parametrize("rows", [1, 2, 7, 600])
def test_all_rows_at_one_leaf_match_reference(instruction_set, rows):
    for make, shape in ((quantized_leaves, (rows, 32, 32, 1, 4, 20)), (quantized_nodes, (rows, 32, 32, 1, 4))):
        layer, x = make(*shape)
        check(layer, x[:1].repeat(rows, 1))


def test_an_output_written_past_the_caches_matches_reference():
    """y is above the 8 MB from which the kernels stream."""
    check(*quantized_leaves(2100, 3, 1024, 1, 1, 1))
    check(*quantized_nodes(2100, 3, 1024, 1, 1))


def test_more_rows_than_a_chunk_takes_match_reference():
    """In bfloat16 the sums between trees wait in float32: 256 rows of 8192 are all that the scratch memory holds."""
    check(*quantized_leaves(300, 3, 8192, 2, 1, 1, dtype=torch.bfloat16))


@given(
    rows=st.integers(0, 200),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    trees=st.integers(1, 5),
    depth=st.integers(0, 6),
    leaf_width=st.integers(1, 60),
    **FUNCTIONS,
    **DRAWS,
)
@settings(max_examples=15, deadline=None)
def test_any_shape_matches_reference(
    native_library, rows, widths, trees, depth, leaf_width, activation, bias, dtype, seed
):
    check(*quantized_leaves(rows, *widths, trees, depth, leaf_width, activation, bias, dtype, seed))
    check(*quantized_nodes(rows, *widths, trees, depth, activation, bias, dtype, seed))


def leaf_of_constants(width, weight, *, value=1.0, scale=2.0**-10):
    """One leaf of one neuron of `width` equal weights, which adds its activation to one output."""
    layer = QuantizedLeafFeedForward(width, 1, 0, 1, activation="relu", bias=False)
    layer.input_scale.fill_(1)
    for name, constant, columns in (("in", weight, width), ("out", 127, 1)):
        q = torch.full((1, 1, columns), constant, dtype=torch.int8)
        getattr(layer, f"weight_{name}").copy_(pack(q))
        getattr(layer, f"sum_{name}").copy_(q.sum(-1).flatten().view_as(getattr(layer, f"sum_{name}")))
        getattr(layer, f"scale_{name}").fill_(scale)
    return layer, torch.full((1, width), value)


@pytest.mark.parametrize("rows", [1, 8, 11])
@pytest.mark.parametrize("width", [5, 64, 66311])
@pytest.mark.parametrize(("weight", "value"), [(127, 1.0), (-127, -1.0), (-127, 1.0), (127, -1.0)])
def test_sums_of_the_largest_products_are_exact(instruction_set, weight, value, width, rows):
    """Every product is 255 * 127, up to the width whose sum still fits in int32; then again with one hidden value."""
    layer, x = leaf_of_constants(width, weight, value=value)
    q, scale = (255, 1 / 255) if value > 0 else (0, 1 / 255)
    zero = 0 if value > 0 else 255
    exact = torch.tensor((q - zero) * weight * width, dtype=torch.float64).float()
    logit = exact * 2.0**-10 * torch.tensor(scale, dtype=torch.float32)
    hidden_scale = torch.relu(logit) / 255
    expected = torch.tensor(255.0 * 127) * 2.0**-10 * hidden_scale if logit > 0 else torch.zeros(())
    y = backend_of(layer).infer(x.repeat(rows, 1), *layer.op_arguments())
    assert torch.equal(y, expected.expand(rows, 1))
    check(layer, x.repeat(rows, 1))


def test_every_value_of_a_weight_meets_every_value_of_a_row(instruction_set):
    """All 255 weights in one leaf's neurons, all 256 quantised values among the rows."""
    weights = torch.arange(-127, 128, dtype=torch.int8)
    layer = QuantizedLeafFeedForward(2, 255, 0, 255, activation="relu", bias=False)
    layer.input_scale.fill_(1)
    q_in = torch.stack([weights, torch.zeros_like(weights)], -1)  # (w, H): the second column sets the scale of rows
    layer.weight_in.copy_(pack(q_in.unsqueeze(0)))
    layer.sum_in.copy_(q_in.sum(-1))
    q_out = torch.diag(torch.full((255,), 127, dtype=torch.int8)).unsqueeze(0)
    layer.weight_out.copy_(pack(q_out))
    layer.sum_out.copy_(q_out.sum(-1))
    layer.scale_in.fill_(1)
    layer.scale_out.fill_(1)
    x = torch.stack([torch.arange(256.0), torch.full((256,), 255.0)], -1)
    check(layer, x)
    check(layer, -x)
    reached = backend_of(layer).infer(x, *layer.op_arguments()) > 0
    assert torch.equal(reached[255], weights > 0)


def test_instruction_sets_agree_to_the_last_bit_without_a_confidence(native_library):
    """relu and float rounding are alike everywhere, and sums of integers have no order."""
    layer, x = quantized_leaves(50, 65, 33, 1, 0, 37, "relu")
    before, results = native_library.fff_instruction_set(), []
    for name in (b"avx512_bf16", b"avx512", b"avx2", b"generic"):
        if native_library.fff_select_instruction_set(name):
            results.append(backend_of(layer).infer(x, *layer.op_arguments()))
    native_library.fff_select_instruction_set(before)
    assert results and all(torch.equal(a, results[0]) for a in results)


@given(
    form=st.sampled_from(["leaves", "nodes"]),
    rows=st.integers(1, 70),
    layout=st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 3)),
    bad=st.lists(st.tuples(st.integers(0, 69), BAD_VALUES), max_size=4),
    **DRAWS,
)
@settings(max_examples=20, deadline=None)
def test_any_layout_matches_and_a_bad_row_is_nan_alone(native_library, form, rows, layout, bad, dtype, seed):
    make, sizes = (quantized_leaves, (2, 3, 5)) if form == "leaves" else (quantized_nodes, (2, 3))
    layer, x = make(rows, 21, 18, *sizes, dtype=dtype, seed=seed)
    infer, arguments = backend_of(layer).infer, layer.op_arguments()
    clean = infer(x, *arguments)
    assert torch.equal(infer(embedded(x, *layout), *arguments), clean)
    good = torch.ones(rows, dtype=torch.bool)
    for row, value in bad:
        if row < rows:
            x[row, row % 21] = value
            good[row] = False
    y = infer(x, *arguments)
    assert torch.equal(y[good], clean[good])
    assert y[~good].isnan().all() if form == "leaves" else not y[~good].isfinite().all(1).any()


def test_rows_of_tiny_huge_and_no_values_match_reference(instruction_set):
    layer, x = quantized_leaves(6, 24, 20, 1, 0, 9)
    factors = torch.tensor([0.0, 1e-42, 1e-36, 1e-30, 1e30, 3e38]).unsqueeze(1)
    rows = x / x.abs().amax(1, keepdim=True) * factors
    y = backend_of(layer).infer(rows, *layer.op_arguments())
    expected = backend_of(layer, "reference").infer(rows, *layer.op_arguments())
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-6, equal_nan=True)
    assert torch.equal(y[0], y[1])  # zeros, and what counts as such


@pytest.mark.parametrize("width", [2, 16, 37])
def test_a_largest_value_that_rounds_past_255_becomes_255(instruction_set, width):
    """With a scale of 1, -1.5 rounds to -2 and 253.5 to 254: 256 apart."""
    layer, _ = quantized_leaves(1, width, 20, 1, 0, 9)
    layer.input_scale.fill_(1)
    x = torch.linspace(-1.5, 253.5, width).repeat(3, 1)
    q, scale, zero = quantize_rows(x)
    assert (scale == 1).all() and (zero == 2).all() and (q[:, -1] == 255).all()
    check(layer, x)


@pytest.mark.parametrize("rows", [1, 2, 60])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_leaves_and_routers_off_the_path_reach_nobody(instruction_set, bad, rows):
    layer, x = quantized_leaves(rows, 24, 20, 1, 6, 5)
    y, leaves, _ = backend_of(layer).forward(x, *layer.op_arguments())
    unused = torch.ones(64, dtype=torch.bool)
    unused[leaves.flatten().long()] = False
    visited = torch.cat([2**level - 1 + (leaves.flatten() >> (6 - level)) for level in range(6)])
    off_path = torch.ones(63, dtype=torch.bool)
    off_path[visited.long()] = False
    neurons = unused.repeat_interleave(5)
    for name, where in (
        *((name, off_path) for name in ("router", "threshold")),
        *((name, neurons) for name in ("scale_in", "bias_in")),
        *((name, unused) for name in ("scale_out", "bias_out")),
    ):
        getattr(layer, name)[where] = bad
    assert torch.equal(backend_of(layer).infer(x, *layer.op_arguments()), y)


# ---- determinism, threads, processes ----

THREADED = [
    (quantized_leaves, (1, 900, 800, 2, 1, 700)),
    (quantized_leaves, (2, 800, 900, 1, 0, 800)),
    (quantized_leaves, (300, 48, 130, 2, 3, 50)),
    (quantized_leaves, (600, 24, 33, 2, 5, 7)),
    (quantized_leaves, (400, 160, 160, 1, 2, 90)),
    (quantized_nodes, (700, 96, 200, 1, 8)),
    (quantized_nodes, (1200, 40, 24, 3, 5)),
    (quantized_nodes, (900, 160, 160, 4, 0)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("make", "shape"), THREADED, ids=names)
def test_thread_count_changes_no_bit(instruction_set, make, shape, dtype):
    layer, x = make(*shape, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(backend_of(layer).forward(x, *layer.op_arguments()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


SPLIT = [
    (quantized_leaves, (40, 50, 70, 1, 3, 9)),
    (quantized_leaves, (500, 31, 33, 2, 2, 50)),
    (quantized_leaves, (150, 24, 40, 1, 0, 13)),
    (quantized_nodes, (40, 50, 70, 1, 3)),
    (quantized_nodes, (1100, 96, 80, 1, 7)),
    (quantized_nodes, (20, 16, 24, 30, 0)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("make", "shape"), SPLIT, ids=names)
def test_a_row_does_not_depend_on_its_neighbours(instruction_set, make, shape, dtype):
    layer, x = make(*shape, dtype=dtype)
    whole, rows = backend_of(layer).forward(x, *layer.op_arguments()), shape[0]
    for begin, end in [(0, 1), (3, 4), (5, 7), (2, 11), (1, rows), (rows // 2, rows)]:
        part = backend_of(layer).forward(x[begin:end], *layer.op_arguments())
        assert all(torch.equal(a, b[begin:end]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize(("make", "sizes"), [(quantized_leaves, (2, 4, 9)), (quantized_nodes, (2, 4))], ids=names)
def test_python_threads_do_not_disturb_each_other(make, sizes):
    problems = [make(200 + 10 * i, 40, 40, *sizes, seed=i) for i in range(6)]
    calls = [(backend_of(layer), x, layer.op_arguments()) for layer, x in problems]
    check_threads([lambda call=call: [call[0].infer(call[1], *call[2])] for call in calls])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize(("make", "sizes"), [(quantized_leaves, (1, 4, 90)), (quantized_nodes, (1, 6))], ids=names)
def test_a_forked_child_computes_the_same(make, sizes):
    """The parent has used its OpenMP threads; the child does not have them, and must not wait for them."""
    layer, x = make(600, 40, 40, *sizes)  # small enough for torch's own functions to stay on one thread
    check_fork(lambda: [backend_of(layer).infer(x, *layer.op_arguments())])


# ---- what is refused ----


@pytest.mark.parametrize("op", ["leaf_trees_int8", "fff_int8"])
@pytest.mark.parametrize(("change", "reason"), [({"dtype": torch.float16}, "float16"), ({"device": "meta"}, "meta")])
def test_declines_with_a_reason(op, change, reason):
    x = torch.zeros(2, 4, **change)
    assert reason in BACKENDS[op]["native"].supports(x, x, x, 1, 2, "gelu")


@pytest.mark.parametrize("name", ["router", "input_scale", "weight_in", "scale_in", "weight_out", "sum_out"])
def test_a_tensor_without_memory_is_refused(name):
    layer, x = quantized_leaves(3, 8, 8, 1, 2, 3)
    tensor = getattr(layer, name)
    setattr(layer, name, torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype))
    with pytest.raises(ValueError, match="no memory of its own"):
        backend_of(layer).infer(x, *layer.op_arguments())


def test_the_library_refuses_rows_whose_sums_could_overflow(native_library):
    memory = torch.zeros(64)
    call = [memory.data_ptr()] * 13 + [None, None]
    bad_argument = 3
    assert native_library.fff_int8_leaf_forward(*call, 1, 66312, 1, 1, 1, 0, 0, 0, 1) == bad_argument
    assert native_library.fff_int8_leaf_forward(*call, 1, 1, 1, 1, 66312, 0, 0, 0, 1) == bad_argument


def test_the_backend_says_what_multiplies_int8(instruction_set):
    layer, _ = quantized_leaves(1, 4, 4, 1, 0, 1)
    expected = "avx2" if instruction_set.startswith("avx") else instruction_set
    if instruction_set.startswith("avx512") and torch.cpu._is_vnni_supported():
        expected = "avx512_vnni"
    assert backend_of(layer).describe().endswith(f"products of int8 by {expected}")
    assert load_library().fff_int8_products().decode() == expected
