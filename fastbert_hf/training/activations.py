"""What reaches a module while a model runs over text: a bounded sample of rows, on disk."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastbert_hf.training.module_inputs import watched_inputs


class _Reached(Exception):
    """The module has its input; what comes after it need not be computed."""


class RowSample:
    """A uniform sample of rows that arrive in parts, in a file (reservoir sampling, algorithm R).

    Args:
        path: a file of max_rows * width float32; it is made, or overwritten.
        max_rows: rows kept at most.
        width: H of a row.
        seed: for the choice of rows; it depends on the order of the rows and not on how they are cut into parts.
    Attributes:
        seen: rows that have arrived.
    """

    def __init__(self, path: str | Path, max_rows: int, width: int, seed: int = 0):
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1; got {max_rows}")
        self._kept = np.memmap(path, dtype=np.float32, mode="w+", shape=(max_rows, width))
        self._draw = np.random.default_rng(seed)
        self.seen = 0

    def add(self, rows: Tensor) -> None:
        """Take part (n, H) of the rows, of any floating-point type."""
        rows = rows.detach().to("cpu", torch.float32).numpy()
        places = np.arange(self.seen, self.seen + len(rows))
        late = places >= len(self._kept)
        places[late] = self._draw.integers(0, places[late] + 1)  # row t takes a place of t + 1, most of them outside
        kept = places < len(self._kept)
        self._kept[places[kept]] = rows[kept]  # of rows with the same place the last one stays
        self.seen += len(rows)

    def rows(self) -> np.memmap:
        """(n, H) float32, n = min(seen, max_rows); it reads from the file."""
        return self._kept[: min(self.seen, len(self._kept))]


def sample_inputs(
    model: nn.Module,
    module: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    path: str | Path,
    *,
    max_rows: int = 65536,
    seed: int = 0,
) -> np.memmap:
    """Run a model over text and keep a sample of the rows that reach one of its modules.

    The model computes in evaluation mode, and nothing behind the module. Padding is left out.

    Args:
        model: takes a batch's entries as keyword arguments; `labels` are not passed on.
        module: part of the model; its first argument is (..., H).
        batches: each with `input_ids` and, where there is padding, `attention_mask` (B, T).
        path: file for the rows.
        max_rows: rows kept at most.
        seed: for their choice.

    Returns:
        (n, H) float32, n <= max_rows.

    Raises:
        ValueError: nothing reached the module.
    """
    (rows,) = sample_inputs_of_all(model, [module], batches, [path], max_rows=max_rows, seed=seed)
    return rows


@torch.no_grad()
def sample_inputs_of_all(
    model: nn.Module,
    modules: Sequence[nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    paths: Sequence[str | Path],
    *,
    max_rows: int = 65536,
    seed: int = 0,
) -> list[np.memmap]:
    """`sample_inputs` for several modules in one pass; all of them keep the same rows.

    Args:
        modules: in the order in which the model calls them. paths: one file for each.
    """
    samples: list[RowSample | None] = [None] * len(modules)
    mask: Tensor | None = None

    def take(number: int, x: Tensor) -> None:
        kept = x.reshape(-1, x.shape[-1])
        if mask is not None and mask.shape == x.shape[:-1]:
            kept = kept[mask.reshape(-1).bool()]
        if samples[number] is None:
            samples[number] = RowSample(paths[number], max_rows, x.shape[-1], seed)
        samples[number].add(kept)
        if number == len(modules) - 1:
            raise _Reached

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with watched_inputs(modules, take):
            for batch in batches:
                arguments = {name: value.to(device) for name, value in batch.items() if name != "labels"}
                mask = arguments.get("attention_mask")
                with contextlib.suppress(_Reached):
                    model(**arguments)
    finally:
        model.train(was_training)
    if any(sample is None or sample.seen == 0 for sample in samples):
        raise ValueError("no row reached the module: batches is empty, or the model does not use it")
    return [sample.rows() for sample in samples]
