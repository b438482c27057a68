"""Sampling one token, and whole rollouts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import MeshConfig
from rpt_jax.models import decoder
from rpt_jax.parallel.mesh import make_mesh, param_shardings, shard_batch
from rpt_jax.rollout import engine
from rpt_jax.rollout.engine import STATIC, Schedule, generate, rollout_key
from rpt_jax.rollout.sampling import greedy, row_keys, sample
from rpt_jax.scoring.logprobs import score
from rpt_jax.sequences import Task, build_tasks, completions, trunks_alone
from rpt_jax.types import TaskBatch

EOS = 1


def draw(logits, num_draws, **options):
    """Tokens, log-probabilities and rejections of many independent draws from one distribution."""
    options = dict(temperature=1.0, top_p=1.0, top_k=0) | options
    keys = row_keys(jax.random.key(7), jnp.arange(num_draws))
    tiled = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (num_draws, len(logits)))
    return tuple(np.asarray(a) for a in jax.jit(lambda: sample(tiled, keys, 0, **options))())


def distribution_of(logits, temperature=1.0, top_p=1.0, top_k=0):
    """Return the truncated distribution f64 [V], the full one f64 [V], and the excluded probability.

    Top-k keeps tokens with fewer than k more likely ones; top-p keeps tokens with less than p of more likely mass.
    """
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    p /= p.sum()
    above_mass = np.array([p[p > x].sum() for x in p])
    above_count = np.array([(p > x).sum() for x in p])
    keep = np.ones(len(p), bool)
    if top_p < 1:
        keep &= above_mass < top_p
    if top_k:
        keep &= above_count < top_k
    return np.where(keep, p, 0) / p[keep].sum(), p, 1 - p[keep].sum()


@pytest.mark.parametrize("vocab", [5, 200])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_p": 0.8}, {"top_k": 3}, {"temperature": 1.5, "top_p": 0.9, "top_k": 20}]
)
def test_sampled_frequencies_follow_the_exact_distribution(vocab, options):
    logits = 2 * np.random.default_rng(vocab).standard_normal(vocab)
    n = 10_000
    tokens, logprobs, rejected = draw(logits, n, **options)
    truncated, full, excluded = distribution_of(logits, **options)
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[truncated == 0].sum() == 0
    # Chi-square over tokens with at least 5 expected draws; 5 standard deviations of slack.
    big = truncated * n >= 5
    chi2 = ((counts[big] - n * truncated[big]) ** 2 / (n * truncated[big])).sum()
    assert chi2 < big.sum() + 5 * np.sqrt(2 * big.sum())
    np.testing.assert_allclose(logprobs, np.log(full[tokens]), atol=1e-5)
    assert abs(rejected.mean() - excluded) < 5 * np.sqrt(max(excluded, 1e-4) / n)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = np.full(300, -np.inf)
    logits[[3, 131, 257]] = 0.0
    tokens, logprobs, _ = draw(logits, 5000)
    assert set(tokens) == {3, 131, 257}
    np.testing.assert_allclose(logprobs, np.log(1 / 3), rtol=1e-5)


def test_greedy_takes_the_first_of_equal_maxima():
    token, logprob = greedy(jnp.asarray([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]]))
    assert token.tolist() == [1, 0]
    # exp(3) / (exp(1) + 2 exp(3)) and exp(2) / (exp(2) + e + 1)
    np.testing.assert_allclose(np.exp(logprob), [20.0855 / 42.8893, 7.38906 / 11.10734], rtol=1e-5)


def make_tasks(config, seed=0, U=3, M=2, G=4, L=13, E=3) -> TaskBatch:
    """Random trunks, cuts and tails; the last prompt of the last trunk is padding."""
    rng = np.random.default_rng(seed)
    trunks = rng.integers(2, config.vocab_size, (U, L)).astype(np.int32)
    cuts = rng.integers(1, L + 1, (U, M)).astype(np.int32)
    tails = rng.integers(2, config.vocab_size, (U, M, E)).astype(np.int32)
    ids = np.arange(U * M).reshape(U, M)
    row_ids = (ids[..., None] * G + np.arange(G)).astype(np.int32)
    tasks = [[Task(id=int(i), cut=int(cut)) for i, cut in zip(*row, strict=True)] for row in zip(ids, cuts)]
    batch = build_tasks(list(zip(trunks, tasks, strict=True)), tail=[0] * E, row_ids=row_ids, trunk_length=L)
    batch.prompts.prompt_mask[-1, -1] = False
    lengths = rng.integers(1, E + 1, (U, M)).astype(np.int32)
    return dataclasses.replace(
        batch, prompts=dataclasses.replace(batch.prompts, tail_tokens=tails, tail_lengths=lengths)
    )


def roll(config, params, tasks, key, **options):
    options = dict(max_completion_tokens=12, temperature=0.9, top_p=1.0, top_k=0, stop_ids=(EOS,)) | options
    return generate(config, params, tasks.prompts, key, vocab_size=config.vocab_size, **options)


def test_greedy_tokens_equal_plain_decoding(tiny_config, tiny_params):
    """Compare one rollout per prompt with argmax over full logits of the whole sequence, one token at a time.

    If the two largest logits are within 1e-4, another summation order may pick either. The comparison of that row then
    ends, and the row is counted.
    """
    tasks = make_tasks(tiny_config)
    prompts = tasks.prompts
    rollouts = roll(tiny_config, tiny_params, tasks, rollout_key(0, 0), temperature=0.0)
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
    logits_fn = jax.jit(lambda t: decoder.logits(tiny_config, tiny_params, t))
    compared = near_ties = 0
    for u, m in zip(*np.nonzero(prompts.prompt_mask)):
        prompt = [
            *prompts.trunk_tokens[u, : prompts.cuts[u, m]],
            *prompts.tail_tokens[u, m, 3 - prompts.tail_lengths[u, m] :],
        ]
        row = tokens[u, m * 4][mask[u, m * 4]]
        for n, token in enumerate(row):
            padded = np.zeros((1, 40), np.int32)
            padded[0, : len(prompt) + n] = [*prompt, *row[:n]]
            last = np.asarray(logits_fn(padded))[0, len(prompt) + n - 1]
            top = np.sort(last)[-2:]
            if top[1] - top[0] < 1e-4:
                near_ties += 1
                break
            assert token == last.argmax()
            compared += 1
    assert compared > 20 and near_ties <= 1


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"temperature": 1.0, "top_k": 5}])
def test_sampler_logprobs_equal_teacher_forced_logprobs(tiny_config, tiny_params, options):
    tasks = make_tasks(tiny_config)
    rollouts = roll(tiny_config, tiny_params, tasks, rollout_key(0, 3), **options)
    sequences = completions(tasks.prompts, rollouts.tokens, rollouts.mask)
    forced = score(tiny_config, tiny_params, sequences, temperature=options.get("temperature", 0.9))
    mask = np.asarray(rollouts.mask)
    assert mask.sum() > 100
    difference = np.abs(np.asarray(forced) - np.asarray(rollouts.sampler_logprobs))[mask]
    # Logits reach 40 here, where float32 values are 4e-6 apart.
    assert difference.max() < 2e-5


def test_noise_is_a_function_of_seed_step_and_row(tiny_config, tiny_params):
    tasks = make_tasks(tiny_config)
    first, again, next_step, other_seed, second_round = (
        np.asarray(roll(tiny_config, tiny_params, tasks, key).tokens)
        for key in (rollout_key(0, 5), rollout_key(0, 5), rollout_key(0, 6), rollout_key(1, 5), rollout_key(0, 5, 1))
    )
    np.testing.assert_array_equal(first, again)
    for other in (next_step, other_seed, second_round):
        assert (other != first).any(-1).mean() > 0.5
    # Rollouts of one prompt differ from each other.
    assert len({row.tobytes() for row in first[0, :4]}) > 1


def test_rows_do_not_depend_on_their_place_in_the_batch(tiny_config, tiny_params):
    tasks = make_tasks(tiny_config)
    turned = jax.tree.map(lambda a: a[::-1], tasks)
    a, b = (roll(tiny_config, tiny_params, t, rollout_key(0, 5)) for t in (tasks, turned))
    np.testing.assert_array_equal(np.asarray(a.tokens), np.asarray(b.tokens)[::-1])


def test_rows_stop_after_the_stop_token_and_padding_never_starts(tiny_config, tiny_params):
    tasks = make_tasks(tiny_config)
    rollouts = roll(tiny_config, tiny_params, tasks, rollout_key(0, 0), max_completion_tokens=30, temperature=5.0)
    tokens, mask, truncated = (np.asarray(a) for a in (rollouts.tokens, rollouts.mask, rollouts.truncated))
    assert not mask[-1, 4:].any() and not truncated[-1, 4:].any()
    stopped = 0
    for row, keep, cut in zip(tokens.reshape(-1, 30), mask.reshape(-1, 30), truncated.reshape(-1)):
        length = keep.sum()
        if not length:
            continue
        assert keep[:length].all() and EOS not in row[: length - 1]
        assert cut == (row[length - 1] != EOS)
        assert (row[length:] == 0).all()
        stopped += not cut
    assert stopped > 3


def test_unused_vocabulary_entries_are_never_sampled(tiny_config, tiny_params):
    rollouts = generate(
        tiny_config, tiny_params, make_tasks(tiny_config, L=9).prompts, rollout_key(0, 0),
        max_completion_tokens=12, temperature=2.0, top_p=1.0, top_k=0, stop_ids=(EOS,), vocab_size=7,
    )  # fmt: skip
    assert np.asarray(rollouts.tokens).max() < 7
    # The scorer has the sampler's distribution, of these ids alone.
    config, prompts = dataclasses.replace(tiny_config, num_ids=7), make_tasks(tiny_config, L=9).prompts
    again = score(config, tiny_params, completions(prompts, rollouts.tokens, rollouts.mask), temperature=2.0)
    mask = np.asarray(rollouts.mask)
    np.testing.assert_allclose(np.asarray(again)[mask], np.asarray(rollouts.sampler_logprobs)[mask], atol=2e-5)


SHORT = dict(max_completion_tokens=20, temperature=3.0, vocab_size=9)  # about one token in nine is a stop token


def count_calls(monkeypatch, *names):
    """Return {name: number of calls} of functions of the engine; the counts grow with every call."""
    counts = dict.fromkeys(names, 0)
    for name in names:

        def counted(original, name, *args, **options):
            counts[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(engine, name, partial(counted, getattr(engine, name), name))
    return counts


@pytest.mark.parametrize(
    "options",
    [
        dict(schedule=Schedule(window=4)),
        dict(schedule=Schedule(window=4), slots_per_trunk=3),
        dict(schedule=Schedule(window=32, shares=()), slots_per_trunk=2),
    ],
    ids=["fewer slots, wider caches", "refill, then fewer slots", "refill only"],
)
def test_a_schedule_changes_nothing_that_is_sampled(tiny_config, tiny_params, monkeypatch, options):
    """Against the static schedule: the same tokens except near-ties (none here), log-probabilities within 1e-5."""
    tasks, key = make_tasks(tiny_config, U=4, M=2, G=6).prompts, rollout_key(0, 1)
    counts = count_calls(monkeypatch, "widen", "regroup")
    static = generate(
        tiny_config, tiny_params, tasks, key, top_p=1.0, top_k=0, stop_ids=(EOS,), schedule=STATIC, **SHORT
    )
    assert counts == {"widen": 0, "regroup": 0}
    other = generate(tiny_config, tiny_params, tasks, key, top_p=1.0, top_k=0, stop_ids=(EOS,), **options, **SHORT)
    if options["schedule"].shares:
        assert counts["widen"] == 3 and counts["regroup"] >= 2
    lengths = np.asarray(static.mask).sum(-1)
    assert lengths.max() == 20 and np.median(lengths[lengths > 0]) < 12
    for name in ("tokens", "mask", "truncated", "num_rejected"):
        np.testing.assert_array_equal(getattr(static, name), getattr(other, name), err_msg=name)
    np.testing.assert_allclose(static.sampler_logprobs, other.sampler_logprobs, atol=1e-5)


SHARES = Schedule().shares


def test_live_rows_move_through_one_chain_of_shapes():
    """4 trunks of 16 slots: 64 slots, then 48, 32, 24, 16, 8 and 4 in groups of 2."""
    chain = [(24, 2), (16, 2), (12, 2), (8, 2), (4, 2), (2, 2)]
    assert engine.chain_of_shapes(4, 16, 10, 50, True, SHARES) == chain
    # The whole batch caches 4 x (600 + 16 x 50) = 5,600 tokens. 12 groups would cache 8,400, and 8 groups also 5,600.
    assert engine.chain_of_shapes(4, 16, 600, 50, True, SHARES) == chain[4:]
    # Without regrouping, only the number of slots per trunk decreases.
    assert engine.chain_of_shapes(4, 16, 600, 50, False, SHARES) == [(4, 12), (4, 8), (4, 6), (4, 4), (4, 2), (4, 1)]
    assert engine.chain_of_shapes(1, 1, 10, 50, True, SHARES) == []


def test_a_trunk_with_many_live_rows_takes_several_groups():
    live = np.array([8, 1, 1, 0])  # in groups of 2 slots: 4 + 1 + 1
    assert engine.holds(6, 2, live, True) and not engine.holds(5, 2, live, True)
    assert engine.holds(4, 8, live, False) and not engine.holds(4, 7, live, False)


def test_sampling_on_a_mesh_uses_the_same_noise(tiny_config, monkeypatch):
    """2x2x2 against one device: over 90% of rows have the same tokens and log-probabilities; others have near-ties."""
    config = dataclasses.replace(tiny_config, vocab_size=64)
    single = make_mesh(MeshConfig())
    params = decoder.init_params(config, single, jax.random.key(2))
    tasks = make_tasks(config, U=4).prompts
    many = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    abstract = jax.eval_shape(decoder.Decoder(config).init, jax.random.key(0), trunks_alone(np.zeros((1, 2), np.int32)))
    sharded = jax.device_put(params, param_shardings(many, abstract)["params"])
    counts = count_calls(monkeypatch, "shrink")
    options = dict(key=rollout_key(0, 0), top_p=1.0, top_k=0, stop_ids=(EOS,), **SHORT)
    a = generate(config, params, shard_batch(single, tasks), **options)
    assert counts["shrink"] == 0
    b = generate(config, sharded, shard_batch(many, tasks), **options)
    assert counts["shrink"] > 0  # rows end, and each device compacts its remaining rows
    same = (np.asarray(a.tokens) == np.asarray(b.tokens)).all(-1)
    assert same.mean() > 0.9
    np.testing.assert_allclose(np.asarray(a.sampler_logprobs)[same], np.asarray(b.sampler_logprobs)[same], atol=1e-5)
