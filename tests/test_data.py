"""Documents, prompts, positions and batches: every index by hand or by a slow definition."""

import dataclasses
import json
from dataclasses import replace

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rpt_jax.config import Config, DataConfig, PositionsConfig, QuestionsConfig
from rpt_jax.data import readers
from rpt_jax.data.batches import TrainIterator, make_source
from rpt_jax.data.documents import (
    Document,
    check_lengths,
    lengths_of,
    open_documents,
    read_store,
    split_heldout,
    view_fingerprint,
    write_store,
)
from rpt_jax.data.positions import (
    PositionTable,
    Proxy,
    ScoredCorpus,
    Windows,
    add_scores,
    candidate_positions,
    direct_statistics,
    select_from_corpus,
    select_positions,
    window_start,
)
from rpt_jax.data.readers import Corpus, Text, read_texts
from rpt_jax.data.templates import (
    Template,
    candidate_mask,
    continuation,
    make_template,
    token_facts,
    with_prompt_texts,
)
from rpt_jax.errors import ConfigError, DataError
from rpt_jax.models import decoder
from rpt_jax.tokenizer import train_byte_level


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_reads_txt_jsonl_parquet_and_globs(tmp_path):
    write(tmp_path / "a.txt", "one\ntwo")
    write(
        tmp_path / "b.jsonl",
        '{"q": "x\u2028y", "a": 1}\n\n{"q": "z", "a": 2, "labels": 3, "position_labels": [[1, "n"]]}\n',
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p", "q"]}), tmp_path / "c.parquet")
    assert [t.text for t in read_texts(str(tmp_path / "a.txt"), text_template="{text}")] == ["one\ntwo"]
    rows = list(read_texts(str(tmp_path / "b.jsonl"), text_template="{q}\n\n{a}"))
    assert [t.text for t in rows] == ["x\u2028y\n\n1", "z\n\n2"]
    escaped = list(read_texts(str(tmp_path / "b.jsonl"), text_template="{q}\\n{a}"))
    assert escaped[1].text == "z\n2"
    assert rows[1].labels == ((1, "n"),) and rows[1].id == "b.jsonl:3"
    assert [t.text for t in read_texts(str(tmp_path / "*.parquet"), text_template="{text}")] == ["p", "q"]


BAD_CORPORA = {
    "missing file": (None, "matches no file"),
    "empty.txt": (b"", "contains no text"),
    "blank.jsonl": (b'{"text": "  "}\n', "contains no text"),
    "latin.txt": (b"caf\xe9", "byte 0xe9 at offset 3 is not UTF-8"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "\xc3"}\n', "line 2: byte 0xc3"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "list.jsonl": (b"[1]\n", "line 1 is a list"),
    "field.jsonl": (b'{"body": "a"}\n', "needs 'text'"),
    "null.jsonl": (b'{"text": null}\n', "null"),
    "labels.jsonl": (b'{"text": "a", "position_labels": 3}\n', "must be a list of"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is not JSON"),
    "not.parquet": (b"PAR?", "not a readable parquet"),
    "words.doc": (b"a", "'.doc'"),
}


@pytest.mark.parametrize("name", BAD_CORPORA)
def test_bad_corpora_are_refused_with_file_and_line(tmp_path, name):
    data, message = BAD_CORPORA[name]
    path = tmp_path / name
    if data is not None:
        write(path, data)
    with pytest.raises(DataError, match=message):
        list(read_texts(str(path), text_template="{text}"))


def store(texts, tokenizer, directory):
    write_store([(0, t) for t in texts], tokenizer, directory)
    return read_store(directory)


def test_labels_move_to_token_indices(letters, tmp_path):
    (document,) = store([Text(id="d", text="ab cd", labels=((3, "x"),))], letters, tmp_path / "a")
    assert document.labels == ((3, "x"),) and document.id == "d" and letters.decode(document.tokens) == "ab cd"
    with pytest.raises(DataError, match="outside the tokenizer's vocabulary"):
        store([Text(id="d", text="ab 数 cd")], letters, tmp_path / "b")
    with pytest.raises(DataError, match="not the start of a token"):
        store([Text(id="d", text="\\boxed{}", labels=((2, "x"),))], letters, tmp_path / "c")


def test_heldout_split_takes_the_end(tmp_path):
    tokenizer = train_byte_level(["one line"], 300)
    texts = store([Text(id=str(i), text="t") for i in range(10)], tokenizer, tmp_path / "a")
    train, heldout = split_heldout(texts, 0.2, tokenizer)
    assert [t.id for t in heldout] == ["8", "9"] and len(train) == 8
    whole = "1\n2\n3\n4\n"
    (train,), (heldout,) = split_heldout(store([Text(id="f", text=whole)], tokenizer, tmp_path / "b"), 0.25, tokenizer)
    assert tokenizer.decode(train.tokens) == "1\n2\n3\n" and tokenizer.decode(heldout.tokens) == "4\n"
    with pytest.raises(DataError, match="cannot be held out"):
        split_heldout(store([Text(id="f", text="one line")], tokenizer, tmp_path / "c"), 0.1, tokenizer)


def test_short_documents_are_counted_and_refused_when_nothing_is_left():
    documents = [Document(id=str(n), tokens=np.zeros(n, np.int32)) for n in (3, 5, 9)]
    assert check_lengths(documents, 5, "training") == 2
    with pytest.raises(DataError, match="longest: 9"):
        check_lengths(documents, 9, "training")
    with pytest.raises(DataError, match="first max_tokens=5 tokens of the held-out documents are too few"):
        check_lengths(documents, 5, "held-out", 5)


def test_fingerprint_sees_every_token():
    a = [Document(id="a", tokens=np.array([1, 2], np.int32))]
    b = [Document(id="a", tokens=np.array([1, 3], np.int32))]
    assert view_fingerprint(a) != view_fingerprint(b) and view_fingerprint(a) == view_fingerprint(list(a))


PIECES = [b"", b" the", b" cat", b"\xc3", b"\xa9", b"s", b"\xf0\x9f", b"\x98\x80"]


def test_continuation_has_the_corpus_own_boundaries():
    document = Document(id="d", tokens=np.array([5, 1, 2, 0, 5]))
    assert continuation(document, 1, PIECES, 8) == (b" the cats", [4, 8, 9])
    assert continuation(document, 1, PIECES, 2) == (b" the cat", [4, 8])


def test_candidates_by_definition():
    """Against the rule spelt out: whole characters before and at the target's end, a target with bytes."""
    rng = np.random.default_rng(0)

    def whole(data: bytes) -> bool:
        try:
            data.decode()
        except UnicodeDecodeError:
            return False
        return True

    checked = 0
    for _ in range(200):
        # Valid UTF-8: pairs are kept in order.
        tokens = [t for unit in rng.integers(0, 5, 12) for t in ([1], [2], [3, 4], [6, 7], [0])[unit]]
        document = Document(id="d", tokens=np.array(tokens))
        got = candidate_mask(document.tokens, token_facts(PIECES), min_context_tokens=2, num_tokens=1)
        for i in range(len(tokens)):
            before = b"".join(PIECES[t] for t in tokens[:i])
            expected = i >= 2 and whole(before) and len(PIECES[tokens[i]]) > 0 and whole(before + PIECES[tokens[i]])
            assert got[i] == expected
            checked += expected
    assert checked > 500


def test_targets_that_no_box_can_hold_are_no_positions():
    pieces = [b"", b"x", b"}", b"{", b"{}", b"a}{", b"{a}}", b"{{}"]
    tokens = np.arange(1, 8)
    asked = {"min_context_tokens": 0, "num_tokens": 4}
    # A box ends where its braces balance: what closes one that it has not opened cannot stand in it.
    assert candidate_mask(tokens, token_facts(pieces), **asked).tolist() == [
        True,
        False,
        True,
        True,
        False,
        False,
        True,
    ]
    tail = token_facts(pieces, boxed_mode="balanced_then_tail")
    assert candidate_mask(tokens, tail, **asked).all()


def test_windows_give_a_position_most_context():
    for index in range(60):
        start = window_start(index, window=16, stride=5)
        options = [s for s in range(0, 80, 5) if s <= index and index - s <= 16]
        assert start == min(options)


def test_templates_are_split_around_the_context(letters):
    minimal = make_template(letters, DataConfig(template="minimal", trunk_length=8, window_stride=4))
    assert len(minimal.header) == 0 and letters.decode(minimal.tail) == "<think>"
    tokenizer = train_byte_level(["some text about nothing in particular"], 320)
    for name in ("v0", "v6"):
        template = make_template(tokenizer, DataConfig(template=name, trunk_length=2048))
        header, tail = tokenizer.decode(template.header), tokenizer.decode(template.tail)
        assert "\\boxed{}" in header and "### Context" in header and tail.endswith("<think>\n")
    assert "candidates" in tail and "```````" in tail
    own = make_template(tokenizer, DataConfig(template="Read {this}.\n{context}\nNext?\n", trunk_length=2048))
    assert tokenizer.decode(own.header) == "Read {this}.\n" and tokenizer.decode(own.tail) == "\nNext?\n<think>\n"
    with pytest.raises(ConfigError, match="trunk_length=64"):
        make_template(tokenizer, DataConfig(template="v6", trunk_length=64))
    with pytest.raises(DataError, match="no chat template"):
        make_template(tokenizer, DataConfig(chat=True))


def test_a_prompt_may_be_a_file(tmp_path):
    path = tmp_path / "prompt.txt"

    def texts(content: bytes):
        path.write_bytes(content)
        named = Config(data=DataConfig(template=str(path)), questions=QuestionsConfig(template="Q: {question}"))
        config = with_prompt_texts(named)
        return config.data.template, config.questions.template

    assert texts(b"Text: {context}\n\n") == ("Text: {context}\n", "Q: {question}")
    for content, message in (
        (b"no place", "holds {context} 0 times"),
        (b"{context} {context}", "holds {context} 2 times"),
        (b"\xff{context}", "is not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=message):
            texts(content)
    path.unlink()
    with pytest.raises(ConfigError, match=r"must be minimal, v0, v6, or a text file.*Correct --data.template"):
        with_prompt_texts(Config(data=DataConfig(template=str(path))))
    with pytest.raises(ConfigError, match=r"must be boxed, none, or a text file.*--questions.template"):
        with_prompt_texts(Config(questions=QuestionsConfig(template="box")))


@pytest.mark.parametrize("real_tokenizer", ["qwen3"], indirect=True)
def test_chat_template_wraps_the_prompt(real_tokenizer):
    config = DataConfig(template="v6", chat=True, trunk_length=2048)
    template = make_template(real_tokenizer, config)
    pieces = real_tokenizer._backend.convert_ids_to_tokens(template.header.tolist())
    assert pieces[0] == "<|im_start|>" and pieces[1] == "user"
    tail = real_tokenizer._backend.convert_ids_to_tokens(template.tail.tolist())
    assert "<|im_end|>" in tail and tail.index("assistant") < tail.index("<think>")


def test_a_tokenizer_that_cannot_write_the_marks_is_refused():
    from rpt_jax.tokenizer import word_level

    with pytest.raises(ConfigError, match="cannot|spells"):
        make_template(word_level(["a", "b"]), DataConfig(template="minimal"))


def table_of(rows):
    document, index, entropy = zip(*rows, strict=True)
    n = len(rows)
    return PositionTable(
        document=np.array(document), index=np.array(index), entropy=np.array(entropy, np.float32),
        direct_token=np.zeros(n, int), direct_logprob=np.zeros(n), num_bytes=np.full(n, 5),
    )  # fmt: skip


def small_source(**options):
    documents = [
        Document(id="a", tokens=np.array([5, 1, 2, 5, 1, 2, 5, 1, 2, 5])),
        Document(id="b", tokens=np.array([1, 2, 5, 5])),
    ]
    table = table_of([(0, 3, 0.1), (0, 5, 2.0), (0, 9, 1.0), (1, 2, 3.0)])
    template = Template(header=np.array([7], np.int32), tail=np.array([6, 4], np.int32))
    options = dict(trunk_length=6, stride=3, continuation_tokens=2) | options
    return make_source(documents, table, template, PIECES, **options)


def test_tasks_by_hand():
    source = small_source()
    # Window of 5 document tokens behind the header; position 9 needs a window that starts at 6 (9 - 5 = 4 -> 6).
    assert list(source.group(range(4), 2)) == [[0, 1], [2], [3]]
    assert list(source.group(range(4), 1)) == [[0], [1], [2], [3]]
    batch = source.make([[0, 1], [2], []], prompts_per_trunk=2, group_size=3)
    np.testing.assert_array_equal(batch.prompts.trunk_tokens[0], [7, 5, 1, 2, 5, 1])
    np.testing.assert_array_equal(batch.prompts.trunk_tokens[1], [7, 5, 1, 2, 5, 0])
    assert batch.prompts.cuts.tolist() == [[4, 6], [4, 1], [1, 1]]
    assert batch.prompts.trunk_lengths.tolist() == [6, 5, 1]
    assert batch.prompts.prompt_mask.tolist() == [[True, True], [True, False], [False, False]]
    assert batch.references.tokens[0, :, 0].tolist() == [5, 2]
    assert batch.references.bytes[0, 1, :5].tobytes() == b" cats"
    assert np.flatnonzero(batch.references.boundary_mask[0, 1]).tolist() == [3, 4]
    assert batch.prompts.row_ids[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    np.testing.assert_array_equal(batch.prompts.tail_tokens[0, 0], [6, 4])
    assert source.num_bytes == 8


def test_a_stride_that_leaves_gaps_is_refused(letters):
    with pytest.raises(ConfigError, match="window_stride=9 is longer than the 8 document tokens"):
        make_template(letters, DataConfig(template="minimal", trunk_length=8, window_stride=9))


def test_a_trunk_twice_in_a_batch_has_noise_of_its_own():
    source = small_source()
    batch = source.make([[0, 1], [2], [0, 1]], prompts_per_trunk=2, group_size=3)
    real = batch.prompts.row_ids[batch.prompts.prompt_mask]
    assert len(np.unique(real)) == real.size
    np.testing.assert_array_equal(batch.references.task_ids[0], batch.references.task_ids[2])


def test_iterator_resumes_exactly_and_reshuffles(monkeypatch):
    source = small_source()

    def make():
        return TrainIterator(source, range(4), num_trunks=2, prompts_per_trunk=1, group_size=2, seed=3)

    straight, first = make(), make()
    batches = [next(straight).references.task_ids.tolist() for _ in range(7)]
    assert [next(first).references.task_ids.tolist() for _ in range(3)] == batches[:3]
    resumed = make()
    resumed.set_state(json.loads(json.dumps(first.get_state())))
    assert [next(resumed).references.task_ids.tolist() for _ in range(4)] == batches[3:]
    epochs = [sorted(i for b in batches[e : e + 2] for (i,) in b) for e in (0, 2, 4)]
    assert epochs == [[0, 1, 2, 3]] * 3
    assert batches[0:2] != batches[2:4] or batches[2:4] != batches[4:6]


@pytest.mark.parametrize(("renormalize", "num_ids"), [(False, 0), (True, 0), (False, 40)])
def test_direct_statistics_by_definition(tiny_config, tiny_params, renormalize, num_ids):
    size = num_ids or tiny_config.vocab_size
    tokens = np.random.default_rng(0).integers(0, size, (2, 9)).astype(np.int32)
    config = dataclasses.replace(tiny_config, num_ids=num_ids)
    entropy, argmax, logprob = direct_statistics(config, tiny_params, tokens, renormalize=renormalize)
    probs = np.asarray(jax.nn.softmax(decoder.logits(tiny_config, tiny_params, tokens)[..., :size]), np.float64)
    for u in range(2):
        for t in range(1, 9):
            p = np.sort(probs[u, t - 1])[::-1][:16]
            if renormalize:
                p = p / p.sum()
            np.testing.assert_allclose(entropy[u, t], -(p * np.log(p)).sum(), rtol=1e-4)
            assert argmax[u, t] == probs[u, t - 1].argmax()
            np.testing.assert_allclose(logprob[u, t], np.log(probs[u, t - 1, tokens[u, t]]), rtol=1e-4, atol=1e-5)


def test_positions_of_long_documents_are_scored_in_their_own_window(tiny_config, tiny_params, mesh, tmp_path):
    rng = np.random.default_rng(1)
    pieces = [b"a"] * tiny_config.vocab_size
    documents = [Document(id="d", tokens=rng.integers(0, tiny_config.vocab_size, n).astype(np.int32)) for n in (30, 5)]
    proxy = Proxy(config=tiny_config, params=tiny_params, mesh=mesh, bos_id=2, batch_trunks=3, renormalize=False)
    windows = Windows(window=12, stride=6, continuation_tokens=2, min_context_tokens=4)
    table = add_scores(
        candidate_positions(documents, range(2), token_facts(pieces), windows, lengths_of(documents)),
        documents,
        proxy,
        windows,
    )
    assert len(table) == 26 + 1
    for document, index in ((0, 4), (0, 12), (0, 13), (0, 29), (1, 4)):
        row = np.flatnonzero((table.document == document) & (table.index == index))[0]
        start = window_start(index, window=12, stride=6)
        context = np.array([[2, *documents[document].tokens[start:index]]])
        logprobs = np.asarray(jax.nn.log_softmax(decoder.logits(tiny_config, tiny_params, context)))[0, -1]
        np.testing.assert_allclose(table.direct_logprob[row], logprobs[documents[document].tokens[index]], atol=1e-4)
    short = ScoredCorpus(
        documents=documents[1:], lengths=np.array([5]), facts=token_facts(pieces), proxy=proxy, directory=tmp_path,
        windows=replace(windows, min_context_tokens=5), progress=lambda description, items: items,
    )  # fmt: skip
    with pytest.raises(DataError, match="none of the 1 documents"):
        select_from_corpus(short, PositionsConfig(), seed=0)


def test_selection():
    table = table_of([(d, i, 0.1 * i) for d in range(3) for i in range(20)])

    def select(**options):
        settings = PositionsConfig(**options)
        return select_positions(table, settings, threshold=1.45, stride=10, seed=0)

    kept = select(max_positions_per_window=3)
    # Tokens 15 to 19 of each document pass, all in its second window of ten: three of them are kept.
    assert len(kept) == 9 and (table.entropy[kept] > 1.45).all()
    mixed = select(max_positions_per_window=3, unfiltered_fraction=0.25)
    # 9 kept + 9 / 3 others: a quarter of the whole.
    assert len(mixed) == 12 and set(kept) < set(mixed) and len(set(mixed)) == 12
    assert len(select(selector="random", max_positions_per_window=99)) == 60
    assert len(select(selector="random", max_positions_per_window=4)) == 3 * 2 * 4
    assert len(select(selector="pass_rate_band", max_positions_per_window=4)) == 3 * 2 * 4


def test_paragraphs_of_a_text_file_may_be_documents(tmp_path, monkeypatch):
    """Blank lines with spaces, at the ends, and across the reader's blocks; a document for each paragraph."""
    text = "\n\none\ntwo\n \t\nthree\n\n\n\nfour\r\n\r\nfive"
    (tmp_path / "a.txt").write_bytes(text.encode())
    for size in (2**20, 9, 5):
        monkeypatch.setattr(readers, "_BLOCK_BYTES", size)
        found = list(read_texts(str(tmp_path / "a.txt"), text_template="{text}", split="paragraphs"))
        assert [t.text.strip() for t in found] == ["one\ntwo", "three", "four", "five"], size
        assert [t.id for t in found] == [f"a.txt:{n}" for n in (1, 2, 3, 4)]
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 2**20)
    assert readers.count_paragraphs(str(tmp_path / "a.txt")) == 4
    (whole,) = read_texts(str(tmp_path / "a.txt"), text_template="{text}")
    assert whole.text == text
    (tmp_path / "b.jsonl").write_text('{"text": "one\\n\\ntwo"}\n')
    (record,) = read_texts(str(tmp_path / "b.jsonl"), text_template="{text}", split="paragraphs")
    assert record.text == "one\n\ntwo"


def test_stores_of_files_and_of_paragraphs_are_apart(tmp_path, letters):
    (tmp_path / "a.txt").write_text("ab cd")
    corpus = Corpus(path=str(tmp_path / "a.txt"), text_template="{text}")
    apart = Corpus(path=str(tmp_path / "a.txt"), text_template="{text}", split="paragraphs")
    stores = [open_documents([c], letters, tmp_path / "cache") for c in (corpus, apart)]
    assert len(list((tmp_path / "cache").glob("documents-*"))) == 2 and len(stores[0]) == len(stores[1]) == 1
    # Without the file, each is found again.
    (tmp_path / "a.txt").unlink()
    for c, store in zip((corpus, apart), stores):
        assert open_documents([c], letters, tmp_path / "cache").fingerprint == store.fingerprint
    with pytest.raises(DataError, match="matches no file"):
        open_documents([corpus], letters, tmp_path / "other")
