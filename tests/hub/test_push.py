"""Pushing through the unmodified client to a Hub over HTTP: what arrives, and what happens when things go wrong."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastbert_hf import FastBertForMaskedLM
from tests.clients.helpers import tiny_model
from tests.clients.test_hub_code import AUTO_MAP, BUNDLE
from tests.hub.conftest import FIXTURES
from tests.hub.loopback import OWNER, READER, STRANGER

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
EVERYTHING = {"model.safetensors", "config.json", "README.md", *BUNDLE, *TOKENIZER}


def newest(hub, repo):
    return hub.repositories[repo].commits[-1]


def pushed(client, folder, repo, *options):
    answer = client.script("push_to_hub", folder, repo, *options)
    assert answer.code == 0, answer.err
    return answer.out


def refused(client, folder, repo, *options, token=OWNER):
    """The one line that a failing push prints."""
    answer = client.script("push_to_hub", folder, repo, *options, token=token)
    assert answer.code == 2 and answer.out == ""
    *_, line = answer.err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_a_push_leaves_all_that_a_stranger_needs(client, hub, repo, folder):
    printed = pushed(client, folder, repo, "--license", "mit", "--commit_message", "First")
    (_, first, _), (sha, title, files) = hub.repositories[repo].commits
    assert (first, title) == ("initial commit", "First")
    assert set(files) == EVERYTHING | {".gitattributes"}
    assert files["model.safetensors"].content == (folder / "model.safetensors").read_bytes()
    assert files["model.safetensors"].lfs and not files["config.json"].lfs
    assert yaml.safe_load(files["config.json"].content)["auto_map"] == AUTO_MAP
    assert yaml.safe_load(files["README.md"].content.decode().split("---")[1])["license"] == "mit"
    assert f"{repo} at {sha}" in printed
    assert "checksums equal, outputs differ by 0\n" in printed
    assert not hub.repositories[repo].private
    assert OWNER.encode() not in b"".join(blob.content for blob in files.values())


def test_the_card_is_the_last_file_and_the_weights_are_the_first(client, hub, repo, folder, monkeypatch):
    sent = []
    monkeypatch.setattr(hub, "preupload", lambda *args: sent.append(args[2]) or type(hub).preupload(hub, *args))
    pushed(client, folder, repo)
    paths = [entry["path"] for entry in sent[0]["files"]]
    assert paths[0] == "model.safetensors" and paths[-1] == "README.md"


def test_a_second_push_makes_no_commit_until_something_changes(client, hub, repo, folder):
    pushed(client, folder, repo)
    before = len(hub.repositories[repo].commits)
    assert "nothing had changed, no commit made" in pushed(client, folder, repo)
    assert len(hub.repositories[repo].commits) == before
    tiny_model(FastBertForMaskedLM, seed=1).save_pretrained(folder)
    assert "nothing had changed" not in pushed(client, folder, repo)
    assert len(hub.repositories[repo].commits) == before + 1


def test_large_weights_go_in_shards_and_parts_and_a_whole_file_replaces_them(client, hub, repo, folder):
    hub.part_size = 7_000
    pushed(client, folder, repo, "--max_shard_size", "30KB")
    files = newest(hub, repo)[2]
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert len(shards) > 1 and set(json.loads(files["model.safetensors.index.json"].content)["weight_map"].values())
    assert len(hub.requests("PUT", "^/upload/.*/[0-9]+$")) > len(shards)
    (tensors,) = [load_file(folder / "model.safetensors")]
    assert sum(len(files[name].content) for name in shards) > sum(t.numel() * 4 for t in tensors.values())
    pushed(client, folder, repo)
    assert [name for name in newest(hub, repo)[2] if "safetensors" in name] == ["model.safetensors"]


def test_an_interrupted_push_sends_only_what_did_not_arrive(client, hub, repo, folder):
    hub.fail("POST", "/commit/", 502)  # the files arrived, the commit did not
    assert "502" in refused(client, folder, repo)
    uploads = len(hub.requests("PUT", "/upload/"))
    assert uploads == 1 and len(hub.repositories[repo].commits) == 1
    pushed(client, folder, repo)
    assert len(hub.requests("PUT", "/upload/")) == uploads
    assert set(newest(hub, repo)[2]) >= EVERYTHING


def test_shards_that_arrived_before_the_interruption_are_not_sent_again(client, hub, repo, folder):
    hub.fail("PUT", "/upload/", 403, after=1)  # the client sends both at a time, and may not begin what is left
    assert "may not do this" in refused(client, folder, repo, "--max_shard_size", "30KB")
    (arrived,) = hub.lfs
    pushed(client, folder, repo, "--max_shard_size", "30KB")
    shards = {blob.sha256 for blob in newest(hub, repo)[2].values() if blob.lfs}
    stored = [path.rpartition("/")[2] for method, path, status in hub.log if method == "PUT" and status == 200]
    assert len(shards) == 2 and stored[0] == arrived and set(stored[1:]) == shards - {arrived}


def test_a_name_without_a_namespace_is_one_s_own(client, hub, repo, folder):
    _, _, name = repo.partition("/")
    assert f"{repo} at " in pushed(client, folder, name)


def test_an_upload_that_breaks_off_is_sent_again(client, hub, repo, folder):
    hub.fail("PUT", "/upload/", "cut")
    pushed(client, folder, repo)
    assert len(hub.requests("PUT", "/upload/")) == 1  # the broken one was never answered
    assert set(newest(hub, repo)[2]) >= EVERYTHING


def test_server_errors_are_waited_out(client, hub, repo, folder):
    for method, page in (("GET", "whoami"), ("POST", "/preupload/"), ("PUT", "/upload/"), ("GET", "/tree/")):
        hub.fail(method, page, 500)
    pushed(client, folder, repo)
    assert all(fault.times == 0 for fault in hub.faults)


def test_a_commit_of_somebody_else_meanwhile_is_a_conflict(client, hub, repo, folder, monkeypatch):
    pushed(client, folder, repo)
    tiny_model(FastBertForMaskedLM, seed=1).save_pretrained(folder)
    repository = hub.repositories[repo]

    def preupload(*args):
        if len(repository.commits) == 2:
            repository.commit(dict(repository.files("main")), "somebody else's")
        return type(hub).preupload(hub, *args)

    monkeypatch.setattr(hub, "preupload", preupload)
    assert "somebody else committed" in refused(client, folder, repo)
    assert newest(hub, repo)[1] == "somebody else's"


def test_private_repositories_stay_private(client, hub, repo, folder):
    pushed(client, folder, repo, "--private")
    assert hub.repositories[repo].private
    pushed(client, folder, repo, "--private")  # again: it exists, and is private
    hub.repositories[repo].private = False
    assert "exists and is public" in refused(client, folder, repo, "--private")


def test_a_branch_a_tag_and_the_old_revision(client, hub, repo, folder):
    pushed(client, folder, repo)
    first = newest(hub, repo)[0]
    client.python(f"import huggingface_hub; huggingface_hub.HfApi().create_tag({repo!r}, tag='v1')")
    tiny_model(FastBertForMaskedLM, seed=1).save_pretrained(folder)
    pushed(client, folder, repo, "--revision", "next")
    repository = hub.repositories[repo]
    assert repository.branches["main"] == repository.tags["v1"] == first != repository.branches["next"]
    changed = client.python(f"""
