"""The masked-language-model rule with a fixed number of masked positions per batch."""

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100


def check_probability(probability: float) -> None:
    """Check a fraction of positions to predict.

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
    per_sequence: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose exactly round(probability * B * T) positions and apply the 80/10/10 rule to them.

    The number is the same in every batch of one shape, so shapes after sparse prediction are static. Of the
    chosen positions 80 % become [MASK], 10 % a random token, 10 % stay; these counts are exact as well.

    Args:
        input_ids: (B, T) int64.
        special_ids: (k,) ids that are never chosen and never inserted.
        mask_token_id: id of [MASK].
        vocab_size: V; random tokens are drawn from the ids below it.
        probability: fraction of all positions.
        generator: source of randomness.
        per_sequence: choose round(probability * T) positions in every sequence; 80/10/10 still holds over the batch.

    Returns:
        Masked input ids and labels, both (B, T) int64; labels are -100 where nothing is predicted.

    Raises:
        ValueError: if the batch, or a sequence of it, has fewer ordinary tokens than positions to choose.
    """
    known = torch.ones(vocab_size, dtype=torch.bool)
    known[special_ids[special_ids < vocab_size]] = False
    ordinary = known[input_ids]  # (B, T)
    groups = ordinary if per_sequence else ordinary.reshape(1, -1)  # (B, T) or (1, B*T)
    count = round(probability * groups.shape[1])
    fewest = int(groups.sum(dim=1).min())
    if fewest < count:
        raise ValueError(
            f"cannot mask {count} positions ({probability:g} of {groups.shape[1]}): "
            f"only {fewest} tokens of the {'sequence' if per_sequence else 'batch'} are not special tokens"
        )
    chosen = torch.cat(
        [
            row * groups.shape[1] + places[torch.randperm(len(places), generator=generator)[:count]]
            for row, places in enumerate(group.nonzero().squeeze(1) for group in groups)
        ]
    )  # (B*count,) or (count,), positions in the flat batch
    if per_sequence:
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    flat = input_ids.reshape(-1).clone()  # (B, T) -> (B*T,)
    labels = torch.full_like(flat, IGNORE_INDEX)
    labels[chosen] = flat[chosen]
    masked, replaced = round(0.8 * len(chosen)), round(0.1 * len(chosen))
    flat[chosen[:masked]] = mask_token_id
    allowed = known.nonzero().squeeze(1)
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
        probability: fraction of positions to predict.
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

    def __call__(
        self, examples: Sequence[dict[str, torch.Tensor]] | dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Collate B sequences of T tokens.

        Args:
            examples: B times {"input_ids": (T,)}, or {"input_ids": (B, T)}; examples with "labels" (T,) beside the
                ids are masked already and stay as they are.

        Returns:
            {"input_ids": (B, T), "labels": (B, T)}, int64.
        """
        if isinstance(examples, dict):
            return self.mask(examples["input_ids"])
        if "labels" in examples[0]:
            return {key: torch.stack([example[key] for example in examples]) for key in ("input_ids", "labels")}
        return self.mask(torch.stack([example["input_ids"] for example in examples]))  # (B, T)

    def mask(self, input_ids: torch.Tensor, per_sequence: bool = False) -> dict[str, torch.Tensor]:
        """Mask a batch.

        Args:
            input_ids: (B, T) int64.
            per_sequence: see `mask_tokens`.

        Returns:
            {"input_ids": (B, T), "labels": (B, T)}, int64.
        """
        # 32 bits for both: torch's CPU generator ignores the upper half of a seed.
        generator = torch.Generator().manual_seed(zlib.crc32(input_ids.numpy().tobytes(), self.seed % 2**32))
        vocabulary = (self.special_ids, self.mask_token_id, self.vocab_size)
        input_ids, labels = mask_tokens(input_ids, *vocabulary, self.probability, generator, per_sequence)
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
        rows = [sequences[index]["input_ids"] for index in range(len(sequences))]
        masked = collator.mask(torch.stack(rows), per_sequence=True)
        self.input_ids, self.labels = masked["input_ids"], masked["labels"]  # (S, T)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One masked sequence: {"input_ids": (T,), "labels": (T,)}, int64."""
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}
