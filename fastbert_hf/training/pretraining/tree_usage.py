"""Which part of its trees a model uses: counts of visited nodes over held-out text, as numbers and as a picture."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastbert_hf.fff_layer import FastFeedForward

if TYPE_CHECKING:
    from transformers import Trainer


def tree_layers(model: nn.Module) -> list[FastFeedForward]:
    """The trees of a model, in the order of its layers; empty for a dense model."""
    return [module for module in model.modules() if isinstance(module, FastFeedForward)]


@contextmanager
def counted_visits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Count, while a model runs, how many tokens visit each node.

    Args:
        model: any model; its outputs do not change.

    Yields:
        For every layer with trees, (P, n) int64 counts on the CPU, growing with every forward pass.
    """
    layers = tree_layers(model)
    counts = [torch.zeros(layer.trees, 2 ** (layer.depth + 1) - 1, dtype=torch.int64) for layer in layers]

    def hook(count: Tensor):
        def count_visits(layer: FastFeedForward, inputs: tuple[Tensor, ...]) -> None:
            with torch.no_grad():
                nodes = layer.route(inputs[0]).reshape(-1, layer.trees, layer.depth + 1)  # (N, P, D+1)
            for tree in range(layer.trees):
                count[tree] += torch.bincount(nodes[:, tree].reshape(-1), minlength=count.shape[1]).cpu()

        return count_visits

    handles = [layer.register_forward_pre_hook(hook(count)) for layer, count in zip(layers, counts)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def tree_usage(counts: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Sum up the visits of every layer.

    Args:
        counts: (P, n) visits of each layer.

    Returns:
        One entry a layer: `used_share`, the share of nodes visited at each level, root first; `leaf_entropy`, that of
        the distribution of tokens over leaves, in bits, mean over trees (D bits if all leaves are equally likely);
        `dead_nodes`, how many were never visited; `nodes`; `tokens`.
    """
    usage = []
    for count in counts:
        trees, nodes = count.shape
        depth = int(math.log2(nodes + 1)) - 1
        levels = [count[:, 2**level - 1 : 2 ** (level + 1) - 1] for level in range(depth + 1)]  # (P, 2^level)
        leaves = levels[-1].double()
        shares = leaves / leaves.sum(dim=1, keepdim=True).clamp(min=1)
        entropy = torch.special.entr(shares).sum(dim=1).mean().item() / math.log(2)
        usage.append(
            {
                "used_share": [round((level > 0).double().mean().item(), 4) for level in levels],
                "leaf_entropy": round(abs(entropy), 4),
                "dead_nodes": int((count == 0).sum()),
                "nodes": trees * nodes,
                "tokens": int(count[0, 0]),
            }
        )
    return usage


def usage_log(usage: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers of `tree_usage` under flat names, for a training log."""
    logs: dict[str, float] = {}
    for number, layer in enumerate(usage):
        logs[f"trees/layer_{number}_leaf_entropy"] = layer["leaf_entropy"]
        logs[f"trees/layer_{number}_dead_nodes"] = layer["dead_nodes"]
        for level, share in enumerate(layer["used_share"]):
            logs[f"trees/layer_{number}_level_{level}_used"] = share
    return logs


def usage_matrix(usage: list[dict[str, Any]]) -> np.ndarray:
    """(L, D+1): share of nodes used, by layer and level."""
    return np.array([layer["used_share"] for layer in usage])


class TreeUsageCallback(TrainerCallback):
    """After every evaluation, counts node visits on held-out sequences and logs them.

    Args:
        trainer: its evaluation sequences are used, and its log.
        max_tokens: how many tokens are looked at.

    Attributes:
        usage: what `tree_usage` found last; empty for a model without trees.
    """

    def __init__(self, trainer: "Trainer", max_tokens: int = 65536):
        self.trainer, self.max_tokens = trainer, max_tokens
        self.usage: list[dict[str, Any]] = []

    def on_evaluate(self, args, state, control, **kwargs):
        """Count in the first process; the trees are the same everywhere."""
        model = self.trainer.model
        # Where weights are sharded, one process alone cannot run the model.
        if not state.is_world_process_zero or not tree_layers(model) or self.trainer.is_fsdp_enabled:
            return
        sequences = self.trainer.eval_dataset
        rows = max(1, min(len(sequences), self.max_tokens // len(sequences[0]["input_ids"])))
        was_training = model.training
        model.eval()
        with torch.no_grad(), counted_visits(model) as counts:
            for start in range(0, rows, args.eval_batch_size):
                batch = [sequences[row]["input_ids"] for row in range(start, min(rows, start + args.eval_batch_size))]
                model.base_model(input_ids=torch.stack(batch).to(args.device))
        model.train(was_training)
        self.usage = tree_usage(counts)
        self.trainer.log(usage_log(self.usage))
