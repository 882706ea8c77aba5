"""`--push_to_hub` of both training scripts leaves a repository that a stranger can use, without pickles or tokens."""

import json
import random

import pytest
import yaml

from fastbert_hf.data.tokenizer import save_tokenizer, train_wordpiece
from tests.clients.test_hub_code import AUTO_MAP, BUNDLE
from tests.hub.loopback import OWNER, READER

MODEL = """
hidden_size: 16
num_hidden_layers: 1
num_attention_heads: 2
max_position_embeddings: 32
fff_depth: 2
classifier_head_dim: null
"""
WORDS = ["river", "sea", "wind", "grass", "stone", "cloud", "flows", "turns", "sings", "under", "over", "the", "a"]
FILES = {"model.safetensors", "config.json", "README.md", "tokenizer.json", "tokenizer_config.json", *BUNDLE}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=12)) for _ in range(120)]
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n")
    (folder / "model.yaml").write_text(MODEL)
    rows = [{"sentence": line, "label": int("river" in line)} for line in lines[:40]]
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tokenizer(train_wordpiece(lines, vocab_size=120, model_max_length=32), folder / "tokenizer")
    return folder


@pytest.fixture
def pretraining(data, tmp_path):
    return [
        *("--model_config", data / "model.yaml", "--tokenizer_name", data / "tokenizer"),
        *("--train_file", data / "corpus.txt", "--validation_fraction", 0.2, "--max_seq_length", 16),
        *("--per_device_train_batch_size", 4, "--max_steps", 4, "--save_steps", 2, "--use_cpu", "--disable_tqdm", 1),
        *("--learning_rate", 0.001, "--report_to", "none", "--output_dir", tmp_path / "run", "--push_to_hub"),
    ]


def check_repository(hub, repo):
    """No commit ever held a pickle or the token; the last one is complete. Its files, and the card's header."""
    for _, _, files in hub.repositories[repo].commits:
        assert not [path for path in files if path.endswith((".bin", ".pt", ".pth"))]
        assert OWNER.encode() not in b"".join(blob.content for blob in files.values())
    files = hub.repositories[repo].files("main")
    assert set(files) >= FILES
    assert yaml.safe_load(files["config.json"].content)["auto_map"] == AUTO_MAP
    card = files["README.md"].content.decode()
    assert "generated_from_trainer" not in card and "active neurons per token" in card
    return files, card


def test_pretraining_pushes_while_it_trains_and_a_complete_repository_at_the_end(client, hub, repo, pretraining):
    answer = client.script("pretrain_mlm", *pretraining, "--hub_model_id", repo, "--hub_token", OWNER, token=None)
    assert answer.code == 0, answer.err
    titles = [title for _, title, _ in hub.repositories[repo].commits]
    assert "Training in progress, step 2" in titles and titles[-1] == "End of training"
    early = next(files for _, title, files in hub.repositories[repo].commits if title.endswith("step 2"))
    assert set(early) >= BUNDLE | {"model.safetensors", "config.json"}  # usable while it trains
    _, card = check_repository(hub, repo)
    assert "| learning_rate | 0.001 |" in card and "masked tokens of held-out text" in card
    assert yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    folder = pretraining[pretraining.index("--output_dir") + 1]
    assert all(OWNER.encode() not in file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_fine_tuning_pushes_its_results(client, hub, repo, folder, data, tmp_path):
    answer = client.script(
        "run_glue",
        *("--model_name_or_path", folder, "--train_file", data / "train.jsonl", "--do_train", "--do_eval"),
        *("--validation_file", data / "validation.jsonl", "--max_seq_length", 16, "--num_train_epochs", 1),
        *("--use_cpu", "--disable_tqdm", 1, "--report_to", "none", "--output_dir", tmp_path / "run"),
        *("--push_to_hub", "--hub_model_id", repo, "--hub_private_repo", 1, "--hub_strategy", "end"),
    )
    assert answer.code == 0, answer.err
    files, card = check_repository(hub, repo)
    assert hub.repositories[repo].private and not hub.repositories[repo].branches.keys() - {"main"}
    assert yaml.safe_load(files["config.json"].content)["architectures"] == ["FastBertForSequenceClassification"]
    assert "| custom, validation | accuracy |" in card and "AutoModelForSequenceClassification" in card


def test_rights_and_strategy_are_checked_before_training(client, hub, repo, pretraining, tmp_path):
    for options, token, message in (
        (["--hub_model_id", repo], None, "no token"),
        (["--hub_model_id", repo], READER, "only reads"),
        (["--hub_model_id", "stranger/model"], OWNER, "may not write to stranger/model"),
        (["--hub_model_id", repo, "--hub_strategy", "checkpoint"], OWNER, "pickled state of the optimiser"),
    ):
        answer = client.script("pretrain_mlm", *pretraining, *options, token=token)
        assert answer.code == 2 and message in answer.err
    assert not hub.repositories and not (tmp_path / "run").exists()


def test_a_failing_push_keeps_the_trained_model(client, hub, repo, pretraining, tmp_path):
    hub.fail("POST", "/commit/", 403, times=9)
    answer = client.script("pretrain_mlm", *pretraining, "--hub_model_id", repo, "--hub_strategy", "end")
    assert answer.code == 2 and f"The trained model is whole in {tmp_path / 'run'}" in answer.err
    hub.faults.clear()
    answer = client.script("push_to_hub", tmp_path / "run", repo)
    assert answer.code == 0, answer.err
    check_repository(hub, repo)


def test_a_push_that_is_asked_for_later_sends_what_was_trained(client, hub, repo, folder, data, tmp_path):
    command = [
        *("--model_name_or_path", folder, "--train_file", data / "train.jsonl", "--do_train", "--do_eval"),
        *("--validation_file", data / "validation.jsonl", "--max_seq_length", 16, "--num_train_epochs", 1),
        *("--use_cpu", "--disable_tqdm", 1, "--report_to", "none", "--output_dir", tmp_path / "run"),
    ]
    assert client.script("run_glue", *command).code == 0
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    pushing = ["--push_to_hub", "--hub_model_id", repo, "--hub_strategy", "end"]
    answer = client.script("run_glue", *command, *pushing)
    assert answer.code == 0, answer.err
    files, _ = check_repository(hub, repo)
    assert files["model.safetensors"].content == weights == (tmp_path / "run" / "model.safetensors").read_bytes()
    commits = len(hub.repositories[repo].commits)
    answer = client.script("run_glue", *command, *pushing)
    assert answer.code == 0 and "finished before" in answer.out
    assert len(hub.repositories[repo].commits) == commits
