"""Tables as people save them: byte-order marks, spaces around names and labels, lone surrogates, long texts."""

import json

import pytest

from fastbert_hf.data.glue import load_task_files
from fastbert_hf.data.readers import iter_rows, read_rows
from fastbert_hf.data.tokenizer import train_wordpiece

MARK = "\ufeff"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "idx,text,label\n7,a,x\n8,b,y\n"),
        ("a.csv", "idx,text,label\r\n7,a,x\r\n8,b,y\r\n"),
        ("a.csv", '"idx","text","label"\n"7","a","x"\n"8","b","y"\n'),
        ("a.tsv", "idx\ttext\tlabel\n7\ta\tx\n8\tb\ty\n"),
        ("a.jsonl", '{"idx": 7, "text": "a", "label": "x"}\n{"idx": 8, "text": "b", "label": "y"}\n'),
        ("a.json", '[{"idx": 7, "text": "a", "label": "x"}, {"idx": 8, "text": "b", "label": "y"}]'),
    ],
)
@pytest.mark.parametrize("mark", ["", MARK])
def test_a_byte_order_mark_is_not_part_of_the_first_name(tmp_path, name, content, mark):
    (tmp_path / name).write_bytes((mark + content).encode())
    data = load_task_files(None, tmp_path / name)
    assert data.task.columns == ("text",) and data.task.labels == ("x", "y")
    assert data.train.texts == [["a", "b"]] and data.train.ids == [7, 8]


def test_a_byte_order_mark_keeps_both_sentences(tmp_path):
    (tmp_path / "a.csv").write_text(f"{MARK}sentence1,sentence2,label\na,b,0\nc,d,1\n", encoding="utf-8")
    assert load_task_files(None, tmp_path / "a.csv").train.texts == [["a", "c"], ["b", "d"]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", " text , label\n a ,1\nb, 1\nc,0 \n"),
        ("a.tsv", "text \t label\n a \t1\nb\t 1\nc\t0 \n"),
        ("a.jsonl", '{" text": " a ", "label ": "1"}\n{"text": "b", "label": " 1"}\n{"text": "c", "label": "0\\n"}'),
    ],
)
def test_names_and_labels_are_stripped_and_texts_are_not(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    data = load_task_files(None, tmp_path / name)
    assert data.task.columns == ("text",) and data.task.labels == ("0", "1")
    assert data.train.labels == [1, 1, 0] and data.train.texts == [[" a ", "b", "c"]]


def test_labels_that_differ_in_case_alone_are_warned_about(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("text,label\na,Spam\nb,spam\nc,ham\n")
    assert load_task_files(None, tmp_path / "a.csv").task.labels == ("Spam", "ham", "spam")
    (message,) = caplog.messages
    assert "a.csv" in message and "case alone" in message and "Spam, spam" in message and "ham," not in message


def test_fields_keep_separators_quotes_and_line_breaks_when_quoted(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"a, ""b""\n\nc",NA\n,null\n')
    rows = read_rows(tmp_path / "a.csv")
    assert rows == [{"text": 'a, "b"\n\nc', "label": "NA"}, {"text": "", "label": "null"}]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_long_texts_and_many_rows_are_read(tmp_path, suffix):
    separator = "," if suffix == ".csv" else "\t"
    lines = [f"text{separator}label", f"{'x' * 3_000_000}{separator}1", *[f"y{separator}0"] * 1000]
    (tmp_path / f"a{suffix}").write_text("\n".join(lines))
    rows = read_rows(tmp_path / f"a{suffix}")
    assert len(rows) == 1001 and len(rows[0]["text"]) == 3_000_000 and rows[-1] == {"text": "y", "label": "0"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_lone_surrogates_become_the_replacement_character(tmp_path, name):
    rows = [{"text": "cut \ud83d", "label": "\udc00"}, {"text": "whole \U0001f600", "label": "b"}]
    text = json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(text)
    data = load_task_files(None, tmp_path / name)
    assert data.train.texts == [["cut \ufffd", "whole \U0001f600"]] and data.task.labels == ("b", "\ufffd")
    tokenizer = train_wordpiece(["cut whole cut whole"], vocab_size=40)
    assert len(tokenizer(data.train.texts[0])["input_ids"]) == 2


def test_a_column_without_a_name_is_no_text(tmp_path):
    (tmp_path / "a.csv").write_text(",text,label\n0,a,x\n1,b,y\n")
    with pytest.raises(ValueError, match=r"a\.csv: column 1 has no name"):
        load_task_files(None, tmp_path / "a.csv")


def test_rows_of_json_lines_come_before_the_file_is_read_to_its_end(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\nnot JSON\n')
    rows = iter_rows(tmp_path / "a.jsonl")
    assert [next(rows), next(rows)] == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(ValueError, match="line 3: not a JSON object"):
        next(rows)
