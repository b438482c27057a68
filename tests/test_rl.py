"""Advantages, losses and the update: hand-computed values, properties, meshes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_rollout import EOS, make_tasks

from rpt_jax.config import LossConfig, MeshConfig, OptimizerConfig
from rpt_jax.models import decoder
from rpt_jax.parallel.mesh import make_mesh, param_shardings, shard_batch
from rpt_jax.rl import advantages as adv
from rpt_jax.rl import surrogates
from rpt_jax.rl.dynamic_sampling import collect
from rpt_jax.rl.objective import objective
from rpt_jax.rl.optimizer import init_state, make_optimizer, muon_dimensions
from rpt_jax.rl.packing import pack, plan_microbatches, plan_update
from rpt_jax.rl.rows import aggregation_weights, policy_rows
from rpt_jax.rl.update import update
from rpt_jax.rollout.engine import generate, rollout_key
from rpt_jax.scoring.logprobs import score
from rpt_jax.sequences import trunks_alone
from rpt_jax.types import Earned, Experience, Rows

REWARDS = jnp.asarray([[[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]])
MASK = jnp.ones((1, 2), bool)


def test_advantages_on_paper():
    # Group 1: mean 1/2, deviation 1/2. Group 2: mean 1/4, deviation sqrt(3)/4 = 0.4330.
    np.testing.assert_allclose(adv.grpo(REWARDS)[0, 0], [1, -1, -1, 1], rtol=1e-5)
    np.testing.assert_allclose(adv.grpo(REWARDS)[0, 1], [1.7320, -0.5774, -0.5774, -0.5774], rtol=1e-4)
    np.testing.assert_allclose(adv.centered(REWARDS)[0, 1], [0.75, -0.25, -0.25, -0.25])
    # RLOO: 1 - 0/3 = 1, and 0 - 1/3.
    np.testing.assert_allclose(adv.rloo(REWARDS)[0, 1], [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)
    # Whole batch: mean 3/8, deviation sqrt(15)/8 = 0.4841.
    np.testing.assert_allclose(
        adv.batch_std(REWARDS, jnp.ones(REWARDS.shape, bool))[0, 1, 0], 0.75 / 0.48412, rtol=1e-4
    )
    # OPO: lengths 1, 2, 3, 4; baseline of group 1 = (1 + 4) / 10, of group 2 = 1 / 10.
    lengths = jnp.asarray([[[1, 2, 3, 4], [1, 2, 3, 4]]])
    np.testing.assert_allclose(
        adv.opo(REWARDS, lengths)[0], [[0.5, -0.5, -0.5, 0.5], [0.9, -0.1, -0.1, -0.1]], rtol=1e-6
    )


@pytest.mark.parametrize("name", ["grpo", "mean", "rloo", "batch_std", "opo"])
def test_equal_rewards_teach_nothing_and_order_does_not_matter(name):
    rng = np.random.default_rng(0)
    lengths = jnp.asarray(rng.integers(1, 9, (2, 3, 4)))
    mask = jnp.ones((2, 3), bool).at[1, 2].set(False)
    rewards = jnp.asarray(rng.random((2, 3, 4)), jnp.float32).at[0, 0].set(0.7)
    got = adv.compute_advantages(name, rewards, lengths, mask)
    np.testing.assert_allclose(got[0, 0], 0, atol=1e-6)
    np.testing.assert_array_equal(got[1, 2], 0)
    order = np.array([2, 0, 3, 1])
    turned = adv.compute_advantages(name, rewards[..., order], lengths[..., order], mask)
    np.testing.assert_allclose(turned, got[..., order], atol=1e-6)


def test_advantages_refuse_invalid_inputs():
    with pytest.raises(ValueError, match="G >= 2"):
        adv.compute_advantages("grpo", jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1)), MASK)
    with pytest.raises(ValueError, match="unknown advantage"):
        adv.compute_advantages("ppo", REWARDS, REWARDS, MASK)


def test_clipped_surrogate_on_paper():
    ratio = jnp.asarray([[[0.5, 1.0, 1.5]]])
    clip = partial(surrogates.ppo, clip_eps_low=0.2, clip_eps_high=0.28)
    # A = 2: min(1, 1.6), 2, min(3, 2.56).   A = -1: min(-.5, -.8), -1, min(-1.5, -1.28).
    np.testing.assert_allclose(clip(ratio, jnp.full((1, 1, 3), 2.0))[0, 0], [1.0, 2.0, 2.56], rtol=1e-6)
    np.testing.assert_allclose(clip(ratio, jnp.full((1, 1, 3), -1.0))[0, 0], [-0.8, -1.0, -1.5], rtol=1e-6)


def test_kl_estimators_on_paper_and_on_average():
    # delta = ln 2: k1 = .6931, k2 = .2402, k3 = 1/2 - 1 + .6931.
    for name, value in (("k1", 0.693147), ("k2", 0.240227), ("k3", 0.193147)):
        np.testing.assert_allclose(surrogates.kl_term(name, jnp.log(2.0), jnp.log(1.0)), value, rtol=1e-5)
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.25, 0.25])
    exact = (p * np.log(p / q)).sum()
    for name in ("k1", "k3"):
        np.testing.assert_allclose(
            (p * np.asarray(surrogates.kl_term(name, jnp.log(p), jnp.log(q)))).sum(), exact, rtol=1e-5
        )


def test_kl_gradients_are_as_documented():
    """Mean gradient over the policy's samples: 0 for k1, that of KL(p||q) for k2, that of KL(q||p) for k3."""
    theta, q = jnp.asarray([0.3, -0.2, 0.5]), jnp.asarray([0.5, 0.25, 0.25])
    p = jax.nn.softmax(theta)

    def mean_gradient(name):
        terms = lambda t: surrogates.kl_term(name, jax.nn.log_softmax(t), jnp.log(q))  # noqa: E731
        return p @ jax.jacobian(terms)(theta)

    reverse = jax.grad(lambda t: jnp.sum(jax.nn.softmax(t) * (jax.nn.log_softmax(t) - jnp.log(q))))(theta)
    forward = jax.grad(lambda t: jnp.sum(q * (jnp.log(q) - jax.nn.log_softmax(t))))(theta)
    np.testing.assert_allclose(mean_gradient("k1"), 0, atol=1e-6)
    np.testing.assert_allclose(mean_gradient("k2"), reverse, atol=1e-6)
    np.testing.assert_allclose(mean_gradient("k3"), forward, atol=1e-6)


