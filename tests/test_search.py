"""Search: official codes' numbers, enumeration, and random trees against a slow search."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import search as search_script
from rpt_jax.config import Config, DecoderConfig, MeshConfig, StepsConfig
from rpt_jax.config.schema import with_values
from rpt_jax.errors import ConfigError
from rpt_jax.models import decoder
from rpt_jax.models.decoder import init_params
from rpt_jax.models.scalar_head import READOUT
from rpt_jax.rewards.base import Reward, make_reader
from rpt_jax.scoring.scalars import ScalarModel
from rpt_jax.search.beam import keep_best, length_normalized
from rpt_jax.search.best_of_n import majority, pass_at_k
from rpt_jax.search.engine import Engine
from rpt_jax.search.mcts import Rules, back_up, back_up_mean, best_leaf, node_scores, prior_scores, select
from rpt_jax.search.strategies import STRATEGIES, Budget, search
from rpt_jax.search.tree import Node
from rpt_jax.sequences import Task, build_tasks, trunks_alone
from rpt_jax.tokenizer.steps import StepRule
from rpt_jax.types import Earned

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


# --- On a policy ---------------------------------------------------------------------------------------------------

LIMIT, WIDTH = 9, 3


def has_target(evidence):
    """Right: the completion's last token is a b; it is its own prediction."""
    lengths = evidence.rollouts.mask.sum(-1)
    last = jnp.take_along_axis(evidence.rollouts.tokens, jnp.maximum(0, lengths - 1)[..., None], axis=-1)[..., 0]
    rewards = (last == 0).astype(jnp.float32)[:, None]
    return Earned(rewards=rewards, faults=jnp.zeros(rewards.shape, bool), metrics={})


class Prompts:
    """Task t is the prompt of t + 1 letters."""

    def __init__(self, letters):
        self.letters = letters

    def make(self, trunks, *, prompts_per_trunk, group_size):
        prompts = [np.array(self.letters.encode("a" * (ids[0] + 1)), np.int32) if ids else None for ids in trunks]
        rows = np.zeros((len(trunks), 1, group_size), np.int32)
        tasks = [(np.zeros(0, np.int32), []) if p is None else (p, [Task(id=0, cut=len(p))]) for p in prompts]
        return build_tasks(tasks, tail=self.letters.encode("<think>"), row_ids=rows, trunk_length=8)


@pytest.fixture(scope="module")
def engine_of(letters, mesh):
    model = DecoderConfig(
        vocab_size=letters.vocab_size, num_layers=2, width=16, mlp_width=24, num_heads=2, num_kv_heads=2, head_size=8
    )
    rng = np.random.default_rng(0)
    params = init_params(model, mesh, jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.2 * rng.standard_normal(p.shape).astype(np.float32), params)
    readout = jnp.asarray(rng.normal(size=17), jnp.float32)
    value = ScalarModel(config=model, params=params | {READOUT: readout}, objective="value", steps=None, name="value")
    config = with_values(
        Config(),
        {
            "rollout.max_completion_tokens": LIMIT, "rollout.temperature": 1.0, "rollout.stop_ids": (letters.eos_id,),
            "run.shapes": "few",
        },
    )  # fmt: skip
    config = dataclasses.replace(config, model=model)

    def make(batch=4, width=WIDTH, step_tokens=3):
        return Engine(
            config=config, mesh=mesh, tokenizer=letters, policy=params, source=Prompts(letters),
            rule=StepRule(StepsConfig(delimiter="."), letters), width=width, batch=batch, step_tokens=step_tokens,
            verifier=Reward(has_target, read=make_reader(config.reward, letters)), value_model=value,
        )  # fmt: skip

    return make


