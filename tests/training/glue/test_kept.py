"""Shares of a dense model's mean that students keep: figures and intervals against their definitions."""

import json
import statistics

import pytest
import torch
from scipy import stats

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification, FastBertModel
from fastbert_hf.cli import compare_glue
from fastbert_hf.data.glue import get_task
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.training.glue.classifier import ModelArguments, fit_head, load_classifier
from fastbert_hf.training.glue.kept import combination, gap_closed, kept_table, share_kept
from fastbert_hf.training.glue.table import collect
from tests.training.distillation.runs import save_bert
from tests.training.glue.test_table import run
from tests.training.runs import run_all

DENSE, STUDENT, BARE = [0.80, 0.83, 0.82], [0.78, 0.80, 0.76, 0.79], [0.70, 0.74, 0.71]


def cells(task="rte", **values):
    """The cells of models on a task, by model."""
    found = collect(run(model, task, seed, value) for model, row in values.items() for seed, value in enumerate(row))
    return {cell.model: [cell] for cell in found}


def test_the_interval_of_a_difference_is_welchs():
    found = cells(dense=DENSE, student=STUDENT)
    estimate = combination([(1.0, found["dense"]), (-1.0, found["student"])])
    expected = stats.ttest_ind(DENSE, STUDENT, equal_var=False).confidence_interval(0.95)
    assert (estimate.value - estimate.half, estimate.value + estimate.half) == pytest.approx(tuple(expected))


def test_seeds_of_each_task_count_for_the_mean_over_tasks():
    both = [cells(dense=DENSE)["dense"][0], cells("stsb", dense=STUDENT)["dense"][0]]
    estimate = combination([(1.0, both)])
    variances = [statistics.variance(values) / len(values) / 4 for values in (DENSE, STUDENT)]
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 3)
    assert estimate.value == pytest.approx(statistics.fmean([statistics.fmean(DENSE), statistics.fmean(STUDENT)]))
    assert estimate.half == pytest.approx(stats.t.ppf(0.975, freedom) * sum(variances) ** 0.5)


def test_a_share_has_the_interval_of_the_student_where_the_dense_model_does_not_vary():
    found = cells(dense=[0.8, 0.8], student=STUDENT)
    estimate = share_kept(found["student"], found["dense"])
    alone = combination([(1.0, found["student"])])
    assert (estimate.value, estimate.half) == pytest.approx((alone.value / 0.8, alone.half / 0.8))


def test_shares_have_the_spread_that_drawing_seeds_gives():
    """The linearised spread is that of the ratios of many draws: a fiftieth of the values varies."""
    draw = torch.Generator().manual_seed(0)

    def means(values, count=20000):
        noise = torch.randn(count, generator=draw, dtype=torch.float64) / len(values) ** 0.5
        return statistics.fmean(values) + noise * statistics.stdev(values)

    found = cells(dense=DENSE, student=STUDENT, bare=BARE)
    dense, student, bare = means(DENSE), means(STUDENT), means(BARE)
    kept = share_kept(found["student"], found["dense"])
    closed = gap_closed(found["student"], found["dense"], found["bare"])
    assert (student / dense).mean().item() == pytest.approx(kept.value, abs=1e-3)
    assert ((student - bare) / (dense - bare)).mean().item() == pytest.approx(closed.value, abs=1e-2)
    for estimate, drawn in ((kept, student / dense), (closed, (student - bare) / (dense - bare))):
        factor = estimate.half / drawn.std().item()
        assert stats.t.ppf(0.975, 7) * 0.9 < factor < stats.t.ppf(0.975, 2) * 1.1  # of 2 to 7 degrees of freedom


def test_there_is_no_share_of_a_gap_that_the_seeds_do_not_show():
    found = cells(dense=[0.7, 0.8], student=STUDENT, bare=[0.7, 0.78])
    assert gap_closed(found["student"], found["dense"], found["bare"]) is None
    table = kept_table([cell for group in found.values() for cell in group], "dense", "bare")
    assert "no gap" in table


def test_one_seed_has_no_interval():
    found = cells(dense=[0.8], student=[0.75], bare=[0.7])
    assert share_kept(found["student"], found["dense"]).half is None
    table = kept_table([cell for group in found.values() for cell in group], "dense", "bare")
    assert "| student | 75.0 | 75.0 | 93.8 % | 50.0 % | 1 |" in table


def test_models_of_other_tasks_and_names_that_are_not_there_are_named():
    rte, cola = cells(dense=DENSE, student=STUDENT), cells("cola", dense=DENSE)
    with pytest.raises(ValueError, match="'student' has RTE and 'dense' CoLA, RTE; expected the same tasks"):
        kept_table([*rte["dense"], *cola["dense"], *rte["student"]], "dense")
    with pytest.raises(ValueError, match="no results of 'other'; there are those of dense, student"):
        kept_table([*rte["dense"], *rte["student"]], "dense", "other")
    with pytest.raises(ValueError, match="no task that counts"):
        kept_table(cells("wnli", dense=DENSE)["dense"], "dense")


@pytest.fixture(scope="module")
def bert(tiny, tmp_path_factory):
    return save_bert(tiny, tmp_path_factory.mktemp("bert"))


def test_original_and_student_are_fine_tuned_alike_and_compared(tiny, bert, glue_dir, tmp_path, capsys):
    student = tmp_path / "student"
    config = FastBertConfig.from_pretrained(bert, ffn_type="fff", fff_depth=1, fff_leaf_width=4, fff_bias=True)
    FastBertModel(config).save_pretrained(student)
    load_tokenizer(tiny / "tokenizer").save_pretrained(student)
    out, names = tmp_path / "out", ["original", "student"]
    run_all([bert, student], glue_dir, out, ["stsb"], (0,), model_names=names, as_fastbert=True)
    for name in names:
        assert json.loads((out / name / "stsb" / "seed-0" / "config.json").read_text())["model_type"] == "fastbert"
    table = compare_glue.main(["--results", str(out), "--dense", "original"])
    assert table in capsys.readouterr().out and table in (out / "kept.md").read_text()
    assert "| model | STS-B | mean of 1 | kept | seeds |" in table and "| original |" in table
    with pytest.raises(ValueError, match="holds no finished run"):
        compare_glue.main(["--results", str(tmp_path), "--dense", "original"])


def test_an_encoder_gets_a_new_head_and_a_classifier_keeps_its_own(tiny, bert, tmp_path):
    options, task = ModelArguments(as_fastbert=True), get_task("sst2")
    torch.manual_seed(1)
    model = load_classifier(options, str(bert), fit_head(options, str(bert), task))
    assert isinstance(model, FastBertForSequenceClassification)
    with_pooler = FastBertForSequenceClassification.from_pretrained(bert)
    for name, value in with_pooler.fastbert.state_dict().items():
        assert torch.equal(model.fastbert.state_dict()[name], value), name
    assert not torch.equal(model.pooler.dense.weight, with_pooler.pooler.dense.weight)
    own = save_bert(tiny, tmp_path, "ForSequenceClassification")
    model = load_classifier(options, str(own), fit_head(options, str(own), task))
    expected = FastBertForSequenceClassification.from_pretrained(own)
    assert torch.equal(model.pooler.dense.weight, expected.pooler.dense.weight)
    assert torch.equal(model.classifier.weight, expected.classifier.weight)
