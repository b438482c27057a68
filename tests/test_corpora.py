"""Corpora larger than memory: every reader, the token store, scored parts, selection, mixtures, process shares."""

import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import transformers
from conftest import shared_path

from rpt_jax.config import Config, DataConfig, PositionsConfig
from rpt_jax.data import documents as documents_lib
from rpt_jax.data import positions as positions_lib
from rpt_jax.data import readers
from rpt_jax.data.batches import TrainIterator, make_source
from rpt_jax.data.documents import Document, open_documents, read_store, split_heldout, write_store
from rpt_jax.data.positions import (
    PositionTable,
    Proxy,
    ScoredCorpus,
    Windows,
    add_scores,
    candidate_positions,
    parts_key,
    select_from_corpus,
    top_fraction_threshold,
)
from rpt_jax.data.readers import Corpus, Text, read_records, read_texts, training_corpora
from rpt_jax.data.templates import Template, token_facts
from rpt_jax.errors import ConfigError, DataError, Interrupted
from rpt_jax.scoring import entropy
from rpt_jax.tokenizer import Tokenizer, load_tokenizer, train_byte_level


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_level(["the quick brown fox jumps over the lazy dog. " * 20], 320)


def texts_of(path, template="{text}"):
    return [(t.id, t.text) for t in read_texts(str(path), text_template=template)]


def test_array_records(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for text in ("one", "two\u2028lines"):
        writer.write(json.dumps({"text": text}).encode())
    writer.close()
    assert texts_of(tmp_path / "a.array_record") == [
        ("a.array_record:1", "one"),
        ("a.array_record:2", "two\u2028lines"),
    ]
    (tmp_path / "bad.array_record").write_bytes(b"nonsense" * 100)
    with pytest.raises(DataError, match="bad.array_record is not a readable ArrayRecord"):
        texts_of(tmp_path / "bad.array_record")
    writer = ArrayRecordWriter(str(tmp_path / "raw.array_record"), "group_size:1")
    writer.write(b"\x0a\x05proto")
    writer.close()
    with pytest.raises(DataError, match="raw.array_record line 1"):
        texts_of(tmp_path / "raw.array_record")


def test_ids_are_stable_and_tell_files_of_one_name_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text('{"text": "t"}\n')
    assert [i for i, _ in texts_of(tmp_path / "*" / "x.jsonl")] == ["a/x.jsonl:1", "b/x.jsonl:1"]


def test_long_text_is_read_in_pieces_that_join(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 64)
    text = "".join(f"line {i} 数学 😀\n" for i in range(40)) + "x" * 300 + "数" * 100 + "\r\nend"
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = list(read_texts(str(tmp_path / "a.txt"), text_template="{text}"))
    assert len(pieces) > 10 and "".join(p.text for p in pieces) == text
    assert {p.id for p in pieces} == {"a.txt:1"}
    assert [p.is_continued for p in pieces] == [True] * (len(pieces) - 1) + [False]
    assert pieces[0].text.endswith("\n")
    monkeypatch.setattr(readers, "_DOCUMENT_BYTES", 512)
    again = list(read_texts(str(tmp_path / "a.txt"), text_template="{text}"))
    assert [p.text for p in again] == [p.text for p in pieces]
    ids = list(dict.fromkeys(p.id for p in again))
    assert ids == [f"a.txt:{n}" for n in range(1, len(ids) + 1)] and len(ids) > 3
    for name in ids:
        *first, last = [p for p in again if p.id == name]
        assert all(p.is_continued for p in first) and not last.is_continued
        assert sum(len(p.text.encode()) for p in [*first, last]) <= 512
    (tmp_path / "b.txt").write_bytes(b"a\n" * 100 + b"\xff")
    with pytest.raises(DataError, match="byte 0xff at offset 200 is not UTF-8"):
        texts_of(tmp_path / "b.txt")


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "minimind", "mistral_v1"])
@pytest.mark.parametrize(
    "line", ["line of some text\n", " A line with a space .\n", "  two\n", "\n x\n", "\u2581 odd\n"]
)
def test_pieces_of_a_document_keep_every_byte(tmp_path, monkeypatch, name, line):
    tokenizer = load_tokenizer(shared_path("tokenizers", name))
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 64)
    text = line * 40
    if name == "mistral_v1":
        text = text.replace("\u2581", " ")  # how SentencePiece spells a space
    (tmp_path / "a.txt").write_text(text)
    (document,) = open_documents([Corpus(path=str(tmp_path / "a.txt"), text_template="")], tokenizer, tmp_path)
    assert tokenizer.decode(document.tokens) == (" " if tokenizer.adds_space else "") + text


