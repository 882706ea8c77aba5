"""The end of a distillation: the output weights of feed-forward layers, solved once more for what the student lacks.

Training end to end moves all weights a little at each step; the output weights of a leaf have an exact best value for
all text at once (ridge regression towards what they are). Layers follow one another, each on what it sees by then.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastbert_hf.encoder_fastbert import FastBertDenseFeedForward
from fastbert_hf.leaf_layer import LeafFeedForward
from fastbert_hf.leaf_reference import leaves_per_tree
from fastbert_hf.modeling_fastbert import FastBertModel
from fastbert_hf.training.distillation.lacking_rows import lacking_rows
from fastbert_hf.training.distillation.student import Student
from fastbert_hf.training.neuron_choice import Moments, output_weights
from fastbert_hf.training.start_from_data import CHUNK, DenseWeights


def can_be_refitted(ffn: nn.Module) -> bool:
    """Whether a feed-forward layer has output weights that least squares finds: not the published form."""
    return isinstance(ffn, LeafFeedForward) or (isinstance(ffn, FastBertDenseFeedForward) and not ffn.gated)


def refit_student(
    student: Student,
    teacher: FastBertModel,
    batches: Iterable[Mapping[str, Tensor]],
    folder: str | Path,
    *,
    max_rows: int = 100_000,
    seed: int = 0,
) -> None:
    """Solve for the output weights and biases of a student's feed-forward layers, the first layer first.

    Args:
        student: leaf trees or dense layers change, others stay as they are. teacher: its encoder.
        batches: text, gone through once. folder: for the rows, as `lacking_rows` says; removed at the end.
        max_rows: tokens to solve on. seed: for their choice.

    Raises:
        ValueError: no text; no room on the disk.
    """
    encoder = student.encoder
    found = {number: layer.ffn for number, layer in enumerate(encoder.layers) if can_be_refitted(layer.ffn)}
    which = {"max_rows": max_rows, "seed": seed, "teacher_layers": student.teacher_layers}
    rows = lacking_rows(encoder, teacher, batches, Path(folder), found, **which)
    for ffn, (x, targets) in zip(found.values(), rows, strict=True):
        solved = copy.deepcopy(ffn).cpu()
        refit_layer(solved, x, targets, encoder.config.hidden_act)
        ffn.load_state_dict(solved.state_dict())


@torch.no_grad()
def refit_layer(ffn: nn.Module, x: Tensor, targets: Tensor, activation: str) -> None:
    """Solve for the output weights and biases of a layer on the CPU, near what they are; the rest of it stays.

    Args:
        ffn: for which `can_be_refitted` holds. x: (N, H) rows. targets: (N, H_out), what it should put out.
        activation: of its neurons.
    """
    if isinstance(ffn, FastBertDenseFeedForward):
        every = torch.arange(len(x))
        _solve(DenseWeights.of(ffn.dense_in, ffn.dense_out), activation, x, targets, every, torch.ones(len(x)))
        return
    leaves, confidence = ffn.route(x)  # (N, P)
    missing = targets - torch.cat([ffn(part) for part in x.split(CHUNK)])
    for tree in range(ffn.trees):
        for leaf in range(leaves_per_tree(ffn.depth)):
            rows = (leaves[:, tree] == leaf).nonzero()[:, 0]
            if len(rows) > 1:
                neurons = _neurons_of(ffn, tree * leaves_per_tree(ffn.depth) + leaf)
                _add(missing, 1, neurons, activation, x, rows, confidence[:, tree])  # what the leaf should put out
                _solve(neurons, activation, x, missing, rows, confidence[:, tree])
                _add(missing, -1, neurons, activation, x, rows, confidence[:, tree])


def _neurons_of(ffn: LeafFeedForward, leaf: int) -> DenseWeights:
    """A leaf, counted over all trees, as the dense layer that it is; its tensors are the layer's own."""
    neurons = slice(leaf * ffn.leaf_width, (leaf + 1) * ffn.leaf_width)
    biases = [None, None] if ffn.bias_in is None else [ffn.bias_in[neurons], ffn.bias_out[leaf]]
    return DenseWeights(ffn.weight_in[neurons], biases[0], ffn.weight_out[neurons].T, biases[1])


def _add(
    sums: Tensor, sign: int, neurons: DenseWeights, activation: str, x: Tensor, rows: Tensor, factor: Tensor
) -> None:
    """Add to rows (n,) of sums (N, H_out) what the neurons put out for them, times a sign and factors (N,)."""
    for part in rows.split(CHUNK):
        sums[part] += sign * factor[part].unsqueeze(1) * neurons.forward(x[part], activation)


def _solve(neurons: DenseWeights, activation: str, x: Tensor, targets: Tensor, rows: Tensor, factor: Tensor) -> None:
    """Set output weights, near what they are, and output bias for some rows (n,) of x and targets; factor (N,)."""
    moments = Moments(len(neurons.weight_in), targets.shape[1], targets)
    for part in rows.split(CHUNK):
        hidden = neurons.hidden(x[part], activation) * factor[part].unsqueeze(1)
        moments.add(hidden, targets[part], factor[part])
    if neurons.bias_out is not None:
        moments.centre()
    every = torch.arange(len(neurons.weight_in))
    weights = output_weights(moments, every, neurons.weight_out.T)
    neurons.weight_out.copy_(weights.T)
    if neurons.bias_out is not None:
        neurons.bias_out.copy_(moments.constant_for(every, weights))
