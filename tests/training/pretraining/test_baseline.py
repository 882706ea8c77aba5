"""The unigram baseline is what a hand computes."""

import math

import numpy as np
import pytest
import torch

from fastbert_hf.training.pretraining.baseline import unigram_loss


def test_unigram_loss_by_hand():
    counts = np.array([3, 2, 0, 1])  # with one more each: 4, 3, 1, 2 of 10
    labels = torch.tensor([[0, -100, 2], [-100, 3, -100]])
    expected = -(math.log(0.4) + math.log(0.1) + math.log(0.2)) / 3
    assert unigram_loss(counts, labels) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least one labelled"):
        unigram_loss(counts, torch.full((1, 3), -100))
