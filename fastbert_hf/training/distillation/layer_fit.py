"""How much of a dense layer another layer of fewer neurons can do: the fit of one layer to another's outputs.

The figure is the unexplained part of the variance on other text, every output dimension standardised first: of a
trained model's layer, a few dimensions hold nearly all the raw variance.
"""

import dataclasses

import torch
from torch import Tensor, nn

from fastbert_hf.fff_reference import ACTIVATIONS
from fastbert_hf.leaf_layer import LeafFeedForward
from fastbert_hf.training.distillation.start_from_data import CHUNK, DenseWeights
from fastbert_hf.training.leaf_balance import balance_leaves, start_counting, stop_counting


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How a layer is fitted: AdamW without weight decay, a rate that falls to zero along half a cosine."""

    steps: int = 1500
    rows_per_step: int = 1024
    learning_rate: float = 1e-3
    balance: float = 0.5
    seed: int = 0


class FlatLeaves(nn.Module):
    """Leaves behind one softmax router instead of a tree: a row takes the likeliest leaf, scaled by its probability.

    The control of the tree's decisions: m router products in place of log2(m).

    Args:
        in_features, out_features: H and H_out. leaves: m. leaf_width: w. activation: as for `LeafFeedForward`.
    """

    def __init__(self, in_features: int, out_features: int, leaves: int, leaf_width: int, activation: str = "gelu"):
        super().__init__()
        self.leaves = LeafFeedForward(in_features, out_features, (leaves - 1).bit_length(), leaf_width, 1, activation)
        self.router = nn.Linear(in_features, leaves)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H) -> (N, H_out)."""
        probabilities, leaf = self.router(x).softmax(-1).max(-1)
        width, parts = self.leaves.leaf_width, self.leaves
        y = x.new_zeros(len(x), parts.out_features)
        tensors = (
            parts.weight_in.unflatten(0, (-1, width)).unbind(),
            parts.bias_in.unflatten(0, (-1, width)).unbind(),
            parts.weight_out.unflatten(0, (-1, width)).unbind(),
            parts.bias_out.unbind(),
        )
        for number, (weight_in, bias_in, weight_out, bias_out) in enumerate(zip(*tensors)):
            rows = (leaf == number).nonzero()[:, 0]
            hidden = ACTIVATIONS[parts.activation](nn.functional.linear(x[rows], weight_in, bias_in))
            y = y.index_add(0, rows, hidden @ weight_out + bias_out)
        return y * probabilities.unsqueeze(1)


def standardized(dense: DenseWeights, x: Tensor, activation: str) -> DenseWeights:
    """The same layer with outputs of mean 0 and variance 1 over the rows x (N, H), in every dimension."""
    total = torch.zeros(dense.weight_out.shape[0], dtype=torch.float64)
    squares = total.clone()
    for part in x.split(CHUNK):
        y = dense.forward(part, activation).double()
        total += y.sum(0)
        squares += y.square().sum(0)
    mean = total / len(x)
    std = (squares / len(x) - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 0, std, 1.0)
    bias = 0.0 if dense.bias_out is None else dense.bias_out.double()
    return dense._replace(
        weight_out=(dense.weight_out / std.unsqueeze(1)).to(dense.weight_out), bias_out=((bias - mean) / std).to(x)
    )


def fit_layer(layer: nn.Module, x: Tensor, targets: Tensor, settings: FitSettings = FitSettings()) -> float:
    """Train a layer to give the targets, by mean squared error.

    Args:
        layer: any module (N, H) -> (N, H_out).
        x: (N, H) rows. targets: (N, H_out), best of variance 1.
        settings: each step takes rows_per_step rows at random.

    Returns:
        The mean squared error of the last tenth of the steps.
    """
    draw = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    layer.train()
    start_counting(layer)
    losses = []
    for _ in range(settings.steps):
        rows = torch.randint(len(x), (settings.rows_per_step,), generator=draw)
        loss = nn.functional.mse_loss(layer(x[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        balance_leaves(layer, settings.balance)
        schedule.step()
        losses.append(loss.item())
    stop_counting(layer)
    last = losses[-max(1, settings.steps // 10) :]
    return sum(last) / len(last)


@torch.no_grad()
def unexplained(layer: nn.Module, x: Tensor, targets: Tensor) -> float:
    """Squared error over variance of the targets, mean over dimensions: x (N, H), targets (N, H_out)."""
    layer.eval()
    errors = torch.zeros(targets.shape[1], dtype=torch.float64)
    for part, wanted in zip(x.split(CHUNK), targets.split(CHUNK)):
        errors += (layer(part) - wanted).double().square().sum(0)
    variance = targets.double().var(0, correction=0) * len(targets)
    return (errors / variance)[variance > 0].mean().item()
