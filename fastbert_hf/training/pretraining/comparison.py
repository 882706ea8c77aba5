"""Finished pretraining runs side by side: what each model reached, and which differences exceed those of seeds."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from fastbert_hf.configuration_fastbert import FastBertConfig
from fastbert_hf.files import write_text
from fastbert_hf.training.budget import with_current_names
from fastbert_hf.training.figures import plot_curves
from fastbert_hf.training.pretraining.report import HISTORY

AXES = {  # column of a history -> name on the axis, divisor, file
    "cpu_seconds": ("minutes of processor time", 60.0, "loss-against-time.png"),
    "tokens": ("million tokens", 1e6, "loss-against-tokens.png"),
}


# options that make two runs of a model two models, where they differ -> how they are called
VARIED = {"learning_rate": "rate {:g}", "balance_leaves": "balance {:g}"}
ABSENT = {"balance_leaves": 0.0}  # values where a comparison of an earlier version does not say


@dataclass(frozen=True)
class FinishedRun:
    """One run.

    Attributes:
        model: what the model is called: trees by trees x depth, leaf trees by leaves x width, dense ones by width;
            and what dense run it began from, and whether it had a teacher.
        neurons: (used by a token, there in a layer).
        summary: its summary.json.
        curve: held-out losses in time: [{"eval_loss", "tokens", "cpu_seconds", ...}].
        options: those of `VARIED`, as far as they are known.
    """

    model: str
    neurons: tuple[int, int]
    summary: dict[str, Any]
    curve: list[dict[str, float]]
    options: dict[str, float] = field(default_factory=dict)


def read_runs(path: str | Path) -> list[FinishedRun]:
    """The run of a folder, or those that the comparison.json of an earlier comparison holds.

    Raises:
        ValueError: it is neither.
    """
    path = Path(path)
    if path.suffix != ".json":
        return [read_run(path)]
    try:
        entries = with_current_names(json.loads(path.read_text(encoding="utf-8")))
        return [FinishedRun(**{**entry, "neurons": tuple(entry["neurons"])}) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(path)!r} holds no comparison of runs: {error}") from error


def read_run(folder: str | Path) -> FinishedRun:
    """Read the folder of a finished run.

    Raises:
        ValueError: it is not one.
    """
    folder = Path(folder)
    try:
        summary, history, recipe = (
            with_current_names(json.loads((folder / name).read_text(encoding="utf-8")))
            for name in ("summary.json", HISTORY, "recipe.json")
        )
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} holds no finished pretraining run: {error}") from error
    name = _name(config)
    if start := summary.get("dense_start"):
        name += f" from dense {start['neurons']} at {start['fraction']:.0%}"
    if recipe.get("teacher_weight"):
        name += ", taught"
    curve = [entry for entry in history if "eval_loss" in entry]
    options = {option: recipe[option] for option in VARIED if recipe.get(option) is not None}
    return FinishedRun(name, (config.neurons_per_token, config.neurons_per_layer), summary, curve, options)


def _name(config: FastBertConfig) -> str:
    """What a model is called."""
    if config.ffn_type != "fff":
        return f"dense {config.intermediate_size}"
    if config.fff_leaf_width is None:
        return f"FastBERT {config.fff_trees}x{config.fff_depth}"
    trees = f"{config.fff_trees} x " if config.fff_trees > 1 else ""
    return f"leaves {trees}{2**config.fff_depth}x{config.fff_leaf_width}"


def _told_apart(runs: list[FinishedRun]) -> list[FinishedRun]:
    """The runs; where those of one model differ in an option of `VARIED`, its value becomes a part of the name.

    The most frequent value of a model's runs is left out.
    """
    named = list(runs)
    for option, words in VARIED.items():
        for model in {run.model for run in runs}:
            values = {n: {**ABSENT, **run.options}.get(option) for n, run in enumerate(runs) if run.model == model}
            found = {number: value for number, value in values.items() if value is not None}
            usual = Counter(found.values()).most_common(1)[0][0] if found else None
            for number, value in found.items():
                if value != usual:
                    name = f"{named[number].model}, {words.format(value)}"
                    named[number] = replace(named[number], model=name)
    return named


def _sources(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The texts of a run, by what identifies them."""
    return [{name: value for name, value in source.items() if name != "license"} for source in summary["sources"]]


