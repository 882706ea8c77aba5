"""Both forms of tree as the tests of what they share see them: trees of single neurons, and leaf trees."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastbert_hf import FastFeedForward, LeafFeedForward, fff, leaf_trees
from fastbert_hf.fff_reference import fff_traceable, nodes_per_tree
from fastbert_hf.leaf_traceable import leaf_traceable
from tests.oracle import dense_and_mask, dense_leaves, path_logits

MARGIN = 1e-4  # of every decision, and between the two least certain ones of a leaf tree


@dataclass(frozen=True)
class Form:
    """One form of tree: its op, its layer, its independent oracle, and random inputs for them.

    The order of the tensors is that of the op: x, the parameters, then trees, depth and activation.
    """

    name: str  # in the registry of backends
    registered: str  # with PyTorch
    function: Callable[..., Tensor]
    traceable: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    parameter_names: tuple[str, ...]
    biases: tuple[str, ...]  # which of them may be None
    leaf_width: int | None = None

    @property
    def op(self):
        return getattr(torch.ops.fastbert, self.registered)

    def layer(self, in_features: int, out_features: int, depth: int, *arguments, **options) -> nn.Module:
        if self.leaf_width is None:
            return FastFeedForward(in_features, out_features, depth, *arguments, **options)
        return LeafFeedForward(in_features, out_features, depth, self.leaf_width, *arguments, **options)

    def shapes(self, width: int, width_out: int, trees: int, depth: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, in order."""
        if self.leaf_width is None:
            nodes = trees * nodes_per_tree(depth)
            return {"weight_in": (nodes, width), "bias_in": (nodes,), "weight_out": (nodes, width_out)}
        leaves = trees * 2**depth
        routers, neurons = leaves - trees, leaves * self.leaf_width
        return {
            "router": (routers, width),
            "threshold": (routers,),
            "weight_in": (neurons, width),
            "bias_in": (neurons,),
            "weight_out": (neurons, width_out),
            "bias_out": (leaves, width_out),
        }

    def inputs(self, num_rows, width, width_out, trees, depth, *, bias=True, dtype=torch.float64, seed=0):
        """Random x and parameters whose decisions keep a margin: rows with one near a tie are drawn again."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        parameters = {}
        for name, shape in self.shapes(width, width_out, trees, depth).items():
            small = 0.1 if len(shape) == 1 or name == "bias_out" else 1.0
            parameters[name] = draw(*shape) * small if bias or name not in self.biases else None
        x = draw(num_rows, width)
        for _ in range(200):
            near = self.near_ties(x, parameters, trees, depth)
            if not near.any():
                break
            x[near] = draw(int(near.sum()), width)
        return tuple(None if t is None else t.to(dtype) for t in (x, *parameters.values()))

    def near_ties(self, x: Tensor, parameters: dict[str, Tensor | None], trees: int, depth: int) -> Tensor:
        """Rows (N,) where rounding could change a decision, or which one is the least certain."""
        if self.leaf_width is None:
            logits = x @ parameters["weight_in"].T
            if parameters["bias_in"] is not None:
                logits = logits + parameters["bias_in"]
            return logits.abs().amin(1) < MARGIN
        logits, _ = path_logits(x, parameters["router"], parameters["threshold"], trees, depth)
        least = logits.abs().sort(-1).values[..., :2]  # (N, P, at most 2)
        gaps = torch.cat([least[..., :1], least.diff(dim=-1)], -1)
        return (gaps < MARGIN).flatten(1).any(1)


NODES = Form(
    "fff",
    "fff_v1",
    fff,
    fff_traceable,
    lambda x, weight_in, bias_in, weight_out, trees, depth, activation="gelu": dense_and_mask(
        x, weight_in, bias_in, weight_out, trees, activation
    )[0],
    ("weight_in", "bias_in", "weight_out"),
    ("bias_in",),
)


def leaves_of(width: int) -> Form:
    """Leaf trees with `width` neurons a leaf."""
    return Form(
        "leaf_trees",
        "leaf_trees_v1",
        leaf_trees,
        leaf_traceable,
        lambda *arguments: dense_leaves(*arguments)[0],
        ("router", "threshold", "weight_in", "bias_in", "weight_out", "bias_out"),
        ("bias_in", "bias_out"),
        width,
    )


LEAVES = leaves_of(5)
FORMS = {"nodes": NODES, "leaves": LEAVES}


def with_gradients(tensors) -> list[Tensor | None]:
    """Copies of the tensors that ask for a gradient."""
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