def test_aggregations_on_paper():
    # Rows of 1 and 3 tokens, C = 4, and a third row that is masked.
    mask = jnp.asarray([[[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]]], bool)
    rows = jnp.asarray([[True, True, False]])
    weights = {n: aggregation_weights(n, mask, rows) for n in ("seq_mean", "token_mean", "constant")}
    np.testing.assert_allclose(weights["seq_mean"][0, :, 0], [1 / 2, 1 / 6, 0], rtol=1e-6)
    np.testing.assert_allclose(weights["token_mean"][0, :, 0], [1 / 4, 1 / 4, 0], rtol=1e-6)
    np.testing.assert_allclose(weights["constant"][0, :, 0], [1 / 8, 1 / 8, 0], rtol=1e-6)
    nothing = aggregation_weights("token_mean", mask & False, rows)
    assert float(jnp.abs(nothing).sum()) == 0


def earned(rewards) -> Earned:
    return Earned(rewards=rewards, faults=jnp.zeros(rewards.shape, bool), metrics={})


def with_rewards(experience: Experience, rewards) -> Experience:
    return dataclasses.replace(experience, earned=earned(rewards))


def rows_of(experience: Experience, loss: LossConfig, *, header_length: int) -> Rows:
    return policy_rows(experience, loss=loss, temperature=1.0, header_length=header_length)


@pytest.fixture(scope="module")
def experience(tiny_config, tiny_params):
    tasks = make_tasks(tiny_config, U=4)
    rollouts = generate(
        tiny_config, tiny_params, tasks.prompts, rollout_key(0, 0), max_completion_tokens=10, temperature=1.0,
        top_p=1.0, top_k=0, stop_ids=(EOS,), vocab_size=tiny_config.vocab_size,
    )  # fmt: skip
    rewards = jnp.asarray(np.random.default_rng(0).integers(0, 2, (4, 2, 4)), jnp.float32)
    rewards = rewards.at[0, 0].set(1.0)  # a degenerate group
    return Experience(
        tasks=tasks,
        rollouts=rollouts,
        predictions=None,
        earned=earned(rewards),
        group_mask=jnp.asarray(tasks.prompts.prompt_mask),
        tokens_scored=jnp.zeros(4, jnp.int32),
    )


