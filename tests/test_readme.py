"""Every Python snippet of the README runs as it stands, and every command it names exists."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
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
def test_readme_options_exist(command, monkeypatch, capsys):
    _, script, *words = command.split()
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not ended.value.code
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known
