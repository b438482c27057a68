"""Between two segments of decoding: live rows move into fewer slots, and caches become wider."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decoder
from rpt_jax.models.attention import kernels_of
from rpt_jax.rollout.flight import EMPTY, Flight, Stems, window_of


def chain_of_shapes(num_trunks: int, slots: int, num_stem: int, limit: int, may_regroup: bool) -> list[tuple[int, int]]:
    """(groups, slots a group), ever fewer: what live rows move through, one after the other.

    One chain of few shapes, for each, and each way from one to another, is a program to compile. A group has an eighth
    of a trunk's slots, and a trunk as many groups as its rows need, each with a stem: so live rows of a few trunks fill
    the slots. Without regrouping a trunk has one group.

    Args:
        num_trunks, slots: the whole batch's, of which the chain begins with less.
        num_stem, limit: tokens kept of a stem, and at most of a row; a shape keeps fewer than the one before.
    """
    group_size = -(-slots // 8)
    shapes = [(num_trunks, slots)]
    for share in (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16):
        fewer = num_trunks, math.ceil(share * slots)
        if may_regroup:
            fewer = math.ceil(share * num_trunks * slots / group_size), group_size
        kept, before = (groups * (num_stem + size * limit) for groups, size in (fewer, shapes[-1]))
        if kept < before and math.prod(fewer) < math.prod(shapes[-1]):
            shapes.append(fewer)
    return shapes[1:]


def holds(groups: int, slots: int, live_U, may_regroup: bool) -> bool:
    """Whether the live rows, i32 [U] by trunk, have room in so many groups."""
    return int(np.sum(-(-live_U // slots))) <= groups if may_regroup else live_U.max() <= slots


@partial(jax.jit, static_argnames=("config", "window"))
def widen(config: DecoderConfig, flight: Flight, *, window: int) -> Flight:
    """Columns added behind; only before the ring has turned for the first time."""
    more = window - window_of(flight)

    def pad(x, axis):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, more)
        return jnp.pad(x, widths)

    axes = decoder.cache_axes(kernels_of(config))
    return replace(flight, cache=[tuple(map(pad, kv, axes)) for kv in flight.cache])


@partial(jax.jit, static_argnames="slots")
def shrink(flight: Flight, *, slots: int) -> Flight:
    """Live rows in the first slots of their trunk; the others are given up."""
    order = jnp.argsort(flight.row == EMPTY, axis=1, stable=True)[:, :slots]

    def take(x):
        return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)

    rows = {name: take(getattr(flight, name)) for name in ("row", "index", "token")}
    return replace(flight, **rows, cache=jax.tree.map(take, flight.cache))


@partial(jax.jit, static_argnames=("num_trunks", "groups", "slots"))
def regroup(stems: Stems, flight: Flight, *, num_trunks: int, groups: int, slots: int) -> tuple[Stems, Flight]:
    """Live rows in `groups` groups of slots; a trunk's rows fill one group after the other."""
    size = flight.row.size
    trunk_B = jnp.where(flight.row == EMPTY, num_trunks, flight.trunk[:, None]).reshape(-1)
    order_B = jnp.argsort(trunk_B, stable=True)
    sorted_B = trunk_B[order_B]
    ends_U = jnp.searchsorted(sorted_B, jnp.arange(num_trunks), side="right")
    counts_U = jnp.diff(ends_U, prepend=0)
    last_group_U = jnp.cumsum(-(-counts_U // slots))
    # The first slot of a trunk, then one for each of its rows. Empty slots sort last, and go nowhere.
    first_slot_U = (last_group_U - -(-counts_U // slots)) * slots
    rank_B = jnp.arange(size) - jnp.take(ends_U - counts_U, sorted_B, mode="clip")
    place_B = jnp.where(sorted_B < num_trunks, jnp.take(first_slot_U, sorted_B, mode="clip") + rank_B, groups * slots)
    source = jnp.full(groups * slots, -1).at[place_B].set(order_B, mode="drop")
    trunk = jnp.searchsorted(last_group_U, jnp.arange(groups), side="right")
    trunk = jnp.minimum(trunk, num_trunks - 1).astype(jnp.int32)
    # Any present group of the trunk has its stem.
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
