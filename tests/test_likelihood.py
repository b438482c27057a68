"""Likelihood rewards: exact expectations over every thought of a toy policy, official numbers, and settings."""

import dataclasses
import json
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_system import corpus, tiny_run  # noqa: F401  (a fixture)

from experiments.presets import METHODS, find_preset
from rpt_jax import session
from rpt_jax.config import Config, LikelihoodConfig, LossConfig, RewardConfig
from rpt_jax.errors import ConfigError
from rpt_jax.rewards import likelihood
from rpt_jax.rewards.answer import Predictions
from rpt_jax.rewards.catalog import check_rewards
from rpt_jax.rl.deviation_filter import DeviationFilter
from rpt_jax.rl.objective import _terms
from rpt_jax.rl.rows import policy_rows
from rpt_jax.scoring.requests import Appended, Scores
from rpt_jax.types import Evidence, Experience, Prompts, Rollouts, TaskBatch

G = 2
END, REFERENCE = 4, (1, 3)
# Every thought over {0 .. 3}, ended by END or cut off after three tokens.
THOUGHTS = [(END,), *((a, END) for a in range(4)), *(t for t in product(range(4), range(4), range(5)))]


def bigram(weights, first, tokens):
    """Return the log-probability of tokens after a token of a toy policy: logits depend on the token before."""
    table = jax.nn.log_softmax(weights, axis=-1)
    before = jnp.concatenate([jnp.asarray([first]), jnp.asarray(tokens[:-1], jnp.int32)])
    return table[before, jnp.asarray(tokens)]


def thought_logprob(weights, thought):
    return bigram(weights, 5, thought).sum()


def answer_logprob(weights, thought):
    """The answer's first token depends on the thought's first one, so that thinking matters."""
    return bigram(weights, thought[0], REFERENCE).sum()


WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
IS_CLOSED = np.array([t[-1] == END for t in THOUGHTS])


def experience_of(groups, earn, *, reference: bool, scores=None) -> tuple[Experience, Appended]:
    """Return the experience of groups of thoughts, one per trunk, with their rewards; rows are thought + reference."""
    U, C, A = len(groups), 3, len(REFERENCE)
    tokens, mask = np.zeros((U, G, C), np.int32), np.zeros((U, G, C), bool)
    rows, kept = np.zeros((U, G, C + A), np.int32), np.zeros((U, G), np.int32)
    for (u, g), thought in zip(np.ndindex(U, G), (t for group in groups for t in group), strict=True):
        n = len(thought)
        tokens[u, g, :n], mask[u, g, :n], kept[u, g] = thought, True, n
        rows[u, g, : n + A] = *thought, *REFERENCE
    closed = np.array([[t[-1] == END for t in group] for group in groups])
    prompts = Prompts(
        trunk_tokens=np.full((U, 1), 5), trunk_lengths=np.ones(U, np.int32), cuts=np.ones((U, 1), np.int32),
        tail_tokens=np.zeros((U, 1, 1), np.int32), tail_lengths=np.ones((U, 1), np.int32),
        prompt_mask=np.ones((U, 1), bool), row_ids=np.arange(U * G).reshape(U, 1, G),
    )  # fmt: skip
    rollouts = Rollouts(
        tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), sampler_logprobs=jnp.zeros((U, G, C)),
        truncated=jnp.asarray(~closed), num_rejected=jnp.zeros((U, G), np.int32),
    )  # fmt: skip
    predictions = Predictions(
        bytes=jnp.zeros((U, G, 1), np.uint8), lengths=jnp.ones((U, G), np.int32), found=jnp.asarray(closed),
        think_end_tokens=jnp.asarray(np.where(closed, kept, 0)),
    )  # fmt: skip
    tasks = TaskBatch(prompts=prompts, references=None)
    evidence = Evidence(tasks=tasks, rollouts=rollouts, predictions=predictions, unescaped=None, scores=scores)
    earned = earn(evidence)
    experience = Experience(
        tasks=tasks, rollouts=rollouts, predictions=predictions, earned=earned, group_mask=jnp.ones((U, 1), bool),
        tokens_scored=None,
    )  # fmt: skip
    places = np.arange(C + A)
    appended = Appended(
        tokens=jnp.asarray(rows), mask=jnp.asarray(places < kept[..., None] + A), kept=jnp.asarray(kept),
        first=jnp.asarray(kept),
    )  # fmt: skip
    return experience, appended if reference else None


