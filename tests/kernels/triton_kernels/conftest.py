"""These tests run where Triton can: on a GPU, or on CPU tensors in a process with TRITON_INTERPRET=1.

Triton reads that variable when it is imported, so `tests/kernels/test_triton.py` starts a process of its own. The
interpreter takes time for every step of every program: its calls are small, and float32 stands for all types where
they share the code. A GPU runs every shape in every type.
"""

import itertools
import os
from collections.abc import Sequence

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 32 if INTERPRETED else 128  # visits of a node that a program of segments.py sums


def shapes_and_dtypes(every_dtype: Sequence[tuple], float32: Sequence[tuple], on_gpu: Sequence[tuple]) -> list[tuple]:
    """Pairs to test: shapes with code that differs between types, other shapes, and those for a GPU alone."""
    if INTERPRETED:
        return [*itertools.product(every_dtype, DTYPES), *((shape, torch.float32) for shape in float32)]
    return list(itertools.product([*every_dtype, *float32, *on_gpu], DTYPES))


@pytest.fixture(autouse=True)
def chunk(monkeypatch):
    """Two rounds of a loop a program, instead of eight."""
    from fastbert_hf.kernels.triton import segments

    monkeypatch.setattr(segments, "CHUNK", CHUNK)


@pytest.fixture
def products_by_row(monkeypatch):
    """The interpreter multiplies with BLAS, whose rounding depends on a row's place in a tile; a GPU's does not."""
    if INTERPRETED:
        by_row = lambda a, b, dtype=None: np.einsum("ij,jk->ik", a, b, dtype=dtype, optimize=False)  # noqa: E731
        monkeypatch.setattr(np, "matmul", by_row)


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
