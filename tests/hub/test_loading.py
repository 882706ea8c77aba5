"""Loading by a Hub name or from a folder opens nothing outside of it, whatever its index or configuration names."""

import json
import pickle
import shutil

import pytest
from transformers import AutoModelForMaskedLM

from fastbert_hf import FastBertForMaskedLM
from tests.hub.conftest import INDEX, change_config, change_index, folder_files
from tests.hub.test_security import Bomb

# in the worker, where the name of the class is that of the error
LOAD = "import fastbert_hf, transformers\ntry: {}({!r}, **{})\nexcept Exception as e: print(type(e).__name__, e)"
LOADERS = ["transformers.AutoModelForMaskedLM.from_pretrained", "fastbert_hf.FastBertForMaskedLM.from_pretrained"]


def load_error(client, repo: str, loader: str = LOADERS[0], **options) -> str:
    return client.python(LOAD.format(loader, repo, options)).strip()


@pytest.fixture
def outside(shards, tmp_path):
    """Whole weight files beside the folder and in it that an index must not name, and a pickle."""
    for target in (tmp_path / "x.safetensors", shards / "x.bin"):
        shutil.copyfile(next(shards.glob("*.safetensors")), target)
    (shards / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "opened")))
    yield tmp_path
    assert not (tmp_path / "opened").exists()


NAMES = ["../x.safetensors", "{}/x.safetensors", "sub/x.safetensors", "x.bin", "pytorch_model.bin", "..", None]


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_an_index_that_leads_elsewhere_is_refused_in_a_folder_and_on_the_hub(
    client, hub, repo, shards, outside, name
):
    name = name and name.format(outside)
    change_index(shards, name)
    hub.add(repo, folder_files(shards))
    expected = f"names {name!r}; expected the plain name of a .safetensors file beside it"
    for loader in LOADERS:
        assert load_error(client, repo, loader) == f"ValueError {INDEX} of {repo} {expected}"
    for load in (AutoModelForMaskedLM, FastBertForMaskedLM):
        with pytest.raises(ValueError) as error:
            load.from_pretrained(shards)
        assert str(error.value) == f"{INDEX} of {shards} {expected}"
    assert not hub.requests("GET", "^/lfs/")  # no weights were taken


def test_a_file_that_an_index_names_and_nobody_listed_is_an_error_with_its_name(client, hub, repo, shards):
    change_index(shards, "absent.safetensors")
    hub.add(repo, folder_files(shards))
    assert "absent.safetensors" in load_error(client, repo)
    with pytest.raises(ValueError, match=f"{INDEX} of .* names 'absent.safetensors', which is not there"):
        AutoModelForMaskedLM.from_pretrained(shards)


def test_the_index_that_is_read_is_the_one_that_is_looked_at(client, hub, repo, shards, outside):
    """That of the variant, revision and subfolder which are loaded."""
    good = folder_files(shards)
    variant = "model.safetensors.index.fp16.json"
    change_index(shards, "../x.safetensors")
    evil = (shards / INDEX).read_bytes()
    files = {**good, variant: evil, "sub/config.json": good["config.json"], f"sub/{INDEX}": evil}
    repository = hub.add(repo, files)
    repository.tags["old"] = hub.add(repo, {**good, INDEX: evil}).branches["main"]
    hub.add(repo, files)
    assert load_error(client, repo) == ""
    for options in ({"variant": "fp16"}, {"subfolder": "sub"}, {"revision": "old"}):
        assert "names '../x.safetensors'" in load_error(client, repo, **options), options
    for path in (variant, f"sub/{INDEX}", "sub/config.json"):
        (shards / path).parent.mkdir(exist_ok=True)
        (shards / path).write_bytes(files[path])
    for options in ({"variant": "fp16"}, {"subfolder": "sub"}):
        with pytest.raises(ValueError, match=r"names '\.\./x\.safetensors'"):
            AutoModelForMaskedLM.from_pretrained(shards, **options)


@pytest.mark.parametrize("name", ["../x.safetensors", "{}/x.safetensors", "sub/x.safetensors", "x.bin", "evil"])
def test_the_file_that_a_configuration_names_is_looked_at_too(client, hub, repo, shards, outside, name):
    """`transformers_weights` of a configuration has Transformers read that file in place of model.safetensors."""
    if name == "evil":
        name = "evil.safetensors.index.json"
        shutil.copyfile(shards / INDEX, shards / name)
        change_index(shards, "../x.safetensors")
        (shards / INDEX).rename(shards / name)
    change_config(shards, transformers_weights=name.format(outside))
    hub.add(repo, folder_files(shards))
    for loader in LOADERS:
        assert load_error(client, repo, loader).startswith("ValueError ")
    for load in (AutoModelForMaskedLM, FastBertForMaskedLM):
        with pytest.raises(ValueError, match=r"expected the plain name of a \.safetensors file"):
            load.from_pretrained(shards)
    assert not hub.requests("GET", "^/lfs/")


def test_what_was_cached_loads_without_the_hub(client, hub, repo, folder, shards):
    """One file and several; the look at the index needs no connection that loading does not need."""
    hub.add(repo, folder_files(folder))
    hub.add(f"{repo}-shards", folder_files(shards))
    for name in (repo, f"{repo}-shards"):
        assert load_error(client, name) == ""
    hub.stop()
    for loader in LOADERS:
        for name in (repo, f"{repo}-shards"):
            for options in ({}, {"local_files_only": True}):
                assert load_error(client, name, loader, **options) == ""


def test_an_index_that_is_none_is_a_value_error(client, hub, repo, shards):
    for content in (b"", b"[]", b"{}", json.dumps({"weight_map": []}).encode()):
        (shards / INDEX).write_bytes(content)
        hub.add(repo, folder_files(shards))
        assert load_error(client, repo).startswith("ValueError ")
        with pytest.raises(ValueError, match=r"expected an object|is not JSON|expected a JSON object"):
            AutoModelForMaskedLM.from_pretrained(shards)
