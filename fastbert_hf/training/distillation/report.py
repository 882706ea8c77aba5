"""distillation.md: what a distilled model kept, what it gained, and what was not tested."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastbert_hf.hub.card import DISTILLED_FROM, public_name
from fastbert_hf.training.distillation.objective import WORDS

NOT_TESTED = (
    "Other text than that named above, other languages, social bias, and tasks that are not in the table of scores. "
    "A score that hardly moves may hide what the hidden-state error shows: the student differs from its teacher by "
    "that much."
)


def short_names(files: Collection[str], least: int = 1) -> list[str]:
    """The last `least` parts of files' paths, or as many more as tell them apart: for use on other machines."""
    paths = [Path(file).absolute().parts for file in files]
    for count in range(least, max(map(len, paths), default=0) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return []


def render_report(summary: Mapping[str, Any]) -> str:
    """The page.

    Args:
        summary: of `distill`, with `scores` ({file: {"teacher", "fitted", "student"}}) and `speed` (a list of
            {"case", "teacher_ms", "student_ms"}) beside it where they were measured.
    """
    lines = [
        f"# Distilled from {public_name(summary[DISTILLED_FROM])}",
        "",
        f"Feed-forward layers: {summary['form']}. A token uses {summary['neurons_per_token']:,} of "
        f"{summary['neurons_per_layer']:,} neurons of a layer.",
        "",
        "## What was kept",
        "",
    ]
    if summary.get("scores"):
        lines += ["| score on | teacher | after fitting the layers | this model |", "|---|---|---|---|"]
        for name, row in zip(short_names(summary["scores"]), summary["scores"].values()):
            lines.append(f"| {name} | {row['teacher']:.4f} | {row['fitted']:.4f} | {row['student']:.4f} |")
        lines += ["", "Rank correlation for embedders and regression, share of right answers for classifiers.", ""]
    lines += ["| on held-out text | after fitting the layers | this model |", "|---|---|---|"]
    names = WORDS | {"hidden_error": "hidden-state error, last layer"}
    for name, words in names.items():
        if f"eval_{name}" in summary:
            lines.append(f"| {words} | {summary[f'fitted_{name}']:.4f} | {summary[f'eval_{name}']:.4f} |")
    lines += ["", "The error is a share of the teacher's variance: 0 is the teacher, 1 a constant.", ""]
    lines += ["| layer | hidden-state error |", "|---|---|"]
    lines += [f"| {number} | {error:.4f} |" for number, error in enumerate(summary["eval_hidden_error_by_layer"])]
    if summary.get("speed"):
        lines += ["", "## Speed", "", "| texts x tokens | teacher, ms | this model, ms | |", "|---|---|---|---|"]
        for row in summary["speed"]:
            ratio = row["teacher_ms"] / row["student_ms"]
            lines.append(
                f"| {row['case']} | {row['teacher_ms']:.2f} | {row['student_ms']:.2f} | {ratio:.2f} times the speed |"
            )
        lines += ["", f"One thread, float32, medians of interleaved runs on {summary['machine']}."]
    lines += ["", "## Leaves", ""]
    if summary["largest_leaf_share"] is None:
        lines.append("This model has no leaf trees.")
    else:
        lines.append(
            f"{summary['dead_leaves']} leaves were not reached by any held-out token; the fullest one took "
            f"{summary['largest_leaf_share']:.1%} of them."
        )
    refitted = "output weights solved once more; " if summary.get("refit") else ""
    lines += ["", "## How", ""]
    lines.append(
        f"{summary['fit_seconds']:.0f} s to fit the layers, {summary['train_seconds']:.0f} s and "
        f"{summary['steps']:,} steps end to end; {refitted}{summary['texts']:,} texts, "
        f"{summary['tokens_seen']:,} tokens seen; seed {summary['seed']}, learning rate {summary['learning_rate']:g}."
    )
    lines += ["", "| text | SHA-256 | licence |", "|---|---|---|"]
    lines += [f"| {source['name']} | {source['sha256'][:16]} | not stated |" for source in summary["sources"]]
    lines += ["", "## Not tested", "", NOT_TESTED, ""]
    return "\n".join(lines)
