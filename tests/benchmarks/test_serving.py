"""Serving beside other engines: what is checked, what a missing rival leaves, which rows there are."""

import json
import math
from importlib.util import find_spec

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

import fastbert_hf
from fastbert_hf.benchmarks.serving import engines, section, subjects
from fastbert_hf.benchmarks.serving.cases import SENTENCE_TOKENS, fixed, mixed
from fastbert_hf.benchmarks.serving.engines import Job, Unavailable
from fastbert_hf.benchmarks.serving.measure import Measurement
from fastbert_hf.benchmarks.serving.rows import ORIGINAL, ServingRow, check, comparable, format_serving, hidden_error
from fastbert_hf.benchmarks.serving.section import ServingOptions
from fastbert_hf.benchmarks.serving.subjects import BASELINE, NOTHING, Entry, Subject, random_subject
from fastbert_hf.benchmarks.serving.worker import Worker
from fastbert_hf.benchmarks.suite import Measurements, Options, run, write_report
from fastbert_hf.benchmarks.timing import BusyMeter
from fastbert_hf.cli.benchmark import parse

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def needs(*modules):
    """A mark: the test is left out where one of these is not installed."""
    missing = [name for name in modules if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


class Near:
    """A worker in this process; its engine is torch's, its outputs are off by `off`."""

    pid, off = 0, 0.0

    def __init__(self, engine, job):
        self.loaded = engines.ENGINES[engine](job)
        self.closed = False

    def bind(self, case):
        self.call = self.loaded.bind(case.ids, case.mask)

    @torch.inference_mode()
    def hidden(self):
        return self.loaded.last_hidden(self.call()) + self.off

    @torch.inference_mode()
    def __call__(self):
        self.call()

    def seconds(self, times):
        for _ in range(times):
            self()
        return 0.5 * times

    def start_load(self, seconds):
        self()

    def finish_load(self):
        return 3, 1.5

    def close(self):
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class Some(Near):
    """One of the rivals is not installed."""

    def __init__(self, engine, job):
        if engine == "OpenVINO":
            raise Unavailable("No module named 'openvino'")
        super().__init__(engine, job)


def measure(subject, folder, entries, threads, workers, start=Near):
    groups = Measurement(subject, folder, 1, lambda text: None, start).groups(entries, threads, workers)
    return [row for group in groups for row in group]


@pytest.fixture
def subject(tmp_path, monkeypatch):
    """Random weights of a tiny geometry, with its students."""
    monkeypatch.setitem(subjects.GEOMETRIES, "tiny", TINY)
    monkeypatch.setitem(subjects.FORMS, "tiny", ("leaf:2x4", "tree:1x3"))
    found = random_subject("tiny", tmp_path / "models", quick=True)
    return Subject(found.name, found.models, [fixed(1, 5, 100), mixed(100, (3, 6))], found.calibration)


def test_a_mixed_batch_is_padded_to_its_longest_text():
    case = mixed(1000)
    assert case.ids.shape == (32, max(SENTENCE_TOKENS)) and case.tokens == sum(SENTENCE_TOKENS)
    assert case.mask.sum(1).tolist() == list(SENTENCE_TOKENS)
    assert (case.ids[case.mask == 0] == 0).all() and (case.ids[case.mask == 1] >= 500).all()
    assert fixed(2, 7, 1000).tokens == 14


def test_padding_counts_neither_for_the_check_nor_for_the_error():
    torch.manual_seed(0)
    wanted, mask = torch.randn(4, 6, 8), torch.ones(4, 6).long()
    mask[1, 3:] = 0
    value = wanted.clone()
    value[1, 3:] = 1e6
    assert (
        check(value, wanted, mask, "float32") == "ok 0, cosine 1.00000, median 1.00000"
        and hidden_error(value, wanted, mask) == 0
    )
    constant = wanted[mask.bool()].mean(0).expand_as(wanted)
    assert hidden_error(constant, wanted, mask) == pytest.approx(1, rel=1e-5)
    value[0, 0, 0] = math.nan
    assert check(value, wanted, mask, "int8").startswith("MISMATCH")
    assert check(wanted.flip(0), wanted, torch.ones_like(mask), "int8").startswith("MISMATCH")
    elsewhere = wanted.clone()
    elsewhere[:, :2] *= -1  # 8 of 21 tokens took another leaf
    verdict = check(elsewhere, wanted, mask, "float32")
    assert verdict.startswith("ok") and verdict.endswith(f"cosine {1 - 2 * 8 / 21:.5f}, median 1.00000")


def test_every_entry_has_rows_and_a_missing_rival_its_reason(subject, tmp_path):
    entries = [
        BASELINE,
        Entry(ORIGINAL, "FastBERT"),
        Entry("leaf:2x4", "FastBERT"),
        Entry("tree:1x3", "FastBERT"),
        Entry(NOTHING, "FastBERT"),
        Entry(ORIGINAL, "torch", "bfloat16"),
        Entry(ORIGINAL, "OpenVINO", "int8"),
    ]
    rows = measure(subject, tmp_path, entries, 1, 2, Some)
    latency = [row for row in rows if row.workers == 1]
    assert [(row.entry, row.case) for row in latency if row.case == "1 x 5"] == [
        (entry.name, "1 x 5")
        for entry in entries  # what cannot run comes last
    ]
    assert len(latency) == 2 * len(entries)
    missing = [row for row in rows if row.reason]
    assert {row.entry for row in missing} == {"original, OpenVINO int8"} and len(missing) == 2
    assert all(row.reason == "No module named 'openvino'" and row.milliseconds is None for row in missing)
    measured = [row for row in latency if not row.reason]
    assert all(row.match.startswith("ok") and row.milliseconds == 500 and row.speedup == 1 for row in measured)
    errors = {row.entry: row.error for row in measured}
    assert errors[BASELINE.name] == 0 and 0 < errors["original, torch bfloat16"] < 0.01
    assert errors["leaf:2x4, FastBERT float32"] is None, "random weights of another form say nothing of quality"
    carried = [row for row in rows if row.workers == 2]
    assert {row.entry for row in carried} == {row.entry for row in measured}
    assert all(row.tokens_per_second == row.tokens * 4 for row in carried)  # two workers, two calls a second each
    table = format_serving(rows)
    assert "| original, OpenVINO int8 | none: No module named 'openvino' |" in table
    assert "2 workers at a time, tokens/s" in table


def test_a_wrong_output_is_a_mismatch(subject, tmp_path):
    class Wrong(Near):
        off = 3.0

    rows = measure(subject, tmp_path, [BASELINE], 1, 1, Wrong)
    assert all(row.match.startswith("MISMATCH") for row in rows)


def test_groups_share_the_baseline_and_hold_few_models_at_a_time(subject, tmp_path, monkeypatch):
    monkeypatch.setattr("fastbert_hf.benchmarks.serving.measure.AT_A_TIME", 2)
    started = []

    class Counted(Near):
        def __init__(self, engine, job):
            super().__init__(engine, job)
            started.append(self)
            assert sum(not worker.closed for worker in started) <= 2

    entries = [BASELINE, Entry(ORIGINAL, "FastBERT"), Entry("leaf:2x4", "FastBERT")]
    rows = measure(subject, tmp_path, entries, 2, 2, Counted)
    assert len(started) == 4 and all(worker.closed for worker in started)
    assert [row.entry for row in rows if row.case == "1 x 5"] == [entry.name for entry in entries]


def test_entries_of_one_type_are_measured_in_the_same_minutes(subject, tmp_path):
    dtypes = ("int8", "float32", "bfloat16", "int8", "float32")
    others = [Entry(name, "FastBERT", dtype) for name, dtype in zip("abcde", dtypes)]
    measurement = Measurement(subject, tmp_path, 1, print, Near)
    measurement._group = lambda entries, *numbers: entries[1:]
    (group,) = measurement.groups([*others, BASELINE], 1, 1)
    assert [entry.model for entry in group] == ["b", "e", "c", "a", "d"]


def test_the_entries_name_what_they_are(subject):
    names = [entry.name for entry in subject.entries()]
    assert len(set(names)) == len(names) and names[0] == "original, torch float32"
    assert {"original, ONNX Runtime int8", "half the layers, OpenVINO int8"} <= set(names)
    assert {"leaf:2x4, FastBERT, prepared int8", "no feed-forward, FastBERT, prepared bfloat16"} <= set(names)
    assert not any("compile" in entry.engine for entry in subject.entries(compiled=False))


def job(folder, cache, **fields):
    return Job(folder, cache, 1, fields.pop("dtype", "float32"), **fields)


def test_torch_dynamic_int8_rounds(subject, tmp_path):
    outputs = []
    for engine in ("torch", "torch dynamic int8"):
        worker = Near(engine, job(subject.models[ORIGINAL], tmp_path))
        worker.bind(subject.cases[1])
        outputs.append(worker.hidden())
    assert 0 < (outputs[0] - outputs[1]).abs().max() < 0.5


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=100, **TINY)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@needs("onnx", "onnxruntime")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["ONNX Runtime", "ONNX Runtime, fused"])
def test_onnx_runtime_gives_torchs_output_at_every_shape(bert, tmp_path, engine):
    workers = [Near(name, job(bert, tmp_path)) for name in ("torch", engine)]
    rounded = Near(engine, job(bert, tmp_path, dtype="int8"))
    for case in (fixed(1, 9, 100), mixed(100, (3, 6, 2))):
        for worker in (*workers, rounded):
            worker.bind(case)
        wanted, value = (worker.hidden()[case.mask.bool()] for worker in workers)
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)
        assert 0 < (rounded.hidden()[case.mask.bool()] - wanted).abs().max() < 0.5


