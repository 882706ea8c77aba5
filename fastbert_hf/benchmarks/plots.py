"""Pictures of a benchmark: time per token against tokens, speed-up against depth."""

from pathlib import Path

from fastbert_hf.benchmarks.rows import Row


def plot_time_per_token(rows: list[Row], path: Path) -> None:
    """Microseconds per token against N, one line an entry, log-log; one panel a thread count."""
    rows = [row for row in rows if row.section == "forward" and row.dtype == "float32" and row.inputs == "balanced"]
    threads = sorted({row.threads for row in rows})
    figure, axes = _panels(len(threads))
    for axis, count in zip(axes, threads):
        chosen = [row for row in rows if row.threads == count]
        for entry, point in sorted({(row.entry, row.entry_point) for row in chosen}):
            line = sorted((r.tokens, r.us_per_token) for r in chosen if (r.entry, r.entry_point) == (entry, point))
            axis.plot(*zip(*line), marker="o", markersize=3, label=f"{entry} ({point})")
        axis.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="µs per token", title=f"{count} thread(s)")
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=6)
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
        limit = [(2 ** (depth + 1) - 1) / (depth + 1) for depth in depths]
        axis.plot(depths, limit, linestyle=":", color="grey", label="arithmetic limit")
        axis.set(yscale="log", xlabel="depth D", ylabel="speed-up over dense", title=f"{count} thread(s)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def _panels(count: int):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, max(1, count), figsize=(6 * max(1, count), 4.5), squeeze=False)
    figure.set_layout_engine("constrained")
    return figure, list(axes[0])
