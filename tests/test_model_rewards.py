"""Rewards by trained models: scores against the model run alone, advantages per step, PROF, other tokenizers."""

import dataclasses
import json

import numpy as np
import pytest
from test_system import corpus, evaluated_at_the_ends, tiny_run  # noqa: F401  (a fixture)

from rpt_jax.config.schema import with_values
from rpt_jax.data.batches import TrainIterator
from rpt_jax.data.graded import Graded
from rpt_jax.errors import ConfigError
from rpt_jax.models.scalar_head import READOUT
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.reward_models.process import step_advantages
from rpt_jax.rewards.base import earn
from rpt_jax.rewards.catalog import check_rewards
from rpt_jax.rl.rows import policy_rows
from rpt_jax.scoring.companions import CURRENT
from rpt_jax.tokenizer import word_level
from rpt_jax.tokenizer.steps import StepRule
from rpt_jax.train import pipeline
from rpt_jax.train.policies import load_reward_model
from rpt_jax.train.run import prepare
from rpt_jax.train.run_directory import read_records
from rpt_jax.train.stages.reward_model import scores_of
from rpt_jax.train.stages.rl import make_trainer

pytestmark = pytest.mark.usefixtures("few_programs")


@pytest.fixture(scope="module")
def models(corpus, tmp_path_factory):  # noqa: F811
    """An outcome and a process model, trained for two updates from the policy of a run; and the run's config."""
    home = tmp_path_factory.mktemp("models")
    base = with_values(evaluated_at_the_ends(tiny_run(corpus, home / "policy")), {"run.control": False})
    start = with_values(base, {"run.num_steps": 0})
    run = pipeline.run_stages(start)
    names = {"tokenizer": run.tokenizer.fingerprint, "template": run.template.fingerprint}
    rng = np.random.default_rng(0)
    lines = [
        {
            "trunk_tokens": rng.integers(2, 90, 9).tolist(), "completion_tokens": rng.integers(2, 90, 8).tolist(),
            "label": float(i % 2), "places": [2, 7], "labels": [1.0, float(i % 2)],
        } | names
        for i in range(16)
    ]  # fmt: skip
    (home / "graded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for objective in ("outcome", "process"):
        own = {
            "run.directory": str(home / objective), "policy.path": str(home / "policy"),
            "supervised.objective": objective, "supervised.path": str(home / "graded.jsonl"), "supervised.num_steps": 2,
            "steps.delimiter": ",", "supervised.optimizer.learning_rate": 0.02,
        }  # fmt: skip
        pipeline.run_stages(with_values(start, own))
    from_policy = {"policy.path": str(home / "policy"), "supervised.num_steps": 0, "supervised.path": ""}
    return with_values(base, from_policy | {"run.num_steps": 2}), home


BOTH = ("prefix", "0.5*reward_model", "0.25*process_model")


def with_models(models, directory, terms=BOTH, **values):
    config, home = models
    paths = {"reward_model": ("path", "outcome"), "process_model": ("process_path", "process")}
    named = {f"reward.models.{field}": str(home / name) for term, (field, name) in paths.items() if term in str(terms)}
    return with_values(config, {"run.directory": str(directory), "reward.terms": terms} | named | values)


def rollouts_of(config):
    """One batch of rollouts with its evidence, and the run."""
    run = prepare(config)
    params = run.start_params()
    tasks = run.domain.training_tasks(run, params)
    trainer, state = make_trainer(run, params, tasks)
    r = config.rollout
    batches = TrainIterator(
        tasks.source, tasks.ids, num_trunks=r.num_trunks, prompts_per_trunk=r.prompts_per_trunk,
        group_size=r.group_size, seed=0,
    )  # fmt: skip
    batch = shard_batch(run.mesh, next(batches))
    return run, trainer, trainer.roll_out(trainer.policies(state), 0, batch, 0)


def test_scores_are_those_of_the_model_alone(models, tmp_path):
    """Each completion scored by itself, in probabilities, at its last token and at the ends of its steps."""
    config = with_models(models, tmp_path / "run")
    run, trainer, experience = rollouts_of(config)
    evidence, earned, tokens = earn(trainer.reward, {CURRENT: None}, experience.tasks, experience.rollouts)
    tasks, rollouts, scores = to_host((experience.tasks, experience.rollouts, evidence.scores))
    rule = StepRule(dataclasses.replace(config.steps, delimiter=","), run.tokenizer)
    G = tasks.prompts.row_ids.shape[2]
    expected_run = 0
    for u, m in zip(*np.nonzero(tasks.prompts.prompt_mask), strict=True):
        for g in range(G):
            r = m * G + g
            tokens_of = rollouts.tokens[u, r][rollouts.mask[u, r]].tolist()
            expected_run += len(tokens_of)
            trunk = tasks.prompts.trunk_tokens[u, : tasks.prompts.cuts[u, m]].tolist()
            for name, places in (("reward_model", [len(tokens_of) - 1]), ("process_model", rule.ends(tokens_of))):
                model = run.reward_models[name]
                example = Graded(
                    trunk=trunk, completions=[tokens_of], places=[places], labels=[[0.0] * len(places)], record={}
                )
                tail = tasks.prompts.tail_tokens[u, m]
                (of,) = scores_of(model.config, model.params, [example], tail, config, run.mesh, batch_size=1)
                probabilities = 1 / (1 + np.exp(-np.array(of[0])))
                found = scores[name].values[u, r][scores[name].mask[u, r]]
                np.testing.assert_allclose(found, probabilities, atol=1e-5)
                if name == "process_model":
                    assert np.flatnonzero(scores[name].mask[u, r]).tolist() == places
                    whole = earned.metrics[f"reward/{name}/score"][u, m, g]
                    np.testing.assert_allclose(whole, probabilities.min(), atol=1e-5)
            total = 0.5 * earned.metrics["reward/reward_model"] + 0.25 * earned.metrics["reward/process_model"]
            np.testing.assert_allclose(earned.rewards, earned.metrics["reward/prefix"] + total, atol=1e-6)
    stems = tasks.prompts.trunk_lengths + (tasks.prompts.prompt_mask * tasks.prompts.tail_lengths).sum(1)
    assert tokens.sum() == 2 * (expected_run + stems[tasks.prompts.prompt_mask.any(1)].sum())
    assert all(READOUT in model.params for model in run.reward_models.values())


def test_advantages_per_step_are_added_to_the_outcomes(models, tmp_path):
    terms = ("prefix", "0.25*process_model")
    config = with_models(models, tmp_path / "run", terms, **{"reward.models.process_use": "steps"})
    _, trainer, experience = rollouts_of(config)
    evidence, earned, _ = earn(trainer.reward, {CURRENT: None}, experience.tasks, experience.rollouts)
    scores = evidence.scores["process_model"]
    shape = experience.tasks.prompts.row_ids.shape
    expected = 0.25 * step_advantages(*(x.reshape(*shape, -1) for x in (scores.values, scores.mask)))
    np.testing.assert_allclose(earned.token_advantages, expected.reshape(scores.values.shape), atol=1e-6)
    assert np.abs(np.asarray(expected)).max() > 0.1 and not np.asarray(earned.metrics["reward/process_model"]).any()
    experience = dataclasses.replace(experience, earned=earned)
    plain = dataclasses.replace(experience, earned=dataclasses.replace(earned, token_advantages=None))
    rows, without = (policy_rows(e, loss=config.loss, temperature=1.0, header_length=1) for e in (experience, plain))
    mask = np.asarray(experience.rollouts.mask) & np.repeat(np.asarray(experience.group_mask), shape[2], 1)[..., None]
    gap = np.asarray(rows.advantages - without.advantages)
    np.testing.assert_allclose(gap[mask], np.asarray(earned.token_advantages)[mask], atol=1e-6)


def test_a_run_with_model_rewards_trains_and_evaluates(models, tmp_path):
    config = with_models(models, tmp_path / "run", **{"reward.models.aggregation": "mean"})
    pipeline.run_stages(config)
    records = read_records(tmp_path / "run")
    steps = [r for r in records if r["stage"] == "rpt"]
    assert len(steps) == 2 and all(0 < r["reward/reward_model"] < 1 and r["tokens_scored"] > 0 for r in steps)
    evaluation = [r for r in records if r["stage"] == "evaluation"][-1]
    assert "sampled_reward/process_model/score" in evaluation["splits"]["all"]


def test_filtering_needs_an_outcome_and_drops_inconsistent_rollouts(models, tmp_path):
    use = {"reward.models.process_use": "filter", "reward.models.keep": 0.5}
    config = with_models(models, tmp_path / "run", ("prefix", "process_model"), **use)
    *_, experience = rollouts_of(config)
    mask = np.asarray(experience.earned.row_mask)
    # Nothing is right, so half of each group remains: the wrong ones with the lowest scores.
    scores = np.asarray(experience.earned.metrics["reward/process_model/score"])
    assert (mask.sum(-1) == mask.shape[-1] // 2).all()
    assert (np.where(mask, scores, -1).max(-1) <= np.where(mask, 2, scores).min(-1)).all()


@pytest.mark.parametrize(
    ("terms", "values", "message"),
    [
        (("prefix",), {"reward.models.path": "x"}, "no other reward takes this one"),
        (("reward_model",), {"reward.models.path": ""}, "reward_model needs a model"),
        (("process_model",), {"reward.models.process_use": "steps"}, "needs an outcome before it"),
        (("reward_model", "process_model"), {"reward.models.process_use": "filter"}, "only 1 counts as right"),
        (
            ("prefix", "process_model"), {"reward.models.process_use": "steps", "loss.objective": "dpo"},
            "one advantage per completion",
        ),
        (
            ("prefix", "process_model"), {"reward.models.process_use": "steps", "loss.advantage": "gae"},
            "of tokens itself",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(models, tmp_path, terms, values, message):
    with pytest.raises(ConfigError, match=message):
        check_rewards(with_models(models, tmp_path / "run", terms, **values))


def test_models_that_cannot_score_are_refused_by_name(models, tmp_path):
    _, home = models
    run = prepare(with_models(models, tmp_path / "run"))
    with pytest.raises(ConfigError, match="is a run that trained a policy"):
        load_reward_model(str(home / "policy"), run.mesh, run.tokenizer)
    other = word_level(["<think>", "</think>", "\\boxed{", "}", "a"])
    with pytest.raises(ConfigError, match="has another tokenizer than the policy"):
        load_reward_model(str(home / "process"), run.mesh, other)
    assert load_reward_model(str(home / "process"), run.mesh, run.tokenizer).objective == "process"
    swapped = {"reward.models.path": str(home / "process"), "reward.models.process_path": str(home / "outcome")}
    other = prepare(with_values(with_models(models, tmp_path / "swapped"), swapped))
    with pytest.raises(ConfigError, match="objective 'process', which the reward reward_model cannot read"):
        _ = other.reward_models
    with pytest.raises(ConfigError, match="reward.models.process_path='nowhere' does not exist"):
        prepare(with_values(with_models(models, tmp_path / "typo"), {"reward.models.process_path": "nowhere"}))
    as_policy = with_values(with_models(models, tmp_path / "p", ("prefix",)), {"policy.path": str(home / "process")})
    with pytest.raises(ConfigError, match="is a reward model, no policy"):
        prepare(as_policy).start_params()


def test_a_reward_model_goes_on_from_another(models, tmp_path):
    """Also through adapters, whose base it becomes: the readout is kept."""
    config, home = models
    before = load_reward_model(str(home / "process"), prepare(with_models(models, tmp_path / "r")).mesh)
    for rank in (0, 2):
        own = {
            "run.directory": str(tmp_path / f"more{rank}"), "policy.path": str(home / "process"), "lora.rank": rank,
            "supervised.objective": "process", "supervised.path": str(home / "graded.jsonl"), "run.num_steps": 0,
            "supervised.num_steps": 1, "steps.delimiter": ",", "supervised.optimizer.learning_rate": 0.0,
        }  # fmt: skip
        run = pipeline.run_stages(with_values(config, own))
        after = load_reward_model(str(tmp_path / f"more{rank}"), run.mesh)
        assert np.abs(np.asarray(before.params[READOUT])).max() > 0
        np.testing.assert_array_equal(after.params[READOUT], before.params[READOUT])
