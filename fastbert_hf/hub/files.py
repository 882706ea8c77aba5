"""The files of a repository: which are safe to take, what they must hash to, and the model in them."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import RepoFile
from transformers import AutoConfig
from transformers.utils import logging

import fastbert_hf
from fastbert_hf.checkpoint_fastbert import misfits, read_json
from fastbert_hf.configuration_fastbert import AUTO_MAP, FastBertConfig
from fastbert_hf.files import file_digest, git_digest
from fastbert_hf.hub.weights import check_weight_names, check_weights, stored_shapes
from fastbert_hf.modeling_fastbert import FastBertPreTrainedModel
from fastbert_hf.published_layout import MODEL_TYPE

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
MOST_POSITIONS = 1 << 24  # fixed positions are not stored, but a table of them is made
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
MODEL_CLASSES = (
    "FastBertModel",
    "FastBertForMaskedLM",
    "FastBertForSequenceClassification",
    "FastBertForTokenClassification",
    "FastBertForQuestionAnswering",
    "FastBertForMultipleChoice",
)


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


def checksum(file: Path, kind: str) -> str:
    """The "sha256" of a file, or its "git" name."""
    return git_digest(file) if kind == "git" else file_digest(file)


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
    config = read_json(file)
    model_type = config.get("model_type")
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
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else str(names)
    if config["model_type"] == MODEL_TYPE:
        classifier = "SequenceClassification" in name
        name = "FastBertForSequenceClassification" if classifier else "FastBertForMaskedLM"
    if name not in MODEL_CLASSES:
        raise ValueError(f"config.json has architectures {name!r}; expected one of {', '.join(MODEL_CLASSES)}")
    return getattr(fastbert_hf, name)


def load_model(folder: Path) -> FastBertPreTrainedModel:
    """Load the model of a folder, whole: from safetensors, with the package's own code, in evaluation mode.

    Raises:
        ValueError: not a FastBERT, weights only as pickles, damaged or outside the folder, or tensors that do not fit
            the configuration.
    """
    content = read_config(folder)
    check_weight_names((path.name for path in folder.iterdir()), str(folder))
    check_weights(folder)
    architecture = model_class(content)
    with _about(folder):
        config = AutoConfig.from_pretrained(folder)
        config.auto_map = dict(
            AUTO_MAP
        )  # whatever code the folder names: the package's own is what runs and is saved
        check_sizes(architecture, config, folder)
        model, info = architecture.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
        )
        problems = misfits(model, info, (), replace_mismatched=False)
        if problems:
            raise ValueError(f"the tensors in {folder} do not fit its config.json: {'; '.join(problems)}")
    return model.eval()


@contextmanager
def _about(folder: Path) -> Iterator[None]:
    """Raise whatever configuration and weights of a folder make the library raise as a ValueError of one line."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of tensors that do not fit: the error names them
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"no model can be built from {folder}: {type(error).__name__}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)


def check_sizes(architecture: type[FastBertPreTrainedModel], config: FastBertConfig, folder: Path) -> None:
    """Check, before memory is taken, that a configuration describes no more than a folder's weights hold.

    Args:
        architecture: the class that is to be built.
        config: read from config.json.
        folder: holds the weights.

    Raises:
        ValueError: naming the first size that is too large, or the number of values.
    """
    shapes = stored_shapes(folder)
    stored = sum(math.prod(shape) for shape in shapes.values())
    limits = {"num_hidden_layers": len(shapes)} | dict.fromkeys(("vocab_size", "hidden_size"), stored)
    limits |= dict.fromkeys(("fff_trees",) if config.ffn_type == "fff" else ("intermediate_size",), stored)
    fixed_positions = config.position_embedding_type == "scaled_sinusoidal"
    limits |= {"type_vocab_size": stored, "max_position_embeddings": MOST_POSITIONS if fixed_positions else stored}
    for name, most in limits.items():
        value = getattr(config, name)
        if value > most:
            held = f"the weights hold {len(shapes)} tensors of {stored} values"
            raise ValueError(f"config.json in {folder} has {name} {value}; expected at most {most}: {held}")
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in architecture(config).parameters())
    if parameters > stored:
        raise ValueError(f"config.json in {folder} describes {parameters} values; the weights hold {stored}")


@torch.no_grad()
def sample_outputs(model: FastBertPreTrainedModel) -> list[torch.Tensor]:
    """All outputs of a model for the same random tokens every time; one row is padded."""
    config = model.config
    length = min(16, config.longest_sequence)
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
