"""The start of a student: its feed-forward layers fitted one after the other.

Each sees what reaches it in the student, and learns what the student still lacks there of the teacher's hidden state:
so it makes up for the layers below it as well.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastbert_hf.encoder_fastbert import FastBertDenseFeedForward, FastBertLayer
from fastbert_hf.files import staged_folder
from fastbert_hf.leaf_layer import LeafFeedForward
from fastbert_hf.modeling_fastbert import FastBertModel
from fastbert_hf.training.distillation.lacking_rows import lacking_rows
from fastbert_hf.training.distillation.layer_fit import (
    FitSettings,
    fit_layer,
    make_layer,
    output_moments,
    rescaled,
    unexplained,
)
from fastbert_hf.training.start_from_data import DenseWeights, dense_feed_forward

MEAN = "output_mean"
HELD_BACK = 20  # one row of so many, the last ones, is measured on and not fitted
MEASURED_ROWS = 16384  # at most


def fit_student(
    student: FastBertModel,
    teacher: FastBertModel,
    form: str,
    batches: Iterable[Mapping[str, Tensor]],
    folder: str | Path,
    settings: FitSettings,
    *,
    max_rows: int = 100_000,
    seconds_left: Callable[[], float] = lambda: math.inf,
    report: Callable[[int, float, float], None] = lambda layer, unexplained, seconds: None,
) -> None:
    """Fit every feed-forward layer of a student. Layers that are done stand in the folder and are not done again.

    A layer learns the difference between the teacher's hidden state behind its place, before the norm there, and what
    the student has without it. The error counts every dimension of that by its standard deviation: of the raw
    variance, a few dimensions of a trained model hold nearly all. The text takes one pass through the teacher, and
    for each layer one through the layers of the student below it.

    Args:
        student: gets the fitted weights. teacher: dense; both encoders have the same number of layers, on the CPU.
        form: of the student's layers, as `make_layer` takes it.
        batches: text, gone through once; not at all where every layer is done.
        folder: for the layers, and for max_rows * H * 4 bytes while it works, one more time than the model has layers
            where norms stand behind, and two more where they stand in front.
        settings: of each fit.
        max_rows: tokens to fit on.
        seconds_left: for all layers that are not done. Each gets an equal part of what is left when its turn comes,
            and its fit ends early where that is over.
        report: called after each layer with its number, the unexplained part of the variance, and its seconds.

    Raises:
        ValueError: a fit that diverges; no text; no room on the disk for the rows.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dense = dense_feed_forward(teacher)
    done = [folder / f"layer-{number}.safetensors" for number in range(len(dense))]
    left = [number for number, file in enumerate(done) if not file.is_file()]
    rows = lacking_rows(student, teacher, batches, folder / "rows", left, max_rows=max_rows, seed=settings.seed)
    for number, file in enumerate(done):
        layer = student.layers[number]
        if number in left:
            began = time.perf_counter()
            seconds = seconds_left() / (len(left) - left.index(number))
            x, targets = next(rows)
            weights = DenseWeights.of(dense[number].dense_in, dense[number].dense_out)
            centre = form.startswith("dense:") or not layer.pre_norm
            activation = teacher.config.hidden_act
            seconds -= time.perf_counter() - began
            ffn, mean, error = fitted(form, weights, x, targets, activation, settings, centre, seconds)
            with staged_folder(folder, last=file.name) as stage:
                save_file({**ffn.state_dict(), MEAN: mean}, stage / file.name)
            report(number, error, time.perf_counter() - began)
        fitted_weights = load_file(file)
        mean = fitted_weights.pop(MEAN)
        layer.ffn.load_state_dict(fitted_weights)
        add_constant(layer, mean)
    rows.close()  # removes its files


def fitted(
    form: str,
    dense: DenseWeights,
    x: Tensor,
    targets: Tensor,
    activation: str,
    settings: FitSettings,
    centre: bool = True,
    seconds: float = math.inf,
) -> tuple[nn.Module, Tensor, float]:
    """A layer fitted to rows of targets.

    Args:
        form: as `make_layer` takes it. dense: what is replaced, whose neurons leaves begin with.
        x: (N, H) rows of its input. targets: (N, H_out) what it should put out for them; overwritten.
        centre: leave the mean of the targets to a constant that is added to what the layer puts out.
        seconds: for the start from data and the fit.

    Returns:
        The layer, the constant (H_out,), and the part of the variance that is left unexplained, on the last rows,
        which are not fitted.
    """
    began = time.perf_counter()
    mean, std = output_moments(targets)
    if not centre:
        mean = torch.zeros_like(mean)
    targets.sub_(mean.to(targets)).div_(std.to(targets))
    last = min(len(x) // HELD_BACK, MEASURED_ROWS)
    rows, wanted = (part[: len(x) - last] for part in (x, targets))
    layer = make_layer(form, rescaled(dense, mean, std), rows, activation, settings.seed, wanted)
    fit_layer(layer, rows, wanted, settings, seconds - (time.perf_counter() - began))
    error = unexplained(layer, x[-last:], targets[-last:])  # all of them where there are too few to hold back
    scale_outputs(layer, std)
    return layer, mean.to(x), error


@torch.no_grad()
def scale_outputs(layer: nn.Module, factors: Tensor) -> None:
    """Multiply what a layer puts out, dimension by dimension: factors (H_out,)."""
    if hasattr(layer, "dense_out"):
        outputs = (layer.dense_out.weight.T, layer.dense_out.bias)
    else:
        outputs = (layer.weight_out, layer.bias_out if isinstance(layer, LeafFeedForward) else None)
    for output in outputs:
        if output is not None:
            output *= factors.to(output)


@torch.no_grad()
def add_constant(layer: FastBertLayer, constant: Tensor) -> None:
    """Have a layer of an encoder add a constant to what its feed-forward layer puts out.

    Trees have no bias that every token gets: confidence scales that of a leaf. In a layer with its norms behind, the
    norm before the feed-forward layer adds the constant, and the trees take it off what they see.

    Args:
        constant: (H,); zero for trees in a layer with its norms in front.
    """
    ffn = layer.ffn
    if isinstance(ffn, FastBertDenseFeedForward):
        ffn.dense_out.bias += constant
    elif constant.any():
        layer.attention_norm.bias += constant
        ffn.bias_in -= ffn.weight_in @ constant
        if isinstance(ffn, LeafFeedForward):
            ffn.threshold += ffn.router @ constant
