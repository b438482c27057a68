"""Reward and value models: official codes' numbers, PyTorch's classifiers, training on shared prompts, bad files."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_parity
from safetensors import safe_open

from experiments import reward_model as script
from rpt_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, RolloutConfig, StepsConfig, SupervisedConfig
from rpt_jax.config.schema import with_values
from rpt_jax.data.graded import Graded, read_graded
from rpt_jax.data.templates import make_template
from rpt_jax.errors import CheckpointError, ConfigError, DataError
from rpt_jax.models import decoder
from rpt_jax.models.hf import load_hf, save_hf
from rpt_jax.models.scalar_head import READOUT
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.reward_models import process as process_models
from rpt_jax.reward_models.bradley_terry import bradley_terry, k_way
from rpt_jax.reward_models.outcome import outcome
from rpt_jax.reward_models.process import aggregate, consistent, process, step_advantages
from rpt_jax.reward_models.value import scaled_sigmoid, value
from rpt_jax.rl.optimizer import init_state, make_optimizer
from rpt_jax.scoring.scalars import score_tokens
from rpt_jax.search.best_of_n import best_of_n, majority, pass_at_k, weighted_vote
from rpt_jax.sequences import several_completions, trunks_alone
from rpt_jax.tokenizer.steps import StepRule, places_of_bytes
from rpt_jax.train.policies import load_reward_model
from rpt_jax.train.stages.reward_model import RewardModelling, graded_rows, reward_model_loss, scores_of

ENTRIES = {e["name"]: e["cases"] for e in json.loads((Path(__file__).parent / "golden" / "vectors.json").read_text())}


def f32(values):
    return jnp.asarray(values, jnp.float32)


# --- Official codes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ENTRIES["reward_model.bradley_terry"])
def test_bradley_terry_equals_trl(case):
    i = case["inputs"]
    margin, centering = f32(0.0 if i["margin"] is None else i["margin"]), i["center_coefficient"] or 0.0

    def loss(chosen, rejected):
        return bradley_terry(chosen, rejected, margin=margin, centering=centering).mean()

    value, (chosen, rejected) = jax.value_and_grad(loss, (0, 1))(f32(i["chosen"]), f32(i["rejected"]))
    np.testing.assert_allclose(value, case["outputs"]["loss"], rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(chosen, case["outputs"]["grad_chosen"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(rejected, case["outputs"]["grad_rejected"], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("case", ENTRIES["reward_model.pairwise_openrlhf"])
def test_bradley_terry_equals_openrlhf(case):
    i, out = case["inputs"], case["outputs"]
    chosen, rejected = f32(i["chosen"]), f32(i["rejected"])
    margin = f32(0.0 if i["margin"] is None else i["margin"])
    np.testing.assert_allclose(bradley_terry(chosen, rejected, margin=margin).mean(), out["loss"], rtol=1e-5)
    np.testing.assert_allclose(bradley_terry(chosen, rejected).mean(), out["log_exp_loss_without_margin"], rtol=1e-5)


def test_all_pairs_of_a_prompt_count_equally():
    """Ranks 2 > 1 = 1 > 0 give five pairs; a padded completion and a prompt without a pair give none."""
    scores, ranks = f32([[0.5, -1.0, 2.0, 0.1, 9.0], [1.0, 2.0, 0, 0, 0]]), f32([[2, 1, 1, 0, 5], [3, 3, 0, 0, 0]])
    mask = jnp.asarray([[True] * 4 + [False], [True, True, False, False, False]])
    pairs = [(0.5, -1.0), (0.5, 2.0), (0.5, 0.1), (-1.0, 0.1), (2.0, 0.1)]
    expected = np.mean([np.log1p(np.exp(-(a - b - 0.25))) for a, b in pairs])
    np.testing.assert_allclose(k_way(scores, ranks, mask, margin_U=f32([0.25, 0.25])), [expected, 0.0], rtol=1e-5)


@pytest.mark.parametrize("case", ENTRIES["prm.step_cross_entropy"])
def test_step_cross_entropy_equals_trl(case):
    """Theirs has two logits, wrong and right; ours is their difference."""
    labels = np.array(case["inputs"]["labels"])
    places = np.flatnonzero(labels >= 0)

    def loss(logits):
        return process((logits[:, 1] - logits[:, 0])[places], f32(labels[places])).mean()

    value, gradient = jax.value_and_grad(loss)(f32(case["inputs"]["logits"]))
    np.testing.assert_allclose(value, case["outputs"]["loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, case["outputs"]["grad"], atol=1e-6)


@pytest.mark.parametrize("case", ENTRIES["prm.step_labels"])
def test_step_labels_are_where_trl_puts_them(case, letters):
    """A step's label is on the last token of its separator. Theirs may keep the last one only; ours keeps all."""
    i, expected = case["inputs"], case["outputs"]["labels"]
    if i["last_step_only"] and not i["is_eval"]:
        expected = [-100] * len(expected)
        expected[-1] = i["labels"][-1]
    separator = "." * i["separator_tokens"]
    steps = ["a" * size for size in i["step_tokens"]]
    tokens = letters.encode("".join(step + separator for step in steps))
    lengths = np.array([len(letters.token_bytes(t)) for t in tokens])
    ends = np.cumsum([len(step + separator) for step in steps]).tolist()
    found = np.full(i["prompt_tokens"] + len(tokens), -100)
    kept = slice(-1, None) if i["last_step_only"] and not i["is_eval"] else slice(None)
    found[i["prompt_tokens"] + np.array(places_of_bytes(lengths, ends))[kept]] = i["labels"][kept]
    if i["max_completion"] is not None:
        # They truncate; here such an example is skipped and counted.
        found = found[: i["prompt_tokens"] + i["max_completion"]]
    if i["max_length"] is not None:
        found = found[: i["max_length"]]
    assert found.tolist() == expected


