"""Weights are looked at before anything opens them: where an index leads, and whether every file is whole."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastbert_hf.benchmarks.routing import routing_changes
from fastbert_hf.benchmarks.suite import trained_problem
from fastbert_hf.hub import weights
from fastbert_hf.hub.files import load_model
from fastbert_hf.training import checkpoints
from fastbert_hf.training.glue.classifier import ModelArguments, fit_head
from tests.hub.conftest import FIXTURES, INDEX, change_config, change_index, folder_files, published_files
from tests.hub.test_pull import pulled
from tests.hub.test_pull import refused as pull_refused
from tests.hub.test_push import refused as push_refused

OUTSIDE = ["/abs/x.safetensors", "../x.safetensors", "sub/x.safetensors", "a\\x.safetensors", "C:x.safetensors"]
WRONG = ["x.bin", "pytorch_model.bin", "", ".", "..", "x.safetensors\0", None, 3, ["x.safetensors"]]


@pytest.mark.parametrize("name", [*OUTSIDE, *WRONG, "absent.safetensors"])
def test_an_index_names_files_of_the_repository_or_is_refused(client, hub, repo, shards, tmp_path, name):
    old = change_index(shards, name)
    files = folder_files(shards)
    files["sub/x.safetensors"] = files["x.bin"] = files["pytorch_model.bin"] = files[old]
    repository = hub.add(repo, files)
    for convert in ([], ["--convert"]):
        line = pull_refused(client, repo, tmp_path / "out", *convert)
        assert f"{INDEX} of {repo} names {name!r}" in line and "expected" in line
    assert not (tmp_path / "out").exists() and repository.name == repo
    assert not hub.requests("GET", "^/lfs/")  # no weights were taken


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"[" * 100_000])
def test_an_index_that_is_none_is_refused(client, hub, repo, shards, tmp_path, content):
    hub.add(repo, {**folder_files(shards), INDEX: content})
    line = pull_refused(client, repo, tmp_path / "out")
    assert INDEX in line and ("expected an object" in line or "is not JSON" in line or "JSON object" in line)


def test_indexes_beside_the_weights_in_use_are_looked_at_too(client, hub, repo, folder, tmp_path):
    evil = json.dumps({"metadata": {}, "weight_map": {"a": "../../x.safetensors"}}).encode()
    for path in (INDEX, "model.fp16.safetensors.index.json", f"sub/{INDEX}"):
        hub.add(repo, {**folder_files(folder), path: evil})
        assert f"{path} of {repo} names '../../x.safetensors'" in pull_refused(client, repo, tmp_path / "out")


def test_the_cache_is_looked_at_too(client, hub, repo, shards, tmp_path):
    """Where it keeps no checksums, what stands in it now may not be what was checked when it came."""
    files = folder_files(shards)
    hub.add(repo, files)
    pulled(client, repo, tmp_path / "out")
    assert folder_files(tmp_path / "out") == files
    hub.stop()
    pulled(client, repo)
    (cached,) = client.home.glob(f"hub/models--{repo.replace('/', '--')}/snapshots/*/{INDEX}")
    cached.unlink()
    change_index(shards, "../x.safetensors")
    shutil.copyfile(shards / INDEX, cached)
    assert f"{INDEX} of {repo} names '../x.safetensors'" in pull_refused(client, repo)


@pytest.mark.parametrize("name", ["/{}", "../{}", "absent.safetensors", "pytorch_model.bin"])
def test_a_local_folder_is_looked_at_before_it_is_loaded_or_pushed(client, hub, repo, shards, tmp_path, name):
    other = tmp_path / "x.safetensors"
    name = name.format(str(other)[1:] if name.startswith("/") else other.name)
    old = change_index(shards, name)
    shutil.copyfile(shards / old, other)  # a whole file: only its place is wrong
    shutil.copyfile(shards / old, shards / "pytorch_model.bin")
    message = "absent.safetensors" if name.startswith("absent") else f"{INDEX} of {shards} names {name!r}"
    assert message in push_refused(client, shards, repo)
    assert repo not in hub.repositories
    for load in (load_model, weights.check_weights):
        with pytest.raises(ValueError) as error:
            load(shards)
        assert message in str(error.value)


def test_an_old_index_beside_one_whole_file_is_not_in_the_way(folder, shards):
    shutil.copyfile(shards / INDEX, folder / INDEX)  # as saving again in one file leaves it
    assert load_model(folder)
    weights.check_weights(folder)
    assert [file.name for file in weights.weight_files(folder)] == ["model.safetensors"]


def test_training_and_the_hub_share_one_check():
    assert checkpoints.check_weights is weights.check_weights


def test_training_refuses_an_index_that_leads_elsewhere(shards):
    change_index(shards, "../x.safetensors")
    with pytest.raises(ValueError, match=r"names '\.\./x\.safetensors'"):
        fit_head(ModelArguments(), str(shards), task=None)


def test_benchmarks_refuse_an_index_that_leads_elsewhere(shards):
    change_index(shards, "../x.safetensors")
    for load in (trained_problem, routing_changes):
        with pytest.raises(ValueError, match=r"names '\.\./x\.safetensors'"):
            load(str(shards), "text.txt", 64)


def damaged(content, damage):
    return {"cut off": content[:-100], "header only": content[:9], "empty": b"", "garbage": b"x" * 1000}[damage]


@pytest.mark.parametrize("damage", ["cut off", "header only", "empty", "garbage"])
def test_damaged_weights_are_one_line_in_push_and_pull(client, hub, repo, folder, tmp_path, damage):
    file = folder / "model.safetensors"
    file.write_bytes(damaged(file.read_bytes(), damage))
    for options in ([], ["--dry_run"]):
        line = push_refused(client, folder, repo, *options)
        assert f"the weights in '{folder}' cannot be read: model.safetensors: " in line
    assert repo not in hub.repositories
    published = published_files()
    hub.add(repo, {**published, "model.safetensors": damaged(published["model.safetensors"], damage)})
    line = pull_refused(client, repo, tmp_path / "out", "--convert")
    assert "cannot be read: model.safetensors: " in line
    assert not (tmp_path / "out").exists()


SIZES = ("vocab_size", "hidden_size", "fff_trees", "num_hidden_layers", "type_vocab_size", "max_position_embeddings")
UNFIT = [
    *(({"fff_depth": depth}, "fff_depth is") for depth in (-1, 30)),
    *(({"fff_depth": depth}, "expected int") for depth in ("3", 2.5, None)),
    ({"fff_depth": 2}, "fastbert.layers.0.ffn.bias_in is (30,), expected (14,)"),
    ({"fff_depth": 24}, "the weights hold"),
    *(({name: 10**30}, f"has {name} {10**30}; expected at most") for name in SIZES),
    ({"hidden_size": 10**4}, "the weights hold"),
    ({"num_hidden_layers": 3}, "the weights hold"),
    ({"num_hidden_layers": 1}, "unexpected (fastbert.layers.1."),
    ({"ffn_type": "dense", "intermediate_size": 10**30}, "has intermediate_size"),
    ({"id2label": "abc"}, "no model can be built from"),
    ({"dtype": "bogus"}, "no model can be built from"),
    ({"architectures": 5}, "has architectures '5'"),
    ({"architectures": {"a": 1}}, "has architectures"),
]


@pytest.mark.parametrize(("values", "message"), UNFIT, ids=lambda value: str(value)[:40])
def test_a_configuration_that_does_not_fit_the_weights_is_a_value_error(folder, values, message):
    change_config(folder, **values)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert message in str(error.value)


@pytest.mark.parametrize("values", [{"fff_depth": 2}, {"fff_depth": 24}, {"hidden_size": 10**30}])
def test_a_configuration_that_does_not_fit_is_one_line_in_push_and_pull(client, hub, repo, folder, tmp_path, values):
    change_config(folder, **values)
    answer = client.script("push_to_hub", folder, repo)
    assert answer.code == 2 and answer.err.splitlines()[-1].startswith("error: ")
    assert "LOAD REPORT" not in answer.err and repo not in hub.repositories
    hub.add(repo, folder_files(folder))
    assert "config.json" in pull_refused(client, repo, tmp_path / "out", "--convert")


@pytest.mark.parametrize("depth", [2, 12])
def test_a_wrong_depth_in_the_published_layout_is_one_line_too(client, hub, repo, tmp_path, depth):
    files = published_files()
    config = json.loads(files["config.json"])
    config["arch"]["intermed_depth"] = depth
    hub.add(repo, {**files, "config.json": json.dumps(config).encode()})
    assert "config.json" in pull_refused(client, repo, tmp_path / "out", "--convert")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"model_type": "fastbert", "hidden_size": ' + b"9" * 5000 + b"}"]
)
def test_json_that_python_cannot_read_is_one_line(client, hub, repo, folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json' is not JSON" in push_refused(client, folder, repo)


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.RLIM_INFINITY))"


def test_a_disk_that_fills_while_a_push_stages_is_one_line(client, hub, repo, folder):
    """The weights are the first file that is too large: safetensors writes them, and its error carries no errno."""
    for options in ([], ["--dry_run"]):
        client.python(LIMIT.format(20_000))
        try:
            line = push_refused(client, folder, repo, *options)
        finally:
            client.python(LIMIT.format("resource.RLIM_INFINITY"))
        assert f"no room on the disk for {repo}" in line
    assert repo not in hub.repositories


def test_a_disk_that_fills_while_a_pull_converts_is_one_line(client, hub, repo, tmp_path):
    hub.add(repo, published_files())
    pulled(client, repo)  # in the cache: what is written now is the native layout
    client.python(LIMIT.format(20_000))
    try:
        line = pull_refused(client, repo, tmp_path / "out", "--convert")
    finally:
        client.python(LIMIT.format("resource.RLIM_INFINITY"))
    assert f"no room on the disk for '{tmp_path / 'out'}'" in line
    assert list(tmp_path.iterdir()) == []


def test_shards_of_any_name_are_converted(client, hub, repo, tmp_path):
    """An index may call its files what it likes."""
    tensors = load_file(FIXTURES / "mlm-1x3" / "model.safetensors")
    names = sorted(tensors)
    parts = {"first.safetensors": names[::2], "second.safetensors": names[1::2]}
    weight_map = {name: part for part, members in parts.items() for name in members}
    files = {"config.json": published_files()["config.json"]}
    for part, members in parts.items():
        save_file({name: tensors[name].clone() for name in members}, tmp_path / part, {"format": "pt"})
        files[part] = (tmp_path / part).read_bytes()
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    hub.add(repo, files)
    pulled(client, repo, tmp_path / "out", "--convert")
    assert set(json.loads((tmp_path / "out" / "conversion.json").read_text())["tensors"]) == set(tensors)
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "out" / "model.safetensors").values())
