"""Look inside a model: a page that shows which leaf each token takes in each layer, how surely, and what else does.

    fastbert look --model_name_or_path runs/fast-minilm --text "A man is playing a guitar." --train_file text.txt \\
        --output page.html

The page is one file without any other: it opens in every browser, offline.
"""

import random
from pathlib import Path

from transformers import AutoModel

import fastbert_hf  # noqa: F401  registers FastBERT with the Auto classes
from fastbert_hf.cli.arguments import CommandParser
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.look import look_inside, render_page
from fastbert_hf.training.distillation.teacher import model_folder
from fastbert_hf.training.distillation.texts import check_text_files, read_texts


def main(argv: list[str] | None = None) -> Path:
    """Parse, look, write the page."""
    parser = CommandParser(prog="fastbert look", description=__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="model with trees: a folder, or NAME on the Hub")
    parser.add_argument("--text", nargs="+", required=True, help="what is shown token by token; one or more texts")
    parser.add_argument("--train_file", nargs="+", default=[], help="texts that the usage of leaves is counted on")
    parser.add_argument("--max_texts", type=int, default=1000, help="texts of each file, drawn at random")
    parser.add_argument("--max_seq_length", type=int, default=128, help="longer texts are cut")
    parser.add_argument("--output", type=Path, default=Path("page.html"), help="the page; default: page.html")
    options = parser.parse_args(argv)
    for name in ("max_texts", "max_seq_length"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; expected at least 1")
    if not options.output.absolute().parent.is_dir():
        raise ValueError(f"--output is {str(options.output)!r}; expected a file in a folder that exists")
    check_text_files(options.train_file)
    texts = read_texts(options.train_file, options.max_texts, random.Random(0))
    name = options.model_name_or_path
    folder = model_folder(name)
    tokenizer, model = load_tokenizer(folder), AutoModel.from_pretrained(folder).eval()
    found = look_inside(model, tokenizer, options.text, texts, options.max_seq_length)
    source = f"{len(texts)} texts of {', '.join(Path(file).name for file in options.train_file)}" if texts else None
    page = render_page(found, Path(name).absolute().name if Path(name).is_dir() else name, source)
    options.output.write_text(page, encoding="utf-8")
    print(f"{options.output}: {len(page.encode()) / 1e3:.0f} kB, {len(found['layers'])} layers")
    return options.output
