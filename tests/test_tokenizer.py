"""Exact bytes of every id, for a trained, a closed and four real tokenizers."""

import base64
import json
import re
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tokenizers
from conftest import TOKENIZERS, shared_path

from rpt_jax.errors import DataError
from rpt_jax.tokenizer import load_tokenizer, train_byte_level
from rpt_jax.tokenizer.splitters import SPLITTERS

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
    """Known facts of this vocabulary: NFC text, 151,669 ids, a longest token of 128 bytes, think marks with bytes."""
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
    # A character's bytes are four tokens here; the last one shows it. Broken characters are as in `decode`.
    assert tokenizer.pieces(tokenizer.encode("a\U0001f600b")) == ["a", "", "", "", "\U0001f600", "b"]
    for seed in range(50):
        ids = np.random.default_rng(seed).integers(0, tokenizer.vocab_size, 30).tolist()
        assert len(tokenizer.pieces(ids)) == 30 and "".join(tokenizer.pieces(ids)) == tokenizer.decode(ids)
    assert tokenizer.vocab_size <= 300
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_unusable_tokenizers_are_named(tmp_path):
    with pytest.raises(DataError, match="must contain tokenizer.json"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="does not load"):
        load_tokenizer(tmp_path)


# --- Formats other than tokenizer.json ------------------------------------------------------------------------------

PROSE = "The quick brown fox jumps over the lazy dog; it's 3.14 times as tall (or 1,000 mm).\n" * 60


def write_sentencepiece(directory, **options):
    directory.mkdir(exist_ok=True)
    (directory / "text.txt").write_text(PROSE)
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text.txt"), model_prefix=str(directory / "tokenizer"), minloglevel=2, **options
    )
    (directory / "text.txt").unlink()
    (directory / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))


@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_files_encode_as_their_library_does(tmp_path, model_type, normalization, dummy_prefix):
    reference = write_sentencepiece(
        tmp_path, model_type=model_type, vocab_size=330, byte_fallback=True, normalization_rule_name=normalization,
        add_dummy_prefix=dummy_prefix, remove_extra_whitespaces=normalization != "identity",
        hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path)
    for text in [*TEXTS, PROSE[:300], " leading", "a"]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), text
        if normalization == "identity":
            assert tokenizer.decode(ids) == " " * (dummy_prefix and bool(text)) + text
    assert tokenizer.adds_space == dummy_prefix
    assert tokenizer.bos_id == reference.bos_id() and tokenizer.eos_id == reference.eos_id()


def test_sentencepiece_without_fallback_refuses_only_what_it_cannot_spell(tmp_path):
    write_sentencepiece(tmp_path, model_type="unigram", vocab_size=44, normalization_rule_name="identity")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.unk_id in tokenizer.encode("数学") and tokenizer.unk_id not in tokenizer.encode("the fox")


def write_tiktoken(path, tokenizer):
    """Write the vocabulary of a byte-level tokenizer as a tiktoken file; return its number of tokens."""
    added = tokenizer._backend.added_tokens_decoder
    ids = [i for i in range(tokenizer.vocab_size) if i not in added]
    first = ids[0]  # a trained tokenizer starts with its special token; ranks start at 0
    lines = (f"{base64.b64encode(tokenizer.token_bytes(i)).decode()} {i - first}\n" for i in ids)
    path.write_text("".join(lines))
    return len(ids)


def write_added(directory, entries):
    """Write added_tokens_decoder from {id: token, or (token, special)}."""
    pairs = {i: e if isinstance(e, tuple) else (e, True) for i, e in entries.items()}
    decoder = {str(i): {"content": text, "special": special} for i, (text, special) in pairs.items()}
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))


