"""Fit several forms of layer to one dense layer of a trained model: a table of what each leaves unexplained."""

import dataclasses
import json
import math
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert_hf.files import check_output_folder, write_text
from fastbert_hf.hub.card import public_name
from fastbert_hf.training.activations import sample_inputs
from fastbert_hf.training.distillation.layer_fit import (
    FitSettings,
    check_form,
    fit_layer,
    make_layer,
    neurons_per_token,
    outputs_of,
    standardized,
    unexplained,
)
from fastbert_hf.training.distillation.teacher import load_teacher
from fastbert_hf.training.distillation.texts import check_text_files, read_texts, tokenized
from fastbert_hf.training.leaf_balance import check_balance
from fastbert_hf.training.start_from_data import DenseWeights, dense_feed_forward

COUNTS = ("texts_per_file", "other_texts_per_file", "max_seq_length", "max_rows", "steps", "rows_per_step")
RESULTS, TABLE = "layer-fit.json", "layer-fit.md"


@dataclass
class LayerFitArguments:
    """Which layer is fitted by what, on which text."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a model with dense feed-forward layers"})
    train_file: list[str] = field(
        metadata={"help": "text to fit on: .txt (also .gz, .xz or .zst), .jsonl, .csv, .tsv"}
    )
    other_file: list[str] = field(metadata={"help": "other text, on which is measured"})
    output_dir: str = field(metadata={"help": "folder for the table and, while it works, for activations"})
    forms: list[str] = field(
        default_factory=lambda: ["leaf:5x96", "dense:96", "tree:1x8"],
        metadata={"help": "dense:NEURONS, tree:TREESxDEPTH, leaf:[TREESx]DEPTHxWIDTH, flat:LEAVESxWIDTH"},
    )
    layer: int = field(default=2, metadata={"help": "which of the model's layers, from 0"})
    texts_per_file: int = field(default=1000, metadata={"help": "texts taken from each file, at random, at most"})
    other_texts_per_file: int = field(default=100, metadata={"help": "the same of other_file"})
    max_seq_length: int = field(default=128, metadata={"help": "longer texts are cut to this many tokens"})
    max_rows: int = field(default=300_000, metadata={"help": "tokens to fit on, at most"})
    steps: int = field(default=1500, metadata={"help": "optimizer steps"})
    rows_per_step: int = field(default=1024, metadata={"help": "tokens of each"})
    learning_rate: float = field(default=1e-3, metadata={"help": "of AdamW, at the start; it falls to zero"})
    balance_leaves: float = field(default=0.5, metadata={"help": "rate at which thresholds follow medians"})
    seed: int = field(default=0, metadata={"help": "for text, rows and random parameters"})

    def check(self) -> None:
        """Check what can be checked before anything is read.

        Raises:
            ValueError: naming the option.
        """
        for form in self.forms:
            check_form(form)
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        check_balance(self.balance_leaves)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}")
        check_text_files(self.train_file + self.other_file)
        check_output_folder(self.output_dir)

    @property
    def settings(self) -> FitSettings:
        """How each form is fitted."""
        return FitSettings(self.steps, self.rows_per_step, self.learning_rate, self.balance_leaves, self.seed)


def fit_table(options: LayerFitArguments) -> list[dict[str, Any]]:
    """Fit every form; write layer-fit.json and layer-fit.md after each, so that an interrupted run leaves the others.

    Args:
        options: model, layer, text and forms.

    Returns:
        One entry a form: `form`, `neurons` (per token), `unexplained` (on other text), `training_error`, `seconds`.

    Raises:
        ValueError: for anything wrong in the options, before the work; a fit that diverges.
    """
    options.check()
    teacher = load_teacher(options.model_name_or_path)
    model, layers = teacher.encoder, dense_feed_forward(teacher.encoder)
    if not 0 <= options.layer < len(layers):
        raise ValueError(f"layer is {options.layer}; expected 0 to {len(layers) - 1}, the model's dense layers")
    module = layers[options.layer]
    dense, activation = DenseWeights.of(module.dense_in, module.dense_out), model.config.hidden_act
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(options.seed)
    parts = {"train": (options.train_file, options.texts_per_file, options.max_rows)}
    parts["other"] = (options.other_file, options.other_texts_per_file, options.max_rows)
    inputs, files = {}, {name: folder / f"inputs-{name}.f32" for name in parts}
    try:
        for name, (sources, count, rows) in parts.items():
            length = min(options.max_seq_length, teacher.max_seq_length)
            batches = tokenized(read_texts(sources, count, draw), teacher.tokenizer, length)
            sample = sample_inputs(model, module, batches, files[name], max_rows=rows, seed=options.seed)
            inputs[name] = torch.from_numpy(sample)
        return _fit_all(options, dense, activation, inputs["train"], inputs["other"])
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)


def _fit_all(options: LayerFitArguments, dense: DenseWeights, activation: str, x: Tensor, other: Tensor):
    dense = standardized(dense, x, activation)
    targets, other_targets = outputs_of(dense, x, activation), outputs_of(dense, other, activation)
    about = {"model": public_name(options.model_name_or_path), "layer": options.layer}
    about |= {"rows": len(x), "other_rows": len(other), **dataclasses.asdict(options.settings)}
    results = []
    for form in options.forms:
        began = time.perf_counter()
        layer = make_layer(form, dense, x, activation, options.seed)
        start = unexplained(layer, other, other_targets)
        error = fit_layer(layer, x, targets, options.settings)
        result = {
            "form": form,
            "neurons": neurons_per_token(layer),
            "unexplained": round(unexplained(layer, other, other_targets), 4),
            "unexplained_at_the_start": round(start, 4),
            "training_error": round(error, 4),
            "seconds": round(time.perf_counter() - began, 1),
        }
        results.append(result)
        print("  ".join(f"{name} {value}" for name, value in result.items()), flush=True)
        content = {**about, "results": results}
        write_text(Path(options.output_dir) / RESULTS, json.dumps(content, indent=2) + "\n")
        write_text(Path(options.output_dir) / TABLE, format_table(results) + "\n")
    return results


def format_table(results: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of the results."""
    lines = ["| layer | neurons a token | unexplained | before training | seconds |", "|---|---|---|---|---|"]
    for row in results:
        values = (row["form"], row["neurons"], f"{row['unexplained']:.3f}", f"{row['unexplained_at_the_start']:.3f}")
        lines.append("| " + " | ".join(map(str, (*values, f"{row['seconds']:.0f}"))) + " |")
    return "\n".join(lines)
