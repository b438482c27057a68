"""Answer extraction and rewards against their plain-Python oracles, and on worked examples."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import TOKENIZERS
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.config import RewardConfig
from rpt_jax.errors import ConfigError
from rpt_jax.models import decoder
from rpt_jax.rewards import controls
from rpt_jax.rewards.answer import answer_tables, extract_predictions
from rpt_jax.rewards.base import earn
from rpt_jax.rewards.catalog import make_reward
from rpt_jax.rewards.likelihood import coherence, self_evaluation
from rpt_jax.rewards.prefix import DIRECT_PREDICTION, first_token_reward, prefix_match_reward
from rpt_jax.scoring.requests import Request, Scorer, Scores
from rpt_jax.scoring.vocabulary import longest_prefix_tokens, vocabulary_index
from rpt_jax.sequences import Task, build_tasks
from rpt_jax.types import Earned, Evidence, Rollouts, TaskBatch

MODES = ("balanced", "tail", "balanced_then_tail")

# Whole marks and all kinds of fragments, braces, partial characters, special (zero-byte) tokens.
PIECES = [
    b"", b"</think>", b"</", b"think", b">", b"<", b"/think>", b"</thin", b"k>", b"\\boxed{", b"\\", b"boxed", b"{",
    b"boxed{", b"\\box", b"ed{", b"}", b"}}", b"}{", b"{}", b"{ ", b" }", b"a", b" a", b"b", b" ", b"\n", b"\\n", b"n",
    b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98\x80", "é".encode(), b"x}y", b"</think>\\boxed{", b"</think>\\boxed{a} b",
    b"\\boxed{\\boxed{", b"<think>", b".</think>\n\n", b"long piece of twenty", b"\\boxed{b}",
    b"\\{", b"\\}", b"\\\\", b"\\boxed", b" {", b"          ", b"\\left\\{", b"\\boxed ", b"a\\", b"}\\",
]  # fmt: skip


def table_of(pieces):
    """Return the bytes u8 [V, longest] and lengths i32 [V] of tokens."""
    lengths = np.array([len(p) for p in pieces], np.int32)
    table = np.zeros((len(pieces), max(1, lengths.max())), np.uint8)
    for i, piece in enumerate(pieces):
        table[i, : len(piece)] = np.frombuffer(piece, np.uint8)
    return table, lengths


def rows_of(predictions):
    """Return each prediction as bytes, or None if there is none."""
    data, lengths, found = (np.asarray(a) for a in (predictions.bytes, predictions.lengths, predictions.found))
    return [data[b, : lengths[b]].tobytes() if found[b] else None for b in range(len(found))]


def pack_truth(continuations, width):
    """Return the bytes u8 [B, width] of continuations, and bool [B, width], true at the last byte of each token."""
    data = np.random.default_rng(0).integers(0, 256, (len(continuations), width)).astype(np.uint8)  # arbitrary padding
    boundary = np.zeros((len(continuations), width), bool)
    for b, tokens in enumerate(continuations):
        text = b"".join(tokens)
        data[b, : len(text)] = np.frombuffer(text, np.uint8)
        ends = np.cumsum([len(t) for t in tokens]) if tokens else []
        boundary[b, [e - 1 for e in ends if e]] = True
    return data, boundary


def likely_continuation(rng, text: bytes, answer: bytes | None, pieces) -> list[bytes]:
    """Sample tokens that usually start with the answer, split at random places and sometimes corrupted."""
    tail = [pieces[i] for i in rng.integers(0, len(pieces), rng.integers(0, 4))]
    if not answer or rng.random() < 0.3:
        return tail[:4] or [b"a"]
    answer = answer[:30]
    if rng.random() < 0.2:
        answer = answer[:-1] + bytes([answer[-1] ^ 1])
    cuts = sorted(set(rng.integers(1, len(answer) + 1, rng.integers(0, 4)).tolist()) | {len(answer)})
    if rng.random() < 0.2:
        cuts = [*cuts[:-1], len(answer)] if len(cuts) > 1 else cuts
        tail = [b"", *tail]
    return [answer[a:b] for a, b in zip([0, *cuts], cuts)] + tail


def completion_rows(rng, count, width, vocab, weights):
    """Sample token ids i32 [count, width] and a mask bool [count, width] of random lengths."""
    tokens = rng.choice(vocab, (count, width), p=weights).astype(np.int32)
    return tokens, np.arange(width) < rng.integers(0, width + 1, count)[:, None]


def check_against_oracles(rng, pieces, table, lengths, tables, tokens, mask, mode, require):
    """Check extraction and both rewards of every row against the oracles; return the number of rewarded rows."""
    texts = [b"".join(pieces[i] for i in row[keep]) for row, keep in zip(tokens, mask)]
    expected = [oracles.extract(t, mode, require) for t in texts]
    predictions = extract_predictions(
        tokens, mask, table, lengths, mode=mode, require_think_end=require, max_prediction_bytes=96, tables=tables
    )
    got_lengths, data, found = (np.asarray(a) for a in (predictions.lengths, predictions.bytes, predictions.found))
    for b, answer in enumerate(expected):
        assert found[b] == (answer is not None), (texts[b], mode)
        if answer is not None:
            assert got_lengths[b] == len(answer) and data[b, : len(answer)].tobytes() == answer[:96], (texts[b], mode)
    continuations = [likely_continuation(rng, t, e, pieces) for t, e in zip(texts, expected)]
    truth = pack_truth(continuations, 160)
    rewards = np.asarray(prefix_match_reward(predictions.bytes, predictions.lengths, *truth))
    wanted = [oracles.prefix_reward(e, c) for e, c in zip(expected, continuations)]
    np.testing.assert_array_equal(rewards, wanted)
    first = np.asarray(first_token_reward(predictions.bytes, predictions.lengths, *truth))
    np.testing.assert_array_equal(first, [oracles.first_token_reward(e, c) for e, c in zip(expected, continuations)])
    return int(sum(wanted))


@pytest.mark.parametrize(
    "rounds", [6, pytest.param(48, marks=pytest.mark.slow)], ids=["an eighth of a million", "a million"]
)
def test_adversarial_completions_equal_the_oracles(rounds):
    rng = np.random.default_rng(0)
    table, lengths = table_of(PIECES)
    tables = answer_tables(table, lengths)
    weights = np.full(len(PIECES), 1.0)
    for i, piece in enumerate(PIECES):
        if b"boxed{" in piece or b"</think>" in piece:
            weights[i] = 3.0
    weights /= weights.sum()
    rewarded = total = 0
    for number in range(rounds):
        mode, require = MODES[number % 3], number % 4 != 3
        tokens, mask = completion_rows(rng, 21_000, 14, len(PIECES), weights)
        rewarded += check_against_oracles(rng, PIECES, table, lengths, tables, tokens, mask, mode, require)
        total += len(tokens)
    assert total >= rounds * 20_000
    assert rewarded > total / 20  # enough rows of the sweep must be rewarded


@pytest.mark.parametrize("real_tokenizer", TOKENIZERS, indirect=True)
def test_extraction_with_real_tokenizers(real_tokenizer):
    """Completions encoded by real tokenizers; half of them get a random token inserted."""
    rng = np.random.default_rng(1)
    tokenizer = real_tokenizer
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    table, lengths = tokenizer.byte_table()
    tables = answer_tables(table, lengths)
    parts = [
        "<think>",
        "</think>",
        "\\boxed{",
        "}",
        "{",
        " the",
        "é",
        "😀",
        "数",
        "\n",
        "\\frac{1}{2}",
        " x",
        "}}",
        "}{",
    ]
    rows = []
    for _ in range(3000):
        text = "".join(rng.choice(parts, rng.integers(1, 12)))
        ids = tokenizer.encode(text)
        if rng.random() < 0.5:
            ids.insert(int(rng.integers(0, len(ids) + 1)), int(rng.integers(0, tokenizer.vocab_size)))
        rows.append(ids[:32])
    tokens = np.zeros((len(rows), 32), np.int32)
    mask = np.zeros((len(rows), 32), bool)
    for b, ids in enumerate(rows):
        tokens[b, : len(ids)], mask[b, : len(ids)] = ids, True
    rewarded = sum(
        check_against_oracles(rng, pieces, table, lengths, tables, tokens, mask, mode, require)
        for mode in MODES
        for require in (True, False)
    )
    assert rewarded > 500


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, len(PIECES) - 1), max_size=10), min_size=8, max_size=8),
    mode=st.sampled_from(MODES),
    require=st.booleans(),
)
def test_hypothesis_searches_for_a_difference(rows, mode, require):
    table, lengths = table_of(PIECES)
    tokens, mask = np.zeros((8, 10), np.int32), np.zeros((8, 10), bool)
    for b, row in enumerate(rows):
        tokens[b, : len(row)], mask[b, : len(row)] = row, True
    predictions = extract_predictions(tokens, mask, table, lengths, mode=mode, require_think_end=require)
    texts = [b"".join(PIECES[i] for i in row) for row in rows]
    assert rows_of(predictions) == [oracles.extract(t, mode, require) for t in texts]


@pytest.mark.parametrize(
    ("tokens", "prediction", "reward"),
    [
        ([b" the", b" cat", b"s"], b" the", 1),
        ([b" the", b" cat", b"s"], b"the", 0),
        ([b" the", b" cat", b"s"], b" the ", 0),
        ([b" the", b" cat", b"s"], b" the cat", 1),
        ([b" the", b" cat", b"s"], b" the ca", 0),
        ([b" the", b" cat", b"s"], b" the cats", 1),
        ([b" the", b" cat", b"s"], b" the cats!", 0),
        ([b" the", b" cat", b"s"], b"", 0),
        ([b"\xc3", b"\xa9", b" x"], "é".encode(), 1),
        ([b"\xc3", b"\xa9", b" x"], "é x".encode(), 1),
        ([b"\xc3", b"\xa9", b" x"], "Ã".encode(), 0),
        ([b"\xf0\x9f", b"\x98", b"\x80"], "😀".encode(), 1),
        ([b"}", b"{"], b"}", 1),
        ([b""], b"", 0),
        ([b""], b"a", 0),
        ([b"\n", b"\n"], b"\n", 1),
        ([b"\n", b"\n"], b"\\n", 0),
        ([b"a", b"", b"b"], b"a", 1),
        ([b"", b"a"], b"", 0),
    ],
)
def test_prefix_reward_vectors(tokens, prediction, reward):
    data = np.frombuffer(prediction.ljust(12, b"?"), np.uint8)[None]
    truth = pack_truth([tokens], 12)
    assert float(prefix_match_reward(data, np.array([len(prediction)]), *truth)[0]) == reward
    assert oracles.prefix_reward(prediction, tokens) == reward


@pytest.mark.parametrize("widths", [(4, 12), (12, 4), (3, 3)])
def test_prediction_and_continuation_widths_are_independent(widths):
    X, Y = widths
    truth = pack_truth([[b"ab", b"c"]], Y)
    for prediction, reward in ((b"ab", 1), (b"abc", 1), (b"a", 0)):
        data = np.frombuffer(prediction.ljust(X, b"z"), np.uint8)[None]
        assert float(prefix_match_reward(data, np.array([len(prediction)]), *truth)[0]) == reward
    # Longer than the window: its last byte is unknown, so it does not match even if the known bytes agree.
    data = np.frombuffer(b"abc".ljust(X, b"z")[:X], np.uint8)[None]
    assert float(prefix_match_reward(data, np.array([X + 1]), *truth)[0]) == 0


def test_reward_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match="must share B"):
        prefix_match_reward(
            np.zeros((2, 4), np.uint8), np.zeros(2, int), np.zeros((3, 4), np.uint8), np.zeros((3, 4), bool)
        )


def extract_text(text: str, mode="balanced", **options):
    """Return the prediction in `text`, tokenized into single bytes, or None."""
    pieces = [bytes([b]) for b in range(256)]
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)[None]
    return rows_of(extract_predictions(tokens, np.ones(tokens.shape, bool), *table_of(pieces), mode=mode, **options))[0]


def test_box_that_needs_a_brace():
    assert extract_text("</think>\\boxed{}}") == b""
    assert extract_text("</think>\\boxed{}}", "tail") == b"}"
    assert extract_text("</think>\\boxed{}}", "balanced_then_tail") == b"}"
    assert extract_text("</think>\\boxed{ \\frac{}") is None
    assert extract_text("</think>\\boxed{ \\frac{}", "balanced_then_tail") == b" \\frac{"


@pytest.mark.parametrize("mode", MODES)
def test_escaped_braces_are_text_and_a_command_may_stand_apart_from_its_brace(mode):
    assert extract_text("</think>\\boxed{\\left\\{ 1, 2 \\right.}", mode) == b"\\left\\{ 1, 2 \\right."
    assert extract_text("</think>\\boxed{\\{1\\}}", mode) == b"\\{1\\}"
    assert extract_text("</think>\\boxed {5}", mode) == b"5"
    assert extract_text("</think>\\boxed   { 5 }", mode) == b" 5 "
    # Two backslashes are a line break, and the brace after it counts.
    assert extract_text("</think>\\boxed{1 \\\\}", mode) == b"1 \\\\"
    assert extract_text("</think>\\boxed{1\\}", mode) is None


def test_think_end_rules():
    assert extract_text("\\boxed{a}</think>") is None
    assert extract_text("</think>\\boxed{a}</think> b") is None
    assert extract_text("\\boxed{a}") is None
    assert extract_text("\\boxed{a}", require_think_end=False) == b"a"
    assert extract_text("</think> \\boxed{a} \\boxed{ b }") == b" b "


def test_unescaped_newline_is_a_fallback():
    assert extract_text("</think>\\boxed{\\n}") == b"\\n"
    assert extract_text("</think>\\boxed{a\\n\\nb\\neq}", unescape_newline=True) == b"a\n\nb\neq"
    assert (
        extract_text("</think>\\boxed{" + "\\n" * 20 + "}", unescape_newline=True, max_prediction_bytes=24)
        == b"\n" * 20
    )


def test_over_long_answer_keeps_its_true_length():
    pieces = [bytes([b]) for b in range(256)]
    tokens = np.frombuffer(b"</think>\\boxed{" + b"x" * 40 + b"}", np.uint8).astype(np.int32)[None]
    got = extract_predictions(
        tokens, np.ones(tokens.shape, bool), *table_of(pieces), mode="balanced", max_prediction_bytes=8
    )
    assert got.bytes.shape == (1, 8) and int(got.lengths[0]) == 40 and bool(got.found[0])


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="balanced_then_tail"):
        extract_text("x", "boxed")


@pytest.mark.parametrize("real_tokenizer", ["qwen3", "mistral_v1"], indirect=True)
def test_longest_vocabulary_prefix(real_tokenizer):
    """Compare with a dictionary lookup of every prefix length."""
    pieces = [real_tokenizer.token_bytes(i) for i in range(real_tokenizer.vocab_size)]
    lowest = {}
    for i, piece in enumerate(pieces):
        lowest.setdefault(piece, i)
    rng = np.random.default_rng(0)
    texts = [b"".join(pieces[i] for i in rng.integers(0, len(pieces), 3))[:40] for _ in range(500)] + [b"", b"\xff"]
    data = np.zeros((len(texts), 40), np.uint8)
    for b, text in enumerate(texts):
        data[b, : len(text)] = np.frombuffer(text, np.uint8)
    index = vocabulary_index(real_tokenizer.byte_table())
    got = longest_prefix_tokens(index, jnp.asarray(data), jnp.asarray([len(t) for t in texts]))
    expected = [next((lowest[t[:n]] for n in range(len(t), 0, -1) if t[:n] in lowest), -1) for t in texts]
    np.testing.assert_array_equal(got, expected)


def judged(letters, texts, truth, config, scores=None, kind="documents"):
    """Return rewards f32 [G] and predictions of completions `texts`, for one position with the continuation `truth`."""
    G, C = len(texts), 40
    tokens, mask = np.zeros((1, G, C), np.int32), np.zeros((1, G, C), bool)
    for g, text in enumerate(texts):
        ids = letters.encode(text)
        tokens[0, g, : len(ids)], mask[0, g, : len(ids)] = ids, True
    task = Task(id=0, cut=1, text=truth.encode(), boundaries=range(1, len(truth) + 1), tokens=letters.encode(truth))
    row_ids = np.arange(G)[None, None]
    tasks = build_tasks([(np.zeros(1), [task])], tail=[1], row_ids=row_ids, trunk_length=1, num_tokens=len(truth) or 1)
    rollouts = Rollouts(
        tokens=tokens, mask=mask, sampler_logprobs=None, truncated=np.zeros((1, G), bool), num_rejected=None
    )
    scorer = SimpleNamespace(score=lambda request, *_: scores[request.name])
    reward = make_reward(config, letters, scorer=scorer, kind=kind)
    evidence, earned, _ = earn(reward, {"current": None}, tasks, rollouts)
    return np.asarray(earned.rewards)[0, 0], evidence.predictions


def answer(text):
    return f"ab</think>\\boxed{{{text}}}"


def test_a_vote_on_questions_compares_whole_answers(letters):
    """References of questions have no bytes, yet answers longer than 8 bytes are read: three long ones outvote one."""
    config = RewardConfig(terms=("ttrl",))
    texts = [answer("abcdabcdabcd")] * 3 + [answer("a")]
    rewards, _ = judged(letters, texts, "", config, kind="questions")
    np.testing.assert_array_equal(rewards, [1, 1, 1, 0])


def test_reward_variants_by_hand(letters):
    texts = [answer("c"), answer("cd"), answer("cx"), answer("x"), answer(""), "cd"]
    prefix, predictions = judged(letters, texts, "cde", RewardConfig())
    assert prefix.tolist() == [1, 1, 0, 0, 0, 0]
    assert np.asarray(predictions.found)[0].tolist() == [True] * 5 + [False]
    first, _ = judged(letters, texts, "cde", RewardConfig(terms=("first_token",)))
    assert first.tolist() == [1, 1, 1, 0, 0, 0]

    # dense: a wrong first token gets the policy's direct probability of that token; no prediction gets 0.
    def scores(texts):
        chosen = np.array([[text.endswith("boxed{x}") for text in texts]])
        values = jnp.log(jnp.where(chosen, 0.25, 1e-6))[..., None]
        has_token = jnp.asarray([["boxed{}" not in text and "boxed" in text for text in texts]])[..., None]
        return {"direct_prediction": Scores(values=values, mask=has_token, tokens_run=jnp.zeros(1, jnp.int32))}

    dense, _ = judged(letters, texts, "cde", RewardConfig(terms=("dense",)), scores(texts))
    np.testing.assert_allclose(dense, [1, 1, 1, 0.25, 0, 0], atol=1e-6)
    # conditional_dense: the same in a group with a correct rollout, 0 in a group without one.
    conditional = RewardConfig(terms=("conditional_dense",))
    np.testing.assert_allclose(judged(letters, texts, "cde", conditional, scores(texts))[0], dense, atol=1e-6)
    np.testing.assert_array_equal(judged(letters, texts[3:], "cde", conditional, scores(texts[3:]))[0], 0)


def test_random_rewards_keep_each_groups_rate_and_tell_nothing(monkeypatch):
    """Over many groups, a rollout's reward and its random one are uncorrelated; equal tokens get the same order."""
    rng = np.random.default_rng(0)
    U, M, G, C = 64, 8, 4, 3
    tokens = jnp.asarray(rng.integers(0, 50, (U, M * G, C)), jnp.int32)
    real = rng.integers(0, 2, (U, M, G)).astype(np.float32)
    tasks = SimpleNamespace(references=SimpleNamespace(task_ids=jnp.arange(U * M).reshape(U, M)))
    rollouts = SimpleNamespace(tokens=tokens, mask=jnp.ones((U, M * G, C), bool))
    evidence = SimpleNamespace(tasks=tasks, rollouts=rollouts)
    right = Earned(rewards=jnp.asarray(real), faults=jnp.zeros((U, M, G), bool), metrics={})
    monkeypatch.setattr(controls, "prefix", lambda _: right)
    earned, again = controls.random(evidence), controls.random(evidence)
    got = np.asarray(earned.rewards)
    np.testing.assert_array_equal(got, again.rewards)
    np.testing.assert_array_equal(got.sum(-1), real.sum(-1))
    np.testing.assert_array_equal(earned.metrics["prefix"], real)
    # Advantages of 2,048 rollouts: their mean product has a deviation of about 1 / 45.
    advantage = [(r - r.mean(-1, keepdims=True)) / (r.std(-1, keepdims=True) + 1e-6) for r in (got, real)]
    assert abs((advantage[0] * advantage[1]).mean()) < 0.09 and (got != real).any()


