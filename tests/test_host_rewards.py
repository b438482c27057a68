"""Rewards that run on the host: judges by hand, and every way a user's function can fail."""

import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import RewardConfig
from rpt_jax.errors import ConfigError, RewardError
from rpt_jax.rewards import judges, math_judge
from rpt_jax.rewards.answer import Predictions
from rpt_jax.rewards.base import earn
from rpt_jax.rewards.catalog import make_reward
from rpt_jax.rewards.host import JudgePool, check_function, store_function
from rpt_jax.sequences import Task, build_tasks
from rpt_jax.train.run import _note_function
from rpt_jax.types import Evidence, Rollouts

MODULE = "tests.judges_for_tests"
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("42", ("42",), 1),
        (" 42 ", ("42",), 1),
        ("\\frac{1}{2}", ("0.5",), 1),
        ("0.5", ("\\frac12",), 1),
        ("x^2+1", ("1+x^2",), 1),
        ("1,000", ("1000",), 1),
        ("43", ("42",), 0),
        ("", ("42",), 0),
        (None, ("42",), 0),
        ("7", ("6", "7"), 1),
        ("\\{1,2\\}", ("\\{2,1\\}",), 1),
    ],
)
def test_math_answers(prediction, answers, expected):
    encoded = None if prediction is None else prediction.encode()
    assert math_judge.math(b"", encoded, {"answers": answers}) == expected


def test_words_are_not_letters_and_several_letters_are_no_answer():
    for text, letter in (
        ("A decrease in temperature", None), ("I think C", None), ("I'd say B", None), ("A", "A"), ("A.", "A"),
        ("(A) a decrease", "A"), ("A: a decrease", "A"), ("C copper", "C"), ("I", "I"), ("Paris", None), ("12", None),
        # Decoration and lead-ins.
        ("$B$", "B"), ("**B**", "B"), ("Option B", "B"), ("option (b)", "B"), ("[B]", "B"), ("\u201cB\u201d", "B"),
        ("$\\text{(B)}$", "B"), ("\\mathbf{(B)}", "B"), ("\\text{Option B}", "B"), ("The correct answer is (C).", "C"),
        ("Answer: D", "D"), ("**Answer:** B", "B"), ("B\n", "B"), ("choice B.", "B"), ("final answer: B", "B"),
        # The letter and its text.
        ("B. Vitamin C", "B"), ("B, because it melts", "B"), ("B (Paris)", "B"), ("C: none of A, B", "C"),
        ("D. all of the above", "D"),
        # Several letters.
        ("B or C", None), ("B, C", None), ("B/C", None), ("B and C", None), ("(B) or (C)", None), ("B C", None),
        ("BC", None), ("B & C", None), ("B; C", None), ("A, B, and C", None), ("B. C", None), ("B-C", None),
        ("B, or C", None), ("B) or C)", None), ("Both B and C", None), ("B not C", None), ("", None),
    ):  # fmt: skip
        assert judges.named_letter(text) == letter, text


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("B", 1),
        (" b", 1),
        ("(B)", 1),
        ("B.", 1),
        ("B. Paris", 1),
        ("\\text{B}", 1),
        ("A", 0),
        ("Because", 0),
        ("", 0),
        ("\\mathrm{B}", 1),
        ("B Paris", 1),
    ],
)
def test_letters(prediction, expected):
    assert judges.choice(b"", prediction.encode(), {"answers": ("B",)}) == expected


def test_exact_strings():
    assert judges.exact(b"", b" Paris\n", {"answers": ("Paris",)}) == 1
    assert judges.exact(b"", b"paris", {"answers": ("Paris",)}) == 0
    assert judges.exact(b"", None, {"answers": ("None",)}) == 0


def test_results_are_in_order_over_processes():
    pool = JudgePool(f"{MODULE}:length", num_workers=2, time_limit=20.0)
    requests = [(b"x" * n, None, {"bonus": n}) for n in range(40)]
    assert pool.judge(requests) == [n / 10 + n for n in range(40)]
    assert pool.judge([(b"", b"y", {})]) == [1.0]
    pool.close()


