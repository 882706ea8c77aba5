"""The forms of a feed-forward layer that the paper compares, in PyTorch: dense, dense-and-mask, batched products.

Baselines only: the model never uses them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dense(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor) -> Tensor:
    """Two matrix products and a GELU: x (N, H), weight_in (n, H), bias_in (n,), weight_out (n, H) -> (N, H)."""
    return F.gelu(F.linear(x, weight_in, bias_in)) @ weight_out


def dense_bmm(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor) -> Tensor:
    """The paper's batched baseline: one matrix-vector product a token, over expanded weights."""
    rows = x.shape[0]
    logits = torch.bmm(weight_in.expand(rows, -1, -1), x.unsqueeze(2)).squeeze(2) + bias_in  # (N, n)
    return torch.bmm(F.gelu(logits).unsqueeze(1), weight_out.expand(rows, -1, -1)).squeeze(1)


def mixture_of_experts(x: Tensor, router: Tensor, weight_in: Tensor, weight_out: Tensor) -> Tensor:
    """One expert a token by grouped matrix products: the other way to use few of many neurons.

    Args:
        x: (N, H). router: (E, H). weight_in: (E, H, w). weight_out: (E, w, H). Neurons in all: E * w, used: w.

    Returns:
        (N, H). The weight of the only expert is 1, so that the router gets no gradient, as a tree's decisions do not.
    """
    with torch.no_grad():
        expert = F.linear(x, router).argmax(dim=-1)  # (N,)
        expert, order = torch.sort(expert, stable=True)
        ends = torch.searchsorted(expert, torch.arange(router.shape[0], device=x.device), right=True)
        place = torch.argsort(order)
    hidden = F.gelu(F.grouped_mm(x[order], weight_in, offs=ends.to(torch.int32)))  # (N, w), sorted by expert
    return F.grouped_mm(hidden, weight_out, offs=ends.to(torch.int32))[place]


def dense_and_mask(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, trees: int, depth: int
) -> Tensor:
    """What the published model does: every neuron of every tree, then a mask that keeps the path."""
    logits = F.linear(x, weight_in, bias_in)  # (N, P*n)
    by_tree = logits.view(x.shape[0], trees, -1)
    with torch.no_grad():
        visited = torch.zeros_like(by_tree)
        node = torch.zeros(x.shape[0], trees, 1, dtype=torch.long, device=x.device)
        for _ in range(depth + 1):
            visited.scatter_(2, node, 1.0)
            node = 2 * node + 1 + (by_tree.gather(2, node) > 0)
            node.clamp_(max=by_tree.shape[2] - 1)
    return (F.gelu(logits) * visited.flatten(1)) @ weight_out


def fff_bmm(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, depth: int) -> Tensor:
    """The paper's batched form of one tree: gather each token's row, one batched dot product a level."""
    rows = torch.arange(x.shape[0], device=x.device)
    nodes = torch.zeros(x.shape[0], depth + 1, dtype=torch.long, device=x.device)
    logits = x.new_empty(x.shape[0], depth + 1)
    node = nodes[:, 0]
    for level in range(depth + 1):
        nodes[:, level] = node
        logits[:, level] = torch.bmm(weight_in[node].unsqueeze(1), x.unsqueeze(2)).flatten() + bias_in[node]
        node = 2 * node + 1 + (logits[rows, level] > 0)
    return torch.bmm(F.gelu(logits).unsqueeze(1), weight_out[nodes]).squeeze(1)