def test_tiktoken_files(tmp_path):
    trained = train_byte_level([PROSE], 400)
    for name in ("tokenizer.model", "llama3.tiktoken"):
        directory = tmp_path / name.partition(".")[0]
        directory.mkdir()
        size = write_tiktoken(directory / name, trained)
        write_added(directory, {size: "<|endoftext|>"})
        tokenizer = load_tokenizer(directory, "llama3" if name == "tokenizer.model" else "")
        assert tokenizer.vocab_size == size + 1 and tokenizer.eos_id == size
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
        assert len(tokenizer.encode(PROSE)) < len(PROSE) / 2
    write_added(directory, {size: "<|endoftext|>", size + 2: ("<think>", False)})
    tokenizer = load_tokenizer(directory)
    assert tokenizer.vocab_size == size + 3 and tokenizer.encode("<think>") == [size + 2]
    assert tokenizer.token_bytes(size) == b"" and tokenizer.token_bytes(size + 2) == b"<think>"
    write_added(directory, {3: "<early>", size: "<|endoftext|>"})
    with pytest.raises(DataError, match="'<early>' should have id 3"):
        load_tokenizer(directory)


@pytest.mark.parametrize("real_tokenizer", ["qwen3", "gpt2"], indirect=True)
def test_tiktoken_files_of_real_vocabularies_encode_alike(real_tokenizer, tmp_path, request):
    name = request.node.callspec.params["real_tokenizer"]
    added = real_tokenizer._backend.added_tokens_decoder
    lines = []
    for i in range(real_tokenizer.vocab_size):
        if i not in added:
            lines.append(f"{base64.b64encode(real_tokenizer.token_bytes(i)).decode()} {i}\n")
    (tmp_path / f"{name}.tiktoken").write_text("".join(lines))
    if name == "qwen3":
        (tmp_path / "tokenizer_config.json").write_bytes(
            shared_path("tokenizers", "qwen3", "tokenizer_config.json").read_bytes()
        )
    tokenizer = load_tokenizer(tmp_path)
    for text in [t for t in TEXTS if unicodedata.is_normalized("NFC", t)]:
        assert tokenizer.encode(text) == real_tokenizer.encode(text)
    if name == "qwen3":
        assert tokenizer.vocab_size == real_tokenizer.vocab_size
        assert tokenizer.encode("<|im_end|>", specials=True) == real_tokenizer.encode("<|im_end|>", specials=True)


# Tokens of this text, cut by tiktoken's own patterns (r50k_base, cl100k_base, o200k_base), Qwen's and Llama 3's.
SPLIT = "I'LL pay12345 XMLHttp's a\n\n b/ \n "
CUTS = {
    "gpt2": ["I", "'", "LL", " pay", "12345", " XMLHttp", "'s", " a", "\n\n", " b", "/", " \n "],
    "cl100k": ["I", "'LL", " pay", "123", "45", " XMLHttp", "'s", " a", "\n\n", " b", "/", " \n "],
    "o200k": ["I'LL", " pay", "123", "45", " XMLHttp's", " a", "\n\n", " b", "/", " \n", " "],
    "qwen": ["I", "'LL", " pay", "1", "2", "3", "4", "5", " XMLHttp", "'s", " a", "\n\n", " b", "/", " \n", " "],
    "llama3": ["I", "'LL", " pay", "123", "45", " XMLHttp", "'s", " a", "\n\n", " b", "/", " \n", " "],
}


@pytest.mark.parametrize("family", CUTS)
def test_each_family_splits_text_its_own_way(family, tmp_path):
    pattern = tokenizers.Regex(SPLITTERS[family].pattern)
    assert [t for t, _ in tokenizers.pre_tokenizers.Split(pattern, "isolated").pre_tokenize_str(SPLIT)] == CUTS[family]
    # One token for every piece of the text: merged only if it is cut this way.
    pieces = {p.encode() for p in CUTS[family]}
    entries = [bytes([b]) for b in range(256)] + sorted(pieces - {bytes([b]) for b in range(256)})
    lines = [f"{base64.b64encode(e).decode()} {i}\n" for i, e in enumerate(entries)]
    (tmp_path / f"{family}_base.tiktoken").write_text("".join(lines))
    write_added(tmp_path, {len(entries): "<|endoftext|>"})
    ids = load_tokenizer(tmp_path).encode(SPLIT)
    assert [entries[i].decode() for i in ids] == CUTS[family]


