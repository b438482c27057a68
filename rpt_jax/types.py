"""The records that flow between stages, and the letters that name their dimensions.

    U trunks · L trunk tokens · M cuts (prompts) per trunk · G rollouts per prompt · R branches per trunk = M·G, or
    lanes of them · B branches = U·R, trunk-major · E tail tokens · P stem tokens = L + M·E · C completion tokens
    T tokens of a lane · X prediction bytes · Y continuation bytes · V vocabulary · W bytes of the longest token
    N layers · D width · F MLP width · H query heads · K key/value heads · J query heads per key/value head
    Q head size · S key columns (cache entries), or slots of rows in flight · A reference tokens

Arrays carry these as a suffix (`logprobs_URC`); record fields state their shape in a comment.
"""

from dataclasses import dataclass
from typing import Any

import jax


def record(cls):
    """Make a class a frozen, keyword-only dataclass that is a JAX pytree."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True, kw_only=True)(cls))


@record
class Prompts:
    """Everything that sampling needs: prompts grouped by shared trunk. Padding is 0 for ids, False for masks."""

    trunk_tokens: Any  # i32 [U, L], template header + document window, right-padded
    trunk_lengths: Any  # i32 [U], number of real trunk tokens
    cuts: Any  # i32 [U, M], trunk tokens that prompt m sees; at least 1
    tail_tokens: Any  # i32 [U, M, E], prompt tokens after the cut, right-aligned: padding comes first
    tail_lengths: Any  # i32 [U, M], number of real tail tokens, at least 1
    prompt_mask: Any  # bool [U, M], False for padding in a trunk with fewer than M prompts
    row_ids: Any  # i32 [U, M, G], unique per rollout; keys the sampling noise
    prefix_tokens: Any = None  # i32 [U, M, G, C'], first tokens of continued rows, right-padded; None: all start fresh
    prefix_lengths: Any = None  # i32 [U, M, G], number of given tokens; 0: the row starts fresh
    prefix_logprobs: Any = None  # f32 [U, M, G, C'], log-probabilities they were sampled with; None: unknown
    prefix_ended: Any = None  # bool [U, M, G], rows that do not go on, whatever they end with; None: none
    born_step: Any = None  # i32 [U], step in which the trunk's rows were started, keys their noise; None: this step


@record
class References:
    """Everything that rewards compare completions with. Padding is 0 for bytes and tokens, False for masks."""

    task_ids: Any  # i32 [U, M], index into the source's tasks, -1 for padding; prompts may share a task
    bytes: Any  # u8 [U, M, Y], true bytes from the position on
    boundary_mask: Any  # bool [U, M, Y], True at j iff j + 1 bytes end at a token boundary
    tokens: Any  # i32 [U, M, A], the corpus's tokens from the position on, or those of the accepted answer
    lengths: Any  # i32 [U, M], number of real reference tokens
    shown: Any = None  # bool [U, M], the prompt shows its reference; the prompt before it is its twin without


@record
class TaskBatch:
    """Prompts to sample from, and the references to compare completions with."""

    prompts: Prompts
    references: References


@record
class Rollouts:
    """Sampled completions of a TaskBatch; row r = m·G + g of each trunk."""

    tokens: Any  # i32 [U, R, C], padding 0
    mask: Any  # bool [U, R, C], True up to and including the stop token
    sampler_logprobs: Any  # f32 [U, R, C], of the temperature-scaled, untruncated distribution; padding 0
    truncated: Any  # bool [U, R], no stop token within C
    num_rejected: Any  # i32 [U, R], tokens whose first draw fell outside top-p / top-k; estimates the excluded mass


@record
class Evidence:
    """Everything that a reward may use."""

    tasks: TaskBatch
    rollouts: Rollouts
    predictions: Any  # rewards.answer.Predictions, leading dimensions [U, R]
    unescaped: Any  # the same with backslash-n read as a newline; None: not requested
    scores: dict[str, Any]  # scoring.requests.Scores, by the name of the request
    outcome: Any = None  # f32 [U, M, G], reward of the first term, for terms that shape it; None: this is the first


@record
class Earned:
    """What a reward returns. A mask that is None masks nothing."""

    rewards: Any  # f32 [U, M, G]
    faults: Any  # bool [U, M, G], the reward function failed; the reward is 0
    metrics: dict[str, Any]  # f32 [U, M, G] each; logged as means over rollouts of real prompts
    advantages: Any = None  # f32 [U, M, G], used instead of loss.advantage; None: computed from rewards
    row_mask: Any = None  # bool [U, M, G], rollouts with a loss term; all count in their group's baseline
    group_mask: Any = None  # bool [U, M], prompts that take part in the update
    token_mask: Any = None  # bool [U, R, C], completion tokens that the reward depends on, which have a loss term
    reference_weights: Any = None  # f32 [U, M, G], weight of the reference's log-likelihood behind the thought
    choices: Any = None  # i32 [U, M, G], which choice the learned request's target is; None: its targets are no choices
    distilled: Any = None  # f32 [U, M, G], of the log-likelihood of the next prompt's thought and the reference
    token_advantages: Any = None  # f32 [U, R, C], of each token, added to those of the rewards


@record
class Experience:
    """Rollouts and their rewards: everything that the update, logs and dynamic sampling need of one batch."""

    tasks: TaskBatch
    rollouts: Rollouts
    predictions: Any  # rewards.answer.Predictions, leading dimensions [U, R]
    earned: Earned
    group_mask: Any  # bool [U, M], groups that take part in the update
    tokens_scored: Any  # i32 [U], tokens run by the reward's scoring passes
    sampled_mask: Any = None  # bool [U, M], prompts whose rows were sampled; None: those of tasks.prompts.prompt_mask


@record
class Sequences:
    """What the model runs: stems (a trunk, then the tails of its prompts), and lanes of branch tokens.

    A lane holds completions back to back; padding comes last. M or R may be 0.
    """

    trunk_tokens: Any  # i32 [U, L]
    cuts: Any  # i32 [U, M], trunk tokens that prompt m sees; its tail's positions continue from there
    tail_tokens: Any  # i32 [U, M, E], right-aligned
    tail_lengths: Any  # i32 [U, M], number of real tail tokens, at least 1
    branch_tokens: Any  # i32 [U, R, T], completion tokens
    branch_mask: Any  # bool [U, R, T], False for padding
    branch_prompts: Any  # i32 [U, R, T], prompt m of each token
    branch_index: Any  # i32 [U, R, T], number of tokens before it in its completion
    trunk_segments: Any = None  # i32 [U, L], index of each token's packed sequence, needs M = 0; None: one


@record
class Rows:
    """What an update runs, and the weight of every term of its loss, normalised over the whole global batch.

    A row is one rollout's tokens or a completion to learn. It may hold tokens that were not sampled. A field that is
    None has no term.
    """

    sequences: Sequences
    row: Any  # i32 [U, R, T], the trunk's row that a token belongs to; a row is never split between lanes
    policy_weights: Any  # f32 [U, R, T], weight of the policy term
    advantages: Any  # f32 [U, R, T]
    likelihood_weights: Any  # f32 [U, R, T], weight of -log pi(token)
    trunk_weights: Any  # f32 [U, L], weight of predicting trunk token l from those before it; 0 at l = 0
    temperature: Any  # f32 [U, R, T], temperature of the log-probabilities in the loss; above 0
    sampler_logprobs: Any  # f32 [U, R, T], 0 for tokens that were not sampled
    old_logprobs: Any  # f32 [U, R, T], of the policy before the first of several updates; None: the ratio is 1
    ref_logprobs: Any  # f32 [U, R, T], of the reference policy; None: nothing reads them
    slopes: Any = None  # f32 [U, R, T], of a batch objective by each log-probability; None: the objective is a token's
    old_values: Any = None  # f32 [U, R, T], of the critic before the updates; None: there is no critic
    returns: Any = None  # f32 [U, R, T], what the critic learns


@record
class TrainState:
    """Everything that an update changes, and what a checkpoint holds."""

    step: Any  # i32 [], updates attempted
    params: Any  # tree of f32, the trained parameters
    opt_state: Any  # the optimizer's tree
    skipped: Any  # i32 [], consecutive updates skipped for a non-finite loss or gradient
    companions: dict[str, Any]  # {name: tree like params}, copies that follow the policy; often empty
