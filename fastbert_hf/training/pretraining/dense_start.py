"""A run that begins where a dense run stands: its checkpoint, with trees in place of its dense layers.

The new checkpoint is one of this run, which goes on from it as from one of its own: clock, place in the data,
learning rate, log and random state are those of the dense run. Source: ours; mixtures of experts are started in this
way in arXiv 2212.05055.
"""

import itertools
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel, Trainer

from fastbert_hf.training.checkpoints import STATE, check_weights, staged_checkpoint
from fastbert_hf.training.leaf_balance import leaf_layers
from fastbert_hf.training.provenance import Provenance
from fastbert_hf.training.start_from_data import DenseWeights, dense_feed_forward, initialize_model_from_data

OPTIMIZER = "optimizer.pt"
DENSE_NEURONS = "dense_neurons"  # of a layer, in the parts of a run that it spent as a dense model
AS_THEY_ARE = ("scheduler.pt", "rng_state*.pth", "training_args.bin", STATE)
# settings of the dense run that this run must have too: with others, the place in the data would be another
SAME = (
    "corpus", "train_file", "validation_file", "text_column", "tokenizer", "max_seq_length", "mlm_probability",
    "seed",
)  # fmt: skip


def load_dense(checkpoint: str) -> PreTrainedModel:
    """The model of a dense run's checkpoint.

    Raises:
        ValueError: it is no whole checkpoint of a run, or not of a dense model.
    """
    for name in (STATE, OPTIMIZER):
        if not (Path(checkpoint) / name).is_file():
            raise ValueError(f"dense_checkpoint {checkpoint!r} holds no {name}: not a whole checkpoint of a run")
    check_weights(checkpoint)
    dense = AutoModelForMaskedLM.from_pretrained(checkpoint)
    if not hasattr(dense, "fastbert"):
        raise ValueError(f"dense_checkpoint {checkpoint!r} is of a {type(dense).__name__}; expected a FastBERT")
    dense_feed_forward(dense.fastbert)
    return dense


def check_dense_start(checkpoint: str, settings: dict[str, Any], model: PreTrainedModel) -> None:
    """Check that a run can go on from a dense run's checkpoint.

    Args:
        checkpoint: of the dense run. settings: of this run, as `Provenance` holds them. model: of this run.

    Raises:
        ValueError: the model has trees of the published form, the checkpoint is damaged or of another kind of model,
            or the dense run had another text, other sequences or another seed.
    """
    if not leaf_layers(model) and getattr(model.config, "ffn_type", None) == "fff":
        raise ValueError("--dense_checkpoint is for leaf trees and dense models, and the model has published trees")
    _taken_over(model, load_dense(checkpoint))
    earlier = Provenance.read(checkpoint)
    for name in SAME if earlier is not None else ():
        if name in earlier.settings and earlier.settings[name] != settings.get(name):
            raise ValueError(
                f"{checkpoint!r} was made with {name} {earlier.settings[name]!r}, this run has "
                f"{settings.get(name)!r}: it cannot go on from there"
            )


