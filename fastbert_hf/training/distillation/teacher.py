"""Teachers: a BERT, RoBERTa, DistilBERT or dense FastBERT, with what turns it into a sentence embedder."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import fastbert_hf
from fastbert_hf.configuration_fastbert import FastBertConfig
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.extras import require_extra
from fastbert_hf.files import file_digest
from fastbert_hf.hub.embedder import embedder_files, is_embedder, module_paths
from fastbert_hf.modeling_fastbert import FastBertModel, FastBertPreTrainedModel
from fastbert_hf.training.distillation.objective import Embed
from fastbert_hf.training.distillation.student import encoder_of
from fastbert_hf.training.start_from_data import dense_feed_forward


@dataclass(frozen=True)
class Teacher:
    """What a student learns from.

    Attributes:
        folder: where its files are. model: as a dense FastBERT, float32. tokenizer: its own.
        embed: for sentence embedders, from the last hidden states and the mask to embeddings; otherwise None.
        max_seq_length: tokens of the longest text that it is meant for.
        prompt: what a sentence embedder puts before every text unless it is told otherwise, `default_prompt_name`.
    """

    folder: Path
    model: FastBertPreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    embed: Embed | None
    max_seq_length: int
    prompt: str = ""

    @property
    def encoder(self) -> FastBertModel:
        """The model without its head."""
        return encoder_of(self.model)


def model_folder(name: str) -> Path:
    """The folder of a model; one on the Hub is downloaded first, without weights in other formats than safetensors.

    Raises:
        ValueError: neither a folder nor a repository that can be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.txt", "*.model", "*.safetensors", "*/config.json", "README.md"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["onnx/*", "openvino/*"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"no model folder {name!r}, and none on the Hub: {reason}") from error


def load_teacher(name: str) -> Teacher:
    """Load a model as a dense FastBERT, with the head that its configuration names.

    Args:
        name: folder or Hub name. A folder with modules.json is a model of sentence-transformers.

    Raises:
        ValueError: as `load_model`, and feed-forward layers that are not plain dense ones.
        MissingExtraError: a sentence embedder, without sentence-transformers.
    """
    teacher = load_model(name)
    dense_feed_forward(teacher.encoder)
    return teacher


def load_model(name: str) -> Teacher:
    """As `load_teacher`, with feed-forward layers of any form.

    Raises:
        ValueError: no such model, a form of model or head that FastBERT does not have, no tokenizer.
        MissingExtraError: a sentence embedder, without sentence-transformers.
    """
    folder = model_folder(name)
    with_modules = is_embedder(folder)
    if with_modules:
        require_extra("embedding")
        first = module_paths(folder)[0]
        if first:
            raise ValueError(f"the transformer of {name!r} lies in its folder {first!r}; expected it in the main one")
    try:
        config = FastBertConfig.from_pretrained(folder)
        found = model_class(config, stored_architectures(folder), with_modules)
        model = found.from_pretrained(folder, config=config, dtype=torch.float32)  # weights may be stored in 16 bits
    except OSError as error:
        raise ValueError(f"no model can be loaded from {name!r}: {str(error).strip().splitlines()[0]}") from error
    tokenizer = load_tokenizer(folder)
    longest = min(config.longest_sequence, tokenizer.model_max_length)
    if not with_modules:
        return Teacher(folder, model.eval(), tokenizer, None, longest)
    embed, own_longest, prompt = _embedding_of(folder, config.hidden_size, tokenizer)
    return Teacher(folder, model.eval(), tokenizer, embed, min(longest, own_longest or longest), prompt)


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a teacher's products are fast on a device: bfloat16 where there are such products.

    Emulated products are slower than those of float32.
    """
    if device.type == "cuda":
        has_products = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_products = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # AMX has these as well
    return torch.bfloat16 if has_products else torch.float32


def stored_architectures(folder: Path) -> list[str]:
    """The classes that a model folder's configuration names."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []


def model_class(
    config: FastBertConfig, stored: list[str], is_embedder: bool = False
) -> type[FastBertPreTrainedModel]:
    """The class that a configuration names; the encoder alone for embedders and where none is named.

    Args:
        config: translated. stored: the names before that.

    Raises:
        ValueError: a head that cannot be distilled.
    """
    if is_embedder or not stored:
        return FastBertModel
    found = getattr(fastbert_hf, config.architectures[0], None) if config.architectures else None
    if found is None or found is fastbert_hf.FastBertForMultipleChoice:
        raise ValueError(
            f"the model is a {stored[0]}, which cannot be distilled; its encoder can, saved without the head"
        )
    return found


def _embedding_of(
    folder: Path, hidden_size: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Embed, int | None, str]:
    """What a model of sentence-transformers does with hidden states, its longest text in tokens, its default prompt.

    Raises:
        ValueError: its modules cannot be loaded, or need something else than hidden states and mask.
    """
    from sentence_transformers import SentenceTransformer

    def embed(hidden: Tensor, mask: Tensor) -> Tensor:
        modules.to(hidden.device)
        features = {"token_embeddings": hidden, "attention_mask": mask, **about_prompt}
        for module in modules:
            features = module(features)
        return features["sentence_embedding"]

    try:
        embedder = SentenceTransformer(str(folder), device="cpu")
        prompt = embedder.prompts[embedder.default_prompt_name] if embedder.default_prompt_name else ""
        about_prompt = {"prompt_length": _prompt_length(tokenizer, prompt)} if prompt else {}
        modules = nn.ModuleList(list(embedder)[1:]).float().eval().requires_grad_(False)
        embed(torch.zeros(1, 2, hidden_size), torch.ones(1, 2, dtype=torch.int64))
    except Exception as error:  # modules are of any kind
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise ValueError(f"the modules of {str(folder)!r} cannot be used: {reason}") from error
    return embed, embedder.max_seq_length, prompt


def _prompt_length(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """Tokens of a prompt before a text, which some poolings leave out, as sentence-transformers counts them."""
    ids = tokenizer(prompt)["input_ids"]
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)


def embedder_digest(folder: Path) -> str:
    """What identifies pooling, normalisation, prompts and further layers of an embedder; of others, no files."""
    digest = hashlib.sha256()
    for path in embedder_files(folder):
        digest.update(f"{path} {file_digest(folder / path)}\n".encode())
    return digest.hexdigest()


def copy_embedder(source: Path, target: Path) -> None:
    """Copy what makes a folder a model of sentence-transformers: pooling, normalisation, prompts, longest text."""
    for path in embedder_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)
