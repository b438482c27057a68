"""Shaping rewards that no official numbers cover: language, syntax, our format, and their place after an outcome."""

import json
import os
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared_path

from rpt_jax.config import RewardConfig, ShapingConfig
from rpt_jax.rewards import shaping, text
from rpt_jax.rewards.base import Reward, Term, compose
from rpt_jax.rewards.code_judge import code
from rpt_jax.rewards.prefix import _earned
from rpt_jax.rewards.text import LANGUAGES, judge_format, judge_language
from rpt_jax.types import Evidence, Prompts, Rollouts, TaskBatch


@pytest.mark.parametrize(
    ("text", "code", "share"),
    [
        ("2 + 2 = 4", "zh", 1.0),  # no letters
        ("我们计算三加四", "zh", 1.0),
        ("我们计算三加四", "ja", 0.0),
        ("これは三と四です", "ja", 1.0),
        ("これは三と四です", "zh", 0.0),
        ("我们 have 三", "zh", 3 / 7),
        ("Она идёт домой", "ru", 1.0),
        ("그는 집에 간다", "ko", 1.0),
        ("the cat is on the mat and it was warm", "en", 1.0),
        ("le chat est sur le tapis", "en", 0.0),
        ("der Hund und die Katze sind im Haus", "de", 1.0),
        ("die Antwort ist 我们", "de", 13 / 15),
    ],
)
def test_language_by_hand(text, code, share):
    assert shaping.language(text, code) == pytest.approx(share)


def test_questions_in_six_languages_are_in_their_own():
    lines = shared_path("math", "mgsm_6lang.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for lang in ("en", "de", "fr", "es", "zh", "ja"):
        own = [r["question"] for r in records if r["lang"] == lang]
        right = [max(LANGUAGES, key=lambda code: shaping.language(q, code)) == lang for q in own]
        assert len(own) == 250 and np.mean(right) >= 0.95, lang


def test_the_judge_of_language_reads_the_thought_alone_and_finds_the_tasks_language():
    thought = b"la maison est dans la rue</think>\\boxed{the answer is in the box}"
    assert judge_language(thought, None, {"record": {"language": "fr"}}) == 1.0
    assert judge_language(thought, None, {"record": {"question": "combien de pommes y a-t-il dans le sac ?"}}) == 1.0
    assert judge_language(thought, None, {"record": {"question": "how many apples are there in the bag?"}}) < 0.5
    assert judge_language(thought, None, {"continuation": b" il y a une maison dans la rue"}) == 1.0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("no marks", 1.0),
        ("f(x) = [1, {2}]", 1.0),
        ("f(x", 0.0),
        (")(", 0.0),
        ("(a]", 0.0),
        ("(a) and (b", 2 / 3),
        ("$x$ costs $", 2 / 3),
        ("\\$5 and \\{", 1.0),
        ("```python\nf()\n```", 1.0),
        ("```python\nf(\n```", 0.0),  # the fence closes inside an open bracket
    ],
)
def test_syntax_by_hand(text, share):
    assert shaping.syntax(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("a thought</think>\\boxed{7}", 1),
        ("a thought</think>So \\boxed{x^{2}} \n", 1),
        ("<think>a</think>\\boxed{7}", 1),
        ("a thought \\boxed{7}", 0),
        ("a</think>\\boxed{7} or more", 0),
        ("a</think>\\boxed{7}\\boxed{8}", 0),
        ("a</think>b</think>\\boxed{7}", 0),
        ("a</think>\\boxed{7", 0),
        ("a<think>b</think>\\boxed{7}", 0),
    ],
)
def test_our_format_by_hand(completion, kept):
    assert judge_format(completion.encode(), None, {}) == kept


def test_a_perfect_response_earns_every_format():
    """The prompt has opened the thought and its line."""
    completion = b"a thought\n</think>\n<answer>\n7\n</answer>"
    for judge in (text.judge_format_lines, text.judge_format_tags, text.judge_format_think, text.judge_tag_count):
        assert judge(completion, None, {}) == 1
    assert text.judge_format_nover(completion, None, {}) == 1 > text.judge_format(completion, None, {})


def test_unknown_modes_and_languages_are_refused():
    with pytest.raises(ValueError, match="must be one of boxed, nover"):
        shaping.format("", "xml")
    with pytest.raises(ValueError, match="must be one of ar, bn"):
        shaping.language("", "tlh")


