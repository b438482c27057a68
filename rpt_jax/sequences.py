"""Every builder of model inputs: task batches, stems, completions, appended references, lanes.

Host builders take lists and return NumPy arrays. The others are array programs that may run inside a jitted function.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.types import Prompts, References, Rollouts, Sequences, TaskBatch


@dataclass(frozen=True, kw_only=True)
class Task:
    """One prompt of a trunk, and the reference of its completions."""

    id: int
    """Index into the source's tasks."""
    cut: int
    """Number of trunk tokens that the prompt sees."""
    text: bytes = b""
    """True bytes from the cut on."""
    boundaries: Sequence[int] = ()
    """Lengths in bytes at which tokens of the text end."""
    tokens: Sequence[int] = ()
    """Tokens of the reference."""
    hinted_tail: Sequence[int] = ()
    """Tail that shows the reference. Empty: the tail of all prompts, which does not."""


def build_tasks(
    trunks: Sequence[tuple[np.ndarray, Sequence[Task]]],
    *,
    tail,
    row_ids: np.ndarray,
    trunk_length: int,
    num_bytes: int = 8,
    num_tokens: int = 1,
    hint_width: int = 0,
) -> TaskBatch:
    """Build a TaskBatch of NumPy arrays.

    Args:
        trunks: (tokens, tasks) of each trunk; a trunk without tasks is padding.
        tail: ids that every prompt ends with; at least one.
        row_ids: i32 [U, M, G]; sets the batch's shape.
        trunk_length: L, trunk tokens.
        num_bytes: Y, continuation bytes.
        num_tokens: A, reference tokens.
        hint_width: most tokens that a hinted tail has more than `tail`. 0: no prompt shows its reference.
    """
    (U, M, _), E = row_ids.shape, len(tail) + hint_width
    prompts = Prompts(
        trunk_tokens=np.zeros((U, trunk_length), np.int32),
        trunk_lengths=np.ones(U, np.int32),
        cuts=np.ones((U, M), np.int32),
        tail_tokens=np.zeros((U, M, E), np.int32),
        tail_lengths=np.full((U, M), len(tail), np.int32),
        prompt_mask=np.zeros((U, M), bool),
        row_ids=row_ids,
    )
    prompts.tail_tokens[..., hint_width:] = tail
    references = References(
        task_ids=np.full((U, M), -1, np.int32),
        bytes=np.zeros((U, M, num_bytes), np.uint8),
        boundary_mask=np.zeros((U, M, num_bytes), bool),
        tokens=np.zeros((U, M, num_tokens), np.int32),
        lengths=np.zeros((U, M), np.int32),
        shown=np.zeros((U, M), bool) if hint_width else None,
    )
    for u, (tokens, tasks) in enumerate(trunks):
        if tasks:
            prompts.trunk_tokens[u, : len(tokens)] = tokens
            prompts.trunk_lengths[u] = len(tokens)
        for m, task in enumerate(tasks):
            prompts.cuts[u, m], prompts.prompt_mask[u, m] = task.cut, True
            references.task_ids[u, m], references.lengths[u, m] = task.id, len(task.tokens)
            references.bytes[u, m, : len(task.text)] = np.frombuffer(task.text, np.uint8)
            references.boundary_mask[u, m, np.asarray(task.boundaries, int) - 1] = True
            references.tokens[u, m, : len(task.tokens)] = task.tokens
            if hinted := len(task.hinted_tail):
                prompts.tail_tokens[u, m, E - hinted :] = task.hinted_tail
                prompts.tail_lengths[u, m], references.shown[u, m] = hinted, True
    return TaskBatch(prompts=prompts, references=references)


