"""The subtree products, forced: the same op as the walk, whatever the tile a row lies in."""

import itertools

import pytest
import torch

from fastbert_hf.fff_reference import fff_backward
from fastbert_hf.kernels.triton.regimes import REGIMES, VARIABLE, choose_regime
from fastbert_hf.kernels.triton.subtrees.groups import PIECE_ROWS
from fastbert_hf.kernels.triton.subtrees.parts import split_levels
from tests.kernels.cases import ACTIVATIONS, assert_close, check, make_problem, natural_scales
from tests.kernels.triton_kernels.conftest import DTYPES, shapes_and_dtypes

# rows, width, out_width, trees, depth
CASES = shapes_and_dtypes(
    # empty, one part, two trees of two parts, wider than a block of columns and than one of parameters' gradients
    every_dtype=[(0, 8, 8, 1, 8), (3, 1, 1, 1, 0), (4, 20, 9, 2, 7), (2, 300, 270, 1, 1)],
    # the deepest, beyond one tile, exactly a tile and the largest single part, the widest rows
    float32=[(3, 20, 9, 1, 12), (65, 7, 9, 2, 2), (64, 33, 31, 1, 6), (1, 4096, 40, 1, 0)],
    on_gpu=[(1, 40, 24, 1, 11), (70, 30, 17, 1, 7), (6, 130, 20, 3, 7), (2, 768, 300, 1, 3), (2, 4096, 4096, 1, 1)],
)


@pytest.fixture
def subtrees(triton, monkeypatch):
    """The backend, always by subtrees."""
    monkeypatch.setenv(VARIABLE, "subtrees")
    return triton


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_output_and_gradients_match(subtrees, shape, dtype):
    check(subtrees, make_problem(*shape, dtype=dtype))


@pytest.mark.parametrize(("activation", "bias"), [*((name, True) for name in ACTIVATIONS), ("gelu", False)])
def test_activations_match(subtrees, activation, bias):
    problem = make_problem(12, 10, 7, 1, 3, activation, bias)
    problem.weight_in *= 4
    check(subtrees, problem)


@pytest.mark.parametrize("output_mask", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_wanted_gradients_are_computed(subtrees, output_mask):
    problem = make_problem(3, 6, 5, 1, 2)
    problem.output_mask = list(output_mask)
    check(subtrees, problem)


def test_all_rows_in_one_subtree_match(subtrees):
    """More rows than one program sums."""
    problem = make_problem(PIECE_ROWS + 70, 8, 6, 1, 8)
    problem.x[:] = problem.x[:1].clone()
    check(subtrees, problem)


def test_strided_inputs_match_contiguous_ones(subtrees):
    problem = make_problem(6, 12, 10, 2, 3)
    problem.x = torch.zeros(12, 25)[::2, 1::2].copy_(problem.x)
    problem.weight_in = problem.weight_in.t().contiguous().t()
    problem.weight_out = problem.weight_out.repeat(1, 2)[:, :10]
    problem.bias_in = problem.bias_in.repeat_interleave(3)[::3]
    problem.grad_y = problem.grad_y[:, :1].expand(6, 10)
    check(subtrees, problem)


@pytest.mark.parametrize("tie", [0.0, -0.0, float("nan")])
def test_ties_go_left(subtrees, tie):
    problem = make_problem(2, 16, 8, 1, 8)
    problem.weight_in.zero_()
    problem.bias_in[:] = tie
    left = [2**level - 1 for level in range(9)]
    assert subtrees.forward(problem.x, *problem.parameters())[1].tolist() == [[left]] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_each_other(subtrees, products_by_row, dtype):
    problem = make_problem(70, 24, 17, 1, 7, dtype=dtype)
    whole = subtrees.forward(problem.x, *problem.parameters())
    for begin, end in ((0, 1), (3, 68), (69, 70)):
        part = subtrees.forward(problem.x[begin:end], *problem.parameters())
        assert all(torch.equal(a[begin:end], b) for a, b in zip(whole, part))


@pytest.mark.parametrize("depth", [4, 7])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_rows_and_unvisited_nodes_reach_nobody(subtrees, bad, depth):
    problem = make_problem(12, 10, 9, 1, depth)
    arguments = (problem.x, *problem.parameters())
    y, visited, logits = subtrees.forward(*arguments)
    unvisited = torch.ones(2 ** (depth + 1) - 1, dtype=torch.bool)
    unvisited[visited.flatten().long()] = False
    assert unvisited[: 2**depth].any()  # some of them share a subtree with visited ones
    for parameter in (problem.weight_in, problem.bias_in, problem.weight_out):
        parameter[unvisited] = bad
    dirty = subtrees.forward(*arguments)
    assert all(torch.equal(a, b) for a, b in zip((y, visited, logits), dirty))
    problem.x[7] = bad
    others = torch.arange(12) != 7
    again = subtrees.infer(*arguments)
    assert torch.equal(again[others], y[others]) and not again[7].isfinite().any()


def test_a_bad_node_reaches_exactly_the_rows_that_visit_it(subtrees):
    problem = make_problem(8, 10, 9, 1, 7)
    y, visited, _ = subtrees.forward(problem.x, *problem.parameters())
    for level in (1, 6):  # in the upper and in the lower part
        node = int(visited[0, 0, level])
        rows = (visited[:, 0] == node).any(dim=1)
        weight_out = problem.weight_out.clone()
        weight_out[node, 3] = float("inf")
        rest = problem.parameters()[3:]
        dirty = subtrees.infer(problem.x, problem.weight_in, problem.bias_in, weight_out, *rest)
        assert torch.equal(dirty[~rows], y[~rows])
        assert not dirty[rows, 3].isfinite().any()
        kept = torch.arange(9) != 3
        torch.testing.assert_close(dirty[rows][:, kept], y[rows][:, kept], rtol=1e-5, atol=1e-5)


def gradients(backend, problem):
    """Paths, then gradients of x, weight_in, bias_in and weight_out."""
    visited, logits = backend.forward(problem.x, *problem.parameters())[1:]
    rest = (problem.weight_in, problem.bias_in, problem.weight_out, visited, logits, problem.activation)
    return visited, backend.backward(problem.grad_y, problem.x, *rest, problem.output_mask)


def test_the_same_inputs_give_the_same_gradients(subtrees):
    problem = make_problem(12, 12, 9, 1, 7)
    (_, first), (_, second) = gradients(subtrees, problem), gradients(subtrees, problem)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("depth", [4, 7])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_unvisited_nodes_reach_no_gradient(subtrees, bad, depth):
    problem = make_problem(5, 10, 9, 1, depth)
    visited, clean = gradients(subtrees, problem)
    unvisited = torch.ones(2 ** (depth + 1) - 1, dtype=torch.bool)
    unvisited[visited.flatten().long()] = False
    for parameter in (problem.weight_in, problem.bias_in, problem.weight_out):
        parameter[unvisited] = bad
    _, dirty = gradients(subtrees, problem)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))
    assert all((gradient[unvisited] == 0).all() for gradient in dirty[1:])


