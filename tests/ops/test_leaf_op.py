"""Leaf trees: routes, confidence, ties, products by leaf, arguments; test_both_forms.py has what both ops share."""

import pytest
import torch

from fastbert_hf import leaf_op, leaf_reference, leaf_trees
from fastbert_hf.backends_fastbert import BACKENDS, use_backend
from fastbert_hf.leaf_reference import can_group, find_routes, leaf_backward, leaf_forward
from fastbert_hf.leaf_traceable import TilesByLeaf, leaf_traceable
from tests.forms import LEAVES, leaves_of, with_gradients
from tests.oracle import dense_leaves

TINY = LEAVES.inputs(1, 4, 4, 1, 2, dtype=torch.float32)
RUNNING = [
    name for name, b in BACKENDS["leaf_trees"].items() if not b.supports(TINY[0], TINY[3], TINY[5], 1, 2, "gelu")
]
each_backend = pytest.mark.parametrize("backend", RUNNING)


@pytest.mark.parametrize("leaf_width", [1, 2, 7])
@pytest.mark.parametrize("shape", [(9, 6, 4, 1, 0), (20, 6, 4, 3, 1), (30, 9, 5, 2, 5)], ids=str)
def test_routes_and_margins_equal_the_oracle(shape, leaf_width):
    *_, trees, depth = shape
    inputs = leaves_of(leaf_width).inputs(*shape)
    y, leaves, deciders, margins, logits = torch.ops.fastbert.leaf_trees_v1(*inputs, trees, depth, "silu")
    expected, reached, least_certain = dense_leaves(*inputs, trees, depth, "silu")
    torch.testing.assert_close(y, expected)
    assert torch.equal(leaves.long(), reached) and torch.equal(deciders.long(), least_certain)
    x, router, threshold, weight_in, bias_in, *_ = inputs
    routers = deciders + torch.arange(trees) * (2**depth - 1)
    if depth:
        torch.testing.assert_close(margins, (x.unsqueeze(1) * router[routers]).sum(-1) - threshold[routers])
    else:
        assert (margins == torch.inf).all() and (deciders == 0).all()
    neurons = ((reached + torch.arange(trees) * 2**depth) * leaf_width).unsqueeze(-1) + torch.arange(leaf_width)
    torch.testing.assert_close(logits, (x @ weight_in.T + bias_in).gather(1, neurons.flatten(1)).view_as(logits))


def path_of_logits(logits, dtype=torch.float32):
    """A tree whose routers of one level all have that level's logit for x = 1; its leaves all differ."""
    depth = len(logits)
    levels = torch.repeat_interleave(torch.arange(depth), 2 ** torch.arange(depth))
    router = torch.tensor(logits, dtype=dtype)[levels].unsqueeze(1)  # (r, 1)
    leaves = 2**depth
    weight_in, weight_out = torch.zeros(leaves, 1, dtype=dtype), torch.ones(leaves, 1, dtype=dtype)
    bias_in = torch.arange(1, leaves + 1, dtype=dtype)
    return router, torch.zeros(leaves - 1, dtype=dtype), weight_in, bias_in, weight_out, None


INF, NAN = float("inf"), float("nan")
# logits of the decisions, the leaf from the left, the level of the least certain decision
WALKS = [
    ([0.0, 1.0], 1, 0),
    ([-0.0, 1.0], 1, 0),
    ([1.0, -0.0], 2, 1),
    ([NAN, 1.0], 1, 0),
    ([1.0, NAN], 2, 1),
    ([NAN, NAN], 0, 0),
    ([NAN, 0.0], 0, 0),
    ([0.0, NAN], 0, 1),
    ([INF, -INF, 2.0], 5, 2),
    ([INF, -INF], 2, 0),
    ([2.0, -2.0, 2.0], 5, 0),
    ([3.0, -2.0, 2.0, 2.0], 11, 1),
    ([-1e-30, 1e-30], 1, 0),
    ([1e-45, 1.0], 3, 0),
]


