"""The masked-language-model rule with a fixed number of masked positions per batch."""

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


def check_probability(probability: float) -> None:
    """Check a share of positions to predict.

    Raises:
        ValueError: unless it lies between 0 and 1, both excluded.
    """
    if not 0 < probability < 1:
        raise ValueError(f"mlm_probability must lie between 0 and 1, both excluded; got {probability}")


def mask_tokens(
    input_ids: torch.Tensor,
    special_ids: torch.Tensor,
    mask_token_id: int,
    vocab_size: int,
    probability: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose exactly round(probability * B * T) positions and apply the 80/10/10 rule to them.

    The number is the same in every batch of one shape, so shapes after sparse prediction are static. Of the
    chosen positions 80 % become [MASK], 10 % a random token, 10 % stay; these counts are exact as well.

    Args:
        input_ids: (B, T) int64.
        special_ids: (k,) ids that are never chosen and never inserted.
        mask_token_id: id of [MASK].
        vocab_size: V; random tokens are drawn from the ids below it.
        probability: share of all positions.
        generator: source of randomness.

    Returns:
        Masked input ids and labels, both (B, T) int64; labels are -100 where nothing is predicted.

    Raises:
        ValueError: if the batch has fewer ordinary tokens than positions to choose.
    """
    flat = input_ids.reshape(-1).clone()  # (B, T) -> (B*T,)
    count = round(probability * flat.numel())
    ordinary = (~torch.isin(flat, special_ids)).nonzero().squeeze(1)
    if len(ordinary) < count:
        raise ValueError(
            f"cannot mask {count} positions ({probability:g} of {flat.numel()}): "
            f"only {len(ordinary)} tokens of the batch are not special tokens"
        )
    chosen = ordinary[torch.randperm(len(ordinary), generator=generator)[:count]]  # (count,)
    labels = torch.full_like(flat, IGNORED)
    labels[chosen] = flat[chosen]
    masked, replaced = round(0.8 * count), round(0.1 * count)
    flat[chosen[:masked]] = mask_token_id
    allowed = torch.ones(vocab_size, dtype=torch.bool)
    allowed[special_ids[special_ids < vocab_size]] = False
    allowed = allowed.nonzero().squeeze(1)
    draws = torch.randint(len(allowed), (replaced,), generator=generator)
    flat[chosen[masked : masked + replaced]] = allowed[draws]
    return flat.view_as(input_ids), labels.view_as(input_ids)


class MaskedLanguageModelCollator:
    """Stacks packed sequences and masks them.

    The choice of positions is a function of the seed and of the batch's own tokens, not of a running random
    state: a resumed run, another number of loader workers and a second process all mask a batch in the same way,
    and shuffling makes every epoch's batches, and so their masks, new.

    Args:
        tokenizer: gives the special ids, [MASK] and V.
        probability: share of positions to predict.
        seed: changes all masks.

    Raises:
        ValueError: if the probability is not between 0 and 1 or the tokenizer has no mask token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", probability: float = 0.25, seed: int = 0):
        check_probability(probability)
        if tokenizer.mask_token_id is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no mask token; MLM needs one")
        self.probability = probability
        self.seed = seed
        self.mask_token_id = tokenizer.mask_token_id
        self.vocab_size = len(tokenizer)
        # [UNK] stands for real text, and a text full of unknown characters must still have enough to mask.
        self.special_ids = torch.tensor(sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}))

    def __call__(self, examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Collate B sequences of T tokens.

        Args:
            examples: B times {"input_ids": (T,)}; with "labels" (T,) beside it, the example is masked already and
                stays as it is.

        Returns:
            {"input_ids": (B, T), "labels": (B, T)}, int64.
        """
        if "labels" in examples[0]:
            return {key: torch.stack([example[key] for example in examples]) for key in ("input_ids", "labels")}
        input_ids = torch.stack([example["input_ids"] for example in examples])  # (B, T)
        # 32 bits for both: torch's CPU generator ignores the upper half of a seed.
        generator = torch.Generator().manual_seed(zlib.crc32(input_ids.numpy().tobytes(), self.seed % 2**32))
        input_ids, labels = mask_tokens(
            input_ids, self.special_ids, self.mask_token_id, self.vocab_size, self.probability, generator
        )
        return {"input_ids": input_ids, "labels": labels}


class MaskedSequences(Dataset):
    """Held-out sequences masked once, so that every evaluation and every baseline sees the same positions.

    Each sequence has the same number of masked positions; the mean loss therefore does not depend on how
    sequences are grouped into batches.

    Args:
        sequences: the packed held-out sequences.
        collator: how to mask.
    """

    def __init__(self, sequences: Dataset, collator: MaskedLanguageModelCollator):
        batches = [collator([sequences[index]]) for index in range(len(sequences))]
        self.input_ids = torch.cat([batch["input_ids"] for batch in batches])  # (S, T)
        self.labels = torch.cat([batch["labels"] for batch in batches])  # (S, T)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One masked sequence: {"input_ids": (T,), "labels": (T,)}, int64."""
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}
