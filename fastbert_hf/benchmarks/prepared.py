"""What preparing a model for inference is worth and what it costs: size, speed, error of its output, score."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastbert_hf.benchmarks.distilled import CASES, speed
from fastbert_hf.training.distillation.scores import labelled_rows, score
from fastbert_hf.training.distillation.student import encoder_of
from fastbert_hf.training.distillation.teacher import Teacher
from fastbert_hf.training.module_inputs import watched_inputs

PREPARED = "prepared.json"  # beside the model
BATCH, TOKENS = (16, 64), 64  # of the comparison of outputs: texts a batch, texts in all; tokens a text at most


def compare_prepared(
    source: Teacher, prepared: PreTrainedModel, eval_file: str | None, rounds: int
) -> dict[str, Any]:
    """Compare a prepared model with the one that it was made from.

    Args:
        source: the float model, with its tokenizer. prepared: in evaluation mode.
        eval_file: labelled texts, on which outputs are compared and both are scored; None: random tokens, no score.
        rounds: of the timing; 0 leaves it out.
    Returns: what a JSON file holds.
    """
    models = {"before": source.model, "after": prepared}
    config = prepared.config.quantization_config
    found: dict[str, Any] = {"dtype": config.dtype, "linear_dtype": config.linear_dtype}
    found["megabytes"] = {name: round(megabytes(model), 2) for name, model in models.items()}
    found["output"] = output_error(source, prepared, _batches(source, eval_file))
    if eval_file is not None:
        length = source.max_seq_length
        found["score"] = {name: score(model, source, eval_file, length) for name, model in models.items()}
    encoders = {name: encoder_of(model) for name, model in models.items()}
    found["speed"] = []
    for case in CASES if rounds else ():
        if case[1] <= source.max_seq_length:
            times = speed(encoders, case, rounds)
            row = {f"{name}_ms": round(value, 3) for name, value in times.items()}
            found["speed"].append({"case": f"{case[0]} x {case[1]}"} | row)
    return found


def megabytes(model: nn.Module) -> float:
    """The size of a model's tensors as they are saved, a tied one counted once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e6


def _batches(source: Teacher, eval_file: str | None) -> list[dict[str, Tensor]]:
    """Inputs on which outputs are compared: the first texts of the file, otherwise random tokens."""
    length = min(TOKENS, source.max_seq_length)
    size, count = BATCH
    if eval_file is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(source.model.config.vocab_size, (count, length), generator=generator)
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(size)]
    rows = labelled_rows(eval_file)[0][:count]
    options = {"truncation": True, "max_length": length, "padding": True, "return_tensors": "pt"}
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [dict(source.tokenizer([row[0] for row in part], **options)) for part in parts]


@torch.no_grad()
def output_error(source: Teacher, prepared: PreTrainedModel, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """How far the outputs of an encoder move, tokens that a mask hides left out.

    Returns: relative_error: norm of the difference of the last hidden states over their norm. largest_difference: of
        one of their values, beside largest_value, the largest of them before. changed_paths: share of
        tokens that take another path, over layers and trees, where there are trees. For sentence embedders also
        least_cosine and mean_cosine of the embeddings with their old selves.
    """
    distance = size = changed = paths = furthest = largest = 0.0
    cosines = []
    encoders = encoder_of(source.model).eval(), encoder_of(prepared)
    for batch in batches:
        (before, old_paths), (after, new_paths) = (_run(encoder, batch) for encoder in encoders)
        seen = batch["attention_mask"].bool()
        distance += (after - before)[seen].double().square().sum().item()
        size += before[seen].double().square().sum().item()
        furthest = max(furthest, (after - before)[seen].abs().max().item())
        largest = max(largest, before[seen].abs().max().item())
        for old, new in zip(old_paths, new_paths, strict=True):
            differs = (old != new)[seen]  # (tokens, P) or, for trees of single neurons, (tokens, P, D + 1)
            changed += (differs.any(-1) if differs.dim() == 3 else differs).double().sum().item()
            paths += seen.sum().item() * differs.shape[1]
        if source.embed is not None:
            old, new = (source.embed(hidden, batch["attention_mask"]) for hidden in (before, after))
            cosines.append(nn.functional.cosine_similarity(old, new))
    found = {"relative_error": (distance / size) ** 0.5, "largest_difference": furthest, "largest_value": largest}
    if paths:
        found["changed_paths"] = changed / paths
    if cosines:
        found |= {"least_cosine": torch.cat(cosines).min().item(), "mean_cosine": torch.cat(cosines).mean().item()}
    return found


def _run(encoder: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Last hidden states (B, T, H), and the paths of each layer of trees: (B, T, P) or (B, T, P, D + 1)."""
    paths = []
    layers = [layer.ffn for layer in encoder.layers if hasattr(layer.ffn, "route")]

    def record(number: int, x: Tensor) -> None:
        route = layers[number].route(x)
        paths.append(route[0] if isinstance(route, tuple) else route)

    with watched_inputs(layers, record):
        return encoder(**batch).last_hidden_state.float(), paths


def render(found: Mapping[str, Any]) -> str:
    """What `compare_prepared` found, as lines for a terminal."""
    before, after = found["megabytes"]["before"], found["megabytes"]["after"]
    output = found["output"]
    lines = [
        f"prepared: dtype {found['dtype']}, linear layers {found['linear_dtype']}",
        f"  size        {before:.1f} MB -> {after:.1f} MB",
        f"  output      relative error {output['relative_error']:.4f}, "
        f"a value of at most {output['largest_value']:.3g} moves by {output['largest_difference']:.3g} at most",
    ]
    if "changed_paths" in output:
        lines[-1] += f", {100 * output['changed_paths']:.1f} % of the paths change"
    if "mean_cosine" in output:
        lines.append(
            f"  embeddings  cosine with the old one {output['mean_cosine']:.4f} in the mean, "
            f"{output['least_cosine']:.4f} at least"
        )
    if "score" in found:
        lines.append(f"  score       {100 * found['score']['before']:.2f} -> {100 * found['score']['after']:.2f}")
    for row in found["speed"]:
        times = row["before_ms"], row["after_ms"]
        lines.append(
            f"  {row['case']:<10}  {times[0]:.2f} ms -> {times[1]:.2f} ms, {times[0] / times[1]:.2f} times as fast"
        )
    return "\n".join(lines)
