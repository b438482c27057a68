"""What a reward is, and the rewards of the paper: a pure function from rollouts and tasks to f32 [U, M, G].

A reward names the scoring passes it needs; training runs them in the model's own graph and hands over the results.
Adding a reward is one function here and one line in `make_reward`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from rpt_jax.config import RewardConfig
from rpt_jax.errors import ConfigError
from rpt_jax.rewards.answer import Predictions, answer_tables, extract_predictions
from rpt_jax.rewards.host import make_host_reward_fn
from rpt_jax.rewards.prefix import first_token_reward, prefix_match_reward
from rpt_jax.rewards.vocabulary import longest_prefix_tokens, vocabulary_index
from rpt_jax.types import Rollouts, TaskBatch


@dataclass(frozen=True)
class Reward:
    """A reward function and what it asks for.

    Attributes:
        requests: names of scoring passes; "direct_logprobs" is f32 [U, M, V], the policy's next-token law at each
            position from document tokens alone.
        fn: (rollouts, batch, {request: result}) -> (rewards f32 [U, M, G], predictions with leading [U, R],
            faults bool [U, M, G]); a faulty reward is 0.
    """

    requests: tuple[str, ...]
    fn: Callable[[Rollouts, TaskBatch, dict], tuple[jax.Array, Predictions, jax.Array]]


# Judges of questions, by the reward's name.
JUDGES = {
    "math": "rpt_jax.rewards.math_judge:math",
    "choice": "rpt_jax.rewards.judges:choice",
    "exact": "rpt_jax.rewards.judges:exact",
}
# Bytes of an answer that a host function is given; longer ones are no answer.
_MAX_ANSWER_BYTES = 512


def make_reward(config: RewardConfig, tokenizer, columns: Callable[[int], dict] | None = None) -> Reward:
    """The reward called `config.name`.

    Args:
        columns: of a task id, for rewards that run on the host (`batches.Source.columns`).
    Raises:
        ConfigError: unknown name, or a function that cannot be imported.
    """
    table, lengths = (jnp.asarray(a) for a in tokenizer.byte_table())
    vocabulary = {"byte_table_VW": table, "byte_lengths_V": lengths, "tables": answer_tables(table, lengths)}
    if config.name in ("prefix", "first_token"):
        return Reward((), partial(_match_reward, config, vocabulary))
    if config.name in ("dense", "conditional_dense"):
        index = vocabulary_index(tokenizer.byte_table())
        return Reward(("direct_logprobs",), partial(_dense_reward, config, vocabulary, index))
    if config.name in JUDGES or config.name == "custom":
        function = JUDGES.get(config.name, config.function)
        window = partial(_extract, config, vocabulary, max_prediction_bytes=_MAX_ANSWER_BYTES)
        # What makes a built-in judge slow is what the policy wrote: that must not stop a run.
        on_fault = "zero" if config.name in JUDGES else config.on_fault
        judge = make_host_reward_fn(config, function, tokenizer, window, columns, on_fault=on_fault)

        def judged(rollouts, batch, requested):
            rewards, predictions, faults = judge(rollouts, batch, requested)
            return rewards, _per_trunk(predictions, batch), faults

        return Reward((), judged)
    raise ConfigError(f"reward.name={config.name!r}; no such reward. See --help for the names.")


def _extract(config: RewardConfig, vocabulary, tokens_BC, mask_BC, **options) -> Predictions:
    """The predictions of completions, by the config's rules of reading."""
    rules = dict(mode=config.boxed_mode, require_think_end=config.require_think_end)
    return extract_predictions(tokens_BC, mask_BC, **rules, **vocabulary, **options)


def _rows(batch: TaskBatch):
    """Continuations and boundaries repeated to [B, Y]."""
    G = batch.row_ids.shape[-1]
    return tuple(
        jnp.repeat(a.reshape(-1, a.shape[-1]), G, axis=0) for a in (batch.continuation_bytes, batch.boundary_mask)
    )


def _per_trunk(predictions: Predictions, batch: TaskBatch) -> Predictions:
    U = batch.row_ids.shape[0]
    return jax.tree.map(lambda a: a.reshape(U, -1, *a.shape[1:]), predictions)


def _matched(config: RewardConfig, vocabulary, match, rollouts: Rollouts, batch: TaskBatch):
    """(rewards f32 [B], predictions as written): `match` of the prediction, tried again unescaped where it failed."""
    tokens, mask = (a.reshape(-1, a.shape[-1]) for a in (rollouts.tokens, rollouts.mask))
    continuation, boundary = _rows(batch)
    Y = continuation.shape[1]
    predictions = _extract(config, vocabulary, tokens, mask, max_prediction_bytes=Y)
    rewards = match(predictions.bytes, predictions.lengths, continuation, boundary)
    if config.unescape_newline:
        again = _extract(config, vocabulary, tokens, mask, max_prediction_bytes=Y, unescape_newline=True)
        rewards = jnp.maximum(rewards, match(again.bytes, again.lengths, continuation, boundary))
    return rewards, predictions


# Compiled once for a config and a shape, however many rewards are made: what differs is an argument.
@partial(jax.jit, static_argnames="config")
def _match_reward(config: RewardConfig, vocabulary, rollouts, batch, requested):
    match = prefix_match_reward if config.name == "prefix" else first_token_reward
    rewards, predictions = _matched(config, vocabulary, match, rollouts, batch)
    return _checked(rewards.reshape(batch.row_ids.shape), predictions, batch)


def _checked(rewards_UMG, predictions: Predictions, batch: TaskBatch):
    faults_UMG = ~jnp.isfinite(rewards_UMG)
    return jnp.where(faults_UMG, 0.0, rewards_UMG), _per_trunk(predictions, batch), faults_UMG


@partial(jax.jit, static_argnames="config")
def _dense_reward(config: RewardConfig, vocabulary, index, rollouts, batch, requested):
    """1 if the first token is right, else the policy's direct probability of the token it chose.

    Source: arXiv:2506.08007 appendix A. Differs: the chosen token is the longest vocabulary entry that begins the
    prediction. conditional: groups without a correct rollout earn 0.
    """
    first, predictions = _matched(config, vocabulary, first_token_reward, rollouts, batch)
    first_UMG = first.reshape(batch.row_ids.shape)
    chosen_UMG = longest_prefix_tokens(index, predictions.bytes, predictions.lengths).reshape(first_UMG.shape)
    direct_UMV = requested["direct_logprobs"]
    probability = jnp.exp(jnp.take_along_axis(direct_UMV, jnp.maximum(chosen_UMG, 0), axis=-1))
    rewards = jnp.where(first_UMG > 0, 1.0, jnp.where(chosen_UMG >= 0, probability, 0.0))
    if config.name == "conditional_dense":
        rewards = rewards * (first_UMG.max(-1, keepdims=True) > 0)
    return _checked(rewards, predictions, batch)
