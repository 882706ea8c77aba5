"""Pulling through the unmodified client: pinned, verified, converted, resumed, offline, and never outside."""

import io
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from fastbert_hf import FastBertForMaskedLM
from tests.clients.helpers import tiny_model
from tests.clients.test_hub_code import AUTO_MAP
from tests.hub.conftest import FIXTURES, folder_files, published_files
from tests.hub.loopback import OWNER, STRANGER, Blob


def pulled(client, *arguments, token=None):
    answer = client.script("pull_from_hub", *arguments, token=token)
    assert answer.code == 0, answer.err
    return answer.out


def refused(client, *arguments, token=None):
    answer = client.script("pull_from_hub", *arguments, token=token)
    assert answer.code == 2, (answer.out, answer.err)
    *_, line = answer.err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_a_pull_is_pinned_to_a_commit_and_copies_every_file(client, hub, repo, folder, tmp_path):
    repository = hub.add(repo, folder_files(folder))
    printed = pulled(client, repo, tmp_path / "out")
    assert f"{repo} at {repository.branches['main']}, from the Hub" in printed
    assert folder_files(tmp_path / "out") == folder_files(folder)
    pages = [path for path in hub.requests("GET", "/tree/|/resolve/") + hub.requests("HEAD", "/resolve/")]
    assert pages and all(repository.branches["main"] in path for path in pages)


@pytest.mark.parametrize("name", ["mlm-1x3", "mlm-2x2", "mlm-4x0", "seqcls-1x3"])
def test_converting_the_published_layout_reports_every_tensor(client, hub, repo, tmp_path, name):
    hub.add(repo, {**published_files(name), "README.md": b"---\nlicense: mit\n---\n", "extra/note.txt": b"kept"})
    printed = pulled(client, repo, tmp_path / "out", "--convert")
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    fates = {key: fate for key, (fate, _) in report["tensors"].items()}
    assert set(fates) == set(load_file(FIXTURES / name / "model.safetensors"))
    for key, fate in fates.items():
        expected = "renamed"
        if "query_key_value" in key:
            expected = "split"
        elif "linear_out" in key:
            expected = "transposed"
        elif key.endswith("norm_factor") or (key == "encoder.embedding.word_embedding.weight" and "mlm" in name):
            expected = "dropped"
        elif key.startswith("pooler."):
            expected = "kept"
        assert fate == expected, key
    assert report["difference"] == 0 and "difference   0 at most" in printed
    native = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(new for _, names in report["tensors"].values() for new in names) == sorted(native)
    assert report["parameters"] == sum(tensor.numel() for tensor in native.values())
    assert f"parameters   {report['parameters']:,}" in printed
    assert (tmp_path / "out" / "README.md").exists() and (tmp_path / "out" / "extra" / "note.txt").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "fastbert"


def test_a_converted_model_computes_what_was_recorded_from_the_reference(client, hub, repo, tmp_path):
    hub.add(repo, published_files())
    pulled(client, repo, tmp_path / "out", "--convert")
    recorded = load_file(FIXTURES / "mlm-1x3" / "io.safetensors")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = model(recorded["input_ids"], recorded["attention_mask"]).logits
    torch.testing.assert_close(logits, recorded["logits"], atol=5e-5, rtol=1e-5)


def test_loading_by_name_works_from_the_published_layout(client, hub):
    hub.add("pbelcak/UltraFastBERT-1x11-long", published_files())
    printed = client.python(
        "import fastbert_hf\n"
        "from transformers import AutoModel\n"
        "print(type(AutoModel.from_pretrained('pbelcak/UltraFastBERT-1x11-long')).__module__)",
        token=None,
    )
    assert printed.split() == ["fastbert_hf.modeling_fastbert"]


def test_a_broken_download_resumes(client, hub, repo, folder, tmp_path):
    files = {**folder_files(folder), "model.safetensors": os.urandom(26 << 20)}  # the client keeps 10 MiB at a time
    hub.add(repo, files)
    hub.fail("GET", "^/lfs/", "cut", times=2)
    pulled(client, repo, tmp_path / "out")
    assert folder_files(tmp_path / "out") == files
    statuses = [status for method, path, status in hub.log if method == "GET" and path.startswith("/lfs/")]
    assert statuses == [200, 206, 206]  # the rest only, each time


