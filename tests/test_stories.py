"""Stories by criteria, and the rewards of judges: choices among candidates, evidence."""

import dataclasses
import json
import random
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.presets import TINY_WORKED
from experiments.studies import stories as study
from rpt_jax.config import LikelihoodConfig, LossConfig, RewardConfig
from rpt_jax.config.schema import with_values
from rpt_jax.data.examples import read_examples
from rpt_jax.data.stories import _example, criteria_met, make_story, make_tokenizer
from rpt_jax.data.templates import Template
from rpt_jax.errors import ConfigError, DataError
from rpt_jax.rewards import likelihood
from rpt_jax.rewards.answer import Predictions
from rpt_jax.rewards.catalog import check_rewards
from rpt_jax.rl.rows import policy_rows
from rpt_jax.scoring.requests import Scorer, Scores
from rpt_jax.sequences import Task, build_tasks
from rpt_jax.train.stages.supervised import make_batch, make_packed_batch
from rpt_jax.types import Earned, Evidence, Experience, Rollouts

GOOD = (
    "</think>\nTitle: The zoo.\nBeginning: It can be loud at the zoo.\nMiddle: I can wait. Some days there is a line.\n"
    "End: My class likes the zoo."
)


@pytest.mark.parametrize(
    ("story", "met"),
    [
        (GOOD, (1, 1, 1, 1)),
        (GOOD.replace("End:", ""), (0, 1, 1, 1)),
        (GOOD.replace("Title: The zoo.\n", "").replace("End:", "Title: The zoo.\nEnd:"), (0, 1, 1, 1)),
        (GOOD.replace("Some days there is a line.", "I can wait. I can wait."), (1, 0, 1, 1)),
        (GOOD.replace("I can wait", "You can wait"), (1, 1, 0, 1)),
        (GOOD.replace("I can wait", "I must not run"), (1, 1, 1, 0)),
        ("</think>", (0, 0, 0, 0)),
    ],
)
def test_criteria_by_hand(story, met):
    assert criteria_met(story) == tuple(map(bool, met))


def test_stories_meet_each_criterion_half_of_the_time_and_have_a_closed_vocabulary():
    rng, tokenizer = random.Random(0), make_tokenizer()
    stories = [make_story(rng, "zoo", "my class") for _ in range(600)]
    assert all(tokenizer.decode(tokenizer.encode(s)) == s and 1 not in tokenizer.encode(s) for s in stories)
    shares = np.mean([criteria_met(s) for s in stories], axis=0)
    assert (shares > 0.4).all() and (shares < 0.7).all()


# --- Examples that are given in part ------------------------------------------------------------------------------


def test_a_judge_learns_its_label_and_not_the_text(tmp_path):
    tokenizer, rng = make_tokenizer(), random.Random(0)
    template = Template(header=np.zeros(0, np.int32), tail=np.array(tokenizer.encode("<think>"), np.int32))
    lines = []
    for kind in ("score", "story"):
        completion, given = _example(rng, kind, tokenizer, "zoo", "my class")
        lines.append({
            "trunk_tokens": tokenizer.encode(" zoo"), "completion_tokens": completion, "given_tokens": given,
            "tokenizer": tokenizer.fingerprint, "template": template.fingerprint,
        })  # fmt: skip
    path = tmp_path / "judge.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = with_values(TINY_WORKED, {"rollout.max_completion_tokens": 96})
    examples = read_examples(str(path), tokenizer, template, config)
    learned = [2, len(lines[1]["completion_tokens"])]  # the digit and the end; the whole story
    rows = make_batch(examples, config, template.tail)
    np.testing.assert_array_equal((rows.likelihood_weights[:, 0] > 0).sum(-1), learned)
    assert rows.likelihood_weights.sum() == pytest.approx(1)
    places = np.flatnonzero(rows.likelihood_weights[0, 0])
    assert tokenizer.decode([rows.sequences.branch_tokens[0, 0, places[0]]]) in "12345"
    following = iter(examples * 3)
    packed, taken, _ = make_packed_batch(lambda: next(following), 1, config, template.tail)
    assert taken == 3 and (packed.trunk_weights > 0).sum() == sum(learned) + 2
    assert packed.trunk_weights.sum() == pytest.approx(1)
    path.write_text(json.dumps(lines[0] | {"given_tokens": len(lines[0]["completion_tokens"])}) + "\n")
    with pytest.raises(DataError, match="given_tokens"):
        read_examples(str(path), tokenizer, template, config)


