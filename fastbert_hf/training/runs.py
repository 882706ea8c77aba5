"""What pretraining and fine-tuning share: checks before the start, training, saving the result."""

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState

from fastbert_hf.data.packing import check_seq_length
from fastbert_hf.extras import require_extra
from fastbert_hf.files import check_output_folder, staged_folder, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Trainer, TrainingArguments

COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
RATES = ("learning_rate", "weight_decay", "adam_epsilon", "num_train_epochs")


def check_options(args: "TrainingArguments", max_seq_length: int) -> None:
    """Check what every run needs, before anything is read: a folder to write to, and numbers that make sense.

    Args:
        args: optimisation.
        max_seq_length: longest sequence the run feeds.

    Raises:
        ValueError: naming the option, its value and what was expected.
        MissingExtraError: the extra `training` is not installed.
    """
    require_extra("training")
    check_output_folder(args.output_dir)
    check_seq_length(max_seq_length)
    for name in COUNTS:
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(args, name)}")
    for name in RATES:
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"{name} must be a finite number, zero or above; got {getattr(args, name)}")


class TrainingClock(TrainerCallback):
    """Seconds of training over all parts of an interrupted run: every checkpoint carries those of its steps.

    Args:
        before: seconds of the parts before this one.
    """

    def __init__(self, before: float = 0.0):
        self.before = before
        self.start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds until now."""
        return self.before + time.perf_counter() - self.start

    def on_step_end(self, args, state, control, **kwargs):
        """Put the time where the Trainer stores it, in the form it knows."""
        state.stateful_callbacks[type(self).__name__] = {"args": {"before": self.seconds()}, "attributes": {}}


def train(trainer: "Trainer", checkpoint: str | None) -> dict[str, Any]:
    """Train, unless the checkpoint is that of a run already at its last step.

    Args:
        trainer: what trains.
        checkpoint: where to start from, or None.

    Returns:
        train_loss (None if nothing was left to do), steps, train_seconds, resumed_from. Steps and seconds are those
        of the whole run, also where it was interrupted; what was lost with an interruption counts in neither.
    """
    before = 0.0
    result = {"train_loss": None, "steps": 0, "train_seconds": 0.0, "resumed_from": checkpoint}
    if checkpoint:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        clock = (state.stateful_callbacks or {}).get(TrainingClock.__name__, {})
        before = clock.get("args", {}).get("before", 0.0)
        if 0 < trainer.args.max_steps <= state.global_step:
            # Resumed at its last step, the Trainer would take one step more.
            if trainer.args.load_best_model_at_end and state.best_global_step:
                checkpoint = str(Path(checkpoint).with_name(f"checkpoint-{state.best_global_step}"))
                if not Path(checkpoint).is_dir():
                    raise ValueError(
                        f"the run's best checkpoint {checkpoint!r} is gone; --overwrite_output_dir repeats it"
                    )
            if hasattr(trainer.model, "load_adapter"):  # a checkpoint of LoRA holds adapters only
                trainer._load_from_checkpoint(checkpoint)
            else:
                weights = type(trainer.model).from_pretrained(checkpoint).state_dict()
                trainer.model.load_state_dict(weights)
            return {**result, "steps": state.global_step, "train_seconds": round(before, 1)}
    clock = TrainingClock(before)
    trainer.add_callback(clock)
    output = trainer.train(resume_from_checkpoint=checkpoint)
    result |= {"train_loss": output.training_loss, "steps": output.global_step}
    return {**result, "train_seconds": round(clock.seconds(), 1)}


def check_fit(config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase", max_seq_length: int) -> None:
    """Check that a model can read what the tokenizer writes.

    Args:
        config: the model's configuration.
        tokenizer: what makes its input.
        max_seq_length: longest sequence the run feeds.

    Raises:
        ValueError: if the model has fewer vocabulary entries than the tokenizer, or fewer positions than
            `max_seq_length`.
    """
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"vocab_size {config.vocab_size} of the model is smaller than the tokenizer's {len(tokenizer)} entries"
        )
    positions = getattr(config, "max_position_embeddings", None)
    longest = getattr(config, "longest_sequence", positions)  # less where positions are numbered as in RoBERTa
    if longest is not None and longest < max_seq_length:
        usable = "" if longest == positions else f", of which a sequence can use {longest}"
        raise ValueError(
            f"max_seq_length {max_seq_length} exceeds the model's max_position_embeddings {positions}{usable}"
        )


def save_model(trainer: "Trainer", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Save the final model and tokenizer into the output folder, complete or not at all.

    Args:
        trainer: its model and `args.output_dir` are used; only the main process writes.
        tokenizer: saved beside the model.
    """
    # Sharded weights are gathered by all processes together.
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return
    with staged_folder(trainer.args.output_dir) as stage:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(stage, state_dict=weights)
        tokenizer.save_pretrained(stage)


def write_summary(folder: str | Path, summary: dict[str, Any]) -> None:
    """Write `summary.json` and print the summary, one value a line.

    Args:
        folder: the run's output folder.
        summary: values that JSON can hold.
    """
    write_text(Path(folder) / "summary.json", json.dumps(summary, indent=2) + "\n")
    width = max(map(len, summary))
    for key, value in summary.items():
        print(f"  {key:<{width}}  {f'{value:.4f}' if isinstance(value, float) else value}")


def disable_pin_memory_on_cpu(args: "TrainingArguments") -> None:
    """Switch off what only helps with an accelerator and otherwise warns once per data loader.

    Args:
        args: changed in place.
    """
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False


def is_main_process(args: "TrainingArguments") -> bool:
    """Whether this process prints and writes results."""
    return args.process_index == 0