LOSS = LossConfig()
SGD = OptimizerConfig(learning_rate=1e-3, max_grad_norm=0.0, weight_decay=0.0)


def gradient(config, params, batch, loss=LOSS):
    return jax.jit(jax.grad(lambda p: objective(config, loss, p, batch)[0]))(params)


def flat(tree):
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])


def test_on_policy_gradient_is_the_plain_policy_gradient(tiny_config, tiny_params, experience):
    """At ratio 1, the gradient is that of the mean over tokens of A * log pi, regardless of the clip."""
    batch = rows_of(experience, LOSS, header_length=0)

    def plain(params):
        logprobs = score(tiny_config, params, batch.sequences, temperature=1.0)
        return -jnp.sum(batch.policy_weights * batch.advantages * logprobs)

    expected = flat(jax.jit(jax.grad(plain))(tiny_params))
    np.testing.assert_allclose(flat(gradient(tiny_config, tiny_params, batch)), expected, atol=1e-6)


def test_zero_advantage_is_zero_gradient(tiny_config, tiny_params, experience):
    level = with_rewards(experience, jnp.ones((4, 2, 4)))
    batch = rows_of(level, LOSS, header_length=0)
    assert np.abs(flat(gradient(tiny_config, tiny_params, batch))).max() == 0


def test_stop_token_is_in_the_loss(tiny_config, tiny_params):
    """A rollout of the stop token alone has a gradient, and an update raises that token's probability."""
    tasks = make_tasks(tiny_config, U=1, M=1, G=2)
    tasks.prompts.prompt_mask[:] = True
    tokens = jnp.asarray([[[EOS, 0], [5, 6]]])
    from rpt_jax.types import Rollouts

    rollouts = Rollouts(
        tokens=tokens, mask=jnp.asarray([[[True, False], [True, True]]]), sampler_logprobs=jnp.zeros((1, 2, 2)),
        truncated=jnp.asarray([[False, True]]), num_rejected=jnp.zeros((1, 2), jnp.int32),
    )  # fmt: skip
    experience = Experience(
        tasks=tasks,
        rollouts=rollouts,
        predictions=None,
        earned=earned(jnp.asarray([[[1.0, 0.0]]])),
        group_mask=jnp.ones((1, 1), bool),
        tokens_scored=jnp.zeros(1, jnp.int32),
    )
    batch = rows_of(experience, LOSS, header_length=0)
    # token_mean over 3 tokens.
    np.testing.assert_allclose(batch.policy_weights[0], [[1 / 3, 0], [1 / 3, 1 / 3]], rtol=1e-6)
    stepped = jax.tree.map(lambda p, g: p - 0.01 * g, tiny_params, gradient(tiny_config, tiny_params, batch))
    before, after = (score(tiny_config, p, batch.sequences, temperature=1.0)[0, 0, 0] for p in (tiny_params, stepped))
    assert float(after) > float(before)


def run_update(config, params, batches, mesh, *, optimizer_config=SGD, loss=LOSS):
    optimizer = make_optimizer(optimizer_config, 10)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, mesh)
    loss_fn = partial(objective, config, loss)
    return update(state, batches, loss_fn=loss_fn, optimizer=optimizer)


def packed(experience, loss=LOSS, *, header_length=0, num_shards=1, microbatch_trunks=0):
    """Return the microbatches of each minibatch, and the counts of `plan_update`."""
    rows = rows_of(experience, loss, header_length=header_length)
    plans, counts = plan_update(
        experience.tasks.prompts, rows, num_minibatches=loss.num_minibatches, microbatch_trunks=microbatch_trunks,
        num_shards=num_shards, keeps_all=loss.needs_all_rows,
    )  # fmt: skip
    return [[pack(rows, m.trunks, m.source) for m in plan] for plan in plans], counts