@pytest.mark.parametrize("case", ENTRIES["value.x1_scaled_sigmoid_mse"])
def test_values_equal_x1(case):
    """Theirs are bfloat16."""
    scores, labels = f32(case["inputs"]["pre_activation"]), f32(case["inputs"]["labels"])
    np.testing.assert_allclose(scaled_sigmoid(scores), case["outputs"]["values"], atol=1e-2)
    mask = labels != -100
    np.testing.assert_allclose(value(scores, labels).mean(where=mask), case["outputs"]["loss"], rtol=2e-2)


@pytest.mark.parametrize("case", ENTRIES["prm.step_aggregation"])
def test_aggregations_equal_search_and_learn(case):
    p = f32([*case["inputs"]["step_scores"], 0.123])  # and padding
    mask = jnp.arange(len(p)) < len(p) - 1
    for how, expected in case["outputs"].items():
        np.testing.assert_allclose(aggregate(p, mask, how), expected, rtol=1e-5)
    np.testing.assert_allclose(aggregate(p, mask, "mean"), np.mean(p[:-1]), rtol=1e-5)
    assert aggregate(p, jnp.zeros_like(mask), "min") == 0
    with pytest.raises(ValueError, match="min, prod, last, mean"):
        aggregate(p, mask, "max")


@pytest.mark.parametrize("case", ENTRIES["prm.best_of_n_and_vote"])
def test_best_of_n_and_votes_equal_openr(case):
    answers, steps, out = case["inputs"]["answers"], case["inputs"]["step_scores"], case["outputs"]
    lowest, last = ([how(s) if s else -1 for s in steps] for how in (min, lambda s: s[-1]))
    assert majority(answers) == out["majority"]
    assert [best_of_n(answers, lowest), best_of_n(answers, last)] == [out["min_max"], out["last_max"]]
    assert [weighted_vote(answers, lowest), weighted_vote(answers, last)] == [out["min_vote"], out["last_vote"]]


@pytest.mark.parametrize("case", ENTRIES["vote.weighted_and_majority"])
def test_votes_equal_search_and_learn(case):
    answers, scores = case["inputs"]["answers"], case["inputs"]["scores"]
    assert weighted_vote(answers, scores) == case["outputs"]["weighted"]
    assert majority(answers) == case["outputs"]["majority"]


def test_no_answer_never_wins():
    assert majority([None, None, "a"]) == "a" and best_of_n([None, "b"], [9.0, 0.1]) == "b"
    assert majority([None]) is None and best_of_n([], []) is None


