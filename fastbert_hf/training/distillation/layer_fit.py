"""How much of a dense layer another layer of fewer neurons can do: the fit of one layer to another's outputs.

The figure is the unexplained part of the variance on other text, every output dimension standardised first: of a
trained model's layer, a few dimensions hold nearly all the raw variance.
"""

import dataclasses
import math
import re

import torch
from torch import Tensor, nn

from fastbert_hf.fff_layer import FastFeedForward
from fastbert_hf.fff_reference import ACTIVATIONS
from fastbert_hf.leaf_layer import LeafFeedForward
from fastbert_hf.training.budget import BudgetClock
from fastbert_hf.training.leaf_balance import balance_leaves, start_counting, stop_counting
from fastbert_hf.training.start_from_data import CHUNK, DenseWeights, initialize_from_data

FORMS = {
    "dense": r"dense:(\d+)",  # neurons
    "tree": r"tree:(\d+)x(\d+)",  # trees, depth
    "leaf": r"leaf:(?:(\d+)x)?(\d+)x(\d+)",  # trees, depth, leaf width
    "flat": r"flat:(\d+)x(\d+)",  # leaves, leaf width
}
EXAMPLES = "dense:96, tree:1x8 (trees, depth), leaf:5x96 (depth, leaf width), leaf:2x4x48 (trees first) or flat:32x96"


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How a layer is fitted: AdamW without weight decay, a rate that falls to zero along half a cosine.

    Attributes:
        steps, rows_per_step: each step takes so many rows at random.
        learning_rate: at the start. balance: rate of `balance_leaves` after each step; without it a few leaves soon
            take most rows.
        seed: for rows and random parameters.
    """

    steps: int = 1500
    rows_per_step: int = 1024
    learning_rate: float = 1e-3
    balance: float = 0.5
    seed: int = 0


class DenseFeedForward(nn.Module):
    """A dense layer: in_features -> neurons -> out_features."""

    def __init__(self, in_features: int, out_features: int, neurons: int, activation: str):
        super().__init__()
        self.activation = activation
        self.dense_in, self.dense_out = nn.Linear(in_features, neurons), nn.Linear(neurons, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H) -> (N, H_out)."""
        return self.dense_out(ACTIVATIONS[self.activation](self.dense_in(x)))


