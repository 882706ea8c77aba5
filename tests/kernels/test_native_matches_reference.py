"""The native kernels against the reference: output, paths and every gradient."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.cases import ACTIVATIONS, TORCH_ACTIVATIONS, check, make_problem
from tests.kernels.properties import DRAWS, DTYPES, FUNCTIONS, LAYOUTS, check_layout_and_bad_rows

# rows, width, out_width, trees, depth: empty, single, odd widths, wider than a register tile, deep, many trees,
# more rows than a block (256), a segment (512) and both stages of the walk
SHAPES = [
    (0, 8, 8, 1, 2),
    (1, 768, 768, 1, 11),
    (2, 16, 16, 2, 3),
    (3, 1, 1, 1, 0),
    (4, 33, 31, 1, 12),
    (5, 7, 9, 64, 1),
    (40, 130, 257, 3, 4),
    (130, 64, 48, 70, 0),
    (300, 31, 65, 1, 11),
    (700, 17, 40, 4, 6),
    (1500, 40, 24, 1, 9),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference_on_every_instruction_set(native, instruction_set, shape, dtype):
    check(native, make_problem(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_match_reference(native, instruction_set, activation, bias, dtype):
    problem = make_problem(60, 24, 20, 2, 4, activation, bias, dtype)
    problem.weight_in *= 4  # logits up to about 15: the tails too
    check(native, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output_mask", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_wanted_gradients_are_computed(native, output_mask, dtype):
    problem = make_problem(50, 20, 28, 2, 3, dtype=dtype)
    problem.output_mask = list(output_mask)
    check(native, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 600, 1300])
def test_all_rows_on_one_path_match_reference(native, rows, dtype):
    problem = make_problem(rows, 32, 32, 1, 8, dtype=dtype)
    problem.x[:] = problem.x[:1]
    check(native, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_written_past_the_caches_match_reference(native, instruction_set, dtype):
    """y and both weight gradients above the 8 MB from which the kernels stream."""
    narrow = dtype == torch.bfloat16
    check(native, make_problem(5600 if narrow else 2800, 8, 768, 1, 1, dtype=dtype))
    check(native, make_problem(20, 520, 512, 1, 12 if narrow else 11, dtype=dtype))


@given(
    rows=st.integers(0, 700),
    width=st.integers(1, 70),
    out_width=st.integers(1, 70),
    trees=st.integers(1, 6),
    depth=st.integers(0, 7),
    **FUNCTIONS,
    **DRAWS,
)
@settings(max_examples=40, deadline=None)
def test_any_shape_matches_reference(
    native_backend, rows, width, out_width, trees, depth, activation, bias, dtype, seed
):
    check(native_backend, make_problem(rows, width, out_width, trees, depth, activation, bias, dtype, seed))


@given(
    shape=st.sampled_from([(1, 0), (1, 12), (2, 10), (3, 5), (7, 3), (16, 4), (64, 0), (64, 1), (64, 3)]),
    rows=st.integers(0, 90),
    **LAYOUTS,
    **DRAWS,
)
@example(  # logits that cancel to a 2000th of what they add
    shape=(1, 0), rows=2, widths=(37, 2), layout=(0, 0, 1), one_path=True, bad=[], dtype=torch.float32, seed=0
)
@settings(max_examples=40, deadline=None)
def test_any_layout_path_and_bad_row_matches_reference(
    native_backend, shape, rows, widths, layout, one_path, bad, dtype, seed
):
    problem = make_problem(rows, *widths, *shape, dtype=dtype, seed=seed)
    check_layout_and_bad_rows(native_backend, problem, one_path, layout, bad)


@pytest.mark.parametrize("tie", [0.0, -0.0, float("nan")])
def test_ties_go_left(native, instruction_set, tie):
    problem = make_problem(5, 16, 8, 1, 4)
    problem.weight_in.zero_()
    problem.bias_in[:] = tie
    for rows in (1, 5):  # the kernel for a few rows and the one for many
        visited = native.forward(problem.x[:rows], *problem.parameters())[1]
        assert visited.tolist() == [[[0, 1, 3, 7, 15]]] * rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_stays_alone(native, instruction_set, bad, dtype):
    problem = make_problem(40, 24, 20, 2, 3, dtype=dtype)
    clean = native.infer(problem.x, *problem.parameters())
    problem.x[7] = bad
    dirty = native.infer(problem.x, *problem.parameters())
    others = torch.arange(40) != 7
    assert torch.equal(dirty[others], clean[others])
    assert not dirty[7].isfinite().any()


@pytest.mark.parametrize("rows", [1, 2, 60])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_unvisited_nodes_reach_nobody(native, instruction_set, bad, rows):
    problem = make_problem(rows, 24, 20, 1, 6)
    clean, visited, logits = native.forward(problem.x, *problem.parameters())
    unvisited = torch.ones(127, dtype=torch.bool)
    unvisited[visited.flatten().long()] = False
    assert unvisited.any()
    for parameter in (problem.weight_in, problem.bias_in, problem.weight_out):
        parameter[unvisited] = bad
    assert torch.equal(native.infer(problem.x, *problem.parameters()), clean)
    gradients = native.backward(
        problem.grad_y,
        problem.x,
        problem.weight_in,
        problem.bias_in,
        problem.weight_out,
        visited,
        logits,
        "gelu",
        [True] * 4,
    )
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all((gradient[unvisited] == 0).all() for gradient in gradients[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_match_contiguous_ones(native, dtype):
    problem = make_problem(30, 24, 20, 2, 3, dtype=dtype)
    expected = native.infer(problem.x, *problem.parameters())
    spread = torch.zeros(60, 49, dtype=dtype)
    views = (
        spread[::2, 1::2],
        torch.empty(24, 30, dtype=dtype).t(),
        torch.empty(31 * 24, dtype=dtype)[5:725].view(30, 24),
    )
    for view in views:
        view.copy_(problem.x)
        assert torch.equal(native.infer(view, *problem.parameters()), expected)
    problem.weight_in = problem.weight_in.t().contiguous().t()
    problem.weight_out = problem.weight_out.repeat(1, 2)[:, :20]
    problem.bias_in = problem.bias_in.repeat_interleave(3)[::3]
    problem.grad_y = problem.grad_y[:, :1].expand(30, 20)
    check(native, problem)


def test_bfloat16_rounds_to_nearest_even(native, instruction_set):
    """One node with activation 1 (relu of a bias of 1): y is weight_out times 1, summed over two trees, rounded."""
    values = torch.tensor([1.0, 1.0078125, 3.0, -2.5, 1e-40, 65280.0]).bfloat16()
    weight_out = torch.stack([values, torch.full_like(values, 2.0**-8)])
    x, weight_in = torch.zeros(3, 1).bfloat16(), torch.zeros(2, 1).bfloat16()
    y = native.infer(x, weight_in, torch.ones(2).bfloat16(), weight_out, 2, 0, "relu")
    assert torch.equal(y, weight_out.float().sum(0).bfloat16().expand(3, -1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_accurate_over_their_range(native, instruction_set, activation):
    """A tree of one node with weight 1 returns activation(x): against float64, Inf and NaN included."""
    logits = torch.cat([torch.linspace(-90, 90, 4001), torch.linspace(-5, 5, 4001), torch.tensor([1e-30, -1e-30])])
    one = torch.ones(1, 1)
    function = TORCH_ACTIVATIONS[activation]
    y = native.infer(logits.unsqueeze(1), one, None, one, 1, 0, activation).squeeze(1)
    error = (y.double() - function(logits.double())).abs() / (1e-3 + logits.double().abs())
    assert error.max() < 2.5e-7
    extremes = torch.tensor([float("inf"), -float("inf"), float("nan")])
    y = native.infer(extremes.unsqueeze(1), one, None, one, 1, 0, activation).squeeze(1)
    torch.testing.assert_close(y, function(extremes.double()).float(), equal_nan=True)
