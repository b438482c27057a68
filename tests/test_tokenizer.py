"""Exact bytes of every id, for a trained, a closed and four real tokenizers."""

import unicodedata

import numpy as np
import pytest
from conftest import TOKENIZERS

from rpt_jax.errors import DataError
from rpt_jax.tokenizer import load_tokenizer, train_byte_level

TEXTS = [
    "Hello  world, it's 3.14!",
    "def f(x):\r\n\treturn {x: 1}\r\n",
    "数学は楽しい。勾配降下法",
    "静夜思 床前明月光,疑是地上霜。",
    "∑_{i=1}^n x_i ≤ ∞ \\frac{a}{b} \\boxed{ 7}",
    "😀👩‍👩‍👧 é e\u0301 \u2028 \u00a0 x",
    "<think> a </think> b",
    "".join(chr(c) for c in np.random.default_rng(0).integers(0x20, 0xD7FF, 200)),
]


@pytest.mark.parametrize("real_tokenizer", TOKENIZERS, indirect=True)
@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_join_to_the_normalised_text(real_tokenizer, text):
    joined = b"".join(real_tokenizer.token_bytes(i) for i in real_tokenizer.encode(text))
    normaliser = real_tokenizer._backend.backend_tokenizer.normalizer
    expected = text if normaliser is None else normaliser.normalize_str(text).replace("\u2581", " ")
    if joined.startswith(b" ") and not expected.startswith(" "):
        expected = " " + expected  # SentencePiece puts a space before the first word; it is part of the first token
    assert joined == expected.encode()
    assert real_tokenizer.decode(real_tokenizer.encode(text)) == expected


@pytest.mark.parametrize("real_tokenizer", ["qwen3"], indirect=True)
def test_qwen_facts(real_tokenizer):
    """Known figures of this vocabulary: NFC text, 151,669 ids, a longest token of 128 bytes, think marks with bytes."""
    table, lengths = real_tokenizer.byte_table()
    assert table.shape == (151_669, 128) and lengths.max() == 128
    assert real_tokenizer.decode(real_tokenizer.encode("e\u0301")) == unicodedata.normalize("NFC", "e\u0301")
    (mark,) = real_tokenizer.encode("</think>")
    assert real_tokenizer.token_bytes(mark) == b"</think>"
    assert real_tokenizer.token_bytes(real_tokenizer.eos_id) == b""
    assert real_tokenizer.bos_id is None
    before, after = real_tokenizer.chat_parts()
    assert before.endswith("user\n") and after.endswith("assistant\n")


@pytest.mark.parametrize("real_tokenizer", TOKENIZERS, indirect=True)
@pytest.mark.parametrize("text", ["}", "</think>\\boxed{", " x", "<think>\n", "数", "\n"])
def test_a_continuation_is_spelt_without_an_added_space(real_tokenizer, text):
    ids = real_tokenizer.encode_continuation(text)
    assert b"".join(real_tokenizer.token_bytes(i) for i in ids) == text.encode()


def test_table_agrees_with_token_bytes(letters):
    table, lengths = letters.byte_table()
    for i in range(letters.vocab_size):
        assert table[i, : lengths[i]].tobytes() == letters.token_bytes(i)
    assert letters.token_bytes(letters.eos_id) == b""
    with pytest.raises(DataError, match="ids 0 to"):
        letters.token_bytes(letters.vocab_size)


def test_trained_byte_level_reads_any_text_and_keeps_the_marks_whole(tmp_path):
    tokenizer = train_byte_level(["the cat sat on the mat " * 50], 300)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("</think>\\boxed{")) == 2
    assert tokenizer.vocab_size <= 300
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_unusable_tokenizers_are_named(tmp_path):
    with pytest.raises(DataError, match="must hold tokenizer.json"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="does not load"):
        load_tokenizer(tmp_path)
