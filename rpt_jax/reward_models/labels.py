"""Labels that a policy makes itself: from the end of a step it continues n times, and a verifier judges the results.

The functions here decide what to ask; `Answers` holds what was answered. `train/labelling.py` asks a policy.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rpt_jax.errors import CheckpointError

# A question: continue solution i from the end of its first `steps` steps. 0 steps: from the prompt.
Question = tuple[int, int]


@dataclass
class Answers:
    """Right continuations of n, by question; kept in a file, so that nothing is asked twice.

    Attributes:
        path: of the file: a line with the key, then one per answer; None: in memory.
        num_samples: n, continuations of a question.
        key: identifies solutions, policy and verifier; a file with another key is refused.
        found: number of right continuations of each question.
        num_asked: questions answered in this process.
    """

    path: Path | None
    num_samples: int
    key: str = ""
    found: dict[Question, int] = field(default_factory=dict)
    num_asked: int = 0

    def __post_init__(self):
        header = {"num_samples": self.num_samples, "key": self.key}
        if self.path is None:
            return
        if not self.path.exists() or b"\n" not in (whole := self.path.read_bytes()):
            self.path.write_text(json.dumps(header) + "\n")
            return
        first, *lines = whole.split(b"\n")
        if json.loads(first) != header:
            raise CheckpointError(
                f"{self.path} holds answers about other completions, or by another policy, verifier or number of "
                "samples. Remove it, or choose another --out."
            )
        if lines[-1]:
            # The last line was cut off by a kill.
            os.truncate(self.path, len(whole) - len(lines[-1]))
        for line in lines[:-1]:
            solution, steps, right = json.loads(line)
            self.found[solution, steps] = right

    def ask(self, questions: Iterable[Question], answer: Callable[[Sequence[Question]], Sequence[int]]) -> None:
        """Get the answers that are missing, in one call, and keep them.

        Args:
            questions: to answer; repeated and answered ones are dropped.
            answer: questions -> number of right continuations of each.
        """
        missing = [q for q in dict.fromkeys(questions) if q not in self.found]
        if not missing:
            return
        right = list(answer(missing))
        self.found |= dict(zip(missing, right, strict=True))
        self.num_asked += len(missing)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write("".join(json.dumps([*q, r]) + "\n" for q, r in zip(missing, right, strict=True)))

    def rate(self, question: Question) -> float:
        """Return the share of right continuations."""
        return self.found[question] / self.num_samples


def step_labels(
    answers: Answers, num_steps: Sequence[int], is_right: Sequence[bool], answer: Callable, *, batch: int
) -> list[list[float]]:
    """Return for every step of each solution the share of right continuations from its end (Math-Shepherd).

    The last step's label is whether the solution is right: nothing follows it. arXiv:2312.08935 calls the share the
    soft label, and share > 0 the hard one.

    Args:
        answers: so far.
        num_steps: of each solution.
        is_right: of each solution.
        answer: see `Answers.ask`.
        batch: most questions of a call.
    """
    questions = [(i, k) for i, count in enumerate(num_steps) for k in range(1, count)]
    for first in range(0, len(questions), batch):
        answers.ask(questions[first : first + batch], answer)
    return [
        [*(answers.rate((i, k)) for k in range(1, count)), float(right)]
        for i, (count, right) in enumerate(zip(num_steps, is_right, strict=True))
    ]


def first_wrong_steps(
    answers: Answers,
    num_steps: Sequence[int],
    is_right: Sequence[bool],
    answer: Callable,
    *,
    batch: int,
    max_questions: int | None = None,
    order: Callable[[int], float] | None = None,
) -> list[int | None]:
    """Find the first wrong step of each solution by bisection (OmegaPRM, arXiv:2406.06592).

    A step is wrong if no continuation from its end is right. All solutions are bisected at once, a question each per
    round. A right solution has none and costs nothing.

    Args:
        answers, num_steps, is_right, answer, batch: as in `step_labels`.
        max_questions: at most that many questions are used, answered before or now, so some solutions may stay open;
            None: no limit.
        order: solution -> priority, the highest first; matters with a limit.
    Returns:
        For each solution the index of its first wrong step, -1 if it is right, None if the limit left it open.
    """
    # The prompt is good and the whole solution is not: the first wrong step is in (low, high], counted in steps.
    spans = {i: [0, count] for i, (count, right) in enumerate(zip(num_steps, is_right, strict=True)) if not right}
    open_ones = sorted(spans, key=lambda i: -order(i)) if order else list(spans)
    used: set[Question] = set()
    while open_ones:
        open_ones = [i for i in open_ones if spans[i][1] - spans[i][0] > 1]
        some = open_ones[:batch]
        questions = [(i, sum(spans[i]) // 2) for i in some]
        if max_questions is not None:
            questions = questions[: max_questions - len(used)]
        if not questions:
            break
        used |= set(questions)
        answers.ask(questions, answer)
        for i, k in questions:
            spans[i][0 if answers.found[i, k] else 1] = k
    return [
        -1 if right else (spans[i][1] - 1 if spans[i][1] - spans[i][0] <= 1 else None)
        for i, right in enumerate(is_right)
    ]


def omega_score(
    rate: float, num_tokens: int, visits: int, total_visits: int, *,
    alpha: float = 0.5, beta: float = 0.9, length: int = 500, c_puct: float = 0.125,
) -> dict[str, float]:  # fmt: skip
    """Return how much a wrong rollout is worth bisecting: {"q", "u", "score": q + u}.

    q = alpha^(1 - rate) * beta^(tokens / length) prefers rollouts that are wrong although their start often succeeds,
    and short ones; u = c sqrt(total visits) / (1 + visits). Source: arXiv:2406.06592 eq. 1 and 2, openr's constants.
    Differs: length in tokens; openr counts words.

    Args:
        rate: share of right continuations from the rollout's start.
        num_tokens: of the rollout.
        visits: how often this start was chosen.
        total_visits: of all starts.
        alpha, beta, length, c_puct: constants.
    """
    q = alpha ** (1 - rate) * beta ** (num_tokens / length)
    u = c_puct * total_visits**0.5 / (1 + visits)
    return {"q": q, "u": u, "score": q + u}
