"""Partial rollouts: rows that wait end as if they had never stopped, are trained on once, and survive a restart."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rollout import EOS, make_tasks
from test_system import corpus, tiny_run  # noqa: F401  (a fixture)

from rpt_jax.config import Config, MeshConfig
from rpt_jax.config.schema import with_values
from rpt_jax.errors import ConfigError
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.rl.trainer import Trainer
from rpt_jax.rl.waiting import Waiting, repeats
from rpt_jax.rollout.engine import generate, rollout_key
from rpt_jax.train.pipeline import run_stages
from rpt_jax.train.policies import newest_of_run
from rpt_jax.train.run_directory import read_records
from rpt_jax.types import Earned

LIMIT, NEW = 14, 4
OPTIONS = dict(max_completion_tokens=LIMIT, temperature=2.0, top_p=1.0, top_k=0, vocab_size=12, stop_ids=(EOS,))


class Iterator:
    """Trunks 0, 1, 2, ... of a fixed set, whose prompts are those of `make_tasks`."""

    def __init__(self, tasks, num_trunks):
        self.tasks, self.num_trunks, self.next = tasks, num_trunks, 0

    def take(self, number):
        first, self.next = self.next, self.next + number
        return [[i] for i in range(first, first + number)]

    def make(self, trunks):
        rows = np.array([ids[0] for ids in trunks]) % len(self.tasks.prompts.cuts)
        return jax.tree.map(lambda x: np.asarray(x)[rows], self.tasks)


@pytest.fixture(scope="module")
def tasks(tiny_config):
    return make_tasks(tiny_config, U=6, M=2, G=3)


def roll(config, params, prompts, born, **options):
    return generate(config, params, prompts, rollout_key(0, born), **OPTIONS | options)


def run_steps(waiting, iterator, config, params, steps, first=0):
    """Return what each step trains on: {(trunk id, m): (step, tokens, log-probabilities, born)}."""
    found = {}
    for step in range(first, first + steps):
        batch = waiting.next_batch(iterator, step)
        ids = [i[0] for i in waiting._batch_ids]
        rollouts = roll(config, params, batch.prompts, batch.prompts.born_step, new_tokens=NEW)
        # No row draws more than its share.
        given = 0 if batch.prompts.prefix_lengths is None else batch.prompts.prefix_lengths
        drawn = np.asarray(rollouts.mask.sum(-1)).reshape(batch.prompts.row_ids.shape) - given
        assert (drawn <= NEW).all() and (drawn >= 0).all()
        ready, rollouts, repeating = waiting.settle(batch, rollouts)
        shape = batch.prompts.row_ids.shape
        tokens, mask, logprobs = (
            np.asarray(x).reshape(*shape, -1) for x in (rollouts.tokens, rollouts.mask, rollouts.sampler_logprobs)
        )
        for u, m in np.argwhere(np.asarray(ready.prompts.prompt_mask)):
            assert (ids[u], m) not in found
            sizes = mask[u, m].sum(-1)
            found[ids[u], m] = step, [tokens[u, m, g, :n].tolist() for g, n in enumerate(sizes)], logprobs[u, m], (
                int(batch.prompts.born_step[u])
            )  # fmt: skip
        assert ((np.asarray(ready.references.task_ids) >= 0) == np.asarray(ready.prompts.prompt_mask)).all()
        assert not np.asarray(repeating).any()
    return found


def test_rows_that_wait_end_as_if_they_had_never_stopped(tiny_config, tiny_params, tasks):
    """Of constant parameters: every group is trained on once, with the tokens of uncut rows of its first step."""
    waiting, iterator = Waiting(new_tokens=NEW, limit=LIMIT, stop_ids=(EOS,)), Iterator(tasks, 3)
    found = run_steps(waiting, iterator, tiny_config, tiny_params, 9)
    late = 0
    for (i, m), (step, tokens, logprobs, born) in found.items():
        prompts = jax.tree.map(lambda x, i=i: np.asarray(x)[[i % 6]], tasks.prompts)
        whole = roll(tiny_config, tiny_params, prompts, np.array([born], np.int32))
        sizes = np.asarray(whole.mask.sum(-1))[0].reshape(2, 3)[m]
        want = np.asarray(whole.tokens)[0].reshape(2, 3, -1)[m]
        assert tokens == [row[:n].tolist() for row, n in zip(want, sizes, strict=True)]
        want = np.asarray(whole.sampler_logprobs)[0].reshape(2, 3, -1)[m]
        np.testing.assert_allclose(logprobs, want, atol=2e-5)
        # A group of up to NEW tokens ends at once, a longer one as many steps later as it needs.
        assert step == born + -(-sizes.max() // NEW) - 1
        late += step > born
    assert late >= 5 and len(found) >= 10
    # All real groups of the trunks that started early have been trained on.
    oldest = {(i, m) for i in range(3) for m in range(2) if tasks.prompts.prompt_mask[i, m]}
    assert oldest <= found.keys()


def test_what_waits_survives_a_restart_bit_for_bit(tiny_config, tiny_params, tasks):
    straight = Waiting(new_tokens=NEW, limit=LIMIT, stop_ids=(EOS,)), Iterator(tasks, 3)
    first = run_steps(*straight, tiny_config, tiny_params, 2)
    state, position = json.loads(json.dumps(straight[0].get_state())), straight[1].next
    assert len(state) > 0
    rest = run_steps(*straight, tiny_config, tiny_params, 4, first=2)
    resumed = Waiting(new_tokens=NEW, limit=LIMIT, stop_ids=(EOS,)), Iterator(tasks, 3)
    resumed[0].set_state(state)
    resumed[1].next = position
    again = run_steps(*resumed, tiny_config, tiny_params, 4, first=2)
    assert again.keys() == rest.keys() and not first.keys() & rest.keys()
    for key, (step, tokens, logprobs, born) in rest.items():
        assert (step, tokens, born) == (again[key][0], again[key][1], again[key][3])
        np.testing.assert_array_equal(logprobs, again[key][2])


def test_repeats_by_hand():
    assert repeats(np.array([9, 1, 2, 1, 2, 1, 2, 1, 2]), 8)  # (1, 2) four times
    assert not repeats(np.array([1, 2, 3, 1, 2, 3, 1, 2]), 8)  # a piece of three does not fit four times
    assert repeats(np.full(8, 5), 8) and not repeats(np.full(7, 5), 8) and not repeats(np.full(8, 5), 0)
    assert not repeats(np.array([1, 2, 1, 2, 1, 2, 1, 3]), 8)


def test_a_row_that_repeats_itself_ends(tiny_config, tiny_params, tasks):
    """Of a vocabulary of one token every row repeats: all end in the second step, cut."""
    waiting = Waiting(new_tokens=NEW, limit=LIMIT, stop_ids=(EOS,), repeat_window=6)
    iterator = Iterator(tasks, 3)
    for step in range(2):
        batch = waiting.next_batch(iterator, step)
        options = OPTIONS | {"vocab_size": 1, "stop_ids": (EOS + 1,)}
        rollouts = generate(
            tiny_config, tiny_params, batch.prompts, rollout_key(0, batch.prompts.born_step), new_tokens=NEW, **options
        )
        waiting.stop_ids = (EOS + 1,)
        ready, rollouts, repeating = waiting.settle(batch, rollouts)
        mask = np.asarray(ready.prompts.prompt_mask)
        if step == 0:
            assert not mask.any() and len(waiting.trunks) == 3
    np.testing.assert_array_equal(mask, batch.prompts.prompt_mask)
    assert np.asarray(repeating)[mask].all() and not waiting.trunks
    rows = np.repeat(mask, 3, axis=1)
    assert np.asarray(rollouts.truncated)[rows].all() and np.asarray(rollouts.mask.sum(-1))[rows].max() == 2 * NEW


def test_repeats_pay_and_earlier_tokens_may_be_masked():
    settings = {
        "rollout.new_tokens_per_step": 4, "rollout.repeat_window": 4, "rollout.repeat_penalty": 0.5,
        "rollout.earlier_tokens": "mask",
    }  # fmt: skip
    trainer = SimpleNamespace(config=with_values(Config(), settings))
    tasks = SimpleNamespace(prompts=SimpleNamespace(prefix_lengths=jnp.asarray([[[0, 2]]])))
    rollouts = SimpleNamespace(mask=jnp.ones((1, 2, 4), bool))
    earned = Earned(rewards=jnp.asarray([[[1.0, 1.0]]]), faults=jnp.zeros((1, 1, 2), bool), metrics={})
    got = Trainer._settled(trainer, tasks, rollouts, earned, jnp.asarray([[[False, True]]]))
    np.testing.assert_array_equal(got.rewards, [[[1.0, 0.5]]])
    np.testing.assert_array_equal(got.metrics["repeat_fraction"], [[[0.0, 1.0]]])
    np.testing.assert_array_equal(got.token_mask, [[[1, 1, 1, 1], [0, 0, 1, 1]]])


@pytest.mark.parametrize("earlier", ["train", "mask"])
def test_a_run_with_rows_in_waiting_resumes_bit_for_bit(corpus, tmp_path, earlier):  # noqa: F811
    base = with_values(tiny_run(corpus, tmp_path / "whole"), {
        "rollout.new_tokens_per_step": 8, "rollout.earlier_tokens": earlier, "rollout.repeat_window": 8,
        "rollout.repeat_penalty": 0.1, "loss.correction.mode": "token_truncate", "reward.terms": ("likelihood",),
        "run.num_steps": 5, "run.control": False, "checkpoint.every_steps": 1, "eval.every_steps": 5,
    })  # fmt: skip
    run_stages(base)
    parts = with_values(base, {"run.directory": str(tmp_path / "parts")})
    run_stages(parts, stop_at_step=2)
    run_stages(parts)
    mesh = make_mesh(MeshConfig())
    whole, again = (newest_of_run(tmp_path / name, mesh)[0].params for name in ("whole", "parts"))
    for a, b in zip(*map(jax.tree.leaves, (whole, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    records = [r for r in read_records(tmp_path / "whole") if r["stage"] == "rpt"]
    other = [r for r in read_records(tmp_path / "parts") if r["stage"] == "rpt"]
    assert records == other and max(r["trunks_waiting"] for r in records[:-1]) > 0
    assert all(0 <= r["repeat_fraction"] <= 1 for r in records)
    # A step draws at most 8 tokens a row; completions that end later are longer than that.
    assert all(r["tokens_sampled"] <= 8 * 8 * 4 for r in records)
    assert max(r["completion_tokens"] for r in records) > 8 and not any(r["skipped"] for r in records)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.new_tokens_per_step": 256}, "no rollout would ever wait"),
        ({"rollout.new_tokens_per_step": 8, "rollout.dynamic_sampling_from_step": 0}, "dynamic-sampling"),
        ({"rollout.new_tokens_per_step": 8, "reward.terms": ("ravr",)}, "ravr"),
        ({"rollout.earlier_tokens": "mask"}, "earlier-tokens train"),
        ({"rollout.repeat_window": 8}, "repeat-window 0"),
        ({"rollout.new_tokens_per_step": 8, "rollout.repeat_window": 3}, "at least 4"),
        ({"rollout.new_tokens_per_step": 8, "rollout.repeat_penalty": 1.0}, "repeat-penalty 0"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        with_values(Config(), changes).validate()