def test_random_lengths_follow_right_lengths_and_nothing_else(monkeypatch):
    """Right ones have 3 tokens, or 2 a tenth as often: so have rewarded ones, and among equals they are random."""
    rng = np.random.default_rng(0)
    U, M, G, C = 64, 8, 6, 3
    lengths = rng.integers(1, 4, (U, M, G))
    real = (rng.random((U, M, G)) < np.array([0, 0, 0.05, 0.5])[lengths]).astype(np.float32)
    tasks = SimpleNamespace(
        references=SimpleNamespace(task_ids=jnp.arange(U * M).reshape(U, M)),
        prompts=SimpleNamespace(prompt_mask=jnp.ones((U, M), bool)),
    )
    rollouts = SimpleNamespace(
        tokens=jnp.asarray(rng.integers(0, 50, (U, M * G, C)), jnp.int32),
        mask=jnp.asarray(np.arange(C) < lengths.reshape(U, M * G, 1)),
    )
    right = Earned(rewards=jnp.asarray(real), faults=jnp.zeros((U, M, G), bool), metrics={})
    monkeypatch.setattr(controls, "prefix", lambda _: right)
    got = np.asarray(controls.random_lengths(SimpleNamespace(tasks=tasks, rollouts=rollouts)).rewards)
    np.testing.assert_array_equal(got.sum(-1), real.sum(-1))
    assert not got[lengths == 1].any()
    shares = [(r * (lengths == 3)).sum() / r.sum() for r in (got, real)]
    assert shares[0] == pytest.approx(shares[1], abs=0.03) and shares[1] > 0.85
    threes = lengths == 3
    among = [
        (r - (r * threes).sum(-1, keepdims=True) / np.maximum(1, threes.sum(-1, keepdims=True))) for r in (got, real)
    ]
    assert abs((among[0] * among[1])[threes].mean()) < 0.03


