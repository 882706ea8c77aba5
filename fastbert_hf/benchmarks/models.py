"""Whole models: FastBERT against its dense twin, against no feed-forward at all, and against what people use."""

import copy
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fastbert_hf import (
    FastBertConfig,
    FastBertForMaskedLM,
    FastBertForSequenceClassification,
    FastBertModel,
    use_backend,
)
from fastbert_hf.benchmarks import forms
from fastbert_hf.benchmarks.layer import verdict
from fastbert_hf.benchmarks.rows import Row, make_rows
from fastbert_hf.benchmarks.timing import Stopwatch, interleaved, wall_seconds
from fastbert_hf.fff_layer import FastFeedForward


@dataclass(frozen=True)
class Place:
    """Where and how whole models run.

    Attributes:
        device: torch's name of it.
        dtype: of inference; training keeps float32 weights and computes in it by autocast.
        compile: torch.compile every model.
        stopwatch: as for `interleaved`.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    compile: bool = False
    stopwatch: Stopwatch = wall_seconds

    def ready(self, model: nn.Module) -> Callable:
        """The model as it is called, compiled where that is wanted."""
        return torch.compile(model, dynamic=False) if self.compile else model

    def autocast(self) -> AbstractContextManager:
        """What a training step runs under."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device, self.dtype)