@each_backend
@pytest.mark.parametrize(("logits", "leaf", "level"), WALKS, ids=str)
def test_ties_and_nan_go_left_and_the_first_of_equally_certain_decisions_counts(backend, logits, leaf, level):
    parameters = path_of_logits(logits)
    depth, node = len(logits), leaf >> (len(logits) - level)
    for rows in (1, 5):  # kernels may have one way for a few rows and another for many
        call = (torch.ones(rows, 1), *parameters, 1, depth, "relu")
        y, leaves, deciders, margins, hidden = BACKENDS["leaf_trees"][backend].forward(*call)
        assert leaves.tolist() == [[leaf]] * rows
        assert deciders.tolist() == [[2**level - 1 + node]] * rows
        expected = torch.tensor(logits)[level].expand(rows, 1)
        torch.testing.assert_close(margins, expected, rtol=0, atol=0, equal_nan=True)
        assert (hidden == leaf + 1).all()
        torch.testing.assert_close(y, expected.abs().sigmoid() * (leaf + 1), equal_nan=True)


@each_backend
@pytest.mark.parametrize("traced", [False, True])
def test_of_equally_certain_decisions_the_first_gets_the_gradient(backend, traced):
    """Equal but for their sign: every one is the minimum, and only the first moves it."""
    router, threshold, *leaf = path_of_logits([2.0, -2.0, 2.0])
    x, router, threshold = with_gradients((torch.ones(3, 1), router, threshold))
    with use_backend(backend):
        function = leaf_traceable if traced else leaf_trees
        function(x, router, threshold, *leaf, 1, 3, "relu").sum().backward()
    c = torch.tensor(2.0).sigmoid()
    gradient = 3 * 6 * c * (1 - c)  # three rows at leaf 5, which says 6
    expected = torch.zeros(7)
    expected[0] = gradient
    torch.testing.assert_close(router.grad.flatten(), expected)
    torch.testing.assert_close(threshold.grad, -expected)
    torch.testing.assert_close(x.grad, torch.full((3, 1), 2.0 * gradient / 3))


@each_backend
def test_a_tie_gives_its_router_no_gradient(backend):
    """|l| has no derivative at 0; PyTorch's is 0."""
    router, threshold, *leaf = with_gradients(path_of_logits([0.0, 1.0]))
    with use_backend(backend):
        leaf_trees(torch.ones(3, 1), router, threshold, *leaf, 1, 2, "relu").sum().backward()
    assert (router.grad == 0).all() and (threshold.grad == 0).all() and (leaf[1].grad != 0).any()


@each_backend
def test_the_confidence_grows_from_a_half_to_one(backend):
    values = torch.tensor([0.0, 1e-6, 0.5, 3.0, 20.0, 90.0, 1e4])
    router, *parameters = path_of_logits([1.0, 1e38])
    y = BACKENDS["leaf_trees"][backend].infer(values.unsqueeze(1), router, *parameters, 1, 2, "relu").squeeze(1)
    expected = values.double().sigmoid() * torch.tensor([1.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    torch.testing.assert_close(y.double(), expected, rtol=3e-7, atol=0)


@each_backend
def test_depth_zero_is_a_sum_of_dense_layers(backend):
    x, router, threshold, weight_in, bias_in, weight_out, bias_out = leaves_of(6).inputs(
        7, 5, 4, 3, 0, dtype=torch.float32
    )
    assert router.shape == (0, 5) and threshold.shape == (0,)
    call = with_gradients((x, router, threshold, weight_in, bias_in, weight_out, bias_out))
    with use_backend(backend):
        y = leaf_trees(*call, 3, 0)
    dense = with_gradients((x, weight_in, bias_in, weight_out, bias_out))
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(dense[0], dense[1], dense[2]))
    expected = hidden @ dense[3] + dense[4].sum(0)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip((call[0], *call[3:]), dense):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-5)
    assert call[1].grad.shape == (0, 5) and call[2].grad.shape == (0,)