def test_shuffled_targets_belong_to_another_prompt(letters):
    """Four real prompts of six: predictions right for the prompt two further on are rewarded, and only these."""
    truths = ["ab", "cd", "ef", "gh"]
    places = [(0, 0), (0, 1), (1, 0), (2, 1)]
    tokens, mask = np.zeros((3, 4, 8), np.int32), np.zeros((3, 4, 8), bool)
    for number, (u, m) in enumerate(places):
        for g, truth in enumerate((truths[number], truths[(number + 2) % 4])):
            ids = letters.encode(f"</think>\\boxed{{{truth}}}")
            tokens[u, 2 * m + g, : len(ids)], mask[u, 2 * m + g, : len(ids)] = ids, True

    def task(number):
        return Task(id=number, cut=1, text=truths[number].encode(), boundaries=(1, 2), tokens=[1, 2])

    # Trunk 2 has a padded prompt first: build it with one prompt, then move it.
    trunks = [(np.zeros(1), [task(0), task(1)]), (np.zeros(1), [task(2)]), (np.zeros(1), [task(3)])]
    tasks = build_tasks(trunks, tail=[1], row_ids=np.arange(12).reshape(3, 2, 2), trunk_length=1, num_tokens=2)
    flip = lambda x: np.concatenate([x[:2], x[2:, ::-1]])  # noqa: E731
    references = jax.tree.map(flip, tasks.references)
    prompts = dataclasses.replace(tasks.prompts, prompt_mask=flip(tasks.prompts.prompt_mask))
    rollouts = Rollouts(
        tokens=tokens, mask=mask, sampler_logprobs=None, truncated=np.zeros((3, 4), bool), num_rejected=None
    )
    reward = make_reward(RewardConfig(terms=("shuffled_targets",)), letters)
    _, earned, _ = earn(reward, {"current": None}, TaskBatch(prompts=prompts, references=references), rollouts)
    for u, m in places:
        assert np.asarray(earned.rewards)[u, m].tolist() == [0, 1]
        assert np.asarray(earned.metrics["reward/shuffled_targets/prefix"])[u, m].tolist() == [1, 0]


