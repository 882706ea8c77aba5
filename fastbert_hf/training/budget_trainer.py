"""A Trainer under a budget: rate and batch follow a clock, a run resumes exactly from its last checkpoint."""

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState

from fastbert_hf.data.order import MicrobatchOrder
from fastbert_hf.training.budget import BudgetClock, ramped_microbatches, triangle
from fastbert_hf.training.checkpoints import STATE, last_checkpoint, remove_unfinished, staged_checkpoint
from fastbert_hf.training.provenance import Provenance
from fastbert_hf.training.trainer_hooks import check_hooks

logger = logging.getLogger(__name__)

CLOCK = "BudgetTrainer"  # the name of the clock and the place in the data in a checkpoint's state
COUNTERS = ("microbatches", "skipped_steps", "rollbacks")  # what a checkpoint holds beside the clock


class BudgetTrainer(Trainer):
    """A Trainer whose learning rate, batch size and end follow a clock, not a number of steps.

    One optimiser step takes a whole number of microbatches of `per_device_train_batch_size` sequences, which grows
    with the clock; the library's gradient accumulation stays at 1. Steps whose gradient is not finite are skipped.
    The clock and the place in the data are part of every checkpoint; dropout follows from the seed and that place.

    Args:
        clock: the budget; its state goes on from a checkpoint's.
        batch_size: sequences of a full optimiser step, over all processes.
        ramp_fraction: part of the budget over which the batch grows to that size.
        follows_clock: take the rate from `rate_at`; otherwise from `args.lr_scheduler_type`, which counts steps.
        evaluations: evaluations spread evenly over the budget, beside those of `args.eval_steps`.
        save_minutes: also save a checkpoint when this much time has passed since the last one; 0 for never.
        max_bad_steps: steps skipped in a row before weights and optimiser go back to the last good checkpoint.
        max_rollbacks: how often they may go back; one more is a ValueError.
        provenance: what the run is made with; every checkpoint holds it.
        **kwargs: for `Trainer`; `train_dataset` is map-style, all of its items are of one length.

    Raises:
        ValueError: this version of transformers no longer uses what is overridden here.
    """

    # learning rate, in parts of its peak, at a fraction of the budget
    rate_at = staticmethod(triangle)
    # what `check_hooks` looks for: a method that Trainer no longer calls would be left out without a word
    HOOKS = (
        "get_train_dataloader", "get_batch_samples", "training_step", "create_scheduler",
        "_load_optimizer_and_scheduler", "_get_grad_norm", "_get_output_dir", "_save_checkpoint",
        "_push_from_checkpoint", "log", "_load_from_checkpoint",
    )  # fmt: skip
    SETTINGS = ("current_gradient_accumulation_steps", "_created_lr_scheduler")

    def __init__(
        self,
        *,
        clock: BudgetClock,
        batch_size: int,
        ramp_fraction: float = 0.0,
        follows_clock: bool = True,
        evaluations: int = 0,
        save_minutes: float = 0.0,
        max_bad_steps: int = 10,
        max_rollbacks: int = 3,
        provenance: Provenance | None = None,
        **kwargs: Any,
    ):
        check_hooks(type(self))
        super().__init__(**kwargs)
        self.clock, self.batch_size, self.ramp_fraction = clock, batch_size, ramp_fraction
        self.follows_clock, self.evaluations, self.save_minutes = follows_clock, evaluations, save_minutes
        self.max_bad_steps, self.max_rollbacks = max_bad_steps, max_rollbacks
        self.provenance = provenance or Provenance({})
        self.microbatches = 0  # consumed so far, over all processes
        self.skipped_steps = self.bad_in_a_row = self.rollbacks = 0
        self.data_seconds = 0.0  # spent waiting for batches since training began
        self._step_tokens = self._good_since_log = 0
        self._last_step_good = True
        self._seconds_before = 0.0
        self._stage: Path | None = None
        self._resume_began: float | None = None
        self.resume_seconds: float | None = None  # from the decision to resume until training goes on
        self.args.ignore_data_skip = True  # the order itself begins at the right place
        self.add_callback(_Pace(self))

    def resume(self, checkpoint: str) -> None:
        """Take over the clock and the place in the data from a checkpoint; call it before `train`.

        Args:
            checkpoint: its folder.

        Raises:
            ValueError: it was not written by this class, or for other data or microbatches.
        """
        self._resume_began = time.perf_counter()
        state = TrainerState.load_from_json(str(Path(checkpoint) / STATE)).stateful_callbacks or {}
        earlier = type(self).__name__  # where versions before kept the clocks of subclasses
        stored = state.get(CLOCK, state.get(earlier, {})).get("args")
        if stored is None:
            raise ValueError(f"{checkpoint!r} holds no budget clock: it was written by another kind of run")
        for name, here in self._place().items():
            if stored[name] != here:
                raise ValueError(
                    f"{checkpoint!r} was made with {name} {stored[name]}, this run has {here}: the place in the data "
                    "would be another one; choose another output_dir"
                )
        self.clock.load(stored["clock"])
        for name in COUNTERS:
            setattr(self, name, stored[name])

    def begin_part(self) -> None:
        """Note what this part of the run is made with; call it after `resume`, if there is one.

        Raises:
            ValueError: the run has reached its end already, under another budget than this one.
        """
        args, budget = self.args, {self.clock.unit: self.clock.amount}
        last = self.provenance.parts[-1] if self.provenance.parts else None
        if self.clock.fraction >= 1:
            if last is not None and last["budget"] != budget:
                raise ValueError(
                    f"the run in {args.output_dir!r} has spent {last['budget']} already; a budget of {budget} leaves "
                    "nothing to train: choose another output_dir, or a larger budget to go on"
                )
            return
        self.provenance.begin_part(
            from_step=self.clock.spent.steps,
            budget=budget,
            world_size=args.world_size,
            precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        )

    def take_over(self, checkpoint: str) -> None:
        """Load the weights and the log of a run that had reached its end, without training.

        Args:
            checkpoint: its folder.
        """
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        weights = type(self.model).from_pretrained(checkpoint).state_dict()
        self.model.load_state_dict(weights)

    def record(self) -> None:
        """Put clock and place where the Trainer's state stores them, in the form it knows."""
        stored = {"clock": self.clock.state(), **self._place(), **{name: getattr(self, name) for name in COUNTERS}}
        self.state.stateful_callbacks[CLOCK] = {"args": stored, "attributes": {}}

    def _place(self) -> dict[str, int]:
        """What the number of microbatches is counted in, apart from how many processes there are."""
        return {
            "per_device_train_batch_size": self.args.train_batch_size,
            "train_sequences": len(self.train_dataset),
            "data_seed": self._data_seed(),
        }

    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # ---- data and batch size

    def get_train_dataloader(self) -> DataLoader:
        """Microbatches without end, from the place where the run stands."""
        args = self.args
        order = MicrobatchOrder(
            len(self.train_dataset),
            args.train_batch_size,
            self._data_seed(),
            args.process_index,
            args.world_size,
        )
        order.start = self.microbatches
        workers = args.dataloader_num_workers
        return DataLoader(
            self.train_dataset,
            batch_sampler=order,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            persistent_workers=args.dataloader_persistent_workers,
        )

    def full_batch(self) -> int:
        """Microbatches of a full optimiser step, over all processes."""
        return self.batch_size // self.args.train_batch_size

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The microbatches of one optimiser step, stacked: {"input_ids": (k, B, T), "labels": (k, B, T)}."""
        start = time.perf_counter()
        count = ramped_microbatches(self.clock.fraction, self.full_batch(), self.ramp_fraction, self.args.world_size)
        parts = [next(epoch_iterator) for _ in range(count // self.args.world_size)]
        stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        self.microbatches += count
        self._step_tokens = stacked["input_ids"].numel() * self.args.world_size
        self.data_seconds += time.perf_counter() - start
        return [stacked], None

    def data_loading_fraction(self) -> float:
        """Part of the training time of this part of the run that went into waiting for batches."""
        return self.data_seconds / max(1e-9, self.clock.spent.seconds - self._seconds_before)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward of every microbatch; gradients meet the other processes' once, at the last.

        Returns:
            Mean loss, detached.
        """
        count = len(inputs["input_ids"])
        self.current_gradient_accumulation_steps = count  # by which each loss is divided
        total = torch.zeros((), device=self.args.device)
        first = self.microbatches - count * self.args.world_size + self.args.process_index
        for number in range(count):
            self._seed_microbatch(first + number * self.args.world_size)
            part = {name: value[number] for name, value in inputs.items()}
            last = number == count - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model=model):
                total += super().training_step(model, part)
        return total

    def _seed_microbatch(self, number: int) -> None:
        """Make dropout a function of the seed and of the microbatch's number over all processes.

        A running random state would be moved by whatever else draws from it: loaders, evaluations, a resume.
        """
        (seed,) = np.random.SeedSequence([self.args.seed, number]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed))

    # ---- learning rate

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """A rate that follows the clock, or the library's own schedule."""
        if not self.follows_clock:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda _: self.rate_at(self.clock.fraction))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Load them; the rate that they hold is that of the checkpoint's budget, and this run's may be another."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.follows_clock and checkpoint is not None:
            rates = [peak * self.rate_at(self.clock.fraction) for peak in self.lr_scheduler.base_lrs]
            for group, rate in zip(self.optimizer.param_groups, rates):
                group["lr"] = rate
            self.lr_scheduler._last_lr = rates  # what the log shows

    # ---- steps that are not finite

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradient's norm; a gradient that is not finite is thrown away, in every process alike."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is not None:  # its own inf checks lower the loss scale
            return norm
        self._last_step_good = math.isfinite(float(norm))
        if self._last_step_good:
            self.bad_in_a_row = 0
            self._good_since_log += 1
            return norm
        model.zero_grad(set_to_none=True)  # an optimiser leaves parameters without gradient alone
        self.skipped_steps += 1
        self.bad_in_a_row += 1
        logger.warning("step %d skipped: its gradient is %s", self.state.global_step + 1, float(norm))
        return norm

    def roll_back(self) -> None:
        """Take weights and optimiser from the last good checkpoint; the data goes on, the clock too.

        Raises:
            ValueError: there is none, or this happens once too often.
        """
        checkpoint = last_checkpoint(self.args.output_dir)
        what = f"{self.bad_in_a_row} steps in a row had a loss that is not finite"
        if checkpoint is None:
            raise ValueError(f"training diverged: {what}, and there is no checkpoint; try a lower learning rate")
        if self.rollbacks >= self.max_rollbacks:
            raise ValueError(
                f"training diverged: {what} after going back {self.rollbacks} times; try a lower learning rate. "
                f"The last good checkpoint is {checkpoint}"
            )
        self.rollbacks += 1
        self.bad_in_a_row = 0
        logger.warning("%s: weights and optimiser go back to %s", what, checkpoint)
        self._load_from_checkpoint(checkpoint)
        self._load_optimizer_and_scheduler(checkpoint)

    # ---- checkpoints

    def _get_output_dir(self, trial):
        """Where checkpoints are written: while one is being written, a folder beside the finished ones."""
        return str(self._stage) if self._stage is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint that is whole or not there; weights that are not finite are never written."""
        bad = [name for name, value in self.model.named_parameters() if not torch.isfinite(value).all()]
        if bad or not self._last_step_good:
            what = bad[0] if bad else "the last gradient"
            logger.warning("no checkpoint at step %d: %s is not finite", self.state.global_step, what)
            return
        self.record()
        args = self.args
        name = f"checkpoint-{self.state.global_step}"
        barrier = self.accelerator.wait_for_everyone
        with staged_checkpoint(args.output_dir, name, args.save_total_limit, args.should_save, barrier) as stage:
            self._stage = stage
            try:
                super()._save_checkpoint(model, trial)
                if args.should_save:
                    self.provenance.write(stage / name)
            finally:
                self._stage = None

        if args.push_to_hub:
            super()._push_from_checkpoint(str(Path(args.output_dir) / name))

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing is uploaded while a checkpoint is being written: its files are about to get another name."""

    # ---- what is logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the run has spent to every line of the log."""
        spent = self.clock.spent
        if "loss" in logs:
            if self.accelerator.scaler is None and not self._good_since_log:
                logs["loss"] = math.nan  # the library says 0
            self._good_since_log = 0
        logs |= {
            "tokens": spent.tokens,
            "seconds": round(spent.seconds, 3),
            "cpu_seconds": round(spent.cpu_seconds, 3),
            "budget_fraction": round(self.clock.fraction, 6),
        }
        super().log(logs, None)


