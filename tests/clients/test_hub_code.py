"""Saved models carry their code: a process without the package loads any folder as every Auto class."""

import ast
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

import fastbert_hf
from fastbert_hf import (
    FastBertConfig,
    FastBertForMaskedLM,
    FastBertForMultipleChoice,
    FastBertForQuestionAnswering,
    FastBertForSequenceClassification,
    FastBertForTokenClassification,
    FastBertModel,
    use_backend,
)
from tests.clients.helpers import random_batch, run_python, run_without_package, tiny_model
from tests.test_structure import BUNDLE as BUNDLE_MODULES

MODEL_CLASSES = {
    "AutoModel": FastBertModel,
    "AutoModelForMaskedLM": FastBertForMaskedLM,
    "AutoModelForSequenceClassification": FastBertForSequenceClassification,
    "AutoModelForTokenClassification": FastBertForTokenClassification,
    "AutoModelForQuestionAnswering": FastBertForQuestionAnswering,
    "AutoModelForMultipleChoice": FastBertForMultipleChoice,
}
BUNDLE = {f"{name}.py" for name in BUNDLE_MODULES}
AUTO_MAP = {
    "AutoConfig": "configuration_fastbert.FastBertConfig",
    **{auto: f"modeling_fastbert.{model_class.__name__}" for auto, model_class in MODEL_CLASSES.items()},
}
PACKAGE = Path(fastbert_hf.__file__).parent
LEAF_TREES = {"fff_leaf_width": 5}


def batch_for(auto_class: str) -> dict[str, torch.Tensor]:
    inputs = random_batch(4, 9)
    if auto_class == "AutoModelForMultipleChoice":
        return {name: tensor.unflatten(0, (2, 2)) for name, tensor in inputs.items()}  # (B, choices, T)
    return inputs


@torch.no_grad()
def save_with_outputs(folder: Path, auto_class: str, **form) -> None:
    """A model folder with what the model computes from `batch_for`: its own output and the last hidden state.

    The reference backend computes them: it is the one that travels with the code.
    """
    model = tiny_model(MODEL_CLASSES[auto_class], num_labels=3, **form)
    model.save_pretrained(folder)
    outputs = {"inputs": batch_for(auto_class), "encoder_inputs": random_batch(4, 9)}
    with use_backend("reference"):
        outputs["own"] = model(**outputs["inputs"])[0]
        outputs["hidden"] = getattr(model, "fastbert", model)(**outputs["encoder_inputs"]).last_hidden_state
    torch.save(outputs, folder / "outputs.pt")


@pytest.mark.parametrize("auto_class", MODEL_CLASSES)
def test_saving_writes_the_flat_bundle_and_the_full_auto_map(auto_class, tmp_path):
    tiny_model(MODEL_CLASSES[auto_class]).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.rglob("*.py")} == BUNDLE
    assert all((tmp_path / name).read_bytes() == (PACKAGE / name).read_bytes() for name in BUNDLE)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == [MODEL_CLASSES[auto_class].__name__]


def test_saving_a_configuration_alone_names_every_class(tmp_path):
    FastBertConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def aligned(model):
    """The model with each parameter in fresh memory.

    Products of torch round as their weights lie in memory, and weights from a file lie as they do in the file.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


ALIGNED = inspect.getsource(aligned)  # for the scripts below

LOAD_EVERYWHERE = """
import pathlib
import torch, transformers
from torch._library.custom_ops import OPDEFS

registered = set()
for folder in sorted(path for path in pathlib.Path.cwd().iterdir() if path.name.startswith("AutoModel")):
    saved = torch.load(folder / "outputs.pt")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == "FastBertConfig" and config.num_labels == 3
    for auto_class in sys.argv[1:]:
        same_head = auto_class == folder.name  # classifiers of several classes and of one choice differ in shape
        load = getattr(transformers, auto_class).from_pretrained
        model = aligned(load(folder, trust_remote_code=True, ignore_mismatched_sizes=not same_head)).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        with torch.no_grad():
            encoder = getattr(model, "fastbert", model)
            hidden = encoder(**saved["encoder_inputs"]).last_hidden_state
            assert torch.equal(hidden, saved["hidden"]), (folder.name, auto_class)
            if same_head:
                assert torch.equal(model(**saved["inputs"])[0], saved["own"]), (folder.name, auto_class)
                model.save_pretrained("resaved-" + auto_class)
                torch.save(saved, f"resaved-{auto_class}/outputs.pt")
        print(folder.name, auto_class)
        registered |= {OPDEFS[f"fastbert::{op}_v1"]._init_fn.__module__ for op in ("fff", "leaf_trees")}