def test_rewards_name_the_passes_they_need(letters):
    assert make_reward(RewardConfig(), letters).requests == ()
    assert make_reward(RewardConfig(terms=("dense",)), letters).requests == (DIRECT_PREDICTION,)
    with pytest.raises(ConfigError, match=r"reward\.terms names 'best'; it must be one of prefix"):
        make_reward(RewardConfig(terms=("best",)), letters)


def scored_tasks(config, M=2, G=2, A=3):
    """Two trunks with a header of three tokens and two cuts each, references of up to three tokens, random rollouts."""
    rng = np.random.default_rng(0)
    trunk = rng.integers(4, config.vocab_size, (2, 12)).astype(np.int32)
    cuts = np.array([[4, 12], [7, 9]], np.int32)
    lengths = [[3, 1], [2, 3]]
    tasks = [
        [Task(id=2 * u + m, cut=int(cuts[u, m]), tokens=rng.integers(4, 60, lengths[u][m])) for m in range(M)]
        for u in range(2)
    ]
    row_ids = np.arange(2 * M * G, dtype=np.int32).reshape(2, M, G)
    trunks = list(zip(trunk, tasks, strict=True))
    batch = build_tasks(trunks, tail=[1, 2], row_ids=row_ids, trunk_length=12, num_tokens=A)
    tokens = rng.integers(4, config.vocab_size, (2, M * G, 6)).astype(np.int32)
    sizes = rng.integers(1, 7, (2, M * G))
    rollouts = Rollouts(
        tokens=jnp.asarray(tokens), mask=jnp.arange(6) < sizes[..., None], sampler_logprobs=None,
        truncated=jnp.asarray(rng.random((2, M * G)) < 0.5), num_rejected=None,
    )  # fmt: skip
    # Thoughts that end after one token, and others that never do.
    predictions = SimpleNamespace(think_end_tokens=jnp.asarray(rng.integers(0, 2, (2, M * G))))
    return batch, rollouts, predictions


