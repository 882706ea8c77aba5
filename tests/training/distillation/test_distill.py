"""Distillation from end to end: every head, sentence embedders, resumed runs, mistakes; on tiny models."""

import itertools
import json
import math
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoTokenizer

from fastbert_hf import FastBertForSequenceClassification, FastBertModel, LeafFeedForward
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.training.budget import BudgetClock
from fastbert_hf.training.distillation import lacking_rows, run, student_fit
from fastbert_hf.training.distillation.teacher import fast_dtype
from fastbert_hf.training.distillation.texts import TextBatches
from fastbert_hf.training.distillation.trainer import DistillationTrainer
from tests.clients.helpers import run_without_package
from tests.training.distillation.runs import distill, save_bert


def test_a_bert_becomes_a_faster_model_and_a_page_says_what_it_lost(tiny, bert, tmp_path):
    summary = distill(bert, tiny / "corpus.txt", tmp_path, measure_speed=True, max_steps=40)
    assert summary["eval_hidden_error"] < summary["fitted_hidden_error"] < 1
    assert len(summary["eval_hidden_error_by_layer"]) == 2 and summary["steps"] == 40
    assert [row["case"] for row in summary["speed"]] == ["1 x 16"]  # the model has 32 positions
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is FastBertModel
    assert all(isinstance(layer.ffn, LeafFeedForward) for layer in model.layers)
    assert (model.config.fff_depth, model.config.fff_leaf_width) == (2, 6)
    off = [model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob]
    assert off == [0.0, 0.0] and not [part for part in model.train().modules() if getattr(part, "p", 0.0)]
    text = ["the river flows under grass", "a stone"]
    ours, theirs = (AutoTokenizer.from_pretrained(folder)(text) for folder in (tmp_path, bert))
    assert ours["input_ids"] == theirs["input_ids"]
    page = (tmp_path / "distillation.md").read_text()
    assert f"{summary['eval_hidden_error']:.4f}" in page and "times the speed" in page and "corpus.txt" in page
    card = (tmp_path / "README.md").read_text()
    assert f"| distilled from | {bert.name}; [what was lost](distillation.md) |" in card
    assert str(bert) not in card + page and str(tiny) not in page and summary["distilled_from"] == str(bert)
    header = ModelCard(card).data
    assert (header.license, header.license_name, header.license_link) == ("other", "own", "https://example.org")
    assert (header.language, header.base_model) == ("en", "somebody/base")
    assert "| neurons of a leaf | 6 |" in card and "uses 6 of the 24 feed-forward neurons" in card