def test_the_decisions_are_those_of_float32_in_every_product_setting():
    """Routing is a product and a sum, never a matrix product, which may run in TF32 or bfloat16."""
    x, router, threshold, *_ = LEAVES.inputs(50, 24, 8, 2, 4, dtype=torch.float32)
    expected = find_routes(x, router, threshold, 2, 4)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert all(torch.equal(a, b) for a, b in zip(find_routes(x, router, threshold, 2, 4), expected))
    finally:
        torch.set_float32_matmul_precision(before)


# ---- products by leaf as torch's grouped matrix product does them on a GPU ----


HAS_GROUPED_MM = torch.__version__ >= (2, 10)  # which brought torch.nn.functional.grouped_mm


@pytest.fixture
def grouped(monkeypatch):
    """Take the grouped product wherever `can_group` would on a GPU; -> how often it ran."""
    calls, grouped_mm = [], torch.nn.functional.grouped_mm

    def counted(*args, **kwargs):
        calls.append(args[1].shape)
        return grouped_mm(*args, **kwargs)

    monkeypatch.setattr(leaf_reference.F, "grouped_mm", counted)
    monkeypatch.setattr(leaf_reference, "can_group", lambda vectors, weight: can_group(vectors, OnGpu(weight)))
    return calls


class OnGpu:
    """A weight that says it lies on a GPU."""

    is_cuda = True

    def __init__(self, weight):
        self.dtype, self.shape = weight.dtype, weight.shape


@pytest.mark.skipif(not HAS_GROUPED_MM, reason="torch has a grouped matrix product from 2.10 on")
@pytest.mark.parametrize("shape", [(40, 16, 24, 2, 3), (3, 16, 8, 1, 4), (5, 8, 16, 3, 0), (0, 8, 8, 1, 2)], ids=str)
def test_grouped_products_equal_those_leaf_by_leaf(grouped, shape):
    """Leaves without rows included. Both sum in float32; the grouped product rounds its results to bfloat16."""
    *_, trees, depth = shape
    inputs = leaves_of(8).inputs(*shape, dtype=torch.bfloat16)
    y, *saved = leaf_forward(*inputs, trees, depth, "gelu")
    assert len(grouped) == 2 * trees
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = leaf_backward(grad_y, *inputs, *saved, "gelu", [True] * 7)
    assert len(grouped) == 4 * trees
    wide = [t.double() for t in inputs]
    expected_y, *expected_saved = leaf_forward(*wide, trees, depth, "gelu")
    assert len(grouped) == 4 * trees  # float64 goes leaf by leaf
    for given, expected in zip(saved[:3], expected_saved):
        torch.testing.assert_close(given.to(expected.dtype), expected, rtol=1e-5, atol=1e-5)
    expected = leaf_backward(grad_y.double(), *wide, *expected_saved, "gelu", [True] * 7)
    for given, wanted in zip((y, saved[3], *gradients), (expected_y, expected_saved[3], *expected)):
        assert given.shape == wanted.shape
        error, size = (given.double() - wanted).norm(), wanted.norm()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps * size, (error, size)


@pytest.mark.parametrize(
    ("dtype", "widths", "expected"),
    [
        (torch.bfloat16, (16, 8), True),
        (torch.float32, (16, 8), False),
        (torch.float16, (16, 8), False),
        (torch.bfloat16, (12, 8), False),
        (torch.bfloat16, (16, 7), False),
    ],
    ids=str,
)
def test_products_are_grouped_where_rows_are_whole_16_bytes(dtype, widths, expected):
    vectors, weight = torch.zeros(3, widths[0]), torch.zeros(4, *widths, dtype=dtype)
    assert not can_group(vectors, weight)  # a CPU
    assert can_group(vectors, OnGpu(weight)) == (expected and HAS_GROUPED_MM)


# ---- products by tiles of rows, as exported programs do them ----


