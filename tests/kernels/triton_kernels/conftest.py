"""These tests run where Triton can: on a GPU, or on CPU tensors in a process with TRITON_INTERPRET=1.

Triton reads that variable when it is imported, so `tests/kernels/test_triton.py` starts a process of their own.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(scope="session")
def triton():
    """The backend, computing on the device's tensors and taking and giving those of the CPU."""
    from fastbert_hf.fff_op import BACKENDS

    reason = BACKENDS["triton"].unavailable()
    assert reason is None, reason
    return BACKENDS["triton"] if INTERPRETED else OnDevice(BACKENDS["triton"])


class OnDevice:
    """The backend for a GPU with tensors that come from the CPU."""

    def __init__(self, backend):
        self.backend = backend

    def __getattr__(self, name):
        def call(*arguments):
            moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
            result = getattr(self.backend, name)(*moved)
            if isinstance(result, torch.Tensor):
                return result.cpu()
            return [None if t is None else t.cpu() for t in result]

        return call
