"""Pairs of prompts, of which the second shows the reference: their batches, scores, and the reward that distils."""

import dataclasses
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_data import PIECES, table_of
from test_likelihood import END, REFERENCE, bigram

from rpt_jax.config import Config, DataConfig, LikelihoodConfig, LossConfig, QuestionsConfig, RewardConfig
from rpt_jax.config.schema import with_values
from rpt_jax.data.batches import TrainIterator, make_source
from rpt_jax.data.documents import Document
from rpt_jax.data.questions import Question, make_question_source
from rpt_jax.data.templates import Template, make_template
from rpt_jax.errors import ConfigError
from rpt_jax.rewards import likelihood
from rpt_jax.rewards.answer import Predictions
from rpt_jax.rewards.catalog import check_rewards
from rpt_jax.rl.objective import _terms
from rpt_jax.rl.rows import policy_rows
from rpt_jax.scoring.requests import Appended, Request, Scorer, Scores
from rpt_jax.sequences import Task
from rpt_jax.tokenizer import train_byte_level
from rpt_jax.types import Evidence, Experience, Prompts, References, Rollouts, TaskBatch

# --- Exact expectation --------------------------------------------------------------------------------------------

# A toy policy: row 5 of the table begins a thought behind the prior's prompt, row 6 behind the posterior's.
WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)), jnp.float32)
THOUGHTS = [(END,), *product(range(4), range(5))]
IS_CLOSED = np.array([t[-1] == END for t in THOUGHTS])
G, C, A, DRIFT = 2, 2, len(REFERENCE), 0.3
N = len(THOUGHTS)


def row_table(weights, first, *, with_reference: bool):
    """Return the log-probability of every thought's tokens, and of the reference behind it, f32 [N, C (+ A)]."""

    def row(thought):
        parts = bigram(weights, first, thought)
        if with_reference:
            parts = jnp.concatenate([parts, bigram(weights, thought[0], REFERENCE)])
        return jnp.pad(parts, (0, C + A * with_reference - len(parts)))

    return jnp.stack([row(t) for t in THOUGHTS])


def all_experience(earn) -> tuple[Experience, Appended, np.ndarray]:
    """Return the experience of every pair of prior and pair of posterior thoughts, one in each trunk, and the rows."""
    which = np.stack(np.meshgrid(*[np.arange(N)] * 4, indexing="ij"), -1).reshape(-1, 4)
    U = len(which)
    lengths = np.array([len(t) for t in THOUGHTS])
    padded = np.array([(*t, *REFERENCE, 0, 0)[: C + A] for t in THOUGHTS], np.int32)
    rows, kept = padded[which], lengths[which]
    mask = np.arange(C) < kept[..., None]
    references = References(
        task_ids=None, bytes=None, boundary_mask=None, tokens=None, lengths=None,
        shown=jnp.broadcast_to(jnp.array([False, True]), (U, 2)),
    )  # fmt: skip
    prompts = Prompts(
        trunk_tokens=np.full((U, 1), 5), trunk_lengths=np.ones(U, np.int32), cuts=np.ones((U, 2), np.int32),
        tail_tokens=np.zeros((U, 2, 1), np.int32), tail_lengths=np.ones((U, 2), np.int32),
        prompt_mask=np.ones((U, 2), bool), row_ids=np.arange(4 * U).reshape(U, 2, G),
    )  # fmt: skip
    prior, posterior = (row_table(WEIGHTS, first, with_reference=False) for first in (5, 6))
    sampled = jnp.concatenate([prior[which[:, :2]], posterior[which[:, 2:]]], axis=1)
    rollouts = Rollouts(
        tokens=jnp.asarray(rows[..., :C]), mask=jnp.asarray(mask), sampler_logprobs=sampled,
        truncated=jnp.asarray(~IS_CLOSED[which]), num_rejected=jnp.zeros((U, 4), np.int32),
    )  # fmt: skip
    predictions = Predictions(
        bytes=jnp.zeros((U, 4, 1), np.uint8), lengths=jnp.ones((U, 4), np.int32), found=jnp.asarray(IS_CLOSED[which]),
        think_end_tokens=jnp.asarray(np.where(IS_CLOSED[which], kept, 0)),
    )  # fmt: skip
    answers = jnp.stack([bigram(WEIGHTS, t[0], REFERENCE) for t in THOUGHTS])
    scores = {
        "after_thought": Scores(values=answers[which], mask=jnp.ones((U, 4, A), bool), tokens_run=None),
        "behind_prior": Scores(values=prior[which], mask=jnp.asarray(mask), tokens_run=None),
    }
    tasks = TaskBatch(prompts=prompts, references=references)
    evidence = Evidence(tasks=tasks, rollouts=rollouts, predictions=predictions, unescaped=None, scores=scores)
    experience = Experience(
        tasks=tasks, rollouts=rollouts, predictions=predictions, earned=earn(evidence),
        group_mask=jnp.ones((U, 2), bool), tokens_scored=None,
    )  # fmt: skip
    appended = Appended(
        tokens=jnp.asarray(rows), mask=jnp.asarray(np.arange(C + A) < kept[..., None] + A), kept=jnp.asarray(kept),
        first=jnp.asarray(kept),
    )  # fmt: skip
    return experience, appended, which