@pytest.mark.parametrize("case", ENTRIES["pass_at_k"])
def test_pass_at_k_equals_human_eval(case):
    i = case["inputs"]
    np.testing.assert_allclose(pass_at_k(i["n"], i["c"], i["k"]), case["outputs"]["pass_at_k"], atol=1e-6)


# --- Functions of scores -------------------------------------------------------------------------------------------


def test_step_advantages_by_hand():
    """Steps 1, 0 in one rollout and .5 in the other: mean .5, deviation sqrt(1/6)."""
    rewards, ends = f32([[[[0, 1, 0, 0], [0.5, 9, 9, 9]]]]), jnp.asarray([[[[0, 1, 0, 1], [1, 0, 0, 0]]]], bool)
    z = 0.5 / np.sqrt(1 / 6)
    np.testing.assert_allclose(step_advantages(rewards, ends)[0, 0], [[0, 0, -z, -z], [0, 0, 0, 0]], atol=1e-4)
    # Equal steps have no advantage, and neither has a group without steps.
    assert not np.asarray(step_advantages(jnp.ones((1, 1, 2, 4)), ends)).any()
    assert not np.asarray(step_advantages(rewards, jnp.zeros_like(ends))).any()


def test_prof_keeps_the_best_right_and_the_worst_wrong():
    scores, right = f32([[[0.9, 0.1, 0.5, 0.8, 0.2, 0.3]]]), jnp.asarray([[[1, 1, 1, 0, 0, 0]]], bool)
    assert consistent(scores, right, keep=0.5)[0, 0].tolist() == [True, False, True, False, True, True]
    assert consistent(scores, right, keep=1 / 3)[0, 0].tolist() == [True, False, False, False, True, False]
    assert consistent(scores, right, keep=1.0).all()
    only = consistent(scores, jnp.zeros_like(right), keep=0.01)[0, 0]
    assert only.tolist() == [False, True, False, False, False, False]


def slow_ends(pieces, delimiter):
    """Tokens in which the delimiter ends, with other bytes since the last end; and the last token."""
    text, found, start = b"", [], 0
    for place, piece in enumerate(pieces):
        for byte in piece:
            text += bytes([byte])
            if text[start:].endswith(delimiter):
                if text[start : -len(delimiter)]:
                    found.append(place)
                start = len(text)
    return sorted({*found, len(pieces) - 1})


@pytest.mark.parametrize("delimiter", ["ab", "aab", ".", "aba"])
def test_steps_end_where_a_slow_reader_finds_them(delimiter, letters):
    rng, rule = np.random.default_rng(0), StepRule(StepsConfig(delimiter=delimiter), letters)
    entries = [letters.encode(c)[0] for c in "ab.c"] + [letters.encode("</think>")[0]]
    rows = [rng.choice(entries, rng.integers(1, 14)).tolist() for _ in range(60)]
    tokens, mask = np.zeros((1, 60, 14), np.int32), np.zeros((1, 60, 14), bool)
    for r, row in enumerate(rows):
        tokens[0, r, : len(row)], mask[0, r, : len(row)] = row, True
    on_device = np.asarray(rule.ends_of_rows(jnp.asarray(tokens), jnp.asarray(mask)))[0]
    for r, row in enumerate(rows):
        expected = slow_ends([letters.token_bytes(t) for t in row], delimiter.encode())
        assert rule.ends(row) == expected == np.flatnonzero(on_device[r]).tolist()


def test_steps_of_k_tokens_and_at_marks(letters):
    row = letters.encode("abc.de")
    assert StepRule(StepsConfig(every_tokens=4), letters).ends(row) == [3, 5]
    assert StepRule(StepsConfig(marks=("c", "d")), letters).ends(row) == [2, 4, 5]
    mask = jnp.ones((1, 1, 6), bool)
    for config in (StepsConfig(every_tokens=4), StepsConfig(marks=("c", "d"))):
        rule = StepRule(config, letters)
        found = rule.ends_of_rows(jnp.asarray([[row]]), mask)
        assert np.flatnonzero(found[0, 0]).tolist() == rule.ends(row)
    with pytest.raises(ConfigError, match="marks has 'ab'"):
        StepRule(StepsConfig(marks=("ab",)), letters)
    for steps in (StepsConfig(delimiter=""), StepsConfig(every_tokens=2, marks=("c",))):
        with pytest.raises(ConfigError, match="Set one of them"):
            dataclasses.replace(Config(), steps=steps).validate()


