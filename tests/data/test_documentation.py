"""Documentation strings as a corpus."""

from pathlib import Path

import pytest

from fastbert_hf.data.documentation import docstrings, documentation_corpus

SOURCE = '''"""A module about rivers, with a paragraph that is long enough to be kept by the corpus."""

class River:
    """The class of all rivers, again with enough words so that it is taken into the corpus.

    Shared paragraph: this text appears in two places of the tree and is kept only once.
    """

    def flow(self):
        """short"""

    async def meander(self):
        """Shared paragraph: this text appears in two places of the tree and is kept only once."""
'''


@pytest.fixture
def roots(tmp_path):
    for name in ("alpha", "beta", "alpha/tests"):
        (tmp_path / name).mkdir()
    (tmp_path / "alpha" / "rivers.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "alpha" / "tests" / "skipped.py").write_text(SOURCE.replace("rivers", "tests"), encoding="utf-8")
    (tmp_path / "beta" / "broken.py").write_text('"""no python""" (', encoding="utf-8")
    (tmp_path / "beta" / "copy.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "single.py").write_text(f'"""{"Lonely module. " * 8}"""', encoding="utf-8")
    return {str(tmp_path): None}


def test_docstrings_of_module_classes_and_functions_are_found(tmp_path, roots):
    texts = list(docstrings(tmp_path / "alpha" / "rivers.py"))
    assert len(texts) == 4 and texts[0].startswith("A module about rivers")
    assert list(docstrings(tmp_path / "beta" / "broken.py")) == []


def test_what_cannot_be_read_is_skipped_and_surrogates_are_replaced(tmp_path, roots, monkeypatch):
    expected = documentation_corpus(roots=roots)
    (tmp_path / "alpha" / "link.py").symlink_to(tmp_path / "absent.py")
    (tmp_path / "alpha" / "folder.py").mkdir()
    (tmp_path / "alpha" / "locked.py").write_text(SOURCE.replace("rivers", "secrets"), encoding="utf-8")
    read = Path.read_bytes

    def refuse(path):
        if path.name == "locked.py":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert documentation_corpus(roots=roots) == expected
    (tmp_path / "surrogate.py").write_text('"""A lone \\ud800 surrogate."""\n', encoding="utf-8")
    assert list(docstrings(tmp_path / "surrogate.py")) == ["A lone \ufffd surrogate."]


def test_corpus_is_deterministic_deduplicated_and_one_line_each(roots):
    documents = documentation_corpus(roots=roots)
    assert documents == documentation_corpus(roots=roots)
    texts = [document.text for document in documents]
    assert sum(text.count("Shared paragraph") for text in texts) == 1
    assert sum("about rivers" in text for text in texts) == 1  # one of the two equal files
    assert not any("\n" in text or "short" in text for text in texts)
    assert {document.package for document in documents} <= {"alpha", "beta", "single"}
    assert "single" in {document.package for document in documents}
    assert not any("about tests" in text for text in texts)


def test_limit_cuts_the_corpus(roots):
    whole = documentation_corpus(roots=roots)
    cut = documentation_corpus(max_megabytes=1e-4, roots=roots)
    assert cut == whole[: len(cut)] and len(cut) < len(whole)


def test_no_text_and_bad_limits_raise(tmp_path):
    with pytest.raises(ValueError, match="no documentation strings"):
        documentation_corpus(roots={str(tmp_path): None})
    with pytest.raises(ValueError, match="positive"):
        documentation_corpus(max_megabytes=0)


def test_this_python_has_documentation():
    documents = documentation_corpus(max_megabytes=0.3)
    assert sum(len(document.text) for document in documents) >= 0.3e6
    assert len({document.package for document in documents}) > 3
