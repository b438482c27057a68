"""Several stop ids, and completions that continue after given tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rollout import EOS, make_tasks

from rpt_jax.config import MeshConfig
from rpt_jax.models import decoder
from rpt_jax.parallel.mesh import make_mesh, shard_batch
from rpt_jax.rollout.engine import STATIC, Schedule, generate, rollout_key
from rpt_jax.scoring.logprobs import score
from rpt_jax.sequences import completions, continued

LIMIT = 14
OPTIONS = dict(max_completion_tokens=LIMIT, temperature=2.0, top_p=1.0, top_k=0, vocab_size=12)


def roll(config, params, prompts, key=None, **options):
    key = rollout_key(0, 7) if key is None else key
    return generate(config, params, prompts, key, **OPTIONS | dict(stop_ids=(EOS,)) | options)


@pytest.fixture(scope="module")
def prompts(tiny_config):
    return make_tasks(tiny_config, U=4, M=2, G=3).prompts


@pytest.fixture(scope="module")
def whole(tiny_config, tiny_params, prompts):
    return jax.tree.map(np.asarray, roll(tiny_config, tiny_params, prompts))


def test_a_row_stops_at_any_of_several_ids(tiny_config, tiny_params, prompts):
    """Compare with a sample that never stops, cut after its first stop token: the same noise gives the same tokens."""
    endless = roll(tiny_config, tiny_params, prompts, stop_ids=())
    stopped = roll(tiny_config, tiny_params, prompts, stop_ids=(EOS, 5, 9))
    tokens, mask, truncated = (np.asarray(x) for x in (stopped.tokens, stopped.mask, stopped.truncated))
    ends = set()
    for u, r in np.ndindex(4, 6):
        row = np.asarray(endless.tokens)[u, r]
        if not np.asarray(endless.mask)[u, r].any():
            continue
        (stops,) = np.nonzero(np.isin(row, (EOS, 5, 9)))
        length = int(stops[0]) + 1 if len(stops) else LIMIT
        assert mask[u, r].sum() == length and tokens[u, r, :length].tolist() == row[:length].tolist()
        assert truncated[u, r] == (not len(stops))
        ends |= set(row[stops[:1]].tolist())
    assert ends == {EOS, 5, 9}
    with pytest.raises(ValueError, match="stop ids"):
        roll(tiny_config, tiny_params, prompts, stop_ids=(-1,))


def agree(found, whole, lengths, *, tolerance=2e-5) -> int:
    """Check that continued rows equal the uncut ones in tokens, masks and log-probabilities; return their number."""
    for name in ("tokens", "mask", "truncated"):
        np.testing.assert_array_equal(np.asarray(getattr(found, name)), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(found.sampler_logprobs, whole.sampler_logprobs, atol=tolerance)
    sizes = whole.mask.sum(-1)
    return int(((lengths.reshape(sizes.shape) > 0) & (lengths.reshape(sizes.shape) < sizes)).sum())


@pytest.mark.parametrize(
    "options",
    [{}, dict(slots_per_trunk=2, schedule=Schedule(window=4)), dict(schedule=STATIC)],
    ids=["compaction", "few slots and windows", "static"],
)
def test_a_row_that_is_cut_after_k_tokens_and_continued_is_the_uncut_row(
    tiny_config, tiny_params, prompts, whole, options
):
    """For every k, all rows at once: finished ones draw nothing, the others continue."""
    went_on = 0
    for k in range(1, LIMIT + 1):
        lengths = np.minimum(whole.mask.sum(-1), k).reshape(4, 2, 3).astype(np.int32)
        found = roll(tiny_config, tiny_params, continued(prompts, whole, lengths), **options)
        went_on += agree(found, whole, lengths)
        assert not np.asarray(found.num_rejected).any()
    assert went_on > 60


def test_continued_rows_and_fresh_ones_in_one_batch(tiny_config, tiny_params, prompts, whole):
    lengths = np.random.default_rng(0).integers(0, 6, (4, 2, 3)).astype(np.int32)
    lengths[0] = 0
    for options in ({}, dict(slots_per_trunk=1, schedule=Schedule(window=8))):
        found = roll(tiny_config, tiny_params, continued(prompts, whole, lengths), **options)
        assert agree(found, whole, np.minimum(lengths, whole.mask.sum(-1).reshape(4, 2, 3))) > 5


def test_noise_is_that_of_the_step_that_a_row_was_born_in(tiny_config, tiny_params, prompts, whole):
    """Trunks started in step 7 continue in step 9, together with others that start there."""
    lengths = np.full((4, 2, 3), 3, np.int32)
    lengths[2:] = 0
    born = np.array([7, 7, 9, 9], np.int32)
    mixed = dataclasses.replace(continued(prompts, whole, lengths), born_step=born)
    found = roll(tiny_config, tiny_params, mixed, rollout_key(0, born))
    later = roll(tiny_config, tiny_params, prompts, rollout_key(0, 9))
    np.testing.assert_array_equal(np.asarray(found.tokens)[:2], whole.tokens[:2])
    np.testing.assert_array_equal(np.asarray(found.tokens)[2:], np.asarray(later.tokens)[2:])
    assert (whole.tokens[2:] != np.asarray(later.tokens)[2:]).any()


def test_log_probabilities_of_new_tokens_are_those_of_teacher_forcing(tiny_config, tiny_params, prompts, whole):
    lengths = np.minimum(whole.mask.sum(-1), 5).reshape(4, 2, 3).astype(np.int32)
    unknown = dataclasses.replace(continued(prompts, whole, lengths), prefix_logprobs=None)
    found = roll(tiny_config, tiny_params, unknown)
    # The sampler excludes unused vocabulary entries and teacher forcing does not, so this model has none.
    small = dataclasses.replace(tiny_config, vocab_size=12)
    params = tiny_params | {name: tiny_params[name][:12] for name in ("embedding", "head")}
    own = make_tasks(small, U=4, M=2, G=3).prompts
    rolled = roll(small, params, own)
    again = roll(small, params, dataclasses.replace(continued(own, rolled, lengths), prefix_logprobs=None))
    forced = score(small, params, completions(own, again.tokens, again.mask), temperature=2.0)
    is_new = np.asarray(again.mask) & (np.arange(LIMIT) >= lengths.reshape(4, 6)[..., None])
    assert is_new.sum() > 30
    np.testing.assert_allclose(np.asarray(again.sampler_logprobs)[is_new], np.asarray(forced)[is_new], atol=2e-5)
    is_given = np.arange(LIMIT) < lengths.reshape(4, 6)[..., None]
    assert not np.asarray(found.sampler_logprobs)[is_given & whole.mask].any()


def test_rows_continue_on_a_mesh(tiny_config):
    """2 x 2 x 2 devices: trunks stay on their devices; continued rows equal the uncut ones except near-ties."""
    config = dataclasses.replace(tiny_config, vocab_size=64)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = decoder.init_params(config, mesh, jax.random.key(2))
    prompts = shard_batch(mesh, make_tasks(config, U=4, M=2, G=3).prompts)
    whole = roll(config, params, prompts)
    lengths = jnp.minimum(whole.mask.sum(-1), 4).reshape(4, 2, 3).astype(jnp.int32)
    found = roll(config, params, continued(prompts, whole, lengths), schedule=Schedule(window=4))
    same = (np.asarray(found.tokens) == np.asarray(whole.tokens)).all(-1)
    assert same.mean() > 0.9
