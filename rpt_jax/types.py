"""The records that flow between the stages, and the letters that name their dimensions.

    U trunks · L trunk tokens · M cuts (prompts) per trunk · G rollouts per prompt · R branches per trunk = M·G, or
    lanes of them · B branches = U·R, trunk-major · E tail tokens · P stem tokens = L + M·E · C completion tokens
    T tokens of a lane · X prediction bytes · Y continuation bytes · V vocabulary · W bytes of the longest token
    N layers · D width · F MLP width · H query heads · K key/value heads · J query heads per key/value head
    Q head size · S columns of keys, or slots of rows in flight

Arrays carry these as a suffix (`logprobs_URC`); record fields state their shape in a comment.
"""

from dataclasses import dataclass
from typing import Any

import jax


def record(cls):
    """Class decorator: a frozen, keyword-only dataclass that is a JAX pytree."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True, kw_only=True)(cls))


@record
class TaskBatch:
    """Prompts to predict from, grouped by the trunk they share. Padding of ids is 0, of masks False."""

    trunk_tokens: Any  # i32 [U, L], template header + document window, right-padded
    trunk_lengths: Any  # i32 [U], tokens of the trunk that are real
    cuts: Any  # i32 [U, M], trunk tokens that prompt m sees; at least 1
    position_mask: Any  # bool [U, M], False for the padding of a trunk with fewer than M positions
    tail_tokens: Any  # i32 [U, M, E], prompt tokens after the cut, right-aligned (padding comes first)
    tail_lengths: Any  # i32 [U, M], at least 1
    continuation_bytes: Any  # u8 [U, M, Y], true bytes from the position on
    boundary_mask: Any  # bool [U, M, Y], True at j iff j + 1 bytes end at a token boundary; padding False
    target_tokens: Any  # i32 [U, M], the corpus's own next token
    row_ids: Any  # i32 [U, M, G], unique per rollout; keys the sampling noise
    position_ids: Any  # i32 [U, M], index into the source's tasks; -1 for padding


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
class Experience:
    """Rollouts with what they earned: all that an update, the logs and dynamic sampling need of one batch."""

    tasks: TaskBatch
    rollouts: Rollouts
    rewards: Any  # f32 [U, M, G]
    predictions: Any  # rewards.answer.Predictions, leading dimensions [U, R]
    faults: Any  # bool [U, M, G], rewards that could not be had and are 0
    group_mask: Any  # bool [U, M], groups that take part in the update


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
class TrainBatch:
    """One update's sequences, and what the losses need to know of them. Weights are of the whole global batch."""

    sequences: Sequences
    token_weights: Any  # f32 [U, R, T], weight of each branch token's term
    trunk_weights: Any  # f32 [U, L], weight of predicting trunk token l from those before it; column 0 is 0
    advantages: Any  # f32 [U, R, T]; None in supervised training
    sampler_logprobs: Any  # f32 [U, R, T]; None in supervised training
    old_logprobs: Any  # f32 [U, R, T], the policy's own before the first of several updates; None: ratio is 1
    ref_logprobs: Any  # f32 [U, R, T] of the reference policy; None: no KL term


@record
class TrainState:
    """Everything that an update changes."""

    step: Any  # i32 [], updates attempted
    params: Any  # tree of f32
    opt_state: Any
    skipped: Any  # i32 [], updates skipped in a row for a non-finite loss or gradient
