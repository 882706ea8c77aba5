"""Interleaved timing: candidates take turns, so that a drift of the machine's speed meets all of them."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

BUSY_SHARE = 0.1  # of the machine's processor time taken by others while a round was measured


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class Timing:
    """Seconds per call of one entry, one value a round, and what other processes took of the machine meanwhile."""

    seconds: list[float] = field(default_factory=list)
    busy_shares: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        if len(self.seconds) < 3:
            return (max(self.seconds) - min(self.seconds)) / 2 / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median

    @property
    def busy(self) -> bool:
        """Whether others took more than `BUSY_SHARE` of the machine in the median round."""
        return statistics.median(self.busy_shares) > BUSY_SHARE


def _processor_seconds(workers: Sequence[int]) -> tuple[float, float]:
    """Seconds all processors were busy or stolen since boot, and seconds this process used; (0, 0) off Linux.

    Args:
        workers: ids of other processes that count as this one.
    """
    try:
        fields = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        theirs = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in workers]
    except (OSError, ValueError):
        return 0.0, 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    ticks = os.sysconf("SC_CLK_TCK")
    used = os.times()
    own = used.user + used.system + sum(int(value) for values in theirs for value in values) / ticks
    return (user + nice + system + irq + softirq + steal) / ticks, own


class BusyMeter:
    """The share of the machine that other processes take between `start` and `stop`, counted in clock ticks.

    Args:
        workers: ids of processes that work for this one.
    """

    def __init__(self, workers: Sequence[int] = ()):
        self.workers = workers

    def start(self) -> None:
        self.wall, (self.all, self.own) = time.perf_counter(), _processor_seconds(self.workers)

    def stop(self) -> float:
        elapsed, (everyone, own) = time.perf_counter() - self.wall, _processor_seconds(self.workers)
        others = (everyone - self.all) - (own - self.own)
        ticks_resolution = 2 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.02
        available = elapsed * (os.cpu_count() or 1)
        return max(0.0, others - ticks_resolution) / max(available, ticks_resolution)


def wall_seconds(call: Callable[[], object], times: int) -> float:
    """Seconds that so many calls take, by the wall clock."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


Stopwatch = Callable[[Callable[[], object], int], float]


def _calls_for(call: Callable[[], object], least_seconds: float, stopwatch: Stopwatch) -> int:
    """How many calls fill `least_seconds`; also the warm-up."""
    calls = 1
    while True:
        elapsed = stopwatch(call, calls)
        if elapsed >= least_seconds / 2 or calls >= 1 << 20:
            return max(1, min(1 << 20, round(calls * least_seconds / max(elapsed, 1e-9))))
        calls *= 2


def interleaved(
    entries: dict[str, Callable[[], object]],
    rounds: int = 7,
    least_seconds: float = 0.02,
    around: dict[str, Callable[[], AbstractContextManager]] | None = None,
    stopwatch: Stopwatch = wall_seconds,
    workers: Sequence[int] = (),
) -> dict[str, Timing]:
    """Time every entry `rounds` times, in turns.

    Args:
        entries: calls without arguments, by name.
        rounds: samples an entry gets. least_seconds: length of one sample; short calls are repeated to fill it.
        around: context managers entered, untimed, around the samples of the entries they are named for.
        stopwatch: (call, times) -> seconds; another than the wall clock for calls that return before they are done.
        workers: ids of processes that the calls wait for.
    Returns: a `Timing` an entry, in seconds per call.
    """
    around = {name: (around or {}).get(name, nullcontext) for name in entries}
    calls = {}
    for name, call in entries.items():
        with around[name]():
            calls[name] = _calls_for(call, least_seconds, stopwatch)
    timings = {name: Timing() for name in entries}
    meter = BusyMeter(workers)
    for _ in range(rounds):
        meter.start()
        for name, call in entries.items():
            with around[name]():
                if calls[name] > 1:
                    call()  # untimed: the entry before left other data in the caches
                timings[name].seconds.append(stopwatch(call, calls[name]) / calls[name])
        share = meter.stop()
        for timing in timings.values():
            timing.busy_shares.append(share)
    return timings
