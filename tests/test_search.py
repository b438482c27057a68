"""Search: official codes' numbers, enumeration, and random trees against a slow search."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from rpt_jax.search.beam import keep_best, length_normalized
from rpt_jax.search.best_of_n import majority, pass_at_k
from rpt_jax.search.mcts import Rules, back_up, back_up_mean, best_leaf, node_scores, prior_scores, select
from rpt_jax.search.tree import Node

ENTRIES = {e["name"]: e["cases"] for e in json.loads((Path(__file__).parent / "golden" / "vectors.json").read_text())}


@pytest.mark.parametrize("case", ENTRIES["mcts.selection_no_prior"])
def test_selection_equals_x1(case):
    i, out = case["inputs"], case["outputs"]
    rules = Rules(c1=i["c1"], c2=i["c2"], low=i["reward_min"], high=i["reward_max"])
    scores = node_scores(i["parent_visits"], i["child_visits"], i["child_q"], rules)
    np.testing.assert_allclose(scores, out["scores"], rtol=1e-5)
    root = Node(visits=i["parent_visits"])
    for visits, q in zip(i["child_visits"], i["child_q"], strict=True):
        root.add(Node(visits=visits, value=q))
    assert root.children.index(select(root, rules)) == out["chosen"]


@pytest.mark.parametrize("case", ENTRIES["mcts.puct_with_prior"])
def test_selection_with_priors_equals_openr(case):
    i, out = case["inputs"], case["outputs"]
    rules = Rules(form="priors", c1=i["pb_c_init"], c2=i["pb_c_base"])
    columns = i["priors"], i["child_visits"], i["child_value_sums"], i["child_initial_values"]
    np.testing.assert_allclose(prior_scores(i["parent_visits"], *columns, rules), out["scores"], rtol=1e-5)
    root = Node(visits=i["parent_visits"])
    for prior, visits, total, value in zip(*columns, strict=True):
        root.add(Node(prior=prior, visits=visits, total=total, value=value))
    assert root.children.index(select(root, rules)) == out["chosen"]


def tree_of(description):
    q, visits, children = description
    node = Node(value=q, visits=visits)
    for child in children:
        node.add(tree_of(child))
    return node


def described(node):
    return [node.value, node.visits, [described(child) for child in node.children]]


def flat(description):
    q, visits, children = description
    return [q, visits, len(children), *itertools.chain(*map(flat, children))]


@pytest.mark.parametrize("case", ENTRIES["mcts.backpropagation"])
def test_backup_equals_x1(case):
    root = node = tree_of(case["inputs"]["tree"])
    for index in case["inputs"]["start_path"]:
        node = node.children[index]
    back_up(node, Rules(gamma=case["inputs"]["gamma"], rate=case["inputs"]["lr_td"]))
    np.testing.assert_allclose(flat(described(root)), flat(case["outputs"]["tree"]), rtol=1e-5)


@pytest.mark.parametrize("case", ENTRIES["mcts.mean_backpropagation"])
def test_mean_backup_equals_openr(case):
    i = case["inputs"]
    leaf = None
    for visits, total in zip(i["visits"], i["value_sums"], strict=True):
        node = Node(visits=visits, total=total)
        leaf = node if leaf is None else leaf.add(node)
    back_up_mean(leaf, i["leaf_value"], alternates=i["mode"] != "same_sign")
    path = leaf.path()
    assert [node.visits for node in path] == case["outputs"]["visits"]
    np.testing.assert_allclose([n.total / n.visits for n in path], case["outputs"]["values"], rtol=1e-5)


def run_search(rules, branching, depth, iterations, value_of):
    """Expand `iterations` selected nodes of a tree whose values are known; return (root, expanded paths)."""
    root, order = Node(note={"path": ()}), []
    for _ in range(iterations):
        node = select(root, rules)
        if node.is_terminal:
            break
        order.append(list(node.note["path"]))
        for index in range(branching):
            path = (*node.note["path"], index)
            child = Node(value=value_of(path), visits=1, is_terminal=len(path) == depth, note={"path": path})
            node.add(child)
        back_up(node, rules)
    return root, order


@pytest.mark.parametrize("case", ENTRIES["mcts.full_search"])
def test_whole_searches_equal_x1(case):
    i, out = case["inputs"], case["outputs"]
    rules = Rules(c1=i["c1"], c2=i["c2"], gamma=i["gamma"], answer="selection", stops_at_terminal=True)
    values = {tuple(map(int, path.split("/"))): value for path, value in i["step_values"].items()}
    root, order = run_search(rules, i["branching"], i["depth"], i["iterations"], values.__getitem__)
    assert order == out["expansion_order"]
    assert list(best_leaf(root, rules).note["path"]) == out["best_path"]
    np.testing.assert_allclose([root.value, root.visits], [out["root_q"], out["root_visits"]], rtol=1e-5)
    np.testing.assert_allclose(flat(described(root)), flat(out["tree"]), rtol=1e-5)


def slow_search(branching, depth, iterations, value_of, c1, c2, gamma):
    """An independent search on dictionaries of paths: the best leaf that it has seen."""
    q, visits, expanded = {(): 0.0}, {(): 0}, set()
    for _ in range(iterations):
        path = ()
        while path in expanded:
            children = [(*path, k) for k in range(branching)]
            explore = math.sqrt(max(0, visits[path] - 1)) * (c1 + math.log((visits[path] + c2) / c2))
            path = max(children, key=lambda child: ((q[child] + 1) / 2 + explore / (1 + visits[child]), -child[-1]))
        if len(path) < depth:
            expanded.add(path)
            for k in range(branching):
                q[(*path, k)], visits[(*path, k)] = value_of((*path, k)), 1
        while True:
            children = [(*path, k) for k in range(branching)]
            if path in expanded:
                n = sum(visits[c] for c in children)
                q[path] = gamma * sum(visits[c] * q[c] for c in children) / n
            visits[path] += 1
            if not path:
                break
            path = path[:-1]
    leaves = [path for path in q if len(path) == depth]
    return max(leaves, key=lambda path: q[path]) if leaves else None


def test_mcts_finds_the_best_leaf_as_often_as_a_slow_search():
    """Depth 4, width 3: 81 leaves; a node's value is the mean of the leaves below it plus noise."""
    rules, hits = Rules(), np.zeros(2)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        leaves = {path: rng.uniform(-1, 1) for path in itertools.product(range(3), repeat=4)}
        noise = {}

        def value_of(path, leaves=leaves, noise=noise, rng=rng):
            if len(path) == 4:
                return leaves[path]
            if path not in noise:
                below = [v for leaf, v in leaves.items() if leaf[: len(path)] == path]
                noise[path] = float(np.clip(np.max(below) + 0.2 * rng.normal(), -1, 1))
            return noise[path]

        root, _ = run_mcts_to_the_end(rules, value_of)
        best = max(leaves, key=leaves.__getitem__)
        hits += [
            best_leaf(root, rules).note["path"] == best,
            slow_search(3, 4, 30, value_of, 1.25, 19652.0, 0.96) == best,
        ]
    assert hits[0] == hits[1] and hits[0] >= 45


