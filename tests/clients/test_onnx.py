"""torch.onnx.export(dynamo=True): onnxruntime gives torch's numbers in a process without this package."""

import pytest
import torch
from torch.export import Dim

from fastbert_hf import FastBertForMaskedLM, FastBertForSequenceClassification, FastBertModel, LeafFeedForward
from tests.clients.helpers import random_batch, run_without_package, tiny_model

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SHAPES = ((1, 1), (5, 32), (2, 9), (1, 9), (7, 1))

RUN_FILES = """
import pathlib
import numpy, onnxruntime

for path in sorted(pathlib.Path.cwd().glob("*.onnx")):
    session = onnxruntime.InferenceSession(path)
    cases = numpy.load(path.with_suffix(".npz"))
    names = [value.name for value in session.get_inputs()]
    for index in range(int(cases["count"])):
        (output,) = session.run(None, {name: cases[f"{name}-{index}"] for name in names})
        numpy.testing.assert_allclose(output, cases[f"output-{index}"], rtol=1e-5, atol=1e-5)
        print(path.stem, *output.shape)
assert "torch" not in sys.modules
"""


def export_onnx(model: torch.nn.Module, with_mask: bool, path) -> torch.onnx.ONNXProgram:
    inputs = random_batch(3, 7)
    if not with_mask:
        inputs.pop("attention_mask")
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=1, max=model.config.max_position_embeddings)
    shapes = {name: {0: batch, 1: length} for name in inputs}
    program = torch.onnx.export(
        model, (), kwargs=inputs, dynamic_shapes=shapes, dynamo=True, output_names=["output"], verbose=False
    )
    program.save(path)
    return program


def padded_inputs(batch: int, length: int, with_mask: bool) -> dict[str, torch.Tensor]:
    """Rows padded right and left, and (from three rows) one in which nothing is visible."""
    inputs = random_batch(batch, length)
    if not with_mask:
        inputs.pop("attention_mask")
    elif batch > 2:
        inputs["attention_mask"][-1] = 0
    return inputs


@pytest.mark.filterwarnings("ignore:# The axis name")
@pytest.mark.parametrize(("depth", "trees"), [(0, 2), (6, 1)], ids=str)
@torch.no_grad()
def test_leaf_trees_hold_their_weights_once_and_run_with_leaves_that_no_row_takes(tmp_path, depth, trees):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layer = LeafFeedForward(16, 16, depth, 8, trees, initializer_range=0.3).eval()
    path, rows = tmp_path / "layer.onnx", Dim("rows", min=1, max=512)
    torch.onnx.export(
        layer, (torch.randn(5, 16),), dynamic_shapes=({0: rows},), dynamo=True, input_names=["x"], verbose=False
    ).save(path)
    held = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(path).graph.initializer)
    assert held <= 1.05 * sum(parameter.nbytes for parameter in layer.parameters())
    session = onnxruntime.InferenceSession(path)
    for num_rows in (1, 3, 400):
        x = torch.randn(num_rows, 16)
        (y,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:# The axis name")
@torch.no_grad()
def test_onnx_files_run_without_the_package_at_every_shape(tmp_path):
    numpy = pytest.importorskip("numpy")
    models = {
        "classifier-mask": tiny_model(
            FastBertForSequenceClassification, classifier_pooling="mean", num_hidden_layers=1
        ),
        "leaf_trees-mask": tiny_model(FastBertModel, num_hidden_layers=1, fff_leaf_width=5),
        "encoder-nomask": tiny_model(FastBertModel, num_hidden_layers=1),
        "masked_lm-mask": tiny_model(
            FastBertForMaskedLM, norm_scheme="post", use_bias=True, type_vocab_size=2, num_hidden_layers=1
        ),
    }
    for stem, model in models.items():
        with_mask = stem.endswith("-mask")
        program = export_onnx(model, with_mask, tmp_path / f"{stem}.onnx")
        assert {node.domain for node in program.model.graph} == {""}, "only standard operators"
        arrays = {"count": len(SHAPES)}
        for index, shape in enumerate(SHAPES):
            inputs = padded_inputs(*shape, with_mask)
            arrays |= {f"{name}-{index}": tensor.numpy() for name, tensor in inputs.items()}
            arrays[f"output-{index}"] = model(**inputs)[0].numpy()
        numpy.savez(tmp_path / f"{stem}.npz", **arrays)
    printed = run_without_package(RUN_FILES, cwd=tmp_path)
    assert len(printed.splitlines()) == len(models) * len(SHAPES)