@pytest.mark.parametrize(  # bfloat16's products along a path have code of their own
    ("regime", "dtype"), [*((regime, torch.float32) for regime in REGIMES), ("subtrees", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "grad_y", "weight_in", "weight_out", "logits"])
def test_bad_values_reach_the_gradients_they_reach_in_the_reference(triton, monkeypatch, regime, where, bad, dtype):
    """NaN and Inf in one row of one tensor, after forward: the same gradients are finite, and equal, as there."""
    monkeypatch.setenv(VARIABLE, regime)
    problem = make_problem(4, 10, 9, 1, 7, "relu", dtype=dtype)  # whose derivative is finite at Inf
    visited, logits = triton.forward(problem.x, *problem.parameters())[1:]
    scales = natural_scales(problem, logits.double())
    if where == "logits":
        logits[2, 0, 5] = bad
    elif where in ("x", "grad_y"):
        getattr(problem, where)[2, 4] = bad
    else:
        for level in (1, 6):
            getattr(problem, where)[int(visited[2, 0, level]), 4] = bad
    wide = problem.double()
    rest = (problem.weight_in, problem.bias_in, problem.weight_out, visited, logits, problem.activation)
    wide_rest = (wide.weight_in, wide.bias_in, wide.weight_out, visited, logits.double(), problem.activation)
    results = triton.backward(problem.grad_y, problem.x, *rest, problem.output_mask)
    expected = fff_backward(wide.grad_y, wide.x, *wide_rest, problem.output_mask)
    assert not all(wanted.isfinite().all() for wanted in expected)
    for name, actual, wanted in zip(("x", "weight_in", "bias_in", "weight_out"), results, expected):
        finite = wanted.isfinite()
        assert torch.equal(actual.isfinite(), finite), name
        assert_close(actual[finite], wanted[finite], name, scales[name])


def test_both_parts_have_at_most_seven_levels():
    for depth in range(13):
        upper, lower = split_levels(depth)
        assert upper + lower == depth + 1 and 1 <= lower <= 7 and upper <= lower
    assert split_levels(11) == (6, 6) and split_levels(6) == (0, 7)


def test_the_rule_can_be_overruled(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose_regime(1, 11) == choose_regime(100_000, 3) == "walk" and choose_regime(16384, 11) == "subtrees"
    monkeypatch.setenv(VARIABLE, "walk")
    assert choose_regime(16384, 11) == "walk"
    monkeypatch.setenv(VARIABLE, "subtree")
    with pytest.raises(ValueError, match="must be one of walk, subtrees; got 'subtree'"):
        choose_regime(1, 1)
