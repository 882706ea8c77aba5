"""Raw text to a prepared corpus: clean, drop duplicates, hold out, tokenize, pack, write; always the same bytes."""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbert_hf.data.cleaning import clean_document
from fastbert_hf.data.corpus_store import (
    COUNTS,
    MANIFEST,
    TOKENIZER,
    damage,
    read_manifest,
    write_manifest,
    write_shards,
)
from fastbert_hf.data.deduplication import SeenDocuments
from fastbert_hf.data.packing import Packer, check_seq_length, tokenize_documents
from fastbert_hf.data.readers import read_documents
from fastbert_hf.data.sources import Source
from fastbert_hf.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_digest, train_wordpiece
from fastbert_hf.files import check_output_folder, file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation")
WORK = ".work"  # what is being compared and written; removed at the end
RENAMED = {"validation_share": "validation_fraction"}  # settings in manifests of earlier versions


@dataclass(frozen=True)
class CorpusSettings:
    """What decides the bytes of a prepared corpus, beside its sources.

    Attributes:
        max_seq_length: tokens per sequence, T.
        validation_fraction: part of the documents held out where no validation source is given.
        clean: clean documents (`clean_document`).
        deduplicate: drop documents seen before, held-out ones first.
        tokenizer_name: tokenizer folder or Hub name; None trains one.
        vocab_size: entries of a new tokenizer.
        lowercase: whether it lowers the case.
        tokenizer_megabytes: millions of characters it is trained on: the beginning of every training source, in equal
            parts.
        shard_megabytes: size of a file, about.
    """

    max_seq_length: int = 128
    validation_fraction: float = field(default=0.01, metadata={"aliases": ["--validation_share"]})  # its earlier name
    clean: bool = False
    deduplicate: bool = False
    tokenizer_name: str | None = None
    vocab_size: int = 32768
    lowercase: bool = True
    tokenizer_megabytes: float = 50.0
    shard_megabytes: float = 64.0


@dataclass
class Counts:
    """What became of the documents, by split where that makes a difference."""

    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    characters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    dropped_by_cleaning: int = 0
    dropped_as_duplicates: int = 0


