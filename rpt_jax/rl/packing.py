"""What an update runs: rows that teach something, one behind the other in lanes, in a few fixed shapes.

A row without a term in the loss is left out, and a trunk without rows; loss weights were made before, over the whole
batch, so this changes nothing but the cost. The plan is made on the host from lengths; tokens stay on the device.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import LossConfig
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.mesh import TRUNK_AXES, constrain, on_mesh_of
from rpt_jax.types import Experience, TrainBatch

# Lanes and their lengths come in quarters of the largest, trunks in halves: few programs are compiled.
_LANE_STEPS, _TRUNK_STEPS = 4, 2


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    trunks: np.ndarray
    """i32 [n], the batch's trunks; -1 for padding."""
    source: np.ndarray
    """i32 [n, lanes, T], the token r·C + c of the trunk at each place; -1 for padding."""


def plan_update(experience: Experience, batch: TrainBatch, loss: LossConfig, num_shards: int) -> tuple[list, dict]:
    """The microbatches of each minibatch, and what they hold. Reads lengths and advantages back to the host.

    Minibatch i has every n-th trunk. With a KL term every row has a term in the loss, else those with an advantage.

    Returns:
        ([[Microbatch, ...] for each minibatch], {"tokens_updated": tokens of stems and rows, "rows_left_out_fraction":
        share of the rows that take part, "update_padding_fraction": share of lane places that hold no token}).
    """
    tasks, sequences = experience.tasks, batch.sequences
    U, _, C = sequences.branch_mask.shape
    takes_part = jnp.any(batch.token_weights != 0, axis=-1)
    lengths, takes_part, teaches, stem_tokens, has_prompt = to_host(
        (
            sequences.branch_mask.sum(-1),
            takes_part,
            takes_part & ((loss.kl_coef > 0) | jnp.any(batch.advantages != 0, axis=-1)),
            tasks.trunk_lengths + jnp.sum(tasks.position_mask * tasks.tail_lengths, axis=1),
            jnp.any(tasks.position_mask, axis=1),
        )
    )
    has_trunk_loss = np.full(U, loss.ntp_coef > 0) & has_prompt
    number = loss.num_minibatches
    minibatches = [
        plan_microbatches(
            lengths,
            teaches,
            has_trunk_loss,
            range(first, U, number),
            width=C,
            microbatch_trunks=loss.microbatch_trunks or U // number,
            num_shards=num_shards,
        )
        for first in range(number)
    ]
    every = [m for minibatch in minibatches for m in minibatch]
    num_tokens, num_places = sum((m.source >= 0).sum() for m in every), sum(m.source.size for m in every)
    return minibatches, {
        "tokens_updated": float(num_tokens + sum(stem_tokens[m.trunks[m.trunks >= 0]].sum() for m in every)),
        "rows_left_out_fraction": float(1 - teaches.sum() / max(1, takes_part.sum())),
        "update_padding_fraction": float(1 - num_tokens / num_places),
    }


def plan_microbatches(
    lengths_UR, keeps_row_UR, keeps_trunk_U, trunks, *, width: int, microbatch_trunks: int, num_shards: int
) -> list[Microbatch]:
    """Cut a minibatch into microbatches of trunks with about as many lanes; at least one, of padding if need be.

    Args:
        lengths_UR: i32, tokens of each row. keeps_row_UR: bool, rows that have a term in the loss.
        keeps_trunk_U: bool, trunks that have one themselves.
        trunks: indices of the minibatch's trunks.
        width: C of the batch.
        microbatch_trunks: at most so many trunks each; a multiple of num_shards.
    """
    lanes = {u: _fill_lanes(lengths_UR[u], keeps_row_UR[u], width) for u in trunks}
    kept = sorted((u for u in trunks if keeps_trunk_U[u] or lanes[u]), key=lambda u: -len(lanes[u]))
    groups = [kept[i : i + microbatch_trunks] for i in range(0, len(kept), microbatch_trunks)] or [[]]
    return [_lay_out(group, lanes, lengths_UR, width, microbatch_trunks, num_shards) for group in groups]