def test_workers_outlive_the_threads_that_started_them_and_end_with_their_run(tmp_path):
    pool = JudgePool(f"{MODULE}:length", num_workers=2, time_limit=20.0)
    for _ in range(3):
        assert pool.judge([(b"x", None, {})] * 6) == [0.1] * 6
    pool.close()
    code = (
        "import os, signal\n"
        "from rpt_jax.rewards.host import _Worker\n"
        f"w = _Worker('{MODULE}:by_column', 60.0)\n"
        "w.start()\n"
        "import pickle; w._process.stdin.write(pickle.dumps((b'', None, {'do': 'hang'}))); w._process.stdin.flush()\n"
        "print(w._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    worker = Path(f"/proc/{run.stdout.strip()}")
    deadline = time.perf_counter() + 20
    while worker.exists() and "Z" not in (worker / "stat").read_text().split()[2] and time.perf_counter() < deadline:
        time.sleep(0.2)
    assert run.stdout.strip() and time.perf_counter() < deadline


def test_every_fault_is_of_its_own_completion():
    pool = JudgePool(f"{MODULE}:by_column", num_workers=1, time_limit=3.0)
    kinds = ("one", "raise", "none", "nan", "inf", "string", "list", "array", "die", "bool", "numpy", "hang", "one")
    results = dict(zip(kinds[1:], pool.judge([(b"", None, {"do": k}) for k in kinds])[1:]))
    assert results["one"] == 1.0 and results["bool"] == 1.0 and results["numpy"] == 0.5
    assert results["raise"].what == "raised ValueError: on purpose"
    # The traceback shows the user's line, and none of the worker's.
    assert (
        'raise ValueError("on purpose")' in results["raise"].traceback and "worker.py" not in results["raise"].traceback
    )
    assert "time_limit_seconds=3.0" in results["hang"].what and "ended its process" in results["die"].what
    for kind in ("none", "string", "list", "array"):
        assert "which is not a number" in results[kind].what, kind
    assert results["nan"].what == "returned nan" and results["inf"].what == "returned inf"
    pool.close()


def test_a_call_that_cannot_be_made_is_a_fault_too():
    pool = JudgePool(f"{MODULE}:length", num_workers=1, time_limit=5.0)
    unpicklable, fine = pool.judge([(b"", None, {"f": lambda: 0}), (b"xx", None, {})])
    assert "could not be called" in unpicklable.what and fine == 0.2
    pool.close()


def test_a_slow_expression_of_the_policy_does_not_stop_a_run(letters):
    """math-verify hangs on towers of powers: the worker's limit ends it, the completion earns 0 and is counted."""
    rollouts, tasks = judged_batch(letters)
    config = RewardConfig(terms=("math",), on_fault="fail", time_limit_seconds=2.0)
    reward = make_reward(config, letters, lambda _: {"answers": ("9^{9^{9^{9}}}", "10^{9^{9^{9}}}")})
    _, earned, _ = earn(reward, {}, tasks, rollouts)
    rewards, faults = earned.rewards, earned.faults
    assert not np.asarray(rewards).any()
    # math-verify tries to evaluate the first prediction; the others need no arithmetic, or are not predictions.
    assert np.asarray(faults)[:, 0].tolist() == [[True, False], [False, False], [False, False]]


@pytest.mark.parametrize(
    ("function", "message"),
    [("no.such.module:f", "ModuleNotFoundError"), (f"{MODULE}:missing", "AttributeError"),
     (f"{MODULE}:not_callable", "not callable"), ("nonsense", "cannot be used")],
)  # fmt: skip
def test_functions_that_cannot_be_used_are_named(function, message):
    with pytest.raises(ConfigError, match=message):
        JudgePool(function, num_workers=1, time_limit=1.0)


def test_a_function_may_stand_in_a_file_or_in_python_code(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("BONUS = 0.25\n")
    (tmp_path / "mine.py").write_text("import beside\ndef f(c, p, columns): return len(c) + beside.BONUS\n")
    monkeypatch.chdir(tmp_path)
    bonus = 0.5
    pickled = store_function(lambda completion, prediction, columns: len(completion) + bonus, tmp_path / "run")
    for function, expected in (("mine.py:f", 2.25), (str(tmp_path / "mine.py") + ":f", 2.25), (pickled, 2.5)):
        pool = JudgePool(function, num_workers=1, time_limit=20.0)
        assert pool.judge([(b"xx", None, {})]) == [expected]
        pool.close()
    with pytest.raises(ConfigError, match=r"reward=3 is not callable"):
        store_function(3, tmp_path)
    lock = threading.Lock()
    with pytest.raises(ConfigError, match="cannot be pickled.*lock"):
        store_function(lambda c, p, columns: lock, tmp_path)


def test_a_function_is_tried_before_anything_compiles():
    check_function(RewardConfig(terms=("custom",), function=f"{MODULE}:length"), {})
    strict = RewardConfig(terms=("custom",), function=f"{MODULE}:by_column")
    with pytest.raises(ConfigError, match="KeyError: 'do' when it was tried on completion") as error:
        check_function(strict, {"document": "a"})
    assert 'columns["do"]' in str(error.value) and "{'document': 'a'}" in str(error.value)
    check_function(dataclasses.replace(strict, on_fault="zero"), {})


def judged_batch(letters):
    """Two tasks and a padded one, two rollouts each: boxed answers ab and c, one without an end, one open thought."""
    texts = [["</think>\\boxed{ab}", "</think>\\boxed{c}"], ["</think>\\boxed{c", "a"], ["a", "a"]]
    width = 12
    tokens, mask = np.zeros((3, 2, width), np.int32), np.zeros((3, 2, width), bool)
    for u in range(3):
        for g in range(2):
            ids = letters.encode(texts[u][g])
            tokens[u, g, : len(ids)], mask[u, g, : len(ids)] = ids, True
    trunks = [(np.zeros(4, np.int32), [Task(id=i, cut=4)]) for i in range(2)] + [(np.zeros(0), [])]
    tasks = build_tasks(trunks, tail=[1], row_ids=np.zeros((3, 1, 2), np.int32), trunk_length=4)
    rollouts = Rollouts(
        tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), sampler_logprobs=None, truncated=None, num_rejected=None
    )
    return rollouts, tasks


def test_rewards_of_questions_by_hand(letters):
    columns = {0: {"answers": ("ab",)}, 1: {"answers": ("c",)}}
    reward = make_reward(RewardConfig(terms=("exact",)), letters, columns.__getitem__)
    rollouts, tasks = judged_batch(letters)
    evidence, earned, _ = earn(reward, {}, tasks, rollouts)
    rewards, predictions, faults = earned.rewards, evidence.predictions, earned.faults
    assert np.asarray(rewards)[:, 0].tolist() == [[1, 0], [0, 0], [0, 0]]
    assert not np.asarray(faults).any()
    assert np.asarray(predictions.found).tolist() == [[True, True], [False, False], [False, False]]


def test_answers_that_the_judge_takes_for_equal_vote_together(letters):
    """Byte for byte 7 would win in the first group; with 1/2 and 0.5 as one vote, these do. Padding has no vote."""
    texts = [[b"7", b"1/2", b"7", b"0.5", rb"\frac12"], [b"", b"3", b"4", b"", b"4"], [b"1"] * 5]
    width, shape = 16, (3, 1, 5)
    found = np.array([[True] * 5, [True, True, True, False, True], [True] * 5])
    padded = [[list(t.ljust(width, b"\0")) for t in row] for row in texts]
    predictions = Predictions(
        bytes=jnp.asarray(padded, np.uint8), lengths=jnp.asarray([[len(t) for t in row] for row in texts]),
        found=jnp.asarray(found), think_end_tokens=None,
    )  # fmt: skip
    trunks = [(np.zeros(4, np.int32), [Task(id=i, cut=4)]) for i in range(2)] + [(np.zeros(0), [])]
    tasks = build_tasks(trunks, tail=[1], row_ids=np.zeros(shape, np.int32), trunk_length=4)
    evidence = Evidence(tasks=tasks, rollouts=None, predictions=predictions, unescaped=None, scores={})
    earned = {
        name: make_reward(RewardConfig(terms=(name,)), letters, {}.get, kind="questions").fn(evidence)
        for name in ("ttrl", "ttrl_math")
    }
    assert np.asarray(earned["ttrl"].rewards)[:2, 0].tolist() == [[1, 0, 1, 0, 0], [0, 0, 1, 0, 1]]
    assert np.asarray(earned["ttrl_math"].rewards)[:2, 0].tolist() == [[0, 1, 0, 1, 1], [0, 0, 1, 0, 1]]
    assert not np.asarray(earned["ttrl_math"].metrics["reward/ttrl_math/comparison_fault"]).any()


def test_faults_follow_the_policy(letters):
    columns = {0: {"do": "one"}, 1: {"do": "raise"}}
    config = RewardConfig(terms=("custom",), function=f"{MODULE}:by_column", on_fault="zero")
    rollouts, tasks = judged_batch(letters)
    _, earned, _ = earn(make_reward(config, letters, columns.__getitem__), {}, tasks, rollouts)
    rewards, faults = earned.rewards, earned.faults
    assert np.asarray(rewards)[:, 0].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert np.asarray(faults)[:, 0].tolist() == [[False, False], [True, True], [False, False]]
    strict = make_reward(dataclasses.replace(config, on_fault="fail"), letters, columns.__getitem__)
    with pytest.raises(RewardError, match="ValueError: on purpose on task 1 .*boxed") as error:
        earn(strict, {}, tasks, rollouts)
    assert 'raise ValueError("on purpose")' in str(error.value)


def test_a_changed_function_is_said(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("def reward(*_):\n    return 1.0\n")

    def keep(name, value):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))

    directory = SimpleNamespace(path=tmp_path, keep=keep)
    for _ in range(2):
        _note_function(directory, f"{file}:reward")
    assert "has changed" not in capsys.readouterr().err
    file.write_text("def reward(*_):\n    return 2.0\n")
    _note_function(directory, f"{file}:reward")
    assert "has changed since the run last started" in " ".join(capsys.readouterr().err.split())