def is_held_out(key: str, fraction: float) -> bool:
    """Decide whether a document belongs to the validation part.

    The decision depends on the document's key alone, so it does not change when a corpus grows or is reordered.

    Args:
        key: what identifies the document, for example its text or the file it came from.
        fraction: part of all keys to set aside, 0 to 1.

    Returns:
        True for about `fraction` of all keys.
    """
    # The prefix keeps the decision independent of other uses of a key's hash, such as the order of a corpus.
    digest = hashlib.sha1(b"validation " + key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def check_validation_fraction(fraction: float) -> None:
    """Check which part of the documents is held out.

    Raises:
        ValueError: unless it lies between 0 and 1, both excluded.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, both excluded; got {fraction}")


def build_corpus(
    train: list[Source],
    validation: list[Source],
    settings: CorpusSettings,
    folder: Path,
    progress: bool = False,
    replace: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Prepare a corpus, unless it lies there prepared already.

    Args:
        train: where the text comes from.
        validation: held-out text; empty to hold out part of `train`.
        settings: what to do with it.
        folder: output.
        progress: show progress bars.
        replace: overwrite a prepared corpus of other text or settings that lies there.

    Returns:
        The manifest, and whether an earlier preparation was reused.

    Raises:
        ValueError: for text or a tokenizer that cannot be read, too little text, or another corpus in `folder`.
    """
    check_seq_length(settings.max_seq_length)
    if not validation:
        check_validation_fraction(settings.validation_fraction)
    check_output_folder(folder)
    given = _given_tokenizer(settings)
    wanted = {
        "settings": asdict(settings) | {"tokenizer_digest": tokenizer_digest(given) if given is not None else None},
        "sources": {
            name: [source.describe() for source in sources] for name, sources in zip(SPLITS, (train, validation))
        },
    }
    existing = read_manifest(folder)
    if existing is not None:
        there, here = _decisive(existing), _decisive(wanted)
        if there != here and not replace:
            raise ValueError(
                f"{str(folder)!r} holds a corpus of other text or settings: {_difference(there, here)}; choose "
                f"another output_dir, or remove its {MANIFEST}"
            )
        if there == here and damage(folder, existing, verify=True) is None:
            return existing, True
    _check_kinds(train, validation, settings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    work = folder / WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        tokenizer = given if given is not None else _new_tokenizer(train, validation, settings, progress)
        save_tokenizer(tokenizer, folder / TOKENIZER)
        manifest = wanted | _write(train, validation, settings, folder, tokenizer, progress)
    except OSError as error:
        raise ValueError(f"the corpus cannot be written in {str(folder)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return write_manifest(folder, manifest), False


def _check_kinds(train: list[Source], validation: list[Source], settings: CorpusSettings) -> None:
    """Check that sources of token ids come with what they need."""
    kinds = {source.is_tokenized() for source in (*train, *validation)}
    if len(kinds) > 1:
        raise ValueError("the sources must be either text or tokenized, all of them; got both")
    if kinds == {True} and settings.tokenizer_name is None:
        raise ValueError("the data is tokenized already: name its tokenizer (--tokenizer_name)")
    if kinds == {True} and not validation:
        raise ValueError("the data is tokenized already: name a held-out source or split beside it")


def _decisive(manifest: dict[str, Any]) -> dict[str, Any]:
    """What decides the bytes of a corpus: the tokenizer goes by its digest, wherever it lies."""
    settings = {RENAMED.get(name, name): value for name, value in manifest["settings"].items()}
    settings.pop("tokenizer_name", None)
    return {"settings": settings, "sources": manifest["sources"]}


def _difference(there: Any, here: Any, name: str = "") -> str:
    """The first value that differs between two structures of JSON: what it is called, and both values."""
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = {f"{name}.{key}".lstrip("."): (there.get(key), value) for key, value in here.items()}
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = {f"{name}[{number}]": pair for number, pair in enumerate(zip(there, here))}
    else:
        pairs = {}
    return next(
        (_difference(*pair, inner) for inner, pair in pairs.items() if pair[0] != pair[1]),
        f"{name} is {there!r} there, {here!r} here",
    )


def _given_tokenizer(settings: CorpusSettings) -> "PreTrainedTokenizerBase | None":
    """The tokenizer that the settings name, if they name one."""
    if settings.tokenizer_name is None:
        return None
    tokenizer = load_tokenizer(settings.tokenizer_name, needs_mask=True)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer {settings.tokenizer_name!r} is not a fast one (tokenizer.json)")
    return tokenizer


def _new_tokenizer(
    train: list[Source], validation: list[Source], settings: CorpusSettings, progress: bool
) -> "PreTrainedTokenizerBase":
    """A tokenizer trained on a sample of the training text."""
    fraction = 0.0 if validation else settings.validation_fraction
    return train_wordpiece(
        list(_sample(train, settings, fraction)),
        settings.vocab_size,
        settings.lowercase,
        settings.max_seq_length,
        progress=progress,
    )


def _sample(sources: list[Source], settings: CorpusSettings, validation_fraction: float) -> Iterator[str]:
    """The beginning of every source, in equal parts, without what is held out."""
    for source in sources:
        room = settings.tokenizer_megabytes * 1e6 / len(sources)
        with contextlib.closing(source.documents()) as documents:
            for document in documents:
                if settings.clean:
                    document = clean_document(document)
                if document is None or (validation_fraction and is_held_out(document, validation_fraction)):
                    continue
                yield document[: int(room)]
                room -= len(document)
                if room < 1:
                    break


def _write(
    train: list[Source],
    validation: list[Source],
    settings: CorpusSettings,
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    progress: bool,
) -> dict[str, Any]:
    """Write the shards of both splits; returns their part of the manifest."""
    counts = Counts()
    seen = SeenDocuments(folder / WORK / "seen.sqlite") if settings.deduplicate else None
    vocab_size = len(tokenizer)
    token_counts = np.zeros(vocab_size, dtype=np.int64)
    rows_per_shard = max(1, int(settings.shard_megabytes * 1e6) // (settings.max_seq_length * 2))
    held_out = folder / WORK / "validation.jsonl"
    shards: dict[str, list] = {}
    # What is held out goes first where it is a source of its own: a document of both then leaves the training text.
    for split in ("validation", "train") if validation else ("train", "validation"):
        sources = validation if split == "validation" else train
        if sources and sources[0].is_tokenized():
            arrays = itertools.chain.from_iterable(
                source.sequences(settings.max_seq_length, vocab_size) for source in sources
            )
        else:
            if sources:
                raw = itertools.chain.from_iterable(source.documents() for source in sources)
                documents = _kept(raw, settings, seen, counts)
                if not validation:
                    documents = _split_off(documents, settings.validation_fraction, held_out)
            else:
                documents = read_documents([held_out])
            arrays = Packer(tokenizer, settings.max_seq_length).pack(
                tokenize_documents(_counted(documents, counts, split), tokenizer, progress, name=f"{split} text")
            )
        if split == "train":
            arrays = _tallied(arrays, token_counts)
        shards[split] = write_shards(folder, split, arrays, vocab_size, rows_per_shard)
        if split == "validation" and validation and not shards[split]:  # before the training text is read
            few = f"shorter than one sequence of {settings.max_seq_length} tokens"
            raise ValueError(
                f"the held-out text is {few if counts.documents[split] else 'empty: it holds no token'}; give more"
            )
    if seen is not None:
        seen.close()
    if not shards["train"]:
        raise ValueError(
            f"the corpus is empty: it gives no sequence of {settings.max_seq_length} tokens for training "
            f"({counts.documents['train']} documents, {counts.dropped_by_cleaning} dropped by cleaning, "
            f"{counts.dropped_as_duplicates} as duplicates)"
        )
    np.save(folder / COUNTS, token_counts)
    return {
        "tokenizer_sha256": file_digest(folder / TOKENIZER / "tokenizer.json"),
        "vocab_size": vocab_size,
        "counts": asdict(counts)
        | {"sequences": {split: sum(entry["sequences"] for entry in shards[split]) for split in SPLITS}},
        "shards": {split: shards[split] for split in SPLITS},
    }


def _kept(
    documents: Iterable[str], settings: CorpusSettings, seen: SeenDocuments | None, counts: Counts
) -> Iterator[str]:
    """Documents that pass cleaning and were not seen before."""
    for document in documents:
        if settings.clean and (document := clean_document(document)) is None:
            counts.dropped_by_cleaning += 1
        elif seen is not None and not seen.add(document):
            counts.dropped_as_duplicates += 1
        else:
            yield document


def _split_off(documents: Iterable[str], fraction: float, held_out: Path) -> Iterator[str]:
    """Pass on the training documents and put the others aside, on disk."""
    with open(held_out, "w", encoding="utf-8") as file:
        for document in documents:
            if is_held_out(document, fraction):
                file.write(json.dumps({"text": document}) + "\n")
            else:
                yield document


def _counted(documents: Iterable[str], counts: Counts, split: str) -> Iterator[str]:
    for document in documents:
        counts.documents[split] += 1
        counts.characters[split] += len(document)
        yield document


def _tallied(arrays: Iterable[np.ndarray], token_counts: np.ndarray) -> Iterator[np.ndarray]:
    """Count the tokens that pass by, without the [CLS] that every sequence begins with."""
    for array in arrays:
        token_counts += np.bincount(array[:, 1:].reshape(-1), minlength=len(token_counts))
        yield array
