"""WordPiece training, saving and loading."""

import json

import pytest
from transformers import AutoTokenizer

from fastbert_hf.data.tokenizer import load_tokenizer, save_tokenizer, train_wordpiece

TEXT = ["The river flows to the sea.", "A sea of grass, and the wind over it.", "Rivers and winds flow."] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(TEXT, vocab_size=120, model_max_length=16)


def test_special_tokens_have_the_first_ids(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    assert ids == [0, 1, 2, 3, 4]
    assert tokenizer.pad_token_id == 0 and tokenizer.mask_token_id == 4
    assert tokenizer.is_fast


def test_saved_folder_loads_as_auto_tokenizer_and_encodes_alike(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tok")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert len(loaded) == len(tokenizer) <= 120
    assert loaded.model_max_length == 16
    pair = loaded("THE River", "the sea")
    assert dict(pair) == dict(tokenizer("the river", "the sea"))  # lower-cased
    assert loaded.decode(pair["input_ids"]) == "[CLS] the river [SEP] the sea [SEP]"
    assert pair["token_type_ids"] == [0] * 4 + [1] * 3
    assert len(loaded("the sea " * 50, truncation=True)["input_ids"]) == 16


def test_accents_and_unknown_characters(tokenizer):
    assert tokenizer.tokenize("séa") == ["sea"]
    assert tokenizer.tokenize("☃") == ["[UNK]"]


def test_training_twice_gives_the_same_vocabulary(tokenizer):
    assert train_wordpiece(TEXT, vocab_size=120, model_max_length=16).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("documents", [[], ["", "  "]])
def test_empty_corpus_raises(documents):
    with pytest.raises(ValueError, match="corpus is empty"):
        train_wordpiece(documents, vocab_size=100)


def test_too_small_sizes_raise():
    with pytest.raises(ValueError, match="vocab_size"):
        train_wordpiece(TEXT, vocab_size=5)
    with pytest.raises(ValueError, match="model_max_length"):
        train_wordpiece(TEXT, vocab_size=100, model_max_length=2)


def test_missing_and_unusable_tokenizers_are_one_clear_error(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor vocab\.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path / "absent")
    save_tokenizer(tokenizer, tmp_path / "tok")
    config = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    del config["mask_token"]
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path / "tok").mask_token is None
    with pytest.raises(ValueError, match="has no mask_token"):
        load_tokenizer(tmp_path / "tok", needs_mask=True)
