"""The start of a student: each feed-forward layer fitted to the one of the teacher that it replaces.

The layers are independent of each other: each sees what reaches its place in the teacher.
"""

import math
import shutil
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
from fastbert_hf.training.activations import sample_inputs_of_all
from fastbert_hf.training.distillation.layer_fit import (
    FitSettings,
    fit_layer,
    make_layer,
    output_moments,
    outputs_of,
    rescaled,
    unexplained,
)
from fastbert_hf.training.start_from_data import DenseWeights, dense_feed_forward

MEAN = "output_mean"
MEASURED_ROWS = 16384  # of the rows that were fitted


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

    The error counts every output dimension by its standard deviation: of the raw variance, a few dimensions of a
    trained model hold nearly all.

    Args:
        student: gets the fitted weights. teacher: dense; both encoders have the same number of layers.
        form: of the student's layers, as `make_layer` takes it.
        batches: text, gone through once; not at all where every layer is done.
        folder: for the layers, and for max_rows * H * 4 bytes of each layer's inputs while it works.
        settings: of each fit.
        max_rows: tokens to fit on.
        seconds_left: for all layers that are not done. Each gets an equal part of what is left when its turn comes,
            and its fit ends early where that is over.
        report: called after each layer with its number, the unexplained part of the variance, and its seconds.

    Raises:
        ValueError: a fit that diverges; no text; no room on the disk for the inputs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    targets = dense_feed_forward(teacher)
    done = [folder / f"layer-{number}.safetensors" for number in range(len(targets))]
    inputs = folder / "inputs"
    if not all(file.is_file() for file in done):
        shutil.rmtree(inputs, ignore_errors=True)  # of a process that was killed
        _check_room(folder, len(targets) * max_rows * teacher.config.hidden_size * 4)
        inputs.mkdir(exist_ok=True)
        paths = [inputs / f"layer-{number}.f32" for number in range(len(targets))]
        rows = sample_inputs_of_all(teacher, targets, batches, paths, max_rows=max_rows, seed=settings.seed)
        left = [number for number, file in enumerate(done) if not file.is_file()]
        for place, number in enumerate(left):
            began = time.perf_counter()
            seconds = seconds_left() / (len(left) - place)
            module, file = targets[number], done[number]
            dense = DenseWeights.of(module.dense_in, module.dense_out)
            x = torch.from_numpy(rows[number])
            centre = form.startswith("dense:") or not student.layers[number].pre_norm
            layer, mean, error = fitted(form, dense, x, teacher.config.hidden_act, settings, centre, seconds)
            with staged_folder(folder, last=file.name) as stage:
                save_file({**layer.state_dict(), MEAN: mean}, stage / file.name)
            report(number, error, time.perf_counter() - began)
    shutil.rmtree(inputs, ignore_errors=True)
    for layer, file in zip(student.layers, done):
        weights = load_file(file)
        mean = weights.pop(MEAN)
        layer.ffn.load_state_dict(weights)
        add_constant(layer, mean)


def _check_room(folder: Path, size: int) -> None:
    """Check that so many bytes fit on the disk: a process that writes to a mapped file without room is killed."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(
            f"what the layers read takes {size / 1e9:.1f} GB in {str(folder)!r}, where {free / 1e9:.1f} GB are free: "
            "give a smaller fit_rows, or another output_dir"
        )


def fitted(
    form: str,
    dense: DenseWeights,
    x: Tensor,
    activation: str,
    settings: FitSettings,
    centre: bool = True,
    seconds: float = math.inf,
) -> tuple[nn.Module, Tensor, float]:
    """A layer fitted to a dense layer.

    Args:
        form: as `make_layer` takes it. dense: what is replaced. x: (N, H) rows of its input.
        centre: leave the mean of the outputs to a constant that is added to what the layer puts out.
        seconds: for the start from data and the fit.

    Returns:
        The layer, the constant (H_out,), and the part of the variance that is left unexplained, on the same rows.
    """
    began = time.perf_counter()
    targets = outputs_of(dense, x, activation)
    mean, std = output_moments(targets)
    if not centre:
        mean = torch.zeros_like(mean)
    targets.sub_(mean.to(targets)).div_(std.to(targets))
    layer = make_layer(form, rescaled(dense, mean, std), x, activation, settings.seed)
    fit_layer(layer, x, targets, settings, seconds - (time.perf_counter() - began))
    error = unexplained(layer, x[:MEASURED_ROWS], targets[:MEASURED_ROWS])
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
