# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""Checks of what a caller passes to a model: shapes, and ids beyond the table that they index.

A shape that PyTorch would broadcast, or index with, is refused: it would give numbers that belong to other tokens.
Shapes are compared without reading data, so the checks hold in compiled and exported models too. Ids are not read
beforehand: on a CPU the lookup itself fails and the error is then put in words, on an accelerator nothing waits for
the device, and its own assertion ends the process.
Sizes: B batch, T tokens, H hidden.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def check_shape(name: str, tensor: Tensor, *expected: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless the tensor has one of the expected shapes.

    Args:
        name: the argument's name. tensor: its value.
        expected: the shapes that are allowed.
        meaning: the same shapes in letters, for the message.
    """
    if not any(tensor.shape == shape for shape in expected):
        allowed = " or ".join(str(tuple(shape)) for shape in expected)
        raise ValueError(f"{name} of shape {tuple(tensor.shape)}; expected {allowed}, {meaning}")


def check_rows(name: str, ids: Tensor, batch: int, tokens: int) -> None:
    """Raise ValueError unless ids for a (B, T) batch are (T,), (1, T) or (B, T): another B would be broadcast."""
    fits = ids.dim() in (1, 2) and ids.shape[-1] == tokens
    if fits and ids.dim() == 2 and ids.shape[0] != batch:
        fits = isinstance(ids.shape[0], int) and ids.shape[0] == 1  # a size that export keeps open is not asked
    if not fits:
        raise ValueError(
            f"{name} of shape {tuple(ids.shape)}; expected {(tokens,)} or {(batch, tokens)}, (T,) or (B, T)"
        )


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, hidden_size: int) -> None:
    """Raise ValueError unless exactly one of input_ids (B, T), integers, and inputs_embeds (B, T, H) is given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("expected exactly one of input_ids and inputs_embeds")
    if input_ids is not None and (input_ids.dim() != 2 or input_ids.is_floating_point()):
        raise ValueError(
            f"input_ids of shape {tuple(input_ids.shape)} and {input_ids.dtype}; expected (B, T), integers"
        )
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != hidden_size):
        raise ValueError(
            f"inputs_embeds of shape {tuple(inputs_embeds.shape)}; expected (B, T, H) with H = {hidden_size}"
        )


def check_mask(attention_mask: Tensor, batch: int, tokens: int) -> None:
    """Raise ValueError unless a mask of fewer than four dimensions is (B, T) or (B, T, T).

    The library picks a mask's rows by number: of one with more rows than the batch it would use the first ones.
    """
    shape = attention_mask.shape
    if attention_mask.dim() == 2:
        fits = shape == (batch, tokens)
    else:
        fits = attention_mask.dim() == 3 and shape[1:] == (tokens, tokens)  # (1, T, T) is broadcast
    if not fits:
        raise ValueError(
            f"attention_mask of shape {tuple(shape)}; expected (B, T) or (B, T, T) with B = {batch} and T = {tokens}"
        )


def look_up(name: str, table: nn.Module | Tensor, ids: Tensor, size_name: str) -> Tensor:
    """The rows of an embedding table: ids (...) -> (..., H).

    Args:
        name: the argument that holds the ids, for the message.
        table: an embedding, or its weight (n, H). size_name: what the configuration calls n.
    Raises:
        ValueError: an id below 0 or not below n, on a CPU; it names the first one, its place and n.
    """
    try:
        return nn.functional.embedding(ids, table) if isinstance(table, Tensor) else table(ids)
    except IndexError as error:
        size = (table if isinstance(table, Tensor) else table.weight).shape[0]
        raise _out_of_range(name, ids, size, size_name) or error from None


def check_sequence_labels(labels: Tensor, batch: int, num_labels: int, problem_type: str | None) -> None:
    """Raise ValueError unless labels of whole sequences have the shape that their problem type needs.

    Regression with one output and single-label classification: (B,) or (B, 1). Otherwise (B, num_labels).
    """
    if problem_type is None and num_labels > 1:  # as the library's loss decides
        one_value = labels.dtype in (torch.long, torch.int)
    else:
        one_value = problem_type == "single_label_classification" or num_labels == 1
    if one_value:
        meaning = "(B,) or (B, 1)"
        if num_labels > 1 and problem_type is None:
            meaning += " for integers; to choose several classes at once give float labels, (B, num_labels)"
        check_shape("labels", labels, (batch,), (batch, 1), meaning=meaning)
    else:
        check_shape("labels", labels, (batch, num_labels), meaning="(B, num_labels)")


def class_loss(loss: Callable[[], Tensor], labels: Tensor, classes: int, classes_name: str) -> Tensor:
    """What `loss()` returns.

    Args:
        loss: computes a cross-entropy. labels: what its targets come from.
        classes: how many there are. classes_name: what the configuration calls their number.
    Raises:
        ValueError: a label that is neither a class nor -100, on a CPU; it names the first one and its place.
    """
    try:
        return loss()
    except IndexError as error:
        raise _out_of_range("labels", labels, classes, classes_name, ignored=-100) or error from None


def _out_of_range(name: str, ids: Tensor, size: int, size_name: str, ignored: int | None = None) -> ValueError | None:
    wrong = (ids < 0) | (ids >= size)
    if ignored is not None:
        wrong &= ids != ignored
    if not wrong.any():
        return None
    place = wrong.nonzero()[0].tolist()
    allowed = f"0 to {size - 1}" if ignored is None else f"0 to {size - 1}, or {ignored}"
    return ValueError(f"{name}{place} is {ids[tuple(place)].item()}; expected {allowed} ({size_name} is {size})")


__all__ = [
    "check_inputs",
    "check_mask",
    "check_rows",
    "check_sequence_labels",
    "check_shape",
    "class_loss",
    "look_up",
]
