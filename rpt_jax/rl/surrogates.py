"""The policy objectives: what is maximised, one equation each, and estimators of the KL divergence.

Token objectives are functions of single tokens. Batch objectives tie tokens together: those of a sequence, of a pair of
sequences, or of the whole batch. `objective.py` uses the former directly, and the slopes of the latter.

Notation: rho_t = pi(y_t) / pi_old(y_t), A_t the advantage, both of the tokens that have a policy term.
"""

import jax
import jax.numpy as jnp

from rpt_jax.config import LossConfig

TOKEN_OBJECTIVES = ("ppo", "reinforce", "cispo", "sapo", "kimi")
BATCH_OBJECTIVES = ("gspo", "sequence_ppo", "gmpo", "clip_cov", "kl_cov", "dpo")
# These differ from ppo only where rho is not 1: with one update per batch they have its gradient. Those of sequences do
# if all tokens of a sequence have one advantage.
INERT_PER_TOKEN = ("reinforce", "cispo", "sapo", "kimi", "kl_cov")
INERT_AT_ONE = (*INERT_PER_TOKEN, "gspo", "gmpo")

# --- Token objectives ---------------------------------------------------------------------------------------------


def ppo(ratio, advantages, *, clip_eps_low: float, clip_eps_high: float, dual_clip: float = 0.0):
    """Return min(rho A, clip(rho, 1 - low, 1 + high) A) per token; with a dual clip c, at least c A where A < 0.

    Sources: PPO, arXiv:1707.06347 eq. 7; clip-higher: DAPO, arXiv:2503.14476 eq. 10; dual clip: arXiv:1912.09729,
    which is TRL's two-sided delta.
    """
    clipped = jnp.clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high)
    gain = jnp.minimum(ratio * advantages, clipped * advantages)
    return jnp.where(advantages < 0, jnp.maximum(gain, dual_clip * advantages), gain) if dual_clip else gain


def reinforce(logprobs, advantages):
    """Return A log pi per token: no ratio (GPG, arXiv:2504.02546)."""
    return advantages * logprobs


def cispo(logprobs, ratio, advantages, *, ratio_cap: tuple[float, float]):
    """Return sg(clip(rho, low, high)) A log pi per token: no token loses its gradient.

    Source: MiniMax-M1, arXiv:2506.13585. Codes differ in the bounds: TRL (0, 5), open-instruct (0, 1 + eps), verl
    (1 - eps, 1 + eps).
    """
    return jax.lax.stop_gradient(jnp.clip(ratio, *ratio_cap)) * advantages * logprobs


def sapo(ratio, advantages, *, temperatures: tuple[float, float]):
    """Return 4 / tau sigmoid(tau (rho - 1)) A per token, with one tau for A > 0 and another otherwise.

    A soft gate instead of a clip; its slope at rho = 1 is A. Source: SAPO, arXiv:2511.20347.
    """
    tau = jnp.where(advantages > 0, *temperatures)
    return 4 / tau * jax.nn.sigmoid(tau * (ratio - 1)) * advantages


def kimi(logprobs, old_logprobs, advantages, *, tau: float):
    """Return A log pi - tau / 2 (log rho)^2 per token.

    Source: Kimi k1.5, arXiv:2501.12599 §2.3. Differs: per token, as in the code of ROLL; the report's is per sequence.
    """
    return advantages * logprobs - tau / 2 * (logprobs - old_logprobs) ** 2


def token_gain(loss: LossConfig, logprobs, old_logprobs, advantages):
    """Return what `loss.objective`, one of TOKEN_OBJECTIVES, maximises for each token.

    Raises:
        ValueError: another objective.
    """
    ratio, s = jnp.exp(logprobs - old_logprobs), loss.surrogate
    clip = {"clip_eps_low": loss.clip_eps_low, "clip_eps_high": loss.clip_eps_high}
    if loss.objective == "ppo":
        return ppo(ratio, advantages, **clip, dual_clip=s.dual_clip)
    if loss.objective == "reinforce":
        return reinforce(logprobs, advantages)
    if loss.objective == "cispo":
        return cispo(logprobs, ratio, advantages, ratio_cap=s.ratio_cap)
    if loss.objective == "sapo":
        return sapo(ratio, advantages, temperatures=s.sapo_temperatures)
    if loss.objective == "kimi":
        return kimi(logprobs, old_logprobs, advantages, tau=s.kimi_tau)
    raise ValueError(f"unknown token objective {loss.objective!r}")


