"""Pairs: layouts, and DPO against plain differentiation of its equation."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import Config, DataConfig, LossConfig, OptimizerConfig, RolloutConfig, SupervisedConfig
from rpt_jax.config.schema import with_values
from rpt_jax.data.preferences import Pair, read_pairs
from rpt_jax.data.templates import make_template
from rpt_jax.errors import ConfigError, DataError
from rpt_jax.models import decoder
from rpt_jax.rl.objective import objective
from rpt_jax.rl.optimizer import init_state, make_optimizer
from rpt_jax.rl.slopes import batch_slopes
from rpt_jax.scoring.logprobs import score
from rpt_jax.train.stages.preferences import Preferences, pair_rows

CONFIG = Config(
    data=DataConfig(template="minimal", trunk_length=12, window_stride=4),
    rollout=RolloutConfig(max_completion_tokens=6),
    supervised=SupervisedConfig(path="pairs.jsonl", objective="dpo", batch_size=3),
)
TAIL, BETA = [3, 4], 0.5


def random_pairs(count, seed=0):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(5, 61, rng.integers(low, high)).tolist()

    return [Pair(trunk=ids(2, 13), chosen=ids(1, 7), rejected=ids(1, 7)) for _ in range(count)]


def log_likelihood(config, params, pair, completion):
    """Log-probability of a completion after trunk and tail, from the logits of the whole sequence."""
    ids = [*pair.trunk, *TAIL, *completion]
    logits = decoder.logits(config, params, jnp.asarray([ids]))
    logprobs = jax.nn.log_softmax(logits[0, len(ids) - len(completion) - 1 : -1])
    return logprobs[jnp.arange(len(completion)), jnp.asarray(completion)].sum()


def test_a_step_is_the_gradient_of_dpos_equation(tiny_config, tiny_params):
    """arXiv:2305.18290 eq. 7, pair by pair, without trunks, branches or padding."""
    pairs, reference = random_pairs(3), jax.tree.map(lambda p: 0.9 * p, tiny_params)

    def plain(params):
        def log_ratio(pair, side):
            return log_likelihood(tiny_config, params, pair, side) - log_likelihood(tiny_config, reference, pair, side)

        def margin(pair):
            return log_ratio(pair, pair.chosen) - log_ratio(pair, pair.rejected)

        return -sum(jax.nn.log_sigmoid(BETA * margin(pair)) for pair in pairs) / len(pairs)

    expected_loss, expected = jax.value_and_grad(plain)(tiny_params)
    rows, num_tokens = pair_rows(pairs, TAIL, CONFIG)
    assert num_tokens == sum(len(p.trunk) + 2 + len(p.chosen) + len(p.rejected) for p in pairs)
    own, ref = (score(tiny_config, p, rows.sequences, temperature=1.0) for p in (tiny_params, reference))
    loss = with_values(LossConfig(objective="dpo"), {"surrogate.dpo_beta": BETA})
    rows, shift = batch_slopes(loss, dataclasses.replace(rows, ref_logprobs=ref), own, 0, jnp.zeros((3, 1, 2)))
    value, found = jax.value_and_grad(lambda p: objective(tiny_config, loss, p, rows)[0])(tiny_params)
    np.testing.assert_allclose(value + shift, expected_loss, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-3), found, expected)


def training(tiny_config, params, mesh, pairs):
    config = dataclasses.replace(CONFIG, model=tiny_config)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, max_grad_norm=1.0, weight_decay=0.0), 40)
    own = Preferences(
        name="warm_start", config=config, mesh=mesh, optimizer=optimizer, examples=pairs, tail=TAIL, start=params
    )
    return own, init_state(jax.tree.map(jnp.copy, params), optimizer, mesh)


def test_pairs_are_learned_and_steps_resume_exactly(tiny_config, tiny_params, mesh):
    pairs = random_pairs(6, seed=1)
    whole, state = training(tiny_config, tiny_params, mesh, pairs)
    records, cursor = [], None
    for number in range(12):
        if number == 4:
            kept, cursor = jax.tree.map(jnp.copy, state), whole.get_cursor()
        state, outcome = whole.step(state, number)
        records.append(outcome.record())
    # At the start, policy and reference are the same: margins are 0, and the loss is ln 2.
    assert records[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and records[0]["margin"] == pytest.approx(
        0, abs=1e-4
    )
    assert records[-1]["pair_accuracy"] == 1 and records[-1]["margin"] > 1
    again, _ = training(tiny_config, tiny_params, mesh, pairs)
    again.set_cursor(json.loads(json.dumps(cursor)))
    for number in range(4, 12):
        kept, _ = again.step(kept, number)
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def written(tmp_path, *records):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def said(role, content):
    return {"role": role, "content": content}


TALKS = {
    name: [said("user", "ab"), said("assistant", text)] for name, text in (("chosen", "c"), ("rejected", "d"))
}  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "ab", "chosen": "c", "rejected": "d"},
        {"prompt": [said("user", "ab")], "chosen": [said("assistant", "c")], "rejected": [said("assistant", "d")]},
        TALKS,
        TALKS | {"prompt": "ab", "score": 3},
    ],
)
def test_layouts_of_a_pair(record, tmp_path, letters):
    template = make_template(letters, CONFIG.data)
    (pair,), skipped = read_pairs(written(tmp_path, record), letters, template, CONFIG)
    assert pair == Pair(
        trunk=[*template.header.tolist(), *letters.encode("ab")],
        chosen=[*letters.encode("c"), letters.eos_id],
        rejected=[*letters.encode("d"), letters.eos_id],
    )
    assert not any(skipped.values())


def test_ids_are_kept_and_unusable_pairs_are_counted(tmp_path, letters):
    template = make_template(letters, CONFIG.data)
    names = {"tokenizer": letters.fingerprint, "template": template.fingerprint}
    good = {"trunk_tokens": [5, 6], "chosen_tokens": [7], "rejected_tokens": [8, 9]} | names
    records = [
        good,
        good | {"rejected_tokens": [7]},
        good | {"trunk_tokens": [5] * 13},
        good | {"chosen_tokens": [5] * 7},
    ]
    pairs, skipped = read_pairs(written(tmp_path, *records), letters, template, CONFIG)
    assert pairs == [Pair(trunk=[5, 6], chosen=[7], rejected=[8, 9])] and list(skipped.values()) == [1, 1, 1]
    with pytest.raises(DataError, match=r"no usable pair \(1 have equal completions\)"):
        read_pairs(written(tmp_path, records[1]), letters, template, CONFIG)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"line 1 has fields \['chosen', 'prompt'\]"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "neither text nor messages"),
        ({"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant"}]}, "neither text nor messages"),
        ({"chosen": "b", "rejected": "c"}, "behind a prompt"),
        ({"prompt": "a", "chosen": "\ud800", "rejected": "c"}, "half of a surrogate pair"),
        ({"trunk_tokens": [5], "tokenizer": "other"}, "of tokenizer 'other'"),
    ],
)
def test_bad_records_name_the_line(record, message, tmp_path, letters):
    with pytest.raises(DataError, match=message):
        read_pairs(written(tmp_path, record), letters, make_template(letters, CONFIG.data), CONFIG)


def test_bad_settings_are_refused(letters):
    with pytest.raises(DataError, match="needs pairs"):
        read_pairs("nowhere.jsonl", letters, make_template(letters, CONFIG.data), CONFIG)
    for values in ({"supervised.path": ""}, {"supervised.pack": True}, {"supervised.draft_fraction": 0.5}):
        with pytest.raises(ConfigError, match="objective='dpo' with"):
            with_values(CONFIG, values).validate()
