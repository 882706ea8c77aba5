"""No page says a thing twice; what is released has one version everywhere."""

import collections
import re
from pathlib import Path

import pytest
import yaml

import fastbert_hf

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_no_section_stands_twice_in_a_page(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^## .*$", text, flags=re.MULTILINE)
    paragraphs = [paragraph for paragraph in text.split("\n\n") if len(paragraph) > 200]
    for parts in (headings, paragraphs):
        assert not [part for part, count in collections.Counter(parts).items() if count > 1]


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fastbert_hf.__version__
    newest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest[1] == fastbert_hf.__version__
