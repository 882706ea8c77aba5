"""Comparing runs: what counts as a difference, and what may not be compared."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from fastbert_hf.training.pretraining.comparison import FinishedRun, by_model, compare_losses, read_run, read_runs
from fastbert_hf.training.pretraining.run import pretrain
from tests.training.runs import arguments

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import compare_runs


def test_a_difference_within_the_spread_of_seeds_is_a_tie():
    assert compare_losses([2.0, 2.02], [2.01, 2.05]) == "tie"
    assert compare_losses([2.0, 2.02], [2.10, 2.12]) == "lower by 0.100"
    assert compare_losses([2.3, 2.32], [2.10, 2.12]) == "higher by 0.200"
    assert compare_losses([2.0], [3.0, 3.1]) == "one seed"


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Folders of two seeds of a tree model and of its dense twin."""
    folder = tmp_path_factory.mktemp("runs")
    dense = folder / "dense.yaml"
    dense.write_text(
        (tiny / "model.yaml").read_text().replace("fff_depth: 2", "ffn_type: dense\nintermediate_size: 7")
    )
    made = []
    for name, recipe in (("trees", tiny / "model.yaml"), ("dense", dense)):
        for seed in (0, 1):
            made.append(folder / f"{name}-{seed}")
            changes = {"evaluations": 3, "seed": seed, "model_config": str(recipe), "save_strategy": "no"}
            pretrain(*arguments(tiny, made[-1], **changes))
    return made


def test_the_table_and_the_plots_come_from_the_runs(runs, tmp_path):
    table = compare_runs.main(["--runs", *map(str, runs), "--output_dir", str(tmp_path)])
    assert "against dense 7" in table and "| FastBERT 1x2 | 3 of 7 |" in table
    for folder in runs:
        assert f"{json.loads((folder / 'summary.json').read_text())['validation_loss']:.3f}" in table
    assert table in (tmp_path / "comparison.md").read_text()
    for name in ("loss-against-time.png", "loss-against-tokens.png", "comparison.json"):
        assert (tmp_path / name).stat().st_size > 0
    kept = json.loads((tmp_path / "comparison.json").read_text())
    assert [len(run["curve"]) for run in kept] == [3, 3, 3, 3]


def test_runs_that_differ_in_text_budget_or_seed_are_not_compared(runs, tmp_path):
    with pytest.raises(ValueError, match=r"two runs with the same seed: \[0, 0\]"):
        by_model([read_run(runs[0]), read_run(runs[0])])
    shutil.copytree(runs[0], tmp_path / "other")
    summary = json.loads((tmp_path / "other" / "summary.json").read_text())
    (tmp_path / "other" / "summary.json").write_text(json.dumps({**summary, "budget": {"max_steps": 9}, "seed": 5}))
    with pytest.raises(ValueError, match="differ in budget"):
        by_model([read_run(runs[0]), read_run(tmp_path / "other")])
    names = [("cpu_seconds", "processor_seconds"), ("budget_cpu_hours", "budget_processor_hours")]
    for file in ("summary.json", "history.json"):  # as earlier versions wrote them
        content = (runs[0] / file).read_text()
        for new, old in names:
            content = content.replace(new, old)
        (tmp_path / "other" / file).write_text(content)
    assert read_run(tmp_path / "other") == read_run(runs[0])
    with pytest.raises(ValueError, match="holds no finished pretraining run"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="baseline must be one of FastBERT 1x2, dense 7; got 'dense 8'"):
        compare_runs.main(["--runs", *map(str, runs), "--output_dir", str(tmp_path), "--baseline", "dense 8"])


def test_an_earlier_comparison_counts_as_its_runs(runs, tmp_path):
    first = compare_runs.main(["--runs", *map(str, runs[:3]), "--output_dir", str(tmp_path / "first")])
    earlier = tmp_path / "first" / "comparison.json"
    assert read_runs(earlier) == [read_run(folder) for folder in runs[:3]]
    both = compare_runs.main(["--runs", str(earlier), str(runs[3]), "--output_dir", str(tmp_path / "both")])
    assert both == compare_runs.main(["--runs", *map(str, runs), "--output_dir", str(tmp_path / "all")]) != first
    earlier.write_text('[{"model": "dense 7"}]')
    with pytest.raises(ValueError, match="holds no comparison of runs"):
        read_runs(earlier)


def test_runs_that_differ_in_rate_are_two_models(runs):
    run = read_run(runs[0])
    assert run.options["learning_rate"] == 1e-2

    def other(seed, **options):
        return FinishedRun(run.model, run.neurons, {**run.summary, "seed": seed}, run.curve, options)

    found = by_model(
        [run, other(1, learning_rate=1e-2), other(0, learning_rate=2e-2), other(2), other(0, balance_leaves=0.5)]
    )
    assert {name: [each.summary["seed"] for each in group] for name, group in found.items()} == {
        "FastBERT 1x2": [0, 1, 2],
        "FastBERT 1x2, rate 0.02": [0],
        "FastBERT 1x2, balance 0.5": [0],
    }
