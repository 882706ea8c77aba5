"""Trees whose leaves stay equally used: while a model trains, thresholds follow the median of what reaches them.

No loss term is involved. After each optimizer step, a router that sent more than half of its rows to the right gets a
higher threshold, one that sent fewer a lower one. In the published form, where a node's neuron decides, the neuron's
bias moves the other way, and its activation with it. Source: ours.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from fastbert_hf.fff_layer import TreeLayer
from fastbert_hf.leaf_layer import LeafFeedForward

if TYPE_CHECKING:
    from transformers import Trainer

TRUSTED_ROWS = 64  # a router that so many rows reach moves half as far as one that all rows reach


def leaf_layers(model: nn.Module) -> list[LeafFeedForward]:
    """The layers of leaf trees of a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, LeafFeedForward)]


def balanced_layers(model: nn.Module) -> list[TreeLayer]:
    """The layers of trees that have thresholds: of the published form, those with a bias."""
    layers = [module for module in model.modules() if isinstance(module, TreeLayer)]
    return [layer for layer in layers if _threshold(layer) is not None]


def _threshold(layer: TreeLayer) -> Tensor | None:
    """The parameter that holds a layer's thresholds: (P*r,), or (P*n,) with the other sign, or none."""
    return layer.threshold if isinstance(layer, LeafFeedForward) else layer.bias_in


def start_counting(model: nn.Module) -> None:
    """Have every layer of trees count the rows of each leaf while it trains, from zero."""
    for layer in balanced_layers(model):
        layer.leaf_counts = torch.zeros(layer.trees, 2**layer.depth, dtype=torch.int64, device=layer.weight_in.device)


def stop_counting(model: nn.Module) -> None:
    """Have no layer count any more."""
    for layer in balanced_layers(model):
        layer.leaf_counts = None


def check_balance(rate: float, model: nn.Module | None = None) -> None:
    """Check a rate and, where it is given, that the model has what is to be balanced.

    Raises:
        ValueError: a rate that is negative or not finite; one above 0 and a model without trees that have thresholds.
    """
    if not 0 <= rate < math.inf:
        raise ValueError(f"balance_leaves must be a rate of 0 or above; got {rate}")
    if rate and model is not None and not balanced_layers(model):
        raise ValueError(f"balance_leaves is {rate} and the model has no trees, or trees without biases")


def router_counts(leaf_counts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that reached each router, and those of them that went right.

    Args:
        leaf_counts: (P, m) rows of each leaf.

    Returns:
        Both (P, r), r = m - 1, breadth first.
    """
    reached, right = [leaf_counts], []
    while reached[0].shape[1] > 1:
        pairs = reached[0].unflatten(1, (-1, 2))  # (P, k, 2): left, right
        right.insert(0, pairs[:, :, 1])
        reached.insert(0, pairs.sum(-1))
    if not right:
        return leaf_counts[:, :0], leaf_counts[:, :0]
    return torch.cat(reached[:-1], 1), torch.cat(right, 1)


@torch.no_grad()
def balance_leaves(model: nn.Module, rate: float) -> None:
    """Move every threshold towards the median of the rows counted since the last call, and count from zero again.

    The step is rate * (fraction that went right - 1/2) * n / (n + 64) for n rows that reached the router, over all
    processes of a training that is distributed; so all of them have the same thresholds afterwards. The logits of a
    layer that begins from data have a standard deviation of 4: there a rate of 10 goes the whole way at once. For a
    call at every step choose one well below. Thresholds that are not trained stay.

    A threshold of 16 bits loses a step that is smaller than its rounding: keep weights in float32.

    Args:
        model: its layers of trees count (`start_counting`); those that do not are left out.
        rate: in units of the logit. Rows that gradient checkpointing computes twice are counted twice.

    Raises:
        ValueError: a rate that is negative or not finite; weights of which this process holds a part only.
    """
    check_balance(rate)
    layers = [layer for layer in balanced_layers(model) if layer.leaf_counts is not None]
    if not layers:
        return
    for layer, counts in zip(layers, _counted_everywhere(layers)):
        reached, right = router_counts(counts)
        threshold = _threshold(layer)
        thresholds = reached.numel() if isinstance(layer, LeafFeedForward) else layer.neurons
        if threshold.shape != (thresholds,):
            raise ValueError(
                f"a layer of {thresholds} thresholds has {tuple(threshold.shape)} in this process: leaves "
                "cannot be balanced while weights are sharded"
            )
        if threshold.requires_grad:
            reached, right = reached.double(), right.double()
            excess = right / reached.clamp(min=1) - 0.5
            _raise_thresholds(layer, rate * excess * reached / (reached + TRUSTED_ROWS))
        layer.leaf_counts.zero_()


def _raise_thresholds(layer: TreeLayer, steps: Tensor) -> None:
    """Add steps (P, r) to the thresholds of a layer's routers."""
    steps = steps.to(_threshold(layer).dtype)
    if isinstance(layer, LeafFeedForward):
        layer.threshold += steps.flatten()
    else:  # a node's neuron decides by the sign of w x + b; nodes of the last level decide nothing
        layer.bias_in.unflatten(0, (layer.trees, -1))[:, : steps.shape[1]] -= steps


def _counted_everywhere(layers: list[TreeLayer]) -> list[Tensor]:
    """The counts (P, m) of every layer, over all processes: one message for all layers."""
    counts = [layer.leaf_counts for layer in layers]
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return counts
    total = torch.cat([count.flatten().to(counts[0].device) for count in counts])
    dist.all_reduce(total)
    parts = total.split([count.numel() for count in counts])
    return [part.view_as(count).to(count.device) for part, count in zip(parts, counts)]


class BalanceLeaves(TrainerCallback):
    """Balances the leaves after each optimizer step; microbatches that a step accumulates are counted together.

    It keeps no state between steps: a run that resumes from a checkpoint goes on bit for bit. A step that was not
    taken, because a gradient was not finite, moves no threshold.

    Args:
        rate: as for `balance_leaves`; 0 counts nothing and moves nothing.

    Raises:
        ValueError: a rate that is negative or not finite; when training begins, a model without trees that have
            thresholds, or sharded weights.
    """

    def __init__(self, rate: float):
        check_balance(rate)
        self.rate = rate

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Begin to count."""
        if not self.rate:
            return
        check_balance(self.rate, model)
        if args.fsdp or args.deepspeed:
            raise ValueError("balance_leaves works with whole weights in every process: not with FSDP or DeepSpeed")
        start_counting(model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Move the thresholds; the step's gradients are still there."""
        if not self.rate:
            return
        if _was_taken(model):
            balance_leaves(model, self.rate)
        else:
            start_counting(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Stop counting."""
        if self.rate:
            stop_counting(model)


def _was_taken(model: nn.Module) -> bool:
    """Whether the step's gradients are finite, by those of the thresholds, which all processes share."""
    thresholds = [_threshold(layer) for layer in balanced_layers(model) if _threshold(layer).numel()]
    gradients = [threshold.grad for threshold in thresholds if threshold.requires_grad]
    return all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


def add_balance(trainer: "Trainer", rate: float) -> None:
    """Balance the leaves of a trainer's model while it trains; a rate of 0 does nothing.

    Raises:
        ValueError: a rate that is negative or not finite, or a model without trees that have thresholds.
    """
    check_balance(rate, trainer.model)
    if rate:
        trainer.add_callback(BalanceLeaves(rate))