# --- PyTorch's classifiers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", torch_parity.CLASSIFIERS)
@pytest.mark.parametrize("case", torch_parity.CLASSIFIED)
def test_scores_equal_transformers_both_ways(case, kind, tmp_path, mesh):
    """Theirs load here, ours load there: scores within 1e-5."""
    tensors = torch_parity.write_classifier(tmp_path / "in", case, kind)
    config, params = load_hf(tmp_path / "in")
    assert "head" not in params and len(params[READOUT]) == config.width + (kind == "token")
    ids = torch_parity.token_ids()
    split = 20  # the prompt is the trunk, the rest two branches of it
    tokens = np.stack([ids[:, split:], ids[:, split:]], axis=1).astype(np.int32)
    cuts = np.full(2, split - 1, np.int32)
    trunks = ids[:, : split - 1].astype(np.int32)
    sequences = several_completions(trunks, cuts, [0], tokens, np.ones(tokens.shape, bool))
    sequences = dataclasses.replace(sequences, tail_tokens=ids[:, split - 1 : split, None].astype(np.int32))
    scores = np.asarray(score_tokens(config, params, sequences))
    np.testing.assert_array_equal(scores[:, 0], scores[:, 1])
    expected = [np.load(torch_parity.GOLDEN)[f"{case} | {kind}"]]
    save_hf(tmp_path / "out", config, params)
    if importlib.util.find_spec("torch"):
        expected += [torch_parity.torch_scores(tmp_path / name, kind) for name in ("in", "out")]
    for theirs in expected:
        ours = scores[:, 0, -1] if kind == "sequence" else scores[:, 0]
        np.testing.assert_allclose(ours, theirs if kind == "sequence" else theirs[:, split:], atol=1e-5)
    # Every tensor is written as it was read.
    _, again = load_hf(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == json.loads((tmp_path / "in" / "config.json").read_text())["architectures"]
    assert set(tensors) == set(_tensor_names(tmp_path / "out"))


def _tensor_names(directory):
    with safe_open(directory / "model.safetensors", "np") as file:
        return list(file.keys())


def test_other_classifiers_are_refused(tmp_path):
    case = torch_parity.CLASSIFIED[1]
    torch_parity.write_classifier(tmp_path, case, "sequence")
    config = json.loads((tmp_path / "config.json").read_text())
    two = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config | two))
    with pytest.raises(CheckpointError, match="num_labels=2 is not supported"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 12, "head_dim": 10}))
    with pytest.raises(CheckpointError, match=r"score.weight is \[1, 24\]"):
        load_hf(tmp_path)
    torch_parity.write_checkpoint(tmp_path / "lm", case)
    with pytest.raises(ConfigError, match="is a language model"):
        load_reward_model(str(tmp_path / "lm"), make_mesh(MeshConfig()))


# --- Training ------------------------------------------------------------------------------------------------------

TAIL = [3, 4]


def config_of(objective, **values):
    base = Config(
        data=DataConfig(template="minimal", trunk_length=12, window_stride=4),
        rollout=RolloutConfig(max_completion_tokens=8),
        supervised=SupervisedConfig(path="graded.jsonl", objective=objective, batch_size=4),
        run=dataclasses.replace(Config().run, num_steps=0),
    )
    return with_values(base, values)


