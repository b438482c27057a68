"""Rewards by likelihood, where nothing verifies: how probable does a thought make the reference?

The reference is a text's true continuation, or a question's accepted answer. It is scored token by token behind the
thought, its </think> and `\\boxed{`; an open thought is closed first. The pure functions take log-probabilities in nats
with their masks; the rewards of evidence at the end add the scoring passes.
"""

import jax
import jax.numpy as jnp

from rpt_jax.config import RewardConfig
from rpt_jax.rl.advantages import rloo
from rpt_jax.scoring.requests import Request, Scores
from rpt_jax.tokenizer import BOX_OPEN
from rpt_jax.types import Earned, Evidence

# Names of the scoring passes.
_THOUGHT, _PROXY, _BASELINE, _AVERAGE = "after_thought", "after_thought_average", "baseline", "average_direct"
_RUBRIC, _JUDGE, _OWN, _PRIOR = "rubric", "judge", "own_tokens", "behind_prior"
_CHOICE, _FACT, _NO_FACT = "choice", "evidence", "evidence_alone"


def measure(logprobs, mask, how: str):
    """Return the likelihood of a reference, 0 where it has no token.

    log: sum of log p. mean_log: its mean per token. probability: exp of the sum. mean_probability: mean of p per token.
    geometric_mean: exp of the mean.

    Args:
        logprobs: f32 [..., A].
        mask: bool, real tokens.
        how: one of the above.
    Returns:
        f32 [...].
    Raises:
        ValueError: unknown measure.
    """
    count = jnp.maximum(mask.sum(-1), 1)
    total = jnp.sum(jnp.where(mask, logprobs, 0.0), axis=-1)
    values = {
        "log": lambda: total,
        "mean_log": lambda: total / count,
        "probability": lambda: jnp.exp(total),
        "mean_probability": lambda: jnp.sum(jnp.where(mask, jnp.exp(logprobs), 0.0), axis=-1) / count,
        "geometric_mean": lambda: jnp.exp(total / count),
    }
    if how not in values:
        raise ValueError(f"measure {how!r}; it must be one of {', '.join(values)}")
    return jnp.where(mask.any(-1), values[how](), 0.0)


def reasoning_perplexity(logprobs, mask, thought_tokens):
    """Return NOVER's perplexity, exp(-mean log p / N), and the same without N. Lower is better.

    N = max(1, 1 + log10(thought tokens)). Source: NOVER, thinkwee/NOVER `calculate_perplexity`; its paper writes log.
    """
    mean = measure(logprobs, mask, "mean_log")
    normaliser = jnp.maximum(1.0, 1.0 + jnp.log10(jnp.maximum(thought_tokens, 1).astype(jnp.float32)))
    return jnp.exp(-mean / normaliser), jnp.exp(-mean)


def nover_terms(perplexity_UMG, is_valid_UMG, thought_tokens_UMG):
    """Return NOVER's rank and efficiency rewards of a group, f32 [U, M, G] each; 0 for invalid rollouts.

    rank: (n - rank + 1) / n among the n valid rollouts, best first; ties go to the earlier one. efficiency: the share
    of the other valid rollouts that are worse and longer; 0 for n < 2. Source: thinkwee/NOVER `reasoning_reward`,
    `efficiency_reward`.
    """
    own, other = (..., slice(None), None), (..., None, slice(None))
    G = perplexity_UMG.shape[-1]
    counts = is_valid_UMG[other] & is_valid_UMG[own]
    n = is_valid_UMG.sum(-1, keepdims=True)
    earlier = jnp.arange(G)[None, :] < jnp.arange(G)[:, None]
    is_equal = perplexity_UMG[other] == perplexity_UMG[own]
    better = (perplexity_UMG[other] < perplexity_UMG[own]) | (is_equal & earlier)
    rank = 1 + jnp.sum(better & counts, axis=-1)
    worse = (perplexity_UMG[own] < perplexity_UMG[other]) & (thought_tokens_UMG[own] < thought_tokens_UMG[other])
    beaten = jnp.sum(worse & counts, axis=-1) / jnp.maximum(n - 1, 1)
    return jnp.where(is_valid_UMG, (n - rank + 1) / jnp.maximum(n, 1), 0.0), jnp.where(is_valid_UMG, beaten, 0.0)


