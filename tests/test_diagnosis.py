"""What a run says of itself: made failures get their cause, healthy runs and controls get nothing."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from test_system import corpus, evaluated_at_the_ends, tiny_run  # noqa: F401  (a fixture)

from experiments.presets import PRESETS
from rpt_jax import session
from rpt_jax.config import Config, RunConfig
from rpt_jax.config.schema import with_values
from rpt_jax.errors import DataError
from rpt_jax.train import diagnosis
from rpt_jax.train.diagnosis import WINDOW, Diagnosis, diagnose_steps, diagnose_tasks
from rpt_jax.train.run_directory import read_records

pytestmark = pytest.mark.usefixtures("few_programs")

# The middle of a healthy run: SmolLM2-135M on Omni-MATH, steps 20 to 30.
HEALTHY = {
    "reward_fault_fraction": 0.0, "no_prediction_fraction": 0.02, "truncated_fraction": 0.02,
    "degenerate_group_fraction": 0.55, "identical_group_fraction": 0.15, "reward_any_in_group": 0.6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "cause", "remedy"),
    [
        ({"no_prediction_fraction": 1.0, "truncated_fraction": 0.9, "degenerate_group_fraction": 1.0},
         "reach rollout.max_completion_tokens", "--rollout.max-completion-tokens"),
        ({"no_prediction_fraction": 0.99, "degenerate_group_fraction": 1.0}, "does not know the response format",
         "cold start"),
        ({"degenerate_group_fraction": 0.98, "reward_any_in_group": 0.01}, "too hard", "better policy"),
        ({"degenerate_group_fraction": 0.98, "reward_any_in_group": 0.99}, "too easy", "entropy-threshold"),
        ({"degenerate_group_fraction": 1.0, "identical_group_fraction": 0.97, "reward_any_in_group": 0.02},
         "collapsed", "temperature"),
        ({"degenerate_group_fraction": 0.97, "reward_any_in_group": 0.5}, "always solved or never", "pass_rate_band"),
        ({"reward_fault_fraction": 0.8, "degenerate_group_fraction": 1.0, "reward_any_in_group": 0.0},
         "reward function fails on 80%", "--reward.on-fault"),
    ],
)  # fmt: skip
def test_a_failure_gets_its_cause_and_what_to_change(changes, cause, remedy):
    _, found = diagnose_steps([HEALTHY | changes] * WINDOW)
    assert cause in found and remedy in found


def test_a_run_that_learns_is_left_alone():
    assert diagnose_steps([HEALTHY] * WINDOW) is None
    # A reward that needs no box, and whose values vary.
    assert diagnose_steps([HEALTHY | {"no_prediction_fraction": 1.0}] * WINDOW) is None
    # A few empty batches among others, and a policy that forgets the format now and then.
    bad = HEALTHY | {"degenerate_group_fraction": 1.0, "no_prediction_fraction": 1.0, "reward_any_in_group": 0.0}
    assert diagnose_steps([bad] * (WINDOW // 3) + [HEALTHY] * (WINDOW - WINDOW // 3)) is None


@pytest.mark.parametrize(
    "changes",
    [{"reward_any_in_group": 0.0}, {"no_prediction_fraction": 1.0}, {"identical_group_fraction": 1.0},
     {"no_prediction_fraction": 1.0, "truncated_fraction": 0.9}, {"reward_fault_fraction": 0.7}],
)  # fmt: skip
def test_a_diagnosis_is_said_once_and_stops_only_if_asked(monkeypatch, changes):
    """However its figures change from step to step."""
    said = []
    monkeypatch.setattr(diagnosis.console, "print", lambda text, **_: said.append(text))
    watch = Diagnosis(Config())
    for step in range(1, 3 * WINDOW):
        drift = {name: value - step / 1000 if value else 0.0 for name, value in changes.items()}
        watch.add(HEALTHY | {"step": step, "degenerate_group_fraction": 0.96 + step / 1000} | drift)
    assert len(said) == 1 and f"steps 1 to {WINDOW} taught little" in said[0]


def test_a_run_may_stop_on_a_diagnosis():
    strict = Diagnosis(dataclasses.replace(Config(), run=dataclasses.replace(Config().run, on_diagnosis="stop")))
    with pytest.raises(DataError, match=f"steps 1 to {WINDOW} taught little.*too hard.*on-diagnosis warn goes on"):
        for step in range(1, 2 * WINDOW):
            strict.add(HEALTHY | {"step": step, "degenerate_group_fraction": 1.0, "reward_any_in_group": 0.0})


def tasks_of(number, per_trunk):
    """`number` positions, in trunks of `per_trunk` each."""
    template = SimpleNamespace(prompts_per_task=1)
    source = SimpleNamespace(template=template, group=lambda ids, size: [None] * -(-len(ids) // min(size, per_trunk)))
    return SimpleNamespace(ids=np.arange(number), source=source)


def test_too_few_tasks_and_padding_are_said_before_the_first_step():
    config = PRESETS["tiny_text"]  # 12 documents x 4 positions; a warm start of 300 x 32 sequences
    few, padding = diagnose_tasks(tasks_of(26, 1), config, 136)
    assert "26 positions are too few for batches of 48" in few and "136 examples 71 times" in few
    assert "75% of the prompts of a batch are padding" in padding and "1.0 positions on average" in padding
    assert "times" not in diagnose_tasks(tasks_of(26, 4), config, 10_000)[0]
    assert diagnose_tasks(tasks_of(5_000, 4), config, 10_000) == []
    questions = dataclasses.replace(config, questions=dataclasses.replace(config.questions, path="q.jsonl"))
    assert "26 questions" in diagnose_tasks(tasks_of(26, 4), questions, 0)[0]


def test_a_run_that_cannot_learn_stops_with_its_cause(corpus, tmp_path):  # noqa: F811
    """A policy that never writes a box: the run stops after a dozen steps, which are saved."""
    base = evaluated_at_the_ends(tiny_run(corpus, tmp_path / "run"))
    run = dataclasses.replace(base.run, num_steps=40, control=False, on_diagnosis="stop", completions_every_steps=0)
    config = dataclasses.replace(
        base, run=run, eval=dataclasses.replace(base.eval, every_steps=40),
        supervised=dataclasses.replace(base.supervised, num_steps=0),
        positions=dataclasses.replace(base.positions, selector="random"),
        rollout=dataclasses.replace(base.rollout, num_trunks=4, max_completion_tokens=4),
    )  # fmt: skip
    with pytest.raises(DataError, match="have no closed box after </think>.*max_completion_tokens"):
        session.run(config)
    steps = [r["step"] for r in read_records(tmp_path / "run") if r["stage"] == "rpt"]
    # A step's record may arrive one step late; that step is saved too.
    assert steps == list(range(1, len(steps) + 1)) and len(steps) in (WINDOW, WINDOW + 1)


@pytest.mark.parametrize("name", ["no_prediction", "sampled_no_prediction"])
def test_a_policy_without_the_format_is_said_before_the_first_step(name, capsys):
    watch = Diagnosis(Config(run=RunConfig(on_diagnosis="stop")))
    watch.of_evaluation({"splits": {"all": {name: {"value": 0.5}}}})
    assert not capsys.readouterr().err
    watch.of_evaluation({"splits": {"all": {name: {"value": 1.0}}}})
    said = " ".join(capsys.readouterr().err.split())
    assert "100% of the completions have no closed box" in said and "--reward.no-require-think-end" in said
    # A reward that reads no box has nothing to miss.
    config = with_values(Config(), {"reward.terms": ("rubric",)})
    Diagnosis(config).of_evaluation({"splits": {"all": {name: {"value": 1.0}}}})
    assert not capsys.readouterr().err
