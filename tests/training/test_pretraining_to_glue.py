"""The whole way through the scripts: raw text, corpus, pretraining, and the folder in the hands of its users."""

import json
import lzma
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM, pipeline

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import prepare_corpus  # noqa: E402
import pretrain_mlm  # noqa: E402
import run_glue  # noqa: E402


def command(tiny, output_dir, *extra):
    return [
        "--config", str(ROOT / "configs" / "pretrain" / "cpu-10-minutes.yaml"),
        "--model_config", str(tiny / "model.yaml"),
        "--output_dir", str(output_dir),
        "--per_device_train_batch_size=8",
        "--max_seq_length=16",
        "--validation_fraction=0.1",
        "--budget_hours=0.0005",
        "--logging_steps=5",
        "--use_cpu=true",
        "--disable_tqdm=true",
        *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Folder that pretrain_mlm.py made from raw text alone."""
    folder = tmp_path_factory.mktemp("run") / "out"
    options = ("--train_file", str(tiny / "corpus.txt"), "--vocab_size=120", "--report_to=tensorboard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "logs"))
        _, summary = pretrain_mlm.main(command(tiny, folder, *options))
    return folder, summary


def test_raw_text_becomes_a_folder_that_fine_tunes(trained, glue_dir, tmp_path):
    folder, summary = trained
    assert summary["train_seconds"] >= 1.8 and summary["budget"] == {"budget_hours": 0.0005}
    assert AutoModelForMaskedLM.from_pretrained(folder).config.fff_depth == 2
    assert len(pipeline("fill-mask", model=str(folder))("the river [MASK] under the stone")) == 5
    arguments = ["--model_name_or_path", str(folder), "--glue_dir", str(glue_dir), "--task_name", "sst2"]
    training = ["--do_train", "--do_eval", "--max_steps=3", "--max_seq_length=24", "--use_cpu=true"]
    run_glue.main([*arguments, *training, "--output_dir", str(tmp_path / "glue"), "--disable_tqdm=true"])
    assert 0 <= json.loads((tmp_path / "glue" / "summary.json").read_text())["accuracy"] <= 1


def test_tensorboard_gets_losses_budget_and_tree_usage(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, summary = trained
    events = accumulator.EventAccumulator(str(folder / "logs"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "train/budget_fraction", "train/tokens", "eval/loss"} <= tags
    assert {
        "train/trees/layer_0_leaf_entropy",
        "train/trees/layer_1_dead_nodes",
        "train/trees/layer_0_level_2_used",
    } <= tags
    assert events.Scalars("eval/loss")[-1].value == pytest.approx(summary["validation_loss"], rel=1e-5)


def test_a_second_start_finds_the_corpus_and_the_end_of_the_run(tiny, trained):
    folder, summary = trained
    manifest = folder.with_name("out-corpus") / "manifest.json"
    written = manifest.stat().st_mtime_ns
    options = ("--train_file", str(tiny / "corpus.txt"), "--vocab_size=120", "--report_to=none")
    _, again = pretrain_mlm.main(command(tiny, folder, *options))
    assert manifest.stat().st_mtime_ns == written
    assert again["validation_loss"] == summary["validation_loss"] and again["steps"] == summary["steps"]


def test_a_prepared_corpus_of_packed_text_trains_without_naming_its_tokenizer(tiny, tmp_path, capsys):
    (tmp_path / "text.txt.xz").write_bytes(lzma.compress((tiny / "corpus.txt").read_bytes()))
    prepare = ["--train_file", str(tmp_path / "text.txt.xz"), "--output_dir", str(tmp_path / "corpus")]
    prepare += ["--tokenizer_name", str(tiny / "tokenizer"), "--max_seq_length=16", "--validation_fraction=0.1"]
    prepare += ["--license", "cc0-1.0"]
    prepare_corpus.main(prepare)
    prepare_corpus.main(prepare)
    printed = capsys.readouterr().out
    assert "prepared in" in printed and "was prepared already" in printed
    corpus = ("--corpus", str(tmp_path / "corpus"))
    _, summary = pretrain_mlm.main(command(tiny, tmp_path / "out", *corpus))
    assert summary["sources"][0]["license"] == "cc0-1.0" and summary["dead_nodes"] >= 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| text.txt.xz | SHA-256" in card and "cc0-1.0" in card
    for changes, message in (
        (("--max_seq_length=32",), "sequences of 16 tokens; max_seq_length is 32"),
        (("--tokenizer_name", str(tmp_path / "none")), "none"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain_mlm.main(command(tiny, tmp_path / "other", *corpus, *changes))
    shard = tmp_path / "corpus" / "train-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train-00000\.arrow has \d+ bytes instead of"):
        pretrain_mlm.main(command(tiny, tmp_path / "out", *corpus))
    assert list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "exactly one of --train_file and --dataset_name"),
        (["--train_file", "absent.txt"], "'absent.txt' does not exist"),
        (["--train_file", "table.csv"], "does not exist"),
        (["--dataset_name", "absent-folder/set"], "cannot be loaded"),
    ],
)
def test_mistakes_of_preparation_are_named(tmp_path, options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message):
        prepare_corpus.main([*options, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "manifest.json").exists()
