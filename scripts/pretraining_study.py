#!/usr/bin/env python
"""Trees against dense layers, pretrained alike: every run of the comparison in docs/results.md, and its tables.

    python scripts/pretraining_study.py --corpus runs/study/corpus --output_dir runs/study

Runs that are finished are not done again, and one that was interrupted goes on. The whole takes hours.
`--runs leaf-16x32-from-32` does a part of it: this run, and those that it needs.
"""

import math
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from fastbert_hf.cli import compare
from fastbert_hf.cli.arguments import RecipeArgumentParser, run_command
from fastbert_hf.files import check_output_folder
from fastbert_hf.recipes import load_yaml

RECIPE = "pretrain/study-equal-tokens"
EIGHTHS = 8  # a dense run that others begin from keeps so many checkpoints


@dataclass(frozen=True)
class StudyRun:
    """One model of the study.

    Attributes:
        model: its recipe, model/study-MODEL.
        start: the run it begins from, and the eighths of the budget spent by then; None: the beginning.
        teacher: the finished run that it learns from beside the text, or None.
        options: further options of `fastbert pretrain`.
    """

    model: str
    start: tuple[str, int] | None = None
    teacher: str | None = None
    options: tuple[str, ...] = ()

    @property
    def needs(self) -> list[str]:
        """The runs that come before it."""
        return [name for name in (self.start and self.start[0], self.teacher) if name]


def leaves(model: str, start: tuple[str, int], teacher: str | None = None) -> StudyRun:
    """A run of leaf trees."""
    return StudyRun(model, start, teacher, ("--balance_leaves", "0.5"))


RUNS = {
    "dense-511": StudyRun("dense-511"),
    "dense-36": StudyRun("dense-36"),
    "dense-32": StudyRun("dense-32"),
    "dense-9": StudyRun("dense-9"),
    "1x8": StudyRun("1x8"),
    "4x6": StudyRun("4x6"),
    "1x8-balanced": StudyRun("1x8", options=("--balance_leaves", "0.1")),
    "leaf-16x32-from-32": leaves("leaf-16x32", ("dense-32", 2)),
    "leaf-64x32-from-32": leaves("leaf-64x32", ("dense-32", 2)),
    "leaf-256x32-from-32": leaves("leaf-256x32", ("dense-32", 2)),
    "leaf-16x32-from-511-at-half": leaves("leaf-16x32", ("dense-511", 4)),
    "leaf-16x32-from-511-at-three-quarters": leaves("leaf-16x32", ("dense-511", 6)),
    "leaf-16x32-from-511-taught": leaves("leaf-16x32", ("dense-511", 4), "dense-511"),
    "dense-32-taught": StudyRun("dense-32", ("dense-32", 4), "dense-511"),
}


@dataclass
class StudyArguments:
    """Options of the study."""

    corpus: str = field(metadata={"help": "made by `fastbert prepare --vocab_size 1024 --max_seq_length 16`"})
    output_dir: str = field(default="runs/study", metadata={"help": "one folder a run, and comparison/"})
    runs: list[str] = field(default_factory=lambda: list(RUNS), metadata={"help": f"of {', '.join(RUNS)}"})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "of weights, data order and masks"})
    threads: int = field(default=1, metadata={"help": "of each run"})
    budget_tokens: float | None = field(default=None, metadata={"help": "of every run, in place of the recipe's"})
    options: str = field(default="", metadata={"help": "more options of every run: --options='--learning_rate 6e-3'"})


def with_needed(names: list[str]) -> list[str]:
    """The names of runs, each after those that it needs.

    Raises:
        ValueError: an unknown name.
    """
    found: list[str] = []
    for name in names:
        if name not in RUNS:
            raise ValueError(f"runs has an unknown name {name!r}; expected some of {', '.join(RUNS)}")
        found += [one for one in (*with_needed(RUNS[name].needs), name) if one not in found]
    return found


def eighth_of_steps(study: StudyArguments) -> int:
    """Steps in an eighth of the budget."""
    recipe = load_yaml(RECIPE)
    tokens = recipe["per_device_train_batch_size"] * recipe["max_seq_length"]
    return math.ceil((study.budget_tokens or recipe["budget_tokens"]) / tokens) // EIGHTHS


def command_of(name: str, seed: int, study: StudyArguments) -> list[str]:
    """The command line of a run."""
    run, eighth = RUNS[name], eighth_of_steps(study)
    command = [sys.executable, "-m", "fastbert_hf", "pretrain", "--config", RECIPE]
    command += ["--model_config", f"model/study-{run.model}", "--corpus", study.corpus, "--seed", str(seed)]
    command += ["--output_dir", folder_of(name, seed, study), *run.options, *shlex.split(study.options)]
    if study.budget_tokens:
        command += ["--budget_tokens", str(study.budget_tokens)]
    if any(other.start and other.start[0] == name for other in RUNS.values()):
        command += ["--save_minutes", "0", "--save_strategy", "steps", "--save_steps", str(eighth)]
        command += ["--save_total_limit", str(EIGHTHS + 1)]
    if run.start:
        before, eighths = run.start
        command += ["--dense_checkpoint", f"{folder_of(before, seed, study)}/checkpoint-{eighths * eighth}"]
    if run.teacher:
        command += ["--teacher_name_or_path", folder_of(run.teacher, seed, study)]
    return command


def folder_of(name: str, seed: int, study: StudyArguments) -> str:
    """The folder of a run."""
    return str(Path(study.output_dir) / f"{name}-{seed}")


def main(argv: list[str] | None = None) -> str:
    """Train what is missing, and compare; returns the table."""
    (study,) = RecipeArgumentParser(StudyArguments, description=__doc__).parse(argv)
    check_output_folder(study.output_dir)
    names = with_needed(study.runs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(study.threads)}
    for seed in study.seeds:
        for name in names:
            if not (Path(folder_of(name, seed, study)) / "summary.json").is_file():
                print(f"\n{name}, seed {seed}", flush=True)
                subprocess.run(command_of(name, seed, study), check=True, env=environment)
    folders = [folder_of(name, seed, study) for name in names for seed in study.seeds]
    return compare.main(["--runs", *folders, "--output_dir", str(Path(study.output_dir) / "comparison")])


if __name__ == "__main__":
    sys.exit(run_command(main))