def test_unknown_splitters_and_special_tokens_are_asked_for(tmp_path):
    size = write_tiktoken(tmp_path / "my.tiktoken", train_byte_level([PROSE], 400))
    write_added(tmp_path, {size: "<|endoftext|>"})
    with pytest.raises(DataError, match=r"my.tiktoken.*--data.tokenizer-pattern"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="neither one of gpt2, .* nor a regular expression"):
        load_tokenizer(tmp_path, "(")
    one_by_one = load_tokenizer(tmp_path, r"\s|\S")
    assert len(one_by_one.encode("the fox")) == 7 and len(load_tokenizer(tmp_path, "gpt2").encode("the fox")) < 7
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer"}))
    with pytest.raises(DataError, match=f"{size} tokens, and no file tells the special tokens"):
        load_tokenizer(tmp_path)


def test_special_tokens_of_a_whole_family_are_known(tmp_path):
    """cl100k_base.tiktoken has 100,256 tokens, and its special ones stand at the ids that tiktoken gives them."""
    entries = [bytes([b]) for b in range(256)]
    # Entries without merges: no part of one is another.
    entries += [b"\xff" + i.to_bytes(3, "big") + b"\xfe" * 2 for i in range(100_000)]
    lines = [f"{base64.b64encode(e).decode()} {i}\n" for i, e in enumerate(entries)]
    (tmp_path / "cl100k_base.tiktoken").write_text("".join(lines))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 100257 and tokenizer.encode("<|endofprompt|>", specials=True) == [100276]


def test_vocab_json_is_split_as_its_class_says(tmp_path):
    """GPT-2's files are split its way; a class of another family splits digits; an unknown class is refused."""
    write_bare(tmp_path / "a")
    config = {"added_tokens_decoder": {}}
    counts = {}
    for kind in (None, "GPT2Tokenizer", "Qwen2Tokenizer"):
        (tmp_path / "a" / "tokenizer_config.json").write_text(
            json.dumps(config | ({"tokenizer_class": kind} if kind else {}))
        )
        splitter = load_tokenizer(tmp_path / "a")._backend.backend_tokenizer.pre_tokenizer
        counts[kind] = len(splitter.pre_tokenize_str("a1234"))
    assert counts == {None: 2, "GPT2Tokenizer": 2, "Qwen2Tokenizer": 5}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MyTokenizer"}))
    with pytest.raises(DataError, match="names: MyTokenizer"):
        load_tokenizer(tmp_path / "a")


def test_a_pattern_without_effect_is_refused(tmp_path):
    train_byte_level([PROSE], 400).save(tmp_path)
    with pytest.raises(DataError, match="data.tokenizer_pattern='gpt2' has no effect"):
        load_tokenizer(tmp_path, "gpt2")


def test_unigram_control_pieces_in_a_text_are_named(tmp_path):
    write_sentencepiece(tmp_path, model_type="unigram", vocab_size=330, byte_fallback=True, hard_vocab_limit=False)
    tokenizer = load_tokenizer(tmp_path)
    for piece in ("</s>", "<s>", "<0x41>"):
        assert tokenizer.unspeakable(f"html {piece} tags") == piece
    assert tokenizer.unspeakable("html < s> tags") is None


def test_sentencepiece_keeps_its_first_token_through_a_save(tmp_path):
    write_sentencepiece(tmp_path / "a", model_type="bpe", vocab_size=330, byte_fallback=True)
    tokenizer = load_tokenizer(tmp_path / "a")
    tokenizer.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert again.bos_id == tokenizer.bos_id is not None and again.fingerprint == tokenizer.fingerprint


def test_fingerprints_see_how_text_is_split_and_normalised(tmp_path):
    trained = train_byte_level([PROSE], 400)
    prints = {trained.fingerprint}
    for name in ("normalizer", "merges"):
        trained.save(tmp_path / name)
        path = tmp_path / name / "tokenizer.json"
        description = json.loads(path.read_text())
        if name == "normalizer":
            description["normalizer"] = {"type": "Lowercase"}
        else:
            description["model"]["merges"] = description["model"]["merges"][::-1]
        path.write_text(json.dumps(description))
        prints.add(load_tokenizer(tmp_path / name).fingerprint)
    assert len(prints) == 3