def trunks_alone(trunk_tokens_UL, trunk_segments_UL=None) -> Sequences:
    """Build sequences of trunks i32 [U, L] without prompts or branches; segments as in `Sequences.trunk_segments`."""
    U = trunk_tokens_UL.shape[0]
    nothing_UR1 = np.zeros((U, 0, 1), np.int32)
    return Sequences(
        trunk_tokens=trunk_tokens_UL,
        trunk_segments=trunk_segments_UL,
        cuts=np.zeros((U, 0), np.int32),
        tail_tokens=nothing_UR1,
        tail_lengths=np.zeros((U, 0), np.int32),
        branch_tokens=nothing_UR1,
        branch_mask=np.zeros((U, 0, 1), bool),
        branch_prompts=nothing_UR1,
        branch_index=nothing_UR1,
    )


def stems(prompts: Prompts) -> Sequences:
    """Build trunks with the tails of their prompts, without branches."""
    alone = trunks_alone(prompts.trunk_tokens)
    return replace(alone, cuts=prompts.cuts, tail_tokens=prompts.tail_tokens, tail_lengths=prompts.tail_lengths)


def completions(prompts: Prompts, tokens_URC, mask_URC) -> Sequences:
    """Build stems and one lane per completion, G for each prompt, as the update and the scorer read them.

    Args:
        tokens_URC: i32, completions.
        mask_URC: bool, their real tokens.
    """
    num_prompts = max(1, prompts.cuts.shape[1])
    prompts_R = jnp.arange(tokens_URC.shape[1]) // max(1, tokens_URC.shape[1] // num_prompts)
    return replace(
        stems(prompts),
        branch_tokens=tokens_URC,
        branch_mask=mask_URC,
        branch_prompts=jnp.broadcast_to(prompts_R[:, None], tokens_URC.shape),
        branch_index=jnp.broadcast_to(jnp.arange(tokens_URC.shape[-1]), tokens_URC.shape),
    )


def without_hints(tasks: TaskBatch) -> Prompts:
    """Return prompts of which none shows its reference: those that do get the tail of the prompt before."""
    prompts = tasks.prompts
    if tasks.references is None or tasks.references.shown is None:
        return prompts
    shown_UM = tasks.references.shown
    return replace(
        prompts,
        tail_tokens=jnp.where(shown_UM[..., None], jnp.roll(prompts.tail_tokens, 1, axis=1), prompts.tail_tokens),
        tail_lengths=jnp.where(shown_UM, jnp.roll(prompts.tail_lengths, 1, axis=1), prompts.tail_lengths),
    )


def continued(prompts: Prompts, rollouts: Rollouts, lengths_UMG) -> Prompts:
    """Build prompts whose rows continue after the first `lengths` tokens of these rollouts; 0: the row starts fresh."""
    shape = (*prompts.row_ids.shape, rollouts.tokens.shape[-1])
    return replace(
        prompts,
        prefix_tokens=rollouts.tokens.reshape(shape),
        prefix_lengths=jnp.minimum(lengths_UMG, rollouts.mask.sum(-1).reshape(shape[:3])),
        prefix_logprobs=rollouts.sampler_logprobs.reshape(shape),
    )


def append_targets(tokens_URC, keep_UR, stubs_SW, stub_lengths_S, which_UR, targets_URA, target_lengths_UR):
    """Concatenate the first `keep` tokens of each row, a stub and the targets.

    Args:
        tokens_URC: i32, completions; C may be 0.
        keep_UR: i32, number of tokens to keep of each.
        stubs_SW: i32, all stubs, right-padded.
        stub_lengths_S: i32.
        which_UR: i32, index of each row's stub.
        targets_URA: i32, right-padded.
        target_lengths_UR: i32.
    Returns:
        (tokens i32 [U, R, C + W + A], mask bool, index i32 [U, R] of each row's first target).
    """
    (W, A), C = (stubs_SW.shape[-1], targets_URA.shape[-1]), tokens_URC.shape[-1]
    columns = jnp.arange(C + W + A)
    keep = keep_UR[..., None]
    first = keep + stub_lengths_S[which_UR][..., None]
    padded = jnp.pad(tokens_URC, ((0, 0), (0, 0), (0, W + A)))
    stub = jnp.take_along_axis(stubs_SW[which_UR], jnp.clip(columns - keep, 0, W - 1), axis=-1)
    target = jnp.take_along_axis(targets_URA, jnp.clip(columns - first, 0, A - 1), axis=-1)
    tokens = jnp.where(columns < keep, padded, jnp.where(columns < first, stub, target))
    return tokens, columns < first + target_lengths_UR[..., None], first[..., 0]


