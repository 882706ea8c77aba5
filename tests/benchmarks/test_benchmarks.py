"""The benchmark's forms are right, its checks can fail, its report is complete. No test asserts a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from fastbert_hf import FastBertConfig, FastBertForMaskedLM, FastFeedForward
from fastbert_hf.benchmarks import forms, gpu, layer, models
from fastbert_hf.benchmarks.levels import NAMES, compile_levels, level_form
from fastbert_hf.benchmarks.memory import MemoryRow, memory_rows
from fastbert_hf.benchmarks.routing import RoutingChange, routing_changes, text_batch
from fastbert_hf.benchmarks.rows import format_table
from fastbert_hf.benchmarks.suite import Measurements, Options, run, trained_problem, write_report
from fastbert_hf.benchmarks.timing import BusyMeter, Timing, interleaved
from tests import oracle

CEILINGS = {"bytes_per_second": 1e10, "flops_per_second": 1e11}


def small_layer(trees=1, depth=4):
    torch.manual_seed(0)
    ffn = FastFeedForward(32, 32, depth, trees, initializer_range=0.5)
    torch.nn.init.normal_(ffn.bias_in)
    x = torch.randn(20, 32)
    expected, _ = oracle.dense_and_mask(x, ffn.weight_in, ffn.bias_in, ffn.weight_out, trees)
    return ffn, x, expected.detach()


@pytest.mark.parametrize("trees", [1, 3])
def test_dense_and_mask_form_is_the_oracle_with_gradients(trees):
    ffn, x, expected = small_layer(trees)
    y = forms.dense_and_mask(x, ffn.weight_in, ffn.bias_in, ffn.weight_out, trees, 4)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)
    y.sum().backward()
    gradient = ffn.weight_in.grad.clone()
    ffn.zero_grad()
    ffn(x).sum().backward()
    torch.testing.assert_close(ffn.weight_in.grad, gradient, atol=1e-4, rtol=1e-4)


def test_the_papers_forms_are_right():
    ffn, x, expected = small_layer()
    weights = (ffn.weight_in.detach(), ffn.bias_in.detach(), ffn.weight_out.detach())
    torch.testing.assert_close(forms.fff_bmm(x, *weights, 4), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(forms.dense_bmm(x, *weights), forms.dense(x, *weights), atol=1e-4, rtol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_the_level_forms_are_right():
    ffn, x, expected = small_layer()
    weights = (ffn.weight_in.detach(), ffn.bias_in.detach(), ffn.weight_out.detach())
    library = compile_levels()
    dense = forms.dense(x, *weights)
    for name in NAMES:
        y = level_form(library, name)(x, *weights, torch.full((20, 32), float("nan")))
        torch.testing.assert_close(y, dense if name.startswith("dense") else expected, atol=1e-4, rtol=1e-5)
    assert (torch.tensor([1e-45]) > 0).all(), "loading the forms made this thread flush numbers next to zero"


@pytest.mark.parametrize("tokens", [1, 5])
def test_forward_rows_check_every_entry(tokens):
    rows = layer.forward_rows(tokens, 1, CEILINGS, depth=2, rounds=1, compile_dense=False)
    entries = {row.entry for row in rows}
    assert {"dense 7 eager", "dense 8 eager", "FFF BMM", "reference"} <= entries
    assert all(row.match.startswith("ok") for row in rows)
    baseline = [row for row in rows if row.entry == row.baseline]
    assert len(baseline) == 1 and baseline[0].speedup == 1.0
    assert all(row.speedup <= 1 for row in rows if row.entry in ("dense 7 eager", "dense 8 eager"))


def test_training_rows_check_every_gradient():
    rows = layer.training_rows(6, 1, rounds=1, depth=2, trees=2)
    assert {"dense-and-mask", "dense", "reference"} <= {row.entry for row in rows}
    assert all(row.match.startswith("ok") for row in rows if row.entry != "dense")


def test_a_wrong_result_is_a_mismatch():
    problem = layer.LayerProblem(layer.make_layer(depth=3), layer.make_inputs(8))
    assert problem.match(problem.y).startswith("ok")
    wrong = problem.y.clone()
    wrong[int(problem.clear.nonzero()[0]), 5] += 1
    assert problem.match(wrong).startswith("MISMATCH")
    assert layer.verdict(torch.full((2, 2), float("nan")), torch.ones(2, 2)).startswith("MISMATCH")


def test_one_path_inputs_take_one_path_and_balanced_ones_spread():
    ffn = layer.make_layer(depth=6)
    one, balanced = (ffn.route(layer.make_inputs(512, kind))[:, 0, -1] for kind in ("one path", "balanced"))
    assert one.unique().numel() == 1 and balanced.unique().numel() > 60


def test_whole_models_run_beside_their_bounds():
    inference = models.inference_rows(1, 8, 1, rounds=1, layers=1)
    assert {"FastBERT", "dense twin 4095", "no feed-forward"} <= {row.entry for row in inference}
    training = models.training_rows(2, 8, 1, rounds=1, layers=1)
    finetuning = models.finetuning_rows(2, 8, 1, rounds=1, layers=1)
    assert {row.entry for row in training + finetuning if row.match} == {"FastBERT"}
    evaluation = models.inference_rows(2, 8, 1, rounds=1, layers=1, classifier=True)
    rows = [*inference, *training, *finetuning, *evaluation]
    assert len({row.section for row in rows}) == 4 and all("MISMATCH" not in row.match for row in rows)


def test_gpu_rows_are_those_of_the_layer_on_another_device():
    """On the CPU, small: all but CUDA graphs, compiled forms and peak memory, which need a GPU."""
    groups = list(gpu.gpu_rows("cpu", sizes=(1, 40), batch=2, layers=1))
    rows = [row for group in groups for row in group]
    assert {row.section for row in rows} == {
        "gpu forward",
        "gpu forward, against experts",
        "gpu forward and backward",
        "gpu whole encoder, inference",
        "gpu training step",
    }
    assert {row.dtype for row in rows} == {"bfloat16", "float32", "float32, TF32 products", "bfloat16 autocast"}
    assert all("MISMATCH" not in row.match for row in rows)
    assert {"reference", "dense 63 eager"} <= {row.entry for row in groups[0]}
    trees = [row for row in rows if row.section == "gpu forward" and row.entry == "reference"]
    assert [row.bound_share is None for row in trees] == ["TF32" in row.dtype for row in trees]
    assert {"mixture", "reference"} <= {row.entry for row in rows if "experts" in row.section}
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_mixture_of_experts_gives_every_token_its_own_expert():
    torch.manual_seed(0)
    x, router = torch.randn(50, 32), torch.randn(4, 32)
    weight_in, weight_out = torch.randn(4, 32, 16).requires_grad_(), torch.randn(4, 16, 32)
    y = forms.mixture_of_experts(x, router, weight_in, weight_out)
    assert gpu.experts_match(x, router, weight_in, weight_out, y).startswith("ok")
    assert gpu.experts_match(x, router.flip(0), weight_in, weight_out, y).startswith("MISMATCH")
    y.square().sum().backward()
    assert weight_in.grad.abs().sum(dim=(1, 2)).gt(0).all()


def test_another_stopwatch_is_asked_for_every_sample():
    asked = []

    def stopwatch(call, times):
        asked.append(times)
        return 0.5 * times

    assert interleaved({"a": lambda: None}, rounds=3, stopwatch=stopwatch)["a"].median == 0.5
    assert asked == [1, 1, 1, 1]


def test_timing_takes_medians_in_turns():
    order = []
    timings = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, least_seconds=1e-6)
    assert len(timings["a"].seconds) == 3 and timings["a"].median > 0
    measured = "".join(order[-6:]) if len(order) < 20 else "".join(order)
    assert "ab" in measured and "ba" in measured
    assert Timing([1.0, 2.0, 9.0], [0.0, 0.0, 0.9]).median == 2.0
    assert not Timing([1.0], [0.0]).busy and Timing([1.0], [0.5]).busy


def test_the_busy_meter_does_not_count_ourselves():
    meter = BusyMeter()
    meter.start()
    sum(i * i for i in range(2_000_000))
    assert 0 <= meter.stop() <= 1.5


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_measured_above_inputs_and_output():
    forms = ("dense", "dense-and-mask", "reference")
    rows = {row.form: row.megabytes for row in memory_rows(2048, forms)}
    logits = 2048 * 4095 * 4 / 2**20  # what the dense layer holds at least once
    assert rows["dense"] > 0.9 * logits and rows["dense-and-mask"] > 1.8 * logits
    assert rows["reference"] < 0.7 * logits


@pytest.fixture
def trained_folder(tmp_path):
    """A model, its tokenizer and a text in one folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(95))]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=16)
    config = FastBertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        fff_depth=4,
        fff_trees=2,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    FastBertForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(f"word{i * i % 95}" for i in range(400)))
    return tmp_path


