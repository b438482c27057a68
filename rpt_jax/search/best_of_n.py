"""Choices among N completions of one prompt: the best, the majority, a weighted vote. Plain Python.

Of equal ones, the first counts. A completion without an answer (None) has no vote and never wins.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence


def best_of_n(answers: Sequence[Hashable | None], scores: Sequence[float]) -> Hashable | None:
    """Return the answer with the highest score; None: there is no answer."""
    voting = [(answer, score) for answer, score in zip(answers, scores, strict=True) if answer is not None]
    return max(voting, key=lambda pair: pair[1])[0] if voting else None


def majority(answers: Sequence[Hashable | None]) -> Hashable | None:
    """Return the most frequent answer; None: there is no answer."""
    return weighted_vote(answers, [1.0] * len(answers))


def weighted_vote(answers: Sequence[Hashable | None], scores: Sequence[float]) -> Hashable | None:
    """Return the answer with the highest sum of scores; None: there is no answer."""
    totals: dict[Hashable, float] = defaultdict(float)
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            totals[answer] += score
    return max(totals, key=totals.__getitem__) if totals else None


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the chance that k of the samples, without replacement, include a correct one (arXiv:2107.03374 eq. 1)."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
