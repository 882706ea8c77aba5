"""The model card: what the folder knows stands in it, what it does not know is left out, its header is valid."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

from fastbert_hf import FastBertConfig
from fastbert_hf.hub import origin
from fastbert_hf.hub.card import PIPELINES, TEMPLATE, render_card
from tests.clients.helpers import tiny_config
from tests.hub.conftest import ROOT
from tests.processes import CHILD_SECONDS

GLUE = {"task": "mrpc", "train_examples": 3668, "seed": 3, "steps": 345, "examples": 408}
GLUE |= {"f1": 0.87654, "majority_f1": 0.81, "accuracy": 0.80392, "majority_accuracy": 0.68}
PRETRAINED = {"validation_loss": 2.34567, "unigram_loss": 6.1, "tokens_seen": 1_024_000, "parameters": 5, "seed": 0}
BENCHMARK = {
    "machine": {"processor": "Some CPU", "torch": "2.13.0", "commit": "abc1234"},
    "rows": [
        {
            "section": "whole encoder, inference",
            "entry": "FastBERT",
            "case": "16 layers, 8 x 128",
            "threads": 2,
            "dtype": "float32",
            "median_ms": 123.45,
            "speedup": 2.345,
            "baseline": "dense twin 4096",
            "match": "match",
            "busy": False,
        }
    ],
}


def card(folder, config=None, name="FastBertForMaskedLM", **options):
    return render_card(folder, config or tiny_config(), name, 12_345, "somebody/small", **options)


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_not_known_is_left_out(tmp_path, name):
    text = card(tmp_path, name=name)
    for section in ("## Training", "## Results", "## Speed", "license", "model-index", "datasets"):
        assert section not in text
    assert "{{" not in text and "{%" not in text and "None" not in text and "AutoTokenizer" not in text
    assert header(text)["pipeline_tag"] == PIPELINES[name][0] and f"import {PIPELINES[name][1]}\n" in text
    assert "Each token uses 8 of the 30 feed-forward neurons" in text  # two trees of depth 3
    assert "| parameters | 12,345 |" in text and "@article{belcak2023" in text


def test_a_dense_model_does_not_claim_trees(tmp_path):
    text = card(tmp_path, tiny_config(ffn_type="dense", intermediate_size=64))
    assert "with dense feed-forward layers" in text and "trees a layer" not in text and "64 of 64" in text


def test_glue_results_stand_in_the_text_and_in_the_model_index(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(GLUE))
    text = card(tmp_path, name="FastBertForSequenceClassification")
    assert "| mrpc, validation | f1 | 0.8765 | 0.8100 (constant answer) |" in text
    results = {result.metric_type: result for result in ModelCard(text).data.eval_results}
    assert results["f1"].metric_value == 0.8765 and results["accuracy"].metric_value == 0.8039
    assert results["f1"].dataset_type == "nyu-mll/glue" and results["f1"].dataset_config == "mrpc"
    assert header(text)["model-index"][0]["name"] == "small"


def test_several_validation_splits_are_kept_apart(tmp_path):
    summary = {"task": "mnli", "accuracy_validation_matched": 0.7, "accuracy_validation_mismatched": 0.6}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = card(tmp_path, name="FastBertForSequenceClassification")
    found = {result.dataset_split: result.metric_value for result in ModelCard(text).data.eval_results}
    assert found == {"validation_matched": 0.7, "validation_mismatched": 0.6}


@pytest.mark.parametrize("task", ["custom", "own"])  # the second: as earlier versions called it
def test_files_of_ones_own_are_a_custom_data_set(tmp_path, task):
    (tmp_path / "summary.json").write_text(json.dumps({"task": task, "accuracy": 0.7}))
    (result,) = ModelCard(card(tmp_path, name="FastBertForSequenceClassification")).data.eval_results
    assert (result.dataset_type, result.dataset_name, result.dataset_config) == ("custom", "custom data", None)


def test_pretraining_results_and_the_recipe_are_recorded(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(PRETRAINED))
    (tmp_path / "recipe.json").write_text(json.dumps({"learning_rate": 0.001, "warmup_steps": 0, "optim": "adamw"}))
    text = card(tmp_path)
    assert "| masked tokens of held-out text | nats | 2.3457 | 6.1000 (token frequencies) |" in text
    assert "| tokens_seen | 1,024,000 |" in text and "| learning_rate | 0.001 |" in text and "| seed | 0 |" in text
    assert ModelCard(text).data.eval_results[0].metric_value == 2.3457


def test_speed_is_quoted_only_where_it_was_measured(tmp_path):
    figures = tmp_path / "results.json"
    figures.write_text(json.dumps(BENCHMARK))
    text = card(tmp_path, FastBertConfig(), speed=figures)
    assert "on processor Some CPU, torch 2.13.0, commit abc1234." in text
    assert "| 16 layers, 8 x 128 tokens | 2 | float32 | 123.5 | 2.35 times the speed of dense twin 4096 |" in text
    with pytest.raises(ValueError, match="measures models with hidden_size 768; this model has 32"):
        card(tmp_path, speed=figures)
    for fault in ({"busy": True}, {"match": "MISMATCH"}):
        figures.write_text(json.dumps({**BENCHMARK, "rows": [{**BENCHMARK["rows"][0], **fault}]}))
        with pytest.raises(ValueError, match="no figure of a whole model that could be quoted"):
            card(tmp_path, FastBertConfig(), speed=figures)
    with pytest.raises(ValueError, match=r"expected a results.json of scripts/benchmark.py"):
        card(tmp_path, FastBertConfig(), speed=tmp_path / "absent.json")


def test_licence_and_origin_of_the_folder_are_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\nsecret: x\n---\n# old\n")
    assert header(card(tmp_path))["license"] == "apache-2.0" and "secret" not in card(tmp_path)
    assert header(card(tmp_path, declared={"license": "mit"}))["license"] == "mit"
    for broken in ("no header", "---\n[\n---\n", "---\n- a list\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert "license" not in header(card(tmp_path))


def test_a_licence_that_is_given_replaces_name_and_link_too(tmp_path):
    own = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: en\n---\n"
    (tmp_path / "README.md").write_text(own)
    kept = header(card(tmp_path))
    assert (kept["license"], kept["license_name"], kept["license_link"]) == ("other", "own", "LICENSE")
    given = header(card(tmp_path, declared={"license": "mit"}))
    assert (given["license"], given["language"]) == ("mit", "en") and not {"license_name", "license_link"} & set(
        given
    )


@pytest.mark.parametrize(
    ("origin", "shown"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("/home/me/secret/teacher", "teacher"),
        ("../me/teacher/", "teacher"),
        ("~/runs/teacher", "teacher"),
        ("D:\\me\\teacher", "teacher"),
        ("runs/here", "here"),
    ],
)
def test_of_a_local_origin_only_the_name_is_shown(tmp_path, monkeypatch, origin, shown):
    (tmp_path / "runs" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"distilled_from": origin}))
    assert f"| distilled from | {shown} |" in card(tmp_path)
    (tmp_path / "distillation.md").write_text("# What was lost\n")
    assert f"| distilled from | {shown}; [what was lost](distillation.md) |" in card(tmp_path)


def test_the_card_of_a_sentence_embedder_says_so(tmp_path):
    (tmp_path / "modules.json").write_text("[]")
    text = card(tmp_path, name="FastBertModel")
    assert header(text)["pipeline_tag"] == "sentence-similarity" and "sentence-transformers" in header(text)["tags"]
    assert 'SentenceTransformer("somebody/small")' in text and "model.encode(" in text
    (tmp_path / "modules.json").unlink()
    assert "sentence" not in card(tmp_path, name="FastBertModel")


def test_the_template_is_the_one_at_the_top_and_travels_with_the_package(tmp_path):
    assert TEMPLATE.read_text() == (ROOT / "model_card.md").read_text()
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=CHILD_SECONDS)
    built = tmp_path / "fastbert_hf" / "hub" / "model_card.md"
    assert not built.is_symlink() and built.read_text() == TEMPLATE.read_text()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", b'{"task": "mrpc", "f1": "high"}'),
        ("summary.json", b'{"sources": [1]}'),
        ("summary.json", b'{"distilled_from": 5}'),
        ("summary.json", b'{"validation_loss": null}'),
        ("README.md", b"\xff\xfe"),
        ("README.md", b"---\nlicense: " + b"[" * 10_000),
        ("speed.json", b'{"rows": [{}]}'),
        ("speed.json", b'{"rows": 5}'),
    ],
)
def test_a_file_that_holds_something_else_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}' holds something else than expected"):
        card(tmp_path, FastBertConfig(), speed=tmp_path / name if name == "speed.json" else None)


def install_metadata(folder, monkeypatch, *lines):
    """Have an installed package of this name whose metadata holds these lines."""
    information = folder / "packages" / "fastbert_hf-9.9.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    head = ["Metadata-Version: 2.4", "Name: fastbert-hf", "Version: 9.9"]
    (information / "METADATA").write_text("\n".join([*head, *lines]) + "\n")
    monkeypatch.syspath_prepend(str(information.parent))


@pytest.mark.parametrize(
    "lines",
    [
        ["Project-URL: Repository, https://example.org/trees/fastbert"],
        ["Project-URL: Source Code, https://example.org/trees/fastbert/"],
        ["Home-page: https://example.org/trees/fastbert"],
        [
            "Project-URL: Homepage, https://example.org/docs",
            "Project-URL: Source, https://example.org/trees/fastbert",
        ],
    ],
)
def test_the_card_names_the_repository_to_install_from(tmp_path, monkeypatch, lines):
    install_metadata(tmp_path, monkeypatch, *lines)
    text = card(tmp_path)
    assert "```bash\npip install git+https://example.org/trees/fastbert\n```\n\n```python\nimport fastbert_hf" in text
    assert text.count("pip install") == 1 and "PATH/TO/FOLDER" not in text


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Project-URL: Documentation, https://example.org/docs"],
        ["Home-page: UNKNOWN"],
        ["Project-URL: Repository, http://example.org/trees/fastbert"],
        ["Project-URL: Repository, https://user:secret@example.org/trees/fastbert"],
        ["Project-URL: Repository, https://example.org/fastbert; rm -rf ~"],
    ],
)
def test_a_card_without_a_repository_suggests_no_package_of_that_name(tmp_path, monkeypatch, lines):
    install_metadata(tmp_path, monkeypatch, *lines)
    text = card(tmp_path)
    assert re.findall("pip install [^`\\n]*", text) == ["pip install PATH/TO/FOLDER"] and "`setup.cfg`" in text
    assert "secret" not in text and "rm -rf" not in text and "None" not in text


def test_a_package_that_is_not_installed_has_no_repository(monkeypatch):
    monkeypatch.setattr(origin, "DISTRIBUTION", "fastbert-hf-that-nobody-installed")
    assert origin.repository_address() is None


def test_text_and_limits_of_a_pretraining_run_are_stated(tmp_path):
    sources = [{"name": "a.txt", "sha256": "0123456789abcdef" * 4, "license": "cc0-1.0"}, {"name": "b/c"}]
    summary = {**PRETRAINED, "validation_accuracy": 0.4567, "sources": sources}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = card(tmp_path)
    assert "| a.txt | SHA-256 0123456789abcdef | cc0-1.0 |" in text and "| b/c |  | not stated |" in text
    assert "| accuracy | 0.4567 |" in text
    assert "Seen in training: 1,024,000 tokens" in text and "no downstream task" in text
    (tmp_path / "summary.json").write_text(json.dumps(GLUE))
    assert "Not tested" not in card(tmp_path, name="FastBertForSequenceClassification")
