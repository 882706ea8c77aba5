"""GLUE's metrics under the `evaluate` interface, without the network.

    evaluate.load("fastbert_hf/training/glue/evaluate_metric.py", "mrpc").compute(predictions=..., references=...)

Only `evaluate.load` imports this file; the package's own code calls `fastbert_hf.training.glue.metrics`.
"""

import datasets
import evaluate

from fastbert_hf.data.glue import get_task
from fastbert_hf.training.glue.metrics import compute


class GlueMetric(evaluate.Metric):
    """The metrics of one GLUE task; the task's name is the configuration name."""

    def _info(self):
        task = get_task(self.config_name)
        kind = datasets.Value("float32" if task.is_regression else "int64")
        return evaluate.MetricInfo(
            description=f"GLUE metrics of {task.name}: {', '.join(task.metrics)}.",
            citation="Wang et al. 2018, GLUE: A Multi-Task Benchmark and Analysis Platform",
            inputs_description="predictions and references: class ids, or values for stsb",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions, references):
        return compute(get_task(self.config_name).metrics, predictions, references)