ON_THE_CPU = Place()
BERT_BASE = {"vocab_size": 30522, "hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 512}


class NoFeedForward(nn.Module):
    """The bound: a feed-forward layer that takes no time."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class DenseAndMask(nn.Module):
    """What the published model computes in place of the walk, on the same parameters."""

    def __init__(self, layer: FastFeedForward):
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        y = forms.dense_and_mask(
            hidden.flatten(0, -2), layer.weight_in, layer.bias_in, layer.weight_out, layer.trees, layer.depth
        )
        return y.view_as(hidden)


def with_feed_forward(model: nn.Module, replace: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The model with every layer's feed-forward block replaced."""
    for layer in model.base_model.layers:
        layer.ffn = replace(layer.ffn)
    return model


def _twins(model_class: type, layers: int) -> dict[str, nn.Module]:
    """The published geometry and its relatives: the same everything, another feed-forward block.

    Masked language models decode a quarter of the positions in training, as the published recipe does.
    """

    def build(**fields):
        torch.manual_seed(0)
        return model_class(FastBertConfig(num_hidden_layers=layers, sparse_prediction=0.25, **fields))

    return {
        "FastBERT": build(),
        "dense twin 4095": build(ffn_type="dense", intermediate_size=4095),
        "dense twin 4096": build(ffn_type="dense", intermediate_size=4096),
        "no feed-forward": with_feed_forward(build(), lambda ffn: NoFeedForward()),
    }


def inference_rows(
    batch: int,
    tokens: int,
    threads: int,
    rounds: int = 5,
    layers: int = 16,
    classifier: bool = False,
    place: Place = ON_THE_CPU,
) -> list[Row]:
    """A forward pass of the bare encoder or of a classifier; the baseline is the faster dense twin."""
    torch.set_num_threads(threads)
    kind = FastBertForSequenceClassification if classifier else FastBertModel
    models = {name: model.eval().to(place.device, place.dtype) for name, model in _twins(kind, layers).items()}
    ids = torch.randint(1, 32768, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(place.device)
    with torch.inference_mode():
        calls = {name: place.ready(model) for name, model in models.items()}
        entries = {f"{name} (module call)": partial(call, ids) for name, call in calls.items()}
        value = entries["FastBERT (module call)"]()[0]
        with use_backend("reference"):
            expected = models["FastBERT"](ids)[0]
        matches = {"FastBERT (module call)": _near_everywhere(value, expected)}
        timings = interleaved(entries, rounds, least_seconds=0.1, stopwatch=place.stopwatch)
    baseline = min((n for n in timings if n.startswith("dense")), key=lambda n: timings[n].median)
    return make_rows(
        timings,
        baseline,
        matches,
        section="classifier, evaluation" if classifier else f"{_prefix(place)}whole encoder, inference",
        case=f"{layers} layers, {batch} x {tokens}",
        tokens=batch * tokens,
        threads=threads,
        dtype=str(place.dtype).removeprefix("torch."),
        inputs="random ids",
    )


def _prefix(place: Place) -> str:
    """Sections of another device do not mix with the CPU's."""
    return "" if place is ON_THE_CPU else "gpu "


def _near_everywhere(value: torch.Tensor, expected: torch.Tensor) -> str:
    """As `verdict` on the tokens whose path no rounding changed; says how many did."""
    per_token = (value - expected).abs().amax(dim=-1) / expected.abs().amax()
    flipped = per_token > (2e-5 if value.dtype == torch.float32 else 2e-2)
    note = f", {int(flipped.sum())} of {flipped.numel()} tokens took another path" if flipped.any() else ""
    return verdict(value[~flipped], expected[~flipped]) + note


def training_rows(
    batch: int, tokens: int, threads: int, rounds: int = 3, layers: int = 16, place: Place = ON_THE_CPU
) -> list[Row]:
    """A whole training step: MLM loss on a quarter of the positions, backward, AdamW; against dense-and-mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 32768, (batch, tokens), generator=generator)
    labels = torch.full_like(ids, -100).flatten()
    labels[torch.randperm(ids.numel(), generator=generator)[: ids.numel() // 4]] = 7
    section = f"{_prefix(place)}training step"
    return _step_rows(FastBertForMaskedLM, ids, labels.view_as(ids), threads, rounds, layers, section, 0.5, place)


def finetuning_rows(batch: int, tokens: int, threads: int, rounds: int = 3, layers: int = 16) -> list[Row]:
    """A whole step of fine-tuning a classifier, nothing clipped, AdamW; against dense-and-mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 32768, (batch, tokens), generator=generator)
    labels = torch.randint(0, 2, (batch,), generator=generator)
    kind = FastBertForSequenceClassification
    return _step_rows(kind, ids, labels, threads, rounds, layers, "fine-tuning step", None)


def _step_rows(
    model_class: type,
    ids: torch.Tensor,
    labels: torch.Tensor,
    threads: int,
    rounds: int,
    layers: int,
    section: str,
    max_grad_norm: float | None,
    place: Place = ON_THE_CPU,
) -> list[Row]:
    """Steps of the published geometry and its relatives on one batch, without dropout; ids: (B, T)."""
    torch.set_num_threads(threads)
    ids, labels = ids.to(place.device), labels.to(place.device)
    models = _twins(model_class, layers)
    del models["dense twin 4096"]  # five models with their optimizer states are what 24 GB hold
    torch.manual_seed(0)
    masked = model_class(FastBertConfig(num_hidden_layers=layers, sparse_prediction=0.25))
    models["dense-and-mask"] = with_feed_forward(masked, DenseAndMask)
    entries, losses = {}, {}
    for name, model in models.items():
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        with torch.no_grad(), place.autocast():
            losses[name] = model.train().to(place.device)(ids, labels=labels).loss
        entries[f"{name} (training step)"] = _training_step(model, ids, labels, max_grad_norm, place)
    ours, masked_loss = (losses[name].to(place.dtype) for name in ("FastBERT", "dense-and-mask"))
    matches = {"FastBERT (training step)": "loss " + verdict(ours, masked_loss)}
    timings = interleaved(entries, rounds, least_seconds=0.1, stopwatch=place.stopwatch)
    return make_rows(
        timings,
        "dense-and-mask (training step)",
        matches,
        section=section,
        case=f"{layers} layers, {ids.shape[0]} x {ids.shape[1]}",
        tokens=ids.numel(),
        threads=threads,
        dtype="float32" if place.dtype == torch.float32 else f"{str(place.dtype)[6:]} autocast",
        inputs="random ids",
    )


def _training_step(
    model: nn.Module, ids: torch.Tensor, labels: torch.Tensor, max_grad_norm: float | None, place: Place
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    call = place.ready(model)

    def step() -> None:
        with place.autocast():
            loss = call(ids, labels=labels).loss
        loss.backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def alternatives_rows(batch: int, tokens: int, threads: int, rounds: int = 5) -> list[Row]:
    """FastBERT at BERT-base's depth beside what a user would pick for a fast encoder on a CPU, random weights.

    DistilBERT's shape in torch; BERT-base in torch and, where onnxruntime is installed, as ONNX in float32 and
    dynamically quantised to int8. The models in torch also in bfloat16, which is what to compare int8 with.
    """
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**BERT_BASE), add_pooling_layer=False).eval()
    distilbert = DistilBertModel(DistilBertConfig(vocab_size=30522)).eval()
    geometry = {
        "norm_scheme": "post",
        "use_bias": True,
        "type_vocab_size": 2,
        "position_embedding_type": "absolute",
        "final_norm": False,
    }
    fastbert = FastBertModel(FastBertConfig(**BERT_BASE, **geometry, num_hidden_layers=12)).eval()
    ids = torch.randint(1, 30522, (batch, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    entries, matches = {}, {}
    with torch.inference_mode():
        expected = bert(ids, mask).last_hidden_state
        for name, model in {"BERT-base": bert, "DistilBERT": distilbert, "FastBERT 12 layers": fastbert}.items():
            half = copy.deepcopy(model).to(torch.bfloat16)
            entries[f"{name}, torch (module call)"] = lambda m=model: m(ids, mask)
            entries[f"{name}, torch bfloat16 (module call)"] = lambda m=half: m(ids, mask)
            exact, rounded = (m(ids, mask).last_hidden_state.float() for m in (model, half))
            difference = (exact - rounded).norm() / exact.norm()
            matches[f"{name}, torch bfloat16 (module call)"] = f"{difference:.1g} from float32 (relative norm)"
        for name, run in _onnx_sessions(bert, ids, mask, threads).items():
            entries[name] = run
            difference = (torch.from_numpy(run()[0]) - expected).abs().max().item()
            matches[name] = f"max difference to torch {difference:.1g}"
        timings = interleaved(entries, rounds, least_seconds=0.1)
    return make_rows(
        timings,
        "BERT-base, torch (module call)",
        matches,
        section="whole encoder against alternatives",
        case=f"12 layers, {batch} x {tokens}",
        tokens=batch * tokens,
        threads=threads,
        dtype="float32 unless named",
        inputs="random ids",
    )


def _onnx_sessions(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, threads: int) -> dict[str, Callable]:
    """BERT-base under ONNX Runtime, float32 and dynamic int8; nothing where onnxruntime is not installed."""
    try:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        return {}
    sessions = {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    with tempfile.TemporaryDirectory(prefix="fastbert-onnx-") as folder:
        exact, quantised = Path(folder) / "bert.onnx", Path(folder) / "bert-int8.onnx"
        torch.onnx.export(
            model, (ids, mask), str(exact), dynamo=True, input_names=list(feed), external_data=True, verbose=False
        )
        quantize_dynamic(str(exact), str(quantised), weight_type=QuantType.QInt8)
        for title, path in (("float32", exact), ("int8", quantised)):
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            sessions[f"BERT-base, ONNX Runtime {title} (session run)"] = lambda s=session: s.run(None, feed)
    return sessions
