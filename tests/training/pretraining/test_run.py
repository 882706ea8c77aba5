"""Pretraining on a tiny corpus: what is saved, how it resumes, what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, Trainer, TrainingArguments

import fastbert_hf  # noqa: F401  registers the model with the Auto classes
from fastbert_hf.data.tokenizer import load_tokenizer, save_tokenizer, train_wordpiece
from fastbert_hf.training.pretraining.data import load_pretraining_data
from fastbert_hf.training.pretraining.model import model_config
from fastbert_hf.training.pretraining.run import pretrain
from tests.training.runs import arguments


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Output folder, model and summary of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    model, summary = pretrain(*arguments(tiny, folder))
    return folder, model, summary


def test_saved_folder_loads_and_repeats_the_held_out_loss(tiny, finished):
    folder, model, summary = finished
    loaded = AutoModelForMaskedLM.from_pretrained(folder).eval()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    options, _ = arguments(tiny, folder, corpus=f"{folder}-corpus")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held = load_pretraining_data(options, tokenizer, 8, loaded.config.vocab_size, seed=7).validation
    with torch.no_grad():
        output = loaded(input_ids=held.input_ids, labels=held.labels)
    assert output.logits.shape == (*held.input_ids.shape, loaded.config.vocab_size)
    assert summary["validation_loss"] == pytest.approx(output.loss.item(), abs=1e-5)
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["steps"] == 6 and summary["tokens_seen"] == 6 * 8 * 16 and summary["resumed_from"] is None


def test_output_folder_holds_no_temporary_files(finished):
    folder, _, _ = finished
    assert sorted(path.name for path in folder.parent.iterdir()) == ["out", "out-corpus"]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "summary.json", "checkpoint-6"} <= names
    assert not any(name.startswith(".") for name in names)


def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tiny, finished, tmp_path):
    folder, model, summary = finished
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-6").mkdir()  # interrupted while being written
    (tmp_path / "checkpoint-6" / "config.json").write_text("{}")
    resumed, again = pretrain(*arguments(tiny, tmp_path))
    assert again["resumed_from"] == str(tmp_path / "checkpoint-3")
    assert again["validation_loss"] == summary["validation_loss"]
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_tokens_and_seconds_of_a_resumed_run_cover_the_same_steps(tiny, finished, tmp_path):
    folder, _, summary = finished
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        shutil.copytree(folder / checkpoint, tmp_path / checkpoint / checkpoint)
        file = tmp_path / checkpoint / checkpoint / "trainer_state.json"
        state = json.loads(file.read_text())
        clock = state["stateful_callbacks"]["BudgetTrainer"]["args"]["clock"]
        assert 0 < clock["seconds"] <= summary["train_seconds"] + 0.1
        clock["seconds"] = 5000.0
        file.write_text(json.dumps(state))
        _, again = pretrain(*arguments(tiny, tmp_path / checkpoint))
        assert again["resumed_from"].endswith(checkpoint)
        assert again["tokens_seen"] == summary["tokens_seen"] and again["train_seconds"] >= 5000.0
    file = tmp_path / "checkpoint-3" / "checkpoint-3" / "trainer_state.json"
    shutil.rmtree(tmp_path / "checkpoint-3" / "checkpoint-6")
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["BudgetTrainer"]
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="holds no budget clock"):
        pretrain(*arguments(tiny, tmp_path / "checkpoint-3"))


def test_a_checkpoint_of_another_model_is_refused(tiny, finished, tmp_path):
    folder, _, _ = finished
    shutil.copytree(folder / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    recipe = tmp_path / "deeper.yaml"
    recipe.write_text((tiny / "model.yaml").read_text().replace("fff_depth: 2", "fff_depth: 3"))
    with pytest.raises(ValueError, match="fff_depth is 2 there, 3 here"):
        pretrain(*arguments(tiny, tmp_path / "out", model_config=str(recipe)))


def test_overwriting_starts_anew_and_removes_old_checkpoints(tiny, finished, tmp_path):
    folder, _, summary = finished
    shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-6")
    shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-99")
    _, again = pretrain(*arguments(tiny, tmp_path, overwrite_output_dir=True))
    assert again["resumed_from"] is None and again["validation_loss"] == summary["validation_loss"]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


def test_seeds_change_the_run_but_not_the_held_out_positions(tiny, finished, tmp_path):
    _, _, summary = finished
    _, other = pretrain(*arguments(tiny, tmp_path, seed=1))
    assert other["validation_loss"] != summary["validation_loss"]
    assert other["unigram_loss"] == summary["unigram_loss"]


def test_training_learns(tiny, finished, tmp_path):
    _, _, short = finished
    _, longer = pretrain(*arguments(tiny, tmp_path, max_steps=60, save_strategy="no"))
    assert longer["validation_loss"] < short["validation_loss"] - 0.3


def test_dropout_is_off_in_pretraining_and_kept_in_the_saved_configuration(finished):
    folder, model, _ = finished
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    assert model.config.hidden_dropout_prob == 0.1
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == 0.1
    assert config["sparse_prediction"] == 0.25
    reloaded = AutoModelForMaskedLM.from_pretrained(folder)
    assert 0.1 in {module.p for module in reloaded.modules() if isinstance(module, torch.nn.Dropout)}


def test_biases_and_norms_do_not_decay(finished, tmp_path):
    _, model, _ = finished
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    decayed = set(Trainer(model=model, args=args).get_decay_parameter_names(model))
    for name, _ in model.named_parameters():
        assert (name in decayed) == ("bias" not in name and "norm" not in name), name


def test_continuing_from_weights_starts_from_them(tiny, finished, tmp_path):
    folder, _, summary = finished
    changes = {"model_config": None, "model_name_or_path": str(folder), "learning_rate": 0.0, "max_steps": 1}
    _, continued = pretrain(*arguments(tiny, tmp_path, **changes))
    assert continued["validation_loss"] == pytest.approx(summary["validation_loss"], abs=1e-6)


def test_sparse_prediction_changes_neither_weights_nor_losses(tiny, finished, tmp_path):
    _, model, summary = finished
    dense, other = pretrain(*arguments(tiny, tmp_path, sparse_prediction=False))
    assert dense.config.sparse_prediction == 0.0 and model.config.sparse_prediction == 0.25
    assert other["train_loss"] == pytest.approx(summary["train_loss"], abs=1e-4)
    assert other["validation_loss"] == pytest.approx(summary["validation_loss"], abs=1e-4)


def test_accumulated_batches_count_as_one_step(tiny, tmp_path):
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    _, summary = pretrain(*arguments(tiny, tmp_path, **parts))
    assert summary["steps"] == 2 and summary["tokens_seen"] == 2 * 8 * 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_config": None}, "exactly one of"),
        ({"model_name_or_path": "x"}, "exactly one of"),
        ({"model_config": "absent.yaml"}, "absent.yaml"),
        ({"tokenizer_name": "absent-tokenizer"}, "absent-tokenizer"),
        ({"train_file": []}, "no corpus file"),
        ({"train_file": ["absent.txt"]}, "absent.txt"),
        ({"validation_file": ["absent.txt"]}, "absent.txt"),
        ({"validation_fraction": 2.0}, "validation_fraction"),
        ({"max_eval_samples": 0}, "max_eval_samples"),
        ({"max_seq_length": 4}, "max_seq_length must be at least 8; got 4"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1; got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1; got 0"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps must be at least 1; got -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number.*got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number.*got -0.1"),
        ({"max_seq_length": 64}, "max_position_embeddings 32"),
        ({"mlm_probability": 1.5}, "mlm_probability"),
        ({"per_device_train_batch_size": 4096}, "smaller than one batch"),
        ({"resume_from_checkpoint": "absent-checkpoint"}, "absent-checkpoint"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tiny, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(*arguments(tiny, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_empty_corpus_and_output_that_is_a_file_are_refused(tiny, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="corpus is empty"):
        pretrain(*arguments(tiny, tmp_path / "out", train_file=[str(tmp_path / "empty.txt")]))
    with pytest.raises(ValueError, match="is a file"):
        pretrain(*arguments(tiny, tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="'/proc/x' cannot be written"):
        pretrain(*arguments(tiny, "/proc/x", train_file=["absent.txt"]))
    (tmp_path / "short.txt").write_text("river\n")
    with pytest.raises(ValueError, match="held-out text is shorter"):
        pretrain(*arguments(tiny, tmp_path / "out", validation_file=[str(tmp_path / "short.txt")]))


def test_model_recipes_are_checked_against_configuration_and_tokenizer(tiny):
    tokenizer = load_tokenizer(tiny / "tokenizer")
    config = model_config({"hidden_size": 12, "num_attention_heads": 1}, tokenizer, 16, sparse_prediction=0.3)
    assert (config.vocab_size, config.pad_token_id, config.sparse_prediction) == (len(tokenizer), 0, 0.3)
    named = model_config({"pad_token_id": 0, "id2label": {0: "a", 1: "b", 2: "c"}}, tokenizer, 16)
    assert (named.pad_token_id, named.num_labels) == (0, 3)
    bert = model_config({"model_type": "bert", "hidden_size": 12, "num_attention_heads": 1}, tokenizer, 16, 0.3)
    assert bert.model_type == "bert" and not hasattr(bert, "sparse_prediction")
    for recipe, message in [
        ({"hiden_size": 12}, "unknown field 'hiden_size'"),
        ({"model_type": "brt"}, "unknown model_type 'brt'"),
        ({"vocab_size": 20}, "vocab_size 20"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"fff_depth": -1}, "fff_depth"),
        ({"pad_token_id": 3}, "pad_token_id 3 in the model recipe is not the tokenizer's 0"),
        ({"id2label": 3}, "id2label in the model recipe must map .* got 3"),
        ({"id2label": {0: "a", "x": "b"}}, "id2label in the model recipe must map"),
        ({"model_type": ["bert"]}, "unknown model_type"),
        ({5: "a", "hiden_size": 12}, "unknown field 5"),
        ({"model_type": "bert", "hidden_size": [1]}, "does not fit model_type 'bert'.*hidden_size"),
    ]:
        with pytest.raises(ValueError, match=message):
            model_config(recipe, tokenizer, 16)


def test_held_out_text_is_looked_at_before_the_corpus_is_packed(tiny, tmp_path, monkeypatch):
    read = []

    def documents(files, text_column):
        for file in files:
            read.append(Path(file).name)
            yield from Path(file).read_text().splitlines()

    monkeypatch.setattr("fastbert_hf.data.sources.read_documents", documents)
    for text, message in (("river\n", "held-out text is shorter"), ("", "held-out text is empty")):
        (tmp_path / "short.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            pretrain(*arguments(tiny, tmp_path / "out", validation_file=[str(tmp_path / "short.txt")]))
    assert read == ["short.txt", "short.txt"]


def test_text_files_are_prepared_once_and_anew_for_another_run(tiny, finished, tmp_path):
    folder, model, _ = finished
    manifest = tmp_path / "out-corpus" / "manifest.json"
    shutil.copytree(f"{folder}-corpus", manifest.parent)
    written = manifest.stat().st_mtime_ns
    again, _ = pretrain(*arguments(tiny, tmp_path / "out"))
    assert manifest.stat().st_mtime_ns == written
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    _, shorter = pretrain(
        *arguments(tiny, tmp_path / "out", max_seq_length=8, overwrite_output_dir=True, max_steps=1)
    )
    assert json.loads(manifest.read_text())["settings"]["max_seq_length"] == 8 and shorter["tokens_seen"] == 8 * 8


def test_truncated_weights_are_named_before_the_data_is_read(tiny, finished, tmp_path):
    folder, _, _ = finished
    for name in ("model", "out/checkpoint-3"):
        shutil.copytree(folder / "checkpoint-3", tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    changes = {"model_config": None, "model_name_or_path": str(tmp_path / "model")}
    with pytest.raises(ValueError, match=r"model' cannot be read: model\.safetensors"):
        pretrain(*arguments(tiny, tmp_path / "new", **changes))
    with pytest.raises(ValueError, match=r"checkpoint-3' cannot be read: model\.safetensors"):
        pretrain(*arguments(tiny, tmp_path / "out"))
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(tiny, finished, tmp_path):
    folder, _, _ = finished
    words = [f"word{number} " * 3 for number in range(400)]
    save_tokenizer(train_wordpiece(words, vocab_size=600), tmp_path / "large")
    changes = {"model_config": None, "model_name_or_path": str(folder), "tokenizer_name": str(tmp_path / "large")}
    with pytest.raises(ValueError, match="smaller than the tokenizer's"):
        pretrain(*arguments(tiny, tmp_path / "out", **changes))
