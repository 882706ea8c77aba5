"""Options of a fine-tuning run: which data, and what does not combine, found before anything is read."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from fastbert_hf.data.glue import TASKS, Task, TaskData, get_task, load_glue, load_task_files
from fastbert_hf.training.glue.classifier import ModelArguments
from fastbert_hf.training.leaf_balance import check_balance

# options of the Trainer that leave it without one answer for each example
MEASURABLE = {"prediction_loss_only": False, "eval_do_concat_batches": True, "batch_eval_metrics": False}


@dataclass
class DataTrainingArguments:
    """What models are fine-tuned and evaluated on; the names are those of the official run_glue example."""

    task_name: list[str] = field(
        default_factory=list,
        metadata={"help": "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, several of them, or all"},
    )
    glue_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder <task>/{train,validation,test}.jsonl (or .json, .parquet, .csv, .tsv with a "
            "header); without it the Hub's nyu-mll/glue"
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "own training data: .jsonl, .json, .parquet, .csv or .tsv"}
    )
    validation_file: str | None = field(default=None, metadata={"help": "own validation data of the same columns"})
    test_file: str | None = field(default=None, metadata={"help": "own data to predict, without labels"})
    seeds: list[int] = field(default_factory=list, metadata={"help": "a run for each; default: the one of --seed"})
    max_seq_length: int = field(default=128, metadata={"help": "longer inputs are cut to this many tokens"})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "pad to max_seq_length instead of the longest input of each batch"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use only the first so many rows"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate only the first so many rows"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "predict only the first so many rows"})
    class_weights: str = field(
        default="none",
        metadata={
            "help": "balanced: the rarer a class, the more its examples weigh",
            "choices": ["none", "balanced"],
        },
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={"help": "stop after so many evaluations without a better main metric and keep the best; 0: never"},
    )
    balance_leaves: float = field(
        default=0.0,
        metadata={"help": "rate at which trees' thresholds follow medians, e.g. 0.5; 0: never"},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove what output_dir holds of these runs instead of resuming from it"}
    )

    def __post_init__(self):
        names = [self.task_name] if isinstance(self.task_name, str) else self.task_name or []
        self.task_name = [part for name in names for part in name.split(",") if part]

    def check(self, args: TrainingArguments) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ValueError: naming the option.
        """
        if not (args.do_train or args.do_eval or args.do_predict):
            raise ValueError("nothing to do: give --do_train, --do_eval or --do_predict")
        own = [name for name in ("train_file", "validation_file", "test_file") if getattr(self, name)]
        if own and (self.task_name or self.glue_dir):
            raise ValueError(f"--task_name with --glue_dir, or --{own[0]}; got both")
        if not (own or self.task_name):
            raise ValueError("no data: give --task_name, or --train_file and --validation_file")
        wanted = {"train_file": args.do_train, "validation_file": args.do_eval, "test_file": args.do_predict}
        if own and (missing := [name for name, needed in wanted.items() if needed and name not in own]):
            raise ValueError(f"--{missing[0]} is missing; --{' and --'.join(own)} alone do not do what was asked")
        if self.early_stopping_patience < 0:
            raise ValueError(f"early_stopping_patience must be 0 or above; got {self.early_stopping_patience}")
        if not 0 <= args.label_smoothing_factor < 1:
            raise ValueError(
                f"label_smoothing_factor must be 0 or above and below 1; got {args.label_smoothing_factor}"
            )
        check_balance(self.balance_leaves)
        self._check_training(args)
        for name in self.task_name:
            for task in TASKS.values() if name.lower() == "all" else [get_task(name)]:
                check_task(task, self, args)

    def _check_training(self, args: TrainingArguments) -> None:
        """Options about training without training, and about evaluations that cannot be made."""
        patience = self.early_stopping_patience
        needs = {
            "early_stopping_patience": patience,
            "balance_leaves": self.balance_leaves,
            "class_weights": self.class_weights != "none",
            "push_to_hub": args.push_to_hub,
        }
        if not args.do_train and (unused := [name for name, given in needs.items() if given]):
            raise ValueError(f"{unused[0]} needs --do_train")
        if patience and not self.task_name and not self.validation_file:
            raise ValueError("early_stopping_patience needs --validation_file")
        for name, value in MEASURABLE.items():
            if (args.do_eval or args.do_predict or patience) and getattr(args, name) != value:
                raise ValueError(f"{name} must be {value} where answers are measured or written")


def check_task(task: Task, options: DataTrainingArguments, args: TrainingArguments) -> None:
    """Check that the options mean something for a task.

    Args:
        task: a GLUE task, or one of one's own.
        options: `class_weights` and `early_stopping_patience` are looked at.
        args: likewise `label_smoothing_factor` and `metric_for_best_model`.

    Raises:
        ValueError: naming option and task.
    """
    of_classes = {
        "class_weights": options.class_weights != "none",
        "label_smoothing_factor": args.label_smoothing_factor,
    }
    if task.is_regression and (given := [name for name, value in of_classes.items() if value]):
        raise ValueError(f"{given[0]}: {task.name} has no classes")
    metrics = [*task.metrics, "loss"]
    evaluates = options.early_stopping_patience or args.eval_strategy != "no"
    best = args.metric_for_best_model
    if args.do_train and evaluates and best and best.removeprefix("eval_") not in metrics:
        raise ValueError(f"metric_for_best_model must be one of {', '.join(metrics)} for {task.name}; got {best!r}")


def check_options_together(
    model_options: ModelArguments, options: DataTrainingArguments, args: TrainingArguments
) -> None:
    """Check all options of a command without reading anything.

    Args:
        model_options, options, args: what a run is asked to do.

    Raises:
        ValueError: naming the option that is wrong, or one of those that do not combine.
    """
    model_options.check()
    options.check(args)
    needs = {"freeze_trees": model_options.freeze_trees, "lora_rank": model_options.lora_rank}
    if not args.do_train and (unused := [name for name, given in needs.items() if given]):
        raise ValueError(f"--{unused[0]} needs --do_train")


def load_task(options: DataTrainingArguments, name: str | None, args: TrainingArguments) -> TaskData:
    """Load the data of one task.

    Args:
        options: where it is.
        name: GLUE task, or None for files of one's own.
        args: `do_train` and `do_predict` say which splits must be there.

    Returns:
        The task and its splits, cut to the options' limits.

    Raises:
        ValueError: if the data is missing or bad.
    """
    if name is None:
        files = [options.validation_file] if options.validation_file else []
        tests = [options.test_file] if options.test_file else []
        data = load_task_files(None, options.train_file, files, tests)
    else:
        data = load_glue(name, options.glue_dir, need_train=args.do_train, need_test=args.do_predict)
    check_task(data.task, options, args)
    return data.limited(options.max_train_samples, options.max_eval_samples, options.max_predict_samples)
