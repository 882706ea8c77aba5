"""What is distilled in these tests."""

import pytest

from tests.training.distillation.runs import SIZES, save_bert


@pytest.fixture(scope="module")
def bert(tiny, tmp_path_factory):
    folder = save_bert(tiny, tmp_path_factory.mktemp("bert"))
    license = "license: other\nlicense_name: own\nlicense_link: https://example.org\n"
    (folder / "README.md").write_text(f"---\n{license}language: en\nbase_model: somebody/base\n---\n# A model\n")
    return folder


@pytest.fixture(scope="module")
def embedder(bert, tmp_path_factory):
    """A model of sentence-transformers with pooling, normalisation, a prompt and a limit of its own."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    modules = [Transformer(str(bert), max_seq_length=20), Pooling(SIZES["hidden_size"], "mean"), Normalize()]
    model = SentenceTransformer(modules=modules, prompts={"query": "the river "}, device="cpu")
    folder = tmp_path_factory.mktemp("embedder") / "model"
    model.save(str(folder))
    return folder