@pytest.mark.parametrize(("num_leaves", "taken"), [(8, 8), (8, 1), (64, 3), (2, 2), (4096, 4096)], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 7, 300])
def test_tiles_hold_every_row_once_beside_rows_of_its_leaf(num_rows, num_leaves, taken):
    leaves = torch.randint(taken, (num_rows,), generator=torch.Generator().manual_seed(0))
    tiles = TilesByLeaf(leaves + 2 * num_leaves, 2, num_leaves)
    num_tiles, size = tiles.rows.shape
    assert num_tiles <= min(num_rows, num_rows // size + taken), "weights are gathered once a tile"
    assert num_tiles * size <= num_rows + taken * size, "few places are empty"
    assert torch.equal(tiles.rows.flatten()[tiles.slot], torch.arange(num_rows))
    assert (tiles.rows == num_rows).sum() == tiles.rows.numel() - num_rows
    tile_of_row = tiles.slot // size
    assert torch.equal(tiles.leaf[tile_of_row], leaves + 2 * num_leaves)
    vectors, weight = torch.randn(num_rows, 3), torch.randn(num_leaves, 3, 5)
    expected = (vectors.unsqueeze(1) @ weight[leaves]).squeeze(1)
    found = tiles.products(vectors, weight[tiles.leaf - 2 * num_leaves])
    torch.testing.assert_close(found, expected)


def test_a_row_of_nan_leaves_the_traceable_gradients_of_other_leaves_alone():
    x, router, threshold, *leaf = leaves_of(3).inputs(20, 8, 8, 1, 3, dtype=torch.float32)
    x[0] = torch.nan  # goes left: to leaf 0
    call = with_gradients((x, router, threshold, *leaf))
    leaf_traceable(*call, 1, 3, "gelu").square().sum().backward()
    for weight in (call[3], call[5]):
        by_leaf = weight.grad.view(8, -1)
        assert by_leaf[0].isnan().all() and by_leaf[1:].isfinite().all()


# ---- arguments ----


def shaped(**shapes):
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


BAD_SHAPES = {
    r"router has shape \(6, 8\); expected \(7, 8\)": shaped(router=(6, 8)),
    r"router has shape \(7, 9\); expected \(7, 8\)": shaped(router=(7, 9)),
    r"threshold has shape \(8,\); expected \(7,\)": shaped(threshold=8),
    r"threshold has shape \(7, 1\); expected \(7,\)": shaped(threshold=(7, 1)),
    "weight_in has 41 rows; expected a positive multiple of 8, the leaves of 1 trees of depth 3": shaped(
        weight_in=(41, 8)
    ),
    "weight_in has 0 rows; expected a positive multiple of 8": shaped(weight_in=(0, 8), weight_out=(0, 8)),
    r"weight_in has shape \(40, 9\); expected \(40, 8\)": shaped(weight_in=(40, 9)),
    r"router has shape \(7, 8\); expected \(7, 9\)": shaped(x=(2, 9)),
    r"bias_in has shape \(8,\); expected \(40,\)": shaped(bias_in=8),
    r"weight_out has shape \(48, 8\); expected \(40, 8\)": shaped(weight_out=(48, 8)),
    r"bias_out has shape \(40, 8\); expected \(8, 8\)": shaped(bias_out=(40, 8)),
    r"bias_out has shape \(8, 7\); expected \(8, 8\)": shaped(bias_out=(8, 7)),
    r"router has shape \(7, 8\); expected \(15, 8\)": {"depth": 4, **shaped(weight_in=(48, 8))},
    r"router has shape \(7, 8\); expected \(14, 8\)": {"trees": 2, **shaped(weight_in=(48, 8))},
}


@pytest.mark.parametrize("message", BAD_SHAPES)
@pytest.mark.parametrize("kind", ["direct", "with_gradients", "meta", "exported"])
def test_wrong_shapes_raise_a_value_error_that_names_them(message, kind, monkeypatch):
    good = {name: torch.zeros(shape) for name, shape in LEAVES.shapes(8, 8, 1, 3).items()}
    call = {"x": torch.zeros(2, 8), **good, "trees": 1, "depth": 3} | BAD_SHAPES[message]
    if kind == "with_gradients":
        call["x"].requires_grad_()
    elif kind == "meta":
        call = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    elif kind == "exported":
        monkeypatch.setattr(leaf_op, "is_exporting", lambda: True)
    with pytest.raises(ValueError, match=message):
        leaf_trees(**call)
