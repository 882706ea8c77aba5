"""Teachers: weights of 16 bits, and what belongs to a sentence embedder."""

import json
import shutil

import pytest
import torch
from transformers import AutoModel

from fastbert_hf.benchmarks.distilled import original_encoder, speed_rows
from fastbert_hf.training.distillation.run import _load_text
from fastbert_hf.training.distillation.scores import _embeddings
from fastbert_hf.training.distillation.settings import DistillationArguments
from fastbert_hf.training.distillation.teacher import copy_embedder, load_teacher
from tests.training.distillation.runs import distill


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_stored_in_16_bits_is_distilled_in_float32(tiny, bert, dtype, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "bert")
    AutoModel.from_pretrained(bert).to(dtype).save_pretrained(folder)
    teacher = load_teacher(str(folder))
    assert teacher.model.dtype == original_encoder(teacher).dtype == torch.float32
    assert AutoModel.from_pretrained(folder).dtype == dtype
    distill(folder, tiny / "corpus.txt", tmp_path / "out", max_steps=1)
    student = AutoModel.from_pretrained(tmp_path / "out")
    assert student.dtype == torch.float32
    assert [row["case"] for row in speed_rows(student, teacher)] == ["1 x 16"]


def test_the_longest_text_is_at_most_what_the_positions_hold(embedder, tmp_path):
    folder = shutil.copytree(embedder, tmp_path / "model")
    assert load_teacher(str(folder)).max_seq_length == 20
    file = folder / "sentence_bert_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_seq_length": 10_000}))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 10_000}))
    assert load_teacher(str(folder)).max_seq_length == 32


def test_settings_of_an_older_embedder_are_copied(embedder, tmp_path):
    from sentence_transformers import SentenceTransformer

    folder, target = shutil.copytree(embedder, tmp_path / "model"), tmp_path / "copy"
    (folder / "sentence_bert_config.json").rename(folder / "sentence_roberta_config.json")
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*sentence*", "modules.json", "[12]_*"))
    copy_embedder(folder, target)
    assert SentenceTransformer(str(target), device="cpu").max_seq_length == 20


@pytest.fixture(scope="module")
def prompted(bert, tmp_path_factory):
    """An embedder that puts a prompt before every text, and leaves it out of its mean."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    modules = [Transformer(str(bert), max_seq_length=20), Pooling(16, "mean", include_prompt=False)]
    prompts = {"passage": "under grass ", "query": "the sea "}
    folder = tmp_path_factory.mktemp("prompted") / "model"
    SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name="passage", device="cpu").save(
        str(folder)
    )
    return folder


def test_the_default_prompt_stands_before_every_text(tiny, prompted):
    from sentence_transformers import SentenceTransformer

    teacher = load_teacher(str(prompted))
    assert teacher.prompt == "under grass "
    texts = ["the river flows", "a stone sings"]
    expected = SentenceTransformer(str(prompted), device="cpu").encode(texts, convert_to_tensor=True)
    with torch.no_grad():
        torch.testing.assert_close(_embeddings(teacher.model, teacher, texts, 20), expected)
    options = DistillationArguments(str(prompted), [str(tiny / "corpus.txt")], batch_size=8)
    begin = teacher.tokenizer(teacher.prompt)["input_ids"][:-1]
    for batches in _load_text(options, teacher, seed=0):
        assert all(row[: len(begin)] == begin for row in batches[0]["input_ids"].tolist())


def test_an_embedder_without_default_prompt_has_none(embedder):
    assert load_teacher(str(embedder)).prompt == ""


def test_a_run_does_not_go_on_with_another_pooling(tiny, embedder, tmp_path):
    folder = shutil.copytree(embedder, tmp_path / "model")
    distill(folder, tiny / "corpus.txt", tmp_path / "out", max_steps=1)
    file = folder / "1_Pooling" / "config.json"
    file.write_text(file.read_text().replace('"mean"', '"cls"'))
    with pytest.raises(ValueError, match="was made by another run: embedder is"):
        distill(folder, tiny / "corpus.txt", tmp_path / "out", max_steps=1)


@pytest.mark.parametrize("path", ["../elsewhere", "ABSOLUTE", 3])
def test_modules_outside_the_folder_are_refused(embedder, path, tmp_path):
    folder = shutil.copytree(embedder, tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = str(tmp_path / "elsewhere") if path == "ABSOLUTE" else path
    (folder / "modules.json").write_text(json.dumps(modules))
    for call in (lambda: load_teacher(str(folder)), lambda: copy_embedder(folder, tmp_path / "copy")):
        with pytest.raises(ValueError, match=r"names the folder .*; expected one inside"):
            call()


def test_modules_that_need_more_than_hidden_states_are_named(embedder, tmp_path):
    folder = shutil.copytree(embedder, tmp_path / "model")
    shutil.rmtree(folder / "1_Pooling")
    with pytest.raises(ValueError, match=r"the modules of .* cannot be used"):
        load_teacher(str(folder))
    (folder / "modules.json").write_text("[]")
    with pytest.raises(ValueError, match="names no module"):
        load_teacher(str(folder))
    (folder / "modules.json").write_text("{")
    with pytest.raises(ValueError, match=r"modules\.json' cannot be read"):
        load_teacher(str(folder))