def nover_reward(is_valid, rank, efficiency, weights: tuple[float, float, float]):
    """Return w_f * format + (w_r * rank + w_e * efficiency where the format is kept). Source: NOVER, eq. of R_total."""
    of_format, of_rank, of_efficiency = weights
    return jnp.where(is_valid, of_format + of_rank * rank + of_efficiency * efficiency, 0.0)


def shaped_gain(score, baseline, shaping: str = "threshold_0"):
    """Return RLPR's reward of a score with a thought against the baseline without one.

    x = score - baseline. threshold_t: clip(x, 0, 1), and 0 unless x >= t. identity: x. one_minus: 1 - x.
    Source: RLPR, arXiv:2506.18254 eq. 5; OpenBMB/RLPR `ProbRewardManager`.

    Raises:
        ValueError: unknown shaping.
    """
    gain = score - baseline
    if shaping in ("identity", "one_minus"):
        return gain if shaping == "identity" else 1 - gain
    if not shaping.startswith("threshold_"):
        raise ValueError(f"shaping {shaping!r}; it must be threshold_T, identity or one_minus")
    gain = jnp.clip(gain, 0.0, 1.0)
    return jnp.where(gain >= float(shaping.removeprefix("threshold_")), gain, 0.0)


def jepo_advantages(logprobs_UMG):
    """Return log mean_j p_j - log mean_{j != i} p_j for each rollout i of a group.

    The multi-sample bound with its leave-one-out baseline. Source: JEPO, arXiv:2503.19618 eq. 10.
    """
    G = logprobs_UMG.shape[-1]
    whole = jax.nn.logsumexp(logprobs_UMG, axis=-1, keepdims=True)
    # log(sum - p_i), without cancelling: over the others.
    is_other = ~jnp.eye(G, dtype=bool)
    others = jax.nn.logsumexp(jnp.where(is_other, logprobs_UMG[..., None, :], -jnp.inf), axis=-1)
    return whole - jnp.log(G) - (others - jnp.log(G - 1))


# --- Requests -----------------------------------------------------------------------------------------------------


def _num_targets(options: RewardConfig, kind: str) -> int:
    """Return how many reference tokens are scored: one of a text's, all of an answer, unless it is set; 0: all."""
    return options.likelihood.num_targets or (1 if kind == "documents" else 0)


def after_thought(options: RewardConfig, kind: str) -> tuple[Request, ...]:
    """Request the reference behind the thought, of the current policy."""
    return (Request(name=_THOUGHT, stub=BOX_OPEN, num_targets=_num_targets(options, kind)),)


def after_thought_of_average(options: RewardConfig, kind: str) -> tuple[Request, ...]:
    """Request the same of the policy's moving average, NOVER's proxy."""
    return (Request(name=_PROXY, policy="average", stub=BOX_OPEN, num_targets=_num_targets(options, kind)),)


def rubric_after_text(options: RewardConfig, kind: str) -> tuple[Request, ...]:
    """Request the rubric behind the whole text, of the policy's moving average."""
    return (Request(name=_RUBRIC, policy="average", keep="completion", stub="\n\nCriteria: "),)


def judgement(options: RewardConfig, kind: str) -> tuple[Request, ...]:
    """Request a judge's probabilities of the digits behind the whole text."""
    return (
        Request(
            name=_JUDGE, policy=options.likelihood.judge, keep="completion", stub="\n\nScore from 1 to 5: ",
            target="choices", choices=("1", "2", "3", "4", "5"),
        ),
    )  # fmt: skip


