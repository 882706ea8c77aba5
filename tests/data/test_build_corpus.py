"""Preparing a corpus: the same bytes every time, from every kind of source, and nothing damaged is accepted."""

import gzip
import json
import lzma
import pickle
import shutil
import types

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fastbert_hf.data.build_corpus import CorpusSettings, build_corpus
from fastbert_hf.data.corpus_store import StoredCorpus
from fastbert_hf.data.packing import Packer, tokenize_documents
from fastbert_hf.data.sources import HubDataset, LocalFile
from fastbert_hf.data.tokenizer import load_tokenizer, save_tokenizer, train_wordpiece
from fastbert_hf.files import file_digest

SENTENCE = "the river flows under a stone bridge and the wind sings over grass near cold clouds"
WORDS = SENTENCE.split()
LINES = [" ".join(WORDS[(row * step) % len(WORDS)] for step in range(1, 30 + row % 7)) for row in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_wordpiece(LINES, vocab_size=120), folder)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(LINES), encoding="utf-8")
    return file


def settings(tokenizer=None, **changes):
    options = {"max_seq_length": 16, "validation_fraction": 0.1, "tokenizer_name": tokenizer, "vocab_size": 120}
    return CorpusSettings(**options | changes)


def packed(documents, name):
    tokenizer = load_tokenizer(name)
    return np.concatenate(list(Packer(tokenizer, 16).pack(tokenize_documents(documents, tokenizer))))


def ids(folder, split="train"):
    sequences = StoredCorpus(folder).sequences(split)
    return np.stack([sequences.row(row) for row in range(len(sequences))])


def test_a_new_tokenizer_and_the_shards_are_the_same_bytes_every_time(text, tmp_path):
    for name in ("one", "two"):
        manifest, reused = build_corpus([LocalFile(text)], [], settings(shard_megabytes=0.002), tmp_path / name)
        assert not reused and len(manifest["shards"]["train"]) > 3
    for file in sorted(path for path in (tmp_path / "one").rglob("*") if path.is_file()):
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes(), file.name
    assert not (tmp_path / "one" / ".work").exists()


def test_shards_hold_what_packing_gives(text, tokenizer, tmp_path):
    build_corpus([LocalFile(text)], [LocalFile(text)], settings(tokenizer, shard_megabytes=0.003), tmp_path / "out")
    expected = packed(LINES, tokenizer)
    assert np.array_equal(ids(tmp_path / "out"), expected)
    assert np.array_equal(ids(tmp_path / "out", "validation"), expected)
    corpus = StoredCorpus(tmp_path / "out")
    counts = np.bincount(expected[:, 1:].reshape(-1), minlength=len(corpus.token_counts()))
    assert np.array_equal(corpus.token_counts(), counts)
    sequences = corpus.sequences("train")
    several = sequences.__getitems__([0, len(sequences) - 1, 150])["input_ids"]
    assert several.tolist() == [expected[0].tolist(), expected[-1].tolist(), expected[150].tolist()]
    assert pickle.loads(pickle.dumps(sequences))[150]["input_ids"].tolist() == expected[150].tolist()
    with pytest.raises(IndexError):
        sequences[len(sequences)]
    first = datasets.Dataset.from_file(str(tmp_path / "out" / "train-00000.arrow"))
    assert first[0]["input_ids"] == expected[0].tolist()


def compressed(text, tmp_path, kind):
    rows = [{"text": line, "source": "here"} for line in LINES]
    file = tmp_path / f"corpus.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file
    body = text.read_bytes() if "jsonl" not in kind else "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind.endswith("gz"):
        body = gzip.compress(body)
    elif kind.endswith("xz"):
        body = lzma.compress(body)
    elif kind.endswith("zst"):
        body = pyarrow.compress(body, codec="zstd", asbytes=True)
    file.write_bytes(body)
    return file