def test_server_errors_are_waited_out(client, hub, repo, folder, tmp_path):
    hub.add(repo, folder_files(folder))
    for method, page in (("GET", "/api/models"), ("GET", "/tree/"), ("HEAD", "/resolve/"), ("GET", "^/lfs/")):
        hub.fail(method, page, 500)
    pulled(client, repo, tmp_path / "out")
    assert all(fault.times == 0 for fault in hub.faults)
    assert folder_files(tmp_path / "out") == folder_files(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_wrong_checksum_is_refused_and_a_new_attempt_heals_it(client, hub, repo, folder, tmp_path, file):
    files = folder_files(folder)
    if file == "config.json":
        files[file] += b"\n"
    hub.add(repo, files)
    hub.fail(*(("FILE", "config.json") if file == "config.json" else ("GET", "^/lfs/")), "corrupt")
    line = refused(client, repo, tmp_path / "out")
    assert f"{file} of {repo} has the" in line and "expected" in line
    assert not (tmp_path / "out").exists()
    pulled(client, repo, tmp_path / "out")
    assert folder_files(tmp_path / "out") == files


def test_the_cache_answers_offline_and_is_checked_too(client, hub, repo, folder, tmp_path):
    repository = hub.add(repo, folder_files(folder))
    pulled(client, repo)
    hub.stop()
    printed = pulled(client, repo, tmp_path / "out")
    assert f"{repo} at {repository.branches['main']}, from the cache, offline" in printed
    assert folder_files(tmp_path / "out") == folder_files(folder)
    assert "the Hub cannot be reached, and" in refused(client, repo + "-other")
    offline = "import huggingface_hub.constants as c; c.HF_HUB_OFFLINE = "
    client.python(offline + "True")  # as HF_HUB_OFFLINE=1 does
    assert "from the cache, offline" in pulled(client, repo, "--revision", repository.branches["main"])
    client.python(offline + "False")
    (blob,) = client.home.glob(f"hub/models--{repo.replace('/', '--')}/snapshots/*/model.safetensors")
    blob.resolve().write_bytes(blob.read_bytes()[:-1] + b"x")
    assert "model.safetensors" in refused(client, repo)


@pytest.mark.parametrize("token", [None, STRANGER, "hf_" + "x" * 34])
def test_a_private_repository_opens_to_its_owner_only(client, hub, repo, folder, tmp_path, token):
    hub.add(repo, folder_files(folder), private=True)
    line = refused(client, repo, tmp_path / "out", token=token)
    wrong = "does not accept the token" if token and "x" in token else "your token (HF_TOKEN) may not see it"
    assert wrong in line
    pulled(client, repo, tmp_path / "out", token=OWNER)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_revision_is_a_branch_a_tag_or_a_commit(client, hub, repo, folder, tmp_path):
    first = hub.add(repo, folder_files(folder)).branches["main"]
    hub.repositories[repo].tags["v1"] = first
    old = folder_files(folder)
    tiny_model(FastBertForMaskedLM, seed=1).save_pretrained(folder)
    hub.add(repo, folder_files(folder))
    for revision in ("v1", first):
        assert first in pulled(client, repo, tmp_path / revision, "--revision", revision)
        assert folder_files(tmp_path / revision) == old
    assert first not in pulled(client, repo, tmp_path / "new")
    assert "has no revision 'v2'" in refused(client, repo, tmp_path / "none", "--revision", "v2")
    assert "there is no repository" in refused(client, "somebody/absent", tmp_path / "none")
    assert "is not a repository name" in refused(client, "a/b/c", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_full_disk_leaves_no_half_a_model(client, hub, repo, folder, tmp_path):
    hub.add(repo, folder_files(folder))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.RLIM_INFINITY))"
    client.python(limit.format(20_000))  # no file of this process grows beyond it, as on a full disk
    try:
        line = refused(client, repo, tmp_path / "out")
    finally:
        client.python(limit.format("resource.RLIM_INFINITY"))
    assert f"no room on the disk for {repo}" in line
    assert list(tmp_path.iterdir()) == [folder]
    client.python("import shutil; shutil.real = shutil.disk_usage; shutil.disk_usage = lambda p: (1, 1, 1)")
    client.python("import shutil, collections as c; shutil.disk_usage = lambda p: c.namedtuple('D', 'free')(1000)")
    try:
        line = refused(client, repo, tmp_path / "out")
    finally:
        client.python("import shutil; shutil.disk_usage = shutil.real")
    assert "wanted, 1.0 kB free" in line
    pulled(client, repo, tmp_path / "out")
    assert folder_files(tmp_path / "out") == folder_files(folder)


