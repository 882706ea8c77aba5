"""The native kernels around an encoder's feed-forward blocks: attention, linear layers with int8 weights, both
together, and residual connections with their norms."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert_hf.backends_fastbert import BACKENDS
from tests.kernels.concurrency import check_fork, check_threads
from tests.kernels.encoder_cases import (
    VISIBLE,
    attention_call,
    check_attention,
    check_norm,
    linear_call,
    norm_call,
    parts_of,
    quantized_attention_call,
)
from tests.kernels.properties import DTYPES, embedded

# texts, tokens, heads, size of a head: blocks of 16 keys and of 6 queries, and what is left of them
ATTENTION = [(0, 5, 2, 4), (2, 0, 2, 4), (1, 1, 1, 1), (3, 6, 2, 16), (2, 17, 3, 20), (1, 64, 2, 32), (2, 131, 1, 65)]
LINEAR = [(0, 8, 8), (1, 1, 1), (2, 33, 50), (7, 384, 96), (65, 31, 17), (130, 64, 49), (200, 20, 300)]
NORM = [(0, 8), (1, 1), (3, 16), (5, 37), (70, 384), (400, 100)]
CALLS = {
    "attention": lambda dtype: attention_call(5, 40, 3, 24, dtype=dtype),
    "linear_int8": lambda dtype: linear_call(300, 96, 200, dtype=dtype),
    "attention_int8": lambda dtype: quantized_attention_call(5, 70, 4, 32, dtype=dtype),
    "add_norm": lambda dtype: norm_call(600, 96, dtype=dtype),
}


@pytest.fixture(autouse=True)
def two_threads(native):
    """Of torch, whatever the machine."""


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param](torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention_matches_float64_on_every_instruction_set(instruction_set, shape, visible, dtype):
    check_attention(attention_call(*shape, visible, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_linear_layers_equal_their_reference_on_every_instruction_set(instruction_set, shape, bias, dtype):
    call = linear_call(*shape, bias, dtype)
    assert torch.equal(call.run(), call.run("reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention_with_its_linear_layers_equals_the_three_ops(instruction_set, shape, visible, dtype):
    call = quantized_attention_call(*shape, visible, dtype)
    y, expected = call.run(), call.run("reference")
    assert torch.equal(y, parts_of(call)) and y.dtype == dtype
    distance = (y.double() - expected.double()).norm()
    assert distance <= 0.01 * expected.double().norm() + 1e-6  # a value next to a half goes the other way at times


def test_texts_that_a_core_takes_in_parts_equal_the_three_ops():
    """Queries, keys and values of more than 384 kB a thread."""
    call = quantized_attention_call(9, 150, 4, 32)
    assert torch.equal(call.run(), parts_of(call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM, ids=str)
def test_norms_match_float64_on_every_instruction_set(instruction_set, shape, dtype):
    check_norm(norm_call(*shape, dtype))


@given(
    texts=st.integers(1, 4),
    tokens=st.integers(1, 90),
    heads=st.integers(1, 4),
    size=st.integers(1, 70),
    visible=st.sampled_from(VISIBLE),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_any_shape_matches(native_library, texts, tokens, heads, size, visible, dtype, seed):
    check_attention(attention_call(texts, tokens, heads, size, visible, dtype, seed))
    call = linear_call(texts * tokens, size, 7 * heads, True, dtype, seed)
    assert torch.equal(call.run(), call.run("reference"))
    check_norm(norm_call(tokens, size + 1, dtype, seed))


@pytest.mark.parametrize("layout", [(1, 0, 2), (0, 3, 1), (5, 5, 3)], ids=str)
def test_any_layout_of_x_gives_the_same(call, layout):
    x, *rest = call.arguments
    rows = embedded(x.flatten(0, -2), *layout) if x.dim() == 2 else x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(BACKENDS[call.op]["native"].infer(rows, *rest), call.run())


# ---- values ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_text_or_row_reaches_no_other(instruction_set, call, bad):
    clean = call.run()
    x = call.arguments[0].clone()
    x[2] = bad
    y = BACKENDS[call.op]["native"].infer(x, *call.arguments[1:])
    others = torch.arange(len(x)) != 2
    assert torch.equal(y[others], clean[others]) and not y[2].isfinite().all()


def test_keys_that_are_not_visible_do_not_count():
    call = attention_call(2, 30, 2, 16)
    x, visible, scaling = call.arguments
    changed = x.clone()
    changed[~visible] = 7 * torch.randn_like(changed[~visible])
    y = BACKENDS["attention"]["native"].infer(changed, visible, scaling)
    assert torch.equal(y[visible], call.run()[visible])


@pytest.mark.parametrize("size", [1e-20, 1e4])
def test_tiny_and_huge_scores_match(instruction_set, size):
    """Even weights, and one key alone."""
    x = size * attention_call(2, 33, 2, 8).arguments[0]
    y = BACKENDS["attention"]["native"].infer(x, None, 1.0)
    expected = BACKENDS["attention"]["reference"].infer(x.double().float(), None, 1.0)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * size)


@pytest.mark.parametrize(("weight", "value"), [(127, 1.0), (-127, -1.0), (-127, 1.0)])
@pytest.mark.parametrize("rows", [1, 70])
def test_sums_of_the_largest_products_are_exact(instruction_set, rows, weight, value):
    """The widest row that fits: 66311 products of 255 * 127 are just below 2^31."""
    call = linear_call(rows, 66311, 3)
    _, packed, scale, sums, _ = call.arguments
    packed = packed.clone().fill_(weight)
    padding = packed.view(-1, 3, 4)[-1]
    padding[:, 66311 % 4 or 4 :] = 0
    x = torch.full((rows, 66311), value)
    arguments = (x, packed, scale, torch.full_like(sums, 66311 * weight), None)
    y, expected = (BACKENDS["linear_int8"][name].infer(*arguments) for name in ("native", "reference"))
    assert torch.equal(y, expected)
    torch.testing.assert_close(y, (value * weight * 66311 * scale).expand(rows, 3), rtol=1e-5, atol=0)


# ---- determinism, threads, processes ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_thread_count_changes_no_bit(instruction_set, op, dtype):
    call, results = CALLS[op](dtype), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(call.run())
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_a_text_or_row_does_not_depend_on_its_neighbours(instruction_set, op, dtype):
    call = CALLS[op](dtype)
    whole = call.run()
    for begin, end in [(0, 1), (3, 4), (1, 3), (2, len(whole))]:
        assert torch.equal(call.rows(begin, end).run(), whole[begin:end])


def test_python_threads_do_not_disturb_each_other():
    calls = [make(torch.float32) for make in CALLS.values()] + [attention_call(2, 20, 2, 8), norm_call(50, 33)]
    check_threads([lambda call=call: [call.run()] for call in calls])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize("op", CALLS)
def test_a_forked_child_computes_the_same(op):
    """The parent has used its OpenMP threads; the child does not have them, and must not wait for them."""
    call = CALLS[op](torch.float32).rows(0, 3 if "attention" in op else 100)  # torch.equal stays on one thread
    check_fork(lambda: [call.run()])
