"""The pages of docs/ name commands, options and recipes that exist; what is released has one version everywhere."""

import collections
import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml

import fastbert_hf
from fastbert_hf.cli.main import COMMANDS, main
from fastbert_hf.recipes import load_yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def commands(page: Path) -> list[list[str]]:
    """The words of every line of a page's bash blocks that calls `fastbert`."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fastbert ")]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_no_section_stands_twice_in_a_page(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^## .*$", text, flags=re.MULTILINE)
    paragraphs = [paragraph for paragraph in text.split("\n\n") if len(paragraph) > 200]
    for parts in (headings, paragraphs):
        assert not [part for part, count in collections.Counter(parts).items() if count > 1]


PAGES = {page.name: commands(page) for page in sorted(DOCS.glob("*.md")) if commands(page)}


def test_the_pages_of_tasks_have_commands():
    assert {"distil.md", "train.md", "glue.md", "hub.md", "look.md", "serve.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page, capsys):
    for words in PAGES[page]:
        options = [word for word in words if word.startswith("--")]
        named = max((name for name in COMMANDS if " ".join(words).startswith(name)), key=len)
        with pytest.raises(SystemExit) as ended:
            main([*named.split(), "--help"])
        assert not ended.value.code
        assert set(options) <= set(re.findall(r"--\w+", capsys.readouterr().out)), words
        for recipe in (after for option, after in itertools.pairwise(words) if option == "--config"):
            assert load_yaml(recipe)


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fastbert_hf.__version__
    newest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest[1] == fastbert_hf.__version__