def evidence(lengths, truncated=None) -> Evidence:
    G = len(lengths)
    prompts = Prompts(
        trunk_tokens=None, trunk_lengths=None, cuts=None, tail_tokens=None, tail_lengths=None,
        prompt_mask=jnp.ones((1, 1), bool), row_ids=np.zeros((1, 1, G), np.int32),
    )  # fmt: skip
    rollouts = Rollouts(
        tokens=jnp.zeros((1, G, 40), np.int32), mask=jnp.arange(40) < jnp.asarray(lengths)[None, :, None],
        sampler_logprobs=None, truncated=jnp.asarray([truncated or [False] * G]), num_rejected=None,
    )  # fmt: skip
    return Evidence(
        tasks=TaskBatch(prompts=prompts, references=None),
        rollouts=rollouts,
        predictions=None,
        unescaped=None,
        scores={},
    )


def test_lengths_shape_the_first_terms_outcome():
    """Outcomes 1, 1, 0, 0 at lengths 10, 20, 30, 40 of at most 40."""
    outcome = jnp.asarray([[[1.0, 1.0, 0.0, 0.0]]])
    options = RewardConfig(shaping=ShapingConfig(overlong_fraction=0.5))

    def total(fn, *more):
        rewards = [Reward(lambda _: _earned(outcome)), Reward(lambda e: fn(e, *more))]
        return compose([Term("outcome"), Term("shape")], rewards, "sum").fn(evidence([10, 20, 30, 40]))

    # lambda = 1/2, 1/6, -1/6, -1/2; for wrong ones at most 0.
    np.testing.assert_allclose(total(shaping.kimi_length_reward).rewards[0, 0], [1.5, 7 / 6, -1 / 6, -0.5], rtol=1e-6)
    # Right: .5 + .5 (1 + cos(pi l / 40)) / 2; wrong: -.5 - .5 (1 + cos) / 2.
    cosine = (1 + np.cos(np.pi * np.array([10, 20, 30, 40]) / 40)) / 2
    expected = [1.5 + 0.5 * cosine[0], 1.5 + 0.5 * cosine[1], -0.5 - 0.5 * cosine[2], -0.5 - 0.5 * cosine[3]]
    np.testing.assert_allclose(total(shaping.cosine_length_reward, options).rewards[0, 0], expected, rtol=1e-6)
    # Falls from 0 at 20 to -1 at 40.
    np.testing.assert_allclose(total(shaping.soft_overlong_reward, options).rewards[0, 0], [1, 1, -0.5, -1], rtol=1e-6)
    filtered = shaping.overlong_filter(evidence([10, 40], [False, True]))
    np.testing.assert_array_equal(filtered.row_mask[0, 0], [True, False])
    assert not np.any(filtered.rewards)


TESTS = {"tests": ["assert add(2, 3) == 5", "assert add(-1, 1) == 0"]}


def program(text: str) -> bytes:
    return f"I write add.</think>Here it is:\n```python\n{text}\n```\n".encode()


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (program("def add(a, b):\n    return a + b"), 1),
        (program("def add(a, b):\n    return a - b"), 0),
        (program("def add(a, b)\n    return a + b"), 0),
        (program("import sys\nsys.exit(0)"), 0),
        (program("import os\nos._exit(0)"), 0),
        (program("print('all tests passed')\nraise SystemExit"), 0),
        (program("while True:\n    pass"), 0),
        (program("x = bytearray(2**31)\ndef add(a, b):\n    return a + b"), 0),
        (program("open('big', 'wb').write(bytes(2**21))\ndef add(a, b):\n    return a + b"), 0),
        (program("def add(a, b):\n    return '\0'"), 0),
        (b"```python\ndef add(a, b):\n    return a + b\n```</think>no program", 0),
        (b"no thought, no program", 0),
        (program("def add(a, b):\n    return a + b").replace(b"\n", b"\r\n"), 1),
        (program("from __future__ import annotations\ndef add(a, b):\n    return a + b"), 1),
        (program("def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    input()"), 1),
        (b"</think>```bash\npip install x\n```\nThen:\n```Python\ndef add(a, b):\n    return a + b\n```\n", 1),
        (program("def add(a, b):\n    return a + b") + b"Output:\n```\n5\n```\n```python\nprint(add(2, 3))\n```\n", 1),
        (program("def add(a, b):\n    return a + b\nprint('x' * 2**21)"), 0),
    ],
)
def test_programs_are_judged_by_their_tests_within_limits(completion, right):
    assert code(completion, None, {"id": "q", "record": TESTS}) == right


def test_what_a_program_starts_ends_with_it():
    text = "import subprocess\nsubprocess.Popen(['sleep', '6061'])\ndef add(a, b):\n    return a + b"
    assert code(program(text), None, {"id": "q", "record": TESTS}) == 1
    until = time.monotonic() + 10
    while is_left := any("sleep\x006061" in _command(pid) for pid in os.listdir("/proc") if pid.isdigit()):
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    assert not is_left


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_a_question_without_tests_is_an_error():
    with pytest.raises(ValueError, match="has no tests"):
        code(program("x = 1"), None, {"id": "q:3", "record": {"answer": "x"}})
