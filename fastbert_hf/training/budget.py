"""How much a run may spend, how much it has spent, and what follows from that: rate and batch size."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

UNITS = {  # option -> the clock's field it is compared with, and how many of its units make one of the option's
    "budget_hours": ("seconds", 3600.0),
    "budget_cpu_hours": ("cpu_seconds", 3600.0),
    "budget_tokens": ("tokens", 1),
    "max_steps": ("steps", 1),
}
RENAMED = {"processor_seconds": "cpu_seconds", "budget_processor_hours": "budget_cpu_hours"}  # earlier names


def with_current_names(content: Any) -> Any:
    """What a JSON file holds; the keys that earlier versions wrote become those of today."""
    if isinstance(content, dict):
        return {RENAMED.get(key, key): with_current_names(value) for key, value in content.items()}
    return [with_current_names(value) for value in content] if isinstance(content, list) else content


def triangle(fraction: float) -> float:
    """Learning rate, in parts of its peak, at a fraction of the budget: 0.25 at the start, 1 at 0.75, 0 at the end.

    Args:
        fraction: spent part of the budget, 0 to 1.

    Returns:
        min(0.25 + fraction, 4 - 4 fraction), never below zero. Source: the published recipe ("budget-triangle2").
    """
    return max(0.0, min(0.25 + fraction, 4.0 - 4.0 * fraction))


def falling(fraction: float) -> float:
    """Learning rate, in parts of its peak, of a model that begins near its goal: 1 at 0.05, 0 at the end.

    Args:
        fraction: spent part of the budget, 0 to 1.

    Returns:
        min(0.1 + 18 fraction, (1 - fraction) / 0.95), never below zero.
    """
    return max(0.0, min(0.1 + 18.0 * fraction, (1.0 - fraction) / 0.95))


def ramped_microbatches(fraction: float, full: int, ramp_fraction: float, processes: int = 1) -> int:
    """Microbatches of the next optimiser step while the batch grows linearly to its full size.

    Args:
        fraction: spent part of the budget, 0 to 1.
        full: microbatches of a whole batch, over all processes.
        ramp_fraction: part of the budget over which the batch grows; 0 for the full batch from the start.
        processes: every process takes the same number.

    Returns:
        A multiple of `processes` between `processes` and `full`.
    """
    if fraction >= ramp_fraction:
        return full
    return processes * max(1, min(full // processes, round(full / processes * fraction / ramp_fraction)))


@dataclass
class Spent:
    """What a run has used up, over all its parts if it was interrupted.

    Attributes:
        seconds: wall-clock while training, evaluations and checkpoints included.
        cpu_seconds: processor time of the first process per thread: wall-clock without what others on a
            shared machine took.
        tokens: tokens fed to the model, over all processes.
        steps: optimiser steps, those skipped for a loss that is not finite included.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    steps: int = 0


@dataclass
class BudgetClock:
    """Tells which fraction of a budget is spent. Its state is part of every checkpoint.

    Args:
        unit: one of `UNITS`.
        amount: the budget in that unit.
    """

    unit: str
    amount: float
    spent: Spent = field(default_factory=Spent)
    _marks: tuple[float, float] | None = None

    def start(self) -> None:
        """Begin to count time."""
        self._marks = self._read()

    def tick(self, tokens: int, agree: bool = False) -> None:
        """Count one optimiser step.

        Args:
            tokens: fed to the model since the last call, over all processes.
            agree: take over the first process's times; called in every process.
        """
        now = self._read()
        passed = [new - old for new, old in zip(now, self._marks)]
        self._marks = now
        self.spent.seconds += passed[0]
        self.spent.cpu_seconds += passed[1]
        self.spent.tokens += tokens
        self.spent.steps += 1
        if agree:
            self._agree()

    @property
    def fraction(self) -> float:
        """Spent part of the budget, 0 to 1."""
        name, scale = UNITS[self.unit]
        return min(1.0, getattr(self.spent, name) / (self.amount * scale))

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return asdict(self.spent)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a stored state."""
        self.spent = Spent(**with_current_names(state))

    def _read(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time() / torch.get_num_threads()

    def _agree(self) -> None:
        """Two processes that stop or save at different steps would wait for each other for ever."""
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        times = torch.tensor([self.spent.seconds, self.spent.cpu_seconds], dtype=torch.float64, device=device)
        torch.distributed.broadcast(times, src=0)
        self.spent.seconds, self.spent.cpu_seconds = times.tolist()
