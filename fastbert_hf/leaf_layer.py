# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""`LeafFeedForward`: leaf trees with their parameters, a drop-in for a feed-forward block."""

import torch
from torch import Tensor, nn

from .fff_layer import TreeLayer
from .leaf_op import leaf_trees
from .leaf_reference import MAX_LEAF_DEPTH, confidence_of, leaves_per_tree

PARAMETER_NAMES = ("router", "threshold", "weight_in", "bias_in", "weight_out", "bias_out")  # as the op takes them
ROUTER_SCALE = 4.0  # standard deviation of a router's logit for rows of unit variance


class LeafFeedForward(TreeLayer):
    """A feed-forward layer of binary trees whose leaves are small dense layers; each row uses one leaf of each tree.

    Args:
        in_features: width H of the input. out_features: width H_out of the output.
        depth: D, 0 to 12; a tree has m = 2^D leaves and r = m - 1 routers. leaf_width: neurons w >= 1 of a leaf.
        trees: number P >= 1 of trees, all of them used.
        activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
        bias: whether neurons have a bias (`bias_in`) and leaves an output bias (`bias_out`).
        initializer_range: standard deviation of the leaves' weights at initialisation.
    Parameters: router (P*r, H), threshold (P*r,), weight_in (P*m*w, H), bias_in (P*m*w,) or None,
        weight_out (P*m*w, H_out), bias_out (P*m, H_out) or None.
    Raises:
        ValueError: a size outside its range or an unknown activation.
    Source: arXiv 2308.14711; the confidence that scales a leaf is ours.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int,
        leaf_width: int,
        trees: int = 1,
        activation: str = "gelu",
        bias: bool = True,
        *,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_features, out_features, depth, trees, activation, initializer_range,
            max_depth=MAX_LEAF_DEPTH, leaf_width=leaf_width,
        )  # fmt: skip
        self.leaf_width = leaf_width
        leaves = trees * leaves_per_tree(depth)
        routers, neurons = leaves - trees, leaves * leaf_width
        factory = {"device": device, "dtype": dtype}
        self.router = nn.Parameter(torch.empty(routers, in_features, **factory))
        self.threshold = nn.Parameter(torch.empty(routers, **factory))
        self.weight_in = nn.Parameter(torch.empty(neurons, in_features, **factory))
        self.bias_in = nn.Parameter(torch.empty(neurons, **factory)) if bias else None
        self.weight_out = nn.Parameter(torch.empty(neurons, out_features, **factory))
        self.bias_out = nn.Parameter(torch.empty(leaves, out_features, **factory)) if bias else None
        self.reset_parameters()

    @property
    def router_std(self) -> float:
        """Standard deviation of the routers' weights at initialisation: logits have 4 for rows of unit variance."""
        return ROUTER_SCALE * self.in_features**-0.5

    def reset_parameters(self) -> None:
        """Leaves' weights N(0, initializer_range), routers N(0, router_std), thresholds and biases zero."""
        nn.init.normal_(self.router, std=self.router_std)
        nn.init.normal_(self.weight_in, std=self.initializer_range)
        nn.init.normal_(self.weight_out, std=self.initializer_range)
        for bias in (self.threshold, self.bias_in, self.bias_out):
            if bias is not None:
                nn.init.zeros_(bias)

    @property
    def neurons(self) -> int:
        """Neurons held: P * m * w."""
        return self.trees * leaves_per_tree(self.depth) * self.leaf_width

    @property
    def neurons_per_token(self) -> int:
        """Neurons used by one row: P * w."""
        return self.trees * self.leaf_width

    def op_arguments(self) -> tuple:
        """The op's arguments after x."""
        held = self._parameters  # six attributes of a module take a quarter of the time of a row
        try:
            parameters = [held[name] for name in PARAMETER_NAMES]
        except KeyError:  # parametrised, pruned or replicated: attributes of another kind
            parameters = [getattr(self, name) for name in PARAMETER_NAMES]
        return *parameters, self.trees, self.depth, self.activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H_out), dtype of x."""
        return self.by_rows(self._counted if self.counting else leaf_trees, x, self.op_arguments())

    def _counted(self, rows: Tensor, *arguments) -> Tensor:
        """The op, which also counts the leaves that rows took."""
        y, leaves = torch.ops.fastbert.leaf_trees_v1(rows, *arguments)[:2]
        self.count(leaves)
        return y

    @torch.no_grad()
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The leaf of each row in each tree, from the left, and its confidence: (..., H) -> (..., P) int64, float."""
        rows = x.reshape(-1, x.shape[-1]).to(self.weight_in.dtype)
        _, leaves, _, margins, _ = torch.ops.fastbert.leaf_trees_v1(rows, *self.op_arguments())
        shape = (*x.shape[:-1], self.trees)
        return leaves.view(shape).long(), confidence_of(margins).view(shape)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, depth={self.depth}, leaf_width={self.leaf_width}, "
            f"trees={self.trees}, activation={self.activation!r}, bias={self.bias_in is not None}, "
            f"neurons_per_token={self.neurons_per_token} of {self.neurons}"
        )
