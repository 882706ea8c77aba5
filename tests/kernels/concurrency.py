"""What Python threads and a forked child compute at the same time as others."""

import os
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def check_fork(compute: Callable[[], Sequence[Tensor]]) -> None:
    """Check that a forked child computes what its parent computes, and does not wait for the parent's threads."""
    expected = compute()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if all(torch.equal(a, b) for a, b in zip(compute(), expected, strict=True)) else 2
        finally:
            os._exit(status)
    for _ in range(600):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        raise AssertionError("the forked child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def check_threads(computations: Sequence[Callable[[], Sequence[Tensor]]]) -> None:
    """Check that computations give the same again while each runs in a thread of its own, ten times."""
    expected, failures = [compute() for compute in computations], []

    def work(number: int) -> None:
        for _ in range(10):
            if not all(torch.equal(a, b) for a, b in zip(computations[number](), expected[number], strict=True)):
                failures.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(computations))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
