"""Which part of its trees a model uses: counts of visited nodes over held-out text, as numbers and as a picture."""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastbert_hf.fff_layer import FastFeedForward
from fastbert_hf.fff_reference import nodes_per_tree
from fastbert_hf.leaf_layer import LeafFeedForward
from fastbert_hf.training.module_inputs import watched_inputs

if TYPE_CHECKING:
    from transformers import Trainer


NAMED_LEAVES = 20  # a summary names at most so many dead leaves


class VisitCounts(list[Tensor]):
    """(P, n) int64 visits of every node, for each layer.

    Attributes:
        leaf_trees: whether the neurons of a layer are in its leaves only, for each layer.
    """

    def __init__(self, layers: Iterable[FastFeedForward | LeafFeedForward]):
        layers = list(layers)
        super().__init__(torch.zeros(layer.trees, nodes_per_tree(layer.depth), dtype=torch.int64) for layer in layers)
        self.leaf_trees = [isinstance(layer, LeafFeedForward) for layer in layers]


def tree_layers(model: nn.Module) -> list[FastFeedForward | LeafFeedForward]:
    """The trees of a model, of both forms, in the order of its layers; empty for a dense model."""
    return [module for module in model.modules() if isinstance(module, FastFeedForward | LeafFeedForward)]


def visited_nodes(layer: FastFeedForward | LeafFeedForward, x: Tensor) -> Tensor:
    """The nodes that rows visit in each tree, root first, numbered breadth first: (..., H) -> (N, P, D+1) int64."""
    if isinstance(layer, FastFeedForward):
        return layer.route(x).reshape(-1, layer.trees, layer.depth + 1)
    last = layer.route(x)[0].reshape(-1, layer.trees, 1) + 2**layer.depth  # counted from 1, so that halving goes up
    return (last >> torch.arange(layer.depth, -1, -1, device=last.device)) - 1


@contextmanager
def counted_visits(model: nn.Module) -> Iterator[VisitCounts]:
    """Count, while a model runs, how many tokens visit each node.

    Args:
        model: any model; its outputs do not change.

    Yields:
        For every layer with trees, (P, n) int64 counts on the CPU, growing with every forward pass. Routers of leaf
        trees count as nodes.
    """
    layers = tree_layers(model)
    counts = VisitCounts(layers)

    @torch.no_grad()
    def count_visits(number: int, x: Tensor) -> None:
        nodes, count = visited_nodes(layers[number], x), counts[number]  # (N, P, D+1), (P, n)
        for tree in range(layers[number].trees):
            count[tree] += torch.bincount(nodes[:, tree].reshape(-1), minlength=count.shape[1]).cpu()

    with watched_inputs(layers, count_visits):
        yield counts


def tree_usage(counts: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Sum up the visits of every layer.

    Args:
        counts: (P, n) visits of each layer.

    Returns:
        One entry a layer: `used_fraction`, that of the nodes visited at each level, root first; `leaf_entropy`, that
        of the distribution of tokens over leaves, in bits, mean over trees (D bits if all leaves are equally likely);
        `dead_nodes`, how many were never visited; `nodes`; `tokens`. Of counts that `counted_visits` made, layers of
        leaf trees also have `leaf_fractions`, P lists of the m fractions of tokens, and `dead_leaves`, [tree, leaf]
        of each leaf that no token reached, from the left.
    """
    usage = []
    leaf_trees = getattr(counts, "leaf_trees", None) or itertools.repeat(False)
    for count, has_leaves in zip(counts, leaf_trees):
        trees, nodes = count.shape
        depth = int(math.log2(nodes + 1)) - 1
        ends = [nodes_per_tree(level) for level in range(-1, depth + 1)]
        levels = [count[:, first:end] for first, end in itertools.pairwise(ends)]  # (P, 2^level) each
        leaves = levels[-1].double()
        fractions = leaves / leaves.sum(dim=1, keepdim=True).clamp(min=1)
        entropy = torch.special.entr(fractions).sum(dim=1).mean().item() / math.log(2)
        usage.append(
            {
                "used_fraction": [round((level > 0).double().mean().item(), 4) for level in levels],
                "leaf_entropy": round(abs(entropy), 4),
                "dead_nodes": int((count == 0).sum()),
                "nodes": trees * nodes,
                "tokens": int(count[0, 0]),
            }
        )
        if has_leaves:
            usage[-1]["leaf_fractions"] = [[round(fraction, 6) for fraction in tree] for tree in fractions.tolist()]
            usage[-1]["dead_leaves"] = (levels[-1] == 0).nonzero().tolist()
    return usage


def dead_leaf_names(usage: list[dict[str, Any]]) -> list[str] | None:
    """The leaves that no token reached, each with its layer and tree, the first 20; None without leaf trees."""
    layers = [(number, layer["dead_leaves"]) for number, layer in enumerate(usage) if "dead_leaves" in layer]
    if not layers:
        return None
    names = [f"layer {number}, tree {tree}, leaf {leaf}" for number, dead in layers for tree, leaf in dead]
    more = [f"and {len(names) - NAMED_LEAVES} more"] if len(names) > NAMED_LEAVES else []
    return names[:NAMED_LEAVES] + more


def usage_log(usage: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers of `tree_usage` under flat names, for a training log."""
    logs: dict[str, float] = {}
    for number, layer in enumerate(usage):
        logs[f"trees/layer_{number}_leaf_entropy"] = layer["leaf_entropy"]
        logs[f"trees/layer_{number}_dead_nodes"] = layer["dead_nodes"]
        if "dead_leaves" in layer:
            logs[f"trees/layer_{number}_dead_leaves"] = len(layer["dead_leaves"])
            logs[f"trees/layer_{number}_largest_leaf_fraction"] = max(map(max, layer["leaf_fractions"]))
        for level, fraction in enumerate(layer["used_fraction"]):
            logs[f"trees/layer_{number}_level_{level}_used"] = fraction
    return logs


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