class FlatLeaves(nn.Module):
    """Leaves behind one softmax router instead of a tree: a row takes the likeliest leaf, scaled by its probability.

    The control of the tree's decisions: m router products in place of log2(m).

    Args:
        leaves: a layer of one tree, whose leaves are taken over; its m is a power of two.
        x: (N, H) rows. The router begins at the means of the rows of each leaf, scaled so that its logits have a
            standard deviation of 4.
    """

    def __init__(self, leaves: LeafFeedForward, x: Tensor):
        super().__init__()
        self.activation = leaves.activation
        parts = (leaves.weight_in, leaves.bias_in, leaves.weight_out)
        self.weight_in, self.bias_in, self.weight_out = (
            nn.Parameter(part.detach().unflatten(0, (-1, leaves.leaf_width)).clone()) for part in parts
        )  # (m, w, H), (m, w), (m, w, H_out)
        self.bias_out = nn.Parameter(leaves.bias_out.detach().clone())
        taken, count = leaves.route(x)[0][:, 0], len(self.bias_out)
        means = x.new_zeros(count, x.shape[1]).index_add_(0, taken, x)
        means /= torch.bincount(taken, minlength=count).clamp(min=1).unsqueeze(1)
        centre = x.mean(0)
        router = (means - centre) / (x - centre).var(0).clamp(min=1e-12)  # as far as rows vary
        router *= 4 / ((x - centre) @ router.T).std().clamp(min=1e-12)
        self.router = nn.Parameter(router)
        self.offset = nn.Parameter(-(router @ centre) - (router * (means - centre)).sum(1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H) -> (N, H_out)."""
        confidence, leaf = nn.functional.linear(x, self.router, self.offset).softmax(-1).max(-1)
        order = leaf.argsort(stable=True)
        counts = torch.bincount(leaf, minlength=len(self.router)).tolist()
        parts = zip(x[order].split(counts), self.weight_in, self.bias_in, self.weight_out, self.bias_out, strict=True)
        outputs = [
            ACTIVATIONS[self.activation](nn.functional.linear(rows, weight_in, bias_in)) @ weight_out + bias_out
            for rows, weight_in, bias_in, weight_out, bias_out in parts
        ]
        return torch.cat(outputs)[order.argsort()] * confidence.unsqueeze(1)


def make_layer(
    form: str, dense: DenseWeights, x: Tensor, activation: str, seed: int = 0, targets: Tensor | None = None
) -> nn.Module:
    """A layer to fit, at its start.

    Args:
        form: "dense:F", "tree:PxD" (the published form), "leaf:DxW" or "leaf:PxDxW", "flat:MxW".
        dense: leaves begin with its neurons, the other forms at random.
        x: (N, H) rows, from which routers begin.
        activation: of all of them. seed: for all that is random.
        targets: (N, H_out), what it will be fitted to; None: what `dense` puts out.

    Raises:
        ValueError: a form that is none of these.
    """
    check_form(form)
    kind = form.split(":")[0]
    sizes = [None if size is None else int(size) for size in re.fullmatch(FORMS[kind], form).groups()]
    widths = (dense.weight_in.shape[1], dense.weight_out.shape[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "dense":
            return DenseFeedForward(*widths, *sizes, activation)
        if kind == "tree":
            trees, depth = sizes
            return FastFeedForward(*widths, depth, trees, activation)
        if kind == "leaf":
            trees, depth, width = sizes
        else:
            trees, depth, width = 1, sizes[0].bit_length() - 1, sizes[1]
        layer = LeafFeedForward(*widths, depth, width, trees or 1, activation)
        initialize_from_data(layer, x, dense, targets=targets, seed=seed, max_rows=len(x))
        return FlatLeaves(layer, x) if kind == "flat" else layer


def check_form(form: str) -> None:
    """Raise ValueError unless `make_layer` knows the form."""
    match = re.fullmatch(FORMS.get(form.split(":")[0], "(?!)"), form)
    if match is None or "0" in match.groups()[-1:]:
        raise ValueError(f"unknown form {form!r}; expected one like {EXAMPLES}")
    if form.startswith("flat:") and int(match.group(1)).bit_count() != 1:
        raise ValueError(f"{form!r} has {match.group(1)} leaves; expected a power of two")


def neurons_per_token(layer: nn.Module) -> int:
    """Neurons that one row uses."""
    if isinstance(layer, DenseFeedForward):
        return layer.dense_in.out_features
    if isinstance(layer, FlatLeaves):
        return layer.weight_in.shape[1]
    return layer.neurons_per_token if isinstance(layer, LeafFeedForward) else layer.trees * (layer.depth + 1)


def output_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of outputs (N, H_out) in every dimension: (H_out,) float64.

    The deviation of a dimension that does not vary is 1.
    """
    total = torch.zeros(y.shape[1], dtype=torch.float64)
    squares = total.clone()
    for part in y.split(CHUNK):
        part = part.double()
        total += part.sum(0)
        squares += part.square().sum(0)
    mean = total / len(y)
    variance = squares / len(y) - mean.square()
    return mean, torch.where(variance > 1e-12 * squares / len(y), variance, 1.0).sqrt()


def rescaled(dense: DenseWeights, mean: Tensor, std: Tensor) -> DenseWeights:
    """The layer whose outputs are (y - mean) / std, in every dimension: mean and std (H_out,)."""
    bias = 0.0 if dense.bias_out is None else dense.bias_out.double()
    weight_out = (dense.weight_out.double() / std.unsqueeze(1)).to(dense.weight_out)
    return dense._replace(weight_out=weight_out, bias_out=((bias - mean) / std).to(dense.weight_out))


def standardized(dense: DenseWeights, x: Tensor, activation: str) -> DenseWeights:
    """The same layer with outputs of mean 0 and variance 1 over the rows x (N, H), in every dimension.

    A dimension that does not vary is only centred.
    """
    return rescaled(dense, *output_moments(outputs_of(dense, x, activation)))


@torch.no_grad()
def outputs_of(dense: DenseWeights, x: Tensor, activation: str) -> Tensor:
    """(N, H) -> (N, H_out), a part of the rows at a time."""
    return torch.cat([dense.forward(part, activation) for part in x.split(CHUNK)])


def fit_layer(
    layer: nn.Module, x: Tensor, targets: Tensor, settings: FitSettings = FitSettings(), seconds: float = math.inf
) -> float:
    """Train a layer to give the targets, by mean squared error.

    Args:
        layer: any module (N, H) -> (N, H_out).
        x: (N, H) rows. targets: (N, H_out), best of variance 1 in every dimension.
        settings: how.
        seconds: the fit ends when they are over, or after `settings.steps`; the rate falls to zero by then. Without
            any left there is no step.

    Returns:
        The mean squared error of the last tenth of the steps; NaN where there is no step.

    Raises:
        ValueError: the error is no longer finite.
    """
    draw = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    clock = BudgetClock("budget_hours", seconds / 3600)
    layer.train()
    if isinstance(layer, LeafFeedForward):  # in the published form a threshold is a bias of a neuron, which is fitted
        start_counting(layer)
    losses: list[float] = []
    clock.start()
    while (fraction := _spent_part(clock, settings.steps)) < 1:
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 + math.cos(math.pi * fraction)) / 2
        rows = torch.randint(len(x), (settings.rows_per_step,), generator=draw)
        loss = nn.functional.mse_loss(layer(x[rows]), targets[rows])
        losses.append(loss.item())
        if not torch.isfinite(loss):
            step = clock.spent.steps
            raise ValueError(f"the fit diverged at step {step}: the error is {losses[-1]}; try a lower learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        balance_leaves(layer, settings.balance)
        clock.tick(len(rows))
    stop_counting(layer)
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else math.nan


def _spent_part(clock: BudgetClock, steps: int) -> float:
    """How much of a fit is over: of its time or of its steps, whichever is further."""
    if steps <= 0 or clock.amount <= 0:
        return 1.0
    return max(clock.fraction, clock.spent.steps / steps)


@torch.no_grad()
def unexplained(layer: nn.Module, x: Tensor, targets: Tensor) -> float:
    """Squared error over variance of the targets, mean over dimensions: x (N, H), targets (N, H_out).

    Dimensions of targets that do not vary are left out.
    """
    layer.eval()
    errors = torch.zeros(targets.shape[1], dtype=torch.float64)
    for part, wanted in zip(x.split(CHUNK), targets.split(CHUNK), strict=True):
        errors += (layer(part) - wanted).double().square().sum(0)
    variance = targets.double().var(0, correction=0) * len(targets)
    return (errors / variance)[variance > 0].mean().item()
