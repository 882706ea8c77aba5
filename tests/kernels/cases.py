"""Problems for the kernels, and what they are compared with: the reference in float64."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastbert_hf.benchmarks.timing import one_thread
from fastbert_hf.fff_reference import fff_backward, fff_forward
from fastbert_hf.leaf_reference import leaf_backward, leaf_forward
from tests.forms import NODES, Form, leaves_of

MARGIN = 1e-4  # on logits of order 1; float32 sums of 4096 products stay well below
TORCH_ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
}
ACTIVATIONS = tuple(TORCH_ACTIVATIONS)

# rows, width, out_width, trees, depth, leaf width: empty, single, odd widths, all depths, leaves narrower and wider
# than a register tile and than a pass over rows of weights (48), rows wider than a pass over columns (448), widths
# that are no multiple of a group of int8 products (4), a block (16) or a panel (48), more rows at a leaf than a tile
# (8) or a task (64) takes, many trees
LEAF_SHAPES = [
    (0, 8, 8, 1, 2, 3),
    (1, 768, 768, 1, 2, 96),
    (1, 33, 31, 1, 12, 1),
    (2, 16, 16, 2, 3, 7),
    (2, 1, 1, 1, 0, 1),
    (3, 1, 1, 1, 1, 192),
    (4, 33, 31, 1, 12, 1),
    (5, 7, 9, 64, 1, 7),
    (9, 65, 33, 2, 7, 1),
    (40, 130, 257, 2, 2, 7),
    (70, 24, 17, 40, 0, 1),
    (90, 500, 470, 1, 1, 13),
    (200, 31, 65, 1, 1, 96),
    (60, 17, 40, 1, 8, 7),
    (400, 17, 40, 2, 4, 1),
    (40, 24, 48, 2, 1, 192),
]


@dataclass
class Problem:
    """Arguments of one call of trees of single neurons, and the gradient of its output."""

    x: Tensor
    weight_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    trees: int
    depth: int
    activation: str
    grad_y: Tensor
    output_mask: list[bool] = field(default_factory=list)

    names = ("x", "weight_in", "bias_in", "weight_out")
    reference_forward, reference_backward = staticmethod(fff_forward), staticmethod(fff_backward)

    def __post_init__(self):
        if not self.output_mask:
            self.output_mask = [t is not None for t in self.tensors()]

    @property
    def form(self) -> Form:
        return NODES

    def tensors(self):
        """x and the parameters, in the order of the op."""
        return tuple(getattr(self, name) for name in self.names)

    def parameters(self):
        return *self.tensors()[1:], self.trees, self.depth, self.activation

    def double(self):
        widened = {name: getattr(self, name) for name in (*self.names, "grad_y")}
        return replace(self, **{name: None if t is None else t.double() for name, t in widened.items()})

    def backward(self, backend, saved) -> list[Tensor | None]:
        return backend.backward(self.grad_y, *self.tensors(), *saved, self.activation, self.output_mask)

    def results(self, backend) -> list[Tensor | None]:
        """y, what forward saves for backward, and every gradient."""
        y, *saved = backend.forward(self.x, *self.parameters())
        return [y, *saved, *self.backward(backend, saved)]

    def scales(self, logits: Tensor) -> dict[str, float]:
        return natural_scales(self, logits)


@dataclass
class LeafProblem(Problem):
    """The same for leaf trees."""

    router: Tensor = None
    threshold: Tensor = None
    bias_out: Tensor | None = None

    names = ("x", "router", "threshold", "weight_in", "bias_in", "weight_out", "bias_out")
    reference_forward, reference_backward = staticmethod(leaf_forward), staticmethod(leaf_backward)

    @property
    def form(self) -> Form:
        return leaves_of(self.weight_in.shape[0] // (self.trees * 2**self.depth))

    def scales(self, logits: Tensor) -> dict[str, float]:
        return natural_leaf_scales(self, logits)


def make_problem(
    rows=16, width=24, out_width=20, trees=1, depth=3, activation="gelu", bias=True, dtype=torch.float32, seed=0
) -> Problem:
    """Random parameters and rows whose every logit is at least MARGIN away from a tie."""
    return _draw(Problem, NODES, (rows, width, out_width, trees, depth), activation, bias, dtype, seed)


def make_leaf_problem(
    rows=16,
    width=24,
    out_width=20,
    trees=1,
    depth=3,
    leaf_width=9,
    activation="gelu",
    bias=True,
    dtype=torch.float32,
    seed=0,
) -> LeafProblem:
    """The same for leaf trees; the two least certain decisions of a row are at least MARGIN apart, too."""
    sizes = (rows, width, out_width, trees, depth)
    return _draw(LeafProblem, leaves_of(leaf_width), sizes, activation, bias, dtype, seed)


def _draw(problem_type, form, sizes, activation, bias, dtype, seed):
    rows, width, out_width, trees, depth = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    scales = {"weight_in": max(1, width) ** -0.5, "router": max(1, width) ** -0.5, "weight_out": 1.0}
    parameters = {
        name: normal(*shape, scale=scales.get(name, 0.3)) if bias or name not in form.biases else None
        for name, shape in form.shapes(width, out_width, trees, depth).items()
    }
    problem = problem_type(
        x=normal(rows, width),
        **parameters,
        trees=trees,
        depth=depth,
        activation=activation,
        grad_y=normal(rows, out_width),
    )
    for _ in range(100):
        wide = problem.double()
        with one_thread():  # the reference's small products wait for threads longer than they compute
            near = form.near_ties(wide.x, dict(zip(form.parameter_names, wide.tensors()[1:])), trees, depth)
        if width == 0 or not near.any():
            return problem
        problem.x[near] = normal(int(near.sum()), width)
    raise AssertionError("no rows away from ties")


def largest(*tensors: Tensor) -> float:
    """Product of the largest magnitudes."""
    return float(
        torch.stack([t.double().abs().max() if t.numel() else torch.zeros(()).double() for t in tensors]).prod()
    )


def size_of_dots(problem: Problem, name: str, bias: str | None) -> float:
    """Largest root of the sum of squares of what a dot product of x with a row of `name` adds: the sum itself may
    cancel to nearly nothing, and its rounding does not."""
    dots = problem.x.double() ** 2 @ getattr(problem, name).double().T ** 2
    added = getattr(problem, bias) if bias else None
    return largest(dots if added is None else dots + added.double() ** 2) ** 0.5


def natural_scales(problem: Problem, logits: Tensor) -> dict[str, float]:
    """Size of the terms that each result sums: activations and derivatives are accurate relative to their argument,
    not to a value that cancels to nearly nothing (gelu(-3) is 0.5 * -3 * (1 - 0.997))."""
    dots = largest(problem.grad_y, problem.weight_out) * max(1, problem.weight_out.shape[1]) ** 0.5
    summed = size_of_dots(problem, "weight_in", "bias_in")
    return {
        "y": max(largest(logits), summed) * largest(problem.weight_out),
        "weight_out": largest(logits, problem.grad_y),
        "x": dots * largest(problem.weight_in),
        "weight_in": dots * largest(problem.x),
        "bias_in": dots,
        "logits": summed,
    }


def natural_leaf_scales(problem: LeafProblem, logits: Tensor) -> dict[str, float]:
    """The same for leaf trees, whose results sum w neurons."""
    neurons, columns = max(1, logits.shape[-1]) ** 0.5, max(1, problem.weight_out.shape[1]) ** 0.5
    bias_out = problem.x.new_zeros(1) if problem.bias_out is None else problem.bias_out
    dots = largest(problem.grad_y, problem.weight_out) * columns  # gradient of a neuron's hidden value
    confidence = largest(logits) * dots * neurons + largest(problem.grad_y, bias_out) * columns
    summed = size_of_dots(problem, "weight_in", "bias_in")
    return {
        "y": max(largest(logits), summed) * largest(problem.weight_out) * neurons + largest(bias_out),
        "x": dots * largest(problem.weight_in) * neurons + confidence * largest(problem.router),
        "router": confidence * largest(problem.x),
        "threshold": confidence,
        "weight_in": dots * largest(problem.x),
        "bias_in": dots,
        "weight_out": largest(logits, problem.grad_y),
        "bias_out": largest(problem.grad_y),
        "logits": max(summed, size_of_dots(problem, "router", "threshold")),
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
    y, *saved = backend.forward(problem.x, *problem.parameters())
    with one_thread():
        expected_y, *expected_saved = problem.reference_forward(wide.x, *wide.parameters())
    scales = problem.scales(expected_saved[-1])
    assert y.dtype == problem.x.dtype
    for actual, wanted in zip(saved, expected_saved, strict=True):
        if wanted.is_floating_point():  # logits, and the margins of leaf trees
            assert actual.dtype == torch.float32
            assert_close(actual, wanted, "logits", scales["logits"])
        else:
            assert actual.dtype == torch.int32 and torch.equal(actual, wanted)
    assert_close(y, expected_y, "y", scales["y"])
    assert torch.equal(backend.infer(problem.x, *problem.parameters()), y)
    gradients = problem.backward(backend, saved)
    given = [t.double() if t.is_floating_point() else t for t in saved]
    call = (wide.grad_y, *wide.tensors(), *given, problem.activation, problem.output_mask)
    with one_thread():
        expected = problem.reference_backward(*call)
    for name, actual, wanted in zip(problem.names, gradients, expected, strict=True):
        assert (actual is None) == (wanted is None), name
        if actual is not None:
            assert actual.dtype == problem.x.dtype
            assert_close(actual, wanted, f"gradient of {name}", scales[name])
