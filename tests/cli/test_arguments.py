"""Recipes and command lines."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from fastbert_hf.cli.arguments import RecipeArgumentParser, run_command
from fastbert_hf.data.build_corpus import CorpusSettings
from fastbert_hf.recipes import load_yaml
from fastbert_hf.training.pretraining.run import PretrainingArguments


@dataclass
class Options:
    """Some options."""

    name: str = field(default="a")
    files: list[str] = field(default_factory=list)
    flag: bool = field(default=True)
    count: int | None = field(default=None)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def parse(argv):
    return RecipeArgumentParser((Options, TrainingArguments)).parse(argv)


def test_recipe_values_are_converted_and_the_command_line_wins(tmp_path):
    recipe = write(
        tmp_path / "r.yaml",
        "learning_rate: 5e-5\nadam_epsilon: '1e-6'\nflag: false\nfiles: [a, b]\ncount: 3\nmax_steps: -1\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\noutput_dir: out\nname: null\n",
    )
    options, args = parse(["--learning_rate", "1e-3", "--config", recipe, "--files", "c"])
    assert args.learning_rate == 1e-3 and args.adam_epsilon == 1e-6
    assert options == Options(name="a", files=["c"], flag=False, count=3)
    assert args.max_steps == -1 and args.lr_scheduler_kwargs == {"num_cycles": 2} and args.output_dir == "out"
    assert parse(["--config", recipe])[0].files == ["a", "b"]


def test_earlier_names_of_options_are_understood(tmp_path):
    recipe = write(tmp_path / "r.yaml", "validation_share: 0.3\nbudget_processor_hours: 2.0\noutput_dir: out\n")
    options, _ = RecipeArgumentParser((PretrainingArguments, TrainingArguments)).parse(["--config", recipe])
    assert (options.validation_fraction, options.budget_cpu_hours) == (0.3, 2.0)
    (settings,) = RecipeArgumentParser(CorpusSettings).parse(["--validation_share", "0.3"])
    assert settings == CorpusSettings(validation_fraction=0.3)


def test_recipe_values_may_begin_with_a_dash_hold_spaces_or_be_empty(tmp_path):
    recipe = write(
        tmp_path / "r.yaml", "weight_decay: -1e-5\nname: --flag\nfiles: [-a b=c]\ncount: -3\nrun_name: ''\n"
    )
    options, args = parse(["--config", recipe])
    assert (options.name, options.files, options.count) == ("--flag", ["-a b=c"], -3)
    assert (args.weight_decay, args.run_name) == (-1e-5, "")


def test_merge_keys_are_refused(tmp_path):
    text = "base: &b {x: 1}\nmore: {<<: *b, y: 2}\n"
    with pytest.raises(ValueError, match=r"merge keys \(<<\) are not supported") as caught:
        load_yaml(write(tmp_path / "bad.yaml", text))
    assert "bad.yaml" in str(caught.value)
    assert load_yaml(write(tmp_path / "r.yaml", text.replace("<<: *b", "z: *b")))["more"] == {"z": {"x": 1}, "y": 2}


def test_a_later_recipe_wins_over_an_earlier_one(tmp_path):
    first, second = write(tmp_path / "1.yaml", "name: x\ncount: 1\n"), write(tmp_path / "2.yaml", "name: y\n")
    options, _ = parse(["--config", first, "--config", second])
    assert (options.name, options.count) == ("y", 1)


def test_unknown_key_names_key_and_file(tmp_path):
    recipe = write(tmp_path / "bad.yaml", "learning_rat: 1\n")
    with pytest.raises(ValueError, match="learning_rat") as caught:
        parse(["--config", recipe])
    assert "bad.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", "key: value"), ("", "key: value"), ("a: [\n", "not valid YAML"), ("a: 1\na: 2\n", "appears twice")],
)
def test_unusable_recipe_files_are_named(tmp_path, text, message):
    recipe = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ValueError, match=message) as caught:
        load_yaml(recipe)
    assert "bad.yaml" in str(caught.value)


def test_missing_recipe_unknown_option_and_wrong_type_raise(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        parse(["--config", str(tmp_path / "absent.yaml")])
    with pytest.raises(ValueError, match="--colour"):
        parse(["--colour", "red"])
    with pytest.raises(ValueError, match="'many'"):
        parse(["--count", "many"])
    recipe = write(tmp_path / "r.yaml", "count: many\n")
    with pytest.raises(ValueError, match="'many'"):
        parse(["--config", recipe])


def test_exponents_without_a_dot_are_numbers(tmp_path):
    content = load_yaml(write(tmp_path / "r.yaml", "a: 1e-12\nb: 5E3\nc: 12\nd: 1e\ne: no\n"))
    assert content == {"a": 1e-12, "b": 5000.0, "c": 12, "d": "1e", "e": False}
    assert isinstance(content["c"], int)


def test_a_value_error_becomes_one_line_and_other_errors_pass(capsys):
    def wrong():
        raise ValueError("first\n  second")

    def broken():
        raise RuntimeError("a bug")

    assert run_command(wrong) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: first second\n" and captured.out == ""
    assert run_command(lambda: None) == 0
    with pytest.raises(RuntimeError):
        run_command(broken)


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted where Linux lists them")
def test_a_process_group_and_its_threads_end_with_the_command(tmp_path):
    def gloo_threads():
        return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())

    def main():
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
        torch.distributed.barrier()
        assert gloo_threads() > before

    before = gloo_threads()
    assert run_command(main) == 0
    assert not torch.distributed.is_initialized() and gloo_threads() == before