def in_lanes(sequences: Sequences, trunks_n, source_nRT) -> Sequences:
    """Pack rows of completions back to back into lanes.

    Args:
        sequences: rows [U, R, C], one completion each.
        trunks_n: i32, source trunk of each packed trunk; -1 for padding.
        source_nRT: i32, index r * C + c of the source token at each place of its lanes; -1 for padding.
    """
    trunk, s = jnp.maximum(trunks_n, 0), sequences
    return replace(
        s,
        trunk_tokens=s.trunk_tokens[trunk],
        cuts=s.cuts[trunk],
        tail_tokens=s.tail_tokens[trunk],
        tail_lengths=s.tail_lengths[trunk],
        branch_tokens=take_tokens(s.branch_tokens, trunks_n, source_nRT),
        branch_mask=source_nRT >= 0,
        branch_prompts=take_tokens(s.branch_prompts, trunks_n, source_nRT),
        branch_index=take_tokens(s.branch_index, trunks_n, source_nRT),
    )


def take_tokens(x_URC, trunks_n, source_nRT):
    """Take the values of packed tokens, [n, R', T]; padding 0. Arguments as in `in_lanes`."""
    flat = x_URC.reshape(x_URC.shape[0], -1)[jnp.maximum(trunks_n, 0)]
    taken = jnp.take_along_axis(flat, jnp.maximum(source_nRT, 0).reshape(len(flat), -1), axis=1)
    return jnp.where(source_nRT >= 0, taken.reshape(source_nRT.shape), jnp.zeros((), x_URC.dtype))


def one_completion_each(trunk_tokens_UL, cuts_U, tail, tokens_UC, mask_UC) -> Sequences:
    """Build NumPy rows of one prompt and one completion each (R = 1), for supervised training."""
    U, C = tokens_UC.shape
    return replace(
        trunks_alone(trunk_tokens_UL),
        cuts=cuts_U[:, None],
        tail_tokens=np.broadcast_to(np.asarray(tail, np.int32), (U, 1, len(tail))),
        tail_lengths=np.full((U, 1), len(tail), np.int32),
        branch_tokens=tokens_UC[:, None],
        branch_mask=mask_UC[:, None],
        branch_prompts=np.zeros((U, 1, C), np.int32),
        branch_index=np.broadcast_to(np.arange(C, dtype=np.int32), (U, 1, C)),
    )


def several_completions(trunk_tokens_UL, cuts_U, tail, tokens_URC, mask_URC) -> Sequences:
    """Build NumPy rows of one prompt and R completions each, for training on pairs."""
    alone = one_completion_each(trunk_tokens_UL, cuts_U, tail, tokens_URC[:, 0], mask_URC[:, 0])
    return replace(
        alone,
        branch_tokens=tokens_URC,
        branch_mask=mask_URC,
        branch_prompts=np.zeros(tokens_URC.shape, np.int32),
        branch_index=np.broadcast_to(np.arange(tokens_URC.shape[-1], dtype=np.int32), tokens_URC.shape),
    )


def shared_branches(trunk_tokens_UL, cuts_U, tail, tokens_RC, mask_RC) -> Sequences:
    """Build NumPy rows of one prompt each that share the same R branches, for the options of a question."""
    shape = (len(cuts_U), *tokens_RC.shape)
    tokens_URC, mask_URC = np.broadcast_to(tokens_RC, shape), np.broadcast_to(mask_RC, shape)
    return several_completions(trunk_tokens_UL, cuts_U, tail, tokens_URC, mask_URC)


def shapes_of(tree):
    """Return the shapes and dtypes of a tree of arrays, to trace a program with."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
