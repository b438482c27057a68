"""Objectives, advantages and corrections: the authors' numbers, and that no batching changes them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import CorrectionConfig, LossConfig, SurrogateConfig
from rpt_jax.rl import advantages as adv
from rpt_jax.rl import surrogates
from rpt_jax.rl.corrections import clipped_value_loss, keeps_sequence, sampler_weights
from rpt_jax.rl.rows import aggregation_weights

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
        found = function(rewards.reshape(shape), lengths.reshape(shape), jnp.ones((1, len(group) // size), bool))
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
    "advantage.grpo_scale_batch": of_groups(lambda r: adv.batch_std(r, jnp.ones(r.shape[:2], bool), ddof=1, eps=1e-4)),
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