def random_graded(objective, count, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        number = int(rng.integers(2, 4)) if objective == "bradley_terry" else 1
        rows = [rng.integers(5, 61, rng.integers(2, 9)).tolist() for _ in range(number)]
        if objective in ("process", "value"):
            places = [sorted({int(rng.integers(0, len(row))), len(row) - 1}) for row in rows]
            low = -1.0 if objective == "value" else 0.0
            labels = [[float(rng.choice([low, 1.0])) for _ in of] for of in places]
        else:
            places = [[len(row) - 1] for row in rows]
            labels = [[float(i)] for i in range(number)] if number > 1 else [[float(rng.integers(0, 2))]]
        trunk = rng.integers(5, 61, rng.integers(2, 13)).tolist()
        found.append(Graded(trunk=trunk, completions=rows, places=places, labels=labels, margin=0.1, record={}))
    return found


def plain_score(config, params, example, row, place):
    """The readout behind a token of the whole sequence, run alone."""
    ids = jnp.asarray([[*example.trunk, *TAIL, *example.completions[row][: place + 1]]], jnp.int32)
    hidden, _ = decoder.forward(config, params, trunks_alone(ids))
    readout = params[READOUT]
    return hidden[0, -1] @ readout[: config.width] + (readout[config.width] if len(readout) > config.width else 0.0)


def plain_loss(config, objective, params, examples, centering):
    terms = []
    for example in examples:
        scores = [
            [plain_score(config, params, example, r, place) for place in places]
            for r, places in enumerate(example.places)
        ]
        if objective == "bradley_terry":
            of_prompt = []
            for a in range(len(scores)):
                for b in range(len(scores)):
                    if example.labels[a][0] > example.labels[b][0]:
                        better, worse = scores[a][0], scores[b][0]
                        margin = better - worse - example.margin
                        of_prompt.append(-jax.nn.log_sigmoid(margin) + centering * (better + worse) ** 2)
            terms.append(sum(of_prompt) / len(of_prompt))
            continue
        for score, label in zip(scores[0], example.labels[0], strict=True):
            if objective == "value":
                terms.append((2 * jax.nn.sigmoid(score) - 1 - label) ** 2)
            else:
                p = jax.nn.sigmoid(score)
                terms.append(-(label * jnp.log(p) + (1 - label) * jnp.log1p(-p)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("objective", ["bradley_terry", "outcome", "process", "value"])
def test_a_batch_on_shared_prompts_is_the_plain_loss(objective, tiny_config, tiny_params):
    """Against each completion run alone, without branches or padding."""
    examples, config = random_graded(objective, 4), config_of(objective, **{"supervised.centering": 0.1})
    width = tiny_config.width + (objective in ("process", "value"))
    params = tiny_params | {READOUT: 0.3 * jnp.asarray(np.random.default_rng(1).normal(size=width), jnp.float32)}
    rows, num_tokens = graded_rows(examples, TAIL, config)
    assert num_tokens == sum(len(e.trunk) + 2 + sum(map(len, e.completions)) for e in examples)
    loss_fn = reward_model_loss(tiny_config, config.supervised)
    (found, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, rows)
    expected, theirs = jax.value_and_grad(
        lambda p: plain_loss(tiny_config, objective, p, examples, config.supervised.centering)
    )(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-3), gradient, theirs)
    assert 0 <= metrics["accuracy"] <= 1


@pytest.mark.parametrize("objective", ["bradley_terry", "process"])
def test_training_learns_and_resumes_exactly(objective, tiny_config, tiny_params, mesh):
    examples = random_graded(objective, 6, seed=2)
    config = dataclasses.replace(config_of(objective), model=tiny_config)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, max_grad_norm=1.0, weight_decay=0.0), 40)
    start = tiny_params | {READOUT: jnp.zeros(tiny_config.width + (objective == "process"))}

    def training():
        return RewardModelling(
            name="warm_start", config=config, mesh=mesh, optimizer=optimizer, examples=examples, tail=TAIL
        )

    whole, state, records = training(), init_state(jax.tree.map(jnp.copy, start), optimizer, mesh), []
    for number in range(16):
        if number == 5:
            kept, cursor = jax.tree.map(jnp.copy, state), json.loads(json.dumps(whole.get_cursor()))
        state, outcome = whole.step(state, number)
        records.append(outcome.record())
    assert records[0]["mean_score"] == 0 and records[-1]["accuracy"] == 1
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    again = training()
    again.set_cursor(cursor)
    for number in range(5, 16):
        kept, _ = again.step(kept, number)
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    # Scores of a file, in batches that do not divide it.
    found = scores_of(tiny_config, state.params, examples, TAIL, config, mesh, batch_size=4)
    expected = plain_score(tiny_config, state.params, examples[5], 0, examples[5].places[0][-1])
    np.testing.assert_allclose(found[5][0][-1], expected, atol=1e-4)
    assert [list(map(len, rows)) for rows in found] == [list(map(len, e.places)) for e in examples]