import torch, fastbert_hf
from transformers import AutoModelForMaskedLM
main, tag, new = (AutoModelForMaskedLM.from_pretrained({repo!r}, revision=r) for r in ("main", "v1", "next"))
weight = lambda model: model.fastbert.layers[0].ffn.weight_in
print(torch.equal(weight(main), weight(tag)), torch.equal(weight(main), weight(new)))
""")
    assert changed.split() == ["True", "False"]


def test_a_pull_request_leaves_main_alone_and_needs_no_rights(client, hub, repo, folder):
    pushed(client, folder, repo)
    main = hub.repositories[repo].branches["main"]
    tiny_model(FastBertForMaskedLM, seed=1).save_pretrained(folder)
    answer = client.script("push_to_hub", folder, repo, "--create_pr", token=STRANGER)
    assert answer.code == 0, answer.err
    assert f"/{repo}/discussions/1" in answer.out
    repository = hub.repositories[repo]
    assert repository.branches["main"] == main != repository.branches["refs/pr/1"]
    assert "opens against main" in refused(client, folder, repo, "--create_pr", "--revision", "next")


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "no token: set HF_TOKEN"),
        ("hf_" + "x" * 34, "does not accept the token"),
        (READER, "only reads"),
        (STRANGER, "stranger may not write to"),
    ],
)
def test_token_and_rights_come_before_everything_else(client, hub, repo, tmp_path, token, message):
    """Before the folder is even looked at: there is none here."""
    assert message in refused(client, tmp_path / "absent", repo, token=token)
    assert not hub.requests("POST", "") and repo not in hub.repositories


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(client, hub, repo, folder):
    answer = client.script("push_to_hub", folder, repo, "--dry_run", token=None)
    assert answer.code == 0, answer.err
    heading, *lines, total = answer.out.splitlines()
    assert heading == f"would be sent to {repo} on {hub.url}:"
    assert {line.split()[0] for line in lines} == EVERYTHING
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size / 1000:.1f} kB" in lines[0] and total.split()[:2] == ["in", "all"]
    assert hub.log == [] and repo not in hub.repositories


def test_a_folder_of_the_published_layout_arrives_in_the_native_one(client, hub, repo):
    pushed(client, FIXTURES / "seqcls-1x3", repo)
    files = newest(hub, repo)[2]
    config = json.loads(files["config.json"].content)
    assert (config["model_type"], config["architectures"]) == ("fastbert", ["FastBertForSequenceClassification"])
    assert set(files) == (EVERYTHING - TOKENIZER) | {
        ".gitattributes"
    }  # io.safetensors, fixture.json are no part of it


@pytest.mark.parametrize("name", ["training_args.bin", "notes.txt", ".env"])
def test_other_files_of_the_folder_stay_at_home(client, hub, repo, folder, name):
    (folder / name).write_text(f"secret {OWNER}")
    pushed(client, folder, repo)
    assert name not in newest(hub, repo)[2]


def test_a_token_in_a_file_that_would_be_sent_is_found(client, hub, repo, folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "auth": OWNER}))
    assert "tokenizer_config.json holds your Hub token" in refused(client, folder, repo)
    assert repo not in hub.repositories


def test_temporary_files_that_a_killed_push_left_are_removed(client, folder, repo):
    """A push keeps a copy of the model in the folder for temporary files until it is verified."""
    places = "import tempfile; from pathlib import Path; print(tempfile.gettempdir())"
    parent = Path(client.python(places).strip())
    left = [parent / f".fastbert-{what}.being-written-{repo[-1]}abcdefg" for what in ("push", "verify")]
    for leftover in left:
        leftover.mkdir()
        (leftover / "model.safetensors").touch()
    answer = client.script("push_to_hub", folder, repo, "--dry_run")
    assert answer.code == 0, answer.err
    assert not any(leftover.exists() for leftover in left)
    assert not list(parent.glob(".fastbert-push*"))  # nor its own


def test_a_file_that_cannot_be_read_is_one_line(client, folder, repo):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/proc/self/mem")  # a file that nobody may read, root neither
    assert "error: " in refused(client, folder, repo, "--dry_run")


def test_a_folder_without_a_whole_model_is_refused(client, hub, repo, folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert "holds no weights; expected model.safetensors" in refused(client, folder, repo)
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "a pickle, which can run code when it is opened" in refused(client, folder, repo)
    assert repo not in hub.repositories


def test_a_pushed_file_that_differs_is_an_error(client, hub, repo, folder):
    hub.fail("FILE", "README.md", "corrupt")
    assert f"README.md in {repo} at {'{sha}'}" in refused(client, folder, repo).replace(newest(hub, repo)[0], "{sha}")
