"""Data parallel training over two CPU processes: the gradients and weights of one process on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbert_hf import FastBertForMaskedLM, FastBertForSequenceClassification
from tests.clients.helpers import random_batch, tiny_model
from tests.processes import CHILD_SECONDS

pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)

ROOT = Path(__file__).parents[2]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
STEPS = 2

WORKER = """
import os
import sys
import torch
from accelerate import Accelerator
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import fastbert_hf

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
for name in sys.argv[1:]:
    auto_class = AutoModelForMaskedLM if name.startswith("masked_lm") else AutoModelForSequenceClassification
    model = auto_class.from_pretrained(name).train()
    if name.endswith("checkpointed"):
        model.gradient_checkpointing_enable()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batch = torch.load(f"{name}/batch.pt")
    rows = batch["input_ids"].shape[0] // 2
    share = slice(accelerator.process_index * rows, (accelerator.process_index + 1) * rows)
    results = {}
    for step in range(int(torch.load(f"{name}/steps.pt"))):
        optimizer.zero_grad()
        accelerator.backward(model(**{key: value[share] for key, value in batch.items()}).loss)
        named = accelerator.unwrap_model(model).named_parameters()
        results |= {f"{step}.{key}": parameter.grad.clone() for key, parameter in named}
        optimizer.step()
    torch.save(results, f"{name}/gradients-{accelerator.process_index}.pt")
accelerator.end_training()
os._exit(0)  # gloo's threads may still let go of tensors, and an interpreter that is ending aborts on that
"""


def masked_lm_batch() -> dict[str, torch.Tensor]:
    """As many labels in each half of the batch: the mean of the processes' losses is the loss of the batch."""
    inputs = random_batch(4, 8)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, [1, 6]] = inputs["input_ids"][:, [1, 6]]
    return {**inputs, "labels": labels}


def classification_batch() -> dict[str, torch.Tensor]:
    return {**random_batch(4, 8), "labels": torch.tensor([0, 1, 1, 0])}


def gradients_of_one_process(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        results |= {f"{step}.{name}": parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
    return results


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_on_the_whole_batch(tmp_path):
    """Unvisited nodes hold zero rows in dense gradients, so no parameter ever counts as unused."""
    cases = {
        "masked_lm": (FastBertForMaskedLM, masked_lm_batch()),
        "masked_lm_checkpointed": (FastBertForMaskedLM, masked_lm_batch()),
        "classification": (FastBertForSequenceClassification, classification_batch()),
    }
    expected = {}
    for name, (model_class, batch) in cases.items():
        model = tiny_model(model_class, **NO_DROPOUT, fff_depth=5)
        model.save_pretrained(tmp_path / name)
        torch.save(batch, tmp_path / name / "batch.pt")
        torch.save(STEPS, tmp_path / name / "steps.pt")
        expected[name] = gradients_of_one_process(model, batch)
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [*launch, "worker.py", *cases],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
    )
    assert process.returncode == 0, process.stderr[-6000:]
    for name in cases:
        for rank in range(2):
            gradients = torch.load(tmp_path / name / f"gradients-{rank}.pt")
            assert gradients.keys() == expected[name].keys()
            for key, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name][key], rtol=1e-5, atol=1e-6)
        rows = expected[name][f"{STEPS - 1}.fastbert.layers.0.ffn.weight_in"].abs().sum(1)
        assert 0 < (rows == 0).sum() < rows.numel(), "some nodes were visited and some were not"