def test_packing_drops_rows_without_gradient_and_changes_no_gradient(tiny_config, tiny_params, experience):
    """Compare with the unpacked batch, one row per lane; some groups, and one whole trunk, have no gradient."""
    level = with_rewards(experience, experience.earned.rewards.at[1].set(0.5).at[2, 0].set(0.3))
    [microbatches], counts = packed(level, microbatch_trunks=2)
    whole = gradient(tiny_config, tiny_params, rows_of(level, LOSS, header_length=0))
    parts = [gradient(tiny_config, tiny_params, m) for m in microbatches]
    np.testing.assert_allclose(sum(map(flat, parts)), flat(whole), atol=1e-6)
    rewards, mask = np.asarray(level.earned.rewards), np.asarray(level.rollouts.mask)
    teaching = np.argwhere((np.ptp(rewards, axis=-1) > 0) & level.tasks.prompts.prompt_mask)
    kept_trunks = {int(u) for u, _ in teaching}
    assert 1 <= len(teaching) < 5 and len(kept_trunks) < 4
    lengths = sum(mask[u, 4 * m : 4 * m + 4].sum() for u, m in teaching)
    stems = sum(
        13 + int((level.tasks.prompts.tail_lengths * level.tasks.prompts.prompt_mask)[u].sum()) for u in kept_trunks
    )
    assert counts["tokens_updated"] == lengths + stems
    np.testing.assert_allclose(counts["rows_left_out_fraction"], 1 - 4 * len(teaching) / 28)
    assert sum(len(m.sequences.trunk_tokens) for m in microbatches) == len(kept_trunks)
    assert sum(int(m.sequences.branch_mask.sum()) for m in microbatches) == lengths


def test_lanes_hold_whole_rows_and_every_row_once():
    rng = np.random.default_rng(0)
    lengths, keep = rng.integers(1, 33, (5, 24)), rng.random((5, 24)) < 0.7
    keep[3] = False
    trunk_loss = np.array([False, False, False, True, False])
    plan = plan_microbatches(
        lengths, keep, trunk_loss, range(5), width=32, microbatch_trunks=2, num_shards=1
    )  # fmt: skip
    assert sorted(int(u) for m in plan for u in m.trunks if u >= 0) == [0, 1, 2, 3, 4]
    places = 0
    for microbatch in plan:
        places += microbatch.source.size
        for u, lanes in zip(microbatch.trunks, microbatch.source):
            seen = lanes[lanes >= 0]
            if u < 0:
                assert not len(seen)
                continue
            expected = [r * 32 + c for r in np.flatnonzero(keep[u]) for c in range(lengths[u, r])]
            assert sorted(seen) == expected
            for lane in lanes:
                # A row's tokens are back to back, in one lane.
                rows, columns = lane[lane >= 0] // 32, lane[lane >= 0] % 32
                begins = np.flatnonzero(columns == 0)
                assert (np.diff(columns)[np.setdiff1d(np.arange(len(columns) - 1), begins - 1)] == 1).all()
                assert len(set(rows)) == len(begins)
    assert (lengths * keep).sum() > 0.6 * places


@pytest.mark.parametrize("microbatch_trunks", [0, 1])
def test_packing_keeps_every_row_whole_in_one_lane_for_any_lengths(tiny_config, experience, microbatch_trunks):
    """Every token of a row with a gradient is in one lane, in order and once; sequence ratios (GSPO, arXiv:2507.18071)
    require this."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 11, (4, 8)) if seed else np.full((4, 8), 10)
        rollouts = dataclasses.replace(experience.rollouts, mask=jnp.arange(10) < lengths[..., None])
        rewards = jnp.asarray(rng.integers(0, 2, (4, 2, 4)), jnp.float32)
        changed = with_rewards(dataclasses.replace(experience, rollouts=rollouts), rewards)
        [microbatches], _ = packed(changed, microbatch_trunks=microbatch_trunks)
        rows = rows_of(changed, LOSS, header_length=0)
        kept = np.argwhere(np.asarray((rows.policy_weights != 0) & (rows.advantages != 0)).any(-1))
        seen = {}
        for batch in microbatches:
            trunks = [
                next(u for u in range(4) if (tokens == rows.sequences.trunk_tokens[u]).all())
                for tokens in np.asarray(batch.sequences.trunk_tokens)
            ]
            for n, lane in np.ndindex(batch.row.shape[:2]):
                fields = batch.row, batch.sequences.branch_index, batch.sequences.branch_mask
                own, index, mask = (np.asarray(x)[n, lane] for x in fields)
                assert ((own >= 0) == mask).all()
                for r in set(own[mask].tolist()):
                    assert (trunks[n], r) not in seen, "a row in two lanes"
                    seen[trunks[n], r] = index[own == r].tolist()
        assert seen == {(u, r): list(range(lengths[u, r])) for u, r in kept.tolist()}


def test_masked_rows_and_tokens_have_no_term_and_the_others_keep_their_baseline(experience):
    """Masks of `Earned`: a masked row counts in its group's baseline, but not in the aggregation."""
    rng = np.random.default_rng(1)
    row_mask, token_mask = rng.random((4, 2, 4)) < 0.7, rng.random((4, 8, 10)) < 0.6
    masked = dataclasses.replace(experience.earned, row_mask=jnp.asarray(row_mask), token_mask=jnp.asarray(token_mask))
    plain = rows_of(experience, LOSS, header_length=0)
    rows = rows_of(dataclasses.replace(experience, earned=masked), LOSS, header_length=0)
    np.testing.assert_array_equal(rows.advantages, plain.advantages)
    counts = np.asarray(experience.rollouts.mask) & token_mask & row_mask.reshape(4, 8)[..., None]
    np.testing.assert_allclose(rows.policy_weights, counts / counts.sum(), rtol=1e-6)
    given = dataclasses.replace(experience.earned, advantages=jnp.asarray(rng.random((4, 2, 4)), jnp.float32))
    rows = rows_of(dataclasses.replace(experience, earned=given), LOSS, header_length=0)
    groups = np.asarray(experience.group_mask)[..., None]
    np.testing.assert_allclose(rows.advantages[..., 0].reshape(4, 2, 4), given.advantages * groups, rtol=1e-6)


