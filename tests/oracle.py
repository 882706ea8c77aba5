"""Independent oracles: the trees as dense-and-mask, and the published model as one function of its tensors.

Both follow the published semantics step by step and share no code with fastbert_hf.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda logits: F.gelu(logits, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def path_mask(logits: Tensor) -> Tensor:
    """Which nodes a row visits, from the logits of all nodes of every tree: (N, P, n) -> bool (N, P, n)."""
    num_rows, trees, nodes = logits.shape
    visited = torch.zeros(num_rows, trees, nodes, dtype=torch.bool)
    for row in range(num_rows):
        for tree in range(trees):
            node = 0
            while node < nodes:
                visited[row, tree, node] = True
                node = 2 * node + (2 if logits[row, tree, node] > 0 else 1)
    return visited


def dense_and_mask(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, trees: int, activation: str = "gelu"
) -> tuple[Tensor, Tensor]:
    """Compute every neuron, then zero the unvisited: -> y (N, H_out), visited nodes (N, P, D+1)."""
    logits = F.linear(x, weight_in, bias_in)  # (N, P*n)
    visited = path_mask(logits.detach().view(x.shape[0], trees, -1))
    hidden = torch.where(visited.flatten(1), ACTIVATIONS[activation](logits), 0.0)
    nodes = (
        visited.nonzero()[:, 2].view(x.shape[0], trees, -1) if x.shape[0] else visited.new_zeros(0, trees, 1).long()
    )
    return hidden @ weight_out, nodes


def published_forward(arch: dict, tensors: dict[str, Tensor], input_ids: Tensor, attention_mask: Tensor | None):
    """The published encoder from a config's `arch` and a checkpoint's tensors: ids (B, T) -> hidden (B, T, H)."""
    num_tokens, width, heads = input_ids.shape[1], arch["hidden_size"], arch["attention"]["num_attention_heads"]
    eps = arch["norm_eps"]

    def norm(hidden, name):
        return F.layer_norm(hidden, (width,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    frequencies = torch.exp(torch.arange(0, width, 2).float() * (-math.log(10000.0) / width))
    angles = torch.arange(num_tokens).float()[:, None] * frequencies
    positions = torch.zeros(num_tokens, width)
    positions[:, 0::2], positions[:, 1::2] = angles.sin(), angles.cos()
    hidden = tensors["encoder.embedding.word_embedding.weight"][input_ids]
    hidden = norm(
        hidden + tensors["encoder.embedding.pos_embedding.scale_factor"] * positions, "encoder.embedding.norm"
    )
    for index in range(arch["num_transformer_layers"]):
        layer = f"encoder.layers.{index}"
        fused = F.linear(
            norm(hidden, f"{layer}.norm1"), tensors[f"{layer}.attn.self_attention.query_key_value.weight"]
        )
        query, key, value = fused.view(*input_ids.shape, heads, -1).chunk(3, dim=-1)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(width // heads)
        if attention_mask is not None:
            scores = scores + (1.0 - attention_mask[:, None, None, :]) * -10000.0
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
        hidden = hidden + F.linear(mixed, tensors[f"{layer}.attn.dense.weight"])
        hidden = hidden + _published_feed_forward(arch, tensors, f"{layer}.ffn", norm(hidden, f"{layer}.norm2"))
    return norm(hidden, "encoder.final_norm")


def _published_feed_forward(arch: dict, tensors: dict[str, Tensor], name: str, hidden: Tensor) -> Tensor:
    if arch.get("intermed_type") == "fff":
        y, _ = dense_and_mask(
            hidden.flatten(0, 1),
            tensors[f"{name}.linear_in.weight"],
            tensors[f"{name}.linear_in.bias"],
            tensors[f"{name}.linear_out.weight"].T,
            arch["intermed_size"],
        )
        return y.view_as(hidden)
    inner = F.linear(hidden, tensors[f"{name}.dense_in.weight"])
    if "glu" in arch["nonlin"]:
        value, gate = inner.chunk(2, dim=-1)
        inner = value * F.gelu(gate)
    else:
        inner = F.gelu(inner)
    return F.linear(inner, tensors[f"{name}.dense_out.weight"])


def path_logits(x: Tensor, router: Tensor, threshold: Tensor, trees: int, depth: int) -> tuple[Tensor, Tensor]:
    """Logits of the decisions of leaf trees (N, P, D) and their routers (N, P, D), from the logits of all routers."""
    logits = (x @ router.T - threshold).view(x.shape[0], trees, 2**depth - 1)  # (N, P, r)
    visited = torch.zeros(x.shape[0], trees, depth, dtype=torch.int64)
    for level in range(1, depth):
        parent = visited[..., level - 1 : level]
        goes_right = logits.detach().gather(-1, parent) > 0
        visited[..., level : level + 1] = 2 * parent + 1 + goes_right.long()
    return logits.gather(-1, visited), visited


def dense_leaves(
    x: Tensor,
    router: Tensor,
    threshold: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    trees: int,
    depth: int,
    activation: str = "gelu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute every leaf, then zero those that a row did not reach.

    Returns: y (N, H_out); the leaf of each row in each tree and the router of its least certain decision, the first
    of equals, both (N, P) int64.
    """
    num_rows, leaves = x.shape[0], 2**depth
    logits, visited = path_logits(x, router, threshold, trees, depth)
    reached, deciders = torch.zeros(2, num_rows, trees, dtype=torch.int64)
    confidence = x.new_ones(num_rows, trees)
    for row in range(num_rows):
        for tree in range(trees):
            for level in range(depth):
                reached[row, tree] = 2 * reached[row, tree] + (logits[row, tree, level] > 0)
            if depth:
                certainty = logits[row, tree].abs().tolist()
                first = certainty.index(min(certainty))
                deciders[row, tree] = visited[row, tree, first]
                confidence[row, tree] = logits[row, tree, first].abs().sigmoid()
    width, width_out = weight_in.shape[0] // (trees * leaves), weight_out.shape[1]
    hidden = ACTIVATIONS[activation](F.linear(x, weight_in, bias_in)).view(num_rows, trees, leaves, width)
    y = torch.einsum("npmw,pmwo->npmo", hidden, weight_out.view(trees, leaves, width, width_out))
    if bias_out is not None:
        y = y + bias_out.view(trees, leaves, width_out)
    mask = F.one_hot(reached, leaves).bool()
    y = torch.where(mask.unsqueeze(-1), confidence[..., None, None] * y, 0.0)
    return y.sum((1, 2)), reached, deciders