assert len(registered) == 1  # the first copy of the code keeps both ops
assert not any(name.startswith("fastbert_hf") for name in sys.modules)
"""

TRAIN = """
inputs = saved["inputs"]
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(3):
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
"""


@pytest.mark.slow
@torch.no_grad()
def test_without_the_package_every_folder_loads_as_every_auto_class_and_saves_again(tmp_path):
    """Folders of both forms of tree, one after the other."""
    for number, auto_class in enumerate(MODEL_CLASSES):
        save_with_outputs(tmp_path / auto_class, auto_class, **(LEAF_TREES if number % 2 else {}))
    printed = run_without_package(ALIGNED + LOAD_EVERYWHERE, *MODEL_CLASSES, cwd=tmp_path)
    assert len(printed.splitlines()) == len(MODEL_CLASSES) ** 2

    for auto_class, model_class in MODEL_CLASSES.items():
        folder = tmp_path / f"resaved-{auto_class}"
        assert {path.name for path in folder.glob("*.py")} == BUNDLE
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        model = getattr(transformers, auto_class).from_pretrained(folder)
        assert type(model) is model_class
        saved = torch.load(folder / "outputs.pt")
        with use_backend("reference"):
            assert torch.equal(aligned(model).eval()(**saved["inputs"])[0], saved["own"])


@pytest.mark.slow
def test_a_folder_saved_without_the_package_loads_without_it_and_trains(tmp_path):
    save_with_outputs(tmp_path / "AutoModelForMaskedLM", "AutoModelForMaskedLM", **LEAF_TREES)
    run_without_package(ALIGNED + LOAD_EVERYWHERE, "AutoModelForMaskedLM", cwd=tmp_path)
    second = tmp_path / "second"
    second.mkdir()
    (tmp_path / "resaved-AutoModelForMaskedLM").rename(second / "AutoModelForMaskedLM")
    run_without_package(ALIGNED + LOAD_EVERYWHERE + TRAIN, "AutoModelForMaskedLM", cwd=second)


def test_with_the_package_the_local_classes_load_without_trust(tmp_path):
    for auto_class, model_class in MODEL_CLASSES.items():
        save_with_outputs(tmp_path / auto_class, auto_class, **LEAF_TREES)
        model = getattr(transformers, auto_class).from_pretrained(tmp_path / auto_class)
        assert type(model) is model_class
    assert not any("transformers_modules" in name and "fastbert" in name for name in sys.modules)


TWO_COPIES = """
import sys
import torch

def load_copy():
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    return get_class_from_dynamic_module("modeling_fastbert.FastBertForMaskedLM", "model").from_pretrained("model")

def load_package():
    import fastbert_hf
    return fastbert_hf.FastBertForMaskedLM.from_pretrained("model")

if sys.argv[1] == "bundle":
    copy, package = load_copy(), load_package()
else:
    package, copy = load_package(), load_copy()
assert type(copy).__module__.startswith("transformers_modules."), type(copy)
assert type(package).__module__ == "fastbert_hf.modeling_fastbert"

saved = torch.load("model/outputs.pt")
results = []
for model in (copy, package, copy):
    aligned(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**saved["inputs"])[0], saved["own"], rtol=1e-5, atol=1e-5)
    model.zero_grad()
    labels = saved["inputs"]["input_ids"]
    model(**saved["inputs"], labels=labels).loss.backward()
    results.append({name: parameter.grad for name, parameter in model.named_parameters()})
for other in results[1:]:
    assert other.keys() == results[0].keys()
    for name, gradient in results[0].items():
        assert torch.equal(other[name], gradient), name

import fastbert_hf
with fastbert_hf.use_backend("reference"), torch.no_grad():  # one choice holds for both copies
    for model in (copy, package):
        assert torch.equal(model(**saved["inputs"])[0], saved["own"])
from torch._library.custom_ops import OPDEFS  # the definition that holds
for op in ("fff", "leaf_trees"):
    assert OPDEFS[f"fastbert::{op}_v1"]._init_fn.__module__ == "fastbert_hf.dispatch_fastbert"
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("first", "form"), [("bundle", {}), ("package", {}), ("bundle", LEAF_TREES)], ids=str)
def test_the_bundle_and_the_package_compute_and_train_alike_in_one_process(first, form, tmp_path):
    save_with_outputs(tmp_path / "model", "AutoModelForMaskedLM", **form)
    assert run_python(ALIGNED + TWO_COPIES, first, cwd=tmp_path).split() == ["equal"]


def imports_outside_try(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    blocks = [block for guard in ast.walk(tree) if isinstance(guard, ast.Try) for block in guard.body]
    guarded = {node for block in blocks for node in ast.walk(block)}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return [node for node in imports if node not in guarded]


@pytest.mark.parametrize("name", sorted(BUNDLE))
def test_bundle_files_import_siblings_by_name_and_nothing_but_torch_and_transformers(name):
    tree = ast.parse((PACKAGE / name).read_text())
    for node in imports_outside_try(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module, f"line {node.lineno}: only `from .sibling import Name` travels"
            assert f"{node.module}.py" in BUNDLE
        else:
            roots = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            allowed = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
            assert {root.partition(".")[0] for root in roots} <= allowed, f"line {node.lineno}"


@pytest.mark.parametrize("name", sorted(BUNDLE))
def test_bundle_files_hold_no_text_that_transformers_takes_for_an_import(name):
    """Transformers finds relative imports by pattern, docstrings included."""
    from transformers.dynamic_module_utils import get_relative_imports

    tree = ast.parse((PACKAGE / name).read_text())
    real = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert set(get_relative_imports(PACKAGE / name)) == real
