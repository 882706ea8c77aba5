"""The Triton kernels against the reference in float64: output, paths and every gradient."""

import itertools

import pytest
import torch

from tests.kernels.cases import ACTIVATIONS, TORCH_ACTIVATIONS, check, make_problem
from tests.kernels.triton_kernels.conftest import CHUNK, DTYPES, INTERPRETED, shapes_and_dtypes

# rows, width, out_width, trees, depth
CASES = shapes_and_dtypes(
    # empty, width 1, odd widths and several trees
    every_dtype=[(0, 8, 8, 1, 2), (3, 1, 1, 1, 0), (4, 30, 57, 3, 2)],
    # single and deepest, many trees, more visits of a node than one program sums and of others fewer,
    # wider than one block of columns, the widest
    float32=[
        (1, 33, 31, 1, 12),
        (2, 7, 9, 16, 0),
        (CHUNK + 8, 10, 17, 1, 1),
        (2, 130, 257, 1, 1),
        (1, 4096, 4096, 1, 1),
    ],
    on_gpu=[(1, 40, 24, 1, 11), (20, 30, 57, 3, 4), (300, 5, 3, 2, 0), (2, 768, 768, 1, 3)],
)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_output_and_gradients_match(triton, shape, dtype):
    check(triton, make_problem(*shape, dtype=dtype))


@pytest.mark.parametrize(("activation", "bias"), [*((name, True) for name in ACTIVATIONS), ("gelu", False)])
def test_activations_match(triton, activation, bias):
    problem = make_problem(6, 10, 7, 1, 2, activation, bias)
    problem.weight_in *= 4  # logits up to about 15: the tails too
    check(triton, problem)


@pytest.mark.parametrize("output_mask", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_wanted_gradients_are_computed(triton, output_mask):
    problem = make_problem(2, 6, 5, 1, 1)
    problem.output_mask = list(output_mask)
    check(triton, problem)


def test_all_rows_on_one_path_match(triton):
    problem = make_problem(CHUNK + 8, 8, 6, 1, 2)
    problem.x[:] = problem.x[:1].clone()
    check(triton, problem)


def test_strided_inputs_match_contiguous_ones(triton):
    problem = make_problem(3, 12, 10, 2, 2)
    problem.x = torch.zeros(6, 25)[::2, 1::2].copy_(problem.x)
    problem.weight_in = problem.weight_in.t().contiguous().t()
    problem.weight_out = problem.weight_out.repeat(1, 2)[:, :10]
    problem.bias_in = problem.bias_in.repeat_interleave(3)[::3]
    problem.grad_y = problem.grad_y[:, :1].expand(3, 10)
    check(triton, problem)


@pytest.mark.parametrize("tie", [0.0, -0.0, float("nan")])
def test_ties_go_left(triton, tie):
    problem = make_problem(2, 16, 8, 1, 4)
    problem.weight_in.zero_()
    problem.bias_in[:] = tie
    assert triton.forward(problem.x, *problem.parameters())[1].tolist() == [[[0, 1, 3, 7, 15]]] * 2


def all_results(triton, problem):
    y, visited, logits = triton.forward(problem.x, *problem.parameters())
    rest = (problem.weight_in, problem.bias_in, problem.weight_out, visited, logits, problem.activation)
    return [y, visited, logits, *triton.backward(problem.grad_y, problem.x, *rest, problem.output_mask)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_each_other(triton, dtype):
    problem = make_problem(6, 24, 17, 2, 2, dtype=dtype)
    whole = triton.forward(problem.x, *problem.parameters())
    for begin, end in ((0, 1), (2, 5), (5, 6)):
        part = triton.forward(problem.x[begin:end], *problem.parameters())
        assert all(torch.equal(a[begin:end], b) for a, b in zip(whole, part))


def test_the_same_inputs_give_the_same_bits(triton):
    problem = make_problem(CHUNK + 8, 12, 9, 1, 1)
    first, second = all_results(triton, problem), all_results(triton, problem)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_rows_and_unvisited_nodes_reach_nobody(triton, bad):
    problem = make_problem(5, 10, 9, 1, 3)
    clean = all_results(triton, problem)
    unvisited = torch.ones(15, dtype=torch.bool)
    unvisited[clean[1].flatten().long()] = False
    assert unvisited.any()
    for parameter in (problem.weight_in, problem.bias_in, problem.weight_out):
        parameter[unvisited] = bad
    dirty = all_results(triton, problem)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))
    assert all((gradient[unvisited] == 0).all() for gradient in dirty[4:])
    problem.x[3] = bad
    others = torch.arange(5) != 3
    y = triton.infer(problem.x, *problem.parameters())
    assert torch.equal(y[others], clean[0][others]) and not y[3].isfinite().any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_accurate_over_their_range(triton, activation):
    """A tree of one node with weight 1 returns activation(x): against float64, Inf and NaN included."""
    one = torch.ones(1, 1)
    steps = 40 if INTERPRETED else 200
    logits = torch.cat([torch.linspace(-90, 90, steps), torch.linspace(-5, 5, steps), torch.tensor([1e-30, -1e-30])])
    function = TORCH_ACTIVATIONS[activation]
    y = triton.infer(logits.unsqueeze(1), one, None, one, 1, 0, activation).squeeze(1)
    error = (y.double() - function(logits.double())).abs() / (1e-3 + logits.double().abs())
    assert error.max() < 5e-7
    extremes = torch.tensor([float("inf"), float("nan")])
    y = triton.infer(extremes.unsqueeze(1), one, None, one, 1, 0, activation).squeeze(1)
    torch.testing.assert_close(y, function(extremes.double()).float(), equal_nan=True)
