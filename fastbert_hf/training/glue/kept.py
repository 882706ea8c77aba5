"""What students keep of a dense model after fine-tuning: shares of its mean over tasks, with intervals over seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fastbert_hf.training.glue.table import APART, COLUMNS, OTHER_DATA, Cell

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and half of its 95 % interval, which is None where a cell has one seed."""

    value: float
    half: float | None

    def text(self, unit: str = "") -> str:
        """Times 100, with one digit."""
        spread = "" if self.half is None else f" ± {100 * self.half:.1f}"
        return f"{100 * self.value:.1f}{spread}{unit}"


def combination(parts: Sequence[tuple[float, Sequence[Cell]]]) -> Estimate:
    """A weighted sum of means over tasks, with the interval that the spread of the seeds gives.

    Every cell's seeds are a sample of their own. Source: Welch's interval, its degrees of freedom those of
    Satterthwaite.

    Args:
        parts: weight and cells of each mean.
    """
    from scipy.stats import t

    value = sum(weight * statistics.fmean(cell.mean for cell in cells) for weight, cells in parts)
    if any(cell.spread is None for _, cells in parts for cell in cells):
        return Estimate(value, None)
    shares = [
        ((weight / len(cells)) ** 2 * cell.spread**2 / len(cell.values), len(cell.values) - 1)
        for weight, cells in parts
        for cell in cells
    ]
    variance = sum(share for share, _ in shares)
    if variance == 0:
        return Estimate(value, 0.0)
    freedom = variance**2 / sum(share**2 / degrees for share, degrees in shares)
    return Estimate(value, float(t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance))


def share_kept(student: Sequence[Cell], dense: Sequence[Cell]) -> Estimate:
    """The student's mean over the tasks in parts of the dense model's; the interval is that of the linearised ratio.

    Args:
        student, dense: the cells of the same tasks.
    """
    own, whole = (combination([(1.0, cells)]).value for cells in (student, dense))
    return Estimate(own / whole, combination([(1 / whole, student), (-own / whole**2, dense)]).half)


def gap_closed(student: Sequence[Cell], dense: Sequence[Cell], bare: Sequence[Cell]) -> Estimate | None:
    """How much of the way from `bare` to the dense model a student goes, likewise.

    Returns:
        None where the interval of that way reaches zero: nothing can be said of parts of it.
    """
    gap = combination([(1.0, dense), (-1.0, bare)])
    if gap.value <= (gap.half or 0.0):
        return None
    part = combination([(1.0, student), (-1.0, bare)]).value / gap.value
    parts = [(1 / gap.value, student), (-part / gap.value, dense), ((part - 1) / gap.value, bare)]
    return Estimate(part, combination(parts).half)


def kept_table(cells: Sequence[Cell], dense: str, bare: str | None = None) -> str:
    """A Markdown table: each task, the mean over them, and what is kept of the dense model's.

    Args:
        cells: of `collect`. WNLI and mismatched MNLI are shown and do not count.
        dense: name of the model that the others are compared with.
        bare: name of the student without feed-forward layers; without it there is no share of the gap.

    Raises:
        ValueError: a name that is not there, models that were fine-tuned on other tasks, no task that counts.
    """
    by_model = {
        model: [cell for cell in cells if cell.model == model] for model in dict.fromkeys(c.model for c in cells)
    }
    for name in (dense, bare):
        if name is not None and name not in by_model:
            raise ValueError(f"no results of {name!r}; there are those of {', '.join(by_model) or 'no model'}")
    titles = {model: {cell.column for cell in found} for model, found in by_model.items()}
    for model, found in titles.items():
        if found != titles[dense]:
            raise ValueError(
                f"{model!r} has {', '.join(sorted(found))} and {dense!r} {', '.join(sorted(titles[dense]))}; "
                "expected the same tasks"
            )
    apart = {title for title, *_ in APART}
    counted = [title for title, *_ in COLUMNS if title in titles[dense] - apart]
    if not counted:
        raise ValueError(f"no task that counts: {', '.join(titles[dense])} is shown alone")
    means = {model: [cell for cell in found if cell.column in counted] for model, found in by_model.items()}
    gap = ["of the gap"] if bare is not None else []
    head = ["model", *counted, f"mean of {len(counted)}", "kept", *gap, *sorted(titles[dense] & apart), "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    others = sorted(set(by_model) - {dense}, key=lambda model: -combination([(1.0, means[model])]).value)
    for model in (dense, *others):
        texts = {cell.column: cell.text() for cell in by_model[model]}
        row = [model, *(texts[title] for title in counted), combination([(1.0, means[model])]).text()]
        row.append("100 %" if model == dense else share_kept(means[model], means[dense]).text(" %"))
        if bare is not None:
            row.append({dense: "100 %", bare: "0 %"}.get(model) or _gap_text(means[model], means[dense], means[bare]))
        row += [texts[title] for title in sorted(titles[dense] & apart)]
        row.append(" to ".join(map(str, sorted({len(cell.values) for cell in by_model[model]}))))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *_notes(means, dense, bare)])


def _gap_text(student: Sequence[Cell], dense: Sequence[Cell], bare: Sequence[Cell]) -> str:
    found = gap_closed(student, dense, bare)
    return "no gap" if found is None else found.text(" %")


def _notes(means: dict[str, list[Cell]], dense: str, bare: str | None) -> list[str]:
    notes = [
        "Tasks: mean ± sample standard deviation over seeds. Mean, kept and of the gap: ± half of the 95 % interval "
        "over the seeds of fine-tuning (Welch); other seeds of distillation are not in it. WNLI does not count."
    ]
    if bare is not None:
        gap = combination([(1.0, means[dense]), (-1.0, means[bare])])
        notes.append(f"The gap, from {bare} to {dense}: {gap.text()} points.")
    if not all(cell.published_data for cells in means.values() for cell in cells):
        notes.append(f"{OTHER_DATA} not the published number of examples.")
    return notes