def _rounded(number: int, most: int, steps: int = _LANE_STEPS) -> int:
    """Up to a multiple of one of so many steps to `most`, at least one."""
    step = -(-most // steps)
    return min(most, max(1, -(-number // step)) * step)


def _fill_lanes(lengths_R, keeps_R, width: int) -> list[list[int]]:
    """Rows of each lane: the longest first, each into the first lane with room."""
    longest = max(1, int(np.max(lengths_R, where=keeps_R, initial=1)))
    room, lanes = [], []
    for row in sorted(np.flatnonzero(keeps_R), key=lambda r: -lengths_R[r]):
        length = int(lengths_R[row])
        lane = next((i for i, free in enumerate(room) if free >= length), None)
        if lane is None:
            lane = len(lanes)
            lanes.append([])
            room.append(_rounded(longest, width))
        lanes[lane].append(int(row))
        room[lane] -= length
    return lanes


def _lay_out(group, lanes, lengths_UR, width: int, microbatch_trunks: int, num_shards: int) -> Microbatch:
    num_rows = lengths_UR.shape[1]
    size = _rounded(-(-len(group) // num_shards), microbatch_trunks // num_shards, _TRUNK_STEPS) * num_shards
    num_lanes = _rounded(max((len(lanes[u]) for u in group), default=1), num_rows)
    longest = max((int(lengths_UR[u, r]) for u in group for lane in lanes[u] for r in lane), default=1)
    source = np.full((size, num_lanes, _rounded(longest, width)), -1, np.int32)
    for n, u in enumerate(group):
        for i, lane in enumerate(lanes[u]):
            column = 0
            for row in lane:
                length = int(lengths_UR[u, row])
                source[n, i, column : column + length] = row * width + np.arange(length)
                column += length
    trunks = np.full(size, -1, np.int32)
    trunks[: len(group)] = group
    return Microbatch(trunks=trunks, source=source)


def pack(batch: TrainBatch, trunks_n, source_nRT) -> TrainBatch:
    """The rows [U, R, C] of a batch in the lanes of a microbatch. Its policies' log-probabilities are scored after."""
    with on_mesh_of(batch):
        return _pack(batch, trunks_n, source_nRT)


@jax.jit
def _pack(batch: TrainBatch, trunks_n, source_nRT) -> TrainBatch:
    is_real_n, is_token = trunks_n >= 0, source_nRT >= 0
    trunk = jnp.maximum(trunks_n, 0)

    def token(x_URC):
        flat = x_URC.reshape(x_URC.shape[0], -1)[trunk]
        taken = jnp.take_along_axis(flat, jnp.maximum(source_nRT, 0).reshape(len(flat), -1), axis=1)
        return jnp.where(is_token, taken.reshape(source_nRT.shape), jnp.zeros((), x_URC.dtype))

    s = batch.sequences
    packed = TrainBatch(
        sequences=replace(
            s,
            trunk_tokens=s.trunk_tokens[trunk],
            cuts=s.cuts[trunk],
            tail_tokens=s.tail_tokens[trunk],
            tail_lengths=s.tail_lengths[trunk],
            branch_tokens=token(s.branch_tokens),
            branch_mask=is_token,
            branch_prompts=token(s.branch_prompts),
            branch_index=token(s.branch_index),
        ),
        token_weights=token(batch.token_weights),
        trunk_weights=jnp.where(is_real_n[:, None], batch.trunk_weights[trunk], 0.0),
        advantages=token(batch.advantages),
        sampler_logprobs=token(batch.sampler_logprobs),
        old_logprobs=None,
        ref_logprobs=None,
    )
    return jax.tree.map(lambda x: constrain(x, TRUNK_AXES), packed)
