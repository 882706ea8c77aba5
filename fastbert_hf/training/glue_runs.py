"""Fine-tuning many times: checkpoints x tasks x seeds, each in its folder, none twice."""

import copy
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, TrainingArguments

from fastbert_hf.data.atomic import write_text
from fastbert_hf.data.glue import TASKS, TaskData, get_task
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.training.checkpoints import FRESH
from fastbert_hf.training.classifier import ModelArguments, fit_head
from fastbert_hf.training.finetuning import finetune
from fastbert_hf.training.glue_options import DataTrainingArguments, check_options_together, load_task
from fastbert_hf.training.glue_submission import zip_submission
from fastbert_hf.training.glue_table import write_table
from fastbert_hf.training.publishing import RECORDED
from fastbert_hf.training.runs import check_fit, check_options, is_main_process

SUMMARY, SETTINGS = "summary.json", "settings.json"
# what else changes a result, beside what a recipe records; seed and folder are the run's own
ARGUMENTS = ("eval_strategy", "load_best_model_at_end", "metric_for_best_model", "label_smoothing_factor", "do_train")
DATA = ("max_seq_length", "pad_to_max_length", "max_train_samples", "max_eval_samples", "class_weights")
MODEL = ("config_name", "tokenizer_name", "freeze_trees", "lora_rank", "lora_alpha", "lora_trees")


@dataclass(frozen=True)
class Run:
    """One fine-tuning.

    Attributes:
        checkpoint: model folder or Hub name.
        name: what folder and table call it.
        task: GLUE task, None for data of one's own.
        seed: of head, data order and dropout.
        folder: receives everything.
    """

    checkpoint: str
    name: str
    task: str | None
    seed: int
    folder: Path


def task_names(wanted: list[str]) -> list[str | None]:
    """Expand the names on a command line.

    Args:
        wanted: GLUE tasks in any case, "all", or nothing for data of one's own.

    Returns:
        Tasks without repetition; [None] for data of one's own.

    Raises:
        ValueError: for an unknown name.
    """
    names = [task for name in wanted for task in (TASKS if name.lower() == "all" else [get_task(name).name])]
    return list(dict.fromkeys(names)) or [None]


def model_names(options: ModelArguments) -> list[str]:
    """What folders and tables call the checkpoints.

    Args:
        options: checkpoints, and names if the user gave any.

    Returns:
        As many different names, each fit for a folder.

    Raises:
        ValueError: if there are too few or too many names, two are equal, or one is no name of a folder.
    """
    checkpoints = options.model_name_or_path
    names = options.model_names or [Path(os.path.abspath(checkpoint)).name for checkpoint in checkpoints]
    if len(names) != len(checkpoints):
        raise ValueError(f"--model_names wants one for each of {len(checkpoints)} models; got {', '.join(names)}")
    if len(set(names)) < len(names):
        raise ValueError(f"two models have the same name; --model_names tells them apart; got {', '.join(names)}")
    for name in names:
        if name != Path(name).name or name in ("", "..", "."):
            raise ValueError(f"--model_names become folders; {name!r} cannot")
    return names


def plan_runs(options: ModelArguments, data: DataTrainingArguments, args: TrainingArguments) -> list[Run]:
    """List the runs that the options ask for.

    Args:
        options: checkpoints. data: tasks and seeds. args: output folder, and the seed where `data` names none.

    Returns:
        The runs, one checkpoint after the other. A single run has `output_dir` for itself unless names or seeds were
        given; otherwise run folders are <output_dir>/<model>/<task>/seed-<seed>.

    Raises:
        ValueError: as `task_names` and `model_names`.
    """
    tasks, seeds = task_names(data.task_name), list(dict.fromkeys(data.seeds or [args.seed]))
    named = list(zip(options.model_name_or_path, model_names(options), strict=True))
    root = Path(args.output_dir)
    alone = len(tasks) * len(seeds) * len(named) == 1 and not (options.model_names or data.seeds)
    return [
        Run(
            checkpoint,
            name,
            task,
            seed,
            root if alone else root / name / (task or "own") / f"seed-{seed}",
        )
        for checkpoint, name in named
        for task in tasks
        for seed in seeds
    ]


