"""Routing stability: how many paths and predictions of a trained model change between backends and dtypes."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from fastbert_hf.benchmarks.layer import backends_for
from fastbert_hf.fff_layer import FastFeedForward
from fastbert_hf.fff_op import use_backend
from fastbert_hf.hub.weights import check_weights
from fastbert_hf.training.module_inputs import watched_inputs

MASKED_EVERY = 7  # one position in so many is masked, so that predictions are asked of the model


@dataclass
class RoutingChange:
    """What differs from the reference in float32, as shares.

    Args:
        paths: (token, layer, tree) paths that differ. tokens: tokens with any different path.
        predictions: positions whose most likely token differs; masked: the same at masked positions only.
    """

    variant: str
    paths: float
    tokens: float
    predictions: float
    masked: float


def text_batch(folder: str, text: str, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Real text as full sequences: ids (B, T), one position in `MASKED_EVERY` masked, and which (B, T) bool.

    Raises:
        ValueError: the text is shorter than one sequence.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = min(128, tokenizer.model_max_length)
    words = Path(text).read_text(encoding="utf-8")[: 40 * num_tokens]
    ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    rows = min(num_tokens, len(ids)) // length
    if not rows:
        raise ValueError(f"{text} has {len(ids)} tokens; expected at least one sequence of {length}")
    ids = torch.tensor(ids[: rows * length]).view(rows, length)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked.view(-1)[::MASKED_EVERY] = True
    return ids.masked_fill(masked, tokenizer.mask_token_id), masked


@torch.inference_mode()
def paths_and_predictions(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids (B, T) -> leaves visited (B, T, layers, P), most likely tokens (B, T)."""
    leaves: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, FastFeedForward)]
    with watched_inputs(layers, lambda number, x: leaves.append(layers[number].route(x)[..., -1])):
        predictions = torch.cat([model(part).logits.argmax(-1) for part in ids.split(8)])
    by_layer = [torch.cat(leaves[index :: len(layers)]) for index in range(len(layers))]
    return torch.stack(by_layer, dim=2), predictions


def routing_changes(folder: str, text: str, num_tokens: int = 4096) -> list[RoutingChange]:
    """Compare every backend and dtype that runs here with the reference in float32.

    Args:
        folder: a trained FastBERT with its tokenizer. text: a text file. num_tokens: how much of it.

    Raises:
        ValueError: damaged weights, or an index of them that leads out of the folder.
    """
    check_weights(folder)
    ids, masked = text_batch(folder, text, num_tokens)
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    half = copy.deepcopy(model).to(torch.bfloat16)
    with use_backend("reference"):
        leaves, predictions = paths_and_predictions(model, ids)
    changes = []
    layer = next(module for module in model.modules() if isinstance(module, FastFeedForward))
    for name in backends_for(layer, torch.zeros(1, layer.in_features)):
        for variant, which, context in (
            ("float32", model, nullcontext()),
            ("bfloat16", half, nullcontext()),
            ("autocast bfloat16", model, torch.autocast("cpu", torch.bfloat16)),
        ):
            if (name, variant) == ("reference", "float32"):
                continue
            with use_backend(name), context:
                other_leaves, other_predictions = paths_and_predictions(which, ids)
            moved, changed = leaves != other_leaves, predictions != other_predictions
            shares = (moved, moved.flatten(2).any(-1), changed, changed[masked])
            changes.append(RoutingChange(f"{name}, {variant}", *(share.float().mean().item() for share in shares)))
    return changes


def format_routing(changes: list[RoutingChange]) -> str:
    """A Markdown table."""
    lines = [
        "| against reference, float32 | paths | tokens with another path | predictions | masked predictions |",
        "|---|---|---|---|---|",
    ]
    for c in changes:
        lines.append(f"| {c.variant} | {c.paths:.3%} | {c.tokens:.3%} | {c.predictions:.3%} | {c.masked:.3%} |")
    return "\n".join(lines)
