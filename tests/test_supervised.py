"""Supervised examples: token-native lines, packing against separate rows, rejection sampling by hand."""

import dataclasses
import itertools
import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import Config, DataConfig, LossConfig, RolloutConfig, SupervisedConfig
from rpt_jax.data.documents import Document
from rpt_jax.data.examples import Example, document_examples, read_examples
from rpt_jax.data.templates import make_template
from rpt_jax.errors import CheckpointError, DataError
from rpt_jax.models import decoder
from rpt_jax.rl.objective import objective
from rpt_jax.rl.optimizer import init_state, make_optimizer
from rpt_jax.sequences import trunks_alone
from rpt_jax.train.loop import fit
from rpt_jax.train.rejection import accepted_rows, write_examples
from rpt_jax.train.stages.supervised import Supervised, batches, make_batch, make_packed_batch
from rpt_jax.train.training import Until

CONFIG = Config(
    data=DataConfig(template="minimal", trunk_length=12, window_stride=4),
    rollout=RolloutConfig(max_completion_tokens=6),
    supervised=SupervisedConfig(batch_size=3, pack=True),
)
TAIL = [3, 4]


def random_examples(count, vocab_size, seed=0):
    """Sample plain texts and prompts with completions, of various lengths and weights."""
    rng = np.random.default_rng(seed)

    def ids(n):
        return rng.integers(0, vocab_size, n).tolist()

    return [
        Example(
            trunk=ids(rng.integers(2, 13)),
            first=int(rng.integers(1, 3)),
            weight=float(rng.choice([0.0, 0.2, 1.0])),
            completion=ids(rng.integers(1, 7)) if rng.random() < 0.6 else None,
        )
        for _ in range(count)
    ]


def test_packed_rows_give_the_loss_and_gradient_of_separate_rows(tiny_config, tiny_params):
    examples = random_examples(40, tiny_config.vocab_size)
    packed, taken, num_tokens = make_packed_batch(iter(examples).__next__, 6, CONFIG, TAIL)
    assert 6 < taken < 40 and num_tokens == sum(e.num_tokens(2) for e in examples[:taken])
    assert packed.sequences.trunk_tokens.shape == (6, 12 + 2 + 6)
    separate = make_batch(examples[:taken], CONFIG, TAIL)
    grad = jax.jit(jax.value_and_grad(lambda p, b: objective(tiny_config, LossConfig(), p, b)[0]))
    (loss, gradient), (expected_loss, expected) = grad(tiny_params, packed), grad(tiny_params, separate)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-3), gradient, expected)


def test_neighbours_in_a_row_do_not_see_each_other(tiny_config, tiny_params):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, tiny_config.vocab_size, (1, 12)).astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 7], np.int32)
    packed = trunks_alone(tokens, segments)
    hidden, _ = decoder.forward(tiny_config, tiny_params, packed)
    alone, _ = decoder.forward(tiny_config, tiny_params, trunks_alone(jnp.asarray(tokens[:, 5:])))
    np.testing.assert_allclose(hidden[:, 5:], alone, atol=1e-5)
    with pytest.raises(ValueError, match="cannot have prompts"):
        prompt = dict(
            cuts=np.ones((1, 1), np.int32), tail_tokens=tokens[None, :, :2], tail_lengths=np.full((1, 1), 2, np.int32)
        )
        decoder.forward(tiny_config, tiny_params, dataclasses.replace(packed, **prompt))


@pytest.mark.parametrize("pack", [True, False])
def test_batches_take_every_example_once_an_epoch_in_order(pack):
    examples = random_examples(17, 50)
    config = dataclasses.replace(CONFIG, supervised=dataclasses.replace(CONFIG.supervised, pack=pack))
    seen = []
    for batch, *_ in itertools.islice(batches(examples, config, TAIL, shuffle=False), 30):
        if pack:
            for number in range(1, batch.sequences.trunk_segments.max() + 1):
                seen.append(batch.sequences.trunk_tokens[batch.sequences.trunk_segments == number].tolist())
        else:
            for u in range(3):
                length = np.flatnonzero(batch.trunk_weights[u] > 0)
                seen.append((u, length.tolist()))
    if pack:
        whole = [e.trunk + (TAIL + e.completion if e.completion else []) for e in examples]
        assert seen[:51] == (whole * 3)[:51]
    else:
        assert len(seen) == 90


def test_document_examples_are_made_when_asked_for(letters):
    documents = [Document(id=str(n), tokens=np.arange(2, 2 + n)) for n in (1, 9, 10, 23)]
    examples = document_examples(documents, letters, 10)
    assert [len(examples[i].trunk) for i in range(len(examples))] == [1, 9, 10, 10, 10, 5]
    assert examples[4].trunk == list(range(11, 21)) and [len(e.trunk) for e in examples.sample(3)] == [1, 10, 5]
    with pytest.raises(IndexError):
        examples[6]


def test_after_a_bos_every_token_is_predicted_once_from_those_before_it():
    with_bos = SimpleNamespace(bos_id=99)
    examples = document_examples([Document(id="d", tokens=np.arange(2, 25))], with_bos, 10)
    assert [t for e in examples for t in e.trunk[e.first :]] == list(range(2, 25))
    for e in examples:
        assert e.trunk[0] == 99 and (e.trunk[e.first] == 2 or e.first == 2)


