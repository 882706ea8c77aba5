"""The files of a repository: which are safe to take, what they must hash to, and the model in them."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import RepoFile
from transformers import AutoConfig

import fastbert_hf
from fastbert_hf.configuration_fastbert import AUTO_MAP
from fastbert_hf.crammed import MODEL_TYPE
from fastbert_hf.modeling_fastbert import FastBertPreTrainedModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")  # formats that can run code when opened
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
MODEL_CLASSES = (
    "FastBertModel",
    "FastBertForMaskedLM",
    "FastBertForSequenceClassification",
    "FastBertForTokenClassification",
    "FastBertForQuestionAnswering",
    "FastBertForMultipleChoice",
)


def is_pickled(path: str) -> bool:
    """Whether a file name is that of a format which can run code when it is opened."""
    return PurePosixPath(path).suffix.lower() in PICKLED


def check_paths(paths: Iterable[str], repo: str) -> None:
    """Check that every file of a repository stays inside the folder it is written to.

    Args:
        paths: as the Hub lists them.
        repo: named in the message.

    Raises:
        ValueError: an absolute path, one with "..", or one that means something else on another system.
    """
    seen = set()
    for path in paths:
        windows = PureWindowsPath(path)
        parts = path.split("/")
        outside = ".." in parts or "" in parts or "." in parts or "\\" in path or "\0" in path
        if outside or windows.drive or windows.is_absolute() or parts[0] == ".git":
            raise ValueError(
                f"{repo} lists the file {path!r}, which would leave the target folder; nothing was taken"
            )
        if path.lower() in seen:
            raise ValueError(f"{repo} lists {path!r} twice, in upper and lower case; nothing was taken")
        seen.add(path.lower())


def check_weights(paths: Iterable[str], where: str) -> None:
    """Check that weights are there in a format that is only data.

    Raises:
        ValueError: no safetensors file; if there are pickles, with the reason why they are not read.
    """
    names = set(paths)
    if names & {WEIGHTS, INDEX}:
        return
    pickles = sorted(name for name in names if is_pickled(name))
    if pickles:
        raise ValueError(
            f"{where} has its weights in {pickles[0]} only: a pickle, which can run code when it is opened, so it is "
            f"never read here; expected {WEIGHTS} (its owner can convert it)"
        )
    raise ValueError(f"{where} holds no weights; expected {WEIGHTS}")


def checksum(file: Path, kind: str) -> str:
    """The "sha256" of a file, or its "git" name: the SHA-1 of its content behind git's header."""
    digest = hashlib.sha256()
    if kind == "git":
        digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def expected_checksum(entry: RepoFile) -> tuple[str, str]:
    """What the Hub says a file hashes to: (kind, checksum) for `checksum`."""
    return ("sha256", entry.lfs.sha256) if entry.lfs is not None else ("git", entry.blob_id)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json, which must be that of a model this package loads.

    Raises:
        ValueError: it is missing, is not JSON, or describes another kind of model.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"no model in {str(folder)!r}: config.json is missing")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is not a JSON object: {error}") from error
    if model_type not in ("fastbert", MODEL_TYPE):
        raise ValueError(f"{str(file)!r} has model_type {model_type!r}; expected 'fastbert' or {MODEL_TYPE!r}")
    return config


def model_class(config: dict[str, Any]) -> type[FastBertPreTrainedModel]:
    """The class whose weights a repository holds.

    Args:
        config: the content of config.json.

    Raises:
        ValueError: `architectures` names none of ours.
    """
    name = str((config.get("architectures") or [""])[0])
    if config["model_type"] == MODEL_TYPE:
        classifier = "SequenceClassification" in name
        name = "FastBertForSequenceClassification" if classifier else "FastBertForMaskedLM"
    if name not in MODEL_CLASSES:
        raise ValueError(f"config.json has architectures {name!r}; expected one of {', '.join(MODEL_CLASSES)}")
    return getattr(fastbert_hf, name)


def load_model(folder: Path) -> FastBertPreTrainedModel:
    """Load the model of a folder, whole: from safetensors, with the package's own code, in evaluation mode.

    Raises:
        ValueError: not a FastBERT, weights only as pickles, or tensors that do not fit the configuration.
    """
    config = read_config(folder)
    check_weights((path.name for path in folder.iterdir()), str(folder))
    native = AutoConfig.from_pretrained(folder)
    native.auto_map = dict(AUTO_MAP)  # whatever code the folder names: the package's own is what runs and is saved
    model, info = model_class(config).from_pretrained(
        folder, config=native, output_loading_info=True, local_files_only=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = ", ".join(sorted(str(entry) for entry in info[kind])[:5])
            raise ValueError(f"{folder}: {kind.replace('_', ' ')} {names}; expected exactly the model's tensors")
    return model.eval()


@torch.no_grad()
def sample_outputs(model: FastBertPreTrainedModel) -> list[torch.Tensor]:
    """All outputs of a model for the same random tokens every time; one row is padded."""
    config = model.config
    length = min(16, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(config.vocab_size, (4, length), generator=generator)  # (B, T)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, (length + 1) // 2 :] = 0
    if type(model).__name__.endswith("MultipleChoice"):
        input_ids, attention_mask = input_ids.view(2, 2, length), attention_mask.view(2, 2, length)
    outputs = model(input_ids, attention_mask, output_hidden_states=True)
    return [*outputs.hidden_states, *(value for value in outputs.values() if isinstance(value, torch.Tensor))]


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """The maximal absolute difference of outputs; infinite if their shapes differ, NaN if either holds one."""
    if [value.shape for value in first] != [value.shape for value in second]:
        return float("inf")
    return torch.stack([(a.double() - b.double()).abs().max() for a, b in zip(first, second)]).max().item()


def readable_size(size: int) -> str:
    """A number of bytes for people: 1.2 kB, 755.4 MB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size} B"
        size /= 1000
    return f"{size:.2f} GB"