def choices_of_pairs(options: RewardConfig, kind: str) -> tuple[Request, ...]:
    """Request a judge's choice between each text and its rivals, in both orders; the rubric, if the judge learns."""
    pairs = tuple(
        Request(
            name=f"{_CHOICE}{rival:+d}", policy=options.likelihood.judge, keep="pair", rival=rival,
            between="\n\nAnother text: ", stub="\n\nThe better one (1 or 2): ", target="choices", choices=("1", "2"),
        )
        for distance in range(1, options.likelihood.num_rivals + 1)
        for rival in (distance, -distance)
    )  # fmt: skip
    return (*pairs, *rubric_after_text(options, kind)) if options.likelihood.ranking_loss else pairs


def fact_behind_text(options: RewardConfig, kind: str) -> tuple[Request, ...]:
    """Request the evidence behind the whole text and without it, of the policy that RL started from."""
    stub = "\n\nEvidence: "
    return (
        Request(name=_FACT, policy="start", keep="completion", stub=stub),
        Request(name=_NO_FACT, policy="start", keep="nothing", stub=stub),
    )


def own_tokens(options: RewardConfig, kind: str) -> tuple[Request, ...]:
    """Request the rollout's own tokens, of the policy that RL started from."""
    return (Request(name=_OWN, policy="start", keep="nothing", target="completion"),)


def of_posterior(options: RewardConfig, kind: str) -> tuple[Request, ...]:
    """Request the reference behind the thought, and the thought behind the prompt that hides the reference."""
    return (*after_thought(options, kind), Request(name=_PRIOR, keep="nothing", target="completion", is_tempered=True))


def _without_thought(name: str, policy: str, options: RewardConfig, kind: str) -> Request:
    """Request the reference without a thought: after a text alone, or after a question and an empty thought."""
    count = _num_targets(options, kind)
    if kind == "documents":
        return Request(name=name, policy=policy, view="direct", keep="nothing", num_targets=count)
    return Request(name=name, policy=policy, keep="nothing", stub=BOX_OPEN, num_targets=count)


def with_start_baseline(options: RewardConfig, kind: str) -> tuple[Request, ...]:
    """Request the reference behind the thought, and without one of the policy that RL started from."""
    return (*after_thought(options, kind), _without_thought(_BASELINE, "start", options, kind))


def with_average_baseline(options: RewardConfig, kind: str) -> tuple[Request, ...]:
    """Request the reference behind the thought, and without one of the policy's moving average."""
    return (*after_thought(options, kind), _without_thought(_AVERAGE, "average", options, kind))


# --- Rewards of evidence ------------------------------------------------------------------------------------------


def likelihood(evidence: Evidence, options: RewardConfig) -> Earned:
    """Reward reward.likelihood.measure of the reference behind the thought.

    LaTRO (arXiv:2411.04282) is measure log with advantage rloo; reference_term adds the reference's own log-likelihood.
    reference_term jepo replaces the advantages by the multi-sample bound's.
    """
    settings, scores = options.likelihood, evidence.scores[_THOUGHT]
    rewards = _grouped(measure(scores.values, scores.mask, settings.measure), evidence)
    if settings.reference_term == "jepo":
        logprobs = _grouped(measure(scores.values, scores.mask, "log"), evidence)
        bound = jax.nn.logsumexp(logprobs, axis=-1, keepdims=True) - jnp.log(logprobs.shape[-1])
        return _earned(
            jnp.broadcast_to(bound, logprobs.shape), evidence, advantages=jepo_advantages(logprobs),
            reference_weights=jax.nn.softmax(logprobs, axis=-1),
        )  # fmt: skip
    weights = {"none": None, "one": jnp.ones_like(rewards), "reward": rewards}.get(settings.reference_term)
    if settings.reference_term == "advantage" and rewards.shape[-1] > 1:  # an evaluation's greedy rollout has no group
        weights = rloo(rewards)
    return _earned(rewards, evidence, reference_weights=weights)