def write_dense_start(
    checkpoint: str,
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    output_dir: str,
    provenance: Provenance,
    seed: int = 0,
) -> None:
    """Write the first checkpoint of a run from the checkpoint of a dense run.

    Leaves begin as `initialize_from_data` has it: each with the neurons of the dense layer that explain most of its
    output among the leaf's tokens. Every other weight and its moments in the optimizer are those of the dense run;
    the moments of trees begin anew. A dense model goes on as it is, under what this run does otherwise.

    Args:
        checkpoint: of the dense run.
        model: of leaf trees or dense, with the dense model's geometry otherwise; it gets the weights.
        batches: text to see what reaches each layer, gone through once a layer.
        output_dir: of this run. provenance: what this run is made with; it gets the dense run's parts.
        seed: for what is random.

    Raises:
        ValueError: the models do not fit, or the checkpoint cannot be written.
    """
    dense = load_dense(checkpoint)
    model.load_state_dict(_taken_over(model, dense), strict=False)
    layers = dense_feed_forward(dense.fastbert)
    earlier = Provenance.read(checkpoint)
    if earlier is not None:
        neurons = len(layers[0].dense_in.weight)
        provenance.parts = [{**part, DENSE_NEURONS: neurons} for part in earlier.parts]
    name = dense_start_folder(checkpoint, output_dir).name
    with staged_checkpoint(output_dir, name, None, True, lambda: None) as stage:
        if leaf_layers(model):
            weights = [DenseWeights.of(layer.dense_in, layer.dense_out) for layer in layers]
            initialize_model_from_data(model, batches, stage / "inputs", dense=weights, seed=seed)
        folder = stage / name
        model.save_pretrained(folder)
        torch.save(_carried_state(Path(checkpoint) / OPTIMIZER, dense, model), folder / OPTIMIZER)
        for pattern in AS_THEY_ARE:
            for file in Path(checkpoint).glob(pattern):
                shutil.copyfile(file, folder / file.name)
        provenance.write(folder)


def dense_start_folder(checkpoint: str, output_dir: str) -> Path:
    """Where `write_dense_start` writes: OUTPUT_DIR/checkpoint-N for a dense checkpoint of N steps."""
    steps = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))["global_step"]
    return Path(output_dir) / f"checkpoint-{steps}"


def _taken_over(model: PreTrainedModel, dense: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a dense model that a model takes over as they are.

    Raises:
        ValueError: they do not fit.
    """
    theirs, ours = (
        {name: value for name, value in part.state_dict().items() if _goes_on(name, model)} for part in (dense, model)
    )
    for name in sorted(theirs.keys() | ours.keys()):
        shapes = [tuple(part[name].shape) if name in part else None for part in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} in the dense checkpoint and {shapes[1]} in this run's model")
    return theirs


def _goes_on(name: str, model: PreTrainedModel) -> bool:
    """Whether a parameter of a dense model is one of this model: trees have others than the layers they replace."""
    return ".ffn." not in name or not leaf_layers(model)


def optimizer_order(model: nn.Module) -> list[list[str]]:
    """The names of a model's parameters as `Trainer`'s optimizer has them: with weight decay, and without."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [[name for name in names if (name in decayed) is kind] for kind in (True, False)]


def _carried_state(file: Path, dense: PreTrainedModel, model: PreTrainedModel) -> dict[str, Any]:
    """A dense run's optimizer, as the state of one for this model."""
    stored = torch.load(file, map_location="cpu", weights_only=True)
    before, after = optimizer_order(dense), optimizer_order(model)
    if [len(group["params"]) for group in stored["param_groups"]] != list(map(len, before)):
        raise ValueError(f"{str(file)!r} is not of AdamW as Trainer makes it; expected the optimizer of a dense run")
    places = {name: number for number, name in enumerate(itertools.chain(*before))}
    kept = {
        number: stored["state"][places[name]]
        for number, name in enumerate(itertools.chain(*after))
        if _goes_on(name, model) and places.get(name) in stored["state"]
    }
    numbers = iter(range(sum(map(len, after))))
    groups = [
        {**group, "params": [next(numbers) for _ in names]} for group, names in zip(stored["param_groups"], after)
    ]
    return {"state": kept, "param_groups": groups}


def dense_start(provenance: Provenance, steps: int) -> dict[str, Any] | None:
    """What a run began from; None for one that began with random weights, or with those of another model.

    Args:
        provenance: of the run. steps: of all its parts.

    Returns:
        {"neurons": those of a dense layer, "fraction": the part of all steps that the model was dense}.
    """
    parts = provenance.parts
    if not parts or DENSE_NEURONS not in parts[0]:
        return None
    dense_steps = next((part["from_step"] for part in parts if DENSE_NEURONS not in part), steps)
    return {"neurons": parts[0][DENSE_NEURONS], "fraction": round(dense_steps / max(1, steps), 4)}
