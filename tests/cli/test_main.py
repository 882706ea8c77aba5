"""The command `fastbert`: its subcommands, and one line for every mistake."""

import importlib
from pathlib import Path

import pytest

import fastbert_hf
from fastbert_hf.cli.arguments import run_command
from fastbert_hf.cli.main import COMMANDS, main
from fastbert_hf.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
NOT_COMMANDS = {"__init__", "arguments", "main"}


def help_of(call, capsys):
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_every_module_is_a_command_and_every_command_is_listed(capsys):
    modules = {path.stem for path in (ROOT / "fastbert_hf" / "cli").glob("*.py")} - NOT_COMMANDS
    assert modules == {module for module, _ in COMMANDS.values()}
    text = help_of(lambda: main(["--help"]), capsys)
    assert all(f"  {words} " in text for words in COMMANDS)
    assert help_of(lambda: main(["--version"]), capsys) == f"{fastbert_hf.__version__}\n"


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_explains_its_options(words, capsys):
    text = help_of(lambda: main([*words.split(), "--help"]), capsys)
    assert text.startswith(f"usage: fastbert {words} ")


@pytest.mark.parametrize("argv", [[], ["distil"], ["fit-layers"], ["--quick"]])
def test_an_unknown_command_is_one_line(argv, capsys):
    assert run_command(lambda: main(argv)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "expected prepare, tokenizer," in captured.err and not captured.out


def test_a_script_is_the_command_it_names():
    wrapped = set()
    for path in sorted((ROOT / "scripts").glob("*.py")):
        if path.stem in ("demo", "distill_demo", "pretraining_study"):  # programs of their own
            continue
        words = path.read_text(encoding="utf-8").split("`")[1].removeprefix("fastbert ")
        module = importlib.import_module(f"fastbert_hf.cli.{COMMANDS[words][0]}")
        spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        assert script.main is module.main
        wrapped.add(words)
    assert wrapped == set(COMMANDS) - {"kernels"}


@pytest.mark.parametrize("words", ["prepare", "tokenizer", "pretrain", "glue", "distill fit-layers"])
def test_a_missing_extra_is_one_line_before_any_work(words, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(EXTRAS, "training", ("absent_module",))
    out = tmp_path / "out"
    assert run_command(lambda: main([*words.split(), "--output_dir", str(out)])) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "absent_module is not installed" in line and "fastbert-hf[training]" in line
    assert not out.exists()


def test_a_benchmark_with_pictures_names_the_extra_that_draws_them(monkeypatch, capsys, tmp_path):
    from fastbert_hf import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    out = tmp_path / "out"
    assert run_command(lambda: main(["benchmark", "--sections", "forward", "--output_dir", str(out)])) == 2
    assert "matplotlib is not installed" in (line := capsys.readouterr().err) and "fastbert-hf[bench]" in line
    assert not out.exists()
