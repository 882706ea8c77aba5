"""What property tests of both forms of tree draw, and the property of layouts and bad rows."""

import torch
from hypothesis import strategies as st

from tests.kernels.cases import ACTIVATIONS, Problem, check

DTYPES = (torch.float32, torch.bfloat16)
DRAWS = {"dtype": st.sampled_from(DTYPES), "seed": st.integers(0, 2**20)}
FUNCTIONS = {"activation": st.sampled_from(ACTIVATIONS), "bias": st.booleans()}
BAD_VALUES = st.sampled_from([float("nan"), float("inf"), -float("inf")])
LAYOUTS = {
    "widths": st.tuples(st.integers(1, 40), st.integers(1, 40)),
    "layout": st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 3)),  # for `embedded`
    "one_path": st.booleans(),
    "bad": st.lists(st.tuples(st.integers(0, 89), BAD_VALUES), max_size=4),  # (row, value)
}


def embedded(tensor, offset, gap, step):
    """The same values as a view into a NaN-filled buffer: columns `step` apart, `gap` more between rows."""
    if tensor.dim() == 1:
        return embedded(tensor.unsqueeze(1), offset, gap, step).squeeze(1)
    rows, width = tensor.shape
    stride = width * step + gap
    buffer = torch.full((offset + rows * stride,), float("nan"), dtype=tensor.dtype)
    view = buffer.as_strided((rows, width), (stride, step), offset)
    view.copy_(tensor)
    return view


def not_finite(tensors):
    return [None if t is None else t.isfinite().logical_not() for t in tensors]


def check_layout_and_bad_rows(backend, problem: Problem, one_path: bool, layout: tuple, bad: list) -> None:
    """Strided tensors give what contiguous ones do, and a bad row is bad where the reference says so, and nowhere
    else.

    Args:
        one_path: whether all rows are equal. layout: for `embedded`. bad: (row, value) that one entry gets.
    """
    rows, width = problem.x.shape
    if one_path and rows:
        problem.x[:] = problem.x[:1].clone()
    for name in (*problem.names, "grad_y"):
        setattr(problem, name, embedded(getattr(problem, name), *layout))
    check(backend, problem)

    clean = backend.forward(problem.x, *problem.parameters())
    good = torch.ones(rows, dtype=torch.bool)
    for row, value in bad:
        if row < rows:
            problem.x[row, row % width] = value
            good[row] = False
    wide = problem.double()
    results = backend.forward(problem.x, *problem.parameters())
    expected = problem.reference_forward(wide.x, *wide.parameters())
    assert all(torch.equal(a[good], b[good]) for a, b in zip(results, clean, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results, expected) if not b.is_floating_point())  # the paths
    assert all(torch.equal(a, b) for a, b in zip(not_finite(results), not_finite(expected), strict=True))
    saved = [t.double() if t.is_floating_point() else t for t in results[1:]]
    gradients = problem.backward(backend, results[1:])
    wanted = problem.reference_backward(wide.grad_y, *wide.tensors(), *saved, problem.activation, problem.output_mask)
    for name, a, b in zip(problem.names, not_finite(gradients), not_finite(wanted)):
        assert torch.equal(a, b), name