def by_model(runs: list[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Group runs by model, in the order of their appearance.

    Raises:
        ValueError: two runs of one model have the same seed, or runs saw different text or had different budgets.
    """
    groups: dict[str, list[FinishedRun]] = {}
    runs = _told_apart(runs)
    for run in runs:
        groups.setdefault(run.model, []).append(run)
    for name, group in groups.items():
        seeds = [run.summary["seed"] for run in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{name} has two runs with the same seed: {sorted(seeds)}")
    for key in ("budget", "sources", "validation_sequences", "unigram_loss"):
        values = [_sources(run.summary) if key == "sources" else run.summary[key] for run in runs]
        if len({json.dumps(value, sort_keys=True) for value in values}) > 1:
            raise ValueError(f"the runs differ in {key}: they cannot be compared")
    return groups


def compare_losses(ours: list[float], theirs: list[float]) -> str:
    """Say whether the losses of one model are lower than another's: only if they differ by more than seeds do.

    Args:
        ours, theirs: held-out losses, one a seed.

    Returns:
        "lower by ...", "higher by ..." or "tie": the means differ by no more than the larger spread of the two.
    """
    difference = float(np.mean(ours) - np.mean(theirs))
    spread = max(np.ptp(ours), np.ptp(theirs))
    if abs(difference) <= spread or min(len(ours), len(theirs)) < 2:
        return "tie" if min(len(ours), len(theirs)) > 1 else "one seed"
    return f"{'lower' if difference < 0 else 'higher'} by {abs(difference):.3f}"


def comparison_table(groups: dict[str, list[FinishedRun]], baseline: str) -> str:
    """A Markdown table, best model first.

    Args:
        groups: runs by model.
        baseline: model that the others are compared with.
    """
    losses = {name: [run.summary["validation_loss"] for run in group] for name, group in groups.items()}
    rows = []
    for name in sorted(groups, key=lambda name: np.mean(losses[name])):
        group = groups[name]
        used, there = group[0].neurons
        speed = np.median([run.summary["tokens_seen"] / max(run.summary["cpu_seconds"], 0.1) for run in group])
        each = ", ".join(f"{loss:.3f}" for loss in losses[name])
        accuracy = np.mean([run.summary["validation_accuracy"] for run in group])
        tokens = np.mean([run.summary["tokens_seen"] for run in group]) / 1e6
        against = "" if name == baseline else compare_losses(losses[name], losses[baseline])
        dead = [run.summary["dead_nodes"] for run in group if run.summary["dead_nodes"] is not None]
        rows.append(
            f"| {name} | {used} of {there} | {group[0].summary['parameters']:,} | {tokens:.1f} | {speed:,.0f} | "
            f"{np.mean(losses[name]):.3f} ({each}) | {accuracy:.1%} | {', '.join(map(str, dead))} | {against} |"
        )
    head = (
        "| model | neurons of a layer used | parameters | million tokens seen | tokens a second | "
        f"held-out loss: mean (seeds) | accuracy | dead nodes | against {baseline} |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|---|---|---|", *rows])


def compare(folders: list[str], baseline: str | None, output_dir: str | Path) -> str:
    """Write comparison.md, comparison.json and the two plots.

    Args:
        folders: output folders of finished runs, and comparison.json files of earlier comparisons.
        baseline: model to compare with; default: the widest dense one.
        output_dir: where to write.

    Returns:
        The table.

    Raises:
        ValueError: runs that cannot be compared, or an unknown baseline.
    """
    runs = [run for folder in folders for run in read_runs(folder)]
    groups = by_model(runs)
    if baseline is None:
        dense = [name for name in groups if name.startswith("dense")]
        baseline = max(dense or groups, key=lambda name: groups[name][0].neurons[1])
    if baseline not in groups:
        raise ValueError(f"baseline must be one of {', '.join(groups)}; got {baseline!r}")
    table = comparison_table(groups, baseline)
    output_dir = Path(output_dir)
    unigram = runs[0].summary["unigram_loss"]
    write_text(output_dir / "comparison.md", f"{table}\n\nToken frequencies alone: {unigram:.3f}.\n")
    write_text(output_dir / "comparison.json", json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    for column, (label, divisor, file) in AXES.items():
        lines = {
            name: [[(point[column] / divisor, point["eval_loss"]) for point in run.curve] for run in group]
            for name, group in groups.items()
        }
        plot_curves(output_dir / file, lines, label, "held-out loss in nats")
    return table
