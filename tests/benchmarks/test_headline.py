"""The headline divides the right rows by each other."""

import pytest

from fastbert_hf.benchmarks.headline import format_headline
from fastbert_hf.benchmarks.memory import MemoryRow
from fastbert_hf.benchmarks.rows import Row


def row(entry, point, ms, section="forward", threads=1, tokens=1, case="1x11", dtype="float32", busy=False):
    return Row(section, case, entry, point, tokens, threads, dtype, "balanced", ms, 0.0, "", 1.0, "ok", None, busy)


def cells(table, title, baseline):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {title} | {baseline} |")]
    return [cell.strip() for cell in line.split("|")[3:-1]]


def test_the_fastest_dense_layer_is_found_among_widths_and_compilers_only():
    rows = [
        row("native", "C call", 2.0),
        row("dense 4095 eager", "function call", 30.0),
        row("dense 4096 compiled", "function call", 20.0),
        row("dense Level 1", "C call", 1.0),
        row("dense BMM", "function call", 1.0),
    ]
    table = format_headline(rows, [])
    assert cells(table, "forward, N = 1, kernel", "dense 4095 eager") == ["15x"]
    assert cells(table, "forward, N = 1, kernel", "dense, the fastest") == ["10x"]
    assert "module call" not in table


def test_threads_stand_side_by_side_and_busy_rows_are_marked():
    rows = [row("native", "C call", 8.0, tokens=16384), row("native", "C call", 5.0, tokens=16384, threads=2)]
    rows += [row("dense 4095 eager", "function call", 400.0, tokens=16384, threads=n, busy=n == 2) for n in (1, 2)]
    table = format_headline(rows, [MemoryRow("native", 16384, 0.6)])
    assert cells(table, "forward, N = 16384, kernel", "dense 4095 eager") == ["50x", "80x (busy)"]
    assert cells(table, "forward, N = 16384, kernel, 2 threads", "one thread") == ["", "1.6x"]
    assert "| memory above inputs and output, N = 16384: native | | 0.6 MB |" in table


@pytest.mark.parametrize("half", ["", " bfloat16"])
def test_models_are_compared_at_the_same_precision_and_int8_with_both(half):
    section, case = "whole encoder against alternatives", "12 layers, 1 x 128"
    entries = {f"FastBERT 12 layers, torch{half}": 10.0, f"DistilBERT, torch{half}": 20.0}
    rows = [row(name, "module call", ms, section, case=case, tokens=128) for name, ms in entries.items()]
    rows.append(row("BERT-base, ONNX Runtime int8", "session run", 15.0, section, case=case, tokens=128))
    table = format_headline(rows, [])
    title = f"12 layers, 1 x 128,{half or ' float32'}"
    assert cells(table, title, f"DistilBERT, torch{half}") == ["2x"]
    assert cells(table, title, "BERT-base, ONNX Runtime int8") == ["1.5x"]


def test_bfloat16_is_compared_with_the_kernel_itself():
    rows = [
        row("native", "C call", 3.0, "bfloat16", tokens=2048),
        row("native", "C call", 2.0, "bfloat16", tokens=2048, dtype="bfloat16"),
    ]
    table = format_headline(rows, [])
    assert cells(table, "forward in bfloat16, N = 2048, kernel", "the kernel in float32") == ["1.5x"]


def test_leaf_trees_are_compared_with_the_layer_they_replace_and_with_one_of_their_width():
    where = {"section": "leaf trees, forward", "tokens": 128, "case": "H=384, 32 leaves of 96"}
    rows = [
        row("native", "C call", 2.0, **where),
        row("dense 1536 eager", "function call", 30.0, **where),
        row("dense 1536 compiled", "function call", 20.0, **where),
        row("dense 96 eager", "function call", 1.0, **where),
        row("native", "C call", 2.0, **where | {"case": "H=768, 32 leaves of 192"}),
    ]
    table = format_headline(rows, [])
    title = "leaf trees, H = 384, forward, N = 128, kernel"
    assert cells(table, title, "dense 1536, the fastest") == ["10x"]
    assert cells(table, title, "dense 96, the fastest") == ["0.5x"]
    assert "H = 768" not in table