@pytest.mark.parametrize(
    "kind",
    ["txt.gz", "gz", "txt.xz", "xz", "txt.zst", "zst", "jsonl", "jsonl.gz", "jsonl.xz", "jsonl.zst", "parquet"],
)
def test_every_kind_of_file_gives_the_same_sequences(text, tokenizer, tmp_path, kind):
    build_corpus([LocalFile(text)], [], settings(tokenizer), tmp_path / "plain")
    build_corpus([LocalFile(compressed(text, tmp_path, kind))], [], settings(tokenizer), tmp_path / "out")
    assert np.array_equal(ids(tmp_path / "out"), ids(tmp_path / "plain"))


@pytest.mark.parametrize("kind", ["txt.gz", "txt.xz", "txt.zst", "jsonl", "parquet"])
def test_a_file_that_is_cut_off_is_named(text, tokenizer, tmp_path, kind):
    file = compressed(text, tmp_path, kind)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"corpus.{kind}"):
        build_corpus([LocalFile(file)], [], settings(tokenizer), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_read_streamed_or_not(text, tokenizer, tmp_path, streaming):
    build_corpus([LocalFile(text)], [], settings(tokenizer), tmp_path / "plain")
    (tmp_path / "set").mkdir()
    compressed(text, tmp_path / "set", "jsonl").rename(tmp_path / "set" / "train.jsonl")
    source = HubDataset(str(tmp_path / "set"), streaming=streaming, license="cc0-1.0")
    manifest, _ = build_corpus([source], [], settings(tokenizer), tmp_path / "out")
    assert np.array_equal(ids(tmp_path / "out"), ids(tmp_path / "plain"))
    described = manifest["sources"]["train"][0]
    assert described["name"] == "set" and described["license"] == "cc0-1.0"
    assert str(tmp_path) not in json.dumps(manifest["sources"])
    few = HubDataset(str(tmp_path / "set"), streaming=streaming, max_documents=50)
    assert build_corpus([few], [], settings(tokenizer), tmp_path / "few")[0]["counts"]["documents"]["train"] < 51
    with pytest.raises(ValueError, match="neither a column 'body' nor 'input_ids'; it has text, source"):
        build_corpus(
            [HubDataset(str(tmp_path / "set"), text_column="body")], [], settings(tokenizer), tmp_path / "bad"
        )


@pytest.mark.parametrize("streaming", [False, True])
def test_tokenized_datasets_pass_through(tokenizer, tmp_path, streaming):
    rows = packed(LINES, tokenizer)
    (tmp_path / "set").mkdir()
    table = pyarrow.table({"input_ids": pyarrow.array(rows.tolist())})
    pyarrow.parquet.write_table(table, tmp_path / "set" / "train.parquet")
    held = LocalFile(tmp_path / "set" / "train.parquet")
    source = HubDataset(str(tmp_path / "set"), streaming=streaming)
    build_corpus([source], [held], settings(tokenizer), tmp_path / "out")
    assert all(np.array_equal(ids(tmp_path / "out", split), rows) for split in ("train", "validation"))
    with pytest.raises(ValueError, match="sequences of 16 to 16 tokens; max_seq_length is 32"):
        build_corpus([source], [held], settings(tokenizer, max_seq_length=32), tmp_path / "long")
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": [[9999] * 16]}), tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match="token ids from 9999 to 9999; the tokenizer has"):
        build_corpus([held], [held], settings(tokenizer), tmp_path / "ids")


def test_tokenized_data_needs_its_tokenizer_and_its_own_held_out_part(tokenizer, tmp_path):
    file = tmp_path / "ids.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": [[7] * 16]}), file)
    with pytest.raises(ValueError, match="tokenized already: name its tokenizer"):
        build_corpus([LocalFile(file)], [LocalFile(file)], settings(), tmp_path / "out")
    with pytest.raises(ValueError, match="tokenized already: name a held-out"):
        build_corpus([LocalFile(file)], [], settings(tokenizer), tmp_path / "out")
    (tmp_path / "text.txt").write_text("river\n")
    with pytest.raises(ValueError, match="either text or tokenized"):
        both = [LocalFile(file), LocalFile(tmp_path / "text.txt")]
        build_corpus(both, [LocalFile(file)], settings(tokenizer), tmp_path / "out")


