"""Monte-Carlo tree search over the steps of a thought: selection, backup, and the answer of a tree.

Two forms. Nodes (spcl/x1): values q of nodes, a visit-weighted backup. Priors (openr, AlphaZero): means of the values
below, exploration in proportion to a step's probability. `Rules` names the choices in which codes differ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rpt_jax.search.tree import Node


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a tree is searched.

    Attributes:
        form: nodes or priors.
        c1, c2: exploration: c1 + ln((N + c2) / c2), c2 + 1 with priors (x1: 1.25, 19652; its example uses c1 0.1).
        gamma: discount of a step in node backups (x1's code: 0.96).
        rate: alpha of node backups; 1 overwrites a node's own value with its children's.
        low, high: values are rescaled from this range to [0, 1] in node selection; (0, 1) changes nothing.
        answer: value: the terminal node of highest value; visits: the most visited path; selection: the path that
            selection scores highest, exploration included, as x1 returns it.
        stops_at_terminal: a search ends when selection reaches a terminal node (x1).
    """

    form: Literal["nodes", "priors"] = "nodes"
    c1: float = 1.25
    c2: float = 19652.0
    gamma: float = 0.96
    rate: float = 1.0
    low: float = -1.0
    high: float = 1.0
    answer: Literal["value", "visits", "selection"] = "value"
    stops_at_terminal: bool = False


def node_scores(parent_visits: int, visits: list[int], values: list[float], rules: Rules) -> list[float]:
    """Return q' + sqrt(N - 1) / (1 + n) (c1 + ln((N + c2) / c2)) of each child, q' rescaled to [0, 1].

    Source: spcl/x1 `Node.get_selection_score`; MuZero's PUCT (arXiv:1911.08265) without a prior. At N = 0, before any
    backup, exploration is 0 and the choice is greedy.
    """
    explore = math.sqrt(max(0, parent_visits - 1)) * (rules.c1 + math.log((parent_visits + rules.c2) / rules.c2))
    span = rules.high - rules.low
    return [(q - rules.low) / span + explore / (1 + n) for q, n in zip(values, visits, strict=True)]


def prior_scores(
    parent_visits: int, priors: list[float], visits: list[int], totals: list[float], initial: list[float], rules: Rules
) -> list[float]:
    """Return mean value + P sqrt(N) / (1 + n) (c1 + ln((N + c2 + 1) / c2)) of each child.

    A child without a visit has its initial value. Source: openr `SearchTree._ucb_score`; arXiv:1712.01815.
    """
    explore = math.sqrt(parent_visits) * (rules.c1 + math.log((parent_visits + rules.c2 + 1) / rules.c2))
    means = [t / n if n else i for t, n, i in zip(totals, visits, initial, strict=True)]
    return [m + p * explore / (1 + n) for m, p, n in zip(means, priors, visits, strict=True)]


def scores_of(node: Node, rules: Rules) -> list[float]:
    """Return the selection score of each child."""
    children = node.children
    visits = [c.visits for c in children]
    if rules.form == "nodes":
        return node_scores(node.visits, visits, [c.value for c in children], rules)
    priors, totals = [c.prior for c in children], [c.total for c in children]
    return prior_scores(node.visits, priors, visits, totals, [c.value for c in children], rules)


def select(root: Node, rules: Rules, is_open: Callable[[Node], bool] = lambda node: True) -> Node | None:
    """Return the node to expand: from the root down, the child of highest score; of equal ones, the first.

    Args:
        root: of the tree.
        rules: of the search.
        is_open: whether a node may be chosen or passed; a path without open children goes nowhere.
    Returns:
        A node without children, terminal or not; None: no node is open.
    """
    node = root
    while node.children:
        scored = [(s, c) for s, c in zip(scores_of(node, rules), node.children, strict=True) if is_open(c)]
        if not scored:
            return None
        best = max(s for s, _ in scored)
        node = next(c for s, c in scored if s == best)
    return node


def back_up(node: Node, rules: Rules) -> None:
    """Back the children's values of an expanded node up to the root, in the form of nodes.

    q <- (1 - rate) q + rate gamma sum_c n_c q_c / sum_c n_c, and one visit more, at every node on the way. Source:
    arXiv:2501.11223 §5; spcl/x1 `Node.backpropagate`.
    """
    for at in reversed(node.path()):
        total = sum(c.visits for c in at.children)
        if total:
            mean = sum(c.visits * c.value for c in at.children) / total
            at.value = (1 - rules.rate) * at.value + rules.rate * rules.gamma * mean
        at.visits += 1


def back_up_mean(leaf: Node, value: float, *, alternates: bool = False) -> None:
    """Add a leaf's value to every node up to the root; a node's mean is total / visits.

    Args:
        leaf: that was evaluated.
        value: of it.
        alternates: the sign changes at each step up, as for two players.
    """
    for at in reversed(leaf.path()):
        at.visits += 1
        at.total += value
        value = -value if alternates else value


def best_leaf(root: Node, rules: Rules) -> Node:
    """Return the node that answers: terminal if the tree has one and the rule finds it."""
    if rules.answer == "value":
        leaves = [node for node in root.walk() if node.is_terminal]
        candidates = leaves or [node for node in root.walk() if not node.children]
        return max(candidates, key=_own_value)
    node = root
    while node.children:
        scores = [c.visits for c in node.children] if rules.answer == "visits" else scores_of(node, rules)
        node = node.children[max(range(len(scores)), key=scores.__getitem__)]
    return node


def _own_value(node: Node) -> float:
    return node.total / node.visits if node.total and node.visits else node.value
