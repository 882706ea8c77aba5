"""What a person sees while a model trains within a budget: a bar over it and one line for every logged step."""

import time
from collections.abc import Mapping

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fastbert_hf.training.budget_trainer import BudgetTrainer


def show_budget(trainer: BudgetTrainer, words: Mapping[str, str] | None = None) -> None:
    """Replace the library's bar and printer, which count steps.

    Args:
        trainer: not yet training.
        words: as for `BudgetProgress`.
    """
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(BudgetProgress(trainer, words))


class BudgetProgress(TrainerCallback):
    """A bar that fills as the budget is spent; losses as lines above it, or alone where bars are switched off.

    Args:
        trainer: whose clock is shown.
        words: further entries of the log that are shown, and what they are called.
    """

    def __init__(self, trainer: BudgetTrainer, words: Mapping[str, str] | None = None):
        self.trainer, self.words = trainer, dict(words or {})
        self.bar = None
        self.began = (0.0, 0)

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar."""
        self.began = (time.perf_counter(), self.trainer.clock.spent.tokens)
        if state.is_world_process_zero and not args.disable_tqdm:
            from tqdm.auto import tqdm

            form = "{desc} {percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self.bar = tqdm(total=1.0, desc="budget", bar_format=form, dynamic_ncols=True)
            self._move(state, {})

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar."""
        if self.bar is not None:
            self.bar.n = self.trainer.clock.fraction
            self.bar.refresh(nolock=True) if self.bar.n >= 1 else self.bar.update(0)

    def tokens_per_second(self) -> float:
        """Speed since this part of the run began."""
        seconds, tokens = self.began
        return (self.trainer.clock.spent.tokens - tokens) / max(1e-9, time.perf_counter() - seconds)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """One line: the loss, or what an evaluation found."""
        if not state.is_world_process_zero or not logs:
            return
        words = {name: name for name in ("loss", "eval_loss", "eval_accuracy", "grad_norm")} | self.words
        shown = {words[name]: logs[name] for name in words if name in logs}
        if not shown:
            return
        if "loss" in logs:
            shown["rate"] = logs["learning_rate"]
        self._move(state, shown)
        values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        line = f"step {state.global_step}  budget {self.trainer.clock.fraction:.1%}  {values}  "
        line += f"{self.tokens_per_second():,.0f} tokens/s"
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def _move(self, state, shown: dict[str, float]) -> None:
        if self.bar is not None:
            self.bar.n = self.trainer.clock.fraction
            known = {name: f"{value:.4g}" for name, value in shown.items()}
            self.bar.set_postfix({"step": state.global_step, **known}, refresh=True)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
