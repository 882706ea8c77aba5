"""Training, saving and loading WordPiece tokenizers with BERT's normalisation."""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fastbert_hf.data.pieces import pieces
from fastbert_hf.files import staged_folder

if TYPE_CHECKING:
    from tokenizers.normalizers import Normalizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4


def train_wordpiece(
    documents: Iterable[str],
    vocab_size: int = 32768,
    lowercase: bool = True,
    model_max_length: int = 128,
    min_frequency: int = 2,
    progress: bool = False,
) -> "PreTrainedTokenizerFast":
    """Train a WordPiece tokenizer.

    Args:
        documents: training text.
        vocab_size: wanted entries, the five special tokens included. A small corpus can give fewer.
        lowercase: lower the case and strip accents, as bert-base-uncased does.
        model_max_length: sequence length that `truncation=True` cuts to.
        min_frequency: a pair seen less often is not merged.
        progress: show the progress of the tokenizers library.

    Returns:
        A fast tokenizer with [PAD]=0, [UNK]=1, [CLS]=2, [SEP]=3, [MASK]=4 that emits `input_ids`,
        `token_type_ids` and `attention_mask`.

    Raises:
        ValueError: if the corpus holds no text, or a size is too small.
    """
    if vocab_size <= 2 * len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size must be above {2 * len(SPECIAL_TOKENS)}; got {vocab_size}")
    if model_max_length < 3:
        raise ValueError(f"model_max_length must be at least 3 ([CLS], one token, [SEP]); got {model_max_length}")
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    vocabulary = _learn_vocabulary(documents, normalizer, vocab_size, min_frequency, progress)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    cls_id, sep_id = SPECIAL_TOKENS.index("[CLS]"), SPECIAL_TOKENS.index("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls_id), ("[SEP]", sep_id)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _learn_vocabulary(
    documents: Iterable[str], normalizer: "Normalizer", vocab_size: int, min_frequency: int, progress: bool
) -> dict[str, int]:
    """Learn word pieces, the same in every run: token -> id."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    documents = [piece for document in documents for piece in pieces(document)]  # read twice below
    # Every character costs up to two entries: rare ones must not eat a small vocabulary.
    alphabet = _alphabet(documents, normalizer, limit=min(1000, max(64, vocab_size // 16)))
    if not alphabet:
        raise ValueError("the tokenizer cannot be trained: the corpus is empty")
    draft = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    draft.normalizer = normalizer
    draft.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers inner characters in the order of a hash table, which also decides ties between merges;
    # naming them beforehand makes the vocabulary the same in every run.
    inner = [f"##{character}" for character in alphabet if not _is_punctuation(character)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *inner],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=progress,
    )
    draft.train_from_iterator(documents, trainer)
    return draft.get_vocab()


def _alphabet(documents: Iterable[str], normalizer: "Normalizer", limit: int) -> list[str]:
    """The most frequent characters of the normalised text, ties broken by code point; sorted."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(normalizer.normalize_str(document))
    characters = [character for character in counts if not character.isspace()]
    return sorted(sorted(characters, key=lambda character: (-counts[character], character))[:limit])


def _is_punctuation(character: str) -> bool:
    """Whether BERT's pre-tokenizer makes this character a word of its own."""
    ascii_symbol = character.isascii() and not character.isalnum()
    return ascii_symbol or unicodedata.category(character).startswith("P")


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> None:
    """Save a tokenizer as a folder that `AutoTokenizer` loads, complete or not at all.

    Args:
        tokenizer: what to save.
        folder: where; other files in it stay.

    Raises:
        ValueError: if `folder` is a file.
    """
    with staged_folder(folder, last="tokenizer_config.json") as stage:
        tokenizer.save_pretrained(stage)


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256, in hexadecimal, of everything that decides which ids a text gets, wherever the tokenizer came from."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content |= {"truncation": None, "padding": None}  # of the last call
    else:
        content = tokenizer.get_vocab()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([content, special], sort_keys=True).encode()).hexdigest()


def load_tokenizer(name_or_path: str | Path, needs_mask: bool = False, **hub) -> "PreTrainedTokenizerBase":
    """Load a tokenizer, with one clear error instead of a chain of attempts.

    Args:
        name_or_path: folder or Hub name.
        needs_mask: also require a mask token (MLM pretraining).
        **hub: how to fetch it, as `from_pretrained` takes it: revision, cache_dir, token, trust_remote_code.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if nothing loadable is there, or a special token that BERT needs is missing.
    """
    from transformers import AutoTokenizer

    folder = Path(name_or_path)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise ValueError(f"no tokenizer in {str(folder)!r}: neither tokenizer.json nor vocab.txt is there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), **hub)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"no tokenizer can be loaded from {str(name_or_path)!r}: {reason}") from error
    wanted = ["pad_token", "cls_token", "sep_token"] + (["mask_token"] if needs_mask else [])
    missing = [name for name in wanted if getattr(tokenizer, name) is None]
    if missing:
        raise ValueError(f"the tokenizer in {str(name_or_path)!r} has no {', '.join(missing)}")
    return tokenizer