def test_appended_tokens_are_learned_along_with_the_policy_term(tiny_config, tiny_params, experience):
    """A row may be a thought followed by a reference: temperature and loss term are set per token."""
    loss = LossConfig(clip_eps_low=0.1, clip_eps_high=0.3)
    rows = policy_rows(experience, loss=loss, temperature=0.7, header_length=0)
    is_reference = (rows.sequences.branch_index >= 6) & rows.sequences.branch_mask
    likelihood = jnp.where(is_reference, 0.3, 0.0)
    both = dataclasses.replace(
        rows, policy_weights=jnp.where(is_reference, 0.0, rows.policy_weights), likelihood_weights=likelihood,
        temperature=jnp.where(is_reference, 1.0, rows.temperature),
    )  # fmt: skip
    value, metrics = objective(tiny_config, loss, tiny_params, both)
    plain = score(tiny_config, tiny_params, rows.sequences, temperature=1.0)
    policy = -jnp.sum(both.policy_weights * both.advantages)  # the ratio is 1
    np.testing.assert_allclose(value, policy - jnp.sum(likelihood * plain), rtol=1e-4)
    np.testing.assert_allclose(metrics["completion_loss"], -jnp.sum(likelihood * plain), rtol=1e-4)

    def by_hand(params):
        sampled, plain = (score(tiny_config, params, rows.sequences, temperature=t) for t in (0.7, 1.0))
        return -jnp.sum(both.policy_weights * both.advantages * sampled) - jnp.sum(likelihood * plain)

    expected = flat(jax.jit(jax.grad(by_hand))(tiny_params))
    found = flat(gradient(tiny_config, tiny_params, both, loss))
    # Sums run in another order, which the compiler chooses.
    assert np.abs(found - expected).max() < 3e-6 * np.abs(expected).max()


def test_nothing_to_learn_from_is_an_update_of_padding(tiny_config, tiny_params, experience, mesh):
    level = with_rewards(experience, jnp.ones((4, 2, 4)))
    [microbatches], counts = packed(level)
    assert counts["tokens_updated"] == 0 and counts["rows_left_out_fraction"] == 1
    state, metrics = run_update(tiny_config, tiny_params, microbatches, mesh)
    assert float(metrics["grad_norm"]) == 0 and int(state.step) == 1
    np.testing.assert_array_equal(flat(state.params), flat(tiny_params))
    # With a KL term every row counts; with a next-token term every trunk counts.
    assert packed(level, LossConfig(kl_coef=0.1))[1]["rows_left_out_fraction"] == 0
    assert packed(level, LossConfig(ntp_coef=0.1))[1]["tokens_updated"] > 4 * 13


