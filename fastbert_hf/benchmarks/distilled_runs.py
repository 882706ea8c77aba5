"""Compare distilled models: quality beside speed, and how much of what the feed-forward layers do was kept."""

import json
import statistics
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import AutoModel

from fastbert_hf.benchmarks.distilled import CASES, original_encoder, speed
from fastbert_hf.benchmarks.machine import processor_name
from fastbert_hf.benchmarks.plots import plot_quality_against_latency
from fastbert_hf.checkpoint_fastbert import read_json
from fastbert_hf.extras import require_extra
from fastbert_hf.files import check_output_folder, write_text
from fastbert_hf.hub.card import DISTILLED_FROM, SUMMARY, public_name
from fastbert_hf.training.distillation.report import short_names
from fastbert_hf.training.distillation.student import encoder_of
from fastbert_hf.training.distillation.teacher import load_teacher

ALIKE = (DISTILLED_FROM, "steps")  # what runs that are compared have in common
NOTHING = "dense:1"  # the form that stands for no feed-forward layers
TABLE, RESULTS, PICTURE = "comparison.md", "comparison.json", "comparison.png"


def load_runs(folders: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The summaries of runs, by form.

    Raises:
        ValueError: a folder without summary of a distillation; runs of different teachers, steps or labelled data;
            no run that stands for no feed-forward layers.
    """
    runs = defaultdict(list)
    first: tuple[str, dict] | None = None
    for folder in folders:
        summary = read_json(Path(folder) / SUMMARY)
        if DISTILLED_FROM not in summary:
            raise ValueError(f"{folder!r} holds no finished distillation")
        found = {name: summary[name] for name in ALIKE} | {"eval_file": sorted(summary["scores"])}
        first = first or (folder, found)
        for name, value in found.items():
            if value != first[1][name]:
                raise ValueError(
                    f"{folder!r} and {first[0]!r} cannot be compared: {name} is {value!r} and {first[1][name]!r}"
                )
        runs[summary["form"]].append({**summary, "folder": folder})
    if NOTHING not in runs:
        raise ValueError(f"expected a run of --form {NOTHING} among them: next to no feed-forward layers")
    return dict(runs)


def compare_distilled(folders: list[str], output_dir: str, rounds: int = 15) -> str:
    """Measure the speed of all models, in turns, and write a table, a picture and the numbers.

    Args:
        folders: finished runs of `fastbert distill`, several seeds of a form count together.
        output_dir: where to. rounds: of the timing.

    Returns:
        The table.

    Raises:
        ValueError: runs that cannot be compared.
        MissingExtraError: there are scores to draw, and matplotlib is not installed.
    """
    runs = load_runs(folders)
    some = next(iter(runs.values()))[0]
    files = list(some["scores"])
    if files:
        require_extra("bench", "matplotlib")
    folder = check_output_folder(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    teacher = load_teacher(some[DISTILLED_FROM])
    models = {"teacher": original_encoder(teacher)}
    models |= {form: encoder_of(AutoModel.from_pretrained(found[0]["folder"])) for form, found in runs.items()}
    cases = [case for case in CASES if case[1] <= teacher.max_seq_length]
    milliseconds = {f"{case[0]} x {case[1]}": speed(models, case, rounds=rounds) for case in cases}
    public = {form: [_public(run) for run in found] for form, found in runs.items()}
    results = {"machine": processor_name(), "milliseconds": milliseconds, "runs": public}
    write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    if files:
        scores = {form: [run["scores"][files[0]]["student"] for run in found] for form, found in runs.items()}
        scores["teacher"] = [some["scores"][files[0]]["teacher"]]
        plot_quality_against_latency(scores, milliseconds, _names(files)[0], folder / PICTURE)
    table = format_runs(runs, milliseconds)
    write_text(folder / TABLE, table + "\n")
    return table


def format_runs(runs: dict[str, list[dict[str, Any]]], milliseconds: dict[str, dict[str, float]]) -> str:
    """A Markdown table: each form, in the order of speed in the last case; of several seeds the mean and each value.

    Args:
        runs: as `load_runs` gives them. milliseconds: case -> form or "teacher" -> ms.
    """
    files = list(next(iter(runs.values()))[0]["scores"])
    head = ["form", "neurons active", "seeds", *(f"{case}: ms, over the teacher" for case in milliseconds)]
    for name in _names(files):
        head += [name, "of the gap"]
    head += ["hidden-state error", "1 - cosine"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    teacher = next(iter(runs.values()))[0]
    row = ["teacher", "all", "", *(f"{found['teacher']:.1f}" for found in milliseconds.values())]
    for file in files:
        row += [f"{100 * teacher['scores'][file]['teacher']:.2f}", "100 %"]
    lines.append("| " + " | ".join([*row, "0", "0"]) + " |")
    *_, last = milliseconds.values()
    for form in sorted(runs, key=last.get):
        found = runs[form]
        row = [form, f"{found[0]['neurons_per_token']} of {found[0]['neurons_per_layer']}", str(len(found))]
        row += [f"{times[form]:.1f}, {times['teacher'] / times[form]:.2f}x" for times in milliseconds.values()]
        for file in files:
            row += [_values([100 * run["scores"][file]["student"] for run in found], 2), _gap(runs, form, file)]
        row.append(_values([run["eval_hidden_error"] for run in found], 3))
        row.append(_values([run["eval_cosine_distance"] for run in found if "eval_cosine_distance" in run], 3))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _gap(runs: dict[str, list[dict[str, Any]]], form: str, file: str) -> str:
    """How much of the way from no feed-forward layers to the teacher a form goes: mean of its seeds over theirs."""
    scores = {name: statistics.mean(run["scores"][file]["student"] for run in runs[name]) for name in (NOTHING, form)}
    teacher = runs[form][0]["scores"][file]["teacher"]
    way = teacher - scores[NOTHING]
    return f"{100 * (scores[form] - scores[NOTHING]) / way:.0f} %" if way > 0 else "no gap"


def _values(values: list[float], digits: int) -> str:
    """The mean, and each value in brackets where there are several."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def _names(files: Collection[str]) -> list[str]:
    """Labelled files by the last parts of their paths, two or more: GLUE's are all named by their split."""
    return short_names(files, least=2)


def _public(run: dict[str, Any]) -> dict[str, Any]:
    """A summary that says nothing of where this machine keeps its files."""
    scores = dict(zip(_names(run["scores"]), run["scores"].values()))
    names = {DISTILLED_FROM: public_name(run[DISTILLED_FROM]), "folder": Path(run["folder"]).name}
    return {**run, **names, "scores": scores}
