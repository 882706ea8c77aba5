"""GLUE's metrics and the baselines that a result must be read beside.

scikit-learn and scipy are imported when a metric is computed, so that importing this module needs neither.
"""

from collections.abc import Sequence

import numpy as np


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Share of equal entries of two (S,) arrays of class ids."""
    return float(np.mean(predictions == references))


def f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """F1 of class 1; 0 if class 1 is never predicted correctly."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, pos_label=1, average="binary", zero_division=0))


def matthews_correlation(predictions: np.ndarray, references: np.ndarray) -> float:
    """Matthews correlation of class ids; 0 if either side is constant."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: np.ndarray, references: np.ndarray) -> float:
    """Linear correlation; 0 where it is undefined because one side is constant: nothing was ranked."""
    from scipy.stats import pearsonr

    return 0.0 if _constant(predictions) or _constant(references) else float(pearsonr(predictions, references)[0])


def spearman(predictions: np.ndarray, references: np.ndarray) -> float:
    """Rank correlation; 0 where it is undefined because one side is constant."""
    from scipy.stats import spearmanr

    return 0.0 if _constant(predictions) or _constant(references) else float(spearmanr(predictions, references)[0])


METRICS = {metric.__name__: metric for metric in (accuracy, f1, matthews_correlation, pearson, spearman)}


def _constant(values: np.ndarray) -> bool:
    return len(values) < 2 or bool(np.all(values == values[0]))


def compute(names: Sequence[str], predictions, references) -> dict[str, float]:
    """Compute metrics by name.

    Args:
        names: keys of `METRICS`.
        predictions: (S,) class ids, or values for regression.
        references: (S,) the same for the truth.

    Returns:
        {name: value}.

    Raises:
        ValueError: for an unknown name, different or zero lengths, or values that are not finite.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r}; wanted one of {', '.join(METRICS)}")
    predictions, references = np.asarray(predictions), np.asarray(references)
    if predictions.shape != references.shape or predictions.ndim != 1 or not len(predictions):
        raise ValueError(
            f"predictions and references must be equally long lists with at least one entry; "
            f"got shapes {predictions.shape} and {references.shape}"
        )
    for name, values in (("predictions", predictions), ("references", references)):
        if not np.all(np.isfinite(values)):
            raise ValueError(f"{int(np.sum(~np.isfinite(values)))} of {len(values)} {name} are NaN or infinite")
    return {name: METRICS[name](predictions, references) for name in names}


def decode_predictions(logits: np.ndarray, is_regression: bool) -> np.ndarray:
    """Turn model outputs into predictions.

    Args:
        logits: (S, num_labels) outputs.
        is_regression: take the single output as a value instead of the largest class.

    Returns:
        (S,) values or class ids.

    Raises:
        ValueError: if an output is NaN: an arg-max would hide it as class 0.
    """
    logits = np.asarray(logits)
    if np.isnan(logits).any():
        raise ValueError("the model's outputs hold NaN; training has diverged")
    return logits[:, 0] if is_regression else logits.argmax(axis=-1)  # (S, num_labels) -> (S,)


def majority_baseline(names: Sequence[str], train_labels, references, is_regression: bool) -> dict[str, float]:
    """Metrics of an answer that does not depend on the text: the most frequent training label (regression: the mean).

    Of equally frequent labels the one that scores best is taken. F1 is that of always answering class 1: every other
    constant answer has 0. So the baseline is never flattering to a model.

    Args:
        names: metric names.
        train_labels: labels of the training split.
        references: labels of the validation split.
        is_regression: whether labels are numbers on a scale.

    Returns:
        {name: value}.
    """
    train_labels = np.asarray(train_labels)
    if is_regression:
        answers = [train_labels.mean()]
    else:
        classes, counts = np.unique(train_labels, return_counts=True)
        answers = classes[counts == counts.max()]
    main = next((name for name in names if name != "f1"), names[0])
    results = [compute(names, np.full(len(references), answer), references) for answer in answers]
    best = max(results, key=lambda result: result[main])
    return best | {name: f1(np.ones(len(references), dtype=int), references) for name in names if name == "f1"}