def test_the_expected_update_is_its_stated_formula():
    """All 21 thoughts, all 194,481 groups.

    The posterior's part is the gradient of E_q[R], R = w clip(1 - drift k), shrunk by 1 - 1/G. The prior's part is that
    of E_q[w (log p(z) + log p(y | z))] with w and q held fixed.
    """
    options = RewardConfig(likelihood=LikelihoodConfig(ravr_drift=DRIFT))
    experience, appended, which = all_experience(lambda evidence: likelihood.ravr(evidence, options))
    loss = LossConfig(advantage="mean", aggregation="constant")
    rows = policy_rows(experience, appended, loss=loss, temperature=1.0, header_length=0)
    prior, posterior = (row_table(WEIGHTS, first, with_reference=False).sum(-1) for first in (5, 6))
    chance = jnp.exp(prior[which[:, 0]] + prior[which[:, 1]] + posterior[which[:, 2]] + posterior[which[:, 3]])
    assert float(chance.sum()) == pytest.approx(1, abs=1e-4)
    # The prior's slots hold the posterior's rows.
    np.testing.assert_array_equal(rows.sequences.branch_tokens[:, :2], appended.tokens[:, 2:])

    def total(weights):
        of_prior, of_posterior = (row_table(weights, first, with_reference=True) for first in (5, 6))
        logprobs = jnp.concatenate([of_prior[which[:, 2:]], of_posterior[which[:, 2:]]], axis=1)
        bare = dataclasses.replace(rows, sequences=None, trunk_weights=None)
        terms = _terms(loss, logprobs, (rows.sequences.branch_mask, bare))
        return -len(which) * G * C * jnp.sum(chance[:, None, None] * terms)

    p, q = (np.exp(np.asarray(x, np.float64)) for x in (prior, posterior))
    lengths = np.array([len(t) for t in THOUGHTS])
    answer = np.array([float(bigram(WEIGHTS, t[0], REFERENCE).mean()) for t in THOUGHTS])
    s = np.exp(answer) * IS_CLOSED
    baseline = (s[:, None] + s[None, :]) / 2
    gain = (p[:, None] * p[None, :] * np.maximum(0, s[:, None, None] - baseline)).sum((1, 2))
    reward = gain * np.clip(1 - DRIFT * np.asarray(posterior - prior) / lengths, 0, 1)

    def stated(weights):
        of_prior, of_posterior = (row_table(weights, first, with_reference=True) for first in (5, 6))
        of_thought = row_table(weights, 6, with_reference=False).sum(-1)
        assert of_posterior.shape == of_prior.shape
        return jnp.sum((G - 1) * q * reward * of_thought + G * q * gain * of_prior.sum(-1))

    np.testing.assert_allclose(jax.grad(total)(WEIGHTS), jax.grad(stated)(WEIGHTS), atol=1e-5)


# --- Batches ------------------------------------------------------------------------------------------------------


DOCUMENT = Document(id="d", tokens=np.array([5, 1, 2, 5, 1, 2, 5, 1, 2, 5], np.int32))
POSITIONS = table_of([(0, 3, 0.1), (0, 5, 2.0), (0, 7, 1.0)])


def test_each_task_has_a_prompt_that_hides_and_one_that_shows_the_reference():
    template = Template(
        header=np.array([7], np.int32), tail=np.array([6, 4], np.int32), hint=([3], [6, 4]), num_shown=2
    )
    source = make_source([DOCUMENT], POSITIONS, template, PIECES, trunk_length=12, stride=11, continuation_tokens=2)
    assert template.width == 2 + 3 and len(source.group(np.arange(3), 4)) == 2
    batch = source.make([[0, 1], [2]], prompts_per_trunk=4, group_size=2)
    assert batch.references.shown.tolist() == [[False, True, False, True], [False, True, False, False]]
    assert batch.prompts.prompt_mask.tolist() == [[True] * 4, [True, True, False, False]]
    np.testing.assert_array_equal(batch.references.task_ids[0], [0, 0, 1, 1])
    # Right-aligned: the plain tail, and the one with the two tokens that follow position 3.
    np.testing.assert_array_equal(batch.prompts.tail_tokens[0, 0], [0, 0, 0, 6, 4])
    np.testing.assert_array_equal(batch.prompts.tail_tokens[0, 1], [3, 5, 1, 6, 4])
    np.testing.assert_array_equal(batch.prompts.tail_lengths[0], [2, 5, 2, 5])
    ids = batch.prompts.row_ids[batch.prompts.prompt_mask]
    assert len(set(ids.ravel().tolist())) == ids.size
    np.testing.assert_array_equal(batch.references.tokens[0, 1], batch.references.tokens[0, 0])
    two_epochs = TrainIterator(source, np.arange(3), num_trunks=4, prompts_per_trunk=4, group_size=2, seed=0)
    both = next(two_epochs).prompts
    ids = both.row_ids[both.prompt_mask]
    assert len(set(ids.ravel().tolist())) == ids.size


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_level(["one and one"], 320)


