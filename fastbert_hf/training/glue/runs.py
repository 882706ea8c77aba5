"""Fine-tuning many times: checkpoints x tasks x seeds, each in its folder, none twice."""

import copy
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from fastbert_hf.data.glue import CUSTOM, TASKS, TaskData, get_task
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.training.checkpoints import FRESH
from fastbert_hf.training.glue.classifier import ModelArguments, fit_head
from fastbert_hf.training.glue.finetuning import finetune
from fastbert_hf.training.glue.options import DataTrainingArguments, check_options_together, load_task
from fastbert_hf.training.glue.settings import SUMMARY, Work, checkpoint_content, find_work, run_settings
from fastbert_hf.training.glue.submission import zip_submission
from fastbert_hf.training.glue.table import write_table
from fastbert_hf.training.runs import check_fit, check_options, is_main_process


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
            root if alone else root / name / (task or CUSTOM) / f"seed-{seed}",
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
    with the same settings, weights and data, is not repeated; where evaluation, predictions or a push are asked for
    that it did not do, they are done with the model that it trained. One that was interrupted goes on from its last
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
    contents = {run.checkpoint: _check(options, run.checkpoint, data, list(loaded.values())) for run in runs}
    (alone,) = runs if len(runs) == 1 and runs[0].folder == Path(args.output_dir) else (None,)
    if args.push_to_hub and not args.hub_model_id and not alone:
        raise ValueError("--push_to_hub of several runs needs --hub_model_id; run names are appended to it")
    own = {run: args if run is alone else _own_arguments(run, args) for run in runs}

    settings = {
        run: run_settings(options, data, own[run], contents[run.checkpoint], loaded[run.task]) for run in runs
    }

    def work(run: Run) -> Work:
        return find_work(own[run], settings[run], loaded[run.task], data.overwrite_output_dir)

    for run in runs:
        work(run)  # raises before the first run starts
    summaries = []
    for number, run in enumerate(runs, start=1):
        left = work(run)
        done = left.is_done and left.summary is not None
        if is_main_process(args) and (done or not alone):
            state = "finished before" if done else run.folder
            print(f"[{number}/{len(runs)}] {run.name}, {run.task or CUSTOM}, seed {run.seed}: {state}", flush=True)
        summaries.append(
            left.summary if done else _start(run, options, data, own[run], loaded[run.task], run is alone)
        )
    if is_main_process(args) and not alone:
        _report(runs, Path(args.output_dir), args.do_predict)
    return summaries


def _check(
    options: ModelArguments, checkpoint: str, data: DataTrainingArguments, tasks: list[TaskData]
) -> dict[str, str | None]:
    """Check a checkpoint against every task without reading its weights; what identifies them."""
    for task in tasks:
        head = fit_head(options, checkpoint, task.task)
    tokenizer = load_tokenizer(options.tokenizer_name or checkpoint, **options.hub)
    check_fit(head.config, tokenizer, data.max_seq_length)
    return checkpoint_content(options, checkpoint, tokenizer)


def _own_arguments(run: Run, args: TrainingArguments) -> TrainingArguments:
    """The arguments of one of several runs."""
    args = copy.copy(args)
    args.output_dir, args.seed = str(run.folder), run.seed
    if args.hub_model_id:
        args.hub_model_id = f"{args.hub_model_id}-{run.name}-{run.task or CUSTOM}-seed-{run.seed}"
    return args


def _start(
    run: Run,
    options: ModelArguments,
    data: DataTrainingArguments,
    args: TrainingArguments,
    task: TaskData,
    alone: bool,
) -> dict[str, Any]:
    options = dataclasses.replace(options, model_name_or_path=[run.checkpoint], model_names=[])
    data = dataclasses.replace(data, task_name=[run.task] if run.task else [], seeds=[])
    return finetune(options, data, args, task, None if alone else run.name)[1]


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
