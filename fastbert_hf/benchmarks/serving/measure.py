"""Run every entry of a subject in processes in turns: check the output, then the time, then what several carry."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fastbert_hf import use_backend
from fastbert_hf.benchmarks.serving.cases import Case
from fastbert_hf.benchmarks.serving.engines import Job, Unavailable, fastbert, original
from fastbert_hf.benchmarks.serving.rows import ORIGINAL, ServingRow, check, hidden_error
from fastbert_hf.benchmarks.serving.subjects import BASELINE, DTYPES, HALF, NOTHING, Entry, Subject
from fastbert_hf.benchmarks.serving.worker import Worker
from fastbert_hf.benchmarks.timing import BUSY_SHARE, BusyMeter, interleaved
from fastbert_hf.training.distillation.scores import score

AT_A_TIME = 8  # processes that hold a model, the baseline's among them: 24 GB hold as many of BERT-base
LOAD_SECONDS, THROUGHPUT_ROUNDS = 2.0, 3
Report = Callable[[str], None]


class Measurement:
    """Rows of one subject.

    Args:
        subject: what is measured. cache: a folder for files that engines make. rounds: samples of each time.
        report: takes lines of progress.
    """

    def __init__(self, subject: Subject, cache: Path, rounds: int, report: Report, start: Callable = Worker):
        self.subject, self.cache, self.rounds, self.report, self.start = subject, cache, rounds, report, start
        self._expected: dict[tuple[str, str], Tensor] = {}
        self._scores: dict[Entry, float] = {}

    def groups(self, entries: list[Entry], threads: int, workers: int) -> Iterator[list[ServingRow]]:
        """Times of all entries with so many threads, some at a time; with one thread also what so many workers carry.

        The baseline is measured again with every group of entries that fit in memory together, so that a ratio is
        one of the same minutes. Entries of one type are in a group where they fit: they are what is compared.
        """
        others = [entry for dtype in DTYPES for entry in entries if entry.dtype == dtype and entry != BASELINE]
        for first in range(0, len(others), AT_A_TIME - 1):
            group = [BASELINE, *others[first : first + AT_A_TIME - 1]]
            found = self._group(group, threads, workers if threads == 1 else 1)
            yield [row for row in found if first == 0 or row.entry != BASELINE.name]

    def _group(self, entries: list[Entry], threads: int, workers: int) -> list[ServingRow]:
        rows: list[ServingRow] = []
        with ExitStack() as stack:
            running, reasons = {}, {}
            for entry in entries:
                self.report(f"{self.subject.name}, {threads} threads: {entry.name}")
                try:
                    running[entry] = stack.enter_context(self.start(entry.engine, self.job(entry, threads)))
                except Unavailable as error:
                    if entry == BASELINE:
                        raise
                    reasons[entry] = str(error)
            for case in self.subject.cases:
                rows += self._times(case, running, reasons, threads)
            live = [entry for entry in running if entry not in reasons]
            if workers > 1:
                baseline = self._team(BASELINE, running, workers, stack)
                for entry in live:
                    with ExitStack() as own:
                        team = baseline if entry == BASELINE else self._team(entry, running, workers, own)
                        rows += self._throughput(entry, team, baseline)
        return rows

    def _team(self, entry: Entry, running: dict[Entry, Worker], workers: int, stack: ExitStack) -> list[Worker]:
        """The running worker of an entry and others like it, which end with `stack`."""
        more = range(workers - 1)
        return [running[entry], *(stack.enter_context(self.start(entry.engine, self.job(entry, 1))) for _ in more)]

    def job(self, entry: Entry, threads: int) -> Job:
        """What the engine of an entry loads."""
        model = ORIGINAL if entry.model == NOTHING else entry.model
        cache = self.cache / model.replace(":", "-").replace(" ", "-")
        cache.mkdir(parents=True, exist_ok=True)
        folder, calibration = self.subject.models[model], self.subject.calibration
        return Job(folder, cache, threads, entry.dtype, entry.model == NOTHING, calibration)

    def _times(self, case: Case, running: dict[Entry, Worker], reasons: dict, threads: int) -> Iterator[ServingRow]:
        """One row an entry; those that fail are in `reasons` from then on."""
        rows = {}
        for entry, worker in running.items():
            row = rows[entry] = self._row(entry, case, threads)
            if entry not in reasons:
                try:
                    worker.bind(case)
                    value = worker.hidden()
                except Unavailable as error:
                    reasons[entry] = str(error)
                    continue
                row.match = check(value, self._output(entry, case), case.mask, entry.dtype)
                row.error = self._error(entry, value, case)
                row.score = self._score(entry, worker)
                worker.bind(case)
        live = {entry.name: worker for entry, worker in running.items() if entry not in reasons}
        pids = [worker.pid for worker in live.values()]
        timings = interleaved(live, self.rounds, least_seconds=0.1, stopwatch=_seconds_there, workers=pids)
        baseline = timings[BASELINE.name].median
        for entry in [*running, *(entry for entry in reasons if entry not in running)]:
            row = rows.get(entry) or self._row(entry, case, threads)
            if entry in reasons:
                row.reason = reasons[entry]
            else:
                timing = timings[entry.name]
                row.milliseconds, row.spread, row.busy = 1e3 * timing.median, timing.spread, timing.busy
                row.tokens_per_second, row.speedup = case.tokens / timing.median, baseline / timing.median
            yield row

    def _throughput(self, entry: Entry, team: list[Worker], baseline: list[Worker]) -> Iterator[ServingRow]:
        """Tokens per second of several processes at once, in turns with as many of the baseline."""
        teams = {BASELINE: baseline, entry: team}
        everyone = [worker for workers in teams.values() for worker in workers]
        for case in (self.subject.cases[0], self.subject.cases[-1]):
            for worker in everyone:
                worker.bind(case)
                worker()
            speeds, busy = {name: [] for name in teams}, []
            meter = BusyMeter([worker.pid for worker in everyone])
            for _ in range(THROUGHPUT_ROUNDS):
                meter.start()
                for name, workers in teams.items():
                    speeds[name].append(_calls_per_second(workers))
                busy.append(meter.stop())
            row = self._row(entry, case, 1, len(team))
            calls = statistics.median(speeds[entry])
            row.milliseconds, row.tokens_per_second = 1e3 * len(team) / calls, case.tokens * calls
            row.speedup = calls / statistics.median(speeds[BASELINE])
            row.spread = (max(speeds[entry]) - min(speeds[entry])) / 2 / calls
            row.busy = statistics.median(busy) > BUSY_SHARE
            yield row

    def _row(self, entry: Entry, case: Case, threads: int, workers: int = 1) -> ServingRow:
        return ServingRow(self.subject.name, case.name, entry.name, entry.dtype, threads, workers, case.tokens)

    def _output(self, entry: Entry, case: Case) -> Tensor:
        """The same model's last hidden states in float32: of a BERT by Transformers, of trees by the reference."""
        key = (entry.model, case.name)
        if key not in self._expected:
            job = self.job(entry, 1)
            with torch.inference_mode(), use_backend("reference"):
                model = original(job) if entry.model in (ORIGINAL, HALF) else fastbert(job)
                self._expected[key] = model(input_ids=case.ids, attention_mask=case.mask).last_hidden_state
        return self._expected[key]

    def _error(self, entry: Entry, value: Tensor, case: Case) -> float | None:
        if entry.model != ORIGINAL and not self.subject.is_trained:
            return None
        return hidden_error(value, self._output(BASELINE, case), case.mask)

    def _score(self, entry: Entry, worker: Worker) -> float | None:
        """In per cent; measured once, not for compiled models, which would be compiled for every length."""
        teacher, file = self.subject.teacher, self.subject.eval_file
        if teacher is None or file is None or entry.engine == "torch.compile":
            return None
        if entry not in self._scores:
            self._scores[entry] = 100 * score(_Remote(worker), teacher, file, teacher.max_seq_length)
        return self._scores[entry]


class _Remote(nn.Module):
    """A worker as an encoder."""

    def __init__(self, worker: Worker):
        super().__init__()
        self.worker = worker
        self.place = nn.Parameter(torch.empty(0))  # says that inputs are wanted on the CPU

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> SimpleNamespace:
        self.worker.bind(Case("", input_ids, attention_mask))
        return SimpleNamespace(last_hidden_state=self.worker.hidden())


def _seconds_there(worker: Worker, times: int) -> float:
    """A stopwatch that stands in the worker."""
    return worker.seconds(times)


def _calls_per_second(team: list[Worker]) -> float:
    """Of all workers together, at the same time."""
    for worker in team:
        worker.start_load(LOAD_SECONDS)
    return sum(calls / seconds for calls, seconds in [worker.finish_load() for worker in team])
