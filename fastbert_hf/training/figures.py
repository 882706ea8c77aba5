"""Pictures of a training run, as PNG; matplotlib is imported when one is drawn."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


def _new_figure(width: float, height: float):
    """An empty figure with one pair of axes, or None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no picture was drawn: matplotlib is not installed")
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _colormap(name: str, missing: str):
    """A colour map in which values that are not numbers have a colour of their own."""
    from matplotlib import colormaps

    return colormaps[name].with_extremes(bad=missing)


def plot_confusion(path: Path, labels: Sequence[str], references: np.ndarray, predictions: np.ndarray) -> None:
    """Draw how often each class was taken for each other.

    Args:
        path: the PNG.
        labels: class names by id.
        references: (S,) true class ids.
        predictions: (S,) predicted class ids.
    """
    drawing = _new_figure(1.5 + len(labels), 1.2 + len(labels))
    if drawing is None:
        return
    counts = np.zeros((len(labels), len(labels)), dtype=int)  # (true, predicted)
    np.add.at(counts, (references, predictions), 1)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = drawing
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        text = f"{counts[row, column]}\n{fractions[row, column]:.0%}"
        color = "white" if fractions[row, column] > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    axes.set(xticks=range(len(labels)), yticks=range(len(labels)), xlabel="predicted", ylabel="true")
    axes.set_xticklabels(labels, rotation=30, ha="right")
    axes.set_yticklabels(labels)
    figure.savefig(path, dpi=120)


def plot_learning_curve(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Draw the losses of training and evaluation against steps; nothing if none was logged.

    Args:
        path: the PNG.
        history: the Trainer's `state.log_history`.
    """
    lines = {
        name: [(entry["step"], entry[key]) for entry in history if key in entry]
        for name, key in (("training", "loss"), ("evaluation", "eval_loss"))
    }
    drawing = _new_figure(5, 3.5) if any(lines.values()) else None
    if drawing is None:
        return
    figure, axes = drawing
    for name, points in lines.items():
        if points:
            axes.plot(*zip(*points), label=name, marker="o" if len(points) < 30 else None, markersize=3)
    axes.set(xlabel="steps", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_tree_usage(path: Path, usage: Sequence[dict[str, Any]]) -> None:
    """Draw how a model uses its trees, layer by layer, with leaf entropy and what is dead beside it.

    Of the published form, which fraction of each level's nodes was visited. Of leaf trees, the tokens of each leaf.

    Args:
        path: the PNG.
        usage: what `tree_usage` returns.
    """
    if all("leaf_fractions" in layer for layer in usage):
        _plot_leaf_usage(path, usage)
        return
    fractions = np.array([layer["used_fraction"] for layer in usage])  # (L, D+1)
    drawing = _new_figure(2.5 + 0.5 * fractions.shape[1], 1.6 + 0.35 * len(fractions))
    if drawing is None:
        return
    figure, axes = drawing
    image = axes.imshow(fractions, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(fractions.shape):
        color = "black" if fractions[row, column] > 0.5 else "white"
        axes.text(column, row, f"{fractions[row, column]:.0%}", ha="center", va="center", color=color, fontsize=7)
    labels = [
        f"{row}: {layer['leaf_entropy']:.1f} bits, {layer['dead_nodes']} dead" for row, layer in enumerate(usage)
    ]
    axes.set(xlabel="level of the tree", ylabel="layer: leaf entropy, dead nodes", xticks=range(fractions.shape[1]))
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    figure.colorbar(image, label="nodes visited")
    figure.savefig(path, dpi=120)


def _plot_leaf_usage(path: Path, usage: Sequence[dict[str, Any]]) -> None:
    """The tokens of each leaf over those of a leaf of a balanced tree, from 1/8 to 8 on a logarithmic scale."""
    layers = [np.array(layer["leaf_fractions"]) for layer in usage]  # (P, m)
    fractions = np.stack([layer.reshape(-1) * layer.shape[1] for layer in layers])  # (L, P*m)
    drawing = _new_figure(3.5 + min(10.0, max(4.0, 0.05 * fractions.shape[1])), 1.6 + 0.35 * len(fractions))
    if drawing is None:
        return
    figure, axes = drawing
    colors = _colormap("viridis", "red")
    with np.errstate(divide="ignore"):
        logs = np.where(fractions > 0, np.log2(fractions).clip(-3, 3), np.nan)  # a dead leaf is drawn as missing: red
    image = axes.imshow(logs, cmap=colors, vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
    labels = [
        f"{row}: {layer['leaf_entropy']:.1f} bits, {len(layer['dead_leaves'])} dead"
        for row, layer in enumerate(usage)
    ]
    axes.set(xlabel="leaf, tree after tree (red: no token)", ylabel="layer: leaf entropy, dead leaves")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    bar = figure.colorbar(image, label="tokens over an equal share", ticks=range(-3, 4))
    bar.set_ticklabels(["1/8 or less", "1/4", "1/2", "1", "2", "4", "8 or more"])
    figure.savefig(path, dpi=120)


def plot_curves(path: Path, lines: dict[str, list[list[tuple[float, float]]]], xlabel: str, ylabel: str) -> None:
    """Draw several runs of several models, one colour a model.

    Args:
        path: the PNG.
        lines: name -> runs -> points (x, y).
        xlabel: what x is.
        ylabel: what y is.
    """
    drawing = _new_figure(6.5, 4.5)
    if drawing is None:
        return
    figure, axes = drawing
    for number, (name, runs) in enumerate(lines.items()):
        for run, points in enumerate(runs):
            axes.plot(
                *zip(*points),
                color=f"C{number}",
                label=None if run else name,
                marker="o",
                markersize=2.5,
                linewidth=1,
            )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
