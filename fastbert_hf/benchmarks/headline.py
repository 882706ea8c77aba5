"""The few figures that a reader asks for first, taken from the rows that were measured."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from fastbert_hf.benchmarks.memory import MemoryRow
from fastbert_hf.benchmarks.rows import Row

KERNEL, MODULE = ("native", "C call"), ("native", "module call")


@dataclass(frozen=True)
class Figure:
    """A speed-up to report: which row is divided by which.

    Args:
        title: what the ratio says.
        section: the rows' section.
        candidate: entry and entry point of the row in question.
        baseline: entry of the row that it is compared with.
        tokens: N, or none where the case tells.
        case: of both rows, or none where the section has one.
    """

    title: str
    section: str
    candidate: tuple[str, str]
    baseline: str
    tokens: int | None = None
    case: str | None = None


def _layer_figures() -> Iterator[Figure]:
    for tokens in (1, 128, 512, 1024, 2048, 4096, 16384):
        for called, candidate in (("kernel", KERNEL), ("module call", MODULE)):
            for baseline in ("dense 4095 eager", "dense, the fastest"):
                yield Figure(f"forward, N = {tokens}, {called}", "forward", candidate, baseline, tokens)
    yield Figure("forward, N = 1024, kernel", "forward", KERNEL, "FFF BMM", 1024)
    for tokens in (1024, 4096):
        for baseline in ("dense-and-mask", "dense"):
            title = f"forward and backward, N = {tokens}"
            yield Figure(title, "forward and backward", ("native", "op with autograd"), baseline, tokens)


def _leaf_figures() -> Iterator[Figure]:
    for hidden in (384, 768):
        case = f"H={hidden}, 32 leaves of {hidden // 4}"
        baselines = (f"dense {4 * hidden}, the fastest", f"dense {hidden // 4}, the fastest")
        for tokens in (1, 128, 2048, 16384):
            for called, candidate in (("kernel", KERNEL), ("module call", MODULE)):
                for baseline in baselines:
                    title = f"leaf trees, H = {hidden}, forward, N = {tokens}, {called}"
                    yield Figure(title, "leaf trees, forward", candidate, baseline, tokens, case)
        for tokens in (128, 4096):
            title = f"leaf trees, H = {hidden}, forward and backward, N = {tokens}"
            section, called = "leaf trees, forward and backward", ("native", "op with autograd")
            for baseline in (f"dense {4 * hidden}", f"dense {hidden // 4}"):
                yield Figure(title, section, called, baseline, tokens, case)
    for shape in ("1 x 16", "1 x 128", "32 x 64"):
        case, called = f"MiniLM-L6, {shape}", ("leaf trees, 96 of 3072", "module call")
        for baseline in ("dense 1536", "dense 96", "no feed-forward"):
            yield Figure(
                f"leaf trees, whole encoder, {case}", "leaf trees, whole encoder", called, baseline, None, case
            )


def _model_figures() -> Iterator[Figure]:
    called = ("FastBERT", "module call")
    for batch in (1, 8, 32):
        case = f"16 layers, {batch} x 128"
        for baseline in ("dense twin 4095", "dense, the fastest", "no feed-forward"):
            yield Figure(f"whole encoder, {batch} x 128", "whole encoder, inference", called, baseline, None, case)
    for batch in (1, 32):
        case = f"16 layers, {batch} x 128"
        for baseline in ("dense-and-mask", "dense twin 4095"):
            entry = ("FastBERT", "training step")
            yield Figure(f"training step, {batch} x 128", "training step", entry, baseline, None, case)
    for baseline in ("dense-and-mask", "dense twin 4095"):
        entry = ("FastBERT", "training step")
        yield Figure("fine-tuning step, 16 x 128", "fine-tuning step", entry, baseline)
    for baseline in ("dense twin 4095", "dense, the fastest"):
        yield Figure("classifier, evaluation, 32 x 128", "classifier, evaluation", called, baseline)
    for kind in ("", " bfloat16"):
        for baseline in ("DistilBERT, torch", "BERT-base, ONNX Runtime float32", "BERT-base, ONNX Runtime int8"):
            half = kind if baseline == "DistilBERT, torch" else ""
            yield Figure(
                f"12 layers, 1 x 128,{kind or ' float32'}",
                "whole encoder against alternatives",
                (f"FastBERT 12 layers, torch{kind}", "module call"),
                baseline + half,
                None,
                "12 layers, 1 x 128",
            )


def _find(rows: list[Row], figure: Figure, threads: int) -> tuple[Row, Row] | None:
    """The candidate's and the baseline's row with this many threads."""
    group = [
        row
        for row in rows
        if row.section == figure.section
        and row.threads == threads
        and figure.tokens in (None, row.tokens)
        and figure.case in (None, row.case)
    ]
    candidates = [row for row in group if (row.entry, row.entry_point) == figure.candidate]
    if figure.baseline == "dense, the fastest":
        # The paper's own forms are not in it: those are the rows named after what PyTorch does.
        baselines = [row for row in group if row.entry.startswith("dense ") and row.entry.split()[-2].isdecimal()]
        baselines += [row for row in group if row.entry.startswith("dense twin ")]
    elif figure.baseline.endswith(", the fastest"):  # of one width
        form = figure.baseline.removesuffix("the fastest").replace(",", "")
        baselines = [row for row in group if row.entry.startswith(form)]
    else:
        baselines = [row for row in group if row.entry == figure.baseline]
    if not candidates or not baselines:
        return None
    return candidates[0], min(baselines, key=lambda row: row.median_ms)


def _half_precision(rows: list[Row], threads: int) -> Iterator[tuple[str, str, Row, Row]]:
    """Our kernel in bfloat16 against itself in float32."""
    for section, tokens in itertools.product(("bfloat16", "leaf trees, bfloat16"), (1, 128, 2048, 16384)):
        found = {
            row.dtype: row
            for row in rows
            if (row.section, row.tokens, row.threads, row.entry, row.entry_point)
            == (section, tokens, threads, *KERNEL)
        }
        if len(found) == 2:
            form = "leaf trees, " if "leaf" in section else ""
            title = f"{form}forward in bfloat16, N = {tokens}, kernel"
            yield title, "the kernel in float32", found["bfloat16"], found["float32"]


def format_headline(rows: list[Row], memory: list[MemoryRow]) -> str:
    """A Markdown table of speed-ups, a column for each thread count; only what was measured is in it."""
    counts = sorted({row.threads for row in rows})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for threads in counts:
        pairs = [
            (figure.title, figure.baseline, *found)
            for figure in (*_layer_figures(), *_leaf_figures(), *_model_figures())
            if (found := _find(rows, figure, threads))
        ]
        for title, baseline, candidate, reference in (*pairs, *_half_precision(rows, threads)):
            mark = " (busy)" if candidate.busy or reference.busy else ""
            ratio = f"{reference.median_ms / candidate.median_ms:.3g}x{mark}"
            cells.setdefault((title, baseline), {})[threads] = ratio
    lines = [
        "| figure | against | " + " | ".join(f"{n} thread{'s' * (n > 1)}" for n in counts) + " |",
        "|---|---|" + "---|" * len(counts),
    ]
    lines += [
        f"| {title} | {baseline} | " + " | ".join(values.get(n, "") for n in counts) + " |"
        for (title, baseline), values in cells.items()
    ]
    lines += _scaling(rows, counts)
    lines += [
        f"| memory above inputs and output, N = {row.tokens}: {row.form} | | {row.megabytes:.3g} MB |"
        for row in memory
    ]
    return "\n".join(lines)


def _scaling(rows: list[Row], counts: list[int]) -> Iterator[str]:
    """The largest thread count over one, at the largest N."""
    sections = {"forward": "forward", "leaf trees, forward": "leaf trees, forward, H = 768"}
    for (section, name), (called, candidate) in itertools.product(
        sections.items(), (("kernel", KERNEL), ("module call", MODULE))
    ):
        found = {
            row.threads: row.median_ms
            for row in rows
            if row.section == section
            and row.tokens == 16384
            and (row.entry, row.entry_point) == candidate
            and not row.case.startswith("H=384")
        }
        if 1 in found and len(found) > 1:
            most = max(found)
            title = f"{name}, N = 16384, {called}, {most} threads"
            yield (
                f"| {title} | one thread | "
                + " | ".join(f"{found[1] / found[most]:.3g}x" if n == most else "" for n in counts)
                + " |"
            )