class _Pace(TrainerCallback):
    """Moves the clock, and asks for evaluations, checkpoints and the end when it is time.

    Args:
        trainer: whose clock.
    """

    def __init__(self, trainer: BudgetTrainer):
        self.trainer = trainer
        self.last_save = 0.0
        self.evaluated = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock; what an interrupted run left half written goes away."""
        if args.should_save:
            remove_unfinished(args.output_dir)
        self.last_save = self.trainer.clock.spent.seconds
        self.evaluated = int(self.trainer.clock.fraction * self.trainer.evaluations)
        self.trainer.data_seconds, self.trainer._seconds_before = 0.0, self.last_save
        if self.trainer._resume_began is not None:
            self.trainer.resume_seconds = round(time.perf_counter() - self.trainer._resume_began, 2)
        self.trainer.clock.start()

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Before the learning rate of the next step is taken."""
        self.trainer.clock.tick(self.trainer._step_tokens, agree=args.world_size > 1)

    def on_step_end(self, args, state, control, **kwargs):
        """Decide what follows this step, in every process alike."""
        trainer, clock = self.trainer, self.trainer.clock
        state.epoch = trainer.microbatches * args.train_batch_size / len(trainer.train_dataset)
        if trainer.bad_in_a_row >= trainer.max_bad_steps:
            trainer.roll_back()
        due = int(clock.fraction * trainer.evaluations)
        if due > self.evaluated and clock.fraction < 1:  # the last one comes after training
            control.should_evaluate = True
        self.evaluated = due
        if trainer.save_minutes and clock.spent.seconds - self.last_save >= 60 * trainer.save_minutes:
            control.should_save = True
        if clock.fraction >= 1:
            control.should_training_stop = True
            control.should_log = True
            control.should_save = control.should_save or args.save_strategy != "no" or trainer.save_minutes > 0

    def on_save(self, args, state, control, **kwargs):
        """The next one is due this long after the last."""
        self.last_save = self.trainer.clock.spent.seconds