@needs("onnx", "onnxruntime")
@pytest.mark.filterwarnings("ignore")
def test_onnx_int8_takes_every_product_and_the_embeddings(bert, tmp_path):
    """What optimum's avx512_vnni leaves to ONNX Runtime's defaults."""
    import onnx

    graph = onnx.load(engines.onnx_int8_file(engines.onnx_file(job(bert, tmp_path)))).graph
    assert not any(node.op_type == "MatMul" for node in graph.node)
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == TINY["num_hidden_layers"] * 8  # six with weights, two of activations
    (words,) = (tensor for tensor in graph.initializer if list(tensor.dims) == [100, TINY["hidden_size"]])
    assert words.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)


def test_calibration_texts_are_padded_to_one_length(bert, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two"]
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    tokenizer.save_pretrained(bert)
    subject = subjects.trained_subject(str(bert), [], None, ["one two", "one"], True, 2)
    assert [ids.shape for ids, _ in subject.calibration] == [(1, engines.CALIBRATION_TOKENS)] * 2
    assert [mask.sum().item() for _, mask in subject.calibration] == [4, 3]


@needs("openvino", "nncf")
@pytest.mark.filterwarnings("ignore")
def test_openvino_gives_torchs_output_at_every_shape(bert, tmp_path):
    calibration = [(case.ids, case.mask) for case in (fixed(1, 9, 100),)]
    exact, value, rounded = (
        Near(name, job(bert, tmp_path, dtype=dtype, calibration=calibration))
        for name, dtype in (("torch", "float32"), ("OpenVINO", "float32"), ("OpenVINO", "int8"))
    )
    for case in (fixed(1, 9, 100), mixed(100, (3, 6, 2))):
        for worker in (exact, value, rounded):
            worker.bind(case)
        wanted, found, near = (worker.hidden()[case.mask.bool()] for worker in (exact, value, rounded))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert 0 < (near - wanted).abs().max() < 1


@pytest.mark.slow
def test_a_worker_is_a_process_that_answers_and_ends(bert, tmp_path):
    case = mixed(100, (3, 6))
    with Worker("torch", job(bert, tmp_path)) as worker:
        worker.bind(case)
        near = Near("torch", job(bert, tmp_path))
        near.bind(case)
        torch.testing.assert_close(worker.hidden(), near.hidden(), rtol=1e-5, atol=1e-5)
        assert worker.seconds(3) > 0
        worker.start_load(0.01)
        calls, seconds = worker.finish_load()
        assert calls >= 1 and seconds >= 0.01
        meter = BusyMeter([worker.pid])
        meter.start()
        worker.seconds(3)
        assert meter.stop() >= 0
        process = worker._process
    assert process.exitcode == 0
    with pytest.raises(Unavailable, match=r"OSError|ValueError"):
        Worker("torch", job(tmp_path / "nothing", tmp_path))


def test_a_failing_package_is_a_reason(monkeypatch):
    with pytest.raises(Unavailable, match="absent_package"):
        engines.needs("absent_package")
    monkeypatch.delattr(fastbert_hf, "prepare_for_inference", raising=False)
    with pytest.raises(Unavailable, match="no prepare_for_inference"):
        engines.fastbert_prepared(Job(None, None, 1, "int8"))


def test_the_section_is_written_and_read_again(tmp_path, monkeypatch):
    row = ServingRow("tiny", "1 x 5", "original, torch float32", "float32", 1, 1, 5, 2.0, 0.1, 2500.0, 1.0, "ok")
    missing = ServingRow("tiny", "1 x 5", "original, OpenVINO int8", "int8", 1, 1, 5, reason="none here")
    monkeypatch.setattr("fastbert_hf.benchmarks.suite.serving_rows", lambda *arguments: [[row], [missing]])
    measured = run(Options([1], ["serving"]), {"ceilings": {}}, tmp_path, lambda text: None)
    assert measured.serving == [row, missing] and Measurements.load(tmp_path) == measured
    assert "none: none here" in (tmp_path / "results.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["serving"][0]["milliseconds"] == 2.0


@needs("matplotlib")
def test_the_picture_shows_models_that_can_be_compared(tmp_path):
    def row(entry, error, threads=1, subject="trained", score=None, **fields):
        return ServingRow(
            subject, "1 x 5", entry, "int8", threads, 1, 5, 2.0, speedup=1.0, error=error, score=score, **fields
        )

    random = [row("original, OpenVINO int8", 0.1, subject="random"), row("leaf, FastBERT", None, subject="random")]
    assert comparable(random) == []
    shown = [row("original, OpenVINO int8", 0.1, score=86.0), row("leaf, FastBERT", 0.4, score=85.0)]
    hidden = [row("leaf, FastBERT", 0.4, threads=2), row("original, torch int8", None, reason="none")]
    assert comparable([*random, *shown, *hidden]) == shown
    write_report(Measurements(serving=[*random, *shown, *hidden]), {}, tmp_path)
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")


def test_every_subject_is_measured_with_every_thread_count(monkeypatch, tmp_path):
    monkeypatch.setattr(section, "GEOMETRIES", {"a": {}, "b": {}})
    subject = Subject("tiny", {}, [])
    monkeypatch.setattr(section, "random_subject", lambda name, folder, quick: subject)
    asked = []
    monkeypatch.setattr(Measurement, "groups", lambda self, entries, *numbers: asked.append(numbers) or [[], []])
    assert len(list(section.serving_rows(ServingOptions(), [1, 2], False, print))) == 8
    assert asked == [(1, 2), (2, 2)] * 2
    assert len(list(section.serving_rows(ServingOptions(geometries=["b"]), [1], False, print))) == 2


def test_entries_are_chosen_by_name_beside_the_baseline(monkeypatch):
    monkeypatch.setattr(section, "_subjects", lambda options, quick, folder: [Subject("tiny", {ORIGINAL: None}, [])])
    monkeypatch.setattr(Measurement, "groups", lambda self, entries, threads, workers: [entries])
    (entries,) = section.serving_rows(ServingOptions(entries="OpenVINO|prepared int8"), [1], True, print)
    assert [entry.name for entry in entries] == [
        "original, torch float32",
        *(f"original, OpenVINO {dtype}" for dtype in ("float32", "bfloat16", "int8")),
        "original, FastBERT, prepared int8",
        "no feed-forward, FastBERT, prepared int8",
    ]


@pytest.mark.parametrize(
    "argv",
    [
        ["--runs", "a"],
        ["--eval_file", "a"],
        ["--original", "a"],
        ["--original", "a", "--eval_file", "a", "--geometries", "BERT-base"],
    ],
)
def test_options_that_need_each_other_say_so(argv):
    with pytest.raises(ValueError, match="--original"):
        parse(argv)
