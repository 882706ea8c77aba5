"""The same text gives the same sequences as when these digests were recorded: shards, counts, vocabulary, split."""

import dataclasses
import hashlib
import json
import lzma
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fastbert_hf.data.build_corpus import CorpusSettings, build_corpus
from fastbert_hf.data.sources import LocalFile
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.training.pretraining.data import CorpusArguments, build_corpus_beside, load_pretraining_data

WORDS = [
    "river",
    "Stone",
    "wind",
    "caf\u00e9",
    "gr\u00f6\u00dfer",
    "\u6cb3\u6d41",
    "sings",
    "under",
    "the",
    "1,024",
    "x\u00a0y",
    "--",
]


def document(draw, words):
    return " ".join(draw.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Every kind of file, with duplicates, blank lines, other line ends, half an emoji and a very long document."""
    folder = tmp_path_factory.mktemp("recorded")
    draw = random.Random(5)
    lines = [document(draw, draw.randrange(1, 60)) for _ in range(300)]
    text = "\n".join([*lines, "", "  \t", lines[0].upper(), "one\u2028two\x0cthree \x85 four"]) + "\r\nends\rhere"
    (folder / "a.txt").write_bytes(text.encode())
    long = document(draw, 110_000)
    (folder / "b.txt.xz").write_bytes(lzma.compress(f"{long}\n{lines[1]}\n{document(draw, 30)}".encode()))
    (folder / "c.zst").write_bytes(
        pyarrow.compress("\n".join([*lines[5:9], document(draw, 9)]).encode(), "zstd", True)
    )
    rows = [{"text": f"{document(draw, 40)} \ud83d cut", "n": n} for n in range(50)]
    (folder / "d.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (folder / "e.jsonl.xz").write_bytes(lzma.compress("\n".join(json.dumps(row) for row in rows[:30]).encode()))
    texts = [document(draw, 10) for _ in range(1100)] + ["two\nlines  of\u00a0it ", " "]
    pyarrow.parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), folder / "f.parquet")
    return [folder / name for name in ("a.txt", "b.txt.xz", "c.zst", "d.jsonl", "e.jsonl.xz", "f.parquet")]


def digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def digests(folder):
    """Of every shard, of the counts of tokens, and of the vocabulary in the order of its ids."""
    vocabulary = load_tokenizer(folder / "tokenizer").get_vocab()
    found = {file.name: digest(file.read_bytes()) for file in sorted(folder.glob("*.arrow"))}
    found["counts"] = digest(np.load(folder / "token_counts.npy").astype("<i8").tobytes())
    return found | {"vocabulary": digest(json.dumps(sorted(vocabulary, key=vocabulary.get)).encode())}


@pytest.fixture(scope="module")
def corpus(files, tmp_path_factory):
    """A corpus with a tokenizer of its own, without duplicates."""
    folder = tmp_path_factory.mktemp("corpus") / "out"
    options = {"max_seq_length": 32, "validation_fraction": 0.1, "vocab_size": 200, "shard_megabytes": 0.1}
    build_corpus([LocalFile(file) for file in files], [], CorpusSettings(**options, deduplicate=True), folder)
    return folder


def test_a_corpus_with_its_own_tokenizer(corpus):
    assert digests(corpus) == {
        "train-00000.arrow": "ed00529631fe6ae5",
        "train-00001.arrow": "43789e37fc616feb",
        "train-00002.arrow": "5aeefff659cf4fb8",
        "train-00003.arrow": "e9c9596400422348",
        "validation-00000.arrow": "680f1c8b955637d4",
        "counts": "b1f1aaa78aa6b4bc",
        "vocabulary": "678a7e16cffb9abd",
    }
    counts = json.loads((corpus / "manifest.json").read_text())["counts"]
    assert counts == {
        "documents": {"train": 1308, "validation": 145},
        "characters": {"train": 658492, "validation": 11370},
        "dropped_by_cleaning": 0,
        "dropped_as_duplicates": 40,
        "sequences": {"train": 5963, "validation": 108},
    }


def test_a_cleaned_corpus_with_a_given_tokenizer_and_held_out_files(files, corpus, tmp_path):
    options = {"max_seq_length": 24, "tokenizer_name": str(corpus / "tokenizer"), "clean": True}
    train, held_out = [LocalFile(file) for file in files[1:]], [LocalFile(files[0])]
    build_corpus(train, held_out, CorpusSettings(**options), tmp_path / "out")
    assert digests(tmp_path / "out") == {
        "train-00000.arrow": "92db9a3533f448ae",
        "validation-00000.arrow": "c7ddb7fd4edce4b4",
        "counts": "ef8c954e350f3388",
        "vocabulary": "678a7e16cffb9abd",
    }


def test_what_a_run_reads_from_text_files_and_a_tokenizer(files, corpus, tmp_path):
    names = [str(file) for file in files]
    options = CorpusArguments(train_file=names, validation_fraction=0.2, max_seq_length=16, max_eval_samples=100)
    folder = build_corpus_beside(options, tmp_path / "run", False, str(corpus / "tokenizer"))
    assert folder == str(tmp_path / "run-corpus") and not (tmp_path / "run").exists()
    options = dataclasses.replace(options, corpus=folder)
    data = load_pretraining_data(options, load_tokenizer(corpus / "tokenizer"), 8, 256, seed=3)
    rows = data.train.__getitems__(list(range(len(data.train))))["input_ids"]
    found = {
        "train": digest(rows.numpy().astype("<i8").tobytes()),
        "held out": digest(data.validation.input_ids.numpy().astype("<i8").tobytes()),
        "labels": digest(data.validation.labels.numpy().astype("<i8").tobytes()),
        "sequences": (len(data.train), len(data.validation)),
        "unigram loss": round(data.unigram_loss, 6),
    }
    assert found == {
        "train": "dea2a7c53a200fbb",
        "held out": "25f5acf5e50e132a",
        "labels": "a4a804e1d6584924",
        "sequences": (12177, 100),
        "unigram loss": 2.77053,
    }
