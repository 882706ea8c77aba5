"""Which models are served: a BERT, and what this package makes of it, as folders."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from fastbert_hf.benchmarks.serving.cases import Case, fixed, mixed, sentences
from fastbert_hf.benchmarks.serving.engines import CALIBRATION_TOKENS
from fastbert_hf.benchmarks.serving.rows import ORIGINAL
from fastbert_hf.checkpoint_fastbert import read_json
from fastbert_hf.hub.card import SUMMARY
from fastbert_hf.modeling_fastbert import FastBertModel
from fastbert_hf.training.distillation.scores import labelled_rows
from fastbert_hf.training.distillation.student import student_of
from fastbert_hf.training.distillation.teacher import Teacher, load_teacher

SHAPES = ((1, 16), (1, 32), (1, 128), (8, 64), (32, 64))  # texts x tokens
QUICK_SHAPES = ((1, 32), (32, 64))
GEOMETRIES = {
    "MiniLM-L6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "BERT-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
LEAVES = ("leaf:5x96", "leaf:5x192")
FORMS = {"MiniLM-L6": LEAVES, "BERT-base": (*LEAVES, "tree:1x11")}
DTYPES = ("float32", "bfloat16", "int8")
HALF, NOTHING = "half the layers", "no feed-forward"


@dataclass(frozen=True)
class Entry:
    """One thing that is measured.

    Attributes:
        model: key of `Subject.models`, or `NOTHING`: the original without its feed-forward layers.
        engine: key of `ENGINES`. dtype: "float32", "bfloat16" or "int8".
    """

    model: str
    engine: str
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """For tables."""
        dtype = "" if self.dtype in self.engine else f" {self.dtype}"
        return f"{self.model}, {self.engine}{dtype}"


BASELINE = Entry(ORIGINAL, "torch")


@dataclass(frozen=True)
class Subject:
    """An original and its alternatives.

    Attributes:
        name: for tables. models: folder of each model; "original" is a BERT of Transformers, all others but
            "half the layers" are FastBERTs.
        cases: what they are sent. calibration: (ids, mask) of shape (1, T).
        teacher: the original with its tokenizer and embedding, where quality is measured on `eval_file`.
    """

    name: str
    models: dict[str, Path]
    cases: list[Case]
    calibration: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    teacher: Teacher | None = None
    eval_file: str | None = None

    @property
    def is_trained(self) -> bool:
        """Whether outputs of different models can be compared."""
        return self.teacher is not None

    def entries(self, compiled: bool = True) -> list[Entry]:
        """What is measured, the baseline first."""
        found = [BASELINE, Entry(ORIGINAL, "torch", "bfloat16")]
        if compiled:
            found += [Entry(ORIGINAL, "torch.compile", dtype) for dtype in DTYPES[:2]]
        found.append(Entry(ORIGINAL, "torch dynamic int8", "int8"))
        found += [Entry(ORIGINAL, engine, "float32") for engine in ("ONNX Runtime", "ONNX Runtime, fused")]
        found += [Entry(ORIGINAL, engine, "int8") for engine in ("ONNX Runtime", "ONNX Runtime, fused")]
        found += [Entry(ORIGINAL, "OpenVINO", dtype) for dtype in DTYPES]
        if HALF in self.models:
            found += [Entry(HALF, "torch"), Entry(HALF, "torch", "bfloat16")]
            found += [Entry(HALF, "ONNX Runtime, fused", "int8"), Entry(HALF, "OpenVINO", "int8")]
        ours = [name for name in self.models if name not in (ORIGINAL, HALF)]
        for name in (ORIGINAL, *ours, NOTHING):
            found.append(Entry(name, "FastBERT"))
            found += [Entry(name, "FastBERT, prepared", dtype) for dtype in DTYPES]
        return found


def random_subject(geometry: str, folder: Path, quick: bool) -> Subject:
    """A model of this geometry and its alternatives, random weights, saved below `folder`.

    Speed does not depend on the weights; quality is none.
    """
    torch.manual_seed(0)
    fields = {"vocab_size": 30522, **GEOMETRIES[geometry]}
    half = {**fields, "num_hidden_layers": fields["num_hidden_layers"] // 2}
    models = {ORIGINAL: folder / "original", HALF: folder / "half"}
    for name, sizes in ((ORIGINAL, fields), (HALF, half)):
        BertModel(BertConfig(**sizes), add_pooling_layer=False).save_pretrained(models[name])
    dense = FastBertModel.from_pretrained(models[ORIGINAL])
    for form in FORMS[geometry]:
        models[form] = folder / form.replace(":", "-")
        student_of(dense, form).model.save_pretrained(models[form])
    vocabulary = fields["vocab_size"]
    shapes = QUICK_SHAPES if quick else SHAPES
    cases = [fixed(*shape, vocabulary) for shape in shapes] + [mixed(vocabulary)]
    calibration = [(case.ids, case.mask) for case in (fixed(1, 64, vocabulary),)] * 8
    return Subject(f"{geometry}, random weights", models, cases, calibration)


def trained_subject(
    name: str, runs: list[str], eval_file: str | None, texts: list[str] | None, quick: bool, calibration_texts: int
) -> Subject:
    """A model that a user has, and models distilled from it.

    Args:
        name: folder of a BERT. runs: folders of finished distillations of it.
        eval_file: pairs of texts with a score. texts: sentences to time and calibrate with; default: those of
            `eval_file`.

    Raises:
        ValueError: a folder without model; no texts.
    """
    teacher = load_teacher(name)
    models = {ORIGINAL: teacher.folder}
    for run in runs:
        form = read_json(Path(run) / SUMMARY).get("form", Path(run).name)
        models[form if form not in models else Path(run).name] = Path(run)
    if texts is None and eval_file is not None:
        texts = [text for pair in labelled_rows(eval_file)[0] for text in pair]
    if not texts:
        raise ValueError("no texts to time with; expected a file of sentences or of labelled pairs")
    vocabulary, longest = teacher.model.config.vocab_size, teacher.max_seq_length
    cases = [fixed(*shape, vocabulary) for shape in (QUICK_SHAPES if quick else SHAPES) if shape[1] <= longest]
    cases.append(sentences(texts, teacher.tokenizer, longest))
    calibration = list(_padded(texts[:calibration_texts], teacher))
    return Subject(Path(name).resolve().name, models, cases, calibration, teacher, eval_file)


def _padded(texts: list[str], teacher: Teacher) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, mask) of each text, all of one length, as sentence-transformers calibrates."""
    length = min(CALIBRATION_TOKENS, teacher.model.config.max_position_embeddings)
    for text in texts:
        batch = teacher.tokenizer(text, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
        yield batch["input_ids"], batch["attention_mask"]