def row_logprobs(weights, groups, appended):
    """Return the toy policy's log-probability of every token of the rows, f32 [U, G, T]."""

    def of(thought):
        parts = bigram(weights, 5, thought)
        if appended is not None:
            parts = jnp.concatenate([parts, bigram(weights, thought[0], REFERENCE)])
        return jnp.pad(parts, (0, 3 + len(REFERENCE) * (appended is not None) - len(parts)))

    unique = {t: i for i, t in enumerate(THOUGHTS)}
    table = jnp.stack([of(t) for t in THOUGHTS])
    return table[jnp.asarray([[unique[t] for t in group] for group in groups])]


def scores_of(weights, groups) -> Scores:
    values = jnp.stack([bigram(weights, t[0], REFERENCE) for t in THOUGHTS])
    numbers = jnp.asarray([[THOUGHTS.index(t) for t in group] for group in groups])
    return Scores(values=values[numbers], mask=jnp.ones((len(groups), G, 2), bool), tokens_run=None)


GROUPS = [pair for pair in product(THOUGHTS, THOUGHTS)]


def expected_gradient(earn, loss: LossConfig, *, scores, reference=True):
    """Return the exact expectation of the update's direction: the sum over all groups of thoughts, with their chances.

    In units of a token's term of one rollout, so that it is a sum over the tokens of all G rollouts.
    """
    experience, appended = experience_of(GROUPS, earn, reference=reference, scores=scores)
    rows = policy_rows(experience, appended, loss=loss, temperature=1.0, header_length=0)
    chance = jnp.exp(jnp.asarray([[thought_logprob(WEIGHTS, t) for t in THOUGHTS]])[0])
    pairs = (chance[:, None] * chance[None, :]).reshape(-1)
    scale = len(GROUPS) * G * 3  # constant: 1 / (rollouts * C)

    def total(weights):
        logprobs = row_logprobs(weights, GROUPS, appended)
        bare = dataclasses.replace(rows, sequences=None, trunk_weights=None)
        terms = _terms(loss, logprobs, (rows.sequences.branch_mask, bare))
        return -scale * jnp.sum(pairs[:, None, None] * terms)

    return jax.grad(total)(WEIGHTS)


def probability(weights):
    """Return J = E_z[p(y | z)], with 0 for thoughts that are cut off."""
    return sum(
        jnp.exp(thought_logprob(weights, t) + answer_logprob(weights, t))
        for t, closed in zip(THOUGHTS, IS_CLOSED, strict=True)
        if closed
    )


CONSTANT = LossConfig(advantage="rloo", aggregation="constant")


def test_every_thought_is_counted():
    assert sum(float(jnp.exp(thought_logprob(WEIGHTS, t))) for t in THOUGHTS) == pytest.approx(1, abs=1e-5)


def test_verifree_is_the_gradient_of_the_references_probability():
    scores = {"after_thought": scores_of(WEIGHTS, GROUPS)}
    found = expected_gradient(likelihood.verifree, CONSTANT, scores=scores)
    exact = jax.grad(probability)(WEIGHTS)
    np.testing.assert_allclose(found, G * exact, atol=1e-5)
    # The group's mean as baseline shrinks the thought's part, and only that, by 1 - 1/G.
    found = expected_gradient(likelihood.verifree, dataclasses.replace(CONSTANT, advantage="mean"), scores=scores)

    def parts(weights, fixed):
        both = [
            (thought_logprob(w, t) + answer_logprob(v, t))
            for t, closed in zip(THOUGHTS, IS_CLOSED, strict=True) if closed
            for w, v in ((weights, fixed),)
        ]  # fmt: skip
        return sum(jnp.exp(x) for x in both)

    of_thought, of_answer = jax.grad(parts)(WEIGHTS, WEIGHTS), jax.grad(parts, argnums=1)(WEIGHTS, WEIGHTS)
    np.testing.assert_allclose(found, (G - 1) * of_thought + G * of_answer, atol=1e-5)


