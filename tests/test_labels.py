"""Monte-Carlo labels of steps: against enumeration of a tiny policy, bisection at its stated rate, resumption."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_golden import ENTRIES
from test_system import corpus, evaluated_at_the_ends, tiny_run  # noqa: F401  (a fixture)

from experiments import label_steps
from rpt_jax.config import Config, MeshConfig, RolloutConfig, RunConfig, StepsConfig
from rpt_jax.config.schema import with_values
from rpt_jax.data.graded import read_graded
from rpt_jax.errors import CheckpointError, ConfigError, DataError
from rpt_jax.models import decoder
from rpt_jax.reward_models.labels import Answers, first_wrong_steps, omega_score, step_labels
from rpt_jax.rewards.base import Reward
from rpt_jax.sequences import Task, build_tasks
from rpt_jax.tokenizer.steps import StepRule
from rpt_jax.train import pipeline
from rpt_jax.train.labelling import Continuations, Solution, solutions_of
from rpt_jax.train.run import prepare
from rpt_jax.types import Earned

# --- A tiny policy, enumerated -------------------------------------------------------------------------------------

TAIL, EOS, TARGET, LIMIT = [3], 0, 7, 4


def has_target(evidence):
    """Right: the completion holds the target token."""
    found = (evidence.rollouts.tokens == TARGET) & evidence.rollouts.mask
    rewards = found.any(-1)[:, None].astype(jnp.float32)
    return Earned(rewards=rewards, faults=jnp.zeros(rewards.shape, bool), metrics={})


@dataclasses.dataclass
class OneTask:
    prompt: np.ndarray

    def make(self, trunks, *, prompts_per_trunk, group_size):
        rows = np.zeros((len(trunks), 1, group_size), np.int32)
        tasks = [(self.prompt, [Task(id=0, cut=len(self.prompt))]) if ids else (self.prompt[:0], []) for ids in trunks]
        return build_tasks(tasks, tail=TAIL, row_ids=rows, trunk_length=len(self.prompt))


def exact_rate(config, params, prompt, given):
    """The probability that a completion of up to LIMIT tokens holds the target, over every continuation."""
    next_probabilities = jax.jit(lambda ids: jax.nn.softmax(decoder.logits(config, params, ids)[:, -1]))
    going_on, total = {tuple(given): 1.0}, 0.0
    for length in range(len(given), LIMIT):
        rows = list(going_on)
        probabilities = np.asarray(
            next_probabilities(jnp.asarray([[*prompt, *TAIL, *row] for row in rows])), np.float64
        )
        total += sum(going_on[row] * p[TARGET] for row, p in zip(rows, probabilities, strict=True))
        going_on = {
            (*row, v): going_on[row] * p[v]
            for row, p in zip(rows, probabilities, strict=True)
            for v in range(len(p) if length < LIMIT - 1 else 0)
            if v not in (TARGET, EOS)
        }
    return total


def test_labels_are_unbiased_against_enumeration(tiny_config, tiny_params, mesh):
    """Standard error sqrt(p (1 - p) / n); four of them, for three questions."""
    n, config = 512, dataclasses.replace(tiny_config, vocab_size=61)
    prompt = np.array([5, 9, 12], np.int32)
    run = SimpleNamespace(
        config=dataclasses.replace(
            Config(), model=config, run=RunConfig(seed=3),
            rollout=RolloutConfig(max_completion_tokens=LIMIT, temperature=1.0, stop_ids=(EOS,)),
        ),
        mesh=mesh, tokenizer=SimpleNamespace(vocab_size=61),
    )  # fmt: skip
    solution = Solution(task=0, tokens=[11, 20, 30], ends=[0, 1, 2], is_right=False)
    asks = Continuations(
        run=run, policy=tiny_params, source=OneTask(prompt), verifier=Reward(has_target), num_samples=n, batch=2
    )
    answer = asks.answer([solution])
    # The target is the most likely continuation somewhere, or rates would be too small to tell.
    questions = [(0, 1), (0, 2), (0, 3)]
    found = np.array(answer(questions)) / n
    expected = [exact_rate(config, tiny_params, prompt, solution.tokens[:k]) for _, k in questions]
    for rate, p in zip(found, expected, strict=True):
        assert abs(rate - p) <= 4 * np.sqrt(max(p * (1 - p), 1 / n) / n)
    # However they are batched, questions have the same answers.
    assert answer(questions[::-1]) == [*map(int, (found * n)[::-1])]


# --- What to ask ---------------------------------------------------------------------------------------------------


def made_solutions(count, num_steps, rate, n, seed):
    """Solutions with a known first wrong step, and a policy that recovers from good ones at this rate."""
    rng = np.random.default_rng(seed)
    wrong = rng.integers(0, num_steps, count)

    def answer(questions):
        return [int(rng.binomial(n, rate)) if k <= wrong[i] else 0 for i, k in questions]

    return wrong.tolist(), answer


def test_bisection_finds_the_first_wrong_step_with_a_third_of_the_calls():
    """A good step looks wrong with probability (1 - rate)^n; a search of 12 steps asks at most four questions."""
    count, num_steps, rate, n = 1000, 12, 0.3, 8
    wrong, answer = made_solutions(count, num_steps, rate, n, seed=0)
    answers = Answers(None, n)
    found = first_wrong_steps(answers, [num_steps] * count, [False] * count, answer, batch=128)
    share = np.mean([a == b for a, b in zip(found, wrong, strict=True)])
    stated = (1 - (1 - rate) ** n) ** 4
    assert share >= stated - 3 * np.sqrt(stated * (1 - stated) / count)
    all_calls = count * (num_steps - 1)
    assert answers.num_asked <= all_calls / 3 + count and answers.num_asked <= 4 * count
    # With a policy that always recovers, every step is found, and right solutions cost nothing.
    wrong, answer = made_solutions(300, num_steps, 1.0, n, seed=1)
    answers = Answers(None, n)
    found = first_wrong_steps(answers, [num_steps] * 300, [i % 3 == 0 for i in range(300)], answer, batch=7)
    assert all(f == (-1 if i % 3 == 0 else w) for i, (f, w) in enumerate(zip(found, wrong)))
    assert all(i % 3 for i, _ in answers.found)


def test_a_limit_leaves_the_last_ones_open():
    wrong, answer = made_solutions(10, 8, 1.0, 4, seed=0)
    answers = Answers(None, 4)
    found = first_wrong_steps(
        answers, [8] * 10, [False] * 10, answer, batch=10, max_questions=12, order=lambda i: float(i)
    )
    assert answers.num_asked == 12 and found.count(None) > 0
    assert all(f is None or f == w for f, w in zip(found, wrong, strict=True))
    # What was answered before counts, so an interrupted search ends where an undisturbed one does.
    again = first_wrong_steps(
        answers, [8] * 10, [False] * 10, answer, batch=10, max_questions=12, order=lambda i: float(i)
    )
    assert again == found and answers.num_asked == 12
    assert first_wrong_steps(answers, [8] * 10, [False] * 10, answer, batch=10, max_questions=100) == wrong


def test_soft_labels_and_nothing_is_asked_twice(tmp_path):
    asked = []

    def answer(questions):
        asked.extend(questions)
        return [(i + k) % 3 for i, k in questions]

    path = tmp_path / "answers.jsonl"
    expected = [[(1) % 3 / 2, 1.0], [0.0], [3 % 3 / 2, 4 % 3 / 2, 0.0]]
    sizes, right = [2, 1, 3], [True, False, False]
    answers = Answers(path, 2)
    assert step_labels(answers, sizes, right, answer, batch=2) == expected and answers.num_asked == 3
    # A line that a kill cut off is dropped; the others are not asked again.
    path.write_text(path.read_text() + "[2, 2")
    again = Answers(path, 2)
    assert step_labels(again, sizes, right, answer, batch=2) == expected
    assert again.num_asked == 0 and len(asked) == len(set(asked)) == 3
    assert [json.loads(line) for line in path.read_text().splitlines()[1:]] == [[0, 1, 1], [2, 1, 0], [2, 2, 1]]
    for other in (Answers, 3, ""), (Answers, 2, "another policy"):
        with pytest.raises(CheckpointError, match="answers about other completions"):
            other[0](path, *other[1:])


@pytest.mark.parametrize("case", ENTRIES["prm.omega_selection"])
def test_omega_selection_equals_openr(case):
    i = case["inputs"]
    found = omega_score(
        i["mc_value"], i["rollout_words"], i["visits"], i["total_visits"], alpha=i["alpha"], beta=i["beta"],
        length=i["L"], c_puct=i["c_puct"],
    )  # fmt: skip
    assert found == pytest.approx(case["outputs"], rel=1e-5)


# --- The script ----------------------------------------------------------------------------------------------------


def test_a_runs_own_completions_become_a_file_for_every_model(corpus, tmp_path, monkeypatch):  # noqa: F811
    """The untrained policy is never right, so every second one counts as right, and closed brackets do."""
    config = evaluated_at_the_ends(tiny_run(corpus, tmp_path / "run"))
    # After an RL step the policy's entropies, and so the numbers of its tasks, differ from the warm start's.
    config = with_values(config, {"run.num_steps": 1, "run.control": False, "steps.delimiter": ","})
    pipeline.run_stages(config)
    run = prepare(config, read_only=True, judges=True)
    with pytest.raises(DataError, match="none of .* completions are right"):
        label_steps.write_labels(run, tmp_path / "none.jsonl", batches=1, per_prompt=4, samples=2)
    monkeypatch.setattr(label_steps, "verifier_of", lambda run: "syntax")
    monkeypatch.setattr(label_steps, "_distinct", lambda rows, per_prompt: (rows[:12], {}))
    sampled = label_steps.sample_rows(run, 1)
    for row in sampled.rows[::5]:
        prompts = sampled.source.make([[row["position_id"]]], prompts_per_trunk=1, group_size=1).prompts
        assert prompts.trunk_tokens[0, : prompts.cuts[0, 0]].tolist() == row["trunk_tokens"]
    halves = lambda rows, rule: solutions_of([row | {"right": i % 2} for i, row in enumerate(rows)], rule)  # noqa: E731
    monkeypatch.setattr(label_steps, "solutions_of", halves)
    out = tmp_path / "steps.jsonl"
    counts = label_steps.write_labels(run, out, batches=1, per_prompt=4, samples=2, at_once=8)
    assert counts["questions"] == counts["steps"] - counts["completions"] == counts["steps"] - 12
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    rule = StepRule(StepsConfig(delimiter=","), run.tokenizer)
    for line in lines:
        assert line["places"] == rule.ends(line["completion_tokens"]) and len(line["labels"]) == len(line["places"])
        assert set(line["labels"]) <= {0.0, 0.5, 1.0} and line["labels"][-1] == line["label"]
    for objective, number in (("process", None), ("outcome", 1)):
        found, _ = read_graded(
            str(out), run.tokenizer, run.template, with_values(config, {"supervised.objective": objective})
        )
        assert len(found) == 12 and all(number in (None, len(e.places[0])) for e in found)
    again = label_steps.write_labels(run, out, batches=1, per_prompt=4, samples=2, at_once=8)
    assert again["questions"] == 0 and [json.loads(line) for line in out.read_text().splitlines()] == lines
    bisected = label_steps.write_labels(
        run, tmp_path / "b.jsonl", batches=1, per_prompt=4, samples=2, kind="bisect", at_once=8
    )
    assert bisected["questions"] <= counts["questions"] and bisected["written"] == 12


def test_rows_become_solutions(letters):
    rule = StepRule(StepsConfig(delimiter="."), letters)
    row = {"position_id": 4, "completion_tokens": letters.encode("a.bc."), "right": True}
    (solution,) = solutions_of([row], rule)
    assert solution == Solution(task=4, tokens=letters.encode("a.bc."), ends=[1, 4], is_right=True)
    assert list(itertools.chain(*[solution.ends])) == [1, 4]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batches", "0"], "--batches 0"),
        (["--max-questions", "4"], "only bisect"),
        (["--labels", "bisect", "--max-questions", "0"], "--max-questions 0"),
        (["--questions-at-once", "5"], "--questions-at-once 5; .* divisible by .*=2"),
    ],
)
def test_flags_of_labelling_are_checked_first(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(label_steps, "load_run", lambda *_: Config(mesh=MeshConfig(data=2)))
    monkeypatch.setattr(label_steps, "prepare", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(ConfigError, match=message):
        label_steps.main(["--run", "somewhere", "--out", str(tmp_path / "out.jsonl"), *flags])