def test_microbatches_add_up(tiny_config, tiny_params, experience, mesh):
    sgd = OptimizerConfig(learning_rate=1e-3, max_grad_norm=1.0)
    results = []
    for size in (0, 1):
        [microbatches], _ = packed(experience, microbatch_trunks=size)
        results.append(run_update(tiny_config, tiny_params, microbatches, mesh, optimizer_config=sgd))
    (whole, m1), (parts, m4) = results
    for name in m1:
        np.testing.assert_allclose(m1[name], m4[name], rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(whole.opt_state[1][0].mu["head"], parts.opt_state[1][0].mu["head"], rtol=1e-3, atol=1e-7)


def test_update_on_one_device_equals_a_2x2x2_mesh(tiny_config, experience):
    """Gradients (Adam's first moment is 0.1 g after one step) agree within 1e-5 of the largest, metrics within 1e-4."""
    config = dataclasses.replace(tiny_config, vocab_size=64)
    single, many = make_mesh(MeshConfig()), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = decoder.init_params(config, single, jax.random.key(3))
    abstract = jax.eval_shape(decoder.Decoder(config).init, jax.random.key(0), trunks_alone(np.zeros((1, 2), np.int32)))
    sharded = jax.device_put(params, param_shardings(many, abstract)["params"])
    results = []
    for mesh, p in ((single, params), (many, sharded)):
        [microbatches], _ = packed(shard_batch(mesh, experience), num_shards=mesh.shape["data"] * mesh.shape["fsdp"])
        results.append(run_update(config, p, shard_batch(mesh, microbatches), mesh))
    (a, ma), (b, mb) = results
    for name in set(ma) - {"sampler_mismatch", "sampler_mismatch_max"}:
        np.testing.assert_allclose(ma[name], mb[name], rtol=1e-4, atol=1e-5, err_msg=name)
    mu_a, mu_b = (flat(s.opt_state[1][0].mu) for s in (a, b))
    assert np.abs(mu_a - mu_b).max() < 1e-5 * np.abs(mu_a).max()
    assert b.params["layers"]["q_proj"].sharding.is_equivalent_to(sharded["layers"]["q_proj"].sharding, 4)


@pytest.mark.parametrize("where", ["loss", "gradient only"])
def test_non_finite_update_changes_nothing_and_is_counted(tiny_config, tiny_params, experience, mesh, where):
    batch = rows_of(experience, LOSS, header_length=0)

    def poisoned(params, batch):
        value, metrics = objective(tiny_config, LOSS, params, batch)
        if where == "loss":
            return value + jnp.where(batch.advantages[0, 0, 0] < 99, jnp.nan, 0), metrics
        # sqrt has an infinite slope at 0: the loss stays finite, its gradient does not.
        return value + jnp.sqrt(jnp.sum(params["head"]) * 0.0), metrics

    optimizer = make_optimizer(SGD, 10)
    state = init_state(jax.tree.map(jnp.copy, tiny_params), optimizer, mesh)
    before = flat((state.params, state.opt_state))
    for count in (1, 2):
        state, metrics = update(state, [batch], loss_fn=poisoned, optimizer=optimizer)
        assert int(metrics["skipped"]) == count
    np.testing.assert_array_equal(flat((state.params, state.opt_state)), before)
    loss_fn = partial(objective, tiny_config, LOSS)
    state, metrics = update(state, [batch], loss_fn=loss_fn, optimizer=optimizer)
    assert int(metrics["skipped"]) == 0 and int(state.step) == 3


def test_muon_owns_the_layers_matrices_and_nothing_else(tiny_params, mesh):
    dimensions = muon_dimensions(tiny_params)
    owned = {k for k, v in dimensions["layers"].items() if v is not None}
    assert owned == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert dimensions["embedding"] is None and dimensions["head"] is None
    config = OptimizerConfig(
        name="muon", learning_rate=0.0, matrix_learning_rate=1.0, weight_decay=0.0, max_grad_norm=0.0
    )
    optimizer = make_optimizer(config, 10)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), tiny_params)
    updates, _ = optimizer.update(grads, optimizer.init(tiny_params), tiny_params)
    np.testing.assert_array_equal(updates["head"], 0)
    # Each layer's [D, H*Q] update is nearly orthogonal: five Newton-Schulz steps leave singular values in 0.5 .. 1.3.
    for layer in range(3):
        values = np.linalg.svd(np.asarray(updates["layers"]["q_proj"][layer]).reshape(32, 32), compute_uv=False)
        assert values.max() < 1.4 and np.median(values) > 0.5


