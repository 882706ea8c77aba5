"""What is left of a pretraining run beside the model: summary, recipe, pictures, card."""

import json
from pathlib import Path
from typing import Any

from fastbert_hf.files import write_text
from fastbert_hf.training.budget_trainer import BudgetTrainer
from fastbert_hf.training.figures import plot_learning_curve, plot_tree_usage
from fastbert_hf.training.pretraining.data import CorpusArguments, PretrainingData
from fastbert_hf.training.pretraining.dense_start import DENSE_NEURONS, dense_start
from fastbert_hf.training.publishing import write_card, write_recipe
from fastbert_hf.training.runs import is_main_process, write_summary
from fastbert_hf.training.tree_usage import TreeUsageCallback, dead_leaf_names

HISTORY, USAGE = "history.json", "tree_usage.json"
CURVE_PICTURE, USAGE_PICTURE = "loss.png", "tree_usage.png"
RECORDED = ("max_seq_length", "mlm_probability", "disable_dropout", "schedule", "batch_ramp", "balance_leaves")


def write_pretraining_report(
    trainer: BudgetTrainer, options: CorpusArguments, data: PretrainingData, results: dict[str, Any]
) -> dict[str, Any]:
    """Write summary.json, recipe.json, history.json, tree_usage.json, two pictures and the model card.

    Args:
        trainer: done, its model saved.
        options: how the run was asked for.
        data: what it was fed.
        results: the final evaluation, `train_loss` and `resumed_from`.

    Returns:
        The summary.
    """
    clock, args = trainer.clock, trainer.args
    usage = _usage(trainer)
    loss = results["eval_loss"]
    summary = {
        "validation_loss": loss,
        "validation_accuracy": results["eval_accuracy"],
        "unigram_loss": data.unigram_loss,
        "nats_under_unigram": data.unigram_loss - loss,
        "train_loss": results["train_loss"],
        "steps": clock.spent.steps,
        "tokens_seen": clock.spent.tokens,
        "train_seconds": round(clock.spent.seconds, 1),
        "cpu_seconds": round(clock.spent.cpu_seconds, 1),
        "tokens_per_second": round(clock.spent.tokens / max(clock.spent.seconds, 1e-9), 1),
        "data_loading_fraction": trainer.data_loading_fraction(),
        "skipped_steps": trainer.skipped_steps,
        "rollbacks": trainer.rollbacks,
        "resumed_from": results["resumed_from"],
        "resume_seconds": trainer.resume_seconds,
        "budget": {clock.unit: clock.amount},
        "train_tokens": data.train_tokens,
        "validation_sequences": len(data.validation),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "dead_nodes": sum(layer["dead_nodes"] for layer in usage) if usage else None,
        "dead_leaves": dead_leaf_names(usage),
        "dense_start": dense_start(trainer.provenance, clock.spent.steps),
        "seed": args.seed,
        "sources": data.sources,
    }
    if not is_main_process(args):
        return summary
    folder = Path(args.output_dir)
    recorded = {name: getattr(options, name) for name in RECORDED}
    recorded["teacher_weight"] = options.teacher_weight if options.teacher_name_or_path is not None else None
    write_recipe(args, **recorded, batch_size=trainer.batch_size, **_trained_with(trainer))
    write_text(folder / HISTORY, json.dumps(trainer.state.log_history) + "\n")
    plot_learning_curve(folder / CURVE_PICTURE, trainer.state.log_history)
    if usage:
        write_text(folder / USAGE, json.dumps(usage, indent=2) + "\n")
        plot_tree_usage(folder / USAGE_PICTURE, usage)
    write_summary(folder, summary)
    write_card(trainer)
    return summary


def _trained_with(trainer: BudgetTrainer) -> dict[str, Any]:
    """Budget, processes and precision of the parts of a run, which may differ from those of this command."""
    recipe: dict[str, Any] = {"max_steps": None}  # of the command line, where the budget is another one
    if not trainer.provenance.parts:  # a finished run of a version that did not note them
        return {**recipe, trainer.clock.unit: trainer.clock.amount}
    *earlier, last = trainer.provenance.parts
    recipe |= {**last["budget"], "world_size": last["world_size"] if last["world_size"] > 1 else None}
    recipe |= {name: last["precision"] == name or None for name in ("bf16", "fp16")}
    following = [part["from_step"] for part in (*earlier[1:], last)]
    for number, (part, end) in enumerate(zip(earlier, following), start=1):
        budget = ", ".join(f"{unit} {amount:g}" for unit, amount in part["budget"].items())
        dense = f", dense layers of {part[DENSE_NEURONS]}" if DENSE_NEURONS in part else ""
        recipe[f"earlier_part_{number}"] = (
            f"{budget}, world_size {part['world_size']}, {part['precision']}{dense}, until step {end}"
        )
    return recipe


def _usage(trainer: BudgetTrainer) -> list[dict[str, Any]]:
    watchers = (each for each in trainer.callback_handler.callbacks if isinstance(each, TreeUsageCallback))
    return next((watcher.usage for watcher in watchers), [])