def verifree(evidence: Evidence) -> Earned:
    """Reward the reference's probability behind the thought, and learn the reference with that weight.

    The gradient of E_z[pi(y | x, z)]; an unfinished thought earns 0. Needs advantage rloo or mean.
    Source: VeriFree, arXiv:2505.21493 eq. 4. Differs: the reference follows the sampled tokens, never re-tokenised.
    """
    scores = evidence.scores[_THOUGHT]
    rewards = _grouped(measure(scores.values, scores.mask, "probability"), evidence) * _is_closed(evidence)
    return _earned(rewards, evidence, reference_weights=rewards)


def rlpr(evidence: Evidence, options: RewardConfig) -> Earned:
    """Reward the mean token probability of the reference minus that without a thought, clipped to [0, 1].

    The baseline is that of the policy that RL started from. An unfinished thought earns 0. Source: RLPR,
    arXiv:2506.18254 §3.2; its format term is a term of its own: --reward.terms 0.9*rlpr 0.1*format.
    """
    with_thought, without = (
        _grouped(measure(s.values, s.mask, "mean_probability"), evidence)
        for s in (evidence.scores[_THOUGHT], evidence.scores[_BASELINE])
    )
    rewards = shaped_gain(with_thought, without, options.likelihood.rlpr_shaping) * _is_closed(evidence)
    return _earned(rewards, evidence, metrics={"with_thought": with_thought, "without_thought": without})


def information_gain(evidence: Evidence) -> Earned:
    """Reward log p(x | context, thought) - log p_average(x | context); terms on thought tokens only.

    Source: RLP, arXiv:2510.01265 eq. 3; with advantage rloo. The baseline is the policy's moving average.
    """
    gain = _grouped(_log(evidence.scores[_THOUGHT]) - _log(evidence.scores[_AVERAGE]), evidence)
    return _earned(gain, evidence)


def ravr(evidence: Evidence, options: RewardConfig) -> Earned:
    """Reward thoughts that were written with the reference in view by what they add without it, and distil them.

    Every task has two prompts: the prior's, and the posterior's, which shows the reference. s is the geometric mean
    probability of the reference behind a thought and the prior's prompt; 0 for an unfinished thought. A posterior
    thought gains w = max(0, s - mean s of the prior's thoughts) and earns w * clip(1 - drift * k, 0, 1), where k is its
    mean log-ratio to the prior per token. The prior learns thought and reference with weight w. Evaluations, which have
    no posterior, report s.

    Source: RAVR, arXiv:2510.25206, which has no published code. Differs: the paper's divergences, weighted by utility,
    are the distillation and the factor 1 - drift * k.
    """
    scores, drift = evidence.scores[_THOUGHT], options.likelihood.ravr_drift
    utility = _grouped(measure(scores.values, scores.mask, "geometric_mean"), evidence) * _is_closed(evidence)
    shown_UM = evidence.tasks.references.shown
    if shown_UM is None:
        return _earned(utility, evidence)
    baseline = utility[:, ::2].mean(-1, keepdims=True)
    gain = jnp.maximum(utility[:, 1::2] - baseline, 0.0)
    prior = evidence.scores[_PRIOR]
    thought = (jnp.arange(prior.mask.shape[-1]) < _thought_tokens(evidence)[..., None]) & prior.mask
    log_ratio = measure(evidence.rollouts.sampler_logprobs - prior.values, thought, "mean_log")
    log_ratio = _grouped(log_ratio, evidence)[:, 1::2]

    def by_prompt(of_prior, of_posterior):
        pairs = jnp.stack(jnp.broadcast_arrays(of_prior, of_posterior), axis=2)
        return pairs.reshape(utility.shape)

    return _earned(
        by_prompt(utility[:, ::2], gain * jnp.clip(1 - drift * log_ratio, 0.0, 1.0)),
        evidence,
        metrics={
            "prior": by_prompt(utility[:, ::2], utility[:, ::2]),
            "posterior": by_prompt(utility[:, 1::2], utility[:, 1::2]),
            "gain": by_prompt(gain, gain),
            "drift": by_prompt(log_ratio, log_ratio),
        },
        row_mask=jnp.broadcast_to(shown_UM[..., None], utility.shape),
        distilled=by_prompt(gain, 0.0),
    )


