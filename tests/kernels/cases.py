"""Problems for the kernels, and what they are compared with: the reference in float64."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastbert_hf.fff_reference import fff_backward, fff_forward, nodes_per_tree

MARGIN = 1e-4  # on logits of order 1; float32 sums of 4096 products stay well below
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


@dataclass
class Problem:
    x: Tensor
    weight_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    trees: int
    depth: int
    activation: str
    grad_y: Tensor
    output_mask: list[bool] = field(default_factory=list)

    def __post_init__(self):
        if not self.output_mask:
            self.output_mask = [True, True, self.bias_in is not None, True]

    def parameters(self):
        return self.weight_in, self.bias_in, self.weight_out, self.trees, self.depth, self.activation

    def double(self) -> "Problem":
        def widen(t):
            return None if t is None else t.double()

        return Problem(
            *map(widen, (self.x, self.weight_in, self.bias_in, self.weight_out)),
            self.trees,
            self.depth,
            self.activation,
            widen(self.grad_y),
            self.output_mask,
        )


def make_problem(
    rows=16, width=24, out_width=20, trees=1, depth=3, activation="gelu", bias=True, dtype=torch.float32, seed=0
) -> Problem:
    """Random parameters and rows whose every logit is at least MARGIN away from a tie."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    nodes = trees * nodes_per_tree(depth)
    weight_in = normal(nodes, width, scale=max(1, width) ** -0.5)
    bias_in = normal(nodes, scale=0.3) if bias else None
    weight_out = normal(nodes, out_width)
    problem = Problem(
        normal(rows, width), weight_in, bias_in, weight_out, trees, depth, activation, normal(rows, out_width)
    )
    for _ in range(100):
        wide = problem.double()
        logits = fff_forward(wide.x, *wide.parameters())[2]
        near = (logits.abs() < MARGIN).flatten(1).any(1)
        if width == 0 or not near.any():
            return problem
        problem.x[near] = normal(int(near.sum()), width)
    raise AssertionError("no rows away from ties")


def largest(*tensors: Tensor) -> float:
    """Product of the largest magnitudes."""
    return float(
        torch.stack([t.double().abs().max() if t.numel() else torch.zeros(()).double() for t in tensors]).prod()
    )


def natural_scales(problem: Problem, logits: Tensor) -> dict[str, float]:
    """Size of the terms that each result sums: activations and derivatives are accurate relative to their argument,
    not to a value that cancels to nearly nothing (gelu(-3) is 0.5 * -3 * (1 - 0.997))."""
    dots = largest(problem.grad_y, problem.weight_out) * max(1, problem.weight_out.shape[1]) ** 0.5
    return {
        "y": largest(logits, problem.weight_out),
        "weight_out": largest(logits, problem.grad_y),
        "x": dots * largest(problem.weight_in),
        "weight_in": dots * largest(problem.x),
        "bias_in": dots,
        "logits": 0.0,
    }


def assert_close(actual: Tensor, expected: Tensor, what: str, scale: float) -> None:
    """Close relative to the largest value: 4e-6 in float32 (sums of thousands), one rounding more in bfloat16."""
    assert actual.shape == expected.shape, what
    finite = expected[expected.isfinite()]
    scale = max(scale, largest(finite))
    rtol = 4e-6 if actual.dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=rtol,
        atol=4e-6 * scale,
        equal_nan=True,
        msg=lambda message: f"{what}: {message}",
    )


def check(backend, problem: Problem) -> None:
    """Output, paths, logits and every gradient against the reference in float64."""
    wide = problem.double()
    y, visited, logits = backend.forward(problem.x, *problem.parameters())
    expected_y, expected_visited, expected_logits = fff_forward(wide.x, *wide.parameters())
    assert (y.dtype, visited.dtype, logits.dtype) == (problem.x.dtype, torch.int32, torch.float32)
    assert torch.equal(visited, expected_visited)
    scales = natural_scales(problem, expected_logits)
    assert_close(logits, expected_logits, "logits", scales["logits"])
    assert_close(y, expected_y, "y", scales["y"])
    assert torch.equal(backend.infer(problem.x, *problem.parameters()), y)
    gradients = backend.backward(
        problem.grad_y,
        problem.x,
        problem.weight_in,
        problem.bias_in,
        problem.weight_out,
        visited,
        logits,
        problem.activation,
        problem.output_mask,
    )
    expected = fff_backward(
        wide.grad_y,
        wide.x,
        wide.weight_in,
        wide.bias_in,
        wide.weight_out,
        visited,
        logits.double(),
        problem.activation,
        problem.output_mask,
    )
    for name, actual, wanted in zip(("x", "weight_in", "bias_in", "weight_out"), gradients, expected):
        assert (actual is None) == (wanted is None), name
        if actual is not None:
            assert actual.dtype == problem.x.dtype
            assert_close(actual, wanted, f"gradient of {name}", scales[name])