# --- Candidates ---------------------------------------------------------------------------------------------------

G = 4


def chosen_by(quality_G, place_bias: float, num_rivals: int) -> dict[str, Scores]:
    """A judge whose log-odds for the first text of a pair are the difference in quality, plus a liking for a place."""
    found = {}
    for distance in range(1, num_rivals + 1):
        for rival in (distance, -distance):
            odds = quality_G - np.roll(quality_G, -rival) + place_bias
            logprobs = np.stack([-np.logaddexp(0, -odds), -np.logaddexp(0, odds)], -1)[None] - 0.1
            found[f"choice{rival:+d}"] = Scores(values=jnp.asarray(logprobs), mask=None, tokens_run=None)
    return found


def evidence_of(scores) -> Evidence:
    tasks = SimpleNamespace(
        prompts=SimpleNamespace(row_ids=np.zeros((1, 1, G))), references=SimpleNamespace(task_ids=None)
    )
    rollouts = SimpleNamespace(tokens=np.zeros((1, G, 3)), mask=jnp.ones((1, G, 3), bool))
    predictions = SimpleNamespace(think_end_tokens=jnp.ones((1, G), np.int32))
    return Evidence(tasks=tasks, rollouts=rollouts, predictions=predictions, unescaped=None, scores=scores)


@pytest.mark.parametrize("num_rivals", [1, 2, 3])
def test_choices_in_both_orders_rank_candidates_whatever_the_judge_likes_about_a_place(num_rivals):
    quality = np.array([0.3, -1.0, 2.0, 0.5])
    options = RewardConfig(likelihood=LikelihoodConfig(num_rivals=num_rivals))
    earned = likelihood.candidate_choice(evidence_of(chosen_by(quality, 0.0, num_rivals)), options)
    rewards = np.asarray(earned.rewards)[0, 0]
    for g in range(G):
        odds = [quality[g] - quality[(g + r) % G] for d in range(1, num_rivals + 1) for r in (d, -d)]
        assert rewards[g] == pytest.approx(np.mean(1 / (1 + np.exp(-np.array(odds)))), abs=1e-6)
    assert rewards.mean() == pytest.approx(0.5, abs=1e-6)
    biased = likelihood.candidate_choice(evidence_of(chosen_by(quality, 1.5, num_rivals)), options)
    # Bias costs contrast, not order, and every pair still shares one win.
    assert np.asarray(biased.rewards).mean() == pytest.approx(0.5, abs=1e-6)
    np.testing.assert_array_equal(np.argsort(biased.rewards[0, 0]), np.argsort(rewards))
    assert float(biased.metrics["first_chosen"].mean()) > 0.65 > float(earned.metrics["first_chosen"].mean())
    np.testing.assert_allclose(earned.metrics["digit_probability"], np.exp(-0.1), rtol=1e-5)


def test_the_ranking_loss_teaches_what_the_rubric_says():
    likely = np.log(np.array([0.2, 0.8, 0.8, 0.1]))
    scores = chosen_by(np.zeros(G), 0.0, 1) | {
        "rubric": Scores(values=jnp.asarray(likely)[None, :, None], mask=jnp.ones((1, G, 1), bool), tokens_run=None)
    }
    options = RewardConfig(likelihood=LikelihoodConfig(judge="current", ranking_loss=0.5))
    earned = likelihood.candidate_choice(evidence_of(scores), options)
    # Of the pairs (0, 1), (1, 2), (2, 3), (3, 0): the second, a tie, the first, the second.
    assert np.asarray(earned.choices)[0, 0].tolist() == [1, 0, 0, 1]
    assert np.asarray(earned.reference_weights)[0, 0].tolist() == [0.5, 0.0, 0.5, 0.5]


