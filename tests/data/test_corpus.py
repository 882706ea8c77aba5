"""Corpus files in, documents out."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fastbert_hf.data.build_corpus import CorpusSettings, build_corpus, is_held_out
from fastbert_hf.data.readers import read_documents
from fastbert_hf.data.sources import LocalFile
from fastbert_hf.files import check_output_folder, staged_folder, write_text


def test_plain_and_compressed_files_give_their_lines_in_order(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\n  second \n", encoding="utf-8")
    with lzma.open(tmp_path / "b.txt.xz", "wt", encoding="utf-8") as file:
        file.write("dritte Zeile, größer\n")
    documents = list(read_documents([tmp_path / "a.txt", tmp_path / "b.txt.xz"]))
    assert documents == ["first", "second", "dritte Zeile, größer"]


def test_missing_unknown_and_undecodable_files_are_named(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "cut.xz").write_bytes(lzma.compress(b"some text\n" * 1000)[:-20])
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"some text\n" * 1000)[:-20])
    (tmp_path / "no.txt.gz").write_bytes(b"some text\n")
    for name, message in [
        ("absent.txt", "does not exist"),
        ("a.bin", "unknown type"),
        ("latin.txt", "UTF-8"),
        ("cut.xz", "cannot be read"),
        ("cut.gz", "cannot be read"),
        ("no.txt.gz", "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            list(read_documents([tmp_path / name]))
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="no corpus file"):
        list(read_documents([]))


def test_split_depends_on_the_text_alone_and_keeps_about_the_share():
    documents = [f"document {number}" for number in range(4000)]
    validation = [text for text in documents if is_held_out(text, 0.1)]
    assert 300 < len(validation) < 500
    again = documents[::-1] + documents[:50]
    assert {text for text in again if is_held_out(text, 0.1)} == set(validation)


def test_split_rejects_bad_shares_and_an_empty_corpus(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    source = LocalFile(tmp_path / "empty.txt")
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(
            ValueError, match=f"validation_fraction must lie between 0 and 1, both excluded; got {fraction}"
        ):
            build_corpus([source], [], CorpusSettings(validation_fraction=fraction), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="corpus is empty"):
        build_corpus([source], [], CorpusSettings(vocab_size=150), tmp_path / "out")


def test_staged_folder_moves_everything_or_nothing(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    (target / "other").write_text("kept")
    with pytest.raises(RuntimeError), staged_folder(target) as stage:
        (stage / "config.json").write_text("new")
        raise RuntimeError
    assert (target / "config.json").read_text() == "old"
    with staged_folder(target) as stage:
        (stage / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "new"
    assert (target / "other").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="is a file"):
            check_output_folder(path)
    with pytest.raises(ValueError, match="is a file"):
        write_text(tmp_path / "file" / "a.txt", "x")
    assert (tmp_path / "file").read_text() == "x"


def test_unwritable_output_folder_is_refused_and_probing_leaves_nothing(tmp_path, monkeypatch):
    assert check_output_folder(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    assert check_output_folder("relative") == Path("relative") and list(tmp_path.iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(ValueError, match="is a broken link"):
        check_output_folder(tmp_path / "link")

    def refuse(prefix, dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(ValueError, match="'absent/out' cannot be written: Permission denied"):
        check_output_folder("absent/out")


def test_write_text_leaves_no_temporary_file(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "ü\n")
    assert (tmp_path / "deep" / "a.txt").read_text(encoding="utf-8") == "ü\n"
    assert len(list((tmp_path / "deep").iterdir())) == 1


def test_text_that_a_tokenizer_refuses_is_mended_or_named(tmp_path):
    """JSON holds half of an emoji; Parquet holds bytes that are not UTF-8."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "cut \ud83d here"}) + "\n", encoding="utf-8")
    assert list(read_documents([tmp_path / "a.jsonl"])) == ["cut \ufffd here"]
    bad = pyarrow.array([b"whole", b"caf\xe9"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet', row 2: not UTF-8"):
        list(read_documents([tmp_path / "b.parquet"]))