def test_the_sampled_estimate_of_verifree_is_unbiased():
    """A million groups, drawn by their chances; one direction of the gradient."""
    experience, appended = experience_of(GROUPS, likelihood.verifree, reference=True,
                                         scores={"after_thought": scores_of(WEIGHTS, GROUPS)})  # fmt: skip
    rows = policy_rows(experience, appended, loss=CONSTANT, temperature=1.0, header_length=0)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=WEIGHTS.shape), jnp.float32)
    _, slopes = jax.jvp(lambda w: row_logprobs(w, GROUPS, appended), (WEIGHTS,), (direction,))
    weights = rows.policy_weights * rows.advantages + rows.likelihood_weights
    each = np.asarray((weights * slopes).sum((1, 2))) * len(GROUPS) * 3
    chance = np.exp([float(thought_logprob(WEIGHTS, t)) for t in THOUGHTS])
    pairs = np.outer(chance, chance).reshape(-1)
    drawn = np.random.default_rng(2).choice(each, size=10**6, p=pairs / pairs.sum())
    exact = float(jnp.vdot(jax.grad(probability)(WEIGHTS), direction))
    assert abs(drawn.mean() - exact) < 3 * drawn.std() / 1000


def test_information_gain_is_the_score_function_gradient_of_the_gain():
    average = Scores(
        values=jnp.broadcast_to(jnp.asarray([-1.0, -0.5]), (len(GROUPS), G, 2)),
        mask=jnp.ones((len(GROUPS), G, 2), bool), tokens_run=None,
    )  # fmt: skip
    scores = {"after_thought": scores_of(WEIGHTS, GROUPS), "average_direct": average}
    loss = dataclasses.replace(CONSTANT, advantage="mean")
    found = expected_gradient(likelihood.information_gain, loss, scores=scores, reference=False)
    gains = [float(answer_logprob(WEIGHTS, t)) + 1.5 for t in THOUGHTS]

    def expected_gain(weights):
        return sum(jnp.exp(thought_logprob(weights, t)) * gain for t, gain in zip(THOUGHTS, gains, strict=True))

    np.testing.assert_allclose(found, (G - 1) * jax.grad(expected_gain)(WEIGHTS), atol=1e-5)


def test_jepo_is_the_gradient_of_its_bound():
    """E over groups of log mean_i p(y | z_i), summed over all pairs of thoughts."""
    options = RewardConfig(likelihood=LikelihoodConfig(reference_term="jepo"))
    scores = {"after_thought": scores_of(WEIGHTS, GROUPS)}
    earn = partial(likelihood.likelihood, options=options)
    found = expected_gradient(earn, CONSTANT, scores=scores)

    def bound(weights):
        thoughts = jnp.stack([thought_logprob(weights, t) for t in THOUGHTS])
        answers = jnp.stack([answer_logprob(weights, t) for t in THOUGHTS])
        mean = jnp.logaddexp(answers[:, None], answers[None, :]) - jnp.log(2.0)
        return jnp.sum(jnp.exp(thoughts[:, None] + thoughts[None, :]) * mean)

    np.testing.assert_allclose(found, jax.grad(bound)(WEIGHTS), atol=1e-5)