def nover(evidence: Evidence, options: RewardConfig) -> Earned:
    """Reward format, rank of the reasoning perplexity, and efficiency; the perplexity is the moving average's.

    A rollout is valid if it closes its thought and a box. Source: NOVER, arXiv:2505.16022 §3. Differs: the scored text
    is the reference alone, and a proxy follows the policy by a moving average.
    """
    scores = evidence.scores[_PROXY]
    is_valid = _grouped(evidence.predictions.found & ~evidence.rollouts.truncated, evidence)
    tokens = _grouped(_thought_tokens(evidence), evidence)
    perplexity, plain = (
        _grouped(p, evidence) for p in reasoning_perplexity(scores.values, scores.mask, _thought_tokens(evidence))
    )
    rank, efficiency = nover_terms(perplexity, is_valid, tokens)
    rewards = nover_reward(is_valid, rank, efficiency, options.likelihood.nover_weights)
    # Length alone lowers the perplexity; this is by how much, in nats.
    paid_for_length = jnp.log(plain) - jnp.log(perplexity)
    metrics = {"rank": rank, "efficiency": efficiency, "valid": is_valid * 1.0, "paid_for_length": paid_for_length}
    return _earned(rewards, evidence, metrics=metrics, on_thought=False)


def rubric(evidence: Evidence) -> Earned:
    """Reward 1 / perplexity of a rubric behind everything that the policy wrote, in (0, 1].

    The rubric is the question's accepted answer; the perplexity is that of the policy's moving average. A text that
    meets criteria makes them likely. Source: the inverse incentive of NOVER, arXiv:2505.16022 §5, which has no
    published code.
    """
    return _earned(_rubric_likelihood(evidence), evidence, on_thought=False)


def self_evaluation(evidence: Evidence) -> Earned:
    """Reward the score that a judge policy expects for the text, from its probabilities of 1 to 5; in [0, 1].

    reward.likelihood.judge is the judge: the start policy stays as it is, the current one judges its own text. The
    prompt states the criteria. The probabilities are normalised over the digits; their sum is logged: if it is low, the
    score means little.
    """
    scores = evidence.scores[_JUDGE]
    points = jnp.linspace(0.0, 1.0, scores.values.shape[-1])
    expected = jnp.sum(jax.nn.softmax(scores.values, axis=-1) * points, axis=-1)
    certainty = jnp.exp(jax.nn.logsumexp(scores.values, axis=-1))
    metrics = {"digit_probability": _grouped(certainty, evidence)}
    return _earned(_grouped(expected, evidence), evidence, metrics=metrics, on_thought=False)


