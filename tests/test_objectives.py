"""Objectives, advantages and corrections: the authors' numbers, and that no batching changes them."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_rollout import EOS, make_tasks
from test_system import corpus, tiny_run  # noqa: F401  (a fixture)

from rpt_jax.config import Config, CorrectionConfig, LossConfig, MeshConfig, SurrogateConfig
from rpt_jax.config.schema import with_values
from rpt_jax.errors import ConfigError
from rpt_jax.models import decoder
from rpt_jax.models.lora import join, merge
from rpt_jax.models.scalar_head import READOUT
from rpt_jax.parallel.mesh import make_mesh, replicated, shard_batch
from rpt_jax.planning.programs import abstract_state
from rpt_jax.rewards.base import Reward
from rpt_jax.rl import advantages as adv
from rpt_jax.rl import surrogates
from rpt_jax.rl.corrections import keeps_sequence, sampler_weights
from rpt_jax.rl.critic import clipped_value_loss
from rpt_jax.rl.objective import objective_fn
from rpt_jax.rl.optimizer import init_state
from rpt_jax.rl.rows import aggregation_weights, policy_rows
from rpt_jax.rl.slopes import effective
from rpt_jax.rl.trainer import Trainer
from rpt_jax.rollout.engine import generate, rollout_key
from rpt_jax.scoring.logprobs import predicting_states, score
from rpt_jax.scoring.requests import Scorer
from rpt_jax.train.pipeline import run_stages
from rpt_jax.train.policies import fresh_state, newest_of_run, start_params
from rpt_jax.train.run import prepare
from rpt_jax.train.run_directory import read_records
from rpt_jax.types import Earned, Experience

VECTORS = json.loads((Path(__file__).parent / "golden" / "vectors.json").read_text())
ENTRIES = {entry["name"]: entry["cases"] for entry in VECTORS}


def f32(x):
    return jnp.asarray(x, jnp.float32)


def masked(inputs) -> np.ndarray:
    """Return the mask bool [rows, T], from a mask or from lengths."""
    if "mask" in inputs:
        return np.asarray(inputs["mask"], bool)
    width = np.asarray(inputs.get("logprobs", inputs.get("values", inputs.get("token_rewards")))).shape[1]
    return np.arange(width) < np.asarray(inputs["lengths"])[:, None]


# --- Losses -------------------------------------------------------------------------------------------------------

AGGREGATIONS = {
    "token-mean": "token_mean", "seq-mean-token-mean": "seq_mean", "seq-mean-token-sum": "seq_sum",
    "seq-mean-token-sum-norm": "constant",
}  # fmt: skip


def loss_and_slopes(loss: LossConfig, inputs, *, ref=None, weights=1.0, scale=1.0):
    """Our loss of their rows, each a trunk, and its derivative by each log-probability."""
    mask = masked(inputs)[:, None]
    logprobs, old = (f32(inputs[name])[:, None] for name in ("logprobs", "old_logprobs"))
    advantages = jnp.broadcast_to(f32(inputs["advantages"])[:, None, None], logprobs.shape) * weights
    width = inputs.get("maxlen", 0)
    of_tokens = aggregation_weights(loss.aggregation, jnp.asarray(mask), jnp.ones(mask.shape[:2], bool), width)

    def total(logprobs):
        nonlocal advantages
        kept = advantages
        if loss.correction.max_old_drift:
            keep = keeps_sequence(loss.correction.max_old_drift, logprobs, old, advantages, mask)
            kept = jnp.where(keep, advantages, 0.0)
        if loss.objective in surrogates.TOKEN_OBJECTIVES:
            gain = surrogates.token_gain(loss, logprobs, old, kept)
        else:
            gain = surrogates.batch_gain(loss, logprobs, old, kept, mask)
        if ref is not None:
            gain = gain - loss.kl_coef * surrogates.kl_term(loss.kl_estimator, logprobs, f32(ref)[:, None], old)
        return -scale * jnp.sum(of_tokens * gain)

    value, slopes = jax.value_and_grad(total)(logprobs)
    return value, slopes[:, 0]


def trl(objective="ppo", aggregation="seq_mean", **surrogate):
    def run(inputs):
        clip = {"clip_eps_low": inputs.get("eps", 0.2), "clip_eps_high": inputs.get("eps_high", inputs.get("eps", 0.2))}
        options = dict(surrogate)
        if objective == "cispo":
            options["ratio_cap"] = (0.0, inputs["eps_high"])
        if objective == "sapo":
            options["sapo_temperatures"] = (inputs["tp"], inputs["tn"])
        if "delta" in inputs:
            options["dual_clip"] = inputs["delta"]
        loss = LossConfig(
            objective=objective, aggregation=aggregation, **clip, surrogate=SurrogateConfig(**options),
            kl_coef=inputs.get("beta", 0.0), kl_estimator="k3_ratio" if inputs.get("bias") else "k3",
            correction=CorrectionConfig(max_old_drift=inputs.get("opm", 0.0)),
        )  # fmt: skip
        weights = f32(inputs["isr"])[:, None] if "isr" in inputs else 1.0
        return loss_and_slopes(loss, inputs, ref=inputs.get("ref"), weights=weights)

    return run


def verl(objective="ppo", aggregation=None, **surrogate):
    def run(inputs):
        options, name = dict(surrogate), aggregation or AGGREGATIONS[inputs["aggregation"]]
        low, high = inputs.get("clip_low", 0.2), inputs.get("clip_high", 0.2)
        if objective == "cispo":
            options["ratio_cap"] = (1 - low, 1 + high)
        if objective == "sapo":
            options["sapo_temperatures"] = (inputs["tau_pos"], inputs["tau_neg"])
        if "dual_clip" in inputs:
            options["dual_clip"] = inputs["dual_clip"]
        if "cov_lb" in inputs:
            options |= {"cov_fraction": inputs["cov_ratio"], "cov_bounds": (inputs["cov_lb"], inputs["cov_ub"])}
        if "kl_cov_ratio" in inputs:
            options |= {"cov_fraction": inputs["kl_cov_ratio"], "cov_kl_coef": inputs["kl_coef"]}
        loss = LossConfig(
            objective=objective, aggregation=name, clip_eps_low=low, clip_eps_high=high,
            surrogate=SurrogateConfig(**options),
        )  # fmt: skip
        # Their sum-norm does not divide by the number of rows.
        scale = len(inputs["lengths"]) if inputs.get("aggregation") == "seq-mean-token-sum-norm" else 1.0
        if objective == "reinforce":
            inputs = inputs | {"old_logprobs": inputs["logprobs"]}
        return loss_and_slopes(loss, inputs, scale=scale)

    return run


LOSSES = {
    "loss.grpo": trl(),
    "loss.grpo_clip_higher": trl(),
    "loss.bnpo": trl(aggregation="token_mean"),
    "loss.dapo": trl(aggregation="token_mean"),
    "loss.dr_grpo": trl(aggregation="constant"),
    "loss.gspo": trl("gspo"),
    "loss.gspo_wide_clip": trl("gspo"),
    "loss.luspo": trl("gspo", aggregation="seq_sum"),
    "loss.cispo": trl("cispo", aggregation="token_mean"),
    "loss.cispo_cap_1_2": trl("cispo", aggregation="token_mean"),
    "loss.sapo": trl("sapo"),
    "loss.grpo_two_sided_delta4": trl(),
    "loss.grpo_kl_k3": trl(),
    "loss.grpo_kl_k3_ratio_corrected": trl(),
    "loss.dapo_truncated_importance": trl(aggregation="token_mean"),
    "loss.grpo_off_policy_mask": trl(),
    "loss.rloo_sequence_ratio": trl("sequence_ppo"),
    **{f"loss.verl_ppo_dual_clip_{name}": verl() for name in AGGREGATIONS},
    "loss.verl_gspo": verl("gspo", aggregation="seq_mean"),
    "loss.verl_gspo_wide": verl("gspo", aggregation="seq_mean"),
    "loss.verl_cispo": verl("cispo"),
    "loss.verl_cispo_symmetric": verl("cispo"),
    "loss.verl_sapo": verl("sapo", aggregation="seq_mean"),
    "loss.verl_gpg": verl("reinforce"),
    "loss.verl_gmpo": verl("gmpo", aggregation="seq_mean"),
    "loss.verl_clip_cov": verl("clip_cov"),
    "loss.verl_kl_cov": verl("kl_cov"),
}
# VESPO is a soft gate that TRL alone has, of a paper without a second code.
NOT_OURS = {"loss.vespo"}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_slopes(name):
    assert len(ENTRIES[name]) >= 6
    for number, case in enumerate(ENTRIES[name]):
        if name.endswith("kl_cov") and np.ptp(case["inputs"]["logprobs"]) == 0:
            continue  # all covariances are 0, and which of equal ones is highest is arbitrary
        value, slopes = LOSSES[name](case["inputs"])
        expected = case["outputs"]
        np.testing.assert_allclose(value, expected["loss"], rtol=2e-5, atol=2e-6, err_msg=f"case {number}")
        np.testing.assert_allclose(slopes, expected["grad"], rtol=5e-5, atol=2e-6, err_msg=f"case {number}")


def test_losses_of_single_tokens():
    for case in ENTRIES["kimi.mirror_descent_loss"]:
        inputs = {name: f32(x) for name, x in case["inputs"].items()}
        A = inputs["advantages"][:, None]

        def loss(logprobs, inputs=inputs, A=A):
            return -surrogates.kimi(logprobs, inputs["old_logprobs"], A, tau=float(inputs["tau"]))

        np.testing.assert_allclose(loss(inputs["logprobs"]), case["outputs"]["token_loss"], rtol=1e-5, atol=1e-6)
        slopes = jax.grad(lambda x, loss=loss: loss(x).sum())(inputs["logprobs"])
        np.testing.assert_allclose(slopes, case["outputs"]["grad_of_sum"], rtol=1e-5, atol=1e-6)
    # ROLL's truncated importance sampling is cispo with its bounds.
    for case in ENTRIES["loss.truncated_importance_policy_gradient"]:
        inputs = case["inputs"]
        old, A = f32(inputs["old_logprobs"]), f32(inputs["advantages"])[:, None]
        cap = (inputs["lower"], inputs["upper"])

        def loss(logprobs, old=old, A=A, cap=cap):
            return -surrogates.cispo(logprobs, jnp.exp(logprobs - old), A, ratio_cap=cap)

        logprobs = f32(inputs["logprobs"])
        np.testing.assert_allclose(loss(logprobs), case["outputs"]["token_loss"], rtol=1e-5, atol=1e-6)
        slopes = jax.grad(lambda x, loss=loss: loss(x).sum())(logprobs)
        np.testing.assert_allclose(slopes, case["outputs"]["grad_of_sum"], rtol=1e-5, atol=1e-6)


def test_dpo():
    compared = 0
    for case in ENTRIES["dpo.loss"]:
        inputs, outputs = case["inputs"], case["outputs"]
        if inputs["ipo"] or inputs["label_smoothing"]:
            continue  # neither is offered
        names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
        chosen, rejected, ref_chosen, ref_rejected = (f32(inputs[name]) for name in names)

        def loss(chosen, rejected, ref=(ref_chosen, ref_rejected), beta=inputs["beta"]):
            return -surrogates.dpo(chosen - ref[0] - (rejected - ref[1]), beta=beta).mean()

        np.testing.assert_allclose(loss(chosen, rejected), outputs["loss"], rtol=1e-5)
        slopes = jax.grad(loss, argnums=(0, 1))(chosen, rejected)
        np.testing.assert_allclose(slopes[0], outputs["grad_chosen"], rtol=1e-5)
        np.testing.assert_allclose(slopes[1], outputs["grad_rejected"], rtol=1e-5)
        compared += 1
    assert compared >= 2


# --- Advantages ---------------------------------------------------------------------------------------------------


def grouped(inputs):
    rewards = np.asarray(inputs["rewards"], float)
    rewards = rewards.reshape(len(rewards), -1)
    return rewards @ np.asarray(inputs.get("weights", [1.0])), inputs["group_size"]


def of_groups(function):
    def run(inputs):
        rewards, size = grouped(inputs)
        return function(f32(rewards).reshape(1, -1, size)).reshape(-1)

    return run


def trl_rloo(inputs):
    rewards, size = grouped(inputs)
    if "beta" in inputs:
        names = ("old_logprobs", "ref_logprobs", "mask")
        old, ref, mask = (np.asarray(inputs[name], float) for name in names)
        rewards = rewards - inputs["beta"] * (np.asarray(surrogates.kl_term("k1", old, ref)) * mask).sum(-1)
    found = np.asarray(adv.rloo(f32(rewards).reshape(1, -1, size)).reshape(-1))
    if inputs.get("normalize"):
        found = (found - found.mean()) / (found.std(ddof=1) + 1e-4)
    return found


def verl_outcome(function):
    """Their groups may have any size, and one rollout: those cases do not exist here."""

    def run(inputs):
        group = np.asarray(inputs["group"])
        size = int((group == group[0]).sum())
        if any((group == g).sum() != size for g in group) or size < 2:
            return None
        order = np.argsort(group, kind="stable")
        rewards, lengths = f32(inputs["rewards"])[order], jnp.asarray(inputs["lengths"])[order]
        shape = (1, -1, size)
        found = function(rewards.reshape(shape), lengths.reshape(shape), jnp.ones((1, len(group) // size, size), bool))
        of_rows = np.zeros(len(group))
        of_rows[order] = np.asarray(found).reshape(-1)
        return of_rows[:, None] * (np.arange(inputs["T"]) < np.asarray(inputs["lengths"])[:, None])

    return run


def verl_grpo(rewards, lengths, mask):
    return adv.grpo(rewards, ddof=1)


OUTCOME = {
    "advantage.verl_grpo": verl_outcome(verl_grpo),
    "advantage.verl_dr_grpo": verl_outcome(lambda r, n, m: adv.centered(r)),
    "advantage.verl_rloo": verl_outcome(lambda r, n, m: adv.rloo(r)),
    "advantage.verl_opo": verl_outcome(lambda r, n, m: adv.opo(r, n)),
    "advantage.verl_reinforce_pp_baseline": verl_outcome(adv.reinforce_pp_baseline),
    "advantage.verl_gpg": verl_outcome(lambda r, n, m: adv.gpg(r, m)),
    "advantage.pass_at_k_max_gap": verl_outcome(lambda r, n, m: adv.max_gap(r, ddof=1)),
    "advantage.grpo_scale_group": of_groups(lambda r: adv.grpo(r, ddof=1, eps=1e-4)),
    "advantage.grpo_scale_batch": of_groups(lambda r: adv.batch_std(r, jnp.ones(r.shape, bool), ddof=1, eps=1e-4)),
    "advantage.grpo_scale_none": of_groups(adv.centered),
    "advantage.rloo": trl_rloo,
    "advantage.rloo_kl_in_reward": trl_rloo,
}


@pytest.mark.parametrize("name", OUTCOME)
def test_advantages(name):
    compared = 0
    for number, case in enumerate(ENTRIES[name]):
        inputs, expected = case["inputs"], case["outputs"]["advantages"]
        if not np.isfinite(np.asarray(inputs["rewards"], float)).all():
            continue  # a reward function that gave no score; here that is a fault, and 0
        found = OUTCOME[name](inputs)
        if found is not None:
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5, err_msg=f"case {number}")
            compared += 1
    assert compared >= 3


def test_anchored_advantages():
    for name, joins in (("advantage.anchor_zero", True), ("advantage.anchor_zero_off", False)):
        for case in ENTRIES[name]:
            inputs = case["inputs"]
            rewards = f32(inputs["rewards"]).reshape(1, -1, inputs["group_size"])
            if joins and inputs["mean_only"]:
                continue  # a mean alone moves the whole group, so it is not offered
            if not joins:
                found = adv.centered(rewards) if inputs["mean_only"] else adv.grpo(rewards, ddof=1, eps=1e-8)
            else:
                found = adv.anchor(rewards, ddof=1, eps=1e-8)
            np.testing.assert_allclose(found.reshape(-1), case["outputs"]["advantages"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["advantage.verl_reinforce_pp", "advantage.verl_gae"])
def test_advantages_of_tokens(name):
    for case in ENTRIES[name]:
        inputs, mask = case["inputs"], masked(case["inputs"])[None]
        rewards = f32(inputs["token_rewards"])[None]
        if name.endswith("gae"):
            values = f32(inputs["values"])[None]
            found = adv.gae(rewards * mask, values, jnp.asarray(mask), gamma=inputs["gamma"], lam=inputs["lam"])
        else:
            found = adv.reinforce_pp(rewards * mask, jnp.asarray(mask), gamma=inputs["gamma"])
        for got, key in zip(found, ("advantages", "returns"), strict=True):
            expected = np.asarray(case["outputs"][key])[None]
            np.testing.assert_allclose(np.asarray(got)[mask], expected[mask], rtol=1e-4, atol=1e-5)


# --- KL, corrections, values --------------------------------------------------------------------------------------


def test_kl_estimators():
    for case in ENTRIES["kl.estimators"]:
        inputs = case["inputs"]
        logprobs, ref = f32(inputs["logprobs"]), f32(inputs["ref_logprobs"])
        if inputs["kind"] == "k3" and np.max(case["outputs"]["kl"]) >= 10:
            continue  # they clamp it there
        found = surrogates.kl_term(inputs["kind"], logprobs, ref)
        np.testing.assert_allclose(found, case["outputs"]["kl"], rtol=1e-5, atol=1e-6)
        slopes = jax.grad(lambda x, ref=ref, kind=inputs["kind"]: surrogates.kl_term(kind, x, ref).sum())(logprobs)
        np.testing.assert_allclose(slopes, case["outputs"]["grad"], rtol=1e-5, atol=1e-6)


def test_sampler_corrections():
    for case in ENTRIES["sampler_correction.weights"]:
        inputs = case["inputs"]
        trainer = f32(inputs["trainer_logprobs"])[None]
        mask = jnp.arange(trainer.shape[-1]) < jnp.asarray(inputs["lengths"])[None, :, None]
        settings = CorrectionConfig(mode=inputs["mode"], low=inputs["clip_min"] or 0.0, high=inputs["clip_max"])
        found = sampler_weights(settings, trainer, f32(inputs["sampler_logprobs"])[None], mask)[0]
        expected = np.broadcast_to(np.asarray(case["outputs"]["weights"]), found.shape)
        np.testing.assert_allclose(np.asarray(found)[mask[0]], expected[mask[0]], rtol=1e-5)


def test_clipped_value_loss():
    for case in ENTRIES["value.clipped_loss"]:
        inputs, mask = case["inputs"], masked(case["inputs"])
        old, returns = f32(inputs["old_values"]), f32(inputs["returns"])

        def loss(values, old=old, returns=returns, mask=mask, clip=inputs["clip"]):
            return jnp.sum(mask * clipped_value_loss(values, old, returns, clip=clip)) / mask.sum()

        value, slopes = jax.value_and_grad(loss)(f32(inputs["values"]))
        np.testing.assert_allclose(value, case["outputs"]["loss"], rtol=1e-5)
        np.testing.assert_allclose(slopes, case["outputs"]["grad"], rtol=1e-4, atol=1e-6)


def test_every_objective_of_the_file_is_compared():
    families = ("loss.", "advantage.", "kl.", "value.clipped", "kimi.mirror", "dpo.", "sampler_correction.")
    here = {name for name in ENTRIES if name.startswith(families)}
    elsewhere = {"advantage.gdpo_normalize_then_sum"}  # reward.compose, in test_composition.py
    own = {
        "kimi.mirror_descent_loss", "loss.truncated_importance_policy_gradient", "dpo.loss", "advantage.anchor_zero",
        "advantage.anchor_zero_off", "advantage.verl_reinforce_pp", "advantage.verl_gae", "kl.estimators",
        "sampler_correction.weights", "value.clipped_loss",
    }  # fmt: skip
    assert here - LOSSES.keys() - OUTCOME.keys() - own == NOT_OURS | elsewhere


# --- Updates ------------------------------------------------------------------------------------------------------

RATE = 0.05
# Each with two updates per batch, so that ratios are not 1 in the second.
UPDATES = {
    "ppo": {"surrogate.dual_clip": 3.0},
    "reinforce": {"objective": "reinforce", "advantage": "gpg"},
    "cispo": {"objective": "cispo", "surrogate.ratio_cap": (0.8, 1.2), "aggregation": "constant"},
    "sapo": {"objective": "sapo", "aggregation": "seq_mean"},
    "kimi": {"objective": "kimi", "advantage": "mean", "surrogate.kimi_tau": 0.5},
    "gspo": {"objective": "gspo", "aggregation": "seq_mean", "clip_eps_low": 3e-2, "clip_eps_high": 4e-2},
    "sequence_ppo": {"objective": "sequence_ppo", "aggregation": "seq_mean", "advantage": "rloo"},
    "gmpo": {"objective": "gmpo", "aggregation": "seq_mean"},
    "clip_cov": {"objective": "clip_cov", "surrogate.cov_fraction": 0.2, "surrogate.cov_bounds": (0.1, 9.0)},
    "kl_cov": {"objective": "kl_cov", "surrogate.cov_fraction": 0.2},
    "dpo": {"objective": "dpo"},
    "reinforce_pp": {"advantage": "reinforce_pp", "kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1"},
    "reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline", "kl_coef": 0.1, "kl_estimator": "k3_ratio"},
    "gae": {"advantage": "gae", "critic.gamma": 0.9, "critic.lam": 0.8},
    "sequence_truncate": {"correction.mode": "sequence_truncate", "correction.high": 1.1},
    "token_mask": {"correction.mode": "token_mask", "correction.low": 0.9, "correction.high": 1.2},
    "max_old_drift": {"correction.max_old_drift": 1e-4},
}


def trainer_of(name, model, mesh, start, *, num_trunks, microbatch, minibatches=2, shards=None):
    config = with_values(
        Config(model=model),
        {f"loss.{key}": value for key, value in UPDATES[name].items()}
        | {
            "loss.num_minibatches": minibatches, "mesh.microbatch_trunks": microbatch, "rollout.num_trunks": num_trunks,
            "rollout.prompts_per_trunk": 2, "rollout.group_size": 4, "rollout.max_completion_tokens": 10,
            "rollout.temperature": 1.0, **(shards or {}),
        },
    )  # fmt: skip
    config.validate()
    scorer = Scorer(model, None, 0)
    return Trainer(
        config=config, mesh=mesh, tokenizer=None, header_length=0, reward=Reward(fn=None, scorer=scorer),
        optimizer=optax.sgd(RATE, momentum=1.0), columns=None, start=start,
    )  # fmt: skip


def parameters_of(name, params, width):
    if UPDATES[name].get("advantage") != "gae":
        return params
    return params | {READOUT: 0.1 * jnp.asarray(np.random.default_rng(5).normal(size=width + 1), jnp.float32)}


@pytest.fixture(scope="module")
def batch(tiny_config, tiny_params):
    """Rollouts of a policy that is not quite the one that is updated, as after a step of training."""
    tasks = make_tasks(tiny_config, U=4)
    other = jax.tree.map(lambda p: p * 1.02, tiny_params)
    rollouts = generate(
        tiny_config, other, tasks.prompts, rollout_key(0, 0), max_completion_tokens=10, temperature=1.0, top_p=1.0,
        top_k=0, stop_ids=(EOS,), vocab_size=tiny_config.vocab_size,
    )  # fmt: skip
    rewards = jnp.asarray(np.random.default_rng(1).random((4, 2, 4)).round(1), jnp.float32)
    return Experience(
        tasks=tasks, rollouts=rollouts, predictions=None,
        earned=Earned(rewards=rewards.at[0, 0].set(1.0), faults=jnp.zeros(rewards.shape, bool), metrics={}),
        group_mask=jnp.asarray(tasks.prompts.prompt_mask), tokens_scored=jnp.zeros(4, jnp.int32),
    )  # fmt: skip


def plain_updates(trainer, params, experience):
    """The same updates by differentiating the whole loss of unpacked rows, without slopes, lanes or microbatches."""
    config, loss = trainer.config, trainer.config.loss
    state = SimpleNamespace(params=params, companions={})
    values = trainer._values(state, experience)
    rows = policy_rows(experience, None, trainer._penalties(experience), values, loss=loss, temperature=1.0,
                       header_length=0)  # fmt: skip

    def logprobs_of(params):
        return score(config.model, {k: v for k, v in params.items() if k != READOUT}, rows.sequences, temperature=1.0)

    old, ref = logprobs_of(params), logprobs_of(trainer.start)
    mask = np.asarray(rows.policy_weights) != 0
    advantages = rows.advantages * sampler_weights(loss.correction, old, rows.sampler_logprobs, mask)

    def total(params, number):
        here = mask & (np.arange(len(mask)) % loss.num_minibatches == number)[:, None, None]
        logprobs, kept = logprobs_of(params), advantages
        if loss.correction.max_old_drift:
            keep = keeps_sequence(loss.correction.max_old_drift, logprobs, old, advantages, here)
            kept = jnp.where(keep, advantages, 0.0)
        if loss.objective == "dpo":
            shape = experience.earned.rewards.shape
            margins, is_pair = surrogates.pair_margins(
                jnp.where(here, logprobs - ref, 0.0).sum(-1).reshape(shape), experience.earned.rewards,
                here.any(-1).reshape(shape),
            )  # fmt: skip
            return -jnp.sum(is_pair * surrogates.dpo(margins, beta=loss.surrogate.dpo_beta)) / is_pair.sum()
        if loss.objective in surrogates.TOKEN_OBJECTIVES:
            gain = surrogates.token_gain(loss, logprobs, old, kept)
        else:
            gain = surrogates.batch_gain(loss, logprobs, old, kept, here)
        if loss.has_kl_term:
            gain = gain - loss.kl_coef * surrogates.kl_term(loss.kl_estimator, logprobs, ref, old)
        result = -jnp.sum(jnp.where(here, rows.policy_weights * gain, 0.0))
        if loss.has_critic:
            hidden, _ = predicting_states(config.model, params, rows.sequences)
            found = clipped_value_loss(
                hidden @ params[READOUT][:-1] + params[READOUT][-1],
                rows.old_values,
                rows.returns,
                clip=loss.critic.clip,
            )
            result += loss.critic.coef * jnp.sum(jnp.where(here, rows.policy_weights * found, 0.0))
        return result

    losses, sums, distances = [], jax.tree.map(jnp.zeros_like, params), []
    for number in range(loss.num_minibatches):
        distances.append(float(jnp.abs(jnp.where(mask, logprobs_of(params) - old, 0.0)).max()))
        value, slopes = jax.value_and_grad(total)(params, number)
        sums = jax.tree.map(jnp.add, sums, slopes)
        params = jax.tree.map(lambda p, s: p - RATE * s, params, sums)
        losses.append(float(value))
    # The second update sees ratios that are not 1.
    assert distances[0] < 1e-5 and distances[-1] > 1e-2
    return flat(sums), losses


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def run_learn(trainer, params, experience):
    """Return (the state, the sum of both updates' gradients as the optimizer's momentum holds it, metrics)."""
    state = init_state(jax.tree.map(jnp.copy, params), trainer.optimizer, trainer.mesh)
    state, metrics = trainer.learn(state, experience)
    return state, flat(state.opt_state[0].trace), metrics


@pytest.mark.parametrize("name", UPDATES)
def test_updates_equal_those_of_the_whole_unpacked_batch(name, tiny_config, tiny_params, batch, mesh):
    """Both updates, over microbatches of one and of two trunks, packed, against plain differentiation."""
    params = parameters_of(name, tiny_params, tiny_config.width)
    start = jax.tree.map(lambda p: p * 0.97, tiny_params)
    trainers = [trainer_of(name, tiny_config, mesh, start, num_trunks=4, microbatch=m) for m in (0, 1)]
    want, losses = plain_updates(trainers[0], params, batch)
    for trainer in trainers:
        _, got, metrics = run_learn(trainer, params, batch)
        # Log-probabilities of 20 nats have errors of 2e-6, and ratios with them.
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * max(1, np.abs(want).max()))
        np.testing.assert_allclose([m["loss"] for m in metrics], losses, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["gspo", "clip_cov", "dpo", "gae"])
def test_updates_on_eight_devices_equal_those_on_one(name, tiny_config, tiny_params, batch):
    single, many = make_mesh(MeshConfig()), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    # So that each minibatch has a trunk for each shard.
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
    config = dataclasses.replace(tiny_config, vocab_size=64)
    params = decoder.init_params(config, single, jax.random.key(3))
    sharded = jax.device_put(params, jax.tree.map(lambda p: p.sharding, decoder.abstract_params(config, many)))
    found = []
    for mesh, p, shards in ((single, params, {}), (many, sharded, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})):
        trainer = trainer_of(name, config, mesh, p, num_trunks=8, microbatch=0, shards=shards)
        own = parameters_of(name, p, config.width)
        if READOUT in own:
            own[READOUT] = jax.device_put(own[READOUT], replicated(mesh))
        _, got, metrics = run_learn(trainer, own, shard_batch(mesh, twice))
        found.append((got, [float(m["loss"]) for m in metrics]))
    (a, of_a), (b, of_b) = found
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1, np.abs(a).max()))
    np.testing.assert_allclose(of_a, of_b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*surrogates.INERT_AT_ONE, "ppo"])
def test_with_one_update_inert_objectives_are_grpo_bit_for_bit(name, tiny_config, tiny_params, batch, mesh):
    settings = {"objective": name, "surrogate.dual_clip": 3.0}
    UPDATES["inert"] = settings
    trainer = trainer_of("inert", tiny_config, mesh, None, num_trunks=4, microbatch=0, minibatches=1)
    assert objective_fn(tiny_config, trainer.config.loss).args[1] == LossConfig()
    UPDATES["inert"] = {}
    plain = trainer_of("inert", tiny_config, mesh, None, num_trunks=4, microbatch=0, minibatches=1)
    results = [run_learn(t, tiny_params, batch)[0].params for t in (trainer, plain)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", surrogates.INERT_AT_ONE)
def test_inert_objectives_have_ppos_slopes_at_ratio_one(name, per_token):
    """That they may be replaced: the slope by a log-probability is w A; of sequences, if A is one number for each."""
    rng = np.random.default_rng(0)
    A = jnp.broadcast_to(f32(rng.normal(size=(2, 3, 4 if per_token else 1))), (2, 3, 4))
    logprobs = f32(-rng.random((2, 3, 4)))
    mask = jnp.asarray(np.arange(4) < rng.integers(2, 5, (2, 3, 1)))
    weights = aggregation_weights("seq_mean", mask, jnp.ones((2, 3), bool))
    loss = LossConfig(objective=name, advantage="gae" if per_token else "grpo")

    def total(x):
        if name in surrogates.TOKEN_OBJECTIVES:
            return jnp.sum(weights * surrogates.token_gain(loss, x, logprobs, A))
        return jnp.sum(weights * surrogates.batch_gain(loss, x, logprobs, A, mask))

    is_ppo = np.allclose(jax.grad(total)(logprobs), weights * A, rtol=1e-5, atol=1e-7)
    assert is_ppo == (effective(loss).objective == "ppo") == (name in surrogates.INERT_PER_TOKEN or not per_token)
    corrected = dataclasses.replace(loss, correction=CorrectionConfig(mode="token_mask"))
    assert (effective(corrected).objective == "ppo") == (name in surrogates.INERT_PER_TOKEN)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_planner_knows_the_critic(tiny_config, tiny_params, mesh, rank):
    config = with_values(Config(model=tiny_config), {"loss.advantage": "gae", "lora.rank": rank})
    state, frozen = fresh_state(config, mesh, tiny_params, "rpt")
    planned, base = abstract_state(config, mesh)
    assert jax.tree.structure(planned) == jax.tree.structure(state) and (base is None) == (frozen is None)
    for a, b in zip(*map(jax.tree.leaves, (planned.params, state.params)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert READOUT in join(frozen, state.params) and READOUT not in merge(frozen, state.params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.surrogate.dual_clip": 0.5}, "dual-clip"),
        ({"loss.surrogate.ratio_cap": (1.2, 5.0)}, "ratio-cap"),
        ({"loss.correction.low": 4.0}, "correction.low"),
        ({"loss.correction.max_old_drift": 0.5}, "max-old-drift 0"),
        ({"loss.kl_in": "reward"}, "--loss.kl-coef"),
        ({"loss.kl_in": "reward", "loss.kl_coef": 0.1, "loss.kl_estimator": "k3_ratio"}, "kl-estimator"),
        ({"loss.kl_in": "reward", "loss.kl_coef": 0.1, "reward.compose": "normalize_then_sum"}, "compose sum"),
        ({"loss.objective": "dpo", "loss.advantage": "gae"}, "--loss.advantage grpo"),
        ({"loss.objective": "dpo", "loss.correction.mode": "token_mask"}, "Remove --loss.correction"),
        ({"loss.ddof": "sample", "loss.advantage": "rloo"}, "Remove --loss.ddof"),
        ({"loss.advantage": "anchor", "rollout.dynamic_sampling_from_step": 5}, "dynamic-sampling-from-step -1"),
        ({"loss.surrogate.sapo_temperatures": (0.0, 1.0)}, "sapo-temperatures"),
        ({"loss.surrogate.cov_bounds": (5.0, 1.0)}, "cov-bounds"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        with_values(Config(), changes).validate()


def test_a_critic_is_saved_with_the_policy_and_left_out_of_it(corpus, tmp_path):  # noqa: F811
    """Two steps in one go and in two starts end with the same bits; another run may start from the policy alone."""
    base = tiny_run(corpus, tmp_path / "whole")
    base = with_values(base, {
        "loss.advantage": "gae", "loss.num_minibatches": 2, "reward.terms": ("likelihood",), "run.num_steps": 2,
        "run.control": False, "checkpoint.every_steps": 1, "eval.every_steps": 2,
    })  # fmt: skip
    run_stages(base)
    parts = with_values(base, {"run.directory": str(tmp_path / "parts")})
    run_stages(parts, stop_at_step=1)
    run_stages(parts)
    mesh = make_mesh(MeshConfig())
    whole, again = (newest_of_run(tmp_path / name, mesh)[0].params for name in ("whole", "parts"))
    for a, b in zip(*map(jax.tree.leaves, (whole, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(whole[READOUT]).max() > 0
    records = [r for r in read_records(tmp_path / "whole") if r["stage"] == "rpt"]
    assert all(r["value_loss"] > 0 and not r["skipped"] for r in records)
    following = with_values(base, {
        "run.directory": str(tmp_path / "next"), "policy.path": str(tmp_path / "whole"), "supervised.num_steps": 0,
        "loss.advantage": "grpo", "run.num_steps": 0,
    })  # fmt: skip
    params = start_params(prepare(following).config, mesh)
    assert READOUT not in params
    np.testing.assert_array_equal(params["head"], whole["head"])
