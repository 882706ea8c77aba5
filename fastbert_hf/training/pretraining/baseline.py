"""What a masked language model is measured against: the loss of knowing the tokens' frequencies alone."""

import numpy as np
import torch

from fastbert_hf.data.masking import IGNORE_INDEX


def unigram_loss(token_counts: np.ndarray, labels: torch.Tensor) -> float:
    """Cross-entropy of masked tokens under the training tokens' frequencies with add-one smoothing.

    It is the best that a model can do which ignores the context, so MLM losses mean something only below it.

    Args:
        token_counts: (V,) how often each id occurs in the training text.
        labels: (S, T) held-out labels, -100 where nothing is predicted.

    Returns:
        Mean negative log-probability in nats.

    Raises:
        ValueError: if no position is labelled.
    """
    targets = labels[labels != IGNORE_INDEX].numpy()
    if not len(targets):
        raise ValueError("the unigram baseline needs at least one labelled position; got none")
    counts = token_counts.astype(np.float64) + 1.0  # (V,)
    return float(-np.log(counts / counts.sum())[targets].mean())
