"""Beam search over the steps of a thought: of all candidates keep the best, finished ones too."""

from collections.abc import Callable, Sequence

from rpt_jax.search.tree import Node


def keep_best(candidates: Sequence[Node], width: int, score: Callable[[Node], float]) -> list[Node]:
    """Return the `width` candidates of highest score, best first; of equal ones, the first.

    Args:
        candidates: expansions of the beam, and its finished nodes, which stay candidates.
        width: B.
        score: of a node, such as its value.
    """
    return sorted(candidates, key=score, reverse=True)[:width]


def length_normalized(logprob: float, num_tokens: int, alpha: float) -> float:
    """Return log p / tokens^alpha, a score without a value model; alpha 0 favours short paths, 1 is the mean."""
    return logprob / max(1, num_tokens) ** alpha
