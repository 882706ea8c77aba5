# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""`FastFeedForward`: the FFF op with its parameters, a drop-in for a feed-forward block."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .fff_op import fff
from .fff_reference import ACTIVATIONS, MAX_DEPTH, nodes_per_tree


def check_sizes(activation: str, **sizes: tuple[int, int, int | None]) -> None:
    """Check a layer's arguments: each size is (value, least, most), `most` may be None.

    Raises:
        ValueError: a size outside its range or an unknown activation.
    """
    for name, (value, least, most) in sizes.items():
        if not isinstance(value, int) or value < least or (most is not None and value > most):
            limit = "" if most is None else f" and at most {most}"
            raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}{limit}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")


class TreeLayer(nn.Module):
    """What the layers of both forms of tree hold beside their parameters: sizes, which it checks.

    Args:
        max_depth: the largest depth of this form. others: further sizes of at least 1, by name.
    Attributes:
        leaf_counts: (P, 2^D) int64 or None. Where it is a tensor, forward in training adds the rows that took each
            leaf, which is a node of the last level in the published form. It is not part of the model's state.
    Raises:
        ValueError: a size outside its range or an unknown activation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int,
        trees: int,
        activation: str,
        initializer_range: float,
        *,
        max_depth: int,
        **others: int,
    ):
        super().__init__()
        check_sizes(
            activation,
            in_features=(in_features, 1, None),
            out_features=(out_features, 1, None),
            depth=(depth, 0, max_depth),
            trees=(trees, 1, None),
            **{name: (size, 1, None) for name, size in others.items()},
        )
        self.in_features, self.out_features = in_features, out_features
        self.depth, self.trees, self.activation = depth, trees, activation
        self.initializer_range = initializer_range
        self.leaf_counts: Tensor | None = None  # no buffer: DistributedDataParallel would copy one process's to all

    @property
    def counting(self) -> bool:
        """Whether the rows that pass now are counted."""
        return self.training and self.leaf_counts is not None

    @torch.no_grad()
    def count(self, leaves: Tensor) -> None:
        """Add the leaves (N, P) that rows took, numbered from the left, to `leaf_counts`."""
        ones = torch.ones((), dtype=self.leaf_counts.dtype, device=leaves.device).expand(leaves.T.shape)
        self.leaf_counts.scatter_add_(1, leaves.T.long(), ones)

    def by_rows(self, op: Callable[..., Tensor], x: Tensor, arguments: tuple) -> Tensor:
        """An op of rows, (N, H) -> (N, H_out), on x of any shape: (..., H) -> (..., H_out)."""
        if x.dim() == 2:  # nothing to reshape: a microsecond each way counts at N = 1
            return op(x, *arguments)
        return op(x.reshape(-1, x.shape[-1]), *arguments).view(*x.shape[:-1], self.out_features)


class FastFeedForward(TreeLayer):
    """A feed-forward layer made of binary trees of neurons; each row uses depth + 1 neurons of each tree.

    Args:
        in_features: width H of the input. out_features: width H_out of the output.
        depth: D, 0 to 24; a tree has n = 2^(D+1) - 1 nodes. trees: number P >= 1 of trees, all of them walked.
        activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
        bias: whether nodes have a bias (`bias_in`), which takes part in decision and activation.
        initializer_range: standard deviation of the weights at initialisation.
    Parameters: weight_in (P*n, H), bias_in (P*n,) or None, weight_out (P*n, H_out).
    Raises:
        ValueError: a size below its minimum or an unknown activation.
    Source: arXiv 2311.10770, "UltraFastBERT-PxD".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int,
        trees: int = 1,
        activation: str = "gelu",
        bias: bool = True,
        *,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, depth, trees, activation, initializer_range, max_depth=MAX_DEPTH)
        rows = trees * nodes_per_tree(depth)
        factory = {"device": device, "dtype": dtype}
        self.weight_in = nn.Parameter(torch.empty(rows, in_features, **factory))
        self.bias_in = nn.Parameter(torch.empty(rows, **factory)) if bias else None
        self.weight_out = nn.Parameter(torch.empty(rows, out_features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights N(0, initializer_range), bias zero."""
        nn.init.normal_(self.weight_in, std=self.initializer_range)
        nn.init.normal_(self.weight_out, std=self.initializer_range)
        if self.bias_in is not None:
            nn.init.zeros_(self.bias_in)

    @property
    def neurons(self) -> int:
        """Neurons held: P * n."""
        return self.trees * nodes_per_tree(self.depth)

    @property
    def neurons_per_token(self) -> int:
        """Neurons used by one row: P * (D + 1)."""
        return self.trees * (self.depth + 1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H_out), dtype of x."""
        parameters = (self.weight_in, self.bias_in, self.weight_out, self.trees, self.depth, self.activation)
        return self.by_rows(self._counted if self.counting else fff, x, parameters)

    def _counted(self, rows: Tensor, *arguments) -> Tensor:
        """The op, which also counts the leaves that rows took."""
        y, visited = torch.ops.fastbert.fff_v1(rows, *arguments)[:2]
        last = visited.view(len(rows), self.trees, self.depth + 1)[:, :, -1]
        self.count(last - (2**self.depth - 1))
        return y

    @torch.no_grad()
    def route(self, x: Tensor) -> Tensor:
        """Visited nodes, numbered inside their tree: (..., H) -> (..., P, D+1) int64."""
        rows = x.reshape(-1, x.shape[-1]).to(self.weight_in.dtype)
        visited = torch.ops.fastbert.fff_v1(
            rows, self.weight_in, self.bias_in, self.weight_out, self.trees, self.depth, self.activation
        )[1]
        return visited.view(*x.shape[:-1], self.trees, self.depth + 1).long()

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, depth={self.depth}, trees={self.trees}, "
            f"activation={self.activation!r}, bias={self.bias_in is not None}, "
            f"neurons_per_token={self.neurons_per_token} of {self.neurons}"
        )