def test_datasets_library(monkeypatch, tmp_path):
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        if name == "missing":
            raise FileNotFoundError("no such dataset")
        return [{"text": "one"}, {"text": "two"}]

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert texts_of("hf:org/name:main:test") == [("hf:org/name:main:test:1", "one"), ("hf:org/name:main:test:2", "two")]
    texts_of("hf:org/name:test")
    texts_of("hf:org/name")
    assert calls == [
        ("org/name", "main", "test", True), ("org/name", None, "test", True), ("org/name", None, "train", True)
    ]  # fmt: skip
    with pytest.raises(DataError, match="'hf:missing' does not load .no such dataset"):
        texts_of("hf:missing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the `datasets` package"):
        texts_of("hf:org/name")


def test_records_need_fields(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(DataError, match="plain text"):
        list(read_records(str(tmp_path / "a.txt")))
    (tmp_path / "s.jsonl").write_text('{"text": "half \\ud800 pair"}\n')
    with pytest.raises(DataError, match="s.jsonl record 1 contains half of a surrogate pair"):
        texts_of(tmp_path / "s.jsonl")
    (tmp_path / "long.jsonl").write_text('{"text": "' + "a" * 10_000_000 + '"}\n')
    assert len(texts_of(tmp_path / "long.jsonl")[0][1]) == 10_000_000
    (tmp_path / "n.jsonl").write_text('{"text": 1' + "0" * 5000 + "}\n")
    with pytest.raises(DataError, match="n.jsonl line 1 is not JSON"):
        texts_of(tmp_path / "n.jsonl")


@pytest.mark.parametrize("entry", ["math.jsonl", "x=math.jsonl", "0=a", "-1=a", "nan=a", "inf=a", "1="])
def test_bad_mixtures_are_refused(entry):
    with pytest.raises(ConfigError, match="data.mixture contains"):
        training_corpora(DataConfig(mixture=("1=a", entry)))


def test_mixtures_have_templates_of_their_own():
    parts = training_corpora(DataConfig(mixture=("0.25=a.jsonl={q} = {a}", "2=b.txt"), text_template="{t}"))
    assert [(p.weight, p.path, p.text_template) for p in parts] == [(0.25, "a.jsonl", "{q} = {a}"), (2, "b.txt", "{t}")]


def test_a_store_is_used_again_and_damage_is_named(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "the quick"}\n{"text": "brown fox"}\n')
    corpora = [Corpus(path=str(tmp_path / "a.jsonl"), text_template="{text}")]
    first = open_documents(corpora, tokenizer, tmp_path / "cache")
    (store,) = (tmp_path / "cache").iterdir()
    assert [tokenizer.decode(d.tokens) for d in first] == ["the quick", "brown fox"]
    assert [d.id for d in first] == ["a.jsonl:1", "a.jsonl:2"] and first.lengths.tolist() == [
        len(d.tokens) for d in first
    ]

    def fail(*_):
        raise AssertionError("read again")

    again = open_documents(corpora, tokenizer, tmp_path / "cache", progress=fail)
    assert again.fingerprint == first.fingerprint
    view = again.take(np.array([1]))
    assert len(view) == 1 and view[0].id == "a.jsonl:2"
    assert documents_lib.view_fingerprint(view) != documents_lib.view_fingerprint(again)
    # Other contents are another store.
    (tmp_path / "a.jsonl").write_text('{"text": "the quick"}\n{"text": "brown dog"}\n')
    assert open_documents(corpora, tokenizer, tmp_path / "cache").fingerprint != first.fingerprint
    (store / "tokens.i32").write_bytes(b"1234567")
    with pytest.raises(DataError, match=f"{store.name} are damaged .tokens.i32 has 7 bytes"):
        read_store(store)
    (store / "meta.json").write_text("{")
    with pytest.raises(DataError, match="are damaged"):
        read_store(store)


def test_an_interrupted_store_is_made_anew(tmp_path, tokenizer):
    def broken():
        yield 0, Text(id="a", text="the quick")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(broken(), tokenizer, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    write_store([(0, Text(id="a", text="the quick"))], tokenizer, tmp_path / "store")
    assert len(read_store(tmp_path / "store")) == 1


def test_each_part_of_a_mixture_holds_out_its_end(tmp_path, tokenizer):
    texts = [(corpus, Text(id=f"{corpus}/{i}", text="the dog")) for corpus in (0, 1) for i in range(10)]
    write_store(texts, tokenizer, tmp_path / "s")
    train, heldout = split_heldout(read_store(tmp_path / "s"), 0.2, tokenizer)
    assert [d.id for d in heldout] == ["0/8", "0/9", "1/8", "1/9"] and len(train) == 16


# --- Scoring in parts -----------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path, monkeypatch, tiny_config, tiny_params, mesh):
    """Seven documents in parts of about forty tokens."""
    monkeypatch.setattr(positions_lib, "_PART_TOKENS", 40)
    rng = np.random.default_rng(0)
    documents = [
        Document(id=str(n), tokens=rng.integers(0, tiny_config.vocab_size, n).astype(np.int32))
        for n in (30, 5, 18, 60, 9, 25, 31)
    ]
    proxy = Proxy(config=tiny_config, params=tiny_params, mesh=mesh, bos_id=None, batch_trunks=4, renormalize=False)
    return ScoredCorpus(
        documents=documents,
        lengths=np.array([len(d.tokens) for d in documents]),
        facts=token_facts([b"a"] * tiny_config.vocab_size),
        windows=Windows(window=12, stride=6, continuation_tokens=3, min_context_tokens=4),
        proxy=proxy,
        directory=tmp_path / "parts",
        progress=lambda description, items: items,
    )


def test_parts_equal_the_whole_and_are_scored_once(corpus, monkeypatch):
    every = range(len(corpus.documents))
    table = candidate_positions(corpus.documents, every, corpus.facts, corpus.windows, corpus.lengths)
    whole = add_scores(table, corpus.documents, corpus.proxy, corpus.windows)
    assert corpus.num_parts > 3 and not corpus.is_scored
    parts = list(corpus)
    joined = PositionTable.concatenate(parts)
    for name, column in vars(whole).items():
        np.testing.assert_allclose(getattr(joined, name), column, rtol=1e-5, atol=1e-6, err_msg=name)
    assert whole.num_bytes.max() == 3 and whole.num_bytes[-1] == 1  # the last token has nothing behind it
    assert corpus.is_scored and len(list(corpus.directory.iterdir())) == corpus.num_parts
    # An interrupted pass: only the missing part is scored again.
    (corpus.directory / "part-00001.parquet").unlink()
    scored = []
    original = positions_lib.add_scores
    monkeypatch.setattr(positions_lib, "add_scores", lambda *a: scored.append(1) or original(*a))
    again = list(corpus)
    assert len(scored) == 1
    np.testing.assert_array_equal(again[1].entropy, parts[1].entropy)
    (corpus.directory / "part-00002.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(DataError, match="part-00002.parquet are damaged"):
        list(corpus)


def test_an_interrupted_part_goes_on_after_its_last_piece(corpus, monkeypatch):
    """One document of 600 tokens in pieces of one batch, four windows of six tokens; stopped in the eleventh."""
    tokens = np.random.default_rng(1).integers(0, corpus.proxy.config.vocab_size, 600).astype(np.int32)
    corpus = replace(corpus, documents=[Document(id="novel", tokens=tokens)], lengths=np.array([600]))
    monkeypatch.setattr(positions_lib, "_PART_TOKENS", 1000)
    whole = next(iter(replace(corpus, directory=corpus.directory / "whole")))
    monkeypatch.setattr(positions_lib, "_PIECE_TOKENS", 24)
    statistics, calls = positions_lib.direct_statistics, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 11:
            raise Interrupted("stopped by SIGTERM")
        return statistics(*args, **kwargs)

    monkeypatch.setattr(positions_lib, "direct_statistics", interrupted)
    with pytest.raises(Interrupted) as stop:
        corpus.part(0)
    batches = -(-len(np.unique(np.maximum(0, -((12 - whole.index) // 6)))) // 4)
    assert stop.value.__notes__ == [
        f"entropies up to piece 10 of {batches} of part 1 of 1 are kept in {corpus.directory}"
    ]
    resumed = corpus.part(0)
    assert len(calls) == 1 + batches and [f.name for f in corpus.directory.glob("*.*")] == ["part-00000.parquet"]
    for name, column in vars(whole).items():
        np.testing.assert_array_equal(getattr(resumed, name), column, err_msg=name)
    np.testing.assert_array_equal(corpus.part(0).entropy, whole.entropy)


def test_positions_are_bounded_in_tokens(corpus, tmp_path, tokenizer):
    """Of documents of 30, 5 and 18 tokens, the first 40: all of two, 5 of the third, whose continuations go on."""
    lengths = documents_lib.first_tokens(corpus.documents, 40)
    assert lengths.tolist() == [30, 5, 5, 0, 0, 0, 0]
    assert documents_lib.first_tokens(corpus.documents, 0).tolist() == [30, 5, 18, 60, 9, 25, 31]
    table = PositionTable.concatenate(list(replace(corpus, lengths=lengths)))
    every = PositionTable.concatenate(list(replace(corpus, directory=corpus.directory / "all")))
    kept = every.take(every.index < lengths[every.document])
    assert len(table) == 26 + 1 + 1  # at index 4 and later
    for name, column in vars(kept).items():
        np.testing.assert_allclose(getattr(table, name), column, rtol=1e-5, atol=1e-6, err_msg=name)
    assert table.num_bytes[-1] == 3
    texts = [(n % 2, Text(id=str(n), text="the dog " * (1 + n))) for n in range(4)]
    write_store(texts, tokenizer, tmp_path / "s")
    store = read_store(tmp_path / "s")
    a, b, *_ = store.lengths.tolist()
    assert documents_lib.first_tokens(store, 2 * (a + 2)).tolist() == [a, min(b, a + 2), 2, max(0, a + 2 - b)]


def test_what_parts_depend_on_names_them():
    windows = Windows(window=12, stride=6, continuation_tokens=3, min_context_tokens=4)
    base = ("corpus", "tokenizer", "proxy", windows)
    wider = Windows(window=13, stride=6, continuation_tokens=3, min_context_tokens=4)
    others = [(*base[:i], "other", *base[i + 1 :]) for i in range(3)] + [(*base[:3], wider)]
    keys = {parts_key(*b, (False,)) for b in (base, *others)} | {parts_key(*base, (True,))}
    assert len(keys) == 6 and parts_key(*base, (False,)) in keys


def test_the_top_fraction_is_exact(corpus):
    entropy = np.concatenate([part.entropy for part in corpus])
    for fraction in (0.01, 0.2, 0.5, 0.99):
        threshold = top_fraction_threshold(corpus, fraction)
        assert (entropy > threshold).sum() == round(fraction * len(entropy))
    settings = PositionsConfig(selector="entropy_top_fraction", top_fraction=0.3, max_positions_per_window=99)
    selection = select_from_corpus(corpus, settings, seed=0)
    assert len(selection.table) == round(0.3 * len(entropy)) and selection.table.entropy.min() > selection.threshold
    np.testing.assert_array_equal(np.sort(selection.table.entropy), np.sort(entropy)[-len(selection.table) :])


def test_unscored_selectors_run_no_proxy(corpus, monkeypatch):
    monkeypatch.setattr(positions_lib, "add_scores", None)
    unscored = ScoredCorpus(**{**vars(corpus), "proxy": None})
    table = select_from_corpus(unscored, PositionsConfig(selector="random", max_positions_per_window=2), seed=0).table
    assert len(table) > 20 and np.isnan(table.entropy).all() and not corpus.directory.exists()
    again = select_from_corpus(unscored, PositionsConfig(selector="random", max_positions_per_window=2), seed=0).table
    np.testing.assert_array_equal(table.index, again.index)


def test_first_documents_come_from_every_part(tmp_path, tokenizer):
    texts = [
        (corpus, Text(id=f"{corpus}/{i}", text="the dog")) for corpus, n in ((0, 8), (1, 2), (2, 8)) for i in range(n)
    ]
    write_store(texts, tokenizer, tmp_path / "s")
    chosen = documents_lib.first(read_store(tmp_path / "s"), 8)
    assert [d.id for d in chosen] == ["0/0", "0/1", "0/2", "1/0", "1/1", "2/0", "2/1", "2/2"]
    single = [(0, Text(id="a", text="the dog")), *((1, Text(id=str(i), text="the dog")) for i in range(3))]
    write_store(single, tokenizer, tmp_path / "t")
    with pytest.raises(DataError, match="part 1 of data.mixture is one document"):
        split_heldout(read_store(tmp_path / "t"), 0.2, tokenizer)


def test_two_runs_may_make_one_store(tmp_path, tokenizer):
    def texts():
        yield 0, Text(id="a", text="the quick")
        write_store([(0, Text(id="a", text="the quick"))], tokenizer, tmp_path / "s")  # the other run is done first
        yield 0, Text(id="b", text="fox")

    write_store(texts(), tokenizer, tmp_path / "s")
    assert len(read_store(tmp_path / "s")) == 1 and [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("value", [None, True, [1], {"a": 1}])
def test_fields_that_are_no_text_are_refused(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": value}) + "\n")
    with pytest.raises(DataError, match="a.jsonl record 1: .'text'. is"):
        texts_of(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="text_template"):
        texts_of(tmp_path / "a.jsonl", "{text")


def test_a_band_that_few_trunks_meet_is_not_empty():
    iterator, _ = iterate(source_of(100), 100, 0, num_trunks=48, band=(0.4, 0.6))
    for i in range(100):
        iterator._rates._seen[i] = (0.5 if i < 15 else 0.0, 1)
    assert (next(iterator).references.task_ids < 15).all()


def test_a_threshold_above_everything_names_the_highest_entropy(corpus):
    with pytest.raises(DataError, match=r"entropy_threshold=9.0 nats .highest: \d"):
        select_from_corpus(corpus, PositionsConfig(entropy_threshold=9.0), seed=0)


def test_a_proxy_at_chance_is_named_instead_of_the_threshold():
    """32,000 equally likely tokens: 16 of them have an entropy of 16 / 32000 * ln 32000 = 0.005 nats together."""

    class Parts(list):
        documents, windows = [None], types.SimpleNamespace(stride=4, min_context_tokens=1)
        proxy = types.SimpleNamespace(config=types.SimpleNamespace(num_ids=0, vocab_size=32_000))

    def table(logprob):
        columns = {"document": np.int32, "index": np.int32, "num_bytes": np.int32, "direct_token": np.int32}
        zeros = {name: np.zeros(3, kind) for name, kind in columns.items()}
        floats = {"entropy": 0.005, "direct_logprob": logprob}
        return PositionTable(**zeros, **{name: np.full(3, value, np.float32) for name, value in floats.items()})

    with pytest.raises(DataError, match=r"proxy is not trained enough: .* -10.37 nats and chance is -10.37"):
        select_from_corpus(Parts([table(-np.log(32_000))]), PositionsConfig(entropy_threshold=1.5), seed=0)
    with pytest.raises(DataError, match="Lower --positions.entropy-threshold"):
        select_from_corpus(Parts([table(-1.0)]), PositionsConfig(entropy_threshold=1.5), seed=0)


@pytest.mark.parametrize("size", [7, 31, 33, 512, 1000])
def test_top_k_by_blocks_equals_sorting(size):
    x = np.random.default_rng(size).standard_normal((5, size)).astype(np.float32)
    k = min(16, size)
    values, ids = entropy.top_k(x, k)
    np.testing.assert_array_equal(values, -np.sort(-x, axis=1)[:, :k])
    np.testing.assert_array_equal(np.take_along_axis(x, np.asarray(ids), axis=1), values)


# --- Iterating ------------------------------------------------------------------------------------------------------


def source_of(num_documents, length=10):
    documents = [Document(id=str(d), tokens=np.arange(length, dtype=np.int32)) for d in range(num_documents)]
    n = num_documents
    table = PositionTable(
        document=np.arange(n, dtype=np.int32), index=np.full(n, 5, np.int32), num_bytes=np.full(n, 2, np.int32),
        entropy=np.zeros(n, np.float32), direct_token=np.zeros(n, np.int32), direct_logprob=np.zeros(n, np.float32),
    )  # fmt: skip
    template = Template(header=np.zeros(0, np.int32), tail=np.array([1], np.int32))
    return make_source(documents, table, template, [b"a"] * 20, trunk_length=8, stride=4, continuation_tokens=2)


def iterate(source, count, batches, **options):
    options = dict(num_trunks=4, prompts_per_trunk=1, group_size=2, seed=0) | options
    iterator = TrainIterator(source, np.arange(count), **options)
    return iterator, [next(iterator) for _ in range(batches)]


def test_shares_of_processes_make_the_global_batch():
    source = source_of(10)
    _, whole = iterate(source, 10, 5)
    shares = [iterate(source, 10, 5, rows=range(2 * p, 2 * p + 2))[1] for p in (0, 1)]
    for batch, first, second in zip(whole, *shares, strict=True):
        for name in ("row_ids", "trunk_tokens", "cuts"):
            joined = np.concatenate([getattr(first.prompts, name), getattr(second.prompts, name)])
            np.testing.assert_array_equal(joined, getattr(batch.prompts, name))


def test_a_run_of_two_processes_resumes_with_one():
    source = source_of(10)
    two, _ = iterate(source, 10, 3, rows=[2, 3])
    one, _ = iterate(source, 10, 0)
    one.set_state(json.loads(json.dumps(two.get_state())))
    _, straight = iterate(source, 10, 5)
    np.testing.assert_array_equal(next(one).references.task_ids, straight[3].references.task_ids)


def test_mixtures_are_drawn_by_weight():
    source = source_of(30)
    corpora = np.array([0] * 10 + [1] * 20)
    _, batches = iterate(source, 30, 60, corpora=corpora, weights=(3.0, 1.0))
    ids = np.concatenate([b.references.task_ids.ravel() for b in batches])
    assert (ids < 10).mean() == pytest.approx(0.75, abs=0.01)
    # Each part goes through epochs of its own: after 180 draws all ten were seen 18 times.
    assert (np.bincount(ids[ids < 10]) == 18).all()
    with pytest.raises(DataError, match="part 2 of data.mixture has no task"):
        iterate(source, 30, 1, corpora=np.zeros(30, int), weights=(1.0, 1.0))


def test_pass_rates_outside_the_band_are_passed_over_and_survive_a_resume():
    source, rates = source_of(6), {0: 0.0, 1: 1.0, 2: 0.5, 3: 0.5, 4: 0.0, 5: 1.0}
    options = dict(num_trunks=2, band=(0.25, 0.75))

    def step(iterator):
        batch = next(iterator)
        rewards = np.array([[[rates[int(i)] > 0.6, rates[int(i)] > 0.1]] for i in batch.references.task_ids[:, 0]])
        iterator.observe(batch.references, rewards.astype(np.float32))
        return batch.references.task_ids.ravel().tolist()

    iterator, _ = iterate(source, 6, 0, **options)
    drawn = [i for _ in range(12) for i in step(iterator)]
    assert sorted(drawn[:6]) == list(range(6)) and set(drawn[6:]) == {2, 3}
    assert iterator.position[1] > 0
    resumed, _ = iterate(source, 6, 0, **options)
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    assert [step(resumed) for _ in range(4)] == [step(iterator) for _ in range(4)]
    rates |= {2: 0.0, 3: 1.0}
    with pytest.raises(DataError, match="nothing is left to learn from"):
        for _ in range(20):
            step(iterator)


@pytest.mark.parametrize("band", [(0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.9, 0.1)])
def test_bad_bands_are_refused(band):
    with pytest.raises(ConfigError, match="pass_rate_band"):
        Config(positions=PositionsConfig(pass_rate_band=band)).validate()


def test_a_tokenizer_that_drops_bytes_of_a_document_is_refused():
    """Words split at white space, which is lost: the probe holds words that the vocabulary lacks, the document none."""
    words = ["<eos>", "<unk>", "<think>", "</think>", "the", "cat", "sat"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<eos>", "<unk>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    tokenizer = Tokenizer(fast, where="words")
    tokenizer.check_bytes()
    text = Text(id="d7", text="the cat  sat", labels=(), is_continued=False)
    with pytest.raises(DataError, match="document d7 is encoded to tokens with the bytes b'thecatsat'"):
        documents_lib._checked(text, tokenizer.encode(text.text), tokenizer)
