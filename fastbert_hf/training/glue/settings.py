"""What makes two fine-tunings the same run, and which work of a run is already done in its folder."""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PreTrainedTokenizerBase, TrainingArguments

from fastbert_hf.data.glue import CUSTOM, Split, TaskData
from fastbert_hf.files import file_digest, write_text
from fastbert_hf.training.checkpoints import FRESH, last_checkpoint
from fastbert_hf.training.glue.classifier import ModelArguments
from fastbert_hf.training.glue.options import DataTrainingArguments
from fastbert_hf.training.glue.submission import prediction_file

if TYPE_CHECKING:
    from collections.abc import Mapping

SUMMARY, SETTINGS, PREDICTIONS = "summary.json", "settings.json", "predictions"
PUSHED = "pushed_to"  # entry of the summary

# Every option counts except these, which cannot change what is trained or measured. Where an option names a file, a
# model or data, the content is compared instead.
FREE = {
    # paths and names
    *("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "cache_dir"),
    *("model_name_or_path", "model_names", "model_revision", "config_name", "tokenizer_name"),
    *("task_name", "glue_dir", "train_file", "validation_file", "test_file"),
    # which of the runs and which work; the seed of each run counts
    *("seeds", "do_eval", "do_predict", "max_eval_samples", "max_predict_samples"),
    # logging
    *("logging_dir", "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "include_num_input_tokens_seen"),
    *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    # the Hub
    *("token", "push_to_hub", "hub_token", "hub_model_id", "hub_private_repo", "hub_strategy", "hub_always_push"),
    "hub_revision",
    # how many checkpoints are kept, how fast rows are read, which process this is
    *("save_total_limit", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "local_rank"),
}
# recorded once they have been used: more work may be asked of a run later
LATER = ("validation", "test")
CONTENT = ("task", "checkpoint", "config", "tokenizer", "train")


def checkpoint_content(
    options: ModelArguments, checkpoint: str, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str | None]:
    """What identifies the files that a run starts from.

    Args:
        options: `config_name`, and how to fetch from the Hub.
        checkpoint: model folder or Hub name.
        tokenizer: as loaded.

    Returns:
        checkpoint and config: digest of the local files, or name and commit of the Hub; None where there is no other
        configuration than the checkpoint's. tokenizer: digest of what it does.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    does = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    does |= {"truncation": None, "padding": None}  # each call sets them
    sides = [tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_input_names]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {
        "checkpoint": _identify(checkpoint, options.hub, weights=True),
        "config": options.config_name and _identify(options.config_name, options.hub, weights=False),
        "tokenizer": _digest([does, sides, special]),
    }


def _identify(name: str, hub: dict[str, Any], weights: bool) -> str:
    path = Path(name)
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        return f"{name} at {getattr(AutoConfig.from_pretrained(name, **hub), '_commit_hash', None)}"
    kinds = (".safetensors", ".bin") if weights else ()
    files = [file for file in sorted(path.iterdir()) if file.suffix in kinds or file.name == "config.json"]
    return _digest([[file.name, file_digest(file)] for file in files if file.name != "training_args.bin"])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def run_settings(
    options: ModelArguments,
    data: DataTrainingArguments,
    args: TrainingArguments,
    content: "Mapping[str, str | None]",
    task: TaskData,
) -> dict[str, Any]:
    """Everything that a run's result follows from, beside the code: what must be equal to go on with it.

    Args:
        options, data, args: as the user gave them, with the run's own seed.
        content: from `checkpoint_content`.
        task: the data.

    Returns:
        Values that JSON can hold; neither paths nor tokens.
    """
    values = args.to_dict() | {"world_size": args.world_size, "train_batch_size": args.train_batch_size}
    for own in (data, options):
        values |= {field.name: getattr(own, field.name) for field in fields(own)}
    values = {name: value for name, value in values.items() if name not in FREE}
    trains, evaluates = args.do_train, args.do_eval or args.eval_strategy != "no" or data.early_stopping_patience
    values |= {"task": task.task.name, **content}
    values["train"] = _examples({"train": task.train}) if trains and task.train else None
    values["validation"] = _examples(task.validations) if evaluates and task.validations else None
    values["test"] = _examples(task.tests) if args.do_predict and task.tests else None
    return json.loads(json.dumps(values, default=str))


def _examples(splits: "Mapping[str, Split]") -> str:
    count = sum(map(len, splits.values()))
    return f"{count} examples of digest {_digest([[s.texts, s.labels, s.ids] for s in splits.values()])[:16]}"


@dataclass(frozen=True)
class Work:
    """What is left to do.

    Attributes:
        summary: of the steps that are done; None where nothing is.
        recorded: the settings on record, with those of the work to come.
        train, evaluate, predict, push: the steps that are asked for and not done.
    """

    summary: dict[str, Any] | None
    recorded: dict[str, Any]
    train: bool
    evaluate: bool
    predict: bool
    push: bool

    @property
    def is_done(self) -> bool:
        """Whether nothing is left."""
        return not (self.train or self.evaluate or self.predict or self.push)


def find_work(args: TrainingArguments, settings: dict[str, Any], task: TaskData, overwrite: bool) -> Work:
    """Compare a run with what its folder holds; nothing is changed.

    Args:
        args: the run's own; `output_dir` and what it asks for are looked at.
        settings: from `run_settings`.
        task: the data.
        overwrite: start anew, whatever the folder holds.

    Returns:
        The work that is left.

    Raises:
        ValueError: naming the first setting in which the folder's run, or that of the checkpoint to resume from,
            differs; or there are checkpoints and no record of their settings.
    """
    folder = Path(args.output_dir)
    anew = Work(None, settings, args.do_train, args.do_eval, args.do_predict, args.push_to_hub)
    if overwrite:
        return anew
    resumed = args.resume_from_checkpoint
    named = Path(resumed).absolute().parent if resumed and resumed.lower() not in (*FRESH, "true") else None
    if named is not None and named != folder.absolute():
        _read_same(named, settings)
    stored = _read_same(folder, settings)
    if stored is None and named is None and args.do_train and last_checkpoint(folder):
        raise ValueError(
            f"{str(folder)!r} holds checkpoints and no {SETTINGS} that says how they were made; choose another "
            "output_dir, --overwrite_output_dir, or name one of them with --resume_from_checkpoint"
        )
    recorded = settings | {name: settings[name] or (stored or {}).get(name) for name in LATER}
    file = folder / SUMMARY
    trained = not args.do_train or (folder / "config.json").is_file()
    if stored is None or not file.is_file() or not trained or (resumed and resumed.lower() in FRESH):
        return Work(None, recorded, *(anew.train, anew.evaluate, anew.predict, anew.push))
    summary = json.loads(file.read_text(encoding="utf-8"))
    measured = all(
        f"{metric}{task.suffix(name)}" in summary for name in task.validations for metric in task.task.metrics
    )
    predicted = stored.get("test") is not None and all(
        prediction_file(folder / PREDICTIONS, task.task, name).is_file() for name in task.tests
    )
    return Work(
        summary,
        recorded,
        train=False,
        evaluate=args.do_eval and not measured,
        predict=args.do_predict and not predicted,
        push=args.push_to_hub and summary.get(PUSHED) != repository(args),
    )


def repository(args: TrainingArguments) -> str:
    """Where a run is pushed to."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def _read_same(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The settings on record in a folder, if they are those of this run; None if there are none."""
    file = folder / SETTINGS
    if not file.is_file():
        return None
    stored = json.loads(file.read_text(encoding="utf-8"))
    if stored.get("task") == "own":
        stored["task"] = CUSTOM  # whose earlier name that is
    for name, value in settings.items():
        if name in LATER and (value is None or stored.get(name) is None):
            continue
        # An option that only one version of the Trainer knows has its default in the other.
        if (name in stored or name in CONTENT) and stored.get(name) != value:
            raise ValueError(
                f"{str(folder)!r} belongs to a run with other settings: {name} is {stored.get(name)!r} there, "
                f"{value!r} here; choose another output_dir, or --overwrite_output_dir"
            )
    return stored


def record_start(args: TrainingArguments, work: Work) -> None:
    """Write the settings of a run that starts or goes on, and remove what an earlier one of them has written.

    Args:
        args: the run's own.
        work: from `find_work`.
    """
    folder = Path(args.output_dir)
    if work.summary is None:
        (folder / SUMMARY).unlink(missing_ok=True)
        for file in (folder / PREDICTIONS).glob("*.tsv"):
            file.unlink()
    write_text(folder / SETTINGS, json.dumps(work.recorded, indent=2) + "\n")
