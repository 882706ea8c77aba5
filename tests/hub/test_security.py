"""Loading never opens a pickle, and never runs what a folder brings along."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM

from fastbert_hf import FastBertForMaskedLM
from fastbert_hf.hub.files import check_paths


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_a_folder_with_pickled_weights_alone_is_refused_with_the_reason(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")  # even a harmless one
    for load in (AutoModel, AutoModelForMaskedLM, FastBertForMaskedLM):
        with pytest.raises(OSError, match=r"safetensors only: a pickle \(pytorch_model.bin\) can run code"):
            load.from_pretrained(folder)
    with pytest.raises(OSError, match="safetensors only"):
        FastBertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    with pytest.raises(ValueError, match="use_safetensors is False"):
        FastBertForMaskedLM.from_pretrained(folder, use_safetensors=False)


def test_a_pickle_beside_the_weights_is_not_opened(folder, tmp_path):
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump(Bomb(tmp_path / "opened"), file)
    AutoModelForMaskedLM.from_pretrained(folder)
    assert not (tmp_path / "opened").exists()


def test_code_in_a_folder_does_not_run_with_the_package(folder, tmp_path):
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForMaskedLM"] = "evil.Model"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert type(AutoModelForMaskedLM.from_pretrained(folder)) is FastBertForMaskedLM
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "path", ["../a", "/a", "a/../b", "a//b", ".", "a/.", "C:\\a", "C:a", "a\\b", "", "a\0", ".git/a"]
)
def test_paths_that_leave_a_folder_are_refused(path):
    with pytest.raises(ValueError, match="would leave the target folder"):
        check_paths(["config.json", path], "somebody/model")


def test_paths_that_collide_are_refused_and_ordinary_ones_are_not():
    with pytest.raises(ValueError, match="twice"):
        check_paths(["config.json", "Config.json"], "somebody/model")
    check_paths(["config.json", "1_Pooling/config.json", "a.b/..c", ".gitattributes"], "somebody/model")
