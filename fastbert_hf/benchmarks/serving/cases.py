"""What is sent to an encoder: batches of one length, and sentences of mixed lengths padded to the longest."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# tokens, special ones included, of the first 32 sentences of STS-B's validation split in BERT's uncased vocabulary
SENTENCE_TOKENS = (
    11, 12, 9, 9, 11, 10, 9, 9, 11, 13, 11, 11, 10, 9, 10, 10, 10, 9, 9, 8, 8, 9, 8, 8, 9, 10, 8, 9, 8, 7, 9, 9,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A batch of token ids.

    Attributes:
        name: "texts x tokens", or what the texts are.
        ids, mask: (B, T) int64; the mask is zero at padding.
    """

    name: str
    ids: Tensor
    mask: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())


def fixed(texts: int, tokens: int, vocabulary: int) -> Case:
    """A batch without padding, of random ids that are no special tokens."""
    return Case(f"{texts} x {tokens}", _random_ids(texts, tokens, vocabulary), torch.ones(texts, tokens).long())


def mixed(vocabulary: int, lengths: tuple[int, ...] = SENTENCE_TOKENS) -> Case:
    """Random ids in texts of these lengths, padded to the longest."""
    places = torch.arange(max(lengths))
    mask = (places < torch.tensor(lengths)[:, None]).long()
    ids = _random_ids(len(lengths), max(lengths), vocabulary) * mask
    return Case(f"{len(lengths)} sentences", ids, mask)


def sentences(texts: list[str], tokenizer: PreTrainedTokenizerBase, longest: int, count: int = 32) -> Case:
    """The first `count` texts, padded to the longest of them, none longer than `longest` tokens."""
    texts = texts[:count]
    batch = tokenizer(texts, truncation=True, max_length=longest, padding=True, return_tensors="pt")
    return Case(f"{len(texts)} sentences", batch["input_ids"], batch["attention_mask"])


def _random_ids(texts: int, tokens: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(1000, vocabulary // 2), vocabulary, (texts, tokens), generator=generator)
