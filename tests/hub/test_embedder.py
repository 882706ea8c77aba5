"""A sentence embedder stays one on its way to the Hub and back."""

import json
import re
import shutil

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from fastbert_hf import FastBertModel
from tests.clients.helpers import tiny_model
from tests.hub.conftest import save_tokenizer
from tests.hub.test_push import newest, pushed, refused

TEXTS = ["the cat sat", "a b c d e f g h i j k l m n o p q r s t u v w x y z"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    base, folder = tmp_path_factory.mktemp("encoder"), tmp_path_factory.mktemp("embedder") / "model"
    tiny_model(FastBertModel).save_pretrained(base)
    save_tokenizer(base)
    torch.manual_seed(0)
    modules = [Transformer(str(base), max_seq_length=12), Pooling(32, "mean"), Dense(32, 8), Normalize()]
    model = SentenceTransformer(modules=modules, prompts={"query": "the "}, device="cpu")
    model.save(str(folder))
    return folder


@pytest.fixture
def embedder(saved, tmp_path):
    """A sentence embedder with pooling, a dense layer, normalisation, a prompt and a limit, and the page of a run."""
    folder = shutil.copytree(saved, tmp_path / "embedder")
    (folder / "distillation.md").write_text("# What was lost\n")
    return folder


def load(folder):
    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("options", [(), ("--convert",)])
def test_an_embedder_stays_one(client, hub, repo, embedder, options, tmp_path):
    printed = pushed(client, embedder, repo)
    files = newest(hub, repo)[2]
    assert files["distillation.md"].content == b"# What was lost\n"
    assert "2_Dense/model.safetensors" in printed and "checksums equal, outputs differ by 0\n" in printed
    answer = client.script("pull_from_hub", repo, tmp_path / "pulled", *options)
    assert answer.code == 0, answer.err
    ours, theirs = load(tmp_path / "pulled"), load(embedder)
    assert [type(module) for module in ours] == [type(module) for module in theirs]
    assert ours.max_seq_length == 12 and ours.prompts == theirs.prompts
    assert (ours.encode(TEXTS, prompt_name="query") == theirs.encode(TEXTS, prompt_name="query")).all()
    assert "nothing had changed, no commit made" in pushed(client, embedder, repo)


def test_the_card_is_sent_last_and_weights_first(client, hub, repo, embedder, monkeypatch):
    sent = []
    monkeypatch.setattr(hub, "preupload", lambda *args: sent.append(args[2]) or type(hub).preupload(hub, *args))
    pushed(client, embedder, repo)
    paths = [entry["path"] for entry in sent[0]["files"]]
    assert paths[:2] == ["2_Dense/model.safetensors", "model.safetensors"] and paths[-1] == "README.md"


def test_a_file_of_a_module_that_was_damaged_is_found(client, hub, repo, embedder):
    hub.fail("FILE", "1_Pooling/config.json", "corrupt", times=9)
    assert "1_Pooling/config.json" in refused(client, embedder, repo)


def test_only_files_of_the_modules_are_pushed_and_no_pickles(client, hub, repo, embedder):
    (embedder / "checkpoint-1").mkdir()
    for path in ("checkpoint-1/config.json", "notes.json", "2_Dense/pytorch_model.bin"):
        (embedder / path).write_text("{}")
    pushed(client, embedder, repo)
    files = set(newest(hub, repo)[2])
    assert "2_Dense/config.json" in files
    assert not files & {"checkpoint-1/config.json", "notes.json", "2_Dense/pytorch_model.bin"}


def change_module(folder, path):
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))


def only_a_pickle(folder):
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


def a_link(folder):
    (folder.parent / "secret.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "1_Pooling" / "config.json").symlink_to(folder.parent / "secret.json")


def a_linked_folder(folder):
    (folder / "1_Pooling").rename(folder.parent / "elsewhere")
    (folder / "1_Pooling").symlink_to(folder.parent / "elsewhere")


def outside(folder):
    change_module(folder, "../encoder")


def of_git(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("")
    change_module(folder, ".git")


def the_token(folder):
    (folder / "1_Pooling" / "config.json").write_text("hf_" + "o" * 34)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (only_a_pickle, "2_Dense/pytorch_model.bin of .* is a pickle, which is never pushed"),
        (a_link, "1_Pooling/config.json of .* is a link that leaves the folder"),
        (a_linked_folder, "1_Pooling/config.json of .* is a link that leaves the folder"),
        (outside, "names the folder '../encoder'; expected one inside"),
        (of_git, "'.git/config', which would leave the target folder"),
        (the_token, "1_Pooling/config.json holds your Hub token"),
    ],
)
def test_what_must_not_be_pushed_is_named(client, hub, repo, embedder, fault, message):
    fault(embedder)
    assert re.search(message, refused(client, embedder, repo))
    assert repo not in hub.repositories