# --- Batch objectives ---------------------------------------------------------------------------------------------


def mean_log_ratio(log_ratio_URC, mask_URC):
    """Return the mean log rho of each sequence, f32 [U, R, 1]; 0 for one without tokens."""
    number = jnp.maximum(1, mask_URC.sum(-1, keepdims=True))
    return jnp.sum(jnp.where(mask_URC, log_ratio_URC, 0.0), axis=-1, keepdims=True) / number


def gspo(log_ratio_URC, advantages_URC, mask_URC, **clip):
    """Return `ppo` with the sequence's ratio exp(mean log rho) for each of its tokens.

    Source: GSPO, arXiv:2507.18071 eq. 5. With aggregation seq_sum it is LUSPO.
    """
    return ppo(jnp.exp(mean_log_ratio(log_ratio_URC, mask_URC)), advantages_URC, **clip)


def sequence_ppo(log_ratio_URC, advantages_URC, mask_URC, **clip):
    """Return `ppo` with the sequence's ratio exp(sum log rho), as a mean over its tokens.

    With aggregation seq_mean, it is the loss of TRL's RLOO: one term for each sequence.
    """
    total = jnp.sum(jnp.where(mask_URC, log_ratio_URC, 0.0), axis=-1, keepdims=True)
    return ppo(jnp.exp(total), advantages_URC, **clip)


def gmpo(log_ratio_URC, advantages_URC, mask_URC, *, clip_eps_low: float, clip_eps_high: float):
    """Return A times the geometric mean of the sequence's ratios, each clipped first, for each of its tokens.

    log rho is clipped to [-low, high] on the side that the advantage pushes it to. Source: GMPO, arXiv:2507.20673.
    """
    sign = jnp.sign(advantages_URC)
    clipped = jnp.clip(log_ratio_URC, -clip_eps_low, clip_eps_high)
    log_ratio_URC = sign * jnp.minimum(sign * log_ratio_URC, sign * clipped)
    return jnp.exp(mean_log_ratio(log_ratio_URC, mask_URC)) * advantages_URC


def covariances(logprobs_URC, advantages_URC, mask_URC):
    """Return (A - mean A)(log pi - mean log pi) of each token, means over the batch; -inf without a policy term.

    Source: arXiv:2505.22617.
    """
    centered = [x - jnp.mean(x, where=mask_URC) for x in (advantages_URC, jax.lax.stop_gradient(logprobs_URC))]
    return jnp.where(mask_URC, centered[0] * centered[1], -jnp.inf)


def _highest(values, number):
    """Return whether each value is among the highest `number` ones; -inf is not."""
    flat = values.reshape(-1)
    rank = jnp.argsort(jnp.argsort(-flat, stable=True), stable=True).reshape(values.shape)
    return (rank < number) & (values > -jnp.inf)


def clip_cov(log_ratio, logprobs, advantages, mask, *, fraction: float, bounds: tuple[float, float], **clip):
    """Return `ppo` without the gradient of a share of the tokens, those whose covariance is highest inside the bounds.

    Arrays f32 [U, R, C]. Source: arXiv:2505.22617. Differs: the authors draw these tokens at random.
    """
    ratio = jnp.exp(log_ratio)
    gain = ppo(ratio, advantages, **clip)
    is_clipped = gain < ratio * advantages
    found = jnp.where(is_clipped, -jnp.inf, covariances(logprobs, advantages, mask))
    found = jnp.where((found > bounds[0]) & (found < bounds[1]), found, -jnp.inf)
    number = jnp.maximum(1, (fraction * mask.sum()).astype(jnp.int32))
    return jnp.where(_highest(found, number), 0.0, gain)


def kl_cov(log_ratio, logprobs, advantages, mask, *, fraction: float, kl_coef: float):
    """Return rho A, less kl_coef |log rho| for the share of the tokens whose covariance is highest.

    Arrays f32 [U, R, C]. Source: arXiv:2505.22617.
    """
    number = jnp.maximum(1, (fraction * mask.sum()).astype(jnp.int32))
    is_high = _highest(covariances(logprobs, advantages, mask), number)
    # |x| with slope 0 at 0, so that nothing pulls at rho = 1.
    distance = jax.lax.stop_gradient(jnp.sign(log_ratio)) * log_ratio
    return jnp.exp(log_ratio) * advantages - jnp.where(is_high, kl_coef * distance, 0.0)