def test_the_config_next_to_a_bare_vocabulary_is_read(tmp_path):
    trained = train_byte_level([PROSE], 400)
    size = write_tiktoken(tmp_path / "a.tiktoken", trained)
    entries = {str(size + i): {"content": c} for i, c in enumerate(("<|end_of_text|>", "<|eot_id|>"))}
    config = {
        "added_tokens_decoder": entries,
        "eos_token": {"content": "<|eot_id|>"},
        "chat_template": "{{ messages[0].content }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path, "gpt2")
    assert tokenizer.eos_id == size + 1 and tokenizer.chat_parts() == ("", "")


def damaged(directory, name, data):
    directory.mkdir(exist_ok=True)
    (directory / name).write_bytes(data)
    return directory


BAD_TOKENIZERS = {
    "empty json": ("tokenizer.json", b"", "does not load"),
    "json of something else": ("tokenizer.json", b'{"a": 1}', "does not load"),
    "binary json": ("tokenizer.json", b"\x00\xff", "does not load"),
    "empty SentencePiece": ("tokenizer.model", b"", "tokenizer"),
    "damaged SentencePiece": ("tokenizer.model", b"\n\x0cnonsense" * 30, "does not load"),
    "tiktoken line": ("gpt2.tiktoken", b"IQ== 0\n???\n", "gpt2.tiktoken line 2"),
    "tiktoken ranks": ("gpt2.tiktoken", b"IQ== 0\nIg== 5\n", "ranks are not 0 to 1"),
    "vocab without merges": ("vocab.json", b"{}", "must contain tokenizer.json"),
}


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_damaged_tokenizers_are_refused_by_name(name, tmp_path):
    file, data, message = BAD_TOKENIZERS[name]
    with pytest.raises(DataError, match=message) as error:
        load_tokenizer(damaged(tmp_path / "t", file, data))
    assert str(tmp_path) in str(error.value)


def test_vocabularies_that_lose_bytes_are_refused(tmp_path):
    # Gaps between ids are fine, lost spaces are not.
    letters = {c: i + 4 for i, c in enumerate(sorted(set("It's 3.14{x}\n\tnaïve数学😀")))}
    vocab = {"[UNK]": 0, "<eos>": 1} | letters | {f"##{c}": i + 50 for c, i in letters.items()}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="is WordPiece, which drops spaces"):
        load_tokenizer(tmp_path)


# --- What files next to a vocabulary say ----------------------------------------------------------------------------


def write_bare(directory, **files):
    """Write vocab.json, merges.txt and JSON files next to them; return the size of the vocabulary."""
    directory.mkdir(exist_ok=True)
    trained = train_byte_level([PROSE], 400)._backend.backend_tokenizer
    description = json.loads(trained.to_str())["model"]
    vocab = {entry: i for i, entry in enumerate(description["vocab"])}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in description["merges"])]
    (directory / "merges.txt").write_text("\n".join(merges) + "\n")
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return len(vocab)


