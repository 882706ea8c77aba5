"""Make a model that you have faster: trees in place of its feed-forward layers, learned from your text.

fastbert distill --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --train_file text.txt \
    --budget_minutes 60 --output_dir runs/fast-minilm
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

import fastbert_hf  # noqa: F401  registers the model with the Auto classes
from fastbert_hf.benchmarks.distilled import form_for_speed, speed_rows
from fastbert_hf.benchmarks.machine import processor_name
from fastbert_hf.cli.arguments import RecipeArgumentParser
from fastbert_hf.files import write_text
from fastbert_hf.hub.card import DISTILLATION_PAGE, LICENCE_METADATA, SUMMARY, hub_name, kept_metadata
from fastbert_hf.training.distillation.report import render_report
from fastbert_hf.training.distillation.run import distill
from fastbert_hf.training.distillation.settings import DistillationArguments, earlier_form
from fastbert_hf.training.distillation.teacher import Teacher, load_teacher
from fastbert_hf.training.publishing import write_model_card

DEFAULTS = {"learning_rate": 6e-4, "logging_steps": 50, "save_total_limit": 1, "report_to": ["none"]}


@dataclass
class SpeedArguments:
    """Whether the speed is measured."""

    measure_speed: bool = field(default=True, metadata={"help": "time original and result in the end, one thread"})


def inherited_metadata(name: str, teacher: Teacher) -> dict[str, Any]:
    """What the card of a student takes over: licence and language of its teacher, and where it comes from.

    Args:
        name: folder or Hub name of the teacher. One in a folder says itself which model it comes from.
        teacher: what it is.
    """
    kept = kept_metadata(teacher.folder)
    inherited = {key: kept[key] for key in (*LICENCE_METADATA, "language", "base_model") if key in kept}
    own = inherited.pop("base_model", [])
    bases = [name] if hub_name(name) else [own] if isinstance(own, str) else own
    bases = [base for base in bases if hub_name(base)]  # a card may name a folder on the machine of its author
    return inherited | ({"base_model": bases if len(bases) > 1 else bases[0]} if bases else {})


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, distil, measure, write the page; returns the summary."""
    parser = RecipeArgumentParser(
        (DistillationArguments, SpeedArguments, TrainingArguments),
        extra="training",
        prog="fastbert distill",
        description=__doc__,
    )
    parser.set_defaults(**DEFAULTS)
    options, measured, args = parser.parse(argv)
    folder = Path(args.output_dir)
    if options.speed is not None:
        if options.form is not None:
            raise ValueError("--speed chooses the form of the layers; leave out --form")
        options.check(args)
        options.form = earlier_form(options, folder) or form_for_speed(
            load_teacher(options.model_name_or_path), options.speed, options.fff_depth, options.fff_trees
        )
    student, teacher, summary = distill(options, args)
    if measured.measure_speed:
        summary |= {"speed": speed_rows(student.model, teacher), "machine": processor_name()}
    write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    page = render_report(summary)
    write_text(folder / DISTILLATION_PAGE, page)
    declared = inherited_metadata(options.model_name_or_path, teacher)
    write_model_card(student.model, folder, args.hub_model_id, declared)
    print(page)
    return summary