def test_std_normalised_advantages_are_their_stated_surrogate():
    """Not a gradient of anything simple: the sum over pairs of A_i grad log p(z_i), with A_i = +-1 or 0 for G = 2."""
    scores = {"after_thought": scores_of(WEIGHTS, GROUPS)}
    earn = partial(likelihood.likelihood, options=RewardConfig())
    found = expected_gradient(
        earn, LossConfig(advantage="grpo", aggregation="constant"), scores=scores, reference=False
    )
    slopes = np.stack([jax.grad(thought_logprob)(WEIGHTS, t) for t in THOUGHTS])
    chance = np.exp([float(thought_logprob(WEIGHTS, t)) for t in THOUGHTS])
    rewards = np.array([float(answer_logprob(WEIGHTS, t)) for t in THOUGHTS])
    # (r - mean) / deviation of two rewards is the sign of their difference, up to 1e-6 / deviation.
    gap = (rewards[:, None] - rewards[None, :]) / 2
    signs = gap / (np.abs(gap) + 1e-6)
    exact = 2 * np.einsum("ij,i,j,ikl->kl", signs, chance, chance, slopes)
    np.testing.assert_allclose(found, exact, atol=1e-5)


# --- Official numbers ---------------------------------------------------------------------------------------------

VECTORS = Path(__file__).parent / "golden" / "vectors.json"
CASES = next(e for e in json.loads(VECTORS.read_text()) if e["name"] == "verifree.loss_and_gradients")["cases"]