def test_adamw_decays_matrices_only(tiny_params):
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, max_grad_norm=0.0)
    optimizer = make_optimizer(config, 10)
    zero = jax.tree.map(jnp.zeros_like, tiny_params)
    updates, _ = optimizer.update(zero, optimizer.init(tiny_params), tiny_params)
    np.testing.assert_allclose(updates["layers"]["q_proj"], -0.05 * tiny_params["layers"]["q_proj"], rtol=1e-5)
    np.testing.assert_array_equal(updates["layers"]["attention_norm"], 0)
    np.testing.assert_array_equal(updates["layers"]["q_bias"], 0)


def test_schedules():
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=3, schedule="linear", max_grad_norm=0.0, weight_decay=0.0, b1=0.0, b2=0.0
    )
    optimizer = make_optimizer(config, 7)
    params = {"w": jnp.ones(())}
    state, rates = optimizer.init(params), []
    for _ in range(8):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
        rates.append(-float(updates["w"]))
    # Three warmup steps from 1/4, then linear decay from 1 to 0 over the remaining four.
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0], atol=1e-5)


def test_minibatches_see_their_own_ratio(tiny_config, tiny_params, experience):
    loss = LossConfig(num_minibatches=2)
    minibatches, _ = packed(with_rewards(experience, experience.earned.rewards.at[0, 0, 0].set(0.0)), loss)
    assert [sum(len(m.sequences.cuts) for m in minibatch) for minibatch in minibatches] == [2, 2]
    # Weights are doubled: a minibatch's loss has, on average, the size of the whole batch's.
    batch = rows_of(experience, loss, header_length=0)
    np.testing.assert_allclose(batch.policy_weights.sum(), 2, rtol=1e-5)
    batch = rows_of(experience, LOSS, header_length=0)
    # Old log-probabilities that are lower by ln 2 make the ratio 2, above the clip range on every token.
    logprobs = score(tiny_config, tiny_params, batch.sequences, temperature=1.0)
    shifted = dataclasses.replace(batch, old_logprobs=logprobs - jnp.log(2.0))
    _, metrics = objective(tiny_config, LOSS, tiny_params, shifted)
    np.testing.assert_allclose(metrics["clip_fraction"], 1.0, rtol=1e-5)


def test_log_probabilities_of_padding_reach_nothing(tiny_config, tiny_params, experience):
    """A scored padding token may be so unlikely that exp(0 + 200) would overflow; it changes no value."""
    loss = LossConfig(kl_coef=0.5)
    batch = rows_of(experience, loss, header_length=0)
    mask = batch.sequences.branch_mask
    logprobs = score(tiny_config, tiny_params, batch.sequences, temperature=1.0)
    values = []
    for padding in (0.0, -200.0):
        scored = jnp.where(mask, logprobs, padding)
        both = dataclasses.replace(batch, old_logprobs=scored, ref_logprobs=scored, sampler_logprobs=scored)
        value, metrics = objective(tiny_config, loss, tiny_params, both)
        values.append((value, *metrics.values()))
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(*values)


def test_kl_term_pulls_towards_the_reference(tiny_config, tiny_params, experience):
    batch = rows_of(experience, LOSS, header_length=0)
    logprobs = score(tiny_config, tiny_params, batch.sequences, temperature=1.0)
    same = dataclasses.replace(batch, ref_logprobs=logprobs)
    loss = LossConfig(kl_coef=0.5)
    value, metrics = objective(tiny_config, loss, tiny_params, same)
    np.testing.assert_allclose(metrics["kl"], 0, atol=1e-6)
    apart = dataclasses.replace(batch, ref_logprobs=logprobs - 1.0)
    value_apart, metrics = objective(tiny_config, loss, tiny_params, apart)
    # k3 at delta 1 is exp(-1) on every token; the loss grows by kl_coef = 0.5 times that.
    np.testing.assert_allclose(metrics["kl"], np.exp(-1), rtol=1e-4)
    np.testing.assert_allclose(value_apart - value, 0.5 * np.exp(-1), rtol=1e-3)