# A tokenizer encodes mark and stub together: here the mark's last character and the box share token 53.
MARKS = {"</think>": [50, 51], "</think>box": [50, 53, 54], "box": [52], "": [], ">box": [53, 54]}


@pytest.mark.parametrize(
    ("view", "keep", "stub", "num_targets", "runs_past"),
    [("direct", "nothing", "", 0, False), ("direct", "nothing", "", 1, False), ("prompt", "thought", "box", 1, False),
     ("prompt", "thought", "box", 1, True), ("prompt", "thought", "", 0, False),
     ("prompt", "completion", "box", 2, False), ("prompt", "nothing", "box", 0, False)],
)  # fmt: skip
def test_scores_by_whole_logits_of_each_row(tiny_config, tiny_params, view, keep, stub, num_targets, runs_past):
    """Log-probabilities of target tokens against plain sequences, and the number of tokens run against a hand count."""
    batch, rollouts, predictions = scored_tasks(tiny_config)
    # Where a row's first token closes the thought, every other such token runs past the mark.
    past = [int(t) for t in np.unique(np.asarray(rollouts.tokens)[..., 0])][::2] if runs_past else []
    texts = {t: b">\\" for t in past}
    tokenizer = SimpleNamespace(
        encode_continuation=MARKS.__getitem__, bos_id=5, vocab_size=tiny_config.vocab_size,
        token_bytes=lambda i: texts.get(i, b"x"),
    )  # fmt: skip
    scorer = Scorer(tiny_config, tokenizer, header_length=3, trunks_at_once=lambda U: 1)
    request = Request(name="r", view=view, keep=keep, stub=stub, num_targets=num_targets)
    scores = scorer.score(request, tiny_params, batch, rollouts, predictions)
    logits_fn = jax.jit(lambda t: jax.nn.log_softmax(decoder.logits(tiny_config, tiny_params, t)))
    prompts, run = batch.prompts, np.zeros(2, int)
    for u, r in np.ndindex(2, 4):
        m, size = r // 2, int(rollouts.mask[u, r].sum())
        text = prompts.trunk_tokens[u, : prompts.cuts[u, m]].tolist()
        is_closed, row = bool(predictions.think_end_tokens[u, r]), np.asarray(rollouts.tokens)[u, r].tolist()
        thought = row[: size - (not rollouts.truncated[u, r])]
        if view == "direct":
            before = [5, *text[3:]]
        else:
            kept = {"nothing": [], "completion": thought, "thought": row[:1] if is_closed else thought}[keep]
            closed = MARKS[stub] if is_closed and keep != "nothing" else MARKS["</think>" + stub]
            if is_closed and row[0] in past:
                kept, closed = [], MARKS[">" + stub]
            before = [*text, 1, 2, *kept, *closed]
            run[u] += len(kept) + len(closed)
        target = batch.references.tokens[u, m, : batch.references.lengths[u, m]][: num_targets or None].tolist()
        run[u] += len(target) - 1
        padded = np.zeros((1, 40), np.int32)
        padded[0, : len(before) + len(target)] = before + target
        logprobs = np.asarray(logits_fn(padded))[0]
        expected = [logprobs[len(before) + i - 1, t] for i, t in enumerate(target)]
        assert np.asarray(scores.mask)[u, r].sum() == len(target)
        np.testing.assert_allclose(np.asarray(scores.values)[u, r, : len(target)], expected, atol=2e-5)
        assert not np.asarray(scores.values)[u, r, len(target) :].any()
    stems = 12 - 3 + 1 if view == "direct" else 12 + 2 * 2
    assert scores.tokens_run.tolist() == (run + stems).tolist()


