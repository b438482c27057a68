"""Strategies: how a search spends its operators. Each answers many tasks at once and returns one leaf per task.

chain          one completion
best_of_n      N completions, the one that the value model scores highest
majority       N completions, the most frequent prediction
weighted_vote  the same, weighted by the value model
beam           B partial thoughts, each extended M times per round; the B best go on
mcts           a tree: the selected node is extended, its children are valued, values are backed up
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rpt_jax.search.beam import keep_best
from rpt_jax.search.best_of_n import best_of_n, majority, weighted_vote
from rpt_jax.search.engine import Engine
from rpt_jax.search.mcts import Rules, back_up, back_up_mean, best_leaf, select
from rpt_jax.search.tree import Node

STRATEGIES = ("chain", "best_of_n", "majority", "weighted_vote", "beam", "mcts")
# Those that cannot do without values.
NEED_VALUES = ("best_of_n", "weighted_vote", "beam", "mcts")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What each task may spend; never exceeded.

    Attributes:
        chains: N, completions of chain strategies.
        rounds: expansions of a tree, or rounds of a beam; a thought that they leave open is completed once.
    """

    chains: int = 8
    rounds: int = 16


@dataclass(frozen=True)
class Found:
    """The result for one task: the leaf that answers, and the root of everything that was tried."""

    leaf: Node
    root: Node


def search(engine: Engine, tasks: Sequence[int], strategy: str, budget: Budget, rules: Rules) -> list[Found]:
    """Answer every task.

    Args:
        engine: with a value model for the strategies of `NEED_VALUES`.
        tasks: ids in the engine's source.
        strategy: one of `STRATEGIES`.
        budget: of each task.
        rules: of mcts.
    Raises:
        ValueError: unknown strategy.
    """
    if strategy == "mcts":
        return _mcts(engine, tasks, budget.rounds, rules)
    if strategy == "beam":
        return _beam(engine, tasks, budget.rounds)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r}; it must be one of {', '.join(STRATEGIES)}")
    return _chains(engine, tasks, 1 if strategy == "chain" else budget.chains, strategy)


def _chains(engine: Engine, tasks: Sequence[int], number: int, strategy: str) -> list[Found]:
    roots = [Node() for _ in tasks]
    for first in range(0, number, engine.width):
        engine.generate(tasks, roots, number=min(engine.width, number - first), to_the_end=True)
    leaves = [leaf for root in roots for leaf in root.children]
    owners = [task for task, root in zip(tasks, roots, strict=True) for _ in root.children]
    engine.judge(owners, leaves)
    if strategy in NEED_VALUES:
        for first in range(0, number, engine.width):
            engine.evaluate(tasks, [root.children[first : first + engine.width] for root in roots])
    choose = _CHOICES[strategy]
    return [Found(_leaf_of(root, choose), root) for root in roots]


_CHOICES: dict[str, Callable] = {
    "chain": lambda answers, values: answers[0],
    "best_of_n": best_of_n,
    "majority": lambda answers, values: majority(answers),
    "weighted_vote": weighted_vote,
}


def _leaf_of(root: Node, choose: Callable) -> Node:
    """Return the first leaf with the chosen prediction, else the first leaf."""
    answers = [leaf.note["prediction"] for leaf in root.children]
    chosen = choose(answers, [leaf.value for leaf in root.children])
    return next((leaf for leaf in root.children if leaf.note["prediction"] == chosen), root.children[0])


def _beam(engine: Engine, tasks: Sequence[int], rounds: int) -> list[Found]:
    """Keep `width` nodes per task: each round extends the open ones, and finished ones stay candidates."""
    roots = [Node() for _ in tasks]
    beams: list[list[Node]] = [[root] for root in roots]
    for _ in range(rounds):
        nodes = [(i, node) for i, beam in enumerate(beams) for node in beam if not node.is_terminal]
        if not nodes:
            break
        owners = [tasks[i] for i, _ in nodes]
        groups = engine.generate(owners, [node for _, node in nodes])
        engine.evaluate(owners, groups)
        candidates: list[list[Node]] = [[node for node in beam if node.is_terminal] for beam in beams]
        for (i, _), children in zip(nodes, groups, strict=True):
            candidates[i] += children
        beams = [keep_best(of, engine.width, lambda node: node.value) for of in candidates]
    found = []
    for root, beam in zip(roots, beams, strict=True):
        finished = [node for node in beam if node.is_terminal]
        found.append(Found((finished or beam)[0], root))
    return _finished(engine, tasks, found)


def _mcts(engine: Engine, tasks: Sequence[int], rounds: int, rules: Rules) -> list[Found]:
    """Expand one node of every tree per round; all trees share the batches."""
    roots = [Node() for _ in tasks]
    is_done = [False] * len(tasks)
    for _ in range(rounds):
        chosen: list[tuple[int, Node]] = []
        for i, root in enumerate(roots):
            node = None if is_done[i] else select(root, rules)
            if node is None:
                continue
            if not node.is_terminal:
                chosen.append((i, node))
            elif rules.stops_at_terminal:
                is_done[i] = True
            else:
                _back_up(node, [], rules)
        if not chosen:
            continue
        owners = [tasks[i] for i, _ in chosen]
        groups = engine.generate(owners, [node for _, node in chosen])
        engine.evaluate(owners, groups)
        for (_, node), children in zip(chosen, groups, strict=True):
            _back_up(node, children, rules)
    return _finished(engine, tasks, [Found(best_leaf(root, rules), root) for root in roots])


def _finished(engine: Engine, tasks: Sequence[int], found: list[Found]) -> list[Found]:
    """Complete partial thoughts that the budget left open, once each, and judge the leaves."""
    is_open = [not f.leaf.is_terminal for f in found]
    owners = [task for task, is_one in zip(tasks, is_open, strict=True) if is_one]
    nodes = [f.leaf for f, is_one in zip(found, is_open, strict=True) if is_one]
    ends = iter(engine.generate(owners, nodes, number=1, to_the_end=True))
    for node in nodes:
        node.children[-1].note["completes"] = True  # not a step of the search
    found = [Found(next(ends)[0], f.root) if is_one else f for f, is_one in zip(found, is_open, strict=True)]
    engine.judge(tasks, [f.leaf for f in found])
    return found


def _back_up(node: Node, children: Sequence[Node], rules: Rules) -> None:
    if rules.form == "nodes":
        for child in children:
            child.visits = 1
        back_up(node, rules)
        return
    # A step's probability among its siblings, and the value that the node had before it was expanded.
    most = max((child.note["logprob"] for child in children), default=0.0)
    weights = [math.exp(child.note["logprob"] - most) for child in children]
    for child, weight in zip(children, weights, strict=True):
        child.prior = weight / sum(weights)
    values = [child.value for child in children]
    back_up_mean(node, sum(values) / len(values) if node.parent is None and values else node.value)
