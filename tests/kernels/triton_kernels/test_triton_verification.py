"""The comparison before first use, with the kernels themselves."""

import pytest
import torch

from fastbert_hf.fff_op import BACKENDS
from fastbert_hf.kernels.triton import verification, walk
from fastbert_hf.kernels.triton.regimes import REGIMES
from fastbert_hf.kernels.triton.verification import compare
from tests.kernels.triton_kernels.conftest import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_the_kernels_pass(regime, dtype, monkeypatch):
    monkeypatch.setattr(verification, "ROWS", 6 if INTERPRETED else verification.ROWS)  # a program each: slow
    sizes = (24, 20, 2, 2) if regime == "walk" else (33, 40, 1, 7)  # with an upper part
    assert compare(BACKENDS["triton"], DEVICE, dtype, "silu", sizes, regime, False) is None


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels are not exchanged")
def test_a_wrong_kernel_is_found(monkeypatch):
    monkeypatch.setattr(verification, "ROWS", 6)
    right = walk.walk_forward

    class Wrong:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                right[grid](*arguments, **{**constants, "ACTIVATION": 2})  # relu

            return launch

    monkeypatch.setattr(walk, "walk_forward", Wrong())
    reason = compare(BACKENDS["triton"], DEVICE, torch.float32, "gelu", (24, 20, 2, 2), "walk", False)
    assert "output" in reason and "differs from the reference" in reason
