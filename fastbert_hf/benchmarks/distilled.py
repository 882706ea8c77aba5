"""How fast a distilled model is beside the one that it was made from."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from fastbert_hf.benchmarks.timing import interleaved, one_thread
from fastbert_hf.training.distillation.student import encoder_of, student_of
from fastbert_hf.training.distillation.teacher import Teacher

CASES = ((1, 16), (1, 128), (32, 64))  # texts x tokens
WIDTHS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # of leaves


def original_encoder(teacher: Teacher) -> PreTrainedModel:
    """The encoder as Transformers runs it, in float32."""
    return AutoModel.from_pretrained(teacher.folder, dtype=torch.float32)


@torch.no_grad()
def speed(models: dict[str, nn.Module], case: tuple[int, int], rounds: int = 7) -> dict[str, float]:
    """Milliseconds of a call of each encoder on so many texts of so many tokens, one thread; medians, in turns."""
    texts, tokens = case
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(model.config.vocab_size for model in models.values())
    batch = {"input_ids": torch.randint(min(1000, vocabulary - 1), vocabulary, case, generator=generator)}
    batch["attention_mask"] = torch.ones(texts, tokens, dtype=torch.int64)
    with one_thread(), torch.inference_mode():
        calls = {name: (lambda model=model: model(**batch)) for name, model in models.items()}
        timings = interleaved(calls, rounds=rounds)
    return {name: 1000 * timing.median for name, timing in timings.items()}


def speed_rows(student: PreTrainedModel, teacher: Teacher) -> list[dict[str, Any]]:
    """Milliseconds of the original and of the student in each of `CASES`, on the CPU: the student moves there."""
    models = {"teacher": original_encoder(teacher), "student": encoder_of(student).cpu().eval()}
    rows = []
    for case in CASES:
        if case[1] <= teacher.max_seq_length:
            found = speed(models, case)
            row = {"case": f"{case[0]} x {case[1]}"}
            rows.append(row | {f"{name}_ms": round(value, 3) for name, value in found.items()})
    return rows


def form_for_speed(teacher: Teacher, wanted: float, depth: int, trees: int) -> str:
    """The widest leaves with which a model is so many times as fast as the teacher, at 1 x 128 tokens.

    Candidates are measured on this machine, with random leaves: speed does not depend on what they hold. The
    narrowest comes first, the first that is too slow last: no model is built that is more than one width above the
    result, and only one at a time.

    Raises:
        ValueError: not even the narrowest leaves are that fast.
    """
    case = (1, min(128, teacher.max_seq_length))
    original = original_encoder(teacher)

    def times_as_fast(form: str) -> float:
        student = encoder_of(student_of(teacher.model, form).model)
        found = speed({"teacher": original, "student": student}, case, rounds=5)
        return found["teacher"] / found["student"]

    best: tuple[str, int, float] | None = None
    for width in WIDTHS:
        form = f"leaf:{trees}x{depth}x{width}"
        reached = times_as_fast(form)
        if reached < wanted:
            break
        best = (form, width, reached)
    if best is None:
        raise ValueError(
            f"speed is {wanted:g}; the narrowest leaves reach {reached:.2f} times the speed of the original"
        )
    form, width, reached = best
    print(f"leaves of {width} neurons: {reached:.2f} times the speed of the original", flush=True)
    return form
