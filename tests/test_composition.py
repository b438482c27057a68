"""Composed rewards by hand, and what adding one takes: one function and one line of the catalog."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_system import corpus, evaluated_at_the_ends, run_hashes, tiny_run  # noqa: F401  (a fixture)

from rpt_jax.errors import ConfigError
from rpt_jax.rewards import catalog
from rpt_jax.rewards.base import Reward, Term, compose, parse_terms
from rpt_jax.scoring.requests import Request
from rpt_jax.sequences import Task, build_tasks
from rpt_jax.train.pipeline import run_stages
from rpt_jax.train.run import newest_state
from rpt_jax.train.stages.warm_start import warm_start
from rpt_jax.types import Earned, Evidence

pytestmark = pytest.mark.usefixtures("few_programs")

A = [[[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]]
B = [[[0.5, 0.5, 1.0, 0.0], [0.0, 1.0, np.nan, 0.0]]]


def composed(how, weights=(1.0, 0.1), **masks):
    tasks = build_tasks(
        [(np.zeros(3), [Task(id=0, cut=1), Task(id=1, cut=2)])], tail=[0], row_ids=np.zeros((1, 2, 4), np.int32),
        trunk_length=3,
    )  # fmt: skip
    parts = []
    for values in (A, B):
        rewards = jnp.asarray(values)
        earned = Earned(rewards=rewards, faults=jnp.zeros(rewards.shape, bool), metrics={"twice": 2 * rewards}, **masks)
        parts.append(Reward(lambda _, earned=earned: earned))
    terms = [Term("a", weights[0]), Term("b", weights[1])]
    evidence = Evidence(tasks=tasks, rollouts=None, predictions=None, unescaped=None, scores={})
    return compose(terms, parts, how).fn(evidence)


def test_a_sum_by_hand():
    earned = composed("sum")
    # 1 + .05, 0 + .05, 0 + .1, 1 + 0; the NaN is a failure of its term and counts as 0.
    np.testing.assert_allclose(earned.rewards, [[[1.05, 0.05, 0.1, 1.0], [1.0, 1.1, 1.0, 1.0]]], rtol=1e-6)
    assert np.asarray(earned.faults).tolist() == [[[False] * 4, [False, False, True, False]]]
    assert set(earned.metrics) == {f"reward/{n}{m}" for n in "ab" for m in ("", "/fault_fraction", "/twice")}
    assert float(earned.metrics["reward/b/fault_fraction"].sum()) == 1 and earned.advantages is None
    assert earned.row_mask is None and earned.group_mask is None


def test_a_gate_by_hand():
    # Where a is 0, b does not count.
    np.testing.assert_allclose(composed("gate").rewards, [[[1.05, 0.0, 0.0, 1.0], [1.0, 1.1, 1.0, 1.0]]], rtol=1e-6)


def test_normalised_terms_by_hand():
    """z-scores in the group, weighted sum, standardised over the batch."""
    earned = composed("normalize_then_sum", weights=(1.0, 2.0))
    a, b = np.array(A), np.nan_to_num(np.array(B))
    total = sum(w * (r - r.mean(-1, keepdims=True)) / (r.std(-1, keepdims=True) + 1e-6) for w, r in ((1, a), (2, b)))
    np.testing.assert_allclose(earned.advantages, (total - total.mean()) / (total.std() + 1e-6), atol=1e-4)
    np.testing.assert_allclose(earned.rewards, a + 2 * b, rtol=1e-6)


def test_masks_are_joined():
    mask = jnp.asarray([[[True, False, True, True], [True] * 4]])
    earned = composed("sum", row_mask=mask, group_mask=jnp.asarray([[True, False]]))
    np.testing.assert_array_equal(earned.row_mask, mask)
    np.testing.assert_array_equal(earned.group_mask, [[True, False]])


def test_tokens_have_a_term_if_some_reward_depends_on_them():
    """A thought's reward and one of a filter: the thought. With a reward of everything: everything."""
    thought, nothing = jnp.asarray([[[True, False], [True, True]]]), jnp.zeros((1, 2, 2), bool)
    rewards = jnp.zeros((1, 1, 2))

    def mask_of(*masks):
        parts = [Earned(rewards=rewards, faults=rewards > 0, metrics={}, token_mask=mask) for mask in masks]
        made = [Reward(lambda _, part=part: part) for part in parts]
        evidence = Evidence(
            tasks=SimpleNamespace(prompts=SimpleNamespace(prompt_mask=jnp.ones((1, 1), bool))), rollouts=None,
            predictions=None, unescaped=None, scores={},
        )  # fmt: skip
        return compose([Term(f"t{i}") for i in range(len(parts))], made, "sum").fn(evidence).token_mask

    np.testing.assert_array_equal(mask_of(thought, nothing), thought)
    np.testing.assert_array_equal(mask_of(thought, ~thought), jnp.ones_like(thought))
    assert mask_of(thought, None) is None