@pytest.mark.parametrize("style", ["added_tokens_decoder", "added_tokens"])
def test_named_special_tokens_get_the_ids_that_the_files_state(tmp_path, style):
    size = write_bare(tmp_path)
    named = {"<|im_end|>": size, "<think>": size + 1, "</think>": size + 2}
    config = {"eos_token": "<|im_end|>"}
    if style == "added_tokens":
        (tmp_path / "added_tokens.json").write_text(json.dumps(named))
    else:
        config["added_tokens_decoder"] = {
            str(i): {"content": content, "special": content == "<|im_end|>"} for content, i in named.items()
        }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == size and tokenizer.vocab_size == size + 3
    assert tokenizer.encode("<think>") == [size + 1] and tokenizer.encode("</think>") == [size + 2]
    assert tokenizer.encode("<|im_end|>", specials=True) == [size] and tokenizer.token_bytes(size) == b""
    assert len(tokenizer.encode("<|im_end|>")) > 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, "eos_token is '<|im_end|>', which the vocabulary lacks"),
        ({"added_tokens": {"<eos>": 0, "<|im_end|>": 999}}, "'<|im_end|>' should have id 999"),
        ({"tokenizer_config": {"added_tokens_decoder": {"3": {"content": "<a>"}}}}, "'<a>' should have id 3"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<a>"}}}}, "added tokens do not parse"),
        ({"tokenizer_config": {"added_tokens_decoder": {"3": "<a>"}}}, "added tokens do not parse"),
        ({"tokenizer_config": ["a"]}, "tokenizer_config.json is a JSON list"),
        ({"special_tokens_map": {"eos_token": "<|no|>"}}, "eos_token is '<|no|>', which the vocabulary lacks"),
        ({"tokenizer_config": {"add_bos_token": True}}, "has add_bos_token and no bos_token"),
    ],
)
def test_names_that_the_vocabulary_lacks_are_refused(tmp_path, files, message):
    write_bare(tmp_path, **files)
    with pytest.raises(DataError, match=re.escape(message)):
        load_tokenizer(tmp_path)


def test_the_pipeline_is_that_of_the_file(tmp_path):
    """A class that config files name may split digits and normalise; the file does neither."""
    trained = train_byte_level([PROSE + "12 12 12 " * 40], 420)
    trained.save(tmp_path)
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "Qwen2Tokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer = load_tokenizer(tmp_path)
    for text in [*TEXTS, "12 e\u0301 12", "a  b\tc\n\n", "if x == 12:\n    return 12"]:
        assert tokenizer.encode(text) == raw.encode(text, add_special_tokens=False).ids
    assert len(tokenizer.encode("12 12")) <= 3
    # An export holds the source's files as they are.
    tokenizer.save(tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert load_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(("adds_bos", "expected"), [(True, "<s>"), (False, None), (None, "<s>")])
def test_the_configuration_decides_on_the_first_token(tmp_path, adds_bos, expected):
    write_sentencepiece(tmp_path, model_type="bpe", vocab_size=330, byte_fallback=True)
    if adds_bos is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": adds_bos}))
    tokenizer = load_tokenizer(tmp_path)
    assert (None if tokenizer.bos_id is None else tokenizer.entry(tokenizer.bos_id)) == expected
    # A byte-level vocabulary without a post-processor, as of DeepSeek-R1's distilled models.
    size = write_bare(tmp_path / "bare")
    config = {"bos_token": "<eos>", "eos_token": "</s>", "added_tokens_decoder": {str(size): {"content": "</s>"}}}
    config |= {} if adds_bos is None else {"add_bos_token": adds_bos}
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path / "bare").bos_id == (0 if adds_bos else None)


def test_chat_templates_in_files_and_named_lists(tmp_path):
    def parts(**files):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        write_sentencepiece(directory, model_type="bpe", vocab_size=330, byte_fallback=True)
        for name, value in files.items():
            path = directory / name.replace("__", ".")
            path.write_text(value if isinstance(value, str) else json.dumps(value))
        return load_tokenizer(directory).chat_parts()

    turn = "{{ messages[0].content }}"
    assert parts(chat_template__jinja=f"<a>{turn}</a>") == ("<a>", "</a>")
    assert parts(chat_template__json={"chat_template": f"<b>{turn}"}) == ("<b>", "")
    named = [{"name": "tool_use", "template": f"<t>{turn}"}, {"name": "default", "template": f"<d>{turn}"}]
    assert parts(tokenizer_config__json={"chat_template": named}) == ("<d>", "")
    assert parts(tokenizer_config__json={"chat_template": f"<c>{turn}"}, chat_template__jinja=turn) == ("", "")


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("gpt2", {"eos_token": "<|endoftext|>"}),
        ("mistral_v1", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    ],
)
def test_an_export_of_a_bare_vocabulary_names_its_class_and_tokens(tmp_path, name, tokens):
    """Else transformers 5 reads it with the splitter of the model's family."""
    load_tokenizer(shared_path("tokenizers", name)).save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