def test_a_prepared_corpus_is_reused_only_for_the_same_text_and_settings(text, tokenizer, tmp_path):
    first, _ = build_corpus([LocalFile(text)], [], settings(tokenizer), tmp_path / "out")
    again, reused = build_corpus([LocalFile(text)], [], settings(tokenizer), tmp_path / "out")
    assert reused and again == first
    manifest = tmp_path / "out" / "manifest.json"  # as earlier versions wrote it
    manifest.write_text(manifest.read_text().replace("validation_fraction", "validation_share"))
    assert build_corpus([LocalFile(text)], [], settings(tokenizer), tmp_path / "out")[1]
    with pytest.raises(ValueError, match="other text or settings"):
        build_corpus([LocalFile(text)], [], settings(tokenizer, deduplicate=True), tmp_path / "out")
    text.write_text("\n".join(LINES[:-1]), encoding="utf-8")
    with pytest.raises(ValueError, match="other text or settings"):
        build_corpus([LocalFile(text)], [], settings(tokenizer), tmp_path / "out")
    text.write_text("\n".join(LINES), encoding="utf-8")
    (tmp_path / "out" / "train-00000.arrow").unlink()
    repaired, reused = build_corpus([LocalFile(text)], [], settings(tokenizer), tmp_path / "out")
    assert not reused and repaired == first


def test_a_dataset_folder_counts_as_changed_when_a_file_of_its_split_does(text, tokenizer, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    compressed(text, folder, "jsonl").rename(folder / "train.jsonl")
    (folder / "test.jsonl").write_text(json.dumps({"text": "held out"}) + "\n")
    first, _ = build_corpus([HubDataset(str(folder))], [], settings(tokenizer), tmp_path / "out")
    assert len(first["sources"]["train"][0]["sha256"]) == 64
    (folder / "test.jsonl").write_text(json.dumps({"text": "held out otherwise"}) + "\n")
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "elsewhere").rename(tmp_path / "moved" / "set")
    assert build_corpus([HubDataset(str(moved))], [], settings(tokenizer), tmp_path / "out") == (first, True)
    content = (moved / "train.jsonl").read_text()
    (moved / "train.jsonl").write_text(content.replace("river", "lakes", 1))
    with pytest.raises(
        ValueError, match=r"other text or settings: sources\.train\[0\]\.sha256 is '\w+' there, '\w+' here"
    ):
        build_corpus([HubDataset(str(moved))], [], settings(tokenizer), tmp_path / "out")


class Hub:
    """Stands for the Hub under the datasets library: one dataset whose main branch moves."""

    def __init__(self, monkeypatch, reachable=True):
        self.commits, self.opened = {}, []
        monkeypatch.setattr("datasets.load_dataset_builder", self.builder)
        monkeypatch.setattr("datasets.load_dataset", self.load)

    def push(self, lines):
        self.main = f"{len(self.commits):040x}"
        self.commits[self.main] = lines

    def builder(self, name, config, revision):
        commit = (
            revision if revision in self.commits else self.main
        )  # as the library's cache, which takes any revision
        return types.SimpleNamespace(hash=commit)

    def load(self, name, config, split, revision, streaming):
        self.opened.append(revision)
        return datasets.Dataset.from_list([{"text": line} for line in self.commits[revision]])


