"""What the page and the card of a distilled model say of where it comes from."""

from types import SimpleNamespace

import pytest

from fastbert_hf.cli.distill import inherited_metadata
from fastbert_hf.training.distillation.report import short_names


@pytest.mark.parametrize(("files", "names"), [
    ([], []),
    (["/home/me/sts/test.tsv"], ["test.tsv"]),
    (["/home/me/sts/test.tsv", "/home/me/other.tsv"], ["test.tsv", "other.tsv"]),
    (["/home/me/sts/test.tsv", "/home/me/sick/test.tsv"], ["sts/test.tsv", "sick/test.tsv"]),
])  # fmt: skip
def test_files_have_the_shortest_names_that_tell_them_apart(files, names):
    assert short_names(files) == names


def test_files_can_have_names_of_two_parts():
    assert short_names(["/home/me/sts/test.tsv"], least=2) == ["sts/test.tsv"]
    same = ["/home/me/a/sts/test.tsv", "/home/me/b/sts/test.tsv"]
    assert short_names(same, least=2) == ["a/sts/test.tsv", "b/sts/test.tsv"]


def test_a_teacher_of_the_hub_is_the_base_model_and_one_in_a_folder_names_its_own(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\ntags: [x]\ndatasets: [y]\n---\n")
    teacher = SimpleNamespace(folder=tmp_path)
    assert inherited_metadata("somebody/teacher", teacher) == {"license": "mit", "base_model": "somebody/teacher"}
    assert inherited_metadata(str(tmp_path), teacher) == {"license": "mit", "base_model": "a/b"}
    (tmp_path / "README.md").write_text("---\nbase_model: [a/b, c/d]\nlanguage: [en, de]\n---\n")
    assert inherited_metadata(str(tmp_path), teacher) == {"base_model": ["a/b", "c/d"], "language": ["en", "de"]}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: /home/me/bert\n---\n")
    assert inherited_metadata(str(tmp_path), teacher) == {"license": "mit"}
    (tmp_path / "README.md").unlink()
    assert inherited_metadata(str(tmp_path), teacher) == {}
