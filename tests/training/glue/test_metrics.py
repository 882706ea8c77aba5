"""Metrics against values computed by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

import fastbert_hf.training
from fastbert_hf.training.glue.metrics import compute, decode_predictions, majority_baseline

TRUTH = [1, 1, 1, 0, 0, 1]
ANSWERS = [1, 0, 1, 1, 0, 1]  # 3 true positives, 1 false positive, 1 false negative, 1 true negative
SCRIPT = str(Path(fastbert_hf.training.__file__).parent / "glue" / "evaluate_metric.py")


def test_classification_metrics_by_hand():
    values = compute(["accuracy", "f1", "matthews_correlation"], ANSWERS, TRUTH)
    assert values["accuracy"] == pytest.approx(4 / 6)
    assert values["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert values["matthews_correlation"] == pytest.approx((3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))


def test_correlations_by_hand():
    values = compute(["pearson", "spearman"], [1.0, 2.0, 3.0, 5.0], [1.0, 3.0, 2.0, 4.0])
    # Deviations (-1.75, -0.75, 0.25, 2.25) and (-1.5, 0.5, -0.5, 1.5): 5.5 / sqrt(8.75 * 5).
    assert values["pearson"] == pytest.approx(5.5 / math.sqrt(8.75 * 5))
    assert values["spearman"] == pytest.approx(1 - 6 * (0 + 1 + 1 + 0) / (4 * 15))


def test_constant_answers_have_defined_values():
    assert compute(["accuracy", "f1", "matthews_correlation"], [0] * 6, TRUTH) == {
        "accuracy": pytest.approx(2 / 6),
        "f1": 0.0,
        "matthews_correlation": 0.0,
    }
    always = compute(["f1", "matthews_correlation"], [1] * 6, TRUTH)
    assert always == {"f1": pytest.approx(8 / 10), "matthews_correlation": 0.0}
    for pair in (([2.5] * 3, [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [2.5] * 3), ([1.0], [1.0])):
        assert compute(["pearson", "spearman"], *pair) == {"pearson": 0.0, "spearman": 0.0}


def test_perfect_and_opposite_answers():
    assert compute(["matthews_correlation"], TRUTH, TRUTH) == {"matthews_correlation": pytest.approx(1.0)}
    opposite = [1 - label for label in TRUTH]
    assert compute(["matthews_correlation"], opposite, TRUTH) == {"matthews_correlation": pytest.approx(-1.0)}


def test_bad_input_raises():
    with pytest.raises(ValueError, match="unknown metric 'bleu'"):
        compute(["bleu"], [1], [1])
    for answers, truth in (([1], [1, 0]), ([], []), ([[1]], [[1]])):
        with pytest.raises(ValueError, match="equally long"):
            compute(["accuracy"], answers, truth)
    with pytest.raises(ValueError, match="1 of 2 predictions are NaN"):
        compute(["pearson"], [1.0, float("nan")], [1.0, 2.0])


def test_predictions_come_from_logits():
    logits = np.array([[0.1, 0.9], [2.0, -1.0]])
    assert decode_predictions(logits, is_regression=False).tolist() == [1, 0]
    assert decode_predictions(np.array([[0.5], [2.0]]), is_regression=True).tolist() == [0.5, 2.0]
    with pytest.raises(ValueError, match="NaN"):
        decode_predictions(np.array([[np.nan, 0.0]]), is_regression=False)


def test_majority_baseline_answers_the_most_frequent_training_label():
    assert majority_baseline(["accuracy"], [2, 2, 1], [1, 2, 2, 2], False) == {"accuracy": 0.75}
    assert majority_baseline(["accuracy"], [0, 1, 1, 0, 2], [1, 1, 0, 2], False) == {"accuracy": 0.5}  # a tie
    assert majority_baseline(["pearson"], [1.0, 2.0], [1.0, 3.0], True) == {"pearson": 0.0}
    # class 0 is the more frequent one; always answering 1 has precision 1/3 and recall 1
    both = majority_baseline(["f1", "accuracy"], [0, 0, 1], [0, 1, 0], False)
    assert both == {"f1": pytest.approx(0.5), "accuracy": pytest.approx(2 / 3)}


def test_evaluate_metric_loads_from_its_path_and_agrees(tmp_path):
    import evaluate

    metric = evaluate.load(SCRIPT, "mrpc", cache_dir=str(tmp_path))
    assert metric.compute(predictions=ANSWERS, references=TRUTH) == compute(["f1", "accuracy"], ANSWERS, TRUTH)
    scale = evaluate.load(SCRIPT, "stsb", cache_dir=str(tmp_path))
    values = scale.compute(predictions=[1.0, 2.0, 4.0], references=[1.0, 3.0, 2.5])
    assert values == pytest.approx(compute(["pearson", "spearman"], [1.0, 2.0, 4.0], [1.0, 3.0, 2.5]))