def test_a_dataset_of_the_hub_is_recorded_and_read_at_one_commit(tokenizer, tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    hub.push(LINES)
    first, _ = build_corpus([HubDataset("a/b", revision="main")], [], settings(tokenizer), tmp_path / "out")
    assert first["sources"]["train"][0]["revision"] == f"{0:040x}"
    source = HubDataset("a/b")
    assert build_corpus([source], [], settings(tokenizer), tmp_path / "out") == (first, True)
    hub.push(LINES[:-1])
    with pytest.raises(ValueError, match=r"sources\.train\[0\]\.revision is '0{40}' there, '0{39}1' here"):
        build_corpus([HubDataset("a/b")], [], settings(tokenizer), tmp_path / "out")
    monkeypatch.setattr("datasets.load_dataset_builder", None)  # a commit needs no Hub to be found again
    pinned = HubDataset("a/b", revision=f"{0:040x}")
    assert build_corpus([pinned], [], settings(tokenizer), tmp_path / "out") == (first, True)
    assert len(list(source.documents())) == len(LINES)  # looked up before the branch moved
    assert hub.opened[-1] == f"{0:040x}"


def test_a_commit_that_only_the_hub_knows_is_not_replaced_by_what_the_cache_has(tokenizer, tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    hub.push(LINES)
    with pytest.raises(ValueError, match=r"cannot be loaded at f{40}: the Hub cannot be reached, .* holds 0{40}"):
        build_corpus([HubDataset("a/b", revision="f" * 40)], [], settings(tokenizer), tmp_path / "out")
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *args, **options: types.SimpleNamespace(hash="auto"))
    with pytest.raises(ValueError, match="the commit of revision 'main' is not known without the Hub"):
        build_corpus([HubDataset("a/b", revision="main")], [], settings(tokenizer), tmp_path / "out")


def test_a_changed_tokenizer_of_the_same_name_is_noticed_in_every_form(text, tmp_path):
    """A folder of vocab.txt has no tokenizer.json; special tokens stand in a file of their own."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(WORDS))]
    folder = tmp_path / "vocab"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizerFast"}))
    (folder / "vocab.txt").write_text("\n".join([*words, "lake"]) + "\n")
    first, _ = build_corpus([LocalFile(text)], [], settings(str(folder)), tmp_path / "out")
    assert build_corpus([LocalFile(text)], [], settings(str(folder)), tmp_path / "out") == (first, True)
    (folder / "vocab.txt").write_text("\n".join([*words, "moor"]) + "\n")
    with pytest.raises(ValueError, match=r"settings\.tokenizer_digest is '\w+' there, '\w+' here"):
        build_corpus([LocalFile(text)], [], settings(str(folder)), tmp_path / "out")


def test_missing_cut_off_and_changed_shards_are_refused_by_name(text, tokenizer, tmp_path):
    build_corpus([LocalFile(text)], [], settings(tokenizer), tmp_path / "out")
    shard = tmp_path / "out" / "train-00000.arrow"
    whole = shard.read_bytes()
    middle = len(whole) // 2
    changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    shard.write_bytes(changed)
    with pytest.raises(ValueError, match=r"train-00000\.arrow has changed"):
        StoredCorpus(tmp_path / "out")
    shard.write_bytes(whole[:-8])
    for verify in (True, False):
        with pytest.raises(ValueError, match=r"train-00000\.arrow has \d+ bytes instead of"):
            StoredCorpus(tmp_path / "out", verify)
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.arrow is missing"):
        StoredCorpus(tmp_path / "out", verify=False)
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="preparation was interrupted"):
        StoredCorpus(tmp_path / "out")


def test_duplicates_leave_the_training_text_and_held_out_documents_leave_it_too(tokenizer, tmp_path):
    (tmp_path / "train.txt").write_text("\n".join([LINES[0], LINES[1], LINES[0].upper(), LINES[2]]))
    (tmp_path / "held.txt").write_text(LINES[2] + "\n")
    sources = [LocalFile(tmp_path / "train.txt")], [LocalFile(tmp_path / "held.txt")]
    manifest, _ = build_corpus(*sources, settings(tokenizer, deduplicate=True), tmp_path / "out")
    assert manifest["counts"]["documents"] == {"train": 2, "validation": 1}
    assert manifest["counts"]["dropped_as_duplicates"] == 2
    expected = packed(LINES[:2], tokenizer)
    assert np.array_equal(ids(tmp_path / "out"), expected)
    manifest, _ = build_corpus(*sources, settings(tokenizer), tmp_path / "all")
    assert manifest["counts"]["documents"]["train"] == 4


def test_cleaning_is_counted(tokenizer, tmp_path):
    prose = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 4
    (tmp_path / "text.txt").write_text(f"{prose}\nshort\n{prose} again\n")
    held = LocalFile(tmp_path / "text.txt")
    manifest, _ = build_corpus([held], [held], settings(tokenizer, clean=True), tmp_path / "out")
    assert manifest["counts"]["dropped_by_cleaning"] == 2  # once in each split
    assert manifest["counts"]["documents"] == {"train": 2, "validation": 2}


def surrogates(folder):
    """A file of JSON lines that each hold half of an emoji."""
    folder.mkdir()
    rows = [{"text": f"{line} \ud83d {number}"} for number, line in enumerate(LINES)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "train.jsonl"


def test_lone_surrogates_do_not_end_a_preparation(tmp_path):
    """With a new tokenizer, duplicates dropped and text held out: every step sees them."""
    source = LocalFile(surrogates(tmp_path / "set"))
    manifest, _ = build_corpus([source], [], settings(deduplicate=True), tmp_path / "out")
    assert sum(manifest["counts"]["documents"].values()) == len(LINES)
    assert ids(tmp_path / "out").size and ids(tmp_path / "out", "validation").size


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_whose_rows_its_library_refuses_is_named(tmp_path, streaming):
    surrogates(tmp_path / "set")
    source = HubDataset(str(tmp_path / "set"), streaming=streaming)
    with pytest.raises(ValueError, match=r"dataset .*set' cannot be .*surrogate pair"):
        build_corpus([source], [], settings(), tmp_path / "out")


def test_text_too_short_for_one_sequence_is_refused(text, tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("river\n")
    (tmp_path / "empty.txt").write_text("\n")
    short, whole, empty = (LocalFile(file) for file in (tmp_path / "short.txt", text, tmp_path / "empty.txt"))
    for train, held, message in (
        (short, whole, r"corpus is empty.*1 documents"),
        (whole, short, "the held-out text is shorter than one sequence of 16 tokens"),
        (whole, empty, "the held-out text is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            build_corpus([train], [held], settings(tokenizer), tmp_path / "out")
        assert not (tmp_path / "out" / "manifest.json").exists()
    build_corpus([LocalFile(text)], [], settings(tokenizer, validation_fraction=1e-9), tmp_path / "out")
    with pytest.raises(ValueError, match="no validation sequences; prepare it with more held-out text"):
        StoredCorpus(tmp_path / "out").sequences("validation")


def test_a_corpus_is_replaced_where_that_is_asked_for(text, tokenizer, tmp_path):
    build_corpus([LocalFile(text)], [], settings(tokenizer), tmp_path / "out")
    first, _ = build_corpus([LocalFile(text)], [], settings(tokenizer, max_seq_length=32), tmp_path / "other")
    for reused in (False, True):
        again = build_corpus(
            [LocalFile(text)], [], settings(tokenizer, max_seq_length=32), tmp_path / "out", replace=True
        )
        assert again == (first, reused) and StoredCorpus(tmp_path / "out").seq_length == 32


def test_a_tokenizer_that_moved_is_the_same(text, tokenizer, tmp_path):
    first, _ = build_corpus([LocalFile(text)], [], settings(tokenizer), tmp_path / "out")
    shutil.copytree(tokenizer, tmp_path / "moved")
    assert build_corpus([LocalFile(text)], [], settings(str(tmp_path / "moved")), tmp_path / "out") == (first, True)


def test_the_tokenizer_sees_only_the_declared_part_of_every_source(tmp_path, monkeypatch):
    for name, line in (("one", LINES[0]), ("two", LINES[1])):
        (tmp_path / f"{name}.txt").write_text("\n".join([line] * 100))
    taken = []

    def train(documents, *args, **options):
        taken.extend(documents)
        return train_wordpiece(documents, *args, **options)

    monkeypatch.setattr("fastbert_hf.data.build_corpus.train_wordpiece", train)
    sources = [LocalFile(tmp_path / "one.txt"), LocalFile(tmp_path / "two.txt")]
    held = [LocalFile(tmp_path / "one.txt")]
    build_corpus(sources, held, settings(tokenizer_megabytes=0.004), tmp_path / "out")
    sizes = [sum(len(text) for text in taken if text in line) for line in (LINES[0], LINES[1])]
    assert all(1990 <= size <= 2000 for size in sizes)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["tokenizer_megabytes"] == 0.004
    assert manifest["tokenizer_sha256"] == file_digest(tmp_path / "out" / "tokenizer" / "tokenizer.json")
