"""The GLUE script as people use it: published checkpoints, the Hub's data, several processes, compiled, bfloat16."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from fastbert_hf.cli.arguments import RecipeArgumentParser
from fastbert_hf.training.glue.classifier import ModelArguments
from fastbert_hf.training.glue.options import DataTrainingArguments
from tests.processes import CHILD_SECONDS
from tests.training.conftest import write_split

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "scripts"))
import run_glue  # noqa: E402


def arguments(pretrained, glue_dir, output_dir, *more):
    options = {
        "model_name_or_path": pretrained,
        "glue_dir": glue_dir,
        "task_name": "sst2",
        "output_dir": output_dir,
        "max_seq_length": 24,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "do_train": True,
        "do_eval": True,
    }
    return [token for name, value in options.items() for token in (f"--{name}", str(value))] + list(map(str, more))


def test_the_published_layout_is_fine_tuned_and_saved_in_our_own(glue_dir, tiny, tmp_path):
    """A head with two outputs and no names of its own serves a task with two labels."""
    published = ROOT / "tests" / "fixtures" / "mlm-1x3"
    words = (tiny / "tokenizer" / "tokenizer.json").read_text()
    config = json.loads((published / "config.json").read_text())
    entries = len(json.loads(words)["model"]["vocab"])
    assert entries <= config["arch"]["embedding"]["vocab_size"]
    more = ["--tokenizer_name", tiny / "tokenizer", "--max_seq_length", 8]
    (summary,) = run_glue.main(arguments(published, glue_dir, tmp_path / "out", *more))
    assert summary["steps"] == 4
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["model_type"] == "fastbert" and saved["id2label"] == {"0": "negative", "1": "positive"}
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_without_a_folder_the_tasks_come_from_the_hub(pretrained, glue_dir, tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names):
        asked.append(names)
        files = {split: str(glue_dir / "sst2" / f"{split}.jsonl") for split in ("train", "validation")}
        parts = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(tmp_path / "cache"))
        parts.download_and_prepare()
        return parts.as_dataset()

    tokens = arguments(pretrained, "", tmp_path / "out")
    tokens = [token for token in tokens if token not in ("--glue_dir", "")]
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (summary,) = run_glue.main(tokens)
    assert asked == [("nyu-mll/glue", "sst2")] and summary["train_examples"] == 120


@pytest.mark.parametrize(
    "more",
    [["--bf16", "True"], ["--torch_compile", "True", "--torch_compile_backend", "aot_eager"]],
    ids=["bf16", "compiled"],
)
def test_other_ways_to_train_reach_the_same_place(pretrained, glue_dir, tmp_path, more):
    (plain,) = run_glue.main(arguments(pretrained, glue_dir, tmp_path / "plain"))
    (other,) = run_glue.main(arguments(pretrained, glue_dir, tmp_path / "other", *more))
    assert abs(plain["train_loss"] - other["train_loss"]) < 0.02


def test_recipes_name_several_tasks_and_seeds(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task_name: [rte, mrpc]\nseeds: [3, 4]\nmodel_name_or_path: [a, b]\nmodel_names: [x, y]\n")
    kinds = (ModelArguments, DataTrainingArguments)
    model, data = RecipeArgumentParser(kinds).parse(["--config", str(recipe)])
    assert (data.task_name, data.seeds) == (["rte", "mrpc"], [3, 4])
    assert (model.model_name_or_path, model.model_names) == (["a", "b"], ["x", "y"])
    _, data = RecipeArgumentParser(kinds).parse(["--config", str(recipe), "--task_name", "all", "--seeds", "5"])
    assert (data.task_name, data.seeds) == (["all"], [5])


@pytest.mark.slow
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)
def test_two_processes_train_as_one_with_the_same_global_batch(pretrained, glue_dir, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(pretrained)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        setattr(model.config, name, 0.0)
    model.save_pretrained(tmp_path / "calm")
    AutoTokenizer.from_pretrained(pretrained).save_pretrained(tmp_path / "calm")
    more = ["--seeds", 0, 1, "--logging_steps", 1, "--per_device_train_batch_size"]
    one = run_glue.main(arguments(tmp_path / "calm", glue_dir, tmp_path / "one", *more, 8))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [
            *launch,
            ROOT / "scripts" / "run_glue.py",
            *arguments(tmp_path / "calm", glue_dir, tmp_path / "two", *more, 4),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
    )
    assert process.returncode == 0, process.stderr[-6000:]
    assert process.stdout.count("[2/2] calm, sst2, seed 1") == 1
    for seed in (0, 1):
        folder = tmp_path / "two" / "calm" / "sst2" / f"seed-{seed}"
        two = json.loads((folder / "summary.json").read_text())
        assert two["accuracy"] == one[seed]["accuracy"] and abs(two["train_loss"] - one[seed]["train_loss"]) < 1e-4
        weights = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        wanted = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "one" / "calm" / "sst2" / f"seed-{seed}"
        ).state_dict()
        for name, value in weights.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-4)


def test_files_of_ones_own_with_a_test_file(pretrained, tmp_path):
    rows = [{"text": "grass and stone", "label": "plants"}, {"text": "stone", "label": "minerals"}] * 4
    write_split(tmp_path / "train.jsonl", rows)
    write_split(tmp_path / "new.jsonl", [{"text": "grass"}, {"text": "stone"}])
    tokens = [token for token in arguments(pretrained, "X", tmp_path / "out") if token not in ("--glue_dir", "X")]
    tokens = [token for token in tokens if token not in ("--task_name", "sst2")]
    files = ["--train_file", tmp_path / "train.jsonl", "--validation_file", tmp_path / "train.jsonl"]
    run_glue.main([*tokens, *map(str, files), "--do_predict", "True", "--test_file", str(tmp_path / "new.jsonl")])
    lines = (tmp_path / "out" / "predictions" / "new.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and {line.split("\t")[1] for line in lines[1:]} <= {"plants", "minerals"}
