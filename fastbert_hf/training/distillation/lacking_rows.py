"""What a student's feed-forward layers see, and what it lacks there of the teacher's hidden states: rows on disk."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastbert_hf.modeling_fastbert import FastBertModel
from fastbert_hf.training.activations import sample_inputs_of_all

_Batch = Mapping[str, Tensor]


def lacking_rows(
    student: FastBertModel,
    teacher: FastBertModel,
    batches: Iterable[_Batch],
    folder: Path,
    layers: Iterable[int],
    *,
    max_rows: int,
    seed: int = 0,
    teacher_layers: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """For some feed-forward layers, one after the other: the rows that reach it, and what it should put out for them.

    That is the teacher's hidden state behind the layer, before the norm there, less what the student has without the
    layer. Each layer's rows are of the student as it is when they are asked for, so that what has become of the
    layers below counts. The text takes one pass through the teacher, and one for each layer through the layers of the
    student below it.

    Args:
        student, teacher: encoders, on any device.
        batches: text, gone through once; not at all without layers.
        folder: for max_rows * H * 4 bytes for each layer of the teacher and one more, or two more where norms stand
            in front. It is made, and removed at the end.
        layers: their numbers in the student, ascending. max_rows: tokens, at most. seed: for their choice.
        teacher_layers: for each layer of the student, the teacher's layer that it follows; None: the same ones.

    Yields:
        x (n, H) and targets (n, H), float32 on the CPU, over files; they may be overwritten.

    Raises:
        ValueError: no text; no room on the disk.
    """
    layers = list(layers)
    if not layers:
        return
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    count = len(teacher.layers)
    followed = range(count) if teacher_layers is None else teacher_layers
    _check_room(folder.parent, (count + len(_around(student, 0))) * max_rows * teacher.config.hidden_size * 4)
    folder.mkdir()
    try:
        sampled = {"max_rows": max_rows, "seed": seed}  # the same rows each time
        read: list[_Batch] = []
        paths = [folder / f"teacher-{number}.f32" for number in range(count)]
        wanted = sample_inputs_of_all(teacher, _behind(teacher), _kept(batches, read), paths, **sampled)
        for number in layers:
            around = _around(student, number)
            paths = [folder / f"student-{place}.f32" for place in range(len(around))]
            found = sample_inputs_of_all(student, around, read, paths, **sampled)
            residual, x = (torch.from_numpy(part) for part in (found[0], found[-1]))
            yield x, torch.from_numpy(wanted[followed[number]]).sub_(residual)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _kept(batches: Iterable[_Batch], read: list[_Batch]) -> Iterator[_Batch]:
    """The batches, noted in a list as they are taken."""
    for batch in batches:
        read.append(batch)
        yield batch


def _behind(encoder: FastBertModel) -> list[nn.Module]:
    """For each layer of an encoder, the module whose input is the layer's hidden state, before a norm."""
    layers = list(encoder.layers)
    if layers[0].pre_norm:
        return [layer.attention_norm for layer in layers[1:]] + [encoder.final_norm]
    return [layer.ffn_norm for layer in layers]


def _around(encoder: FastBertModel, number: int) -> list[nn.Module]:
    """The modules of a layer whose inputs are what its feed-forward layer is added to (first) and reads (last)."""
    layer = encoder.layers[number]
    return [layer.ffn_norm, layer.ffn] if layer.pre_norm else [layer.ffn]


def _check_room(folder: Path, size: int) -> None:
    """Check that so many bytes fit on the disk: a process that writes to a mapped file without room is killed."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(
            f"the rows that layers are fitted to take {size / 1e9:.1f} GB in {str(folder)!r}, where "
            f"{free / 1e9:.1f} GB are free: give a smaller fit_rows, or another output_dir"
        )
