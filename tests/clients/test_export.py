"""torch.export with dynamic batch and length: the program runs in a process without this package."""

import pytest
import torch
from torch.export import Dim

from fastbert_hf import FastBertForMaskedLM, FastBertForSequenceClassification, FastBertModel
from tests.clients.helpers import FORMS, random_batch, run_without_package, tiny_model

SHAPES = ((1, 1), (5, 32), (2, 9), (1, 9), (7, 1))
MODELS = {
    "encoder": (FastBertModel, {}),
    "post_norm_encoder": (
        FastBertModel,
        {
            "norm_scheme": "post",
            "use_bias": True,
            "type_vocab_size": 2,
            "position_embedding_type": "absolute",
            "num_hidden_layers": 1,
        },
    ),
    "classifier": (FastBertForSequenceClassification, {"classifier_pooling": "mean", "num_hidden_layers": 1}),
    "masked_lm": (FastBertForMaskedLM, {"num_hidden_layers": 1}),
    "leaf_trees": (FastBertModel, {"fff_leaf_width": 5, "num_hidden_layers": 1}),
}
# model, whether it takes a mask, whether it returns a tuple
CASES = [
    ("encoder", False, False),
    ("post_norm_encoder", True, False),
    ("classifier", False, True),
    ("masked_lm", True, True),
    ("leaf_trees", True, True),
]

RUN_PROGRAMS = """
import pathlib
import torch

def run(pattern):
    for path in sorted(pathlib.Path.cwd().glob(pattern)):
        program = torch.export.load(path).module()
        for case in torch.load(path.with_suffix(".pt")):
            output = program(**case["inputs"])[0]
            torch.testing.assert_close(output, case["output"], rtol=1e-5, atol=1e-5)
            print(path.stem, *output.shape)

run("*-tuple.pt2")  # these need torch alone
assert "transformers" not in sys.modules
import transformers.modeling_outputs  # the types of the other outputs
run("*-dict.pt2")
assert not hasattr(torch.ops.fastbert, "fff_v1") and not hasattr(torch.ops.fastbert, "leaf_trees_v1")
assert not any(name.startswith("fastbert_hf") for name in sys.modules)
"""


def exported(model: torch.nn.Module, with_mask: bool) -> torch.export.ExportedProgram:
    inputs = random_batch(3, 7)
    if not with_mask:
        inputs.pop("attention_mask")
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=1, max=model.config.max_position_embeddings)
    return torch.export.export(model, (), inputs, dynamic_shapes={name: {0: batch, 1: length} for name in inputs})


def batches(with_mask: bool) -> list[dict[str, torch.Tensor]]:
    """Batches of many shapes: unpadded, padded left and right, and a row in which nothing is visible."""
    cases = []
    for batch, length in SHAPES:
        inputs = random_batch(batch, length)
        if not with_mask:
            inputs.pop("attention_mask")
        elif batch > 2:
            inputs["attention_mask"][-1] = 0
        cases.append(inputs)
    if with_mask:
        inputs = random_batch(4, 6)
        cases.append({**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})
    return cases


@pytest.mark.slow
@torch.no_grad()
def test_exported_programs_run_without_the_package_at_every_shape(tmp_path):
    expected_lines = 0
    for name, with_mask, as_tuple in CASES:
        model_class, overrides = MODELS[name]
        model = tiny_model(model_class, **overrides, return_dict=not as_tuple)
        stem = f"{name}-{'mask' if with_mask else 'nomask'}-{'tuple' if as_tuple else 'dict'}"
        torch.export.save(exported(model, with_mask), tmp_path / f"{stem}.pt2")
        cases = [{"inputs": inputs, "output": model(**inputs)[0]} for inputs in batches(with_mask)]
        torch.save(cases, tmp_path / f"{stem}.pt")
        expected_lines += len(cases)
    printed = run_without_package(RUN_PROGRAMS, cwd=tmp_path)
    assert len(printed.splitlines()) == expected_lines


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_exported_program_holds_no_operator_of_ours_and_refuses_sequences_beyond_the_positions(form):
    program = exported(tiny_model(FastBertModel, num_hidden_layers=1, **FORMS[form]), with_mask=False)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets and not any("fastbert" in str(target) for target in targets)
    with pytest.raises(AssertionError, match="<= 32"):
        program.module()(**{"input_ids": random_batch(2, 33)["input_ids"]})


@pytest.mark.parametrize("form", FORMS)
def test_exported_program_can_be_trained_further(form):
    """Export keeps the trees differentiable: the gradients are those of the op."""
    model = tiny_model(FastBertModel, num_hidden_layers=1, **FORMS[form])
    inputs = random_batch(3, 7)
    gradients = []
    for run in (model, exported(model, with_mask=True).module()):
        run.zero_grad()
        run(**inputs)[0].square().mean().backward()
        gradients.append([p.grad for _, p in sorted(run.named_parameters())])
    for given, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)