# --- Files ---------------------------------------------------------------------------------------------------------


def read(objective, tmp_path, letters, *records, **values):
    path = tmp_path / "graded.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = config_of(objective, **{"steps.delimiter": ".", **values})
    return read_graded(str(path), letters, make_template(letters, config.data), config)


def _rated(text, rating):
    return {"text": text, "rating": rating}


STEPS = {"prompt": "ab", "completions": ["c", "de."], "labels": [True, False]}


@pytest.mark.parametrize(
    ("record", "labels"),
    [
        (STEPS, [1, 0]),
        ({"problem": "ab", "steps": ["c", "de", "x"], "label": 1}, [1, 0]),
        ({"problem": "ab", "steps": ["c", "de"], "label": -1}, [1, 1]),
        (
            {
                "question": {"problem": "ab"},
                "label": {
                    "steps": [
                        {"completions": [_rated("z", -1), _rated("c", 0)], "chosen_completion": 1},
                        {"completions": [_rated("de", -1)], "chosen_completion": None},
                    ]
                },
            },
            [1, 0],
        ),
    ],
)  # fmt: skip
def test_layouts_of_steps(record, labels, tmp_path, letters):
    (found, _), _ = read("process", tmp_path, letters, record, {**STEPS, "labels": [False, True]})
    assert found.completions == [[*letters.encode("c.de."), letters.eos_id]] and found.trunk[-2:] == letters.encode(
        "ab"
    )
    # The last step ends with the end token, which is what rewards read.
    assert found.places == [[1, 5]] and found.labels == [labels]
    (found, _), _ = read("value", tmp_path, letters, record, {**STEPS, "labels": [False, True]})
    assert found.labels == [[2 * label - 1 for label in labels]]


def test_one_file_serves_outcomes_and_steps(tmp_path, letters):
    template = make_template(letters, config_of("process").data)
    names = {"tokenizer": letters.fingerprint, "template": template.fingerprint}
    record = {
        "trunk_tokens": [5, 6],
        "completion_tokens": [7, 8, 9],
        "label": 1.0,
        "places": [0, 2],
        "labels": [1, 0.5],
    }
    records = [record | names, record | names | {"label": 0.0}]
    found, _ = read("outcome", tmp_path, letters, *records)
    assert [(e.places, e.labels) for e in found] == [([[2]], [[1.0]]), ([[2]], [[0.0]])]
    (first, _), _ = read("process", tmp_path, letters, *records)
    assert (first.places, first.labels, first.completions) == ([[0, 2]], [[1.0, 0.5]], [[7, 8, 9]])


def test_ranked_completions(tmp_path, letters):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}
    several = {"prompt": "a", "completions": ["b", "c", "d"], "scores": [1, 5, 1]}
    tie = {"prompt": "a", "completions": ["b", "c"], "scores": [1, 1]}
    found, skipped = read("bradley_terry", tmp_path, letters, pair, several, tie)
    assert skipped["have no two different completions with different scores"] == 1
    assert [(e.labels, e.margin) for e in found] == [([[1.0], [0.0]], 2.0), ([[1.0], [5.0], [1.0]], 0.0)]