def test_updates_that_are_skipped_in_a_row_stop_the_stage(tiny_config, tiny_params, mesh):
    config = dataclasses.replace(CONFIG, model=tiny_config)
    optimizer = make_optimizer(config.optimizer, 40)
    broken = jax.tree.map(lambda p: p * np.nan, tiny_params)  # a copy, because an update donates its state
    training = Supervised(
        name="warm_start", config=config, mesh=mesh, optimizer=optimizer, tail=TAIL, shuffle=False,
        examples=random_examples(40, tiny_config.vocab_size),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="10 updates in a row had a non-finite loss"):
        fit(
            training, init_state(broken, optimizer, mesh), None, None, Until(steps=40), save_every_steps=100,
            max_skipped_updates=10,
        )  # fmt: skip


def rollout(prompt, completion, reward, truncated=False):
    return {"trunk_tokens": prompt, "completion_tokens": completion, "reward": reward, "truncated": truncated}


def test_rejection_sampling_by_hand():
    rows = [
        rollout([1, 2], [5, 6, 7], 1.0),
        rollout([1, 2], [5, 6, 7], 1.0),  # a duplicate
        rollout([1, 2], [8, 9], 1.0),
        rollout([1, 2], [4], 1.0),
        rollout([1, 2], [3], 0.0),
        rollout([7], [4, 4], 1.0, truncated=True),
        rollout([7], [4, 4, 9], 0.5),
    ]
    kept, counts = accepted_rows(rows, min_reward=1.0, per_prompt=2)
    assert [r["completion_tokens"] for r in kept] == [[4], [8, 9]]
    assert counts == {
        "rollouts": 7, "low_reward": 2, "truncated": 1, "repeated": 1, "over_limit": 1, "kept": 2
    }  # fmt: skip
    kept, _ = accepted_rows(rows, min_reward=0.5, per_prompt=9)
    assert [r["completion_tokens"] for r in kept] == [[4], [8, 9], [5, 6, 7], [4, 4, 9]]


def test_sampled_ids_are_read_as_they_were_written(tmp_path, letters):
    template = make_template(letters, CONFIG.data)
    path = tmp_path / "cold.jsonl"
    rows = [rollout([5, 6, 7], [8, letters.eos_id], 1.0)]
    write_examples(path, rows, tokenizer=letters.fingerprint, template=template.fingerprint)
    (example,) = read_examples(str(path), letters, template, CONFIG)
    assert example == Example(trunk=[5, 6, 7], first=1, weight=0.0, completion=[8, letters.eos_id])
    batch = make_batch([example], CONFIG, template.tail)
    assert batch.trunk_weights.sum() == 0 and batch.likelihood_weights.sum() == pytest.approx(1)


GOOD = {"trunk_tokens": [5], "completion_tokens": [6]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**GOOD, "tokenizer": "other"}, "line 2 has ids of tokenizer 'other'"),
        ({**GOOD, "template": "other"}, "line 2 was sampled with another prompt template"),
        ({"text": ""}, "line 2: an empty text"),
        ({"text": "\ud800"}, "line 2 contains half of a surrogate pair"),
        ({"text": "a", "text_weight": 10**400}, "text_weight is 1"),
        ({"text": "a", "text_weight": True}, "text_weight is True"),
        ({**GOOD, "trunk_tokens": [10**6]}, "line 2: trunk_tokens and completion_tokens"),
        ({**GOOD, "trunk_tokens": "abc"}, "must be lists of ids"),
        ({**GOOD, "completion_tokens": []}, "must be lists of ids"),
        ({**GOOD, "completion_tokens": [True]}, "must be lists of ids"),
        ({**GOOD, "completion_tokens": [6] * 7}, "the completion takes 7 tokens"),
        ({**GOOD, "trunk_tokens": [6] * 13}, "the text takes 13 tokens"),
        ({"text": 3}, "line 2 has fields"),
        ({"text": "a", "completion": 3}, "any 'completion' must be a string"),
        ({"text": "a", "text_weight": -1}, "text_weight is -1"),
        ({"text": "a", "text_weight": "1"}, "text_weight is '1'"),
        ({"completion": "a"}, "needs a string 'text'"),
    ],
)
def test_bad_supervised_lines_are_refused_with_file_and_line(tmp_path, letters, line, message):
    path = tmp_path / "s.jsonl"
    template = make_template(letters, CONFIG.data)
    if "trunk_tokens" in line:
        line = {"tokenizer": letters.fingerprint, "template": template.fingerprint, **line}
    path.write_text(json.dumps({"text": "a b"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=message) as error:
        read_examples(str(path), letters, make_template(letters, CONFIG.data), CONFIG)
    assert "s.jsonl line 2" in str(error.value)


@pytest.mark.parametrize("pack", [False, True])
def test_batches_resume_from_any_of_them(pack):
    """A resumed process starts at the position that is returned with a batch."""
    examples = random_examples(17, 50)
    config = dataclasses.replace(CONFIG, supervised=dataclasses.replace(CONFIG.supervised, pack=pack))
    straight = list(itertools.islice(batches(examples, config, TAIL, shuffle=True), 6))
    for k in range(1, 6):
        position = straight[k - 1][2]
        batch, num_tokens, _ = next(batches(examples, config, TAIL, shuffle=True, position=position))
        assert num_tokens == straight[k][1]
        np.testing.assert_array_equal(batch.sequences.trunk_tokens, straight[k][0].sequences.trunk_tokens)
