"""Balance of leaves while training: thresholds follow medians, on every process alike, and across a resume."""

import json
import multiprocessing
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification, FastFeedForward, LeafFeedForward
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.recipes import load_yaml
from fastbert_hf.training.leaf_balance import (
    BalanceLeaves,
    add_balance,
    balance_leaves,
    leaf_layers,
    router_counts,
    start_counting,
    stop_counting,
)
from fastbert_hf.training.pretraining.model import model_config
from fastbert_hf.training.pretraining.run import pretrain
from tests.processes import CHILD_SECONDS
from tests.training.conftest import TINY_MODEL
from tests.training.pretraining.test_processes import command, finish, pretrain_here
from tests.training.runs import arguments, losses, run_all


def rows(count=2000, seed=0):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) + 3


def leaf_fractions(layer, x):
    leaves = layer.route(x)[0]
    return [torch.bincount(leaves[:, tree], minlength=2**layer.depth) / len(x) for tree in range(layer.trees)]


def test_rows_of_routers_are_counted_from_those_of_leaves():
    reached, right = router_counts(torch.tensor([[1, 2, 3, 4], [0, 0, 0, 9]]))
    assert reached.tolist() == [[10, 3, 7], [9, 0, 9]] and right.tolist() == [[7, 2, 4], [9, 0, 9]]
    assert [part.shape for part in router_counts(torch.tensor([[5], [5]]))] == [(2, 0), (2, 0)]


def test_the_step_is_the_excess_to_the_right_weighted_by_rows():
    layer = LeafFeedForward(8, 8, depth=2, leaf_width=1)
    before = layer.threshold.clone()
    layer.leaf_counts = torch.tensor([[16, 48, 0, 0]])
    balance_leaves(layer, 2.0)
    steps = (layer.threshold - before).tolist()
    assert steps == pytest.approx([2.0 * -0.5 * 64 / 128, 2.0 * 0.25 * 64 / 128, 0.0])
    assert layer.leaf_counts.tolist() == [[0, 0, 0, 0]]


def test_thresholds_find_the_medians_of_what_reaches_them():
    torch.manual_seed(0)
    layer = LeafFeedForward(8, 8, depth=4, leaf_width=2, trees=2).train()
    before = leaf_fractions(layer, rows(seed=1))
    start_counting(layer)
    with torch.no_grad():
        for step in range(120):
            layer(rows(1000, seed=10 + step))
            balance_leaves(layer, 3.0)
    after = leaf_fractions(layer, rows(20000, seed=2))
    for tree in range(2):
        assert before[tree].max() > 0.25  # rows have a mean that random routers do not know
        assert after[tree].min() > 0.6 / 16 and after[tree].max() < 1.4 / 16
    stop_counting(layer)
    balance_leaves(layer, 3.0)
    assert layer.leaf_counts is None


def test_only_training_is_counted_and_frozen_thresholds_stay():
    layer = LeafFeedForward(8, 8, depth=2, leaf_width=1)
    start_counting(layer)
    layer.eval()(rows(10))
    assert layer.leaf_counts.sum() == 0
    layer.threshold.requires_grad_(False)
    layer.train()(rows(10))
    assert layer.leaf_counts.sum() == 10
    before = layer.threshold.clone()
    balance_leaves(layer, 1.0)
    assert torch.equal(layer.threshold, before) and layer.leaf_counts.sum() == 0


def test_biases_of_the_published_form_follow_medians_too():
    torch.manual_seed(0)
    layer = FastFeedForward(8, 8, depth=3, trees=2).train()

    def fractions(x):
        leaves = layer.route(x)[:, :, -1] - 7  # of 15 nodes the last 8
        return [torch.bincount(leaves[:, tree], minlength=8) / len(x) for tree in range(2)]

    start_counting(layer)
    x = rows(100)
    expected = [(fraction * 100).round().long().tolist() for fraction in fractions(x)]
    y = layer(x)
    assert layer.leaf_counts.tolist() == expected and torch.equal(y, layer.eval()(x))
    before = [fraction.max() for fraction in fractions(rows(seed=1))]
    start = layer.bias_in.detach().clone()
    with torch.no_grad():
        for step in range(400):
            layer.train()(rows(1000, seed=10 + step))
            balance_leaves(layer, 0.02)  # its logits have a standard deviation of 0.06
    for tree, after in enumerate(fractions(rows(20000, seed=2))):
        assert before[tree] > 0.4 and after.min() > 0.5 / 8 and after.max() < 1.6 / 8
    moved = (layer.bias_in.detach() != start).view(2, 15)
    assert moved[:, :7].all() and not moved[:, 7:].any()  # nodes of the last level decide nothing


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_a_bad_rate_is_named(rate):
    with pytest.raises(ValueError, match=f"0 or above; got {rate}"):
        balance_leaves(LeafFeedForward(8, 8, 2, 1), rate)
    with pytest.raises(ValueError, match=f"0 or above; got {rate}"):
        BalanceLeaves(rate)


