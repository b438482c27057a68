"""Rewards: a function from evidence to `Earned`, and the scoring passes that it needs.

`earn` computes the rewards of rollouts, in training and in evaluation. `compose` combines several rewards into one.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.config import RewardConfig
from rpt_jax.errors import ConfigError
from rpt_jax.rewards.answer import answer_tables, extract_predictions
from rpt_jax.scoring.requests import Request, Scorer
from rpt_jax.types import Earned, Evidence, Rollouts, TaskBatch

EPS = 1e-6


@dataclass(frozen=True)
class Reward:
    """A reward function and its needs.

    Attributes:
        fn: evidence -> rewards, failures, metrics and masks.
        requests: scoring passes whose results are in `evidence.scores`.
        width: minimum number of prediction bytes that it reads; at least those of the references are read.
        read: (rollouts, width) -> (predictions, the same unescaped or None); None: it reads no predictions.
        scorer: runs the requests; None: it has none.
        learned: the request whose reference the update learns with `Earned.reference_weights`; None: it learns none.
    """

    fn: Callable[[Evidence], Earned]
    requests: tuple[Request, ...] = ()
    width: int = 0
    read: Callable | None = None
    scorer: Scorer | None = None
    learned: Request | None = None


def earn(
    reward: Reward, policies: dict[str, Any], tasks: TaskBatch, rollouts: Rollouts
) -> tuple[Evidence, Earned, jax.Array]:
    """Extract the predictions, run the scoring passes, and compute the rewards.

    Args:
        reward: of the run.
        policies: parameters of the policies that requests may name: current, start, average.
        tasks, rollouts: of one batch.
    Returns:
        (evidence, earned, tokens run by the passes i32 [U]).
    """
    predictions, unescaped = None, None
    if reward.read is not None:
        width = max(reward.width, tasks.references.bytes.shape[-1])
        predictions, unescaped = reward.read(rollouts, width)
    scores = {
        r.name: reward.scorer.score(r, policies.get(r.policy), tasks, rollouts, predictions) for r in reward.requests
    }
    evidence = Evidence(tasks=tasks, rollouts=rollouts, predictions=predictions, unescaped=unescaped, scores=scores)
    run_U = sum((s.tokens_run for s in scores.values()), jnp.zeros_like(tasks.prompts.trunk_lengths))
    return evidence, reward.fn(evidence), run_U


def make_reader(config: RewardConfig, tokenizer) -> Callable:
    """Make (rollouts, width in bytes) -> (predictions [U, R, ...], the same unescaped if the config enables it)."""
    table, lengths = (jnp.asarray(a) for a in tokenizer.byte_table())
    tables = answer_tables(table, lengths)

    def read(rollouts: Rollouts, width: int):
        def extract(unescape: bool):
            return _predictions(
                rollouts, table, lengths, tables, mode=config.boxed_mode, require_think_end=config.require_think_end,
                unescape_newline=unescape, max_prediction_bytes=width,
            )  # fmt: skip

        return extract(False), extract(True) if config.unescape_newline else None

    return read


@partial(jax.jit, static_argnames=("mode", "require_think_end", "unescape_newline", "max_prediction_bytes"))
def _predictions(rollouts: Rollouts, table, lengths, tables, **how):
    """Return the predictions of all completions, [U, R, ...]."""
    U, R, C = rollouts.tokens.shape
    tokens, mask = (a.reshape(U * R, C) for a in (rollouts.tokens, rollouts.mask))
    found = extract_predictions(tokens, mask, table, lengths, tables=tables, **how)
    return jax.tree.map(lambda a: a.reshape(U, R, *a.shape[1:]), found)


# --- Composition --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """One term of a composed reward."""

    name: str
    weight: float = 1.0


def parse_terms(texts: Sequence[str]) -> list[Term]:
    """Parse `reward.terms`, each NAME or WEIGHT*NAME.

    Raises:
        ConfigError: no term, a malformed term, or a repeated name.
    """
    terms = []
    for text in texts:
        found = re.fullmatch(r"(?:([-+\d.eE]+)\*)?([a-z_]\w*)", text.strip())
        try:
            terms.append(Term(found[2], float(found[1] or 1.0)))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"reward.terms has {text!r}; a term is NAME or WEIGHT*NAME, as in prefix 0.1*format. Correct it."
            ) from error
    names = [term.name for term in terms]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"reward.terms={tuple(texts)}; it must name at least one reward, each once. Correct it.")
    return terms


def compose(terms: Sequence[Term], rewards: Sequence[Reward], how: str) -> Reward:
    """Combine several rewards into one.

    sum: sum of weight * reward.
    normalize_then_sum: z = (r - mean) / (deviation + 1e-6) in its group for each term, s = sum of weight * z; the
        advantage is (s - mean) / (deviation + 1e-6) over the batch. Source: GDPO, as TRL's `normalize_then_sum`.
    gate: like sum, but later terms count only if the first term's reward is 1.

    The mean reward and the failure share of each term are metrics. A row or group has a loss term if the masks of all
    terms have it, a token if the mask of some term has it.

    Raises:
        ConfigError: two terms request different passes under one name.
    """
    requests = tuple({request.name: request for reward in rewards for request in reward.requests}.values())
    # All terms share one piece of evidence.
    by_name = {request.name: request for request in requests}
    if any(by_name[r.name] != r for reward in rewards for r in reward.requests):
        raise ConfigError(
            "two terms of reward.terms request different passes under one name. Rename one of the requests."
        )

    def fn(evidence: Evidence) -> Earned:
        outcome = rewards[0].fn(evidence)
        evidence = replace(evidence, outcome=outcome.rewards) if len(rewards) > 1 else evidence
        parts = [outcome, *(reward.fn(evidence) for reward in rewards[1:])]
        return _combine(parts, evidence.tasks.prompts.prompt_mask, tuple(terms), how)

    first = rewards[0]
    width = max(reward.width for reward in rewards)
    learned = next((reward.learned for reward in rewards if reward.learned), None)
    return replace(first, fn=fn, requests=requests, width=width, learned=learned)


@partial(jax.jit, static_argnames=("terms", "how"))
def _combine(parts: list[Earned], prompt_mask_UM, terms: tuple[Term, ...], how: str) -> Earned:
    faults = [part.faults | ~jnp.isfinite(part.rewards) for part in parts]
    rewards = [jnp.where(fault, 0.0, part.rewards) for part, fault in zip(parts, faults)]
    metrics: dict[str, Any] = {}
    for term, part, reward, fault in zip(terms, parts, rewards, faults):
        metrics |= {f"reward/{term.name}": reward, f"reward/{term.name}/fault_fraction": fault.astype(jnp.float32)}
        metrics |= {f"reward/{term.name}/{name}": value for name, value in part.metrics.items()}
    counted = rewards
    if how == "gate":
        is_open = rewards[0] == 1
        counted = [rewards[0], *(jnp.where(is_open, reward, 0.0) for reward in rewards[1:])]
    total = _weighted_sum(terms, counted)
    return Earned(
        rewards=total,
        faults=_joined(jnp.logical_or, faults),
        metrics=metrics,
        advantages=_advantages(terms, parts, rewards, prompt_mask_UM, how),
        row_mask=_joined(jnp.logical_and, [part.row_mask for part in parts]),
        group_mask=_joined(jnp.logical_and, [part.group_mask for part in parts]),
        token_mask=_tokens_of_any(parts),
        reference_weights=_joined(jnp.add, _weighted(terms, [part.reference_weights for part in parts])),
        choices=next((part.choices for part in parts if part.choices is not None), None),
        distilled=_joined(jnp.add, _weighted(terms, [part.distilled for part in parts])),
        token_advantages=_joined(jnp.add, _weighted(terms, [part.token_advantages for part in parts])),
    )


def _advantages(terms: tuple[Term, ...], parts: list[Earned], rewards: list, prompt_mask_UM, how: str):
    if how == "normalize_then_sum":
        return _normalized(terms, rewards, prompt_mask_UM)
    return parts[0].advantages if len(parts) == 1 else None


def _tokens_of_any(parts: list[Earned]):
    """Return the tokens that some term's reward depends on; None: all."""
    masks = [part.token_mask for part in parts]
    return None if any(mask is None for mask in masks) else _joined(jnp.logical_or, masks)


def _weighted(terms: tuple[Term, ...], values: list) -> list:
    return [None if value is None else term.weight * value for term, value in zip(terms, values)]


def _weighted_sum(terms: tuple[Term, ...], values):
    return sum(value if term.weight == 1 else term.weight * value for term, value in zip(terms, values))


def _normalized(terms: tuple[Term, ...], rewards, prompt_mask_UM):
    def standardized(reward):
        deviation = reward.std(-1, keepdims=True)
        return (reward - reward.mean(-1, keepdims=True)) / (deviation + EPS)

    total = _weighted_sum(terms, [standardized(reward) for reward in rewards])
    mask = jnp.broadcast_to(prompt_mask_UM[..., None], total.shape)
    mean = jnp.mean(total, where=mask)
    deviation = jnp.sqrt(jnp.mean((total - mean) ** 2, where=mask))
    return jnp.where(mask, (total - mean) / (deviation + EPS), 0.0)


def _joined(join: Callable, masks):
    present = [mask for mask in masks if mask is not None]
    result = present[0] if present else None
    for mask in present[1:]:
        result = join(result, mask)
    return result
