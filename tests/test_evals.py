"""Evaluation: splits, votes and errors by hand; thinking figures against plain recomputation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import Config, DataConfig, DecoderConfig, EvalConfig, PositionsConfig, RewardConfig, RolloutConfig
from rpt_jax.data.batches import make_source
from rpt_jax.data.documents import Document, lengths_of
from rpt_jax.data.positions import PositionTable, Proxy, Windows, add_scores, candidate_positions
from rpt_jax.data.templates import make_template, token_facts
from rpt_jax.evals.next_token import Evaluator, _majority, difficulty_splits, mean_with_error
from rpt_jax.models import decoder
from rpt_jax.rewards.catalog import make_reward
from rpt_jax.scoring.requests import Scorer
from rpt_jax.sequences import append_targets

pytestmark = pytest.mark.usefixtures("few_programs")


def test_splits_are_nested_uniform_samples_with_labels():
    rng = np.random.default_rng(0)
    n = 400
    table = PositionTable(
        document=np.zeros(n, int), index=np.arange(n), entropy=rng.uniform(0, 3, n).astype(np.float32),
        direct_token=np.zeros(n, int), direct_logprob=np.zeros(n), num_bytes=np.ones(n, int),
    )  # fmt: skip
    labels = tuple((i, f"known/{i % 2}") for i in range(0, 40))
    document = Document(id="d", tokens=np.zeros(n, int), labels=labels)
    splits = difficulty_splits(table, [document], (0.5, 1.0, 2.0), 1000, seed=0)
    assert set(splits["hard"]) < set(splits["medium"]) < set(splits["easy"]) < set(splits["all"])
    assert set(splits["settled"]) == set(splits["all"]) - set(splits["easy"]) and len(splits["all"]) == n
    assert set(splits["known"]) == set(range(40)) and set(splits["known/1"]) == set(range(1, 40, 2))
    assert set(splits["hard known"]) == set(splits["hard"]) & set(range(40))
    # A limited sample of the whole is not skewed by difficulty: its mean entropy is near the population's.
    few = [difficulty_splits(table, [document], (0.5, 1.0, 2.0), 50, seed=s)["all"] for s in range(40)]
    assert {len(f) for f in few} == {50}
    assert abs(np.mean([table.entropy[f].mean() for f in few]) - table.entropy.mean()) < 0.06


def test_majority_by_hand():
    texts = np.zeros((1, 3, 5, 2), np.uint8)
    texts[0, :, :, 0] = [[1, 2, 2, 3, 1], [5, 5, 6, 6, 6], [7, 7, 7, 8, 9]]
    lengths = np.ones((1, 3, 5), int)
    found = np.array([[[True] * 5, [True, True, False, False, True], [False] * 5]])
    correct = np.array([[[1.0, 0, 0, 0, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]])
    # Tie of 1 and 2: the first seen, 1, wins and is right. Unfound sixes do not vote: 5 wins. Nobody votes: 0.
    right, share = _majority(texts, lengths, found, correct)
    np.testing.assert_array_equal(right, [[1, 1, 0]])
    np.testing.assert_allclose(share, [[0.4, 0.4, 0]])


def test_mean_and_error_by_hand():
    # Deviation of (0, 0, 1, 1) with n - 1 is sqrt(1/3); over sqrt(4).
    got = mean_with_error(np.array([0.0, 0.0, 1.0, 1.0]))
    assert got["value"] == 0.5 and got["n"] == 4 and np.isclose(got["standard_error"], np.sqrt(1 / 3) / 2)


def test_forced_answers_by_hand():
    tokens = jnp.asarray([[[11, 12, 13, 14], [21, 22, 23, 24]]])
    stubs, sizes = jnp.asarray([[1, 2, 3], [2, 3, 0]]), jnp.asarray([3, 2])
    # The first thought closed within two tokens, the second never did.
    which, targets, lengths = jnp.asarray([[1, 0]]), jnp.asarray([[[7, 8], [9, 0]]]), jnp.asarray([[2, 1]])
    got, mask, last = append_targets(tokens, jnp.asarray([[2, 4]]), stubs, sizes, which, targets, lengths)
    assert got[0][mask[0]].tolist() == [11, 12, 2, 3, 7, 8, 21, 22, 23, 24, 1, 2, 3, 9]
    assert last.tolist() == [[4, 7]]


@pytest.fixture(scope="module")
def evaluation(letters, mesh):
    """An evaluator of a random model whose stop and mark tokens are likely enough to be sampled."""
    config = Config(
        data=DataConfig(template="minimal", trunk_length=24, window_stride=12),
        positions=PositionsConfig(min_context_tokens=4),
        model=DecoderConfig(
            vocab_size=letters.vocab_size, num_layers=2, width=32, mlp_width=48, num_heads=2, num_kv_heads=2,
            head_size=16,
        ),
        rollout=RolloutConfig(
            prompts_per_trunk=3, max_completion_tokens=10, temperature=1.3, stop_ids=letters.stop_ids
        ),
        reward=RewardConfig(require_think_end=False),
        eval=EvalConfig(num_samples=3, batch_trunks=4),
    )  # fmt: skip
    params = decoder.init_params(config.model, mesh, jax.random.key(5))
    rng = np.random.default_rng(0)
    words = letters.encode("abcdefgh .")
    documents = [Document(id=str(n), tokens=rng.choice(words, n).astype(np.int32)) for n in (30, 17)]
    token_bytes = [letters.token_bytes(i) for i in range(letters.vocab_size)]
    proxy = Proxy(config=config.model, params=params, mesh=mesh, bos_id=None, batch_trunks=4, renormalize=False)
    windows = Windows(window=24, stride=12, continuation_tokens=4, min_context_tokens=4)
    table = candidate_positions(documents, range(2), token_facts(token_bytes), windows, lengths_of(documents))
    table = add_scores(table, documents, proxy, windows)
    template = make_template(letters, config.data)
    source = make_source(documents, table, template, token_bytes, trunk_length=24, stride=12, continuation_tokens=4)
    ids = np.arange(len(table))
    evaluator = Evaluator(
        config=config, mesh=mesh, tokenizer=letters, source=source, splits={"one": ids[:1], "all": ids},
        reward=make_reward(config.reward, letters, source.columns, Scorer(config.model, letters, 0)),
    )  # fmt: skip
    return evaluator, params


def test_direct_figures_by_definition(evaluation):
    evaluator, params = evaluation
    figures = evaluator.evaluate(params, thinking=False)
    source = evaluator.source
    logits_fn = jax.jit(lambda t: decoder.logits(evaluator.config.model, params, t))
    right, logprobs = [], []
    for document, index in zip(source.table.document, source.table.index):
        tokens = source.documents[document].tokens
        start = max(0, -(-(index - 24) // 12)) * 12
        context = np.zeros((1, 24), np.int32)
        context[0, : index - start] = tokens[start:index]
        next_logprobs = jax.nn.log_softmax(logits_fn(context)[0, index - start - 1])
        right.append(float(next_logprobs.argmax() == tokens[index]))
        logprobs.append(float(next_logprobs[tokens[index]]))
    assert figures["all"]["direct_first"]["n"] == len(right)
    np.testing.assert_allclose(figures["all"]["direct_first"]["value"], np.mean(right), atol=1e-6)
    # Every token of this vocabulary but the longer marks is one byte, so both readings agree.
    np.testing.assert_allclose(figures["all"]["direct_prefix"]["value"], np.mean(right), atol=1e-6)
    np.testing.assert_allclose(figures["all"]["direct_logprob"]["value"], np.mean(logprobs), atol=1e-4)


def test_thinking_figures_are_consistent_and_placed_on_their_positions(evaluation):
    evaluator, params = evaluation
    figures = evaluator.evaluate(params)
    again = evaluator.evaluate(params)
    assert figures == again
    f = {m: v["value"] for m, v in figures["all"].items()}
    assert f["pass@k"] >= max(f["sampled_prefix"], f["majority@k"]) >= 0
    assert 0 < f["sampled_no_prediction"] <= 1 and 1 <= f["sampled_thought_tokens"] <= 10
    # Another batch size and order of trunks must not move any position's figures.
    config = dataclasses.replace(evaluator.config, eval=EvalConfig(num_samples=3, batch_trunks=2))
    other = dataclasses.replace(evaluator, config=config).evaluate(params)
    for split in figures:
        for metric, value in figures[split].items():
            np.testing.assert_allclose(other[split][metric]["value"], value["value"], atol=1e-4, err_msg=metric)


def test_reasoned_logprob_by_recomputation(evaluation):
    """log mean_i p(x_t | context, tail, thought_i, stub) for every position, from whole logits of plain sequences."""
    from rpt_jax.rollout.engine import generate, rollout_key

    evaluator, params = evaluation
    config, source, tokenizer = evaluator.config, evaluator.source, evaluator.tokenizer
    ids = [0, 1, 2]
    batch = source.make([ids], prompts_per_trunk=3, group_size=3)
    rollouts = generate(
        config.model, params, batch.prompts, rollout_key(config.run.seed, 2**31 - 1),
        vocab_size=tokenizer.vocab_size, **config.rollout.sampling,
    )  # fmt: skip
    mark, box = tokenizer.encode("</think>"), tokenizer.encode("\\boxed{")
    expected = []
    for m in range(3):
        prompt = [*batch.prompts.trunk_tokens[0, : batch.prompts.cuts[0, m]], *source.template.tail]
        logs = []
        for g in range(3):
            row = np.asarray(rollouts.tokens)[0, m * 3 + g][np.asarray(rollouts.mask)[0, m * 3 + g]].tolist()
            if mark[0] in row:
                thought = row[: len(row) - row[::-1].index(mark[0])] + box
            else:
                thought = [t for t in row if t != tokenizer.eos_id] + mark + box
            logprobs = jax.nn.log_softmax(decoder.logits(config.model, params, np.array([prompt + thought])))[0, -1]
            logs.append(float(logprobs[batch.references.tokens[0, m, 0]]))
        expected.append(np.log(np.mean(np.exp(logs))))
    only = dataclasses.replace(evaluator, splits={str(i): np.array([i]) for i in ids})
    figures = only.evaluate(params)
    got = [figures[str(i)]["reasoned_logprob"]["value"] for i in ids]
    np.testing.assert_allclose(got, expected, atol=1e-4)
