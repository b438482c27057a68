"""Packing for the update: rows with a gradient, back to back in lanes, in a few fixed shapes.

Rows without a gradient are skipped, and so are trunks without rows. Loss weights are normalised over the whole batch
before, so skipping changes only the cost. The plan is made on the host from lengths; tokens stay on the device.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.mesh import TRUNK_AXES, constrain, on_mesh_of
from rpt_jax.sequences import in_lanes, take_tokens
from rpt_jax.types import Prompts, Rows


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Sizes are rounded up to one of this many equal steps towards the largest, so that few programs compile."""

    lanes: int
    """Number of lanes."""
    tokens: int
    """Length of a lane."""
    trunks: int
    """Number of trunks."""


# By `run.shapes`.
ROUNDINGS = {"many": Rounding(lanes=4, tokens=4, trunks=2), "few": Rounding(lanes=2, tokens=1, trunks=1)}


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Where the tokens of a microbatch come from."""

    trunks: np.ndarray
    """i32 [n], trunks of the batch; -1 for padding."""
    source: np.ndarray
    """i32 [n, lanes, T], index r·C + c of the source token at each place; -1 for padding."""


def plan_update(
    prompts: Prompts,
    rows: Rows,
    *,
    num_minibatches: int,
    microbatch_trunks: int,
    num_shards: int,
    keeps_all: bool,
    rounding: Rounding = ROUNDINGS["many"],
) -> tuple[list, dict]:
    """Plan the microbatches of each minibatch. Reads lengths and weights back to the host.

    Minibatch i holds trunks i, i + n, i + 2n, ... A row is kept, whole, if one of its tokens has a term with a
    gradient: a likelihood term, a policy term with an advantage, or any policy term if `keeps_all`.

    Args:
        prompts, rows: of the whole batch.
        num_minibatches: n.
        microbatch_trunks: maximum trunks of a microbatch; 0: all of a minibatch.
        num_shards: trunk shards of the mesh.
        keeps_all: rows without an advantage have a gradient too, or are needed for that of others.
        rounding: of sizes.
    Returns:
        ([[Microbatch, ...] for each minibatch], {"tokens_updated": tokens of stems and rows, "rows_left_out_fraction":
        share of rows without a gradient, "update_padding_fraction": share of lane places without a token}).
    """
    U, _, C = rows.sequences.branch_mask.shape
    takes_part, teaches, has_trunk_loss = _teaching(rows, keeps_all=keeps_all)
    takes_part, teaches, has_trunk_loss = to_host((takes_part, teaches, has_trunk_loss))
    lengths, stem_tokens, has_prompt = to_host(_sizes(prompts, rows))
    number = num_minibatches
    minibatches = [
        plan_microbatches(
            lengths,
            teaches,
            has_trunk_loss & has_prompt,
            range(first, U, number),
            width=C,
            microbatch_trunks=microbatch_trunks or U // number,
            num_shards=num_shards,
            rounding=rounding,
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


@jax.jit
def _sizes(prompts: Prompts, rows: Rows):
    """Return tokens of each row i32 [U, R], tokens of each stem i32 [U], whether a trunk has a prompt bool [U]."""
    stem_tokens = prompts.trunk_lengths + jnp.sum(prompts.prompt_mask * prompts.tail_lengths, axis=1)
    return rows.sequences.branch_mask.sum(-1), stem_tokens, jnp.any(prompts.prompt_mask, axis=1)


@partial(jax.jit, static_argnames="keeps_all")
def _teaching(rows: Rows, *, keeps_all: bool):
    """Return rows with a weight bool [U, R], rows with a gradient bool [U, R], trunks with a loss term bool [U]."""
    shape = rows.sequences.branch_mask.shape[:2]
    takes_part = teaches = jnp.zeros(shape, bool)
    if rows.policy_weights is not None:
        takes_part = jnp.any(rows.policy_weights != 0, axis=-1)
        teaches = takes_part & (keeps_all | jnp.any(rows.advantages != 0, axis=-1))
    if rows.likelihood_weights is not None:
        has_likelihood = jnp.any(rows.likelihood_weights != 0, axis=-1)
        takes_part, teaches = takes_part | has_likelihood, teaches | has_likelihood
    has_trunk_loss = jnp.zeros(shape[0], bool) if rows.trunk_weights is None else jnp.any(rows.trunk_weights != 0, -1)
    return takes_part, teaches, has_trunk_loss


def plan_microbatches(
    lengths_UR,
    keeps_row_UR,
    keeps_trunk_U,
    trunks,
    *,
    width: int,
    microbatch_trunks: int,
    num_shards: int,
    rounding: Rounding = ROUNDINGS["many"],
) -> list[Microbatch]:
    """Split a minibatch into microbatches of trunks with similar numbers of lanes; at least one, possibly of padding.

    Args:
        lengths_UR: i32, tokens of each row.
        keeps_row_UR: bool, rows with a gradient.
        keeps_trunk_U: bool, trunks with a loss term.
        trunks: indices of the minibatch's trunks.
        width: C of the batch.
        microbatch_trunks: maximum trunks of a microbatch, a multiple of num_shards.
        num_shards: trunk shards of the mesh.
        rounding: of sizes.
    """
    lanes = {u: _fill_lanes(lengths_UR[u], keeps_row_UR[u], width, rounding) for u in trunks}
    kept = sorted((u for u in trunks if keeps_trunk_U[u] or lanes[u]), key=lambda u: -len(lanes[u]))
    groups = [kept[i : i + microbatch_trunks] for i in range(0, len(kept), microbatch_trunks)] or [[]]
    return [_lay_out(group, lanes, lengths_UR, width, microbatch_trunks, num_shards, rounding) for group in groups]


def rounded(number: int, most: int, steps: int) -> int:
    """Round up to one of `steps` equal steps towards `most`, at least one step."""
    step = -(-most // steps)
    return min(most, max(1, -(-number // step)) * step)


def _fill_lanes(lengths_R, keeps_R, width: int, rounding: Rounding) -> list[list[int]]:
    """Assign rows to lanes: the longest first, each to the first lane with room."""
    longest = max(1, int(np.max(lengths_R, where=keeps_R, initial=1)))
    room, lanes = [], []
    for row in sorted(np.flatnonzero(keeps_R), key=lambda r: -lengths_R[r]):
        length = int(lengths_R[row])
        lane = next((i for i, free in enumerate(room) if free >= length), None)
        if lane is None:
            lane = len(lanes)
            lanes.append([])
            room.append(rounded(longest, width, rounding.tokens))
        lanes[lane].append(int(row))
        room[lane] -= length
    return lanes


def _lay_out(
    group, lanes, lengths_UR, width: int, microbatch_trunks: int, num_shards: int, rounding: Rounding
) -> Microbatch:
    num_rows = lengths_UR.shape[1]
    size = rounded(-(-len(group) // num_shards), microbatch_trunks // num_shards, rounding.trunks) * num_shards
    num_lanes = rounded(max((len(lanes[u]) for u in group), default=1), num_rows, rounding.lanes)
    longest = max((int(lengths_UR[u, r]) for u in group for lane in lanes[u] for r in lane), default=1)
    source = np.full((size, num_lanes, rounded(longest, width, rounding.tokens)), -1, np.int32)
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


@jax.jit
def unpack(total_URC, values_nRT, trunks_n, source_nRT):
    """Write the values of packed tokens into their places in [U, R, C]; arguments as in `pack`."""
    U, R, C = total_URC.shape
    rows = jnp.where(trunks_n >= 0, trunks_n, U)[:, None]
    places = jnp.where(source_nRT >= 0, source_nRT, R * C).reshape(len(source_nRT), -1)
    flat = total_URC.reshape(U, R * C).at[rows, places].set(values_nRT.reshape(places.shape), mode="drop")
    return flat.reshape(U, R, C)


def pack(rows: Rows, trunks_n, source_nRT) -> Rows:
    """Pack rows [U, R, C], one per lane, into the lanes of a microbatch; no row is split."""
    with on_mesh_of(rows):
        return _pack(rows, trunks_n, source_nRT)


@jax.jit
def _pack(rows: Rows, trunks_n, source_nRT) -> Rows:
    def in_lane(x_URC):
        return None if x_URC is None else take_tokens(x_URC, trunks_n, source_nRT)

    trunk_weights = rows.trunk_weights
    if trunk_weights is not None:
        trunk_weights = jnp.where(trunks_n[:, None] >= 0, trunk_weights[jnp.maximum(trunks_n, 0)], 0.0)
    packed = Rows(
        sequences=in_lanes(rows.sequences, trunks_n, source_nRT),
        row=jnp.where(source_nRT >= 0, in_lane(rows.row), -1),
        policy_weights=in_lane(rows.policy_weights),
        advantages=in_lane(rows.advantages),
        likelihood_weights=in_lane(rows.likelihood_weights),
        trunk_weights=trunk_weights,
        # Padding needs a temperature that is safe to divide by.
        temperature=jnp.where(source_nRT >= 0, in_lane(rows.temperature), 1.0),
        sampler_logprobs=in_lane(rows.sampler_logprobs),
        old_logprobs=in_lane(rows.old_logprobs),
        ref_logprobs=in_lane(rows.ref_logprobs),
        slopes=in_lane(rows.slopes),
        old_values=in_lane(rows.old_values),
        returns=in_lane(rows.returns),
    )
    return jax.tree.map(lambda x: constrain(x, TRUNK_AXES), packed)
