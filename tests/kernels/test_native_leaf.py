"""The native kernels of leaf trees against the reference: output, routes, logits and every gradient.

test_native_reliability.py holds what both forms of tree promise beyond the numbers.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert_hf.backends_fastbert import BACKENDS
from tests.kernels.cases import ACTIVATIONS, LEAF_SHAPES, TORCH_ACTIVATIONS, check, make_leaf_problem
from tests.kernels.properties import DRAWS, DTYPES, FUNCTIONS, LAYOUTS, check_layout_and_bad_rows


@pytest.fixture
def native_leaves(native):
    """The backend of leaf trees, and two threads."""
    return BACKENDS["leaf_trees"]["native"]


@pytest.fixture(scope="session")
def native_leaves_backend(native_library):
    """The same for property tests, which run many examples per call of the test."""
    return BACKENDS["leaf_trees"]["native"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LEAF_SHAPES, ids=str)
def test_matches_reference_on_every_instruction_set(native_leaves, instruction_set, shape, dtype):
    check(native_leaves, make_leaf_problem(*shape, dtype=dtype))


@pytest.mark.parametrize("leaf_width", [1, 7, 96, 192])
@pytest.mark.parametrize("depth", range(0, 13, 3))
def test_every_width_and_depth_matches_reference(native_leaves, depth, leaf_width):
    rows = 20 if depth < 9 else 3
    check(native_leaves, make_leaf_problem(rows, 3, 2, 1, depth, leaf_width))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_match_reference(native_leaves, instruction_set, activation, bias, dtype):
    problem = make_leaf_problem(60, 24, 20, 2, 3, 9, activation, bias, dtype)
    problem.weight_in *= 4  # logits up to about 15: the tails too
    check(native_leaves, problem)


MASKS = [mask for mask in itertools.product([False, True], repeat=7) if sum(mask) in (0, 1, 6)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_only_wanted_gradients_are_computed(native_leaves, bias, dtype):
    """None, one, and all but one of the seven; at depth 0 routers have no rows."""
    for depth in (0, 2):
        problem = make_leaf_problem(30, 20, 28, 2, depth, bias=bias, dtype=dtype)
        for mask in MASKS:
            if bias or not (mask[4] or mask[6]):
                problem.output_mask = list(mask)
                check(native_leaves, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 600])
def test_all_rows_at_one_leaf_match_reference(native_leaves, rows, dtype):
    problem = make_leaf_problem(rows, 32, 32, 1, 4, 20, dtype=dtype)
    problem.x[:] = problem.x[:1].clone()
    check(native_leaves, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_output_written_past_the_caches_matches_reference(native_leaves, dtype):
    """y is above the 8 MB from which the kernels stream."""
    check(native_leaves, make_leaf_problem(2100 if dtype == torch.float32 else 4200, 3, 1024, 1, 1, 1, dtype=dtype))


def test_more_rows_than_a_chunk_takes_match_reference(native_leaves):
    """In bfloat16 the sums between trees wait in float32: 256 rows of 8192 are all that the scratch memory holds."""
    check(native_leaves, make_leaf_problem(300, 3, 8192, 2, 1, 1, dtype=torch.bfloat16))


@given(
    rows=st.integers(0, 300),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    trees=st.integers(1, 5),
    depth=st.integers(0, 6),
    leaf_width=st.integers(1, 60),
    **FUNCTIONS,
    **DRAWS,
)
@settings(max_examples=15, deadline=None)
def test_any_shape_matches_reference(
    native_leaves_backend, rows, widths, trees, depth, leaf_width, activation, bias, dtype, seed
):
    problem = make_leaf_problem(rows, *widths, trees, depth, leaf_width, activation, bias, dtype, seed)
    check(native_leaves_backend, problem)


@given(
    shape=st.sampled_from([(1, 0, 7), (1, 12, 1), (2, 7, 3), (3, 5, 9), (16, 3, 2), (40, 0, 1), (30, 2, 3)]),
    rows=st.integers(0, 70),
    **LAYOUTS,
    **DRAWS,
)
@settings(max_examples=20, deadline=None)
def test_any_layout_path_and_bad_row_matches_reference(
    native_leaves_backend, shape, rows, widths, layout, one_path, bad, dtype, seed
):
    problem = make_leaf_problem(rows, *widths, *shape, dtype=dtype, seed=seed)
    check_layout_and_bad_rows(native_leaves_backend, problem, one_path, layout, bad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 60])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_leaves_and_routers_off_the_path_reach_nobody(native_leaves, instruction_set, bad, rows, dtype):
    problem = make_leaf_problem(rows, 24, 20, 1, 6, 5, dtype=dtype)
    clean, *saved = native_leaves.forward(problem.x, *problem.parameters())
    before = problem.backward(native_leaves, saved)
    unused = torch.ones(64, dtype=torch.bool)
    unused[saved[0].flatten().long()] = False
    assert unused.any()
    visited = torch.cat([2**level - 1 + (saved[0].flatten() >> (6 - level)) for level in range(6)])
    off_path = torch.ones(63, dtype=torch.bool)
    off_path[visited.long()] = False
    neurons = unused.repeat_interleave(5)
    rows_of = dict(router=off_path, threshold=off_path, bias_out=unused)
    for name in problem.names[1:]:
        getattr(problem, name)[rows_of.get(name, neurons)] = bad
    assert torch.equal(native_leaves.infer(problem.x, *problem.parameters()), clean)
    gradients = problem.backward(native_leaves, saved)
    assert all(torch.equal(a, b) for a, b in zip(gradients, before))
    for name, gradient in zip(problem.names[1:], gradients[1:]):
        assert (gradient[rows_of.get(name, neurons)] == 0).all(), name


@pytest.mark.parametrize("rows", [1, 9])
def test_bfloat16_sums_lose_no_more_than_float32_ones(native_leaves, instruction_set, rows):
    """Logits keep what a bfloat16 sum or product would drop, and so do hidden values."""
    width = 70  # a full vector and a rest
    x = torch.full((rows, width), 1 + 2.0**-7, dtype=torch.bfloat16)
    weight_in = torch.full((3, width), 1 - 2.0**-7, dtype=torch.bfloat16)
    no_router = x.new_zeros(0, width), x.new_zeros(0)
    weight_out = torch.tensor([[2.0**7], [-(2.0**7)], [1.0]], dtype=torch.bfloat16)
    weight_in[1, 0] = 1
    call = (x, *no_router, weight_in, None, weight_out, None, 1, 0, "relu")
    y, *_, logits = native_leaves.forward(*call)
    exact = x.double() @ weight_in.double().T
    assert torch.equal(logits.squeeze(1).double(), exact)
    assert torch.equal(y, (exact @ weight_out.double()).to(torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 9])
def test_subnormal_bfloat16_values_count_as_themselves_or_as_zero(native_leaves, instruction_set, rows):
    """The processor's products of bfloat16 pairs take subnormals for zeros; no other element changes."""
    x = torch.full((rows, 40), 2.0**-130, dtype=torch.bfloat16)
    x[:, ::2] = 1
    weight_in = torch.ones(2, 40, dtype=torch.bfloat16)
    weight_in[1] = 2.0**100  # 20 products of 2^-30
    no_router = x.new_zeros(0, 40), x.new_zeros(0)
    *_, logits = native_leaves.forward(x, *no_router, weight_in, None, x.new_ones(2, 1), None, 1, 0, "relu")
    expected = 20 * torch.tensor([1, 2.0**100]).expand(rows, 2)
    assert torch.equal(logits.squeeze(1), expected)
    x[:, ::2] = 0
    *_, logits = native_leaves.forward(x, *no_router, weight_in, None, x.new_ones(2, 1), None, 1, 0, "relu")
    kept = torch.tensor([20 * 2.0**-130, 20 * 2.0**-30]).expand(rows, 2)
    flushes = instruction_set == "avx512_bf16"
    assert torch.equal(logits.squeeze(1), torch.zeros_like(kept) if flushes else kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_match_contiguous_ones(native_leaves, dtype):
    problem = make_leaf_problem(30, 24, 20, 2, 3, dtype=dtype)
    expected = problem.results(native_leaves)
    for name in problem.names:
        tensor = getattr(problem, name)
        strided = tensor.repeat_interleave(3)[::3] if tensor.dim() == 1 else tensor.t().contiguous().t()
        assert not strided.is_contiguous()
        setattr(problem, name, strided)
    assert all(torch.equal(a, b) for a, b in zip(problem.results(native_leaves), expected))
    problem.grad_y = problem.grad_y[:, :1].expand(30, 20)
    check(native_leaves, problem)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_confidence_are_accurate_over_their_range(native_leaves, instruction_set, activation):
    """A leaf of one neuron with weight 1 returns activation(x), half of it behind a tie; one that is reached
    at x returns sigmoid(|x|): against float64, Inf and NaN included."""
    x = torch.cat([torch.linspace(-90, 90, 4001), torch.linspace(-5, 5, 4001), torch.tensor([1e-30, -1e-30])])
    function = TORCH_ACTIVATIONS[activation]
    one, no_router, tie = torch.ones(1, 1), (torch.zeros(0, 1), torch.zeros(0)), (torch.zeros(1, 1), torch.zeros(1))
    for router, leaves, confidence in ((no_router, 1, 1.0), (tie, 2, 0.5)):
        weights = (one.repeat(leaves, 1), None, one.repeat(leaves, 1), None)
        call = (*router, *weights, 1, leaves - 1, activation)
        y = native_leaves.infer(x.unsqueeze(1), *call).squeeze(1)
        error = (y.double() - confidence * function(x.double())).abs() / (1e-3 + x.double().abs())
        assert error.max() < 2.5e-7
        extremes = torch.tensor([float("inf"), -float("inf")])
        y = native_leaves.infer(extremes.unsqueeze(1), *no_router, one, None, one, None, 1, 0, activation).squeeze(1)
        torch.testing.assert_close(y, function(extremes.double()).float(), equal_nan=True)
    certain = (one, torch.zeros(1), torch.zeros(2, 1), None, torch.zeros(2, 1), torch.ones(2, 1), 1, 1, activation)
    values = torch.cat([x, torch.tensor([1e30, -1e30, float("nan")])])
    y = native_leaves.infer(values.unsqueeze(1), *certain).squeeze(1)
    torch.testing.assert_close(y.double(), values.double().abs().sigmoid(), rtol=2.5e-7, atol=0, equal_nan=True)


def saved_by(native_leaves, problem):
    return native_leaves.forward(problem.x, *problem.parameters())[1:]


def test_saved_tensors_that_are_no_routes_raise(native_leaves, instruction_set):
    """Leaves out of range, and deciders that are not on the path to the leaf."""
    problem = make_leaf_problem(6, 8, 6, 2, 3)
    leaves, deciders, margins, logits = saved_by(native_leaves, problem)
    wrong_leaves = (leaves + 8, leaves - 8, leaves + 2**30, torch.full_like(leaves, -(2**31)), leaves ^ 7)
    others = deciders.clone()
    others[3, 1] = 7  # no router
    siblings = torch.where(deciders > 0, ((deciders - 1) ^ 1) + 1, deciders)
    assert not torch.equal(siblings, deciders) and not torch.equal(leaves ^ 7, leaves)
    wrong_deciders = (others, siblings, deciders - 8, deciders + 2**30, torch.full_like(deciders, 2**31 - 1))
    for bad in [(leaf, deciders) for leaf in wrong_leaves] + [(leaves, decider) for decider in wrong_deciders]:
        with pytest.raises(ValueError, match="leaves and deciders"):
            problem.backward(native_leaves, (*bad, margins, logits))
    for index, value in itertools.product(range(leaves.numel()), (-1, 8, 2**31 - 1, -(2**31))):
        one_wrong = leaves.clone()
        one_wrong.view(-1)[index] = value
        with pytest.raises(ValueError, match="leaves and deciders"):
            problem.backward(native_leaves, (one_wrong, deciders, margins, logits))
    shallow = make_leaf_problem(4, 8, 6, 1, 0)
    leaves, *rest = saved_by(native_leaves, shallow)
    with pytest.raises(ValueError, match="leaves and deciders"):
        shallow.backward(native_leaves, (leaves + 1, *rest))


def test_saved_tensors_of_another_shape_dtype_or_device_raise(native_leaves):
    problem = make_leaf_problem(6, 8, 6, 2, 3)
    saved = saved_by(native_leaves, problem)
    for index, name in enumerate(("leaves", "deciders", "margins", "logits")):
        tensor = saved[index]
        wrong_dtype = tensor.long() if tensor.dtype == torch.int32 else tensor.double()
        wrong_shapes = (tensor[:-1], tensor[:, :1], tensor.unsqueeze(0), tensor.flatten())
        for bad in (*wrong_shapes, wrong_dtype, tensor.to("meta")):
            call = [*saved[:index], bad, *saved[index + 1 :]]
            with pytest.raises(ValueError, match=f"{name if index < 3 else ''}.* is .*expected"):
                problem.backward(native_leaves, call)
    for width in (0, 1, 8, 10):
        with pytest.raises(ValueError, match="expected"):
            problem.backward(native_leaves, [*saved[:3], saved[3].new_zeros(6, 2, width)])
    no_trees = [t[:, :0] for t in saved]
    with pytest.raises(ValueError, match="expected"):
        problem.backward(native_leaves, no_trees)
    grad_y = problem.grad_y
    for bad_grad_y in (grad_y[:-1], grad_y.double(), grad_y.to("meta"), grad_y[:, 1:]):
        problem.grad_y = bad_grad_y
        with pytest.raises(ValueError, match="grad_y is"):
            problem.backward(native_leaves, saved)


def test_a_tree_deeper_than_the_kernels_number_is_declined(native_leaves):
    x = torch.zeros(1, 0)
    assert "depth is 25" in native_leaves.supports(x, x, x, 1, 25, "gelu")
    assert native_leaves.supports(x, x, x, 1, 24, "gelu") is None