def test_pulling_another_model_into_the_same_folder_leaves_only_the_new_weights(client, hub, repo, folder, tmp_path):
    hub.add(repo, folder_files(folder))
    pulled(client, repo, tmp_path / "out")
    other = tiny_model(FastBertForMaskedLM, seed=1)
    other.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    hub.add(repo, folder_files(tmp_path / "shards"))
    (tmp_path / "out" / "mine.txt").write_text("kept")
    pulled(client, repo, tmp_path / "out")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert not (tmp_path / "out" / "model.safetensors").exists() and (tmp_path / "out" / "mine.txt").exists()


class Bomb:
    def __reduce__(self):
        return (print, ("a pickle was opened",))


def test_pickles_are_neither_read_nor_downloaded(client, hub, repo, folder, tmp_path):
    bomb = io.BytesIO()
    pickle.dump(Bomb(), bomb)
    files = {**folder_files(folder), "pytorch_model.bin": bomb.getvalue(), "sub/optimizer.pt": bomb.getvalue()}
    hub.add(repo, files)
    printed = pulled(client, repo, tmp_path / "out")
    assert "a pickle was opened" not in printed and folder_files(tmp_path / "out") == folder_files(folder)
    del files["model.safetensors"]
    hub.add(repo, files)
    line = refused(client, repo, tmp_path / "out2")
    assert "weights in pytorch_model.bin only: a pickle, which can run code when it is opened" in line
    setting = "import os, fastbert_hf; os.environ['DISABLE_SAFETENSORS_CONVERSION'] = '1'\n"
    load = f"try: fastbert_hf.FastBertModel.from_pretrained({repo!r})\nexcept OSError as error: print(error)"
    assert "FastBERT reads safetensors only" in client.python(setting + load)
    assert not hub.requests("GET", "pytorch_model.bin") and not hub.requests("HEAD", "pytorch_model.bin")


@pytest.mark.parametrize(
    "path", ["../escaped.txt", "/etc/escaped.txt", "a/../../escaped.txt", "..\\escaped.txt", "C:/escaped.txt", "./x"]
)
def test_no_path_leaves_the_target_folder(client, hub, repo, folder, tmp_path, path):
    repository = hub.add(repo, folder_files(folder))
    repository.commit({**repository.files("main"), path: Blob(b"escaped", False)}, "a bad path")
    line = refused(client, repo, tmp_path / "out")
    assert "would leave the target folder" in line
    assert list(tmp_path.iterdir()) == [folder] and not list(client.home.rglob("escaped.txt"))


EVIL = b"print('code of the repository ran')\nraise SystemExit(1)\n"


def test_no_code_of_a_repository_runs(client, hub, repo, folder, tmp_path):
    files = folder_files(folder)
    files = {name: EVIL if name.endswith(".py") else content for name, content in files.items()}
    config = json.loads(files["config.json"])
    config["auto_map"] = {auto: f"somebody/other--{target}" for auto, target in config["auto_map"].items()}
    config["auto_map"]["AutoModelForMaskedLM"] = "evil.Model"
    files |= {"config.json": json.dumps(config).encode(), "evil.py": EVIL}
    hub.add(repo, files)
    printed = pulled(client, repo, tmp_path / "out", "--convert")
    assert "code of the repository ran" not in printed
    assert not hub.requests("GET", "somebody/other")
    assert EVIL not in folder_files(tmp_path / "out").values()  # the native layout carries the package's own code
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert client.python(f"import fastbert_hf as f; print(f.FastBertModel.from_pretrained({repo!r}).dtype)")


def test_other_models_are_refused_before_their_weights_are_taken(client, hub, repo, tmp_path):
    hub.add(repo, {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x" * 100})
    assert "model_type 'bert'; expected 'fastbert' or 'crammedBERT'" in refused(client, repo, tmp_path / "out")
    assert not hub.requests("GET", "^/lfs/")
    assert "--convert needs a target folder" in refused(client, repo, "--convert")
