"""What a forked child computes, beside its parent."""

import os
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