def test_supervised_loss_is_the_weighted_mean_of_both_parts(tiny_config, tiny_params, experience):
    sequences = rows_of(experience, LOSS, header_length=0).sequences
    U, R, C = 4, 8, 10
    rng = np.random.default_rng(0)
    trunk_weights = np.pad(rng.random((U, 12)), ((0, 0), (1, 0))).astype(np.float32)
    token_weights = rng.random((U, R, C)).astype(np.float32) * np.asarray(sequences.branch_mask)
    batch = Rows(
        sequences=sequences, row=None, policy_weights=None, advantages=None, likelihood_weights=token_weights,
        trunk_weights=trunk_weights, temperature=np.ones((U, R, C), np.float32), sampler_logprobs=None,
        old_logprobs=None, ref_logprobs=None,
    )  # fmt: skip
    value, _ = objective(tiny_config, LOSS, tiny_params, batch)
    tokens = np.asarray(sequences.trunk_tokens)
    logprobs = np.asarray(jax.nn.log_softmax(decoder.logits(tiny_config, tiny_params, jnp.asarray(tokens))))
    trunk = np.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    own = np.asarray(score(tiny_config, tiny_params, sequences, temperature=1.0))
    np.testing.assert_allclose(value, -(trunk_weights[:, 1:] * trunk).sum() - (token_weights * own).sum(), rtol=1e-4)


def test_next_token_term_is_the_mean_over_document_tokens(tiny_config, tiny_params, experience):
    batch = rows_of(experience, LOSS, header_length=4)
    plain, _ = objective(tiny_config, LOSS, tiny_params, batch)
    loss = LossConfig(ntp_coef=0.3)
    mixed, _ = objective(tiny_config, loss, tiny_params, rows_of(experience, loss, header_length=4))
    trunk = np.asarray(batch.sequences.trunk_tokens)
    logprobs = np.asarray(jax.nn.log_softmax(decoder.logits(tiny_config, tiny_params, trunk)))
    chosen = np.take_along_axis(logprobs[:, :-1], trunk[:, 1:, None], -1)[..., 0]
    # After a header of four tokens, trunk tokens from index 4 on are document tokens.
    np.testing.assert_allclose(mixed - plain, -0.3 * chosen[:, 3:].mean(), rtol=1e-3)


def test_dynamic_sampling_keeps_informative_trunks():
    """Rounds of two trunks with two groups each; rewards decide which trunks are kept."""
    tasks = make_tasks(dataclasses.replace(_config(), vocab_size=20), U=2, M=2, G=2)
    tasks.prompts.prompt_mask[:] = True
    good, bad = [1.0, 0.0], [1.0, 1.0]
    rounds = [[[bad, bad], [good, bad]], [[good, good], [bad, bad]], [[good, good], [good, good]]]
    asked = []

    def roll_out(batch, number):
        asked.append(number)
        ids = jnp.asarray(batch.references.task_ids) + 100 * number
        marked = dataclasses.replace(batch, references=dataclasses.replace(batch.references, task_ids=ids))
        return Experience(
            tasks=marked,
            rollouts=None,
            predictions=None,
            earned=earned(jnp.asarray(rounds[number])),
            group_mask=jnp.ones((2, 2), bool),
            tokens_scored=jnp.zeros(2, jnp.int32),
        )

    kept, spent = collect(lambda: tasks, roll_out, rounds=3)
    # After two rounds, two trunks have an informative group: the third round does not run.
    assert asked == [0, 1] and len(spent) == 2
    assert kept.tasks.references.task_ids.tolist() == [[100, 101], [2, 3]]
    assert kept.group_mask.tolist() == [[True, True], [True, False]]
    short, _ = collect(lambda: tasks, lambda b, n: dataclasses.replace(roll_out(b, 0)), rounds=1)
    assert short.group_mask.all()


def _config():
    from rpt_jax.config import DecoderConfig

    return DecoderConfig()


def test_optax_clip_is_applied(tiny_config, tiny_params, experience, mesh):
    batch = rows_of(experience, LOSS, header_length=0)
    clipped = OptimizerConfig(learning_rate=1e-3, max_grad_norm=1e-3)
    state, metrics = run_update(tiny_config, tiny_params, [batch], mesh, optimizer_config=clipped)
    assert float(metrics["grad_norm"]) > 1e-2
    np.testing.assert_allclose(optax.tree.norm(state.opt_state[1][0].mu), 0.1 * 1e-3, rtol=1e-3)