@pytest.mark.parametrize("name", ["minimal", "v6"])
def test_a_hint_holds_the_references_own_tokens_before_the_thought(tokenizer, name):
    template = make_template(tokenizer, DataConfig(template=name, trunk_length=2048))
    template = dataclasses.replace(template, num_shown=3)
    hidden, shown = template.prompts_of(Task(id=0, cut=9, tokens=[tokenizer.encode(x)[0] for x in "abcd"]))
    assert not hidden.hinted_tail and len(shown.hinted_tail) == template.width
    text = tokenizer.decode(shown.hinted_tail)
    assert "\\boxed{abc}" in text and text.rstrip().endswith("<think>") and text.count("<think>") == 1
    plain = tokenizer.decode(template.tail)
    assert text.startswith(plain[: plain.index("<think>")])


def test_a_questions_trunk_has_both_prompts(tokenizer):
    asked = Question(id="q", messages=(("user", "1 + 1?"),), answers=("2",))
    source, _ = make_question_source([asked], tokenizer, QuestionsConfig(), DataConfig(trunk_length=128))
    source = dataclasses.replace(source, template=dataclasses.replace(source.template, num_shown=source.num_tokens))
    batch = source.make([[0]], prompts_per_trunk=2, group_size=2)
    lengths, tails = batch.prompts.tail_lengths[0], batch.prompts.tail_tokens[0]
    assert "\\boxed{2}" in tokenizer.decode(tails[1][-lengths[1] :])
    assert tokenizer.decode(tails[0][-lengths[0] :]) == "\n<think>\n"


# --- Scores and settings ------------------------------------------------------------------------------------------


def test_scores_never_see_the_hint(tiny_config, tiny_params, letters):
    """The same thoughts behind both prompts of a task have the same scores, those of a batch without hints."""
    template = make_template(letters, DataConfig(template="minimal", trunk_length=64, window_stride=32))
    document = Document(id="d", tokens=np.array(letters.encode("the cat sat on the mat"), np.int32))
    pieces = [letters.token_bytes(i) for i in range(letters.vocab_size)]
    options = dict(trunk_length=32, stride=16, continuation_tokens=2)
    hinted = dataclasses.replace(template, num_shown=1)
    shown, plain = (make_source([document], POSITIONS, t, pieces, **options) for t in (hinted, template))
    both = shown.make([[0]], prompts_per_trunk=2, group_size=1)
    alone = plain.make([[0]], prompts_per_trunk=1, group_size=1)
    thought = letters.encode_continuation("so</think>\\boxed{x}")
    scorer = Scorer(tiny_config, letters, len(template.header), temperature=0.7)
    found = {}
    for name, batch in (("both", both), ("alone", alone)):
        R = batch.prompts.cuts.shape[1]
        rows = jnp.broadcast_to(jnp.asarray(thought), (1, R, len(thought)))
        rollouts = Rollouts(
            tokens=rows, mask=jnp.ones(rows.shape, bool), sampler_logprobs=jnp.zeros(rows.shape),
            truncated=jnp.zeros((1, R), bool), num_rejected=None,
        )  # fmt: skip
        end = len(letters.encode_continuation("so</think>"))
        predictions = Predictions(bytes=None, lengths=None, found=None, think_end_tokens=jnp.full((1, R), end))
        requests = likelihood.of_posterior(RewardConfig(), "documents")
        found[name] = [scorer.score(r, tiny_params, batch, rollouts, predictions).values for r in requests]
    for of_both, of_alone in zip(found["both"], found["alone"], strict=True):
        np.testing.assert_allclose(of_both[0, 0], of_alone[0, 0], rtol=1e-5)
        np.testing.assert_allclose(of_both[0, 1], of_alone[0, 0], rtol=1e-5)
    plain_request = Request(name="own", keep="nothing", target="completion")
    untempered = scorer.score(plain_request, tiny_params, alone, rollouts, predictions).values
    assert float(jnp.abs(untempered - found["alone"][1]).max()) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward.terms": ("ravr", "format")}, "Remove the other terms"),
        ({"rollout.prompts_per_trunk": 3}, "it must be even"),
        ({"rollout.dynamic_sampling_from_step": 0}, "dynamic-sampling-from-step -1"),
        ({"reward.deviation_filter": 0.5}, "deviation-filter 0"),
        ({"positions.selector": "pass_rate_band"}, "another --positions.selector"),
        ({"loss.aggregation": "seq_mean"}, "--loss.aggregation"),
    ],
)
def test_settings_that_part_the_pair_are_refused(changes, message):
    config = with_values(Config(), {"reward.terms": ("ravr",), "rollout.prompts_per_trunk": 2} | changes)
    with pytest.raises(ConfigError, match=message):
        check_rewards(config)