@pytest.mark.parametrize(
    ("layer", "name", "count"),
    [(LeafFeedForward(8, 8, 2, 1), "threshold", 3), (FastFeedForward(8, 8, 2), "bias_in", 7)],
)
def test_sharded_thresholds_are_refused(layer, name, count):
    start_counting(layer)
    setattr(layer, name, torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=f"{count} thresholds has \\(1,\\) in this process"):
        balance_leaves(layer, 1.0)


# ---- under the Trainer


def classifier(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    config = {**sizes, "fff_depth": 2, "fff_leaf_width": 3, "max_position_embeddings": 16, "num_labels": 2, **changes}
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob", "embedding_dropout_prob", "classifier_dropout")
    return FastBertForSequenceClassification(FastBertConfig(**config, **dict.fromkeys(dropouts, 0.0)))


def examples(count=32):
    ids = torch.randint(1, 40, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in ids]


def trainer(model, folder, rate, **changes):
    options = {
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    made = Trainer(model, TrainingArguments(str(folder), **{**options, **changes}), train_dataset=examples())
    add_balance(made, rate)
    return made


def thresholds(model):
    return torch.cat([layer.threshold.detach() for layer in leaf_layers(model)])


def test_microbatches_of_one_step_are_counted_together(tmp_path):
    results = []
    for accumulation in (1, 4):
        model = classifier()
        size = 8 // accumulation
        run = trainer(
            model,
            tmp_path,
            5.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",  # AdamW turns the rounding of a sum into steps of full size
            learning_rate=1e-3,
        )
        run.train()
        results.append(thresholds(model))
        assert all(layer.leaf_counts is None for layer in leaf_layers(model))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    unbalanced = classifier()
    trainer(unbalanced, tmp_path, 0.0, optim="sgd", learning_rate=1e-3).train()
    assert (thresholds(unbalanced) - results[0]).abs().max() > 0.05


def test_a_step_that_was_not_taken_moves_nothing(tmp_path):
    model = classifier()
    callback = BalanceLeaves(5.0)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    callback.on_train_begin(args, None, None, model=model)
    model.train()(**{name: torch.stack([row[name] for row in examples()]) for name in examples(1)[0]}).loss.backward()
    before = thresholds(model)
    leaf_layers(model)[1].threshold.grad[0] = torch.nan
    callback.on_optimizer_step(args, None, None, model=model)
    assert torch.equal(thresholds(model), before)
    assert all(layer.leaf_counts.sum() == 0 for layer in leaf_layers(model))
    leaf_layers(model)[1].threshold.grad[0] = 0.0
    model.train()(input_ids=torch.stack([row["input_ids"] for row in examples()]))
    callback.on_optimizer_step(args, None, None, model=model)
    assert not torch.equal(thresholds(model), before)


@pytest.mark.parametrize(
    "fields", [{"ffn_type": "dense", "fff_leaf_width": None}, {"fff_leaf_width": None, "fff_bias": False}]
)
def test_a_model_without_thresholds_is_refused(tmp_path, fields):
    with pytest.raises(ValueError, match="balance_leaves is 0\\.1 and the model has no trees"):
        trainer(classifier(**fields), tmp_path, 0.1)
    trainer(classifier(**fields), tmp_path, 0.0)


# ---- under pretraining


@pytest.fixture(scope="module")
def leafy(tiny, tmp_path_factory):
    """The tiny folder with a recipe of leaf trees."""
    folder = tmp_path_factory.mktemp("leafy") / "tiny"
    shutil.copytree(tiny, folder)
    (folder / "model.yaml").write_text(TINY_MODEL + "fff_leaf_width: 4\n", encoding="utf-8")
    return folder


def test_a_balanced_run_resumes_bit_for_bit_and_reports_its_leaves(leafy, tmp_path):
    changes = {"balance_leaves": 1.0, "max_steps": 8, "save_steps": 4, "logging_steps": 1}
    pretrain(*arguments(leafy, tmp_path / "whole", **changes))
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    _, summary = pretrain(*arguments(leafy, tmp_path / "again", **changes))
    assert summary["resumed_from"].endswith("checkpoint-4") and isinstance(summary["dead_leaves"], list)
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "again")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    pretrain(*arguments(leafy, tmp_path / "plain", **{**changes, "balance_leaves": 0.0}))
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    name = next(name for name in plain if name.endswith("threshold"))
    assert not torch.equal(plain[name], whole[name])
    usage = json.loads((tmp_path / "whole" / "tree_usage.json").read_text())
    assert [len(layer["leaf_fractions"][0]) for layer in usage] == [4, 4]
    assert (tmp_path / "whole" / "tree_usage.png").stat().st_size > 0
    assert json.loads((tmp_path / "whole" / "recipe.json").read_text())["balance_leaves"] == 1.0


def test_pretraining_names_a_bad_rate_and_a_model_without_leaves(leafy, tiny, tmp_path):
    with pytest.raises(ValueError, match="0 or above; got -1"):
        pretrain(*arguments(leafy, tmp_path / "out", balance_leaves=-1.0))
    dense = tmp_path / "dense.yaml"
    dense.write_text(TINY_MODEL + "ffn_type: dense\n")
    with pytest.raises(ValueError, match="no trees"):
        pretrain(*arguments(tiny, tmp_path / "out", balance_leaves=0.1, model_config=str(dense)))
    assert not (tmp_path / "out").exists()


def test_fine_tuning_balances_and_counts_it_as_a_setting(leafy, glue_dir, tmp_path):
    tokenizer = load_tokenizer(leafy / "tokenizer")
    config = model_config({**load_yaml(leafy / "model.yaml"), "classifier_pooling": "mean"}, tokenizer, 32)
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    results = {}
    for rate in (0.0, 5.0):
        run_all([tmp_path / "model"], glue_dir, tmp_path / str(rate), balance_leaves=rate, num_train_epochs=1)
        results[rate] = load_file(next((tmp_path / str(rate)).rglob("model.safetensors")))
    name = next(name for name in results[0.0] if name.endswith("threshold"))
    assert (results[0.0][name] - results[5.0][name]).abs().max() > 0.1
    with pytest.raises(ValueError, match="balance_leaves"):
        run_all([tmp_path / "model"], glue_dir, tmp_path / "5.0", balance_leaves=1.0, num_train_epochs=1)
    with pytest.raises(ValueError, match="balance_leaves needs --do_train"):
        run_all([tmp_path / "model"], glue_dir, tmp_path / "out", balance_leaves=1.0, do_train=False)


def balanced(rank, processes):
    """Thresholds after five steps in which this process has its share of the rows."""
    torch.manual_seed(0)
    sizes = ((3, 2), (0, 1), (2, 1))
    layers = torch.nn.ModuleList([LeafFeedForward(8, 8, depth, 2, trees) for depth, trees in sizes]).train()
    start_counting(layers)
    for step in range(5):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step)) + 2
        for layer in layers:
            layer(x[rank::processes])
        balance_leaves(layers, 3.0)
    return thresholds(layers)


def balanced_with_another_process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(balanced(rank, 2), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)


@needs_gloo
@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_two_processes_move_thresholds_like_one_that_has_all_rows(tmp_path):
    start = multiprocessing.get_context("fork").Process  # which have imported everything already
    processes = [start(target=balanced_with_another_process, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(CHILD_SECONDS)
    assert [process.exitcode for process in processes] == [0, 0]
    alone = balanced(0, 1)
    assert all(torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone) for rank in (0, 1))
    assert not torch.equal(balanced(0, 2), alone)  # half of the rows alone give other thresholds


@pytest.mark.slow
@needs_gloo
def test_two_processes_pretrain_with_the_thresholds_of_one(leafy, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    changes = ["--batch_ramp=0", "--balance_leaves=0.5", f"--budget_tokens={12 * 8 * 16}", "--learning_rate=1e-3"]
    pretrain_here(leafy, tmp_path / "one", *changes)
    finish([*launch, *command(leafy, tmp_path / "two", 4, *changes)])
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    # every step is two microbatches, in one process or two: a sum of two gradients has no order, its mean is exact
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