@pytest.mark.parametrize("case", CASES)
def test_verifrees_loss_and_gradients(case):
    """sail-sg/VeriFree sums over tokens and takes the mean over samples: our `constant`, times C."""
    inputs, outputs = case["inputs"], case["outputs"]
    thoughts, answers, size = inputs["think_logprobs"], inputs["answer_logprobs"], inputs["group_size"]
    U, C, A = len(thoughts) // size, max(map(len, thoughts)), max(1, *map(len, answers))

    def padded(rows, width):
        return np.array([[*row, *[0.0] * (width - len(row))] for row in rows], np.float32)

    def lengths(rows):
        return np.array([len(row) for row in rows]).reshape(U, size)

    mask = np.arange(C) < lengths(thoughts)[..., None]
    scores = Scores(
        values=jnp.asarray(padded(answers, A)).reshape(U, size, A),
        mask=jnp.asarray(np.arange(A) < lengths(answers)[..., None]), tokens_run=None,
    )  # fmt: skip
    rollouts = Rollouts(
        tokens=jnp.zeros((U, size, C), np.int32), mask=jnp.asarray(mask), sampler_logprobs=jnp.zeros((U, size, C)),
        truncated=jnp.asarray(inputs["truncated"]).reshape(U, size), num_rejected=None,
    )  # fmt: skip
    prompts = Prompts(
        trunk_tokens=np.zeros((U, 1)), trunk_lengths=np.ones(U), cuts=np.ones((U, 1)), tail_tokens=np.zeros((U, 1, 1)),
        tail_lengths=np.ones((U, 1)), prompt_mask=np.ones((U, 1), bool), row_ids=np.zeros((U, 1, size)),
    )  # fmt: skip
    predictions = Predictions(
        bytes=None, lengths=None, found=None,
        think_end_tokens=jnp.asarray(lengths(thoughts) * ~np.array(inputs["truncated"]).reshape(U, size)),
    )  # fmt: skip
    tasks = TaskBatch(prompts=prompts, references=None)
    evidence = Evidence(
        tasks=tasks, rollouts=rollouts, predictions=predictions, unescaped=None, scores={"after_thought": scores}
    )
    measure = {"p": "probability", "logp": "log"}[inputs["reward_source"]]
    term = {"reward": "reward", "1": "one", "adv": "advantage"}[str(inputs["answer_weight"])]
    if (measure, term) == ("probability", "reward"):
        earned = likelihood.verifree(evidence)
    else:
        settings = RewardConfig(likelihood=LikelihoodConfig(measure=measure, reference_term=term))
        earned = likelihood.likelihood(evidence, settings)
    np.testing.assert_allclose(np.ravel(earned.rewards), outputs["reward"], rtol=2e-5)
    experience = Experience(
        tasks=tasks, rollouts=rollouts, predictions=predictions, earned=earned, group_mask=jnp.ones((U, 1), bool),
        tokens_scored=None,
    )  # fmt: skip
    kept = lengths(thoughts)
    appended = Appended(
        tokens=jnp.zeros((U, size, C + A), np.int32), kept=jnp.asarray(kept), first=jnp.asarray(kept),
        mask=jnp.asarray(np.arange(C + A) < (kept + lengths(answers))[..., None]),
    )  # fmt: skip
    rows = policy_rows(experience, appended, loss=CONSTANT, temperature=1.0, header_length=0)
    joined = [thought + answer for thought, answer in zip(thoughts, answers, strict=True)]
    bare = dataclasses.replace(rows, sequences=None, trunk_weights=None)

    def loss(logprobs):
        return C * jnp.sum(_terms(CONSTANT, logprobs, (rows.sequences.branch_mask, bare)))

    slopes = jax.grad(loss)(jnp.asarray(padded(joined, C + A)).reshape(U, size, C + A)).reshape(-1, C + A)
    for row, thought, of_thought, of_answer in zip(
        slopes, thoughts, outputs["grad_think_logprobs"], outputs["grad_answer_logprobs"], strict=True
    ):
        n = len(thought)
        np.testing.assert_allclose(row[:n], of_thought, rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(row[n : n + len(of_answer)], of_answer, rtol=2e-5, atol=1e-7)
        assert not np.any(row[n + len(of_answer) :])


def test_the_deviation_filter_goes_on_from_its_state():
    whole, deviations = DeviationFilter(0.5), np.linspace(0.1, 0.4, 20)
    for deviation in deviations:
        whole.observe(deviation)
    for stop in (3, 8, 10, 15):
        first, second = DeviationFilter(0.5), DeviationFilter(0.5)
        for deviation in deviations[:stop]:
            first.observe(deviation)
        second.set_state(json.loads(json.dumps(first.get_state())))
        for deviation in deviations[stop:]:
            second.observe(deviation)
        assert second.bound == whole.bound > 0


# --- Settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "loss", "message"),
    [
        ({"terms": ("verifree",)}, {"advantage": "rloo", "aggregation": "seq_mean"}, "--loss.aggregation constant"),
        ({"terms": ("verifree",)}, {"advantage": "grpo"}, "--loss.advantage rloo"),
        ({"terms": ("kimi_length", "prefix")}, {}, "an outcome must come first"),
        ({"terms": ("rlpr",), "likelihood": LikelihoodConfig(rlpr_shaping="sigmoid_6")}, {}, "rlpr-shaping"),
        ({"terms": ("ttrl",), "vote_train": 9}, {}, "Lower --reward.vote-train"),
    ],
)  # fmt: skip
def test_settings_that_contradict_the_method_are_refused(reward, loss, message):
    config = Config(reward=RewardConfig(**reward), loss=LossConfig(**loss))
    with pytest.raises(ConfigError, match=message):
        check_rewards(config)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "rubric"])
def test_a_method_runs_on_the_quickstarts_puzzles(method, corpus, tmp_path):  # noqa: F811
    """Two steps through sampling, scoring and update; the reward and the reference's term are logged and finite."""
    config = find_preset(f"tiny_worked+{method}")[1]
    small = tiny_run(corpus, tmp_path / "run")
    if method == "ravr":
        small = dataclasses.replace(
            small, rollout=dataclasses.replace(small.rollout, num_trunks=4, prompts_per_trunk=2)
        )
    config = dataclasses.replace(
        small, reward=config.reward, loss=config.loss, companion=config.companion,
        run=dataclasses.replace(small.run, num_steps=2, control=False),
        eval=dataclasses.replace(small.eval, every_steps=2, num_samples=2),
    )  # fmt: skip
    session.run(config)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["stage"] == "rpt"]
    assert len(steps) == 2 and not any(r["skipped"] for r in steps)
    assert all(np.isfinite(r["reward"]) and np.isfinite(r["loss"]) for r in steps)
    # Tokens that were not sampled are no mismatch.
    assert all(r["sampler_mismatch_max"] < 1e-3 for r in steps if r["rows_left_out_fraction"] < 1)
    if method == "verifree":
        assert all(r["completion_loss"] > 0 for r in steps)
