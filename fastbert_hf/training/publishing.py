"""`--push_to_hub`: the Trainer uploads while it trains; before it goes the code, after it the card and the proof."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from transformers.dynamic_module_utils import custom_object_save

from fastbert_hf.files import write_text
from fastbert_hf.hub.access import check_write_access
from fastbert_hf.hub.card import RECIPE, render_card
from fastbert_hf.hub.push import PushOptions, push
from fastbert_hf.modeling_fastbert import FastBertPreTrainedModel

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

# what the Trainer puts beside the model and nobody needs, some of it pickled; the Hub obeys this file
GITIGNORE = "training_args.bin\n*.bin\n*.pt\n*.pth\nevents.out.tfevents.*\n"
RECORDED = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "num_train_epochs",
    "max_steps",
    "bf16",
    "fp16",
    "seed",
)


def check_push(args: "TrainingArguments") -> None:
    """Check, before hours of training, that the result can be pushed.

    A token given as an option moves to the environment: the Trainer pickles its arguments into the output folder.

    Args:
        args: `push_to_hub`, `hub_model_id`, `hub_token` and `hub_strategy` are looked at.

    Raises:
        ValueError: no token or rights, or a strategy that uploads pickles.
    """
    if not args.push_to_hub:
        return
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    if strategy not in ("end", "every_save"):
        raise ValueError(
            f"--hub_strategy {strategy} would upload the pickled state of the optimiser; expected end or every_save"
        )
    if args.hub_token is not None:
        os.environ["HF_TOKEN"] = args.hub_token
        args.hub_token = None
    if args.process_index == 0:
        check_write_access(HfApi(), args.hub_model_id or Path(args.output_dir).absolute().name)


def add_hub_files(trainer: "Trainer") -> None:
    """Put into the output folder what the Trainer itself never does: the model's code, and what not to upload.

    Args:
        trainer: about to train; nothing happens unless it pushes.
    """
    if not trainer.args.push_to_hub or not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    write_text(folder / ".gitignore", GITIGNORE)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, FastBertPreTrainedModel):
        custom_object_save(model, folder)


def write_recipe(args: "TrainingArguments", **options: Any) -> None:
    """Record how a model was trained in recipe.json, for the card: no paths, no tokens.

    Args:
        args: optimisation.
        **options: what else belongs to the recipe; None removes an entry.
    """
    values = args.to_dict()
    recipe = {name: getattr(args, name) if name == "world_size" else values[name] for name in RECORDED}
    for name, absent in (("max_steps", -1), ("bf16", False), ("fp16", False), ("world_size", 1)):
        if recipe[name] == absent:
            del recipe[name]
    if "max_steps" in recipe:
        del recipe["num_train_epochs"]  # overruled
    recipe = {name: value for name, value in {**recipe, **options}.items() if options.get(name, value) is not None}
    write_text(Path(args.output_dir) / RECIPE, json.dumps(recipe, indent=2) + "\n")


def write_card(trainer: "Trainer") -> None:
    """Write README.md into the output folder: what the model is, what it was trained on, how well it does.

    Args:
        trainer: done, with model and summary in its output folder. Models that are not FastBERT get the card that
            the Trainer makes.
    """
    if not trainer.is_world_process_zero():
        return
    model, folder = trainer.accelerator.unwrap_model(trainer.model), Path(trainer.args.output_dir)
    if not isinstance(model, FastBertPreTrainedModel):
        trainer.create_model_card()
        return
    write_model_card(model, folder, trainer.args.hub_model_id)


def write_model_card(
    model: FastBertPreTrainedModel,
    folder: Path,
    repo: str | None = None,
    declared: Mapping[str, Any] | None = None,
) -> None:
    """Write README.md of a model into its folder, from the summary that lies there.

    Args:
        model: what the card describes. repo: where it will be found; default: the folder's name.
        declared: metadata for its header, such as the licence.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = repo or folder.absolute().name
    write_text(
        folder / "README.md", render_card(folder, model.config, type(model).__name__, parameters, name, declared)
    )


def publish(trainer: "Trainer") -> None:
    """Push the finished output folder and check what arrived; its card replaces whatever was there.

    Args:
        trainer: done; nothing happens unless it pushes. Models that are not FastBERT are left to it.

    Raises:
        ValueError: the push failed; the trained model is whole in the output folder.
    """
    args = trainer.args
    if not args.push_to_hub:
        return
    if not isinstance(trainer.accelerator.unwrap_model(trainer.model), FastBertPreTrainedModel):
        trainer.push_to_hub()
        return
    if not trainer.is_world_process_zero():
        return
    if trainer.push_in_progress is not None:
        trainer.push_in_progress.wait_until_done()
    options = PushOptions(revision=args.hub_revision, commit_message="End of training")
    try:
        pushed = push(args.output_dir, trainer.hub_model_id, options)
    except ValueError as error:
        raise ValueError(
            f"{error}. The trained model is whole in {args.output_dir}; scripts/push_to_hub.py sends it"
        ) from error
    print(f"  pushed to {pushed.url}")
