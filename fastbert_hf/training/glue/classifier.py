"""The model of a fine-tuning run: loading it with a head that fits the task, and which of its weights are trained."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from fastbert_hf.bert_layouts import FAMILIES
from fastbert_hf.configuration_fastbert import FastBertConfig
from fastbert_hf.data.glue import Task
from fastbert_hf.fff_layer import FastFeedForward
from fastbert_hf.leaf_layer import LeafFeedForward
from fastbert_hf.training.checkpoints import check_weights

if TYPE_CHECKING:
    from peft import PeftModel

TREE_LAYERS = (FastFeedForward, LeafFeedForward)


@dataclass
class ModelArguments:
    """Which models are fine-tuned, and which of their weights."""

    model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "model folders or Hub names; several are compared in one table"}
    )
    model_names: list[str] = field(
        default_factory=list, metadata={"help": "what to call them in folders and tables; default: their last part"}
    )
    config_name: str | None = field(default=None, metadata={"help": "other configuration than the model's"})
    tokenizer_name: str | None = field(default=None, metadata={"help": "other tokenizer than the model's"})
    cache_dir: str | None = field(default=None, metadata={"help": "where downloads from the Hub are kept"})
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit of a Hub model"})
    token: str | None = field(default=None, metadata={"help": "token for the Hub; default: the one logged in with"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code from a Hub model's repository"})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "replace a classification head with another number of labels"}
    )
    as_fastbert: bool = field(
        default=False,
        metadata={"help": "load a BERT, RoBERTa or DistilBERT as a dense FastBERT, to compare it with its students"},
    )
    freeze_trees: bool = field(default=False, metadata={"help": "train everything but the feed-forward trees"})
    lora_rank: int = field(
        default=0, metadata={"help": "train LoRA adapters of this rank on attention, and the head; 0 trains all"}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA's scale; default: twice the rank"})
    lora_trees: bool = field(default=False, metadata={"help": "put LoRA adapters on the trees too"})

    def __post_init__(self):
        if isinstance(self.model_name_or_path, str):
            self.model_name_or_path = [self.model_name_or_path]

    @property
    def hub(self) -> dict[str, Any]:
        """How `from_pretrained` fetches from the Hub."""
        return {
            "revision": self.model_revision,
            "cache_dir": self.cache_dir,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }

    def check(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ValueError: naming the option.
        """
        if not self.model_name_or_path or not all(self.model_name_or_path):
            raise ValueError("--model_name_or_path is missing")
        if self.lora_rank < 0:
            raise ValueError(f"--lora_rank must be 0 or above; got {self.lora_rank}")
        for name in ("lora_alpha", "lora_trees"):
            if getattr(self, name) not in (None, False) and not self.lora_rank:
                raise ValueError(f"--{name} needs --lora_rank")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise ValueError(f"--lora_alpha must be 1 or above; got {self.lora_alpha}")
        if self.lora_trees and self.freeze_trees:
            raise ValueError("--lora_trees trains what --freeze_trees keeps; choose one")
        if self.lora_rank:
            try:
                import peft  # noqa: F401
            except ImportError as error:
                raise ValueError("--lora_rank needs the package peft: pip install peft") from error


def trained_labels(config: PreTrainedConfig, task: Task) -> tuple[str, ...] | None:
    """The label names of a checkpoint's trained classification head, by output.

    Args:
        config: the checkpoint's configuration.
        task: what the head is wanted for.

    Returns:
        The names; those of the task where the checkpoint has none of its own (LABEL_0 ...) or its single output is
        a value. None without a head.
    """
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return None
    names = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    unnamed = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return task.labels if len(names) == task.num_labels and (unnamed or task.is_regression) else names


def output_order(labels: tuple[str, ...], trained: tuple[str, ...]) -> list[int] | None:
    """Where a trained head has the labels of a task; it may write them in another case.

    Args:
        labels: the task's label names by id.
        trained: the head's, by output.

    Returns:
        The output of each of the task's ids, or None if the names differ.
    """
    for spelled in (str, str.casefold):
        wanted, found = list(map(spelled, labels)), list(map(spelled, trained))
        if len(set(wanted)) == len(wanted) and sorted(wanted) == sorted(found):
            return [found.index(name) for name in wanted]
    return None


