"""Every shipped recipe parses, and says what its name promises."""

from pathlib import Path

import pytest
from transformers import AutoConfig, TrainingArguments

import fastbert_hf  # noqa: F401  registers the model with the Auto classes
from fastbert_hf.cli.arguments import RecipeArgumentParser
from fastbert_hf.recipes import load_yaml
from fastbert_hf.training.glue.classifier import ModelArguments
from fastbert_hf.training.glue.finetuning import DataTrainingArguments
from fastbert_hf.training.pretraining.run import PretrainingArguments, budget_clock, step_size

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
OPTIONS = {
    "pretrain": (PretrainingArguments, TrainingArguments),
    "glue": (ModelArguments, DataTrainingArguments, TrainingArguments),
}


def named(path):
    return str(path.relative_to(ROOT / "configs"))


def in_group(group):
    return [path for path in FILES if path.parent.name == group]


def parse(path, output_dir):
    return RecipeArgumentParser(OPTIONS[path.parent.name]).parse(
        ["--config", str(path), "--output_dir", str(output_dir)]
    )


@pytest.mark.parametrize("path", FILES, ids=named)
def test_every_recipe_has_a_known_place_and_a_comment_per_key(path):
    assert path.parent.name in ("model", *OPTIONS)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    keys = [line for line in lines if line and not line.startswith("#")]
    assert keys and all("  #" in line or " # " in line for line in keys)


@pytest.mark.parametrize("path", in_group("model"), ids=named)
def test_model_recipes_hold_known_fields_only(path):
    recipe = load_yaml(path)
    config = AutoConfig.for_model("fastbert", **recipe)
    defaults = AutoConfig.for_model("fastbert").to_dict()
    assert set(recipe) <= set(defaults)
    for name, value in recipe.items():
        assert getattr(config, name) == value
    shape = path.stem.rsplit("-", 1)[1]
    if "dense" in path.stem:
        assert config.ffn_type == "dense" and config.intermediate_size == int(shape)
    elif "leaf" in path.stem:
        leaves, width = map(int, shape.split("x"))
        assert (config.ffn_type, config.fff_trees, config.fff_leaf_width) == ("fff", 1, width)
        assert config.neurons_per_layer == leaves * width
    else:
        trees, depth = map(int, shape.split("x"))
        assert (config.ffn_type, config.fff_trees, config.fff_depth) == ("fff", trees, depth)
        assert config.neurons_per_token == trees * (depth + 1)


@pytest.mark.parametrize("path", in_group("pretrain"), ids=named)
def test_pretraining_recipes_name_an_existing_model(path, tmp_path):
    options, args = parse(path, tmp_path)
    config = AutoConfig.for_model("fastbert", **load_yaml(options.model_config))
    assert config.max_position_embeddings >= options.max_seq_length
    clock = budget_clock(options, args, epoch_steps=1)
    assert clock.amount > 1 or clock.unit != "max_steps"  # not one epoch for want of a budget
    assert step_size(options, args) >= args.per_device_train_batch_size
    assert args.max_grad_norm == 0.5


@pytest.mark.parametrize("path", in_group("glue"), ids=named)
def test_fine_tuning_recipes_train_and_evaluate(path, tmp_path):
    _, data, args = parse(path, tmp_path)
    assert args.do_train and args.do_eval and data.max_seq_length <= 128


def test_the_paper_protocol_is_the_published_one(tmp_path):
    _, data, args = parse(ROOT / "configs" / "glue" / "paper.yaml", tmp_path)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (4e-5, 0.9, 0.98, 1e-6)
    assert (args.weight_decay, args.max_grad_norm, args.per_device_train_batch_size) == (0.0, 0.0, 16)
    assert (args.num_train_epochs, args.warmup_steps, data.max_seq_length) == (5, 0.1, 128)
    assert args.lr_scheduler_type == "cosine" and args.optim == "adamw_torch"


def test_the_published_geometry_is_the_default_one():
    recipe = load_yaml(ROOT / "configs" / "model" / "ultrafastbert-1x11.yaml")
    assert AutoConfig.for_model("fastbert", **recipe).to_dict() == AutoConfig.for_model("fastbert").to_dict()
