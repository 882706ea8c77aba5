"""Recipes are found by name, from any folder."""

from pathlib import Path

import pytest

from fastbert_hf.recipes import find_recipe, load_yaml, recipe_names

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def test_every_recipe_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = sorted(CONFIGS.rglob("*.yaml"))
    assert len(files) > 20 and "pretrain/cpu-10-minutes" in recipe_names()
    for file in files:
        name = file.relative_to(CONFIGS).as_posix()
        for words in (name, name.removesuffix(".yaml"), f"configs/{name}", f"configs/{name}".removesuffix(".yaml")):
            assert find_recipe(words) == file


def test_a_file_wins_over_a_recipe_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "small-1x8.yaml").write_text("hidden_size: 1\n")
    assert load_yaml("model/small-1x8.yaml") == {"hidden_size": 1}
    assert load_yaml("model/small-1x8")["hidden_size"] > 1


@pytest.mark.parametrize(
    ("name", "near"),
    [("pretrain/cpu-10-minute", "pretrain/cpu-10-minutes"), ("zzz", "model/..."), ("../setup", "glue/")],
)
def test_an_unknown_name_lists_near_ones(name, near):
    with pytest.raises(ValueError, match="does not exist") as caught:
        load_yaml(name)
    assert repr(name) in str(caught.value) and near in str(caught.value)