@dataclass
class Head:
    """How a checkpoint's outputs serve a task.

    Attributes:
        config: the configuration to load the model with.
        order: the output of each of the task's label ids.
        is_new: whether all of it is: no trained head, in a model loaded `as_fastbert`, or one of other labels.
    """

    config: PreTrainedConfig
    order: list[int]
    is_new: bool


def fit_head(options: ModelArguments, checkpoint: str, task: Task) -> Head:
    """Find out from a checkpoint's configuration how it can serve a task; no weights are read.

    Args:
        options: how to load.
        checkpoint: model folder or Hub name.
        task: what for.

    Returns:
        The head.

    Raises:
        ValueError: if there is no configuration, or a trained head has other labels and may not be replaced.
    """
    path = Path(checkpoint)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"no model in {checkpoint!r}: config.json is missing")
    check_weights(path)
    try:
        stored = AutoConfig.from_pretrained(checkpoint, **options.hub)
        other = options.config_name
        config = AutoConfig.from_pretrained(other, **options.hub) if other else copy.deepcopy(stored)
    except OSError as error:
        raise _unloadable(checkpoint, error) from error
    names, order = task.labels or ("value",), list(range(task.num_labels))
    trained = trained_labels(stored, task)
    converted = options.as_fastbert and stored.model_type in FAMILIES
    if converted:
        config = FastBertConfig.from_pretrained(other or checkpoint, **options.hub)
    is_new = trained is not None and output_order(task.labels, trained) is None
    if is_new and not options.ignore_mismatched_sizes:
        raise ValueError(
            f"the classifier in {checkpoint!r} has {len(trained)} outputs ({', '.join(trained)}) and {task.name} "
            f"wants {task.num_labels} ({', '.join(names)}); --ignore_mismatched_sizes replaces it with a new one"
        )
    if trained and not is_new:
        names, order = trained, output_order(task.labels, trained)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "regression" if task.is_regression else "single_label_classification"
    # Students are encoders without pooler, and the one of a BERT without classifier was trained for another task.
    return Head(config, order, is_new or (converted and trained is None))


def load_classifier(options: ModelArguments, checkpoint: str, head: Head) -> PreTrainedModel:
    """Load the weights.

    Args:
        options: how to load.
        checkpoint: model folder or Hub name.
        head: from `fit_head`.

    Returns:
        The model; a head that the checkpoint lacks has random weights.

    Raises:
        ValueError: if nothing can be loaded.
    """
    try:
        loaded = AutoModelForSequenceClassification.from_pretrained(
            checkpoint,
            config=head.config,
            ignore_mismatched_sizes=options.ignore_mismatched_sizes,
            **options.hub,
        )
    except OSError as error:
        raise _unloadable(checkpoint, error) from error
    if head.is_new:
        fresh = AutoModelForSequenceClassification.from_config(head.config)
        fresh.base_model.load_state_dict(loaded.base_model.state_dict())
        loaded = fresh
    return loaded


def _unloadable(checkpoint: str, error: OSError) -> ValueError:
    return ValueError(f"no model can be loaded from {checkpoint!r}: {str(error).strip().splitlines()[0]}")


def restrict_training(model: PreTrainedModel, options: ModelArguments) -> "PreTrainedModel | PeftModel":
    """Freeze the trees, or put adapters into the model, as the options say.

    Args:
        model: changed in place.
        options: which weights are trained.

    Returns:
        The model to train: itself, or wrapped by PEFT.

    Raises:
        ValueError: if trees are named and the model has none, or LoRA finds nothing to adapt.
    """
    trees = {name: module for name, module in model.named_modules() if isinstance(module, TREE_LAYERS)}
    if (options.freeze_trees or options.lora_trees) and not trees:
        option = "--freeze_trees" if options.freeze_trees else "--lora_trees"
        raise ValueError(f"{option}: {model.config._name_or_path!r} ({model.config.model_type}) has no trees")
    if options.freeze_trees:
        for tree in trees.values():
            tree.requires_grad_(False)
    if not options.lora_rank:
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    attention = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".attention." in name
    ]
    if not attention:
        raise ValueError(f"--lora_rank: no attention projection is known in {model.config.model_type!r}")
    heads = [name for name, module in model.named_children() if name != model.base_model_prefix]
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        target_modules=attention,
        target_parameters=[f"{name}.{part}" for name in trees for part in ("weight_in", "weight_out")]
        if options.lora_trees
        else None,
        modules_to_save=[name for name in heads if list(model.get_submodule(name).parameters())],
    )
    return get_peft_model(model, config)