def test_terms_are_read():
    assert parse_terms(["prefix", "0.1*format", "-2e-1*length"]) == [
        Term("prefix"), Term("format", 0.1), Term("length", -0.2),
    ]  # fmt: skip
    for texts, message in (
        (["*a"], "WEIGHT"),
        ([], "at least one"),
        (["a", "0.5*a"], "each once"),
        (["1.2.3*a"], "1.2.3"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_terms(texts)


# --- The whole of what a new reward is: a function of the evidence, and a line of the catalog. ---

LIKELY = Request(name="likely", policy="start", keep="thought", stub="\\boxed{", num_targets=1)


def likely_answer(evidence: Evidence) -> Earned:
    """How likely the start policy finds the truth behind the thought; truncated rollouts have no term in the loss."""
    shape = evidence.tasks.prompts.row_ids.shape
    rewards = jnp.exp(evidence.scores["likely"].values[..., 0]).reshape(shape)
    truncated = evidence.rollouts.truncated.reshape(shape)
    return Earned(
        rewards=rewards, faults=jnp.zeros(shape, bool), metrics={"truncated": truncated.astype(jnp.float32)},
        row_mask=~truncated,
    )  # fmt: skip


TOY = {"likely_answer": catalog.Row(fn=likely_answer, requests=(LIKELY,), tasks=("documents",))}


def test_a_new_reward_is_one_function_and_one_line(corpus, tmp_path, monkeypatch):  # noqa: F811
    """It trains together with the prefix reward, and appears in the evaluation before the first step."""
    monkeypatch.setattr(catalog, "CATALOG", catalog.CATALOG | TOY)
    base = evaluated_at_the_ends(tiny_run(corpus, tmp_path / "run"))
    config = dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, num_steps=2, control=False),
        reward=dataclasses.replace(base.reward, terms=("prefix", "0.5*likely_answer")),
    )
    run_stages(config)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, _ = [r for r in records if r["stage"] == "rpt"]
    assert 0 < first["reward/likely_answer"] < 1 and first["reward/likely_answer/fault_fraction"] == 0
    np.testing.assert_allclose(first["reward"], first["reward/prefix"] + 0.5 * first["reward/likely_answer"], rtol=1e-5)
    np.testing.assert_allclose(first["reward/likely_answer/truncated"], first["truncated_fraction"], rtol=1e-5)
    # Its passes are counted: stems again, and every thought with its stub.
    assert first["tokens_scored"] > first["tokens_prefilled"]
    evaluated = next(r for r in records if r["stage"] == "evaluation" and r["step"] == 0)
    figures = {name: cell["value"] for name, cell in evaluated["splits"]["all"].items()}
    np.testing.assert_allclose(
        figures["sampled_reward"], figures["sampled_prefix"] + 0.5 * figures["sampled_reward/likely_answer"], rtol=1e-4
    )


@pytest.mark.slow
def test_a_run_whose_reward_asks_for_the_average_resumes_exactly(corpus, tmp_path, monkeypatch):  # noqa: F811
    """The average is in the checkpoint: a run stopped after one step and resumed equals an uninterrupted one."""
    average = dataclasses.replace(LIKELY, policy="average")
    monkeypatch.setattr(catalog, "CATALOG", catalog.CATALOG | {
        "likely_answer": dataclasses.replace(TOY["likely_answer"], requests=(average,))
    })  # fmt: skip

    def config(name):
        base = evaluated_at_the_ends(tiny_run(corpus, tmp_path / name))
        return dataclasses.replace(
            base,
            run=dataclasses.replace(base.run, num_steps=2, control=False),
            reward=dataclasses.replace(base.reward, terms=("likely_answer",)),
            companion=dataclasses.replace(base.companion, decay=0.5),
        )

    def end(name, **options):
        run = run_stages(config(name), **options)
        state, *_ = newest_state(run, warm_start(run))
        assert set(state.companions) == {"average"}
        return run_hashes(run, state), state

    straight, state = end("straight")
    end("stopped", stop_at_step=1)
    assert end("stopped")[0] == straight
    moved = [(a != p).any() for a, p in zip(*map(jax.tree.leaves, (state.companions["average"], state.params)))]
    assert any(moved)