def test_routing_changes_are_counted(trained_folder):
    changes = {c.variant: c for c in routing_changes(str(trained_folder), str(trained_folder / "text.txt"), 320)}
    assert {"reference, bfloat16", "reference, autocast bfloat16"} <= set(changes)
    for change in changes.values():
        assert 0 <= change.paths <= change.tokens <= 1
    assert 0 < changes["reference, bfloat16"].paths < 0.5  # rounding to 8 bits moves some decisions, not most
    if "native, float32" in changes:
        assert changes["native, float32"].tokens < 0.01
    with pytest.raises(ValueError, match="expected at least one sequence of 16"):
        text_batch(str(trained_folder), str(trained_folder / "text.txt"), 3)


def test_a_trained_layer_and_its_text_are_a_problem(trained_folder):
    problem = trained_problem(str(trained_folder), str(trained_folder / "text.txt"), 64)
    assert problem.x.shape == (64, 32) and problem.match(problem.y).startswith("ok")


def test_the_report_holds_rows_machine_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    options = Options(threads=[1], sections=["forward"], quick=True)
    rows = layer.forward_rows(4, 1, CEILINGS, depth=2, rounds=1, compile_dense=False)
    rows += layer.forward_rows(4, 1, CEILINGS, depth=2, rounds=1, compile_dense=False, section="depth")
    changes = [RoutingChange("native, bfloat16", 0.1, 0.2, 0.3, 0.4)]
    measured = Measurements(rows, [MemoryRow("native", 16384, 1.5)], changes)
    write_report(measured, {"processor": "test"}, tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["machine"]["processor"] == "test" and len(written["rows"]) == len(rows)
    assert written["routing"][0]["paths"] == 0.1 and written["memory"][0]["megabytes"] == 1.5
    assert {"median_ms", "spread", "speedup", "match", "us_per_token"} <= set(written["rows"][0])
    assert format_table(rows) in (tmp_path / "results.md").read_text()
    for plot in ("time-per-token.png", "speedup-depth.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
    assert options.rounds == 5
    again = Measurements.load(tmp_path)
    assert again == measured and Measurements.load(tmp_path / "nothing") == Measurements()


def test_an_interrupted_run_goes_on_with_the_missing_sections(tmp_path, monkeypatch):
    measured_sections = []

    def section(name):
        def measure(options, ceilings):
            measured_sections.append(name)
            yield layer.forward_rows(4, 1, CEILINGS, depth=2, rounds=1, compile_dense=False, section=name)

        return measure

    def interrupted(options, ceilings):
        raise KeyboardInterrupt

    machine, report = {"ceilings": {"1": CEILINGS}}, lambda text: None
    options = Options(threads=[1], sections=["first", "second"])
    monkeypatch.setattr("fastbert_hf.benchmarks.suite.SECTIONS", {"first": section("first"), "second": interrupted})
    with pytest.raises(KeyboardInterrupt):
        run(options, machine, tmp_path, report)
    assert Measurements.load(tmp_path).sections == ["first"]
    sections = {"first": section("first"), "second": section("second")}
    monkeypatch.setattr("fastbert_hf.benchmarks.suite.SECTIONS", sections)
    rows = run(options, machine, tmp_path, report).rows
    assert measured_sections == ["first", "second"] and {row.section for row in rows} == {"first", "second"}