def check_tree(root, letters):
    """Steps end at a full stop, at a stop token, after three tokens or at the limit; nothing follows the end."""
    for node in root.walk():
        if node.note.get("completes"):
            continue
        own = node.all_tokens()
        assert len(own) <= LIMIT and node.is_terminal == (len(own) >= LIMIT or own[-1:] == [letters.eos_id])
        assert not (node.is_terminal and node.children)
        text = [letters.token_bytes(t) for t in node.tokens]
        if node.parent is not None and not node.is_terminal and len(node.tokens) < 3:
            assert b"." in text[-1]
        assert all(b"." not in piece for piece in text[:-1]) or not any(p != b"." for p in text[: text.index(b".")])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_stay_in_their_budget_and_count_it(strategy, engine_of, letters):
    engine, tasks = engine_of(), [0, 1, 2, 3, 4]
    found = search(engine, tasks, strategy, Budget(chains=5, rounds=4), Rules())
    assert len(found) == len(tasks) and all("right" in f.leaf.note for f in found)
    # One more completes a thought that the rounds have left open.
    most = {"chain": 1, "beam": 4 * WIDTH**2 + 1, "mcts": 4 * WIDTH + 1}.get(strategy, 5)
    nodes = [list(f.root.walk())[1:] for f in found]
    for of, f in zip(nodes, found, strict=True):
        assert len(of) <= most and f.leaf in of
    if strategy in ("beam", "mcts"):
        assert engine.spent.nodes == sum(map(len, nodes))
        for f in found:
            assert f.leaf.is_terminal
            check_tree(f.root, letters)
        every = [n for of in nodes for n in of]
        assert engine.spent.reread == sum(len(n.parent.all_tokens()) for n in every)
        assert engine.spent.scored == sum(len(n.all_tokens()) for n in every if not n.note.get("completes"))
    else:
        assert engine.spent.sampled == sum(len(n.tokens) for of in nodes for n in of)
        assert engine.spent.nodes == most * len(tasks)
    assert engine.spent.sampled >= sum(len(n.tokens) for of in nodes for n in of)


def test_values_are_those_of_the_path_alone(engine_of):
    engine = engine_of()
    (found,) = search(engine, [2], "mcts", Budget(rounds=3), Rules())
    model = engine.value_model
    for node in list(found.root.walk())[1:]:
        if node.children:
            continue  # its value is its children's by now
        ids = jnp.asarray([[*engine.tokenizer.encode("aaa"), *engine.tokenizer.encode("<think>"), *node.all_tokens()]])
        hidden, _ = decoder.forward(model.config, model.params, trunks_alone(ids))
        scalar = hidden[0, -1] @ model.params[READOUT][:-1] + model.params[READOUT][-1]
        assert node.value == pytest.approx(float(2 * jax.nn.sigmoid(scalar) - 1), abs=1e-4)


def test_many_trees_share_their_batches(engine_of):
    """Eight searches of four rounds, four trees in a batch."""
    many, alone = engine_of(batch=4), engine_of(batch=4)
    search(many, [0, 1, 2, 3, 4, 0, 1, 2], "mcts", Budget(rounds=4), Rules())
    search(alone, [0], "mcts", Budget(rounds=4), Rules())
    assert 4 <= alone.spent.calls <= 5 and 8 <= many.spent.calls <= 10


def test_searches_that_cannot_be_run_are_refused():
    base = dict(
        tasks=1, chains=1, rounds=None, width=1, batch=6, step_tokens=1, strategy="majority", value="", form=None,
        answer=None,
    )  # fmt: skip
    config = Config(mesh=MeshConfig(data=2))
    search_script.check(SimpleNamespace(**base), config)
    tree = {"strategy": "mcts", "value": "somewhere", "chains": None, "rounds": 2, "form": "priors", "answer": "visits"}
    search_script.check(SimpleNamespace(**base | tree), config)
    for changes, message in (
        ({"chains": 0}, "--chains 0"), ({"step_tokens": 0}, "--step-tokens 0"),
        ({"strategy": "mcts", "chains": None}, "need a value"),
        ({"value": "somewhere"}, "the others use none"), ({"batch": 5}, "--batch 5; .* divisible by .*=2"),
        ({"rounds": 3}, "--rounds with --strategy majority; only beam, mcts"), ({"form": "nodes"}, "only mcts"),
        (tree | {"chains": 2}, "--chains with --strategy mcts"), (tree | {"strategy": "beam"}, "--form with"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            search_script.check(SimpleNamespace(**base | changes), config)