def test_a_completion_is_scored_behind_its_prompt(tiny_config, tiny_params):
    """By whole logits; `coherence` takes the thought's tokens alone: the first one, or all of an open thought."""
    batch, rollouts, predictions = scored_tasks(tiny_config)
    tokenizer = SimpleNamespace(bos_id=5, vocab_size=tiny_config.vocab_size, token_bytes=lambda i: b"x")
    scorer = Scorer(tiny_config, tokenizer, header_length=3)
    request = Request(name="own_tokens", policy="start", keep="nothing", target="completion")
    scores = scorer.score(request, tiny_params, batch, rollouts, predictions)
    made = Evidence(
        tasks=batch, rollouts=rollouts, predictions=predictions, unescaped=None, scores={"own_tokens": scores}
    )
    earned = coherence(made)
    for u, r in np.ndindex(2, 4):
        m, size = r // 2, int(rollouts.mask[u, r].sum())
        text = batch.prompts.trunk_tokens[u, : batch.prompts.cuts[u, m]].tolist()
        own = np.asarray(rollouts.tokens)[u, r].tolist()[:size]
        logits = decoder.logits(tiny_config, tiny_params, np.array([[*text, 1, 2, *own]]))[0]
        expected = np.asarray(jax.nn.log_softmax(logits))[len(text) + 1 : -1][np.arange(size), own]
        np.testing.assert_allclose(scores.values[u, r, :size], expected, atol=2e-5)
        thought = 1 if predictions.think_end_tokens[u, r] else size
        np.testing.assert_allclose(earned.rewards[u, m, r % 2], np.exp(expected[:thought].mean()), rtol=1e-4)


