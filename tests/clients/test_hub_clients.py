"""Clients in a process without the package: the code in the model's folder is all that they have."""

import pytest
import torch
from transformers import pipeline

from fastbert_hf import FastBertForMaskedLM, use_backend
from tests.clients.helpers import random_batch, run_without_package, tiny_model

SENTENCE = "the [MASK] walks left ."

RUN_CLIENTS = """
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

expected = torch.load("expected.pt")
torch.set_grad_enabled(False)

fill = pipeline("fill-mask", model="model", trust_remote_code=True)
assert [answer["token"] for answer in fill(expected["sentence"])] == expected["tokens"]

model = AutoModelForMaskedLM.from_pretrained("model", trust_remote_code=True).eval()
assert type(AutoTokenizer.from_pretrained("model")).__name__ == expected["tokenizer"]
inputs = expected["inputs"]
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(**inputs).logits, expected["logits"], rtol=1e-5, atol=1e-5)

sizes = {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("length", max=32)}
shorter = {name: tensor[:2, :5].clone() for name, tensor in inputs.items()}
program = torch.export.export(model, (), shorter, dynamic_shapes={name: sizes for name in inputs})
torch.testing.assert_close(program.module()(**inputs).logits, expected["logits"], rtol=1e-5, atol=1e-5)

torch.set_grad_enabled(True)
examples = [{name: tensor[row] for name, tensor in inputs.items()} for row in range(4)]
examples = [{**example, "labels": example["input_ids"]} for example in examples]
options = {"max_steps": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
trainer = Trainer(model=model, args=TrainingArguments("run", **options), train_dataset=examples)
trainer.train()
trainer.save_model()
print("done")
"""

EMBED = """
import torch
from sentence_transformers import SentenceTransformer

expected = torch.load("expected.pt")
embedder = SentenceTransformer("model", trust_remote_code=True, device="cpu")
embedding = embedder.encode(["one root"], convert_to_tensor=True)
torch.testing.assert_close(embedding, expected["embedding"], rtol=1e-5, atol=1e-5)
embedder.save("embedder")
again = SentenceTransformer("embedder", trust_remote_code=True, device="cpu")
assert torch.equal(again.encode(["one root"], convert_to_tensor=True), embedding)
print("done")
"""


@pytest.fixture
def form():
    return {}


@pytest.fixture
def folder(saved, tokenizer, tmp_path, form):
    """A working directory with `model` and what the package computes with it."""
    model = tiny_model(FastBertForMaskedLM, **form)
    inputs = random_batch(4, 9)
    fill = pipeline("fill-mask", model=saved(model))
    with use_backend("reference"), torch.no_grad():
        expected = {
            "sentence": SENTENCE,
            "tokens": [answer["token"] for answer in fill(SENTENCE)],
            "tokenizer": type(tokenizer).__name__,
            "inputs": inputs,
            "logits": model(**inputs).logits,
            "embedding": model.fastbert(**tokenizer("one root", return_tensors="pt")).last_hidden_state.mean(1),
        }
    torch.save(expected, tmp_path / "expected.pt")
    return tmp_path


@pytest.mark.slow
def test_pipeline_compile_export_and_trainer_need_only_the_folder(folder):
    assert run_without_package(RUN_CLIENTS, cwd=folder).split()[-1] == "done"
    model = FastBertForMaskedLM.from_pretrained(folder / "run")  # what Trainer saved there
    before = FastBertForMaskedLM.from_pretrained(folder / "model")
    assert not torch.equal(model.fastbert.layers[0].ffn.weight_in, before.fastbert.layers[0].ffn.weight_in)
    assert (folder / "run" / "fff_reference.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", [{"fff_leaf_width": 5}], ids=["leaves"])
def test_sentence_transformers_needs_only_the_folder(folder):
    pytest.importorskip("sentence_transformers")
    assert run_without_package(EMBED, cwd=folder).split()[-1] == "done"
