"""Changes between two decoding segments: running rows move into fewer slots, and caches become wider."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decoding
from rpt_jax.rollout.flight import EMPTY, Flight, Stems, window_of


def chain_of_shapes(
    num_trunks: int, slots: int, num_stem: int, limit: int, may_regroup: bool, shares: tuple[float, ...]
) -> list[tuple[int, int]]:
    """Return a decreasing list of (groups, slots per group) that running rows move through.

    The chain is short because each shape, and each move between two shapes, is a program to compile. With regrouping, a
    group has an eighth of a trunk's slots, and a trunk gets as many groups as its rows need, each with a copy of the
    stem. Running rows of a few trunks then fill the slots. Without regrouping, a trunk is one group.

    Args:
        num_trunks: trunks of the whole batch.
        slots: slots per trunk of the whole batch; the chain starts with fewer.
        num_stem: cached tokens of a stem.
        limit: maximum cached tokens of a row. Each shape caches fewer tokens than the previous one.
        may_regroup: whether rows of a trunk may be spread over several groups.
        shares: of all slots, decreasing.
    """
    group_size = -(-slots // 8)
    shapes = [(num_trunks, slots)]
    for share in shares:
        fewer = num_trunks, math.ceil(share * slots)
        if may_regroup:
            fewer = math.ceil(share * num_trunks * slots / group_size), group_size
        kept, before = (groups * (num_stem + size * limit) for groups, size in (fewer, shapes[-1]))
        if kept < before and math.prod(fewer) < math.prod(shapes[-1]):
            shapes.append(fewer)
    return shapes[1:]


def holds(groups: int, slots: int, live_U, may_regroup: bool) -> bool:
    """Return whether the running rows, i32 [U] by trunk, fit into this many groups of slots."""
    return int(np.sum(-(-live_U // slots))) <= groups if may_regroup else live_U.max() <= slots


@partial(jax.jit, static_argnames=("config", "window"))
def widen(config: DecoderConfig, flight: Flight, *, window: int) -> Flight:
    """Append columns up to `window`; allowed only before the ring buffer has wrapped around."""
    return replace(flight, cache=decoding.widened(config, flight.cache, window - window_of(flight)))


@partial(jax.jit, static_argnames="slots")
def shrink(flight: Flight, *, slots: int) -> Flight:
    """Move the running rows to the first `slots` slots of their trunk and drop the other slots."""
    order = jnp.argsort(flight.row == EMPTY, axis=1, stable=True)[:, :slots]

    def take(x):
        return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)

    rows = {name: take(getattr(flight, name)) for name in ("row", "index", "token")}
    return replace(flight, **rows, cache=jax.tree.map(take, flight.cache))


@partial(jax.jit, static_argnames=("num_trunks", "groups", "slots"))
def regroup(stems: Stems, flight: Flight, *, num_trunks: int, groups: int, slots: int) -> tuple[Stems, Flight]:
    """Move the running rows into `groups` groups of slots; the rows of a trunk fill its groups in order."""
    size = flight.row.size
    trunk_B = jnp.where(flight.row == EMPTY, num_trunks, flight.trunk[:, None]).reshape(-1)
    order_B = jnp.argsort(trunk_B, stable=True)
    sorted_B = trunk_B[order_B]
    ends_U = jnp.searchsorted(sorted_B, jnp.arange(num_trunks), side="right")
    counts_U = jnp.diff(ends_U, prepend=0)
    last_group_U = jnp.cumsum(-(-counts_U // slots))
    # The first slot of each trunk, then one for each of its rows. Empty slots sort last and are dropped.
    first_slot_U = (last_group_U - -(-counts_U // slots)) * slots
    rank_B = jnp.arange(size) - jnp.take(ends_U - counts_U, sorted_B, mode="clip")
    place_B = jnp.where(sorted_B < num_trunks, jnp.take(first_slot_U, sorted_B, mode="clip") + rank_B, groups * slots)
    source = jnp.full(groups * slots, -1).at[place_B].set(order_B, mode="drop")
    trunk = jnp.searchsorted(last_group_U, jnp.arange(groups), side="right")
    trunk = jnp.minimum(trunk, num_trunks - 1).astype(jnp.int32)
    # Any existing group of the trunk holds its stem.
    group_of_trunk_U = jnp.zeros(num_trunks, jnp.int32).at[flight.trunk].set(jnp.arange(len(flight.trunk)))

    def take(x):
        return x.reshape(size, *x.shape[2:])[jnp.maximum(source, 0)].reshape(groups, slots, *x.shape[2:])

    row = jnp.where(source.reshape(groups, slots) < 0, EMPTY, take(flight.row))
    moved = Flight(
        clock=flight.clock,
        trunk=trunk,
        num_started=flight.num_started[group_of_trunk_U[trunk]],
        row=row,
        index=take(flight.index),
        token=take(flight.token),
        cache=jax.tree.map(take, flight.cache),
    )
    return jax.tree.map(lambda x: x[group_of_trunk_U[trunk]], stems), moved
