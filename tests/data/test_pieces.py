"""Long documents in pieces: the tokens are those of the whole."""

import types

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from fastbert_hf.data import packing, pieces
from fastbert_hf.data.cleaning import clean_document
from fastbert_hf.data.deduplication import SeenDocuments
from fastbert_hf.data.pieces import cut_for, single_spaces
from fastbert_hf.data.tokenizer import train_wordpiece

SENTENCE = (
    "the river, flows under\u00a0a stone bridge;  and the wind's song\nis over caf\u00e9s \u6cb3\u6d41 (twice) in "
    "[MASK] 1,024"
)
TEXT = " ".join([SENTENCE] * 60)


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of about 200 characters."""
    monkeypatch.setattr(pieces.pieces, "__defaults__", (pieces.pieces.__defaults__[0], 200))


def byte_pairs(normalizer=None, pre_tokenizer=None, alphabet=()):
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    special = ["[UNK]", "[SEP]", "[MASK]"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return tokenizer


TOKENIZERS = {
    "BERT": lambda: train_wordpiece([TEXT], vocab_size=200).backend_tokenizer,
    "bytes": lambda: byte_pairs(
        None, pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet()
    ),
    "bytes with a space in front": lambda: byte_pairs(None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "metaspace": lambda: byte_pairs(normalizers.NFKC(), pre_tokenizers.Metaspace()),
    "metaspace once": lambda: byte_pairs(None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "space in front by the normalizer": lambda: byte_pairs(
        normalizers.Sequence(
            [normalizers.Strip(), normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        ),
        pre_tokenizers.Split("\u2581", "merged_with_next"),
    ),
}


class Recorder:
    """A backend that keeps what it is asked to encode in batches."""

    def __init__(self, backend):
        self.backend, self.asked = backend, []

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode_batch_fast(self, texts, **options):
        self.asked.append(texts)
        return self.backend.encode_batch_fast(texts, **options)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_long_document_has_the_tokens_of_the_whole(kind, short_pieces):
    backend = Recorder(TOKENIZERS[kind]())
    tokenizer = types.SimpleNamespace(backend_tokenizer=backend, sep_token_id=1)
    documents = ["first", TEXT, "   ", "last one"]
    tokens = np.concatenate(list(packing.tokenize_documents(documents, tokenizer)))
    expected = [backend.encode(text, add_special_tokens=False).ids for text in documents]
    assert tokens.tolist() == [token for ids in expected if ids for token in [*ids, 1]]
    assert max(len(text) for texts in backend.asked for text in texts) <= 260


def test_a_tokenizer_that_no_cut_suits_gets_the_document_whole(short_pieces):
    backend = byte_pairs(None, pre_tokenizers.Split("e", "isolated"))
    backend.model = models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")  # one token for all between two e
    text = " ".join(["and"] * 200)
    assert list(pieces.pieces(text, cut_for(backend))) == [text]
    assert list(pieces.pieces("x" * 1000, cut_for(backend))) == ["x" * 1000]


def test_at_most_so_much_text_is_encoded_at_once(monkeypatch):
    monkeypatch.setattr(packing, "CHARACTERS_PER_CALL", 1500)
    monkeypatch.setattr(pieces.pieces, "__defaults__", (pieces.pieces.__defaults__[0], 200))
    backend = Recorder(TOKENIZERS["BERT"]())
    tokenizer = types.SimpleNamespace(backend_tokenizer=backend, sep_token_id=1)
    list(packing.tokenize_documents([TEXT] * 3, tokenizer))
    assert max(sum(map(len, texts)) for texts in backend.asked) <= 1500 + 260


def test_a_tokenizer_saved_with_a_length_cuts_no_document():
    backend = TOKENIZERS["BERT"]()
    expected = backend.encode(TEXT, add_special_tokens=False).ids
    backend.enable_truncation(8)
    backend.enable_padding(length=16)
    tokenizer = types.SimpleNamespace(backend_tokenizer=backend, sep_token_id=1)
    assert np.concatenate(list(packing.tokenize_documents([TEXT], tokenizer))).tolist() == [*expected, 1]
    assert backend.truncation is not None and backend.padding is not None


def test_pieces_change_neither_spaces_nor_digests_nor_the_vocabulary(tmp_path, monkeypatch):
    text = f"  {TEXT}\t\u2003 {TEXT} \n"
    spaced, cleaned = " ".join(text.split()), clean_document(text)
    vocabulary = train_wordpiece([text], vocab_size=200).get_vocab()
    monkeypatch.setattr(pieces.pieces, "__defaults__", (pieces.pieces.__defaults__[0], 200))
    assert single_spaces(text) == spaced and clean_document(text) == cleaned
    assert [single_spaces(short) for short in ("", "  ", " a ", "a  b")] == ["", "", "a", "a b"]
    assert train_wordpiece([text], vocab_size=200).get_vocab() == vocabulary
    seen = SeenDocuments(tmp_path / "seen.sqlite")
    assert seen.add(text) and not seen.add(spaced.upper())
    seen.close()