def finetune_all(
    options: ModelArguments, data: DataTrainingArguments, args: TrainingArguments
) -> list[dict[str, Any]]:
    """Run everything that the options ask for, and write one table of it.

    All data, configurations and tokenizers are read and checked before the first run starts. A run that is finished,
    with the same settings, weights and data, is not repeated; one that was interrupted goes on from its last
    checkpoint or starts again. Processes that work on different models, tasks or seeds can share an output folder.

    Args:
        options: checkpoints, and which of their weights are trained.
        data: tasks and seeds.
        args: optimisation, and `output_dir`.

    Returns:
        The summaries, in the order of the runs.

    Raises:
        ValueError: for anything wrong in the options or the data, before training starts.
    """
    check_options_together(options, data, args)
    check_options(args, data.max_seq_length)
    runs = plan_runs(options, data, args)
    resumed = args.resume_from_checkpoint
    if len(runs) > 1 and resumed and resumed.lower() not in (*FRESH, "true"):
        raise ValueError(f"--resume_from_checkpoint {resumed!r} is a checkpoint of one run; {len(runs)} are wanted")
    loaded = {task: load_task(data, task, args) for task in dict.fromkeys(run.task for run in runs)}
    checkpoints = {run.checkpoint: _check(options, run.checkpoint, data, list(loaded.values())) for run in runs}
    if len(runs) == 1 and runs[0].folder == Path(args.output_dir):
        (task,) = loaded.values()
        return [finetune(options, data, args, task)[1]]
    if args.push_to_hub and not args.hub_model_id:
        raise ValueError("--push_to_hub of several runs needs --hub_model_id; run names are appended to it")
    settings = {run: _settings(options, data, args, checkpoints[run.checkpoint], loaded[run.task]) for run in runs}
    for run in runs if not data.overwrite_output_dir else ():
        _finished(run, settings[run])  # raises before the first run starts
    summaries = []
    for number, run in enumerate(runs, start=1):
        summary = None if data.overwrite_output_dir else _finished(run, settings[run])
        if is_main_process(args):
            state = "finished before" if summary else run.folder
            print(f"[{number}/{len(runs)}] {run.name}, {run.task or 'own'}, seed {run.seed}: {state}", flush=True)
        summaries.append(summary or _start(run, options, data, args, loaded[run.task], settings[run]))
    if is_main_process(args):
        _report(runs, Path(args.output_dir), args.do_predict)
    return summaries


def _check(
    options: ModelArguments, checkpoint: str, data: DataTrainingArguments, tasks: list[TaskData]
) -> dict[str, str]:
    """Check a checkpoint against every task without reading its weights; what identifies them."""
    for task in tasks:
        head = fit_head(options, checkpoint, task.task)
    tokenizer = load_tokenizer(options.tokenizer_name or checkpoint, **options.hub)
    check_fit(head.config, tokenizer, data.max_seq_length)
    folder = Path(checkpoint)
    if not folder.is_dir():
        commit = getattr(AutoConfig.from_pretrained(checkpoint, **options.hub), "_commit_hash", None)
        return {"checkpoint": f"{checkpoint} at {commit}"}
    files = sorted(
        file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin") or file.name == "config.json"
    )
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return {"checkpoint": digest.hexdigest()}


def _settings(
    options: ModelArguments, data: DataTrainingArguments, args: TrainingArguments, checkpoint: dict, task: TaskData
) -> dict[str, Any]:
    """Everything that a run's result follows from, beside the code: what must be equal to take it for finished."""
    values = args.to_dict()
    chosen = {name: values[name] for name in (*RECORDED, *ARGUMENTS) if name in values and name != "seed"}
    chosen |= {name: getattr(data, name) for name in (*DATA, "early_stopping_patience")}
    chosen |= {name: getattr(options, name) for name in MODEL}
    content = [[s.texts, s.labels] for s in (task.train, *task.validations.values()) if s is not None]
    examples = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.loads(json.dumps({**chosen, **checkpoint, "examples": examples}))


def _finished(run: Run, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a run that is done; None if it is still to do."""
    file = run.folder / SETTINGS
    if not file.is_file():
        return None
    stored = json.loads(file.read_text(encoding="utf-8"))
    for name in settings:
        if stored.get(name) != settings[name]:
            raise ValueError(
                f"{str(run.folder)!r} belongs to a run with other settings: {name} is {stored.get(name)!r} there, "
                f"{settings[name]!r} here; choose another output_dir, or --overwrite_output_dir"
            )
    summary = run.folder / SUMMARY
    return json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None


def _start(
    run: Run,
    options: ModelArguments,
    data: DataTrainingArguments,
    args: TrainingArguments,
    task: TaskData,
    settings: dict[str, Any],
) -> dict[str, Any]:
    if is_main_process(args):
        (run.folder / SUMMARY).unlink(missing_ok=True)
        write_text(run.folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
    args = copy.copy(args)
    args.output_dir, args.seed = str(run.folder), run.seed
    if args.hub_model_id:
        args.hub_model_id = f"{args.hub_model_id}-{run.name}-{run.task or 'own'}-seed-{run.seed}"
    options = dataclasses.replace(options, model_name_or_path=[run.checkpoint], model_names=[])
    data = dataclasses.replace(data, task_name=[run.task] if run.task else [], seeds=[])
    return finetune(options, data, args, task, run.name)[1]


def _report(runs: list[Run], folder: Path, predicted: bool) -> None:
    """The table of all runs in the folder, those of other processes too, and archives of predictions."""
    summaries = [
        json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(f"*/*/seed-*/{SUMMARY}"))
    ]
    order = {name: number for number, name in enumerate(dict.fromkeys(run.name for run in runs))}
    summaries.sort(key=lambda summary: order.get(summary["model"], len(order)))
    print(f"\n{write_table(summaries, folder)}\n")
    if not predicted:
        return
    for name, seed in dict.fromkeys((run.name, run.seed) for run in runs if run.task):
        target = folder / name / f"submission-seed-{seed}.zip"
        missing = zip_submission(list((folder / name).glob(f"*/seed-{seed}/predictions/*.tsv")), target)
        print(f"{target}{': the server also wants ' + ', '.join(missing) if missing else ''}")