def run_mcts_to_the_end(rules, value_of):
    """As `run_search`, but a terminal node is passed through again instead of ending the search."""
    root, order = Node(note={"path": ()}), []
    for _ in range(30):
        node = select(root, rules)
        if not node.is_terminal:
            order.append(node.note["path"])
            for index in range(3):
                path = (*node.note["path"], index)
                node.add(Node(value=value_of(path), visits=1, is_terminal=len(path) == 4, note={"path": path}))
        back_up(node, rules)
    return root, order


def test_closed_nodes_are_passed_over():
    root = Node(visits=3)
    a, b = root.add(Node(value=0.9, visits=1)), root.add(Node(value=0.1, visits=1))
    assert select(root, Rules()) is a and select(root, Rules(), lambda n: n is not a) is b
    assert select(root, Rules(), lambda n: False) is None


def test_votes_and_pass_at_k_equal_enumeration():
    """Four samples of answers a, b, c with known probabilities: every outcome is enumerated."""
    p = {"a": 0.5, "b": 0.3, "c": 0.2}
    outcomes = [(o, math.prod(p[x] for x in o)) for o in itertools.product(p, repeat=4)]
    wins = sum(weight for o, weight in outcomes if majority(o) == "a")
    counted = 0.0
    for outcome, weight in outcomes:
        counts = {x: outcome.count(x) for x in p}
        most = max(counts.values())
        counted += weight * (next(x for x in outcome if counts[x] == most) == "a")
    assert wins == pytest.approx(counted)
    for n, c, k in ((6, 2, 3), (5, 0, 2), (4, 4, 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(d) for d in draws]))


def test_beams_keep_the_best_and_paths_add_up():
    root = Node()
    nodes = [root.add(Node(tokens=[i], value=v)) for i, v in enumerate((0.1, 0.7, 0.7, 0.3))]
    assert keep_best(nodes, 2, lambda n: n.value) == [nodes[1], nodes[2]]
    leaf = nodes[1].add(Node(tokens=[8, 9], is_terminal=True))
    assert leaf.all_tokens() == [1, 8, 9] and leaf.depth == 2 and next(iter(root.walk())) is root
    assert length_normalized(-6.0, 4, 0.5) == pytest.approx(-3.0) and length_normalized(-6.0, 0, 1.0) == -6.0
