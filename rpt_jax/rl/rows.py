"""From experience to the rows of an update: sequences, advantages, and the weight of every term of the loss.

Weights are normalised over the whole global batch before it is packed and split, so microbatches and devices add up.
"""

from functools import partial

import jax
import jax.numpy as jnp

from rpt_jax.config import LossConfig
from rpt_jax.rl.advantages import TOKEN_ADVANTAGES, compute_advantages, gae, reinforce_pp, token_rewards
from rpt_jax.scoring.requests import Appended
from rpt_jax.sequences import completions
from rpt_jax.types import Experience, Rows


def aggregation_weights(name: str, mask_URC, row_mask_UR, width: int = 0):
    """Compute the weight of each token's term, so that loss = -(weights * terms).sum().

    seq_mean: mean over rollouts of the mean over their tokens (GRPO, arXiv:2402.03300 eq. 3).
    token_mean: mean over all tokens of the batch (DAPO, arXiv:2503.14476 eq. 8).
    constant: sum over tokens / (rollouts * C) (Dr. GRPO, arXiv:2503.20783).
    seq_sum: mean over rollouts of the sum over their tokens (with gspo: LUSPO).

    Args:
        name: seq_mean, token_mean, constant or seq_sum.
        mask_URC: bool, tokens of the whole global batch that count.
        row_mask_UR: bool, rollouts that count.
        width: C of constant; 0: that of the mask.
    Returns:
        f32 [U, R, C]; all zero if nothing counts.
    Raises:
        ValueError: unknown name.
    """
    mask = (mask_URC & row_mask_UR[..., None]).astype(jnp.float32)
    num_rows = jnp.maximum(jnp.sum(row_mask_UR), 1)
    if name == "seq_mean":
        return mask / jnp.maximum(mask.sum(-1, keepdims=True), 1) / num_rows
    if name == "token_mean":
        return mask / jnp.maximum(mask.sum(), 1)
    if name == "constant":
        return mask / (num_rows * (width or mask_URC.shape[-1]))
    if name == "seq_sum":
        return mask / num_rows
    raise ValueError(f"unknown aggregation {name!r}")


def _scale(name: str, mask_URC, row_mask_UR, width: int):
    """Return the weight of a token's term where it does not depend on its rollout; arguments as above.

    Raises:
        ValueError: seq_mean, whose weights depend on the thought's length.
    """
    if name == "token_mean":
        return 1 / jnp.maximum((mask_URC & row_mask_UR[..., None]).sum(), 1)
    if name in ("constant", "seq_sum"):
        return 1 / (jnp.maximum(jnp.sum(row_mask_UR), 1) * (width if name == "constant" else 1))
    raise ValueError(f"a reference's term has no scale with aggregation {name!r}")


def _with_next_prompts_rows(appended: Appended, row_mask_UMG) -> Appended:
    """Give prompts without a policy term the rows of the next prompt."""
    U, M, G = row_mask_UMG.shape
    own_UR = row_mask_UMG.reshape(U, M * G)

    def moved(x):
        is_own = own_UR.reshape(U, M * G, *[1] * (x.ndim - 2))
        return jnp.where(is_own, x, jnp.roll(x, -G, axis=1))

    return jax.tree.map(moved, appended)


