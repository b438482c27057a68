"""The records that flow between the stages, and the letters that name their dimensions.

    U trunks · L trunk tokens · M cuts (prompts) per trunk · G rollouts per prompt · R branches per trunk = M·G, or
    lanes of them · B branches = U·R, trunk-major · E tail tokens · P stem tokens = L + M·E · C completion tokens
    T tokens of a lane · X prediction bytes · Y continuation bytes · V vocabulary · W bytes of the longest token
    N layers · D width · F MLP width · H query heads · K key/value heads · J query heads per key/value head
    Q head size · S columns of keys, or slots of rows in flight · A reference tokens

Arrays carry these as a suffix (`logprobs_URC`); record fields state their shape in a comment.
"""

from dataclasses import dataclass
from typing import Any

import jax


def record(cls):
    """Class decorator: a frozen, keyword-only dataclass that is a JAX pytree."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True, kw_only=True)(cls))


@record
class Prompts:
    """All that sampling needs: prompts, grouped by the trunk they share. Padding of ids is 0, of masks False."""

    trunk_tokens: Any  # i32 [U, L], template header + document window, right-padded
    trunk_lengths: Any  # i32 [U], tokens of the trunk that are real
    cuts: Any  # i32 [U, M], trunk tokens that prompt m sees; at least 1
    tail_tokens: Any  # i32 [U, M, E], prompt tokens after the cut, right-aligned (padding comes first)
    tail_lengths: Any  # i32 [U, M], at least 1
    prompt_mask: Any  # bool [U, M], False for the padding of a trunk with fewer than M prompts
    row_ids: Any  # i32 [U, M, G], unique per rollout; keys the sampling noise
    prefix_tokens: Any = None  # i32 [U, M, G, C'], first tokens of completions that go on, right-padded; None: none do
    prefix_lengths: Any = None  # i32 [U, M, G], tokens that are given; 0: the row begins anew
    prefix_logprobs: Any = None  # f32 [U, M, G, C'], that they were sampled with; None: nobody knows
    born_step: Any = (
        None  # i32 [U], the step that the trunk's rows were born in, which keys their noise; None: this one
    )


@record
class References:
    """All that judging needs. Padding of bytes and tokens is 0, of masks False."""

    task_ids: Any  # i32 [U, M], index into the source's tasks, -1 for padding; two prompts of a trunk may be one task
    bytes: Any  # u8 [U, M, Y], true bytes from the position on
    boundary_mask: Any  # bool [U, M, Y], True at j iff j + 1 bytes end at a token boundary
    tokens: Any  # i32 [U, M, A], the corpus's own tokens from the position on, or the accepted answer's
    lengths: Any  # i32 [U, M], tokens of the reference that are real


@record
class TaskBatch:
    """Prompts to sample from, and the references that judge what is sampled."""

    prompts: Prompts
    references: References


@record
class Rollouts:
    """Sampled completions of a TaskBatch, branch r = m·G + g of each trunk."""

    tokens: Any  # i32 [U, R, C], padding 0
    mask: Any  # bool [U, R, C], True up to and including the stop token
    sampler_logprobs: Any  # f32 [U, R, C], of the temperature-scaled, untruncated law; padding 0
    truncated: Any  # bool [U, R], no stop token within C
    num_rejected: (
        Any  # i32 [U, R], tokens whose first draw top-p / top-k refused: their share estimates the cut-off mass
    )


@record
class Evidence:
    """All that a reward may judge by."""

    tasks: TaskBatch
    rollouts: Rollouts
    predictions: Any  # rewards.answer.Predictions, leading dimensions [U, R]
    unescaped: Any  # the same with backslash-n read as a newline; None: not asked for
    scores: dict[str, Any]  # scoring.requests.Scores, by the name of the request


@record
class Earned:
    """What rollouts have earned. A mask that is None leaves nothing out."""

    rewards: Any  # f32 [U, M, G]
    faults: Any  # bool [U, M, G], the reward function failed; the reward is 0
    metrics: dict[str, Any]  # f32 [U, M, G] each; the logs have their means over rollouts of real prompts
    advantages: Any = None  # f32 [U, M, G], in place of those that loss.advantage makes of the rewards
    row_mask: Any = None  # bool [U, M, G], rollouts that have a term in the loss; all count in their group's baseline
    group_mask: Any = None  # bool [U, M], prompts that take part in the update
    token_mask: Any = None  # bool [U, R, C], completion tokens that have a term in the loss


@record
class Experience:
    """Rollouts with what they earned: all that an update, the logs and dynamic sampling need of one batch."""

    tasks: TaskBatch
    rollouts: Rollouts
    predictions: Any  # rewards.answer.Predictions, leading dimensions [U, R]
    earned: Earned
    group_mask: Any  # bool [U, M], groups that take part in the update
    tokens_scored: Any  # i32 [U], tokens that the reward's scoring passes ran


@record
class Sequences:
    """What the model runs: stems (a trunk, then the tails of its prompts), and lanes of branch tokens that leave them.

    A lane holds completions one behind the other; padding comes last. M or R may be 0.
    """

    trunk_tokens: Any  # i32 [U, L]
    cuts: Any  # i32 [U, M], trunk tokens that prompt m sees; its tail's positions run on from there
    tail_tokens: Any  # i32 [U, M, E], right-aligned
    tail_lengths: Any  # i32 [U, M], at least 1
    branch_tokens: Any  # i32 [U, R, T], completion tokens
    branch_mask: Any  # bool [U, R, T]
    branch_prompts: Any  # i32 [U, R, T], prompt m of each token
    branch_index: Any  # i32 [U, R, T], tokens before it in its own completion
    trunk_segments: Any = None  # i32 [U, L], numbers of the sequences packed into a trunk; None: it is one. Then M = 0


@record
class Rows:
    """What an update runs, and the weight of every term of its loss. Weights are of the whole global batch.

    A row is one rollout's tokens, or a completion to learn; it may hold tokens that were not sampled. None: no such
    term, or nothing of the kind.
    """

    sequences: Sequences
    row: Any  # i32 [U, R, T], which of its trunk's rows a token belongs to; each row lies whole in one lane
    policy_weights: Any  # f32 [U, R, T], of the policy term
    advantages: Any  # f32 [U, R, T]
    likelihood_weights: Any  # f32 [U, R, T], of -log pi of the token itself
    trunk_weights: Any  # f32 [U, L], of predicting trunk token l from those before it; column 0 is 0
    temperature: Any  # f32 [U, R, T], of the distribution whose log-probabilities the terms take; above 0
    sampler_logprobs: Any  # f32 [U, R, T], 0 where a token was not sampled
    old_logprobs: Any  # f32 [U, R, T], the policy's own before the first of several updates; None: the ratio is 1
    ref_logprobs: Any  # f32 [U, R, T], of the reference policy; None: no KL term


@record
class TrainState:
    """Everything that an update changes."""

    step: Any  # i32 [], updates attempted
    params: Any  # tree of f32
    opt_state: Any
    skipped: Any  # i32 [], updates skipped in a row for a non-finite loss or gradient
    companions: dict[str, Any]  # trees like params, by the policy's name: copies that follow it; often there are none
