"""A process of its own for every encoder, so that thread pools and memory of one do not disturb another.

Only one process computes at a time, except where throughput of several is measured: a pool that spins after its last
product stops long before the next encoder's turn is over.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch
import transformers
from torch import Tensor

from fastbert_hf.benchmarks.serving.cases import Case
from fastbert_hf.benchmarks.serving.engines import ENGINES, Job, Unavailable
from fastbert_hf.benchmarks.timing import wall_seconds

THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Worker:
    """An encoder in a process. Closed by `close`; a context manager does it too.

    Args:
        engine: key of `ENGINES`. job: what it loads.

    Raises:
        Unavailable: the engine cannot run this model here, or its process ended.
    """

    def __init__(self, engine: str, job: Job):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, engine, job), daemon=True)
        with _environment(job.threads):
            self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process, for what counts its processor time."""
        return self._process.pid

    def bind(self, case: Case) -> None:
        """Make `case` the input of all calls that follow."""
        self._ask("bind", case.ids.numpy(), case.mask.numpy())

    def hidden(self) -> Tensor:
        """The last hidden states of the bound case: (B, T, H) float32."""
        return torch.from_numpy(self._ask("hidden"))

    def seconds(self, times: int) -> float:
        """What so many calls take there, without the way to it and back."""
        return self._ask("seconds", times)

    def __call__(self) -> None:
        """One call."""
        self.seconds(1)

    def start_load(self, seconds: float) -> None:
        """Begin calls for so many seconds; `finish_load` waits for their end."""
        self._connection.send(("load", seconds))

    def finish_load(self) -> tuple[int, float]:
        """How many calls there were, and in how many seconds."""
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _ask(self, *command):
        self._connection.send(command)
        return self._answer()

    def _answer(self):
        try:
            fine, value = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(timeout=5)
            raise Unavailable(f"its process ended with exit code {self._process.exitcode}") from error
        if not fine:
            raise Unavailable(value)
        return value


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """The variables that thread pools read when they start."""
    before = {name: os.environ.get(name) for name in THREAD_SETTINGS}
    os.environ.update(dict.fromkeys(THREAD_SETTINGS, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection, engine: str, job: Job) -> None:
    """What the process does: load, then answer until the other side closes."""
    torch.set_num_threads(job.threads)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where some exporters draw their progress
    try:
        loaded = ENGINES[engine](job)
    except Exception as error:  # whatever a package raises is the reason why it does not run
        connection.send((False, reason_of(error)))
        return
    connection.send((True, None))
    call = None
    with torch.inference_mode():
        while True:
            try:
                command, *arguments = connection.recv()
            except EOFError:
                os._exit(0)  # a runtime's threads and a model take seconds to be taken down, and nothing needs it
            try:
                if command == "bind":
                    call, value = loaded.bind(*map(torch.from_numpy, arguments)), None
                elif command == "hidden":
                    value = loaded.last_hidden(call()).numpy()
                elif command == "seconds":
                    value = wall_seconds(call, *arguments)
                else:
                    value = _calls_in(call, *arguments)
                connection.send((True, value))
            except Exception as error:
                connection.send((False, reason_of(error)))


def _calls_in(call, seconds: float) -> tuple[int, float]:
    """Calls until the time is up, and the time."""
    start, calls = time.perf_counter(), 0
    while True:
        call()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return calls, elapsed


def reason_of(error: Exception) -> str:
    """One line."""
    if isinstance(error, Unavailable):
        return str(error)
    return " ".join(traceback.format_exception_only(error)[-1].split())[:200]