@partial(jax.jit, static_argnames=("loss", "temperature", "header_length"))
def policy_rows(
    experience: Experience,
    appended: Appended | None = None,
    penalties_URC=None,
    values_URC=None,
    *,
    loss: LossConfig,
    temperature: float,
    header_length: int,
) -> Rows:
    """Build the rows of one rollout batch, one per rollout.

    Weights are multiplied by the number of minibatches, so that the loss of each minibatch has the usual scale.

    Args:
        experience: the whole global batch.
        appended: rows that replace the completions, if the reward gives the references weights or distils. Kept tokens
            have the policy's terms. Each token of the reference has the likelihood term, at temperature 1, with the
            reference's weight and the scale of a policy term's token. A prompt that distils has the next prompt's rows
            instead of its own, and the likelihood term on kept tokens and reference.
        penalties_URC: f32, what each sampled token costs of the reward; None: nothing.
        values_URC: f32, of a critic, for the advantage gae.
        loss: settings of the loss.
        temperature: of the rollouts.
        header_length: trunk tokens before the document, which the next-token term skips.
    """
    prompts, rollouts, earned = experience.tasks.prompts, experience.rollouts, experience.earned
    U, M, G = prompts.row_ids.shape
    group_mask_UM, lengths_UMG = experience.group_mask, rollouts.mask.sum(-1).reshape(U, M, G)
    # A rollout sampled from NaN logits makes the update non-finite, so it is skipped.
    is_sound_UMG = jnp.isfinite(jnp.sum(rollouts.sampler_logprobs, axis=-1)).reshape(U, M, G)
    rewards_UMG = jnp.where(is_sound_UMG, earned.rewards, jnp.nan)
    rows_UMG = jnp.broadcast_to(group_mask_UM[..., None], (U, M, G))
    rows_UMG = rows_UMG if earned.row_mask is None else rows_UMG & earned.row_mask
    rows_UR, C = rows_UMG.reshape(U, M * G), rollouts.mask.shape[-1]
    terms_URC = rollouts.mask if earned.token_mask is None else rollouts.mask & earned.token_mask
    returns_URC = None
    if loss.advantage in TOKEN_ADVANTAGES:
        advantages_URC, returns_URC = _token_advantages(
            loss, rewards_UMG, penalties_URC, values_URC, terms_URC & rows_UR[..., None]
        )
    else:
        if penalties_URC is not None:
            costs = jnp.where(rollouts.mask, penalties_URC, 0.0).sum(-1)
            rewards_UMG = rewards_UMG - costs.reshape(U, M, G)
        if earned.advantages is None:
            ddof = 1 if loss.ddof == "sample" else 0
            advantages_UMG = compute_advantages(
                loss.advantage, rewards_UMG, lengths_UMG, group_mask_UM, earned.row_mask, ddof=ddof
            )
        else:
            advantages_UMG = jnp.where(group_mask_UM[..., None], earned.advantages + 0 * rewards_UMG, 0.0)
        advantages_URC = advantages_UMG.reshape(U, M * G, 1)
    if earned.token_advantages is not None:
        is_in_UR = jnp.repeat(group_mask_UM, G, axis=1)
        advantages_URC = advantages_URC + jnp.where(is_in_UR[..., None], earned.token_advantages, 0.0)
    tokens, mask, sampler_logprobs = rollouts.tokens, rollouts.mask, rollouts.sampler_logprobs
    temperatures, likelihood_weights = jnp.full(mask.shape, temperature, jnp.float32), None
    if appended is not None:
        if earned.distilled is not None:
            appended = _with_next_prompts_rows(appended, earned.row_mask)
        tokens, mask, places = appended.tokens, appended.mask, jnp.arange(appended.mask.shape[-1])
        is_kept = places < appended.kept[..., None]
        padding = ((0, 0), (0, 0), (0, mask.shape[-1] - C))
        terms_URC, sampler_logprobs = jnp.pad(terms_URC, padding) & is_kept, jnp.pad(sampler_logprobs, padding)
        sampler_logprobs, temperatures = sampler_logprobs * is_kept, jnp.where(is_kept, temperature, 1.0)
        is_reference = mask & (places >= appended.first[..., None])
        likelihood_weights = jnp.zeros(mask.shape, jnp.float32)
        if earned.reference_weights is not None:
            weights_UR = jnp.where(rows_UR, earned.reference_weights.reshape(U, M * G), 0.0)
            likelihood_weights += jnp.where(is_reference, weights_UR[..., None], 0.0)
        if earned.distilled is not None:
            weights_UR = jnp.where(group_mask_UM[..., None], earned.distilled, 0.0).reshape(U, M * G)
            likelihood_weights += jnp.where(is_reference | is_kept, weights_UR[..., None], 0.0)
        likelihood_weights *= loss.num_minibatches * _scale(loss.aggregation, terms_URC, rows_UR, C)
    weights = aggregation_weights(loss.aggregation, terms_URC, rows_UR, C)
    columns = jnp.arange(prompts.trunk_tokens.shape[1])
    trunk_mask = (columns >= max(1, header_length)) & (columns < prompts.trunk_lengths[:, None])
    trunk_weights = loss.ntp_coef * loss.num_minibatches * trunk_mask / jnp.maximum(1, trunk_mask.sum())
    return Rows(
        sequences=completions(prompts, tokens, mask),
        row=jnp.broadcast_to(jnp.arange(M * G, dtype=jnp.int32)[:, None], mask.shape),
        policy_weights=loss.num_minibatches * weights,
        advantages=_widened(advantages_URC, mask.shape),
        likelihood_weights=likelihood_weights,
        trunk_weights=trunk_weights if loss.ntp_coef else None,
        temperature=temperatures,
        sampler_logprobs=sampler_logprobs,
        old_logprobs=None,
        ref_logprobs=None,
        old_values=None if values_URC is None else _widened(values_URC, mask.shape),
        returns=None if values_URC is None else _widened(returns_URC, mask.shape),
    )


def _token_advantages(loss: LossConfig, rewards_UMG, penalties_URC, values_URC, mask_URC):
    """Return (advantages, returns), f32 [U, R, C]; 0 for tokens without a policy term. The last one has the reward."""
    U, M, G = rewards_UMG.shape
    penalties = jnp.zeros(mask_URC.shape, jnp.float32) if penalties_URC is None else penalties_URC
    rewards = token_rewards(rewards_UMG.reshape(U, M * G), penalties, mask_URC)
    if loss.advantage == "reinforce_pp":
        return reinforce_pp(rewards, mask_URC)
    return gae(rewards, values_URC, mask_URC, gamma=loss.critic.gamma, lam=loss.critic.lam)


def _widened(x_URC, shape):
    """Broadcast single columns, or pad to the width of rows that hold more than the completion."""
    if x_URC.shape[-1] == 1:
        return jnp.broadcast_to(x_URC, shape)
    return jnp.pad(x_URC, ((0, 0), (0, 0), (0, shape[-1] - x_URC.shape[-1])))
