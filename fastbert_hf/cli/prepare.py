"""Turn raw text into a corpus that pretraining reads without loading it: cleaned, tokenized, packed, in shards.

fastbert prepare --train_file text.txt.xz --deduplicate --output_dir runs/corpus
fastbert prepare --dataset_name wikimedia/wikipedia --dataset_config 20231101.en --streaming \
    --max_documents 100000 --output_dir runs/wikipedia
"""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert_hf.cli.arguments import RecipeArgumentParser
from fastbert_hf.data.build_corpus import CorpusSettings, build_corpus
from fastbert_hf.data.sources import HubDataset, LocalFile, Source


@dataclass
class SourceArguments:
    """Where the text comes from and where the corpus goes."""

    output_dir: str = field(metadata={"help": "folder for shards, tokenizer and manifest"})
    train_file: list[str] = field(
        default_factory=list, metadata={"help": "files: .txt and .jsonl, also .gz, .xz or .zst, and .parquet"}
    )
    validation_file: list[str] = field(
        default_factory=list, metadata={"help": "held-out files; without them part of the text is held out"}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "dataset of the Hub, in place of train_file"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration"})
    dataset_split: str = field(default="train", metadata={"help": "its split"})
    dataset_revision: str | None = field(default=None, metadata={"help": "its branch, tag or commit"})
    validation_split: str | None = field(default=None, metadata={"help": "its held-out split, where it has one"})
    streaming: bool = field(default=False, metadata={"help": "read the dataset without downloading it first"})
    max_documents: int | None = field(default=None, metadata={"help": "documents taken from the dataset at most"})
    text_column: str = field(default="text", metadata={"help": "field of .jsonl, .parquet and datasets that has it"})
    license: str | None = field(default=None, metadata={"help": "the text's licence, for the model card"})
    num_workers: int | None = field(default=None, metadata={"help": "threads that tokenize; default: all cores"})


def sources_of(options: SourceArguments) -> tuple[list[Source], list[Source]]:
    """Training and validation sources.

    Raises:
        ValueError: if neither files nor a dataset is given, or both.
    """
    if bool(options.train_file) == (options.dataset_name is not None):
        raise ValueError("expected exactly one of --train_file and --dataset_name")

    def local(names: list[str]) -> list[Source]:
        return [LocalFile(Path(name), options.text_column, options.license) for name in names]

    if options.dataset_name is None:
        return local(options.train_file), local(options.validation_file)

    def hub(split: str) -> Source:
        return HubDataset(
            options.dataset_name,
            options.dataset_config,
            split,
            options.dataset_revision,
            options.streaming,
            options.text_column,
            options.max_documents,
            options.license,
        )

    held_out = [hub(options.validation_split)] if options.validation_split else local(options.validation_file)
    return [hub(options.dataset_split)], held_out


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prepare a corpus; returns its manifest."""
    parser = RecipeArgumentParser(
        (SourceArguments, CorpusSettings), extra="training", prog="fastbert prepare", description=__doc__
    )
    options, settings = parser.parse(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if options.num_workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(options.num_workers)
    start = time.perf_counter()
    train, validation = sources_of(options)
    manifest, reused = build_corpus(train, validation, settings, Path(options.output_dir), sys.stderr.isatty())
    counts = manifest["counts"]
    state = "was prepared already" if reused else f"prepared in {time.perf_counter() - start:.0f} s"
    print(f"{options.output_dir} {state}: {manifest['vocab_size']} tokenizer entries")
    for split, sequences in counts["sequences"].items():
        print(
            f"  {split:<10}  {counts['documents'][split]:,} documents, {counts['characters'][split]:,} characters, "
            f"{sequences:,} sequences of {settings.max_seq_length} tokens"
        )
    for name in ("dropped_by_cleaning", "dropped_as_duplicates"):
        print(f"  {name}  {counts[name]:,}")
    return manifest