def test_choices_are_scored_in_one_place_by_whole_logits(tiny_config, tiny_params):
    """The log-probability of each choice behind the completion and the stub, and a judge's expected score of them."""
    batch, rollouts, predictions = scored_tasks(tiny_config)
    digits = {str(d): [30 + d] for d in range(1, 6)}
    tokenizer = SimpleNamespace(
        encode_continuation=(MARKS | digits | {"12": [31, 32]}).__getitem__, bos_id=5,
        vocab_size=tiny_config.vocab_size, token_bytes=lambda i: b"x",
    )  # fmt: skip
    scorer = Scorer(tiny_config, tokenizer, header_length=3)
    request = Request(name="judge", keep="completion", stub="box", target="choices", choices=("1", "2", "3", "4", "5"))
    scores = scorer.score(request, tiny_params, batch, rollouts, predictions)
    earned = self_evaluation(
        Evidence(
            tasks=batch, rollouts=rollouts, predictions=predictions, unescaped=None, scores={"judge": scores}
        )
    )  # fmt: skip
    for u, r in np.ndindex(2, 4):
        m, size = r // 2, int(rollouts.mask[u, r].sum())
        text = batch.prompts.trunk_tokens[u, : batch.prompts.cuts[u, m]].tolist()
        thought = np.asarray(rollouts.tokens)[u, r].tolist()[: size - (not rollouts.truncated[u, r])]
        is_closed = bool(predictions.think_end_tokens[u, r])
        row = [*text, 1, 2, *thought, *MARKS["box" if is_closed else "</think>box"]]
        logprobs = jax.nn.log_softmax(decoder.logits(tiny_config, tiny_params, np.array([row])))[0, -1]
        np.testing.assert_allclose(scores.values[u, r], logprobs[31:36], atol=2e-5)
        chances = np.exp(np.asarray(logprobs[31:36], float))
        expected = chances @ [0, 0.25, 0.5, 0.75, 1] / chances.sum()
        np.testing.assert_allclose(earned.rewards[u, m, r % 2], expected, atol=1e-5)
    with pytest.raises(ConfigError, match="must be one token each"):
        scorer.choice_ids(dataclasses.replace(request, choices=("1", "12")))


def test_the_direct_view_has_no_thought():
    with pytest.raises(ValueError, match="no thought and no stub"):
        Request(name="r", view="direct", keep="thought")
