"""Train a WordPiece tokenizer.

fastbert tokenizer --train_file corpus.txt --output_dir runs/tokenizer --vocab_size 4096
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from fastbert_hf.cli.arguments import RecipeArgumentParser
from fastbert_hf.data.readers import read_documents
from fastbert_hf.data.tokenizer import save_tokenizer, train_wordpiece
from fastbert_hf.files import check_output_folder


@dataclass
class TokenizerArguments:
    """Options of this command."""

    train_file: list[str] = field(metadata={"help": "text files (.txt, also .gz, .xz or .zst), one document a line"})
    output_dir: str = field(metadata={"help": "folder that AutoTokenizer will load"})
    vocab_size: int = field(default=32768, metadata={"help": "entries, the five special tokens included"})
    lowercase: bool = field(default=True, metadata={"help": "lower the case and strip accents"})
    model_max_length: int = field(default=128, metadata={"help": "length that truncation cuts to"})
    min_frequency: int = field(default=2, metadata={"help": "a pair seen less often is not merged"})


def main(argv: list[str] | None = None) -> Path:
    """Train and save; returns the tokenizer's folder."""
    (options,) = RecipeArgumentParser(
        TokenizerArguments, extra="training", prog="fastbert tokenizer", description=__doc__
    ).parse(argv)
    output_dir = check_output_folder(options.output_dir)
    tokenizer = train_wordpiece(
        read_documents(options.train_file),
        options.vocab_size,
        options.lowercase,
        options.model_max_length,
        options.min_frequency,
        progress=sys.stderr.isatty(),
    )
    save_tokenizer(tokenizer, output_dir)
    print(f"{len(tokenizer)} entries in {output_dir}")
    return output_dir
