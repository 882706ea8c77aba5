"""The end of a distillation: the output weights of feed-forward layers, solved once more for what the student lacks.

Training end to end moves all weights a little at each step; the output weights of a leaf have an exact best value for
all text at once (ridge regression towards what they are). Layers follow one another, each on what it sees by then.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastbert_hf.encoder_fastbert import FastBertDenseFeedForward
from fastbert_hf.fff_reference import ACTIVATIONS
from fastbert_hf.leaf_layer import LeafFeedForward
from fastbert_hf.leaf_reference import leaves_per_tree
from fastbert_hf.modeling_fastbert import FastBertModel
from fastbert_hf.training.distillation.lacking_rows import lacking_rows
from fastbert_hf.training.distillation.student import Student
from fastbert_hf.training.neuron_choice import Moments, output_weights
from fastbert_hf.training.start_from_data import CHUNK


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
        refit_layer(solved, x, targets)
        ffn.load_state_dict(solved.state_dict())


@torch.no_grad()
def refit_layer(ffn: nn.Module, x: Tensor, targets: Tensor) -> None:
    """Solve for the output weights and biases of a layer on the CPU, near what they are; the rest of it stays.

    Args:
        ffn: for which `can_be_refitted` holds. x: (N, H) rows. targets: (N, H_out), what it should put out.
    """
    if isinstance(ffn, FastBertDenseFeedForward):
        hidden = _Hidden(ffn.dense_in.weight, ffn.dense_in.bias, ffn.activation)
        every, one = torch.arange(len(x)), torch.ones(len(x))
        weight, bias = ffn.dense_out.weight, ffn.dense_out.bias
        solved, constant = _solved(hidden, x, targets, every, one, weight.T, centre=bias is not None)
        weight.copy_(solved.T)
        if bias is not None:
            bias.copy_(constant)
        return
    leaves, confidence = ffn.route(x)  # (N, P)
    missing = targets - torch.cat([ffn(part) for part in x.split(CHUNK)])
    for tree in range(ffn.trees):
        for leaf in range(leaves_per_tree(ffn.depth)):
            rows = (leaves[:, tree] == leaf).nonzero()[:, 0]
            if len(rows) > 1:
                place = tree * leaves_per_tree(ffn.depth) + leaf
                _refit_leaf(ffn, place, x, missing, rows, confidence[:, tree])


def _refit_leaf(
    ffn: LeafFeedForward, place: int, x: Tensor, missing: Tensor, rows: Tensor, confidence: Tensor
) -> None:
    """Solve for one leaf; `missing` (N, H_out), what the layer lacks, is kept up to date."""
    neurons = slice(place * ffn.leaf_width, (place + 1) * ffn.leaf_width)
    bias_in = None if ffn.bias_in is None else ffn.bias_in[neurons]
    hidden = _Hidden(ffn.weight_in[neurons], bias_in, ACTIVATIONS[ffn.activation])
    weight, bias = ffn.weight_out[neurons], None if ffn.bias_out is None else ffn.bias_out[place]

    def own() -> Iterator[tuple[Tensor, Tensor]]:
        for part in rows.split(CHUNK):
            factor = confidence[part].unsqueeze(1)
            yield part, factor * (hidden(x[part]) @ weight + (0.0 if bias is None else bias))

    for part, outputs in own():
        missing[part] += outputs  # what the leaf should put out
    solved, constant = _solved(hidden, x, missing, rows, confidence, weight, centre=bias is not None)
    weight.copy_(solved)
    if bias is not None:
        bias.copy_(constant)
    for part, outputs in own():
        missing[part] -= outputs


class _Hidden:
    """The activations of some neurons: (n, H) -> (n, w)."""

    def __init__(self, weight_in: Tensor, bias_in: Tensor | None, activation):
        self.weight_in, self.bias_in, self.activation = weight_in, bias_in, activation

    def __call__(self, x: Tensor) -> Tensor:
        return self.activation(nn.functional.linear(x, self.weight_in, self.bias_in))


def _solved(
    hidden: _Hidden, x: Tensor, targets: Tensor, rows: Tensor, factor: Tensor, start: Tensor, centre: bool
) -> tuple[Tensor, Tensor]:
    """Output weights (w, H_out) near `start` and the constant (H_out,), for some rows (n,) of x and targets."""
    moments = Moments(len(hidden.weight_in), targets.shape[1], targets)
    for part in rows.split(CHUNK):
        moments.add(hidden(x[part]) * factor[part].unsqueeze(1), targets[part], factor[part])
    if centre:
        moments.centre()
    every = torch.arange(len(hidden.weight_in))
    weights = output_weights(moments, every, start)
    return weights, moments.constant_for(every, weights)