@pytest.mark.parametrize(
    ("objective", "record", "message"),
    [
        ("process", {"prompt": "a", "completions": [], "labels": []}, "line 1 has no steps"),
        ("process", {"prompt": "a", "completions": ["b"], "labels": [True, False]}, "1 steps and 2 labels"),
        ("process", {"prompt": "a", "steps": ["b"], "label": 1}, "must be the first wrong step"),
        ("process", {"prompt": "a", "completions": ["b"], "labels": [3]}, "a number from 0 to 1"),
        ("process", {"prompt": "a"}, "steps come as"),
        ("process", {"completions": ["b"], "labels": [1]}, "it needs a prompt"),
        ("process", {"prompt": "a", "completions": 3, "labels": [1]}, "must be a list of steps"),
        ("process", {"prompt": "a", "label": {"steps": [3]}}, "must be a list of objects"),
        ("process", {"prompt": "a", "label": {"steps": [{"chosen_completion": 2}]}}, "chosen_completion 2 of 0"),
        ("outcome", {"prompt": "a", "completion": "\ud800", "label": 1}, "half of a surrogate pair"),
        ("outcome", {"trunk_tokens": [5], "chosen_tokens": [6], "label": 1}, "of tokenizer None"),
        ("outcome", {"prompt": "a", "completion": "b"}, "an outcome needs a label"),
        ("outcome", {"prompt": "a", "label": 1}, "has no completion"),
        ("outcome", {"prompt": "a", "completion": "b", "label": True}, "one label only"),
        ("bradley_terry", {"prompt": "a", "chosen": "b"}, "a preference record needs"),
        ("bradley_terry", {"prompt": "a", "completions": ["b"], "scores": [1]}, "two or more completions"),
        ("outcome", {"trunk_tokens": [5], "completion_tokens": [6], "label": 1, "tokenizer": "x"}, "of tokenizer 'x'"),
        ("outcome", {"prompt": "a", "completion": "b" * 20, "label": 1}, "1 have a longer completion"),
    ],
)
def test_bad_records_are_refused_by_name(objective, record, message, tmp_path, letters):
    with pytest.raises(DataError, match=message):
        read(objective, tmp_path, letters, record)


def test_files_to_score_need_no_labels(tmp_path, letters):
    path, template = tmp_path / "rows.jsonl", make_template(letters, config_of("process").data)
    for objective, record, number in (
        ("outcome", {"prompt": "a", "completion": "b"}, 1),
        ("process", {"prompt": "a", "completions": ["b", "c"]}, 2),
        ("bradley_terry", {"prompt": "a", "completions": ["b", "c", "c"]}, 1),
    ):
        path.write_text(json.dumps(record) + "\n")
        config = config_of(objective, **{"steps.delimiter": "."})
        (found,), _ = read_graded(str(path), letters, template, config, labelled=False)
        assert all(len(places) == number for places in found.places)
        with pytest.raises(DataError):
            read_graded(str(path), letters, template, config)


def test_steps_made_by_another_rule_are_refused(tmp_path, letters):
    template = make_template(letters, config_of("process").data)
    names = {"tokenizer": letters.fingerprint, "template": template.fingerprint}
    record = {"trunk_tokens": [5], "completion_tokens": [6, 7], "places": [0, 1], "labels": [1, 0]} | names
    made = {"delimiter": ",", "every_tokens": 0, "marks": []}
    with pytest.raises(DataError, match="must learn the steps that it will score"):
        read("process", tmp_path, letters, record | {"steps": made})
    (found,), _ = read("process", tmp_path, letters, record | {"steps": made | {"delimiter": "."}})
    assert found.places == [[0, 1]]
    with pytest.raises(DataError, match="has steps as texts"):
        read("process", tmp_path, letters, STEPS, **{"steps.every_tokens": 3})
    unrated = {"question": {"problem": "ab"}, "label": {"steps": [{"completions": [_rated("c", None)]}]}}
    _, skipped = read("process", tmp_path, letters, unrated, STEPS)
    assert skipped["have no rated step"] == 1


def test_labels_beyond_the_last_token_are_refused(tmp_path, letters):
    template = make_template(letters, config_of("process").data)
    names = {"tokenizer": letters.fingerprint, "template": template.fingerprint}
    record = {"trunk_tokens": [5], "completion_tokens": [6], "places": [1], "labels": [1]}
    with pytest.raises(DataError, match="indices of its 1 tokens"):
        read("process", tmp_path, letters, record | names)


def test_settings_of_another_objective_are_refused():
    for values in (
        {"supervised.centering": 0.1},
        {"supervised.value_loss": "cross_entropy", "supervised.centering": 0.0},
    ):
        with pytest.raises(ConfigError, match="it belongs to"):
            config_of("outcome", **values).validate()


def test_a_reward_model_does_no_rl():
    with pytest.raises(ConfigError, match="does no RL"):
        config_of("outcome", **{"run.num_steps": 3}).validate()
    assert process_models.AGGREGATIONS == ("min", "prod", "last", "mean")
    np.testing.assert_allclose(outcome(f32(0.0), f32(0.5)), np.log(2), rtol=1e-6)


