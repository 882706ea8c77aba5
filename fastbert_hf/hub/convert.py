"""From the published layout, or an older native one, to the native layout, with a report of what became of it."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from fastbert_hf.hub.files import largest_difference, load_model, read_config, sample_outputs
from fastbert_hf.hub.weights import INDEX_SUFFIX, is_pickled, stored_shapes
from fastbert_hf.modeling_fastbert import FastBertPreTrainedModel
from fastbert_hf.published_layout import FirstStored, SplitHeadwise, TransposeRows, weight_conversions

CHANGES = {SplitHeadwise: "split", TransposeRows: "transposed", FirstStored: "renamed"}
REPORT = "conversion.json"


@dataclass
class Conversion:
    """What a conversion did.

    Attributes:
        tensors: for every stored tensor its new names and what was done: kept, renamed, transposed, split or dropped.
        parameters: number of values, tied ones once.
        difference: maximal absolute difference of all outputs, hidden states included, before and after.
    """

    source_layout: str
    tensors: dict[str, tuple[str, list[str]]]
    parameters: int
    difference: float

    def count(self, change: str) -> int:
        """Stored tensors with one fate."""
        return sum(done == change for done, _ in self.tensors.values())

    def lines(self) -> list[str]:
        """The report for people."""
        fates = ("kept", "renamed", "transposed", "split", "dropped")
        counts = ", ".join(f"{self.count(fate)} {fate}" for fate in fates if self.count(fate))
        after = sum(len(names) for _, names in self.tensors.values())
        dropped = sorted({key.rsplit(".", 2)[-2] + "." + key.rsplit(".", 1)[-1] for key in self.dropped()})
        return [
            f"layout       {self.source_layout} -> fastbert",
            f"tensors      {len(self.tensors)} -> {after}: {counts}",
            *(
                [f"dropped      {', '.join(dropped)}: a constant, or a second copy of a tied tensor"]
                if dropped
                else []
            ),
            f"parameters   {self.parameters:,}",
            f"difference   {self.difference:g} at most between the outputs before and after",
        ]

    def dropped(self) -> list[str]:
        """Names of the stored tensors that have no place in the native layout."""
        return [key for key, (done, _) in self.tensors.items() if done == "dropped"]


def stored_tensors(folder: Path) -> list[str]:
    """Names of the tensors that a model is loaded from; only headers are read."""
    return sorted(stored_shapes(folder))


def trace_tensors(stored: list[str], model: FastBertPreTrainedModel) -> dict[str, tuple[str, list[str]]]:
    """What becomes of every stored tensor: {name: (what was done, new names)}."""
    conversions = weight_conversions()
    renamings = [step for step in conversions if isinstance(step, WeightRenaming)]
    converters = [step for step in conversions if isinstance(step, WeightConverter)]
    state = model.state_dict()
    traced: dict[str, tuple[str, list[str]]] = {}
    taken: set[str] = set()
    for name in stored:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        targets, done = [target], "kept" if target == name else "renamed"
        if pattern is not None:
            converter = next(step for step in converters if pattern in step.source_patterns)
            first, *others = converter.target_patterns
            targets += [target.replace(first, other) for other in others]
            done = CHANGES[type(converter.operations[0])]
        if name in state:
            targets, done = [name], "kept"
        if target not in state or target in taken:
            targets, done = [], "dropped"
        taken.update(targets)
        traced[name] = (done, targets)
    return traced


def convert(source: Path, target: Path) -> Conversion:
    """Write the model of one folder into another in the native layout, with its code, and load it back.

    Args:
        source: folder in the native or the published layout; it is only read.
        target: empty folder. Everything of `source` that belongs to no layout (tokenizer, card, licence) is copied.

    Returns:
        The report, which is also in conversion.json.

    Raises:
        ValueError: `source` holds no FastBERT, or the converted model computes something else.
    """
    layout = read_config(source)["model_type"]
    model = load_model(source)
    before = sample_outputs(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tensors = trace_tensors(stored_tensors(source), model)
    model.save_pretrained(target)
    del model
    copy_companions(source, target)
    difference = largest_difference(before, sample_outputs(load_model(target)))
    report = Conversion(layout, tensors, parameters, difference)
    named = sorted(name for _, names in tensors.values() for name in names)
    if named != stored_tensors(target):
        raise RuntimeError("the report of the conversion does not name the tensors that were written")
    if not difference <= torch.finfo(torch.float32).eps:
        raise ValueError(f"the converted model computes something else: outputs differ by up to {difference:g}")
    (target / REPORT).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return report


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to no layout: everything but weights, configuration, code, pickles and what is there."""
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        layout = name.name == "config.json" or name.suffix in (".safetensors", ".py") or is_pickled(name.name)
        layout = layout or name.name.endswith(INDEX_SUFFIX)
        hidden = any(part.startswith(".") for part in name.parts)
        if file.is_file() and not (len(name.parts) == 1 and layout) and not hidden and not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)
