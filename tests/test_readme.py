"""Every Python snippet of the README runs as it stands; every command it names exists; the model card renders."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests" / "fixtures" / "mlm-1x3"
PUBLISHED = "pbelcak/UltraFastBERT-1x11-long"


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), flags=re.DOTALL)


def make_published_repository(folder: Path) -> None:
    """A small repository of the published layout, where the snippets find it by the published name."""
    folder.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / file, folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat"]
    vocabulary = {word: i for i, word in enumerate(words + [f"word{i}" for i in range(97 - len(words))])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{name.strip('[]').lower()}_token": name for name in words[:5]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.mark.parametrize("snippet", blocks("README.md", "python"))
def test_readme_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a snippet writes goes nowhere else
    monkeypatch.delenv("FASTBERT_BACKEND", raising=False)
    make_published_repository(tmp_path / PUBLISHED)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


def test_readme_has_snippets():
    assert len(blocks("README.md", "python")) >= 2


def test_readme_commands_exist():
    commands = "\n".join(blocks("README.md", "bash"))
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", commands, flags=re.MULTILINE)
    assert targets[:2] == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    assert "scripts/run_glue.py" in commands and "scripts/benchmark.py" in commands
    for config in re.findall(r"configs/[\w/.-]+\.yaml", commands):
        assert (ROOT / config).exists(), config


def script_commands() -> list[str]:
    commands = "\n".join(blocks("README.md", "bash")).replace("\\\n", " ")
    return [line.partition("#")[0] for line in commands.splitlines() if line.startswith("python scripts/")]


@pytest.mark.slow
@pytest.mark.parametrize("command", script_commands())
def test_readme_options_exist(command):
    _, script, *words = command.split()
    result = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"--\w+", result.stdout))
    assert {word for word in words if word.startswith("--")} <= known


def test_the_model_card_renders_without_what_is_not_known():
    """Unknown fields are left out, not invented; the header stays valid YAML."""
    config = json.loads((FIXTURE / "config.json").read_text())["arch"]
    known = {
        "model_name": "small FastBERT",
        "model_id": "somebody/small-fastbert",
        "pipeline_tag": "fill-mask",
        "auto_class": "AutoModelForMaskedLM",
        "parameters": "6,944",
        "neurons_per_token": 4,
        "neurons_per_layer": 15,
        "num_hidden_layers": config["num_transformer_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["attention"]["num_attention_heads"],
        "fff_trees": 1,
        "fff_depth": 3,
        "vocab_size": 97,
        "max_position_embeddings": 16,
    }
    template = jinja2.Template((ROOT / "model_card.md").read_text(), undefined=jinja2.ChainableUndefined)
    bare, full = template.render(known), template.render(known, license="mit", results="| task | score |")
    assert "## Results" not in bare and "license" not in bare and "{{" not in bare
    assert "## Results" in full and yaml.safe_load(full.split("---")[1])["license"] == "mit"
    assert yaml.safe_load(bare.split("---")[1])["pipeline_tag"] == "fill-mask"
