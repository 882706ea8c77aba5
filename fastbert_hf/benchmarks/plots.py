"""Pictures of a benchmark: time per token against tokens, speed-up against depth, quality against latency."""

import itertools
from pathlib import Path

from fastbert_hf.benchmarks.rows import Row
from fastbert_hf.benchmarks.serving.rows import ServingRow
from fastbert_hf.fff_reference import nodes_per_tree


def plot_time_per_token(rows: list[Row], path: Path) -> None:
    """Microseconds per token against N, one line an entry, log-log; one panel a thread count."""
    from matplotlib import colormaps

    rows = [row for row in rows if row.section == "forward" and row.dtype == "float32" and row.inputs == "balanced"]
    threads = sorted({row.threads for row in rows})
    figure, axes = _panels(len(threads))
    entries = sorted({(row.entry, row.entry_point) for row in rows})
    colors = colormaps["tab20"].colors  # one colour an entry, in every panel
    for axis, count in zip(axes, threads):
        for index, (entry, point) in enumerate(entries):
            line = sorted(
                (row.tokens, row.us_per_token)
                for row in rows
                if (row.threads, row.entry, row.entry_point) == (count, entry, point)
            )
            x, y = zip(*line) if line else ((), ())
            label = f"{entry} ({point})"
            axis.plot(x, y, marker="o", markersize=3, color=colors[index % len(colors)], label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="µs per token", title=f"{count} thread(s)")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.savefig(path, dpi=150)


def plot_speedup_against_depth(rows: list[Row], path: Path) -> None:
    """How much faster than the dense layer of the same neurons, against depth; and the arithmetic limit."""
    rows = [row for row in rows if row.section == "depth"]
    threads = sorted({row.threads for row in rows})
    figure, axes = _panels(len(threads))
    for axis, count in zip(axes, threads):
        for entry in ("native", "reference"):
            chosen = [
                (int(row.case.split("x")[1]), row.speedup)
                for row in rows
                if row.threads == count and row.entry == entry and row.entry_point == "module call"
            ]
            if chosen:
                axis.plot(*zip(*sorted(chosen)), marker="o", markersize=3, label=entry)
        depths = sorted({int(row.case.split("x")[1]) for row in rows})
        limit = [nodes_per_tree(depth) / (depth + 1) for depth in depths]
        axis.plot(depths, limit, linestyle=":", color="grey", label="arithmetic limit")
        axis.set(yscale="log", xlabel="depth D", ylabel="speed-up over dense", title=f"{count} thread(s)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def plot_quality_against_latency(
    scores: dict[str, list[float]], milliseconds: dict[str, dict[str, float]], data: str, path: Path
) -> None:
    """Score against milliseconds, a point a model with the range of its seeds; one panel a case.

    Args:
        scores: model -> the score of each seed, on `data`. milliseconds: case -> model -> ms.
    """
    figure, axes = _panels(len(milliseconds))
    for axis, (case, times) in zip(axes, milliseconds.items()):
        for name, values in scores.items():
            mean = sum(values) / len(values)
            spread = [[mean - min(values)], [max(values) - mean]]
            axis.errorbar(times[name], mean, yerr=spread, marker="o", capsize=3, linestyle="")
            axis.annotate(name, (times[name], mean), textcoords="offset points", xytext=(5, 5), fontsize=8)
        axis.set(xlabel="ms, one thread", ylabel=f"score on {data}", title=f"{case} tokens")
        axis.margins(x=0.15)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_serving(rows: list[ServingRow], path: Path) -> None:
    """Quality against milliseconds, a point an entry; one panel a case.

    Args:
        rows: of models that can be compared. Quality is the score, or the hidden-state error where there is none.
    """
    from matplotlib import colormaps

    colors = dict(zip(dict.fromkeys(row.entry for row in rows), itertools.cycle(colormaps["tab20"].colors)))
    scored = any(row.score is not None for row in rows)
    cases = list(dict.fromkeys((row.subject, row.case) for row in rows))
    figure, axes = _panels(len(cases))
    for axis, (subject, case) in zip(axes, cases):
        for row in rows:
            quality = row.score if scored else row.error
            if (row.subject, row.case) == (subject, case) and quality is not None:
                marker = "o" if "FastBERT" in row.entry else "s"
                axis.plot(
                    row.milliseconds, quality, marker=marker, linestyle="", color=colors[row.entry], label=row.entry
                )
        what = "score" if scored else "hidden-state error"
        axis.set(xscale="log", xlabel=f"ms, {rows[0].threads} thread(s)", ylabel=what, title=f"{subject}, {case}")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.savefig(path, dpi=110)


def _panels(count: int):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, max(1, count), figsize=(6 * max(1, count), 4.5), squeeze=False)
    figure.set_layout_engine("constrained")
    return figure, list(axes[0])
