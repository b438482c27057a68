"""Rewards against numbers that the official codes gave (tests/golden/vectors.json, with repository and commit)."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import CompanionConfig
from rpt_jax.rewards import likelihood, shaping, vote
from rpt_jax.rl import advantages
from rpt_jax.rl.deviation_filter import DeviationFilter, _kept
from rpt_jax.scoring.companions import _follow

ENTRIES = {e["name"]: e["cases"] for e in json.loads((Path(__file__).parent / "golden" / "vectors.json").read_text())}


def f32(values):
    return jnp.asarray(values, jnp.float32)


def group(values):
    return f32(values)[None, None]


def logprobs(values):
    """Return (log-probabilities, mask) [A], of at least one place."""
    return f32([*values, 0.0]), jnp.arange(len(values) + 1) < len(values)


def nover_perplexity(target_logprobs, reasoning_tokens):
    ppl, plain = likelihood.reasoning_perplexity(*logprobs(target_logprobs), jnp.asarray(reasoning_tokens))
    return {"ppl": ppl, "ppl_unnormalised": plain}


def nover_composite(format_ok, ppl, reasoning_tokens, weights):
    is_valid = jnp.asarray(format_ok)[None, None]
    rank, efficiency = likelihood.nover_terms(group(ppl), is_valid, jnp.asarray(reasoning_tokens)[None, None])
    total = likelihood.nover_reward(is_valid, rank, efficiency, tuple(weights))
    return {
        "format": is_valid[0, 0], "rank": rank[0, 0], "efficiency": efficiency[0, 0], "total": total[0, 0],
        "adv_mean_only": advantages.centered(total)[0, 0],
        "adv_std_scaled": advantages.grpo(total, ddof=1, eps=1e-4)[0, 0],
    }  # fmt: skip


def proxy_sync(alpha, policy, proxy):
    """Their proxy is our average, with alpha as its decay."""
    policy, proxy = f32(policy), f32(proxy)
    state = SimpleNamespace(config=CompanionConfig(decay=alpha), shardings=(policy.sharding,))
    return {"proxy_new": _follow(proxy, policy, jnp.int32(1), jnp.int32(0), **vars(state))}


def rlpr_score(aggregation, target_logprobs):
    names = {
        "mean_exp_log_softmax": "mean_probability", "mean_log_softmax": "mean_log",
        "exp_sum_log_softmax": "probability", "exp_mean_log_softmax": "geometric_mean",
    }  # fmt: skip
    return {"score": likelihood.measure(*logprobs(target_logprobs), names[aggregation])}


def rlpr_shaped(target_logprobs, baseline_score, format_ok, shaping, format_coefficient):
    score = likelihood.measure(*logprobs(target_logprobs), "mean_probability")
    gain = likelihood.shaped_gain(score, f32(baseline_score), shaping)
    if format_coefficient == -1:  # there: the format is a condition
        reward = gain if format_ok else -1.0
    else:
        reward = (1 - format_coefficient) * gain + format_coefficient * format_ok
    return {"reward": reward, "score_with_reasoning": score, "score_without": baseline_score, "format": format_ok}


def rlpr_format(text, mode):
    return {"reward": shaping.format(text, {"R1": "tags", "R1_nothink": "answer_tags"}[mode])}


def rlpr_repetition(period_words, repeats, window, limit):
    words = " ".join([f"w{i}" for i in range(period_words)] * repeats)
    return {"penalty": shaping.repeated_window(words, window, limit)}


def ttrl(answers, ground_truth):
    names = sorted({a for a in answers if a is not None})
    codes = np.array([-1 if a is None else names.index(a) for a in answers])
    rewards, votes = vote.majority(
        jnp.asarray(codes[:, None] == codes)[None, None], jnp.asarray(codes >= 0)[None, None]
    )
    rewards, votes = np.asarray(rewards[0, 0]), np.asarray(votes[0, 0])
    right = np.array([a == ground_truth for a in answers])
    winner = answers[int(votes.argmax())]
    return {
        "rewards": rewards, "majority_ratio": votes.max() / len(answers), "ground_truth_ratio": right.mean(),
        "label_accuracy": float(winner == ground_truth), "reward_accuracy": np.mean(rewards == right),
    }  # fmt: skip


def cosine(length, correct, max_len, min_wrong=-1.0, max_wrong=-0.5, min_correct=0.5, max_correct=1.0, clamp=False):
    reward = shaping.cosine_length(
        jnp.asarray(length), jnp.asarray(correct), max_length=max_len, right=(max_correct, min_correct),
        wrong=(min_wrong, max_wrong), clamp=clamp,
    )  # fmt: skip
    return {"reward": reward}


def overlong(length, max_len, cache, factor=1.0, base_score=0.0):
    penalty = shaping.soft_overlong(jnp.asarray(length), max_length=max_len, cache=cache, factor=factor)
    return {"reward": base_score + penalty}


def kimi(lengths, correct):
    return {"rewards": shaping.kimi_length(jnp.asarray(lengths)[None, None], jnp.asarray(correct)[None, None])[0, 0]}


def rloo(rewards, group_size):
    return {"advantages": advantages.rloo(f32(rewards).reshape(1, -1, group_size)).reshape(-1)}


def grouped_advantages(rewards, group):
    """Groups may have any size; one of a single rollout, which has no deviation, keeps its reward there."""
    rewards, group, found = np.asarray(rewards, np.float32), np.asarray(group), np.zeros(len(rewards))
    for which in np.unique(group):
        own = group == which
        if own.sum() > 1 and np.std(rewards[own], ddof=1) < 1e-6:
            continue  # they give 0 there; we do where all are equal
        of_group = jnp.asarray(rewards[own])[None, None]
        found[own] = advantages.grpo(of_group, ddof=1)[0, 0] if own.sum() > 1 else rewards[own] / (1 + 1e-6)
    return {"advantages": found}


def deviation_bounds(mean_std_per_step, ema_ratio, beta, ema_start_step, filter_start_step):
    assert (ema_start_step, filter_start_step) == (6, 11)
    bounds, found = DeviationFilter(beta, decay=ema_ratio), []
    for deviation in mean_std_per_step:
        found.append(bounds.bound)
        bounds.observe(deviation)
    return {"lower_bound_per_step": found}


def deviation_filter(group_std, lower_bound, group_size):
    # Two rewards that are apart by twice the deviation, in one group each. A NaN reward leaves its group out.
    deviations = np.array([float(x) for x in group_std], np.float32)
    rewards = jnp.asarray(np.stack([deviations, -deviations], -1))[None]
    mask = jnp.ones(rewards.shape[:2], bool)
    experience = SimpleNamespace(
        earned=SimpleNamespace(rewards=rewards), group_mask=mask,
        tasks=SimpleNamespace(prompts=SimpleNamespace(prompt_mask=mask)),
    )  # fmt: skip
    kept, _ = _kept.__wrapped__(experience, lower_bound)
    return {"keep": kept[0]}


def majority_vote(answers, scores):
    votes = ttrl(answers, None)["rewards"]
    return {"majority": answers[int(np.argmax(votes))]}


def by_mode(mode):
    return lambda text: {"reward": shaping.format(text, mode)}


# name -> (our function of the inputs, relative and absolute tolerance). RLPR's code rounds scores to bfloat16.
FUNCTIONS = {
    "nover.reasoning_perplexity": (nover_perplexity, 1e-4),
    "nover.format_reward": (by_mode("nover"), 0),
    "nover.composite_reward_and_advantage": (nover_composite, 1e-6),
    "nover.proxy_sync": (proxy_sync, 1e-6),
    "verifree.rloo_advantage": (rloo, 1e-6),
    "rlpr.probability_score": (rlpr_score, 2**-8),
    "rlpr.shaped_reward": (rlpr_shaped, 2**-7),
    "rlpr.format_reward": (rlpr_format, 0),
    "rlpr.repetition_penalty": (rlpr_repetition, 0),
    "rlpr.grpo_advantage": (grouped_advantages, 1e-5),
    "rlpr.std_filter": (deviation_filter, 0),
    "rlpr.std_threshold_schedule": (deviation_bounds, 1e-6),
    "ttrl.majority_reward": (ttrl, 1e-6),
    "kimi.length_reward": (kimi, 1e-6),
    "open_r1.cosine_reward": (cosine, 1e-6),
    "open_r1.format_reward": (by_mode("lines"), 0),
    "open_r1.tag_count_reward": (by_mode("tag_count"), 0),
    "open_r1.repetition_penalty": (
        lambda text, ngram, max_penalty: {"reward": shaping.repetition(text.lower().split(), ngram, max_penalty)}, 1e-9,
    ),
    "dapo.soft_overlong": (overlong, 1e-6),
    "dapo.soft_overlong_open_r1": (overlong, 1e-6),
    "dapo.soft_overlong_openrlhf": (overlong, 1e-6),
    "dapo.overlong_reward_manager": (overlong, 1e-6),
    "trl.repetition_penalty": (
        lambda token_ids, ngram, max_penalty: {"reward": shaping.repetition(token_ids, ngram, max_penalty)}, 1e-9,
    ),
    "trl.cosine_reward": (lambda **inputs: cosine(**inputs, clamp=True), 1e-6),
    "trl.think_format_reward": (by_mode("think"), 0),
    "vote.weighted_and_majority": (majority_vote, 0),
}  # fmt: skip

# Outputs that are no part of the function, with the reason.
LEFT_OUT = {
    ("rlpr.grpo_advantage", "group_std_per_sample"): "an intermediate figure",
    ("rlpr.grpo_advantage", "zero_std_fraction"): "degenerate_group_fraction, a metric of another name",
    ("vote.weighted_and_majority", "weighted"): "a vote weighted by a reward model",
    ("rlpr.std_filter", "filter_rate"): "follows from keep, except that NaN is not counted there",
}
# Shapings of RLPR that no released run uses.
UNUSED_SHAPINGS = ("sigmoid", "leaky", "comp_")
LANGUAGE = "language_consistency.third_party"  # not official, and by marker words alone; ours is defined in text.py


@pytest.mark.parametrize("name", FUNCTIONS)
def test_official_numbers(name):
    function, tolerance = FUNCTIONS[name]
    compared = 0
    for number, case in enumerate(ENTRIES[name]):
        if str(case["inputs"].get("shaping", "")).startswith(UNUSED_SHAPINGS):
            continue
        found = function(**case["inputs"])
        for output, expected in case["outputs"].items():
            if (name, output) in LEFT_OUT:
                continue
            compared += 1
            if isinstance(expected, str):
                assert found[output] == expected, (number, output)
            else:
                np.testing.assert_allclose(
                    np.asarray(found[output], np.float64), expected, rtol=tolerance, atol=tolerance,
                    err_msg=f"case {number}, {output}",
                )  # fmt: skip
    assert compared >= 5


def test_every_reward_of_the_file_is_compared():
    mine = ("nover.", "rlpr.", "ttrl.", "kimi.length", "open_r1.", "dapo.", "trl.", "vote.", "verifree.", "language")
    here = {name for name in ENTRIES if name.startswith(mine)} - FUNCTIONS.keys()
    # The loss is in test_likelihood.py.
    assert here == {"verifree.loss_and_gradients", LANGUAGE}