def candidate_choice(evidence: Evidence, options: RewardConfig) -> Earned:
    """Reward how often a judge policy chooses the text over others of its group, in [0, 1].

    A text meets reward.likelihood.num_rivals others on either side, once as the first and once as the second, so that a
    liking for a place cancels. The prompt states the criteria. With a ranking loss, the policy also learns to choose
    the text of each pair that makes the rubric (the accepted answer) more likely; equal ones teach nothing.
    """
    settings, shape = options.likelihood, evidence.tasks.prompts.row_ids.shape
    scores = {name: s.values for name, s in evidence.scores.items() if name.startswith(_CHOICE)}
    # Row g of rival r is the pair (g, g + r); this is the probability that its first text is chosen.
    chosen = {name: _grouped(jax.nn.softmax(values, axis=-1)[..., 0], evidence) for name, values in scores.items()}
    wins = []
    for distance in range(1, settings.num_rivals + 1):
        further, back = chosen[f"{_CHOICE}{distance:+d}"], chosen[f"{_CHOICE}{-distance:+d}"]
        wins += [further, 1 - jnp.roll(back, -distance, axis=-1), back, 1 - jnp.roll(further, distance, axis=-1)]
    rewards = sum(wins) / len(wins)
    sums = [_grouped(jnp.exp(jax.nn.logsumexp(values, axis=-1)), evidence) for values in scores.values()]
    metrics = {"digit_probability": sum(sums) / len(sums), "first_chosen": sum(chosen.values()) / len(chosen)}
    if not settings.ranking_loss:
        return _earned(rewards, evidence, metrics=metrics, on_thought=False)
    likely = _rubric_likelihood(evidence)
    rival = jnp.roll(likely, -1, axis=-1)
    agrees = (chosen[f"{_CHOICE}+1"] > 0.5) == (likely > rival)
    return _earned(
        rewards, evidence, metrics=metrics | {"as_rubric": agrees.astype(jnp.float32)},
        on_thought=False, choices=(rival > likely).astype(jnp.int32),
        reference_weights=jnp.broadcast_to(settings.ranking_loss * (rival != likely), shape),
    )  # fmt: skip


def fact(evidence: Evidence) -> Earned:
    """Reward the geometric mean probability of the evidence behind the text, minus that without the text; in [-1, 1].

    The evidence is the question's accepted answer; the judge is the policy that RL started from. A text that agrees
    with evidence makes it likely. Our definition.
    """
    with_text, without = (
        _grouped(measure(s.values, s.mask, "geometric_mean"), evidence)
        for s in (evidence.scores[_FACT], evidence.scores[_NO_FACT])
    )
    return _earned(with_text - without, evidence, metrics={"alone": without}, on_thought=False)


def coherence(evidence: Evidence) -> Earned:
    """Reward the geometric mean of the start policy's probabilities of the thought's tokens, each given those before.

    A thought that the start policy would not write, such as a code of its own, earns little. Our definition.
    """
    scores = evidence.scores[_OWN]
    thought = jnp.arange(scores.mask.shape[-1]) < _thought_tokens(evidence)[..., None]
    rewards = measure(scores.values, scores.mask & thought, "geometric_mean")
    return _earned(_grouped(rewards, evidence), evidence)


def _rubric_likelihood(evidence: Evidence):
    scores = evidence.scores[_RUBRIC]
    return _grouped(measure(scores.values, scores.mask, "geometric_mean"), evidence)


def _log(scores: Scores):
    return measure(scores.values, scores.mask, "log")


def _grouped(x_UR, evidence: Evidence):
    return x_UR.reshape(evidence.tasks.prompts.row_ids.shape)


def _is_closed(evidence: Evidence):
    """Return whether each rollout closes its thought, f32 [U, M, G]."""
    return _grouped(evidence.predictions.think_end_tokens > 0, evidence).astype(jnp.float32)


def _thought_tokens(evidence: Evidence):
    """Return the tokens of each thought with its </think>, i32 [U, R]; all tokens if it is open."""
    ends = evidence.predictions.think_end_tokens
    return jnp.where(ends > 0, ends, evidence.rollouts.mask.sum(-1))


def _earned(rewards_UMG, evidence: Evidence, *, metrics=None, on_thought: bool = True, **more) -> Earned:
    """Return the reward, which depends on the thought's tokens alone, or on all."""
    columns = jnp.arange(evidence.rollouts.tokens.shape[-1])
    thought_URC = columns < _thought_tokens(evidence)[..., None]
    return Earned(
        rewards=rewards_UMG,
        faults=jnp.zeros(rewards_UMG.shape, bool),
        metrics={"closed": _is_closed(evidence)} | (metrics or {}),
        token_mask=thought_URC if on_thought else None,
        **more,
    )
