"""Fit several forms of layer to one dense layer of a trained model: a table of what each leaves unexplained."""

import dataclasses
import itertools
import json
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from fastbert_hf import bert_layouts
from fastbert_hf.data.readers import TABLE_SUFFIXES, check_corpus_files, read_documents, read_rows
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.encoder_fastbert import FastBertDenseFeedForward
from fastbert_hf.fff_reference import ACTIVATIONS
from fastbert_hf.files import check_output_folder, write_text
from fastbert_hf.training.distillation.activations import sample_inputs
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
from fastbert_hf.training.distillation.start_from_data import DenseWeights
from fastbert_hf.training.leaf_balance import check_balance

BATCH = 32  # texts that the model reads at a time
ACTIVATION_NAMES = {name: name for name in ACTIVATIONS} | bert_layouts.ACTIVATION_NAMES
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
        for file in self.train_file + self.other_file:
            if Path(file).suffix not in TABLE_SUFFIXES:
                check_corpus_files([file])
            elif not Path(file).is_file():
                raise ValueError(f"data file {file!r} does not exist")
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
    model, tokenizer = load(options.model_name_or_path)
    layers = dense_layers(model)
    if not 0 <= options.layer < len(layers):
        raise ValueError(f"layer is {options.layer}; expected 0 to {len(layers) - 1}, the model's dense layers")
    module, dense, activation = layers[options.layer]
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(options.seed)
    parts = {"train": (options.train_file, options.texts_per_file, options.max_rows)}
    parts["other"] = (options.other_file, options.other_texts_per_file, options.max_rows)
    inputs, files = {}, {name: folder / f"inputs-{name}.f32" for name in parts}
    try:
        for name, (sources, count, rows) in parts.items():
            batches = tokenized(read_texts(sources, count, draw), tokenizer, options.max_seq_length)
            sample = sample_inputs(model, module, batches, files[name], max_rows=rows, seed=options.seed)
            inputs[name] = torch.from_numpy(sample)
        return _fit_all(options, dense, activation, inputs["train"], inputs["other"])
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)


def _fit_all(options: LayerFitArguments, dense: DenseWeights, activation: str, x: Tensor, other: Tensor):
    dense = standardized(dense, x, activation)
    targets, other_targets = outputs_of(dense, x, activation), outputs_of(dense, other, activation)
    about = {"rows": len(x), "other_rows": len(other), **dataclasses.asdict(options.settings)}
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
        content = {"model": options.model_name_or_path, "layer": options.layer, **about, "results": results}
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


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model without head, and its tokenizer.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return AutoModel.from_pretrained(name).eval(), load_tokenizer(name)
    except OSError as error:
        raise ValueError(f"no model can be loaded from {name!r}: {str(error).strip().splitlines()[0]}") from error


def dense_layers(model: PreTrainedModel) -> list[tuple[nn.Module, DenseWeights, str]]:
    """The dense feed-forward layers of a model: where their input arrives, their weights, their activation.

    Known are BERT and what has its layers' names (`intermediate.dense`, `output.dense`), and dense FastBERT that is
    not gated.

    Raises:
        ValueError: the model has none of these, or an activation that leaf trees do not have.
    """
    name = model.config.hidden_act
    if name not in ACTIVATION_NAMES:
        raise ValueError(f"hidden_act of the model is {name!r}; expected one of {', '.join(ACTIVATION_NAMES)}")
    found = []
    for module in model.modules():
        if isinstance(module, FastBertDenseFeedForward) and not module.gated:
            found.append((module, DenseWeights.of(module.dense_in, module.dense_out), ACTIVATION_NAMES[name]))
        elif hasattr(module, "intermediate") and hasattr(module.intermediate, "dense"):
            weights = DenseWeights.of(module.intermediate.dense, module.output.dense)
            found.append((module.intermediate, weights, ACTIVATION_NAMES[name]))
    if not found:
        raise ValueError(f"{model.config.model_type!r} has no dense feed-forward layer of a known form")
    return found


def read_texts(files: Sequence[str], count: int, draw: random.Random) -> list[str]:
    """Texts of several files: of each, `count` at random (of a text file, among its first 20 * count lines).

    Args:
        files: tables, of which every string is a text, and text files with one text a line.
        count: for each file, at most.
        draw: what chooses.
    """
    texts = []
    for file in files:
        if Path(file).suffix in TABLE_SUFFIXES:
            found = [value for row in read_rows(file) for value in row.values() if isinstance(value, str) and value]
        else:
            found = list(itertools.islice(read_documents([file]), 20 * count))
        texts += draw.sample(found, min(count, len(found)))
    return texts


def tokenized(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Iterable[dict]:
    """Batches of texts of like length: `input_ids` and `attention_mask` (B, T)."""
    texts = sorted(texts, key=len)
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        yield tokenizer(part, truncation=True, max_length=max_seq_length, padding=True, return_tensors="pt")
