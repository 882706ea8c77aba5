"""A measured entry of the comparison, and the tables that show many."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ORIGINAL = "original"  # the model that others are compared with
# cosine of a token's output with the same model's in float32, in the median, below which a result counts as wrong:
# rounding sends some tokens to other leaves, and theirs differ
LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.99, "int8": 0.8}


@dataclass
class ServingRow:
    """An entry on one case, or why there is none.

    Attributes:
        subject, case, entry: what ran. dtype: that it computes in. threads: of each worker. workers: processes that
            computed at the same time. tokens: of the case, without padding.
        milliseconds: median of a call, of each worker. spread: half the distance of the quartiles, relative.
        tokens_per_second: of all workers. speedup: tokens per second over the baseline's, measured in turns.
        match: whether the output is that of the same model in float32, with the largest difference and the
            mean and median cosine of tokens.
        error: mean squared difference from the original's last hidden states, in units of their variance;
            0 is the same, 1 a constant. None for random weights of another form.
        score: on labelled data, in per cent. reason: why nothing was measured.
    """

    subject: str
    case: str
    entry: str
    dtype: str
    threads: int
    workers: int
    tokens: int
    milliseconds: float | None = None
    spread: float | None = None
    tokens_per_second: float | None = None
    speedup: float | None = None
    match: str = ""
    error: float | None = None
    score: float | None = None
    busy: bool = False
    reason: str = ""


def check(value: Tensor, expected: Tensor, mask: Tensor, dtype: str) -> str:
    """Whether an output is right: (B, T, H) each, padding left out, with difference, mean and median cosine."""
    visible = mask.bool()
    own, wanted = value[visible], expected[visible]
    difference = (own - wanted).abs().max().item()
    cosines = torch.nn.functional.cosine_similarity(own, wanted, dim=-1)
    mean, median = cosines.mean().item(), cosines.median().item()
    fine = math.isfinite(difference) and median >= LEAST_COSINE[dtype]
    return f"{'ok' if fine else 'MISMATCH'} {difference:.1g}, cosine {mean:.5f}, median {median:.5f}"


def hidden_error(value: Tensor, original: Tensor, mask: Tensor) -> float:
    """Mean squared difference of last hidden states in units of the original's variance, a dimension at a time."""
    visible = mask.bool()
    wanted = original[visible].double()
    variance = wanted.var(dim=0, unbiased=False)
    variance = variance.maximum(0.01 * variance.median())
    return ((value[visible].double() - wanted).square() / variance).mean().item()


def comparable(rows: list[ServingRow]) -> list[ServingRow]:
    """The rows whose outputs say something of quality: those of trained models, one process of the fewest threads."""
    rows = [row for row in rows if row.workers == 1 and not row.reason and row.error is not None]
    trained = {row.subject for row in rows if not row.entry.startswith(ORIGINAL)}
    rows = [row for row in rows if row.subject in trained]
    fewest = min((row.threads for row in rows), default=0)
    return [row for row in rows if row.threads == fewest]


def format_serving(rows: list[ServingRow]) -> str:
    """Markdown: a table of times for each subject and number of threads, and one of throughput."""
    tables = []
    groups: dict[tuple, list[ServingRow]] = {}
    for row in rows:
        groups.setdefault((row.subject, row.threads, row.workers), []).append(row)
    for (subject, threads, workers), group in groups.items():
        title = f"{subject}: {threads} thread{'s' * (threads > 1)}, "
        title += "ms a call (speed-up)" if workers == 1 else f"{workers} workers at a time, tokens/s (speed-up)"
        tables.append(f"### {title}\n\n{_table(group)}")
    return "\n\n".join(tables)


def _table(rows: list[ServingRow]) -> str:
    """Entries down, cases across; quality and the check of the last case at the end."""
    cases = list(dict.fromkeys(row.case for row in rows))
    entries: dict[str, dict[str, ServingRow]] = {}
    for row in rows:
        entries.setdefault(row.entry, {})[row.case] = row
    with_score = any(row.score is not None for row in rows)
    checked = any(row.match for row in rows)  # several workers run what one was checked with
    head = ["entry", *cases, *(["differs from float32 by", "hidden-state error"] if checked else [])]
    head += ["score"] if with_score else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, found in entries.items():
        last = next(reversed(found.values()))
        cells = [name, *(_cell(found.get(case)) for case in cases)]
        if checked:
            cells += [last.match, "" if last.error is None else f"{last.error:.4g}"]
        if with_score:
            cells.append("" if last.score is None else f"{last.score:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: ServingRow | None) -> str:
    if row is None:
        return ""
    if row.reason:
        return f"none: {row.reason}"
    value = f"{row.milliseconds:.3g}" if row.workers == 1 else f"{row.tokens_per_second:.4g}"
    return f"{value} ({row.speedup:.2f}x){' (busy)' if row.busy else ''}"