# --- The script, on scores by hand ---------------------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch):
    """A way to set the objective, and the examples with their scores; returns the run that the script is given."""

    def given(objective, examples, scores):
        monkeypatch.setattr(script, "read", lambda run, path, **how: examples)
        monkeypatch.setattr(script, "score_all", lambda run, model, of: scores)
        return SimpleNamespace(config=Config(supervised=SupervisedConfig(objective=objective)))

    return given


def graded(trunk, labels, **record):
    places = [list(range(len(of))) for of in labels]
    return Graded(trunk=trunk, completions=[[5] * 9] * len(labels), places=places, labels=labels, record=record)


def test_accuracy_of_pairs_and_by_a_field(scored):
    """Three completions ranked 2 > 1 > 0: the scores order two of the three pairs; a tie is wrong."""
    examples = [graded([1], [[2], [1], [0]], by="a"), graded([2], [[1], [0]], by="b"), graded([3], [[1], [0]], by="b")]
    run = scored("bradley_terry", examples, [[[3.0], [1.0], [2.0]], [[1.0], [1.0]], [[2.0], [1.0]]])
    found = script.judge(run, None, "x", by="by")
    assert found["accuracy"]["value"] == pytest.approx((2 / 3 + 0 + 1) / 3) and found["accuracy"]["n"] == 3
    assert found["accuracy, by b"]["value"] == 0.5 and found["accuracy, by a"]["n"] == 1


def test_the_f1_of_process_bench_by_hand(scored):
    """Mistakes at steps 1 and 0, found and missed; two right solutions, one of them accused: F1 of 1/2 and 1/2."""
    labels = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    examples = [graded([i], [of], steps=["x", "y"], label=k) for i, (of, k) in enumerate(zip(labels, (1, 0, -1, -1)))]
    scores = [[[2.0, -1.0]], [[1.0, -1.0]], [[1.0, 1.0]], [[1.0, -0.5]]]
    found = script.judge(scored("process", examples, scores), None, "x")
    assert found["ProcessBench, F1"]["value"] == 0.5 and found["ProcessBench, solutions without"]["value"] == 0.5
    assert found["accuracy"]["value"] == pytest.approx((1 + 0.5 + 1 + 0.5) / 4)
    only = script.judge(scored("process", examples[2:], scores[2:]), None, "x")
    assert "ProcessBench, F1" not in only and "ProcessBench, solutions with a mistake" not in only


@pytest.mark.parametrize(
    ("objective", "keep", "best_of_n", "expected"),
    [
        ("process", 1.0, False, {"a": -2.0, "b": 0.5, "c": 0.5}),  # the lowest step
        ("value", 1.0, False, {"a": 3.0, "b": 0.5, "c": 0.5}),  # behind the last step
        ("value", 1.0, True, {"a": 3.0, "c": 0.5}),  # a and b answer one prompt
        ("process", 0.34, False, {"b": 0.5}),  # of equal ones the first
    ],
)
def test_files_with_scores(objective, keep, best_of_n, expected, scored, tmp_path):
    examples = [graded([1], [[0, 0]], name="a"), graded([1], [[0, 0]], name="b"), graded([2], [[0, 0]], name="c")]
    run = scored(objective, examples, [[[-2.0, 3.0]], [[0.9, 0.5]], [[0.7, 0.5]]])
    script.score_file(run, None, "x", tmp_path / "out.jsonl", keep=keep, best_of_n=best_of_n)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["name"]: row["score"] for row in rows} == expected and len(rows[0]["step_scores"]) == 2


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (["--by", "x"], ConfigError, "--by without --heldout"),
        (["--keep", "0.5"], ConfigError, "--keep without --score"),
        (["--best-of-n"], ConfigError, "--best-of-n without --score"),
        (["--score", "x"], ConfigError, "--score needs --out"),
        (["--run", "somewhere"], ConfigError, "nothing to do"),
        (["--heldout", "/nowhere.jsonl"], DataError, "matches no file"),
    ],
)
def test_flags_that_would_do_nothing_are_refused_before_training(argv, error, message):
    with pytest.raises(error, match=message):
        script.main(argv)