def test_evidence_counts_by_what_the_text_adds():
    def of(values):
        return Scores(values=jnp.asarray(values)[None], mask=jnp.ones((1, G, 2), bool), tokens_run=None)

    with_text = np.log([[0.9, 0.4], [0.5, 0.5], [0.1, 0.1], [1.0, 1.0]])
    earned = likelihood.fact(evidence_of({"evidence": of(with_text), "evidence_alone": of(np.log([[0.5, 0.5]] * G))}))
    np.testing.assert_allclose(earned.rewards[0, 0], [0.6 - 0.5, 0.0, 0.1 - 0.5, 0.5], atol=1e-6)


def test_a_row_holds_both_texts_and_learns_the_number_of_the_better_one(tiny_config):
    """Own text with its end, the mark, the rival without its end, the question, the digit; terms where they belong."""
    tokenizer = make_tokenizer()
    texts = [("</think> wait", "</think> say hello", "</think> run"), ("</think> sit", "</think> wait", "</think>")]
    C, U, M, G = 6, 1, 2, 3
    tokens, mask = np.zeros((U, M * G, C), np.int32), np.zeros((U, M * G, C), bool)
    for r, text in enumerate(t for group in texts for t in group):
        ids = [*tokenizer.encode(text), *([tokenizer.eos_id] if r != 1 else [])]
        tokens[0, r, : len(ids)], mask[0, r, : len(ids)] = ids, True
    rollouts = Rollouts(
        tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), sampler_logprobs=jnp.where(mask, -1.0, 0.0),
        truncated=jnp.asarray([[False, True, *[False] * 4]]), num_rejected=None,
    )  # fmt: skip
    trunk = (np.array(tokenizer.encode(" zoo")), [Task(id=i, cut=1, tokens=[2]) for i in range(2)])
    row_ids = np.arange(6, dtype=np.int32).reshape(1, 2, 3)
    tasks = build_tasks([trunk], tail=tokenizer.encode("<think>"), row_ids=row_ids, trunk_length=4)
    predictions = Predictions(bytes=None, lengths=None, found=None, think_end_tokens=jnp.ones((1, 6), np.int32))
    config = dataclasses.replace(tiny_config, vocab_size=tokenizer.vocab_size)
    scorer, options = Scorer(config, tokenizer, 0), RewardConfig(likelihood=LikelihoodConfig(judge="current"))
    request = likelihood.choices_of_pairs(options, "questions")[0]
    choices = jnp.asarray([[[0, 1, 0], [1, 1, 0]]])
    appended = scorer.append(request, tasks, rollouts, predictions, choices)
    assert appended.tokens.shape[-1] == scorer.row_width(request, C, 8)
    read = tokenizer.decode
    flat = [t for group in texts for t in group]
    for r in range(6):
        row = appended.tokens[0, r][appended.mask[0, r]].tolist()
        rival = flat[r // 3 * 3 + (r + 1) % 3]
        own_end = [] if r == 1 else [tokenizer.eos_id]
        want = [*tokenizer.encode(flat[r]), *own_end, *tokenizer.encode(f"\n\nAnother text: {rival}")]
        want += tokenizer.encode("\n\nThe better one (1 or 2): ") + tokenizer.encode("12"[int(choices.ravel()[r])])
        assert row == want, (read(row), read(want))
    earned = Earned(
        rewards=jnp.asarray([[[1.0, 0, 0], [0, 1, 0]]]), faults=jnp.zeros((1, 2, 3), bool), metrics={},
        choices=choices, reference_weights=jnp.asarray([[[1.0, 0, 1], [1, 1, 0]]]),
    )  # fmt: skip
    experience = Experience(
        tasks=tasks, rollouts=rollouts, predictions=predictions, earned=earned, group_mask=jnp.ones((1, 2), bool),
        tokens_scored=None,
    )  # fmt: skip
    loss = LossConfig(aggregation="token_mean")
    rows = policy_rows(experience, appended, loss=loss, temperature=0.7, header_length=0)
    # Policy terms on the sampled tokens, their end included, at the rollouts' temperature; one on the digit, at 1.
    np.testing.assert_array_equal((rows.policy_weights != 0).sum(-1), mask.sum(-1))
    np.testing.assert_array_equal(rows.policy_weights[..., :C] != 0, mask)
    np.testing.assert_array_equal((rows.likelihood_weights != 0).sum(-1), [[1, 0, 1, 1, 1, 0]])
    assert np.unique(np.asarray(rows.temperature)[np.asarray(rows.likelihood_weights) != 0]).tolist() == [1.0]
    assert rows.likelihood_weights.max() == pytest.approx(float(rows.policy_weights.max()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward.likelihood.ranking_loss": 1.0}, "--reward.likelihood.judge current"),
        ({"reward.likelihood.num_rivals": 8}, "num-rivals"),
        ({"reward.terms": ("rubric",), "reward.likelihood.ranking_loss": 1.0}, "add candidate_choice"),
        ({"reward.terms": ("candidate_choice", "verifree"), "reward.likelihood.ranking_loss": 1.0}, "Remove one"),
    ],
)
def test_settings_that_contradict_candidate_choice_are_refused(changes, message):
    config = with_values(TINY_WORKED, {"questions.path": "q", "reward.terms": ("candidate_choice",)} | changes)
    with pytest.raises(ConfigError, match=message):
        check_rewards(config)


# --- The study ----------------------------------------------------------------------------------------------------


def test_rank_correlation_by_hand():
    # Ranks (1, 2.5, 2.5, 4) and (2, 1, 3, 4): covariance 3, deviations sqrt(4.5) and sqrt(5).
    got = study.rank_correlation(np.array([1.0, 2, 2, 5]), np.array([0.3, 0.1, 0.7, 0.9]))
    assert got == pytest.approx(3 / np.sqrt(4.5 * 5))
    assert study.rank_correlation(np.ones(3), np.arange(3.0)) == 0


def test_the_study_runs_each_arm_from_one_start(tmp_path):
    """Two steps of two arms: the policy's own judge learns only with a ranking loss."""
    small = {
        "run.num_steps": 2, "run.control": False, "run.tensorboard": False, "supervised.num_steps": 2,
        "supervised.batch_size": 8, "rollout.num_trunks": 4, "rollout.group_size": 4,
        "rollout.max_completion_tokens": 24, "eval.every_steps": 2, "eval.num_positions": 4,
        "eval.final_num_positions": 4, "eval.num_samples": 2, "eval.batch_trunks": 4, "model.num_layers": 2,
        "model.width": 32, "model.mlp_width": 48, "model.num_heads": 2, "model.num_kv_heads": 2,
        "model.head_size": 16, "mesh.microbatch_trunks": 4, "run.directory": str(tmp_path),
    }  # fmt: skip
    config = study.warm_start(with_values(TINY_WORKED, small), tmp_path)
    found = {"0": {arm: study.run_arm(config, tmp_path, arm) for arm in ("rubric", "candidate_choice")}}
    for arm, result in found["0"].items():
        assert result["step"] == [0, 2] and len(result["points"]) == 2
        records = [json.loads(line) for line in (tmp_path / arm / "metrics.jsonl").read_text().splitlines()]
        steps = [r for r in records if r["stage"] == "rpt"]
        assert all(np.isfinite(r["loss"]) and not r["skipped"] for r in steps)
        assert ("completion_loss" in steps[0]) == (arm == "candidate_choice")
    assert study.table(found).count("\n") == 3 and "rubric" in study.correlations(found)