def dpo(margins, *, beta: float):
    """Return log sigmoid(beta margin) of each pair.

    The margin is the log-ratio of the better sequence to the reference policy, minus that of the worse one. Source:
    DPO, arXiv:2305.18290 eq. 7.
    """
    return jax.nn.log_sigmoid(beta * margins)


def pair_margins(log_ratio_UMG, rewards_UMG, row_mask_UMG):
    """Return (margin of each group's best and worst rollout f32 [U, M], whether the group has such a pair bool [U, M]).

    Of equal ones, the first counts. A group whose rewards are equal has no pair.

    Args:
        log_ratio_UMG: f32, log pi - log pi_ref of whole sequences.
        rewards_UMG: f32.
        row_mask_UMG: bool, rollouts that may be in a pair.
    """
    best = jnp.where(row_mask_UMG, rewards_UMG, -jnp.inf).argmax(-1)[..., None]
    worst = jnp.where(row_mask_UMG, rewards_UMG, jnp.inf).argmin(-1)[..., None]

    def of(x, place):
        return jnp.take_along_axis(x, place, axis=-1)[..., 0]

    is_pair = (of(rewards_UMG, best) > of(rewards_UMG, worst)) & (row_mask_UMG.sum(-1) > 1)
    return jnp.where(is_pair, of(log_ratio_UMG, best) - of(log_ratio_UMG, worst), 0.0), is_pair


def batch_gain(loss: LossConfig, logprobs_URC, old_logprobs_URC, advantages_URC, mask_URC):
    """Return what `loss.objective`, one of BATCH_OBJECTIVES except dpo, maximises for each token, [U, R, C].

    Raises:
        ValueError: another objective.
    """
    log_ratio, s = jnp.where(mask_URC, logprobs_URC - old_logprobs_URC, 0.0), loss.surrogate
    clip = {"clip_eps_low": loss.clip_eps_low, "clip_eps_high": loss.clip_eps_high}
    if loss.objective == "gspo":
        return gspo(log_ratio, advantages_URC, mask_URC, **clip, dual_clip=s.dual_clip)
    if loss.objective == "sequence_ppo":
        return sequence_ppo(log_ratio, advantages_URC, mask_URC, **clip, dual_clip=s.dual_clip)
    if loss.objective == "gmpo":
        return gmpo(log_ratio, advantages_URC, mask_URC, **clip)
    tokens = log_ratio, logprobs_URC, advantages_URC, mask_URC
    if loss.objective == "clip_cov":
        return clip_cov(*tokens, fraction=s.cov_fraction, bounds=s.cov_bounds, **clip, dual_clip=s.dual_clip)
    if loss.objective == "kl_cov":
        return kl_cov(*tokens, fraction=s.cov_fraction, kl_coef=s.cov_kl_coef)
    raise ValueError(f"unknown batch objective {loss.objective!r}")


# --- KL divergence ------------------------------------------------------------------------------------------------


def kl_term(name: str, logprobs, ref_logprobs, old_logprobs=None):
    """Estimate KL(policy || reference) per token from the policy's samples, with delta = logprobs - ref_logprobs.

    k1 = delta; abs = |delta|; k2 = delta^2 / 2; k3 = exp(-delta) - 1 + delta (Schulman 2020); k3_ratio = rho k3, whose
    expectation holds for samples of an older policy (DeepSeek-V3.2, arXiv:2512.02556). As a loss, k1 has zero mean
    gradient, k2 the gradient of the reverse KL, and k3 on average that of the forward KL.

    Args:
        old_logprobs: of the policy that sampled, for k3_ratio.
    Raises:
        ValueError: unknown name.
    """
    delta = logprobs - ref_logprobs
    if name == "k1":
        return delta
    if name == "abs":
        return jnp.abs(delta)
    if name == "k2":
        return delta**2 / 2
    k3 = jnp.exp(-delta) - 1 + delta
    if name == "k3":
        return k3
    if name == "k3_ratio":
        return jnp.exp(logprobs - old_logprobs) * k3
    raise ValueError(f"unknown KL estimator {name!r}")