def test_progress_is_in_words(tiny, bert, tmp_path, capsys):
    distill(bert, tiny / "corpus.txt", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert sum(bool(re.match(r"layer \d of 2 fitted in \d+ s: it gives -?\d+\.\d% of", line)) for line in lines) == 2
    assert any("budget 33.3%" in line and "hidden-state error " in line for line in lines)
    assert sum("held-out hidden-state error " in line for line in lines) == 2


def test_the_embeddings_are_those_of_the_teacher(tiny, bert, tmp_path):
    distill(bert, tiny / "corpus.txt", tmp_path)
    student, teacher = AutoModel.from_pretrained(tmp_path), FastBertModel.from_pretrained(bert)
    for name, value in teacher.embeddings.state_dict().items():
        assert torch.equal(student.embeddings.state_dict()[name], value), name


def test_routers_stay_as_the_fit_left_them_unless_asked(tiny, bert, tmp_path):
    names = ("router", "threshold", "weight_in", "bias_in", "weight_out", "bias_out")
    for train_routers in (False, True):
        run = tmp_path / str(train_routers)
        distill(bert, tiny / "corpus.txt", run, train_routers=train_routers)
        fitted, trained = (AutoModel.from_pretrained(folder).layers[1].ffn for folder in (run / "fitted", run))
        moved = {name for name in names if not torch.equal(getattr(fitted, name), getattr(trained, name))}
        assert moved == set(names if train_routers else names[2:])


@pytest.mark.slow
def test_an_embedder_reads_pairs_beside_texts_where_asked(embedder, tmp_path, monkeypatch):
    rows = [{"a": f"the river {i}", "b": f"a stone {i}"} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read, batches = [], run.TextBatches
    monkeypatch.setattr(run, "TextBatches", lambda texts, *rest: read.extend(texts) or batches(texts, *rest))
    distill(embedder, tmp_path / "pairs.jsonl", tmp_path / "out", pairs=True, max_steps=2)
    assert sum(isinstance(text, tuple) for text in read) == 60 and len(read) == 180
    prompted = [text.startswith("passage: ") for text in read if isinstance(text, str)]
    assert all(prompted) or not any(prompted)


@pytest.mark.slow
def test_a_sentence_embedder_stays_one(tiny, embedder, tmp_path):
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "out"
    pairs = [
        {"sentence1": "the sea", "sentence2": f"a {word}", "score": i}
        for i, word in enumerate(["sea", "wind", "stone"])
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    summary = distill(embedder, tiny / "corpus.txt", folder, eval_file=tmp_path / "pairs.jsonl", max_steps=40)
    assert summary["eval_cosine_distance"] < summary["fitted_cosine_distance"]
    (scores,) = summary["scores"].values()
    assert set(scores) == {"teacher", "fitted", "student"} and all(-1 <= value <= 1 for value in scores.values())
    assert f"| {scores['teacher']:.4f} |" in (folder / "distillation.md").read_text()
    ours, theirs = SentenceTransformer(str(folder), device="cpu"), SentenceTransformer(str(embedder), device="cpu")
    assert ours.max_seq_length == theirs.max_seq_length == 20 and ours.prompts == theirs.prompts
    assert [type(module) for module in ours] == [type(module) for module in theirs]
    text = ["the river flows", "a stone sings over the sea " * 8]
    own = ours.encode(text, prompt_name="query")
    torch.testing.assert_close(torch.tensor(own).norm(dim=1), torch.ones(2))
    lines = (tiny / "corpus.txt").read_text().splitlines()[:100]
    cosine = (ours.encode(lines) * theirs.encode(lines)).sum(1).mean()
    assert cosine > 1 - 2 * summary["eval_cosine_distance"]
    printed = run_without_package(
        "from sentence_transformers import SentenceTransformer\n"
        "import torch\n"
        f"model = SentenceTransformer({str(folder)!r}, trust_remote_code=True, device='cpu')\n"
        f"print(model.encode({text!r}, prompt_name='query').tolist())",
        cwd=tmp_path,
    )
    torch.testing.assert_close(torch.tensor(json.loads(printed)), torch.tensor(own), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_classifier_keeps_its_labels_and_reads_pairs(tiny, tmp_path):
    names = {0: "no", 1: "yes", 2: "perhaps"}
    bert = save_bert(
        tiny,
        tmp_path / "bert",
        "ForSequenceClassification",
        id2label=names,
        label2id={v: k for k, v in names.items()},
    )
    words = (tiny / "corpus.txt").read_text().splitlines()
    rows = [
        {"premise": a, "hypothesis": b, "label": names[i % 3]} for i, (a, b) in enumerate(zip(words, words[100:]))
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "out"
    summary = distill(bert, tmp_path / "pairs.jsonl", folder, eval_file=tmp_path / "pairs.jsonl", max_steps=40)
    assert summary["eval_divergence"] < summary["fitted_divergence"]
    (scores,) = summary["scores"].values()
    model = FastBertForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == names
    found = transformers.pipeline("text-classification", model=str(folder))("the river")
    assert found[0]["label"] in names.values()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        [r["premise"] for r in rows],
        [r["hypothesis"] for r in rows],
        truncation=True,
        max_length=32,
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        right = [names[i] for i in model(**batch).logits.argmax(-1).tolist()]
    share = sum(a == r["label"] for a, r in zip(right, rows)) / len(rows)
    assert scores["student"] == pytest.approx(share)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering"])
def test_every_head_learns_from_its_teachers_outputs(tiny, head, tmp_path):
    changes = {"num_labels": 4} if head == "ForTokenClassification" else {}
    bert = save_bert(tiny, tmp_path / "bert", head, **changes)
    summary = distill(bert, tiny / "corpus.txt", tmp_path / "out", max_steps=40)
    assert 0 < summary["eval_divergence"] < summary["fitted_divergence"]
    loaded = getattr(transformers, f"AutoModel{head}").from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == f"FastBert{head}"


def test_a_compiled_model_learns_the_same(tiny, tmp_path):
    bert = save_bert(tiny, tmp_path / "bert", "ForMaskedLM")
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    plain, compiled = (
        distill(bert, tiny / "corpus.txt", tmp_path / name, max_steps=2, **changes)
        for name, changes in (("plain", {}), ("compiled", options))
    )
    assert compiled["eval_divergence"] == pytest.approx(plain["eval_divergence"], rel=1e-4)


@pytest.mark.parametrize(("form", "expected"), [
    ("dense:8", {"ffn_type": "dense", "intermediate_size": 8}),
    ("tree:2x2", {"ffn_type": "fff", "fff_trees": 2, "fff_depth": 2, "fff_leaf_width": None}),
    ("leaf:2x2x3", {"ffn_type": "fff", "fff_trees": 2, "fff_depth": 2, "fff_leaf_width": 3}),
    ("layers:1", {"ffn_type": "dense", "intermediate_size": 48, "num_hidden_layers": 1}),
])  # fmt: skip
def test_controls_are_distilled_by_the_same_command(tiny, bert, form, expected, tmp_path):
    summary = distill(bert, tiny / "corpus.txt", tmp_path, form=form)
    assert summary["eval_hidden_error"] < summary["fitted_hidden_error"]
    config = AutoModel.from_pretrained(tmp_path).config
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_teacher_in_bfloat16_teaches_nearly_the_same(tiny, bert, tmp_path):
    exact, reduced = (
        distill(bert, tiny / "corpus.txt", tmp_path / dtype, teacher_dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    assert reduced["fitted_hidden_error"] == exact["fitted_hidden_error"]  # measured in float32 either way
    assert 0 < abs(reduced["eval_hidden_error"] / exact["eval_hidden_error"] - 1) < 0.02


def test_the_teacher_uses_bfloat16_where_the_device_has_its_products(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert fast_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert fast_dtype(torch.device("cpu")) == torch.bfloat16
    assert fast_dtype(torch.device("mps")) == torch.float32


class Killed(BaseException):
    """What ends a process without warning."""


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(tiny, bert, tmp_path, monkeypatch):
    text, options = tiny / "corpus.txt", {"save_minutes": 1e-9, "save_total_limit": 2}
    distill(bert, text, tmp_path / "whole", **options)
    fits, fit_layer, step = [], student_fit.fit_layer, DistillationTrainer.training_step

    def counted_fit(*arguments):
        fits.append(1)
        if len(fits) == 2:
            raise Killed  # while the second layer is fitted
        return fit_layer(*arguments)

    def killed_step(self, *arguments, **keywords):
        if self.state.global_step == 7:
            raise Killed
        return step(self, *arguments, **keywords)

    cut = tmp_path / "cut"
    monkeypatch.setattr(student_fit, "fit_layer", counted_fit)
    with pytest.raises(Killed):
        distill(bert, text, cut, **options)
    assert [file.name for file in (cut / "layers").glob("*.safetensors")] == ["layer-0.safetensors"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DistillationTrainer, "training_step", killed_step)
        distill(bert, text, cut, **options)
    assert len(fits) == 3  # the first layer was not fitted again
    assert type(AutoModel.from_pretrained(cut / "fitted")) is FastBertModel
    summary = distill(bert, text, cut, **options)
    assert len(fits) == 3 and summary["steps"] == 12
    whole, resumed = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut"))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    again = distill(bert, text, cut, **options)
    assert again["eval_hidden_error"] == summary["eval_hidden_error"]


def test_seconds_of_fitted_layers_count_if_the_process_is_killed(tiny, bert, tmp_path, monkeypatch):
    noted, fit_layer = [], student_fit.fit_layer

    def fit(*arguments):
        file = tmp_path / "stages.json"  # as it is if the process ends here
        noted.append("fit_seconds" in json.loads(file.read_text()) if file.exists() else False)
        return fit_layer(*arguments)

    monkeypatch.setattr(student_fit, "fit_layer", fit)
    distill(bert, tiny / "corpus.txt", tmp_path, max_steps=1)
    assert noted == [False, True]
    assert (tmp_path / "fitted" / "config.json").exists() and not (tmp_path / "layers").exists()


def test_a_disk_without_room_for_what_layers_read_is_named(tiny, bert, tmp_path, monkeypatch):
    monkeypatch.setattr(lacking_rows.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3 * 2000 * 16 * 4 - 1))
    with pytest.raises(ValueError, match="smaller fit_rows"):
        distill(bert, tiny / "corpus.txt", tmp_path)
    distill(bert, tiny / "corpus.txt", tmp_path / "less", fit_rows=1999, max_steps=1)


def test_the_tokenizer_is_that_of_the_teacher(tiny, bert, tmp_path):
    distill(bert, tiny / "corpus.txt", tmp_path, max_steps=1)
    contents = [
        json.loads((folder / "tokenizer.json").read_text()) for folder in (bert, tmp_path, tmp_path / "fitted")
    ]
    assert contents[0] == contents[1] == contents[2]


def test_a_budget_of_minutes_ends_the_run(tiny, bert, tmp_path, monkeypatch):
    seconds = itertools.count()  # each step takes one
    monkeypatch.setattr(BudgetClock, "_read", lambda self: (float(next(seconds)), 0.0))
    summary = distill(bert, tiny / "corpus.txt", tmp_path, max_steps=None, budget_minutes=0.5, fit_steps=5)
    assert summary["steps"] == summary["train_seconds"] == math.ceil(30 - summary["fit_seconds"])


def test_speed_chooses_the_widest_leaves_that_are_fast_enough(tiny, bert, tmp_path, monkeypatch):
    from fastbert_hf.benchmarks import distilled

    def speed(models, case, rounds):
        return {"teacher": 100.0, "student": 20.0 + models["student"].config.fff_leaf_width / 4}

    monkeypatch.setattr(distilled, "speed", speed)
    summary = distill(bert, tiny / "corpus.txt", tmp_path / "a", speed=2, fff_leaf_width=None)
    assert summary["form"] == "leaf:1x2x96"  # 20 + 24 ms; with 128 neurons it is 52
    with pytest.raises(ValueError, match=r"speed is 9; the narrowest leaves reach 4\.94 times"):
        distill(bert, tiny / "corpus.txt", tmp_path / "b", speed=9, fff_leaf_width=None)


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_name_or_path": "absent"}, "no model folder 'absent'"),
    ({"form": "leaf:5"}, "unknown form 'leaf:5'"),
    ({"form": "flat:4x4"}, "control of fit-layers alone"),
    ({"form": "layers:3"}, "expected 1 to 2"),
    ({"budget_minutes": 1.0}, "exactly one of --budget_minutes and --max_steps"),
    ({"max_steps": None}, "exactly one of --budget_minutes and --max_steps"),
    ({"max_steps": None, "budget_minutes": -1}, "budget_minutes must be positive"),
    ({"train_file": "absent.txt"}, "absent.txt"),
    ({"teacher_dtype": "int8"}, "teacher_dtype must be one of auto, float32, bfloat16"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"batch_size": 10**6}, "different texts; expected at least one batch"),
    ({"eval_file": "CORPUS"}, "unknown type"),
    ({"speed": 2, "form": "dense:8"}, "leave out --form"),
])  # fmt: skip
def test_a_mistake_is_one_error_before_the_work(tiny, bert, changes, message, tmp_path):
    changes = {name: tiny / "corpus.txt" if value == "CORPUS" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        distill(bert, changes.pop("train_file", tiny / "corpus.txt"), tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "layers").exists()


def test_files_that_do_not_fit_are_named(tiny, bert, embedder, tmp_path):
    text = tmp_path / "few.txt"
    text.write_text("the river\n\nthe river\n")
    with pytest.raises(ValueError, match="holds 1 different texts; expected at least 10"):
        distill(bert, text, tmp_path / "a")
    single = tmp_path / "single.jsonl"
    single.write_text('{"sentence": "the sea", "label": 1}\n')
    with pytest.raises(ValueError, match="one text a row; expected pairs"):
        distill(embedder, tiny / "corpus.txt", tmp_path / "b", eval_file=single)
    single.write_text('{"a": "the sea", "b": "a stone"}\n')
    with pytest.raises(ValueError, match="has columns 'a', 'b'; expected one or two of text and one of label"):
        distill(embedder, tiny / "corpus.txt", tmp_path / "c", eval_file=single)
    single.write_text('{"sentence": "the sea", "label": 1}\n')
    with pytest.raises(ValueError, match="has no score on"):
        distill(bert, tiny / "corpus.txt", tmp_path / "d", eval_file=single)
    trees = tmp_path / "trees"
    distill(bert, tiny / "corpus.txt", trees, max_steps=1)
    with pytest.raises(ValueError, match="feed-forward layer 0 of the model is not a plain dense one"):
        distill(trees, tiny / "corpus.txt", tmp_path / "e")


def test_teachers_that_cannot_be_converted_are_named(tiny, bert, tmp_path):
    def refused(folder, message):
        with pytest.raises(ValueError, match=message):
            distill(folder, tiny / "corpus.txt", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(
        save_bert(tiny, tmp_path / "nsp", "ForNextSentencePrediction"), "is a BertForNextSentencePrediction, which"
    )
    refused(save_bert(tiny, tmp_path / "choice", "ForMultipleChoice"), "is a BertForMultipleChoice, which")
    refused(save_bert(tiny, tmp_path / "tanh", hidden_act="tanh"), "hidden_act")
    pickled = shutil.copytree(bert, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(pickled, "safetensors only")
    gpt = tmp_path / "gpt"
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20, n_positions=8)
    transformers.GPT2Model(config).save_pretrained(gpt)
    refused(gpt, "model_type 'gpt2'")
    silent = shutil.copytree(bert, tmp_path / "silent")
    (silent / "tokenizer.json").unlink()
    refused(silent, "no tokenizer in")


def test_a_folder_of_something_else_or_of_another_run_is_left_alone(tiny, bert, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(bert, other)
    with pytest.raises(ValueError, match="holds a model that is not of a distillation"):
        distill(bert, tiny / "corpus.txt", other)
    with pytest.raises(ValueError, match="holds a model that is not of a distillation"):
        distill(bert, tiny / "corpus.txt", other, overwrite_output_dir=True)
    run = tmp_path / "run"
    distill(bert, tiny / "corpus.txt", run, max_steps=2)
    with pytest.raises(ValueError, match="was made by another run: learning_rate"):
        distill(bert, tiny / "corpus.txt", run, max_steps=2, learning_rate=1e-4)
    summary = distill(bert, tiny / "corpus.txt", run, max_steps=2, learning_rate=1e-4, overwrite_output_dir=True)
    assert summary["learning_rate"] == 1e-4


def test_batches_hold_each_text_once_and_texts_of_like_length_together(tiny):
    tokenizer = load_tokenizer(tiny / "tokenizer")
    lines = (tiny / "corpus.txt").read_text().splitlines()[:50]
    texts = [line[: 3 + 3 * number] for number, line in enumerate(dict.fromkeys(lines))]
    batches = TextBatches(texts, tokenizer, 16, 4, seed=1)
    assert len(batches) == len(texts) // 4
    rows, padding = [], 0
    for number in range(len(batches)):
        batch = batches[number]
        assert batch["input_ids"].shape == batch["attention_mask"].shape and batch["input_ids"].shape[1] <= 16
        padding += int((batch["attention_mask"] == 0).sum())
        rows += [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    expected = Counter(tuple(tokenizer(text, truncation=True, max_length=16)["input_ids"]) for text in texts)
    assert Counter(rows) <= expected
    assert padding < 2 * len(rows)
    with pytest.raises(ValueError, match="holds 3 different texts"):
        TextBatches(texts[:3], tokenizer, 16, 4)
