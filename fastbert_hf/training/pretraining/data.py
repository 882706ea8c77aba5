"""What pretraining feeds to the model: a prepared corpus, made from text files beside the run where none is given."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from fastbert_hf.data.build_corpus import CorpusSettings, build_corpus, check_validation_fraction
from fastbert_hf.data.corpus_store import StoredCorpus
from fastbert_hf.data.masking import MaskedLanguageModelCollator, MaskedSequences
from fastbert_hf.data.readers import check_corpus_files
from fastbert_hf.data.sources import LocalFile
from fastbert_hf.files import file_digest
from fastbert_hf.training.pretraining.baseline import unigram_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("train_file", "validation_file")


@dataclass
class CorpusArguments:
    """Which text a model is pretrained on."""

    corpus: str | None = field(default=None, metadata={"help": "folder that scripts/prepare_corpus.py made"})
    verify_corpus: bool = field(default=True, metadata={"help": "compare its files with their SHA-256 at the start"})
    train_file: list[str] = field(
        default_factory=list,
        metadata={
            "help": "in place of corpus: text files, prepared once in OUTPUT_DIR-corpus; without a tokenizer one is "
            "trained, and duplicates are dropped"
        },
    )
    validation_file: list[str] = field(
        default_factory=list, metadata={"help": "held-out text files; without them part of train_file is held out"}
    )
    validation_fraction: float = field(
        default=0.02,
        metadata={
            "aliases": ["--validation_share"],  # its earlier name
            "help": "part of the documents held out where no validation_file is given",
        },
    )
    text_column: str = field(default="text", metadata={"help": "field of .jsonl and .parquet files with the text"})
    vocab_size: int = field(
        default=32768,
        metadata={"help": "entries of the tokenizer that is trained where train_file comes alone"},
    )
    max_eval_samples: int = field(default=512, metadata={"help": "held-out sequences used at most"})
    max_seq_length: int = field(default=128, metadata={"help": "tokens per packed sequence"})
    mlm_probability: float = field(default=0.25, metadata={"help": "fraction of positions to predict"})


@dataclass
class PretrainingData:
    """Everything a run feeds to the model.

    Attributes:
        train: packed training sequences.
        validation: held-out sequences, masked once.
        collator: masks training batches.
        unigram_loss: the baseline beside the held-out loss, in nats.
        sources: what is known about the text, for the model card.
    """

    train: Dataset
    validation: MaskedSequences
    collator: MaskedLanguageModelCollator
    unigram_loss: float
    sources: list[dict[str, Any]]

    @property
    def train_tokens(self) -> int:
        """Tokens of one epoch."""
        return len(self.train) * len(self.train[0]["input_ids"])


def check_corpus(options: CorpusArguments) -> None:
    """Check what can be checked before anything is read.

    Raises:
        ValueError: no text or two kinds of it, a file that is missing, a count below 1, or a fraction out of range.
    """
    if options.max_eval_samples < 1:
        raise ValueError(f"max_eval_samples must be at least 1; got {options.max_eval_samples}")
    if options.corpus is not None:
        if options.train_file or options.validation_file:
            raise ValueError("--corpus is already split: give it without --train_file and --validation_file")
        return
    check_corpus_files(options.train_file)
    if options.validation_file:
        check_corpus_files(options.validation_file)
    else:
        check_validation_fraction(options.validation_fraction)


def text_identity(options: CorpusArguments) -> dict[str, Any]:
    """What identifies the text of a run, wherever it lies.

    Args:
        options: a prepared corpus, or files.

    Returns:
        Digests, and how files are split and read.
    """
    if options.corpus is not None:
        manifest = StoredCorpus(options.corpus, verify=False).manifest
        shards = [entry["sha256"] for split in ("train", "validation") for entry in manifest["shards"][split]]
        return {"corpus": hashlib.sha256(" ".join(shards).encode()).hexdigest()}
    digests = {name: [file_digest(Path(file)) for file in getattr(options, name)] for name in FILES}
    return {**digests, "validation_fraction": options.validation_fraction, "text_column": options.text_column}


def build_corpus_beside(
    options: CorpusArguments, output_dir: str, progress: bool, tokenizer_name: str | None = None
) -> str:
    """Prepare text files beside the run's folder; later starts find the corpus there.

    Args:
        options: `train_file`, `validation_file` and how to split and tokenize.
        output_dir: the run's folder.
        progress: show progress bars.
        tokenizer_name: the run's tokenizer; a corpus of other text or settings is then replaced. None trains one and
            drops duplicates; the tokenizer belongs to the run then, and another corpus is refused.

    Returns:
        The corpus's folder, OUTPUT_DIR-corpus: what is pushed or copied of a run is then not its text.

    Raises:
        ValueError: for text or a tokenizer that cannot be read, too little text, or another corpus in the folder.
    """
    run = Path(output_dir).absolute()
    folder = run.with_name(f"{run.name}-corpus")
    train, held_out = (
        [LocalFile(Path(name), options.text_column) for name in names]
        for names in (options.train_file, options.validation_file)
    )
    settings = CorpusSettings(
        options.max_seq_length,
        options.validation_fraction,
        deduplicate=tokenizer_name is None,
        tokenizer_name=tokenizer_name,
        vocab_size=options.vocab_size,
    )
    build_corpus(train, held_out, settings, folder, progress, replace=tokenizer_name is not None)
    return str(folder)


def load_pretraining_data(
    options: CorpusArguments,
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    vocab_size: int,
    seed: int,
) -> PretrainingData:
    """Open a prepared corpus and mask what is held out.

    Args:
        options: the corpus and its shapes.
        tokenizer: the one it was made with.
        batch_size: sequences per full optimiser step, over all devices.
        vocab_size: V of the model, for the unigram baseline.
        seed: for the masks.

    Returns:
        The data.

    Raises:
        ValueError: if the corpus is damaged or was made otherwise, is smaller than one batch, or has no held-out
            sequence.
    """
    collator = MaskedLanguageModelCollator(tokenizer, options.mlm_probability, seed)
    train, held_out, counts, sources = _open_prepared(options, tokenizer, vocab_size)
    if len(train) < batch_size:
        raise ValueError(
            f"the corpus is smaller than one batch: it gives {len(train)} sequences of {options.max_seq_length} "
            f"tokens, and one step takes {batch_size}"
        )
    # Fixed seed: runs with other seeds are compared on the same held-out positions.
    fixed = MaskedLanguageModelCollator(tokenizer, options.mlm_probability, seed=0)
    held = MaskedSequences(held_out, fixed)
    return PretrainingData(train, held, collator, unigram_loss(counts, held.labels), sources)


def _open_prepared(options: CorpusArguments, tokenizer: "PreTrainedTokenizerBase", vocab_size: int):
    corpus = StoredCorpus(options.corpus, options.verify_corpus)
    if corpus.seq_length != options.max_seq_length:
        raise ValueError(
            f"the corpus in {options.corpus!r} has sequences of {corpus.seq_length} tokens; "
            f"max_seq_length is {options.max_seq_length}"
        )
    counts = corpus.token_counts()
    if len(counts) != len(tokenizer):
        raise ValueError(
            f"the corpus in {options.corpus!r} was made with a tokenizer of {len(counts)} entries; "
            f"this one has {len(tokenizer)}"
        )
    counts = np.pad(counts, (0, vocab_size - len(counts)))
    sources = corpus.manifest["sources"]["train"]
    held_out = corpus.sequences("validation", options.max_eval_samples)
    return corpus.sequences("train"), held_out, counts, sources
