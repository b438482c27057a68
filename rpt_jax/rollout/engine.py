"""Many rows until all are done: stems prefilled once, branches' caches hold completion tokens only.

Rows wait in a queue of their trunk and run in slots. One jitted loop feeds and draws a token per slot, and hands the
slot of a row that ends to the next waiting one. Where no row waits, the host moves the live rows into fewer slots, and
it widens the caches as rows get longer. Noise is keyed by row and token, so a schedule changes nothing but the rounding
of products of other shapes.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decoder
from rpt_jax.models.attention import Reach, kernels_of, sees_stem
from rpt_jax.models.vocabulary_head import next_logits
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.interruption import check
from rpt_jax.parallel.mesh import on_mesh_of
from rpt_jax.rollout.sampling import row_keys, sample
from rpt_jax.sequences import stems as stems_of
from rpt_jax.types import Prompts, Rollouts, record


def rollout_key(seed: int, step: int, round_number: int = 0):
    """The key of one rollout batch: a function of the run's seed, the step and the dynamic-sampling round."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, round_number)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How rows are brought through the machine. What is sampled does not depend on it, but for near-ties."""

    window: int = 64
    """Columns of the caches to begin with; doubled when rows outgrow them."""
    compact: bool = True
    """Move live rows into fewer slots where no row waits."""


# Caches of full width from the start, every row in its slot until all have ended.
STATIC = Schedule(window=2**30, compact=False)


@dataclass(frozen=True, kw_only=True)
class Law:
    """What is sampled; see `generate`."""

    max_completion_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop_ids: tuple[int, ...]
    vocab_size: int


def generate(
    config: DecoderConfig,
    params,
    prompts: Prompts,
    key,
    *,
    max_completion_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    stop_ids: tuple[int, ...],
    vocab_size: int,
    slots_per_trunk: int = 0,
    schedule: Schedule = Schedule(),
) -> Rollouts:
    """Sample G completions for every prompt.

    Args:
        key: `rollout_key(...)`.
        max_completion_tokens: C.
        temperature, top_p, top_k: see `sampling.sample`.
        stop_ids: a row stops after any of these tokens; empty: at the limit alone.
        vocab_size: the tokenizer's ids; larger model vocabularies have unused entries that are never sampled.
        slots_per_trunk: rows of a trunk in flight at once; 0: all.
    Raises:
        Interrupted: between two segments; nothing but time is lost, for the same call draws the same.
    """
    limit = max_completion_tokens
    law = Law(
        max_completion_tokens=limit,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop_ids=tuple(stop_ids),
        vocab_size=vocab_size,
    )
    U, M, G = prompts.row_ids.shape
    slots = min(slots_per_trunk or M * G, M * G)
    with on_mesh_of(params):
        weights = decoder.decoding_weights(config, params)
        stems, flight, written = start(
            config, law, params, prompts, key, slots=slots, window=min(schedule.window, limit)
        )
        # Trunks of a sharded batch stay on their device.
        may_regroup = _num_shards(prompts.trunk_tokens) == 1
        shapes = _shapes(U, slots, stems.columns.shape[1], limit, may_regroup) if schedule.compact else []
        floor = math.prod(shapes[0]) if shapes else 0
        while True:
            flight, written, status = run_segment(config, law, weights, stems, flight, written, np.int32(floor))
            live_U, clock, is_waiting = to_host(status)
            check()
            num_live, window = int(live_U.sum()), _window(flight)
            if not num_live and not is_waiting:
                return _rollouts(law, written)
            if shapes and not is_waiting and num_live <= floor:
                while shapes and _holds(*shapes[0], live_U, may_regroup):
                    groups, size = shapes.pop(0)
                    if may_regroup:
                        stems, flight = _regroup(stems, flight, num_trunks=U, groups=groups, slots=size)
                    else:
                        flight = _shrink(flight, slots=size)
                floor = min(math.prod(shapes[0]), num_live * 7 // 8) if shapes else 0
            if clock == window < limit:
                flight = _widen(config, flight, window=min(2 * window, limit))


def _num_shards(array) -> int:
    sharding = getattr(array, "sharding", None)
    return 1 if sharding is None else array.shape[0] // sharding.shard_shape(array.shape)[0]


_EMPTY = 2**30  # the row of an empty slot: beyond every array


@record
class _Stems:
    """What the slots of a group read: a trunk's stem, its prompts, its rows. Leading dimension: groups of slots."""

    kv: Any  # keys and values of the stems, a pair per layer
    tail_hidden: Any  # [U, M, D], hidden state of each prompt's last token
    cuts: Any  # i32 [U, M]
    tail_lengths: Any  # i32 [U, M]
    columns: Any  # i32 [U, P], as attention.Reach
    keys: Any  # keys [U, R], of the rows' noise
    queue: Any  # i32 [U, R], rows in the order they are started, those of padded positions last
    num_queued: Any  # i32 [U], rows that are started


@record
class _Flight:
    """Rows in their slots. The token in hand is drawn and written, but not yet fed."""

    clock: Any  # i32 [], tokens fed to every slot; column clock mod W of the caches is next
    trunk: Any  # i32 [U], the trunk that a group of slots belongs to
    num_started: Any  # i32 [U], rows of the queue that have had a slot
    row: Any  # i32 [U, S]; _EMPTY where the slot is empty
    index: Any  # i32 [U, S], number of the token in hand in its completion; -1 before the first
    token: Any  # i32 [U, S], in hand
    cache: Any  # own keys and values per layer; their W columns are a ring of the last tokens fed


@record
class _Written:
    """Completions so far, by row."""

    tokens: Any  # i32 [U, R, C]
    logprobs: Any  # f32 [U, R, C]
    mask: Any  # bool [U, R, C]
    rejected: Any  # bool [U, R, C], the token's first draw was refused


def _window(flight: _Flight) -> int:
    """W."""
    return flight.cache[0][1].shape[-2]


@partial(jax.jit, static_argnames=("config", "law", "slots", "window"))
def start(config: DecoderConfig, law: Law, params, prompts: Prompts, key, *, slots: int, window: int):
    """Prefill, fill the slots, draw each row's first token."""
    U, M, G = prompts.row_ids.shape
    R, C, E = M * G, law.max_completion_tokens, prompts.tail_tokens.shape[-1]
    sequences = stems_of(prompts)
    hidden_UPD, kv = decoder.prefill(config, params, sequences)
    is_real_UR = jnp.repeat(prompts.prompt_mask, G, axis=1)
    stems = _Stems(
        kv=kv,
        tail_hidden=decoder.prompt_ends(hidden_UPD, sequences),
        cuts=jnp.asarray(prompts.cuts),
        tail_lengths=jnp.asarray(prompts.tail_lengths),
        columns=decoder.stem_columns(prompts.trunk_tokens.shape[1], prompts.tail_lengths, E),
        keys=row_keys(key, jnp.asarray(prompts.row_ids).reshape(U, R)),
        queue=jnp.argsort(~is_real_UR, axis=1, stable=True).astype(jnp.int32),
        num_queued=is_real_UR.sum(1, dtype=jnp.int32),
    )
    flight = _Flight(
        clock=jnp.int32(0),
        trunk=jnp.arange(U, dtype=jnp.int32),
        num_started=jnp.zeros(U, jnp.int32),
        row=jnp.full((U, slots), _EMPTY, jnp.int32),
        index=jnp.zeros((U, slots), jnp.int32),
        token=jnp.zeros((U, slots), jnp.int32),
        cache=decoder.empty_cache(config, U, slots, window),
    )
    flight = _start_waiting_rows(stems, flight)
    nothing_USD = jnp.zeros((U, slots, config.width), config.activation_dtype)
    flight, entry = _draw(law, params, stems, flight, nothing_USD)
    written = _Written(
        tokens=jnp.zeros((U, R, C), jnp.int32),
        logprobs=jnp.zeros((U, R, C), jnp.float32),
        mask=jnp.zeros((U, R, C), bool),
        rejected=jnp.zeros((U, R, C), bool),
    )
    return stems, flight, _write(written, flight.trunk, jax.tree.map(lambda x: x[None], entry))


@partial(jax.jit, static_argnames=("config", "law"), donate_argnames=("flight", "written"))
def run_segment(config: DecoderConfig, law: Law, weights, stems: _Stems, flight: _Flight, written: _Written, floor):
    """Feed and draw until all is done, the caches are full, or no row waits and at most `floor` live.

    Returns:
        (flight, written, (live rows i32 [U] by trunk, the clock, whether rows wait)).
    """
    U, W = written.tokens.shape[0], _window(flight)
    may_widen = law.max_completion_tokens > W

    def is_running(carry):
        flight, _, steps = carry
        # One sum of both: on a mesh the devices meet once a token for it.
        num_live, num_waiting = jnp.sum(jnp.stack([_num_live(flight), _num_waiting(stems, flight)]), axis=1)
        is_running = (steps < W) & ((num_waiting > 0) | (num_live > floor))
        return is_running & (flight.clock < W) if may_widen else is_running

    def feed_and_draw(carry):
        flight, tape, steps = carry
        flight = _start_waiting_rows(stems, flight)
        hidden_USD, flight = _feed(config, weights, stems, flight)
        flight, entry = _draw(law, weights["rest"], stems, flight, hidden_USD)
        tape = jax.tree.map(
            lambda all_steps, now: jax.lax.dynamic_update_index_in_dim(all_steps, now, steps, 0), tape, entry
        )
        return flight, tape, steps + 1

    shape = (W, *flight.row.shape)
    blank = _Entry(
        row=jnp.full(shape, _EMPTY, jnp.int32),
        index=jnp.zeros(shape, jnp.int32),
        token=jnp.zeros(shape, jnp.int32),
        logprob=jnp.zeros(shape, jnp.float32),
        rejected=jnp.zeros(shape, bool),
    )
    flight, tape, _ = jax.lax.while_loop(is_running, feed_and_draw, (flight, blank, jnp.int32(0)))
    live_U = jnp.zeros(U, jnp.int32).at[flight.trunk].add(_num_live(flight))
    is_waiting = jnp.any(_num_waiting(stems, flight) > 0)
    return flight, _write(written, flight.trunk, tape), (live_U, flight.clock, is_waiting)


@record
class _Entry:
    """What one step has drawn, for every slot."""

    row: Any  # i32 [U, S]; _EMPTY: nothing
    index: Any  # i32 [U, S]
    token: Any  # i32 [U, S]
    logprob: Any  # f32 [U, S]
    rejected: Any  # bool [U, S]


def _write(written: _Written, trunk_U, tape: _Entry) -> _Written:
    """Put a tape [steps, U, S] of tokens where they belong."""
    place = (trunk_U[None, :, None], tape.row, tape.index)  # _EMPTY is out of range: dropped
    return _Written(
        tokens=written.tokens.at[place].set(tape.token, mode="drop"),
        logprobs=written.logprobs.at[place].set(tape.logprob, mode="drop"),
        mask=written.mask.at[place].set(True, mode="drop"),
        rejected=written.rejected.at[place].set(tape.rejected, mode="drop"),
    )


def _is_stop(law: Law, tokens):
    """bool, whether each token ends a row."""
    return jnp.any(tokens[..., None] == jnp.asarray(law.stop_ids, jnp.int32), axis=-1)


@partial(jax.jit, static_argnames="law")
def _rollouts(law: Law, written: _Written) -> Rollouts:
    return Rollouts(
        tokens=written.tokens,
        mask=written.mask,
        sampler_logprobs=written.logprobs,
        truncated=written.mask[..., -1] & ~_is_stop(law, written.tokens[..., -1]),
        num_rejected=written.rejected.sum(-1),
    )


# --- One step -----------------------------------------------------------------------------------------------------


def _num_live(flight: _Flight):
    """i32 [U], rows in each group's slots."""
    return jnp.sum(flight.row < _EMPTY, axis=1, dtype=jnp.int32)


def _num_waiting(stems: _Stems, flight: _Flight):
    """i32 [U], rows of each group's queue that have had no slot."""
    return stems.num_queued - flight.num_started


def _start_waiting_rows(stems: _Stems, flight: _Flight) -> _Flight:
    """Empty slots take the next rows of their trunk's queue."""
    R = stems.queue.shape[1]
    is_empty = flight.row == _EMPTY
    place = flight.num_started[:, None] + jnp.cumsum(is_empty, axis=1) - 1
    is_fresh = is_empty & (place < stems.num_queued[:, None])
    row = jnp.take_along_axis(stems.queue, jnp.minimum(place, R - 1), axis=1)
    return replace(
        flight,
        row=jnp.where(is_fresh, row, flight.row),
        index=jnp.where(is_fresh, -1, flight.index),
        num_started=flight.num_started + is_fresh.sum(1, dtype=jnp.int32),
    )


def _prompt_of(stems: _Stems, flight: _Flight):
    """i32 [U, S]: the prompt of each slot's row; that of some row where the slot is empty."""
    R, M = stems.queue.shape[1], stems.cuts.shape[1]
    return jnp.minimum(flight.row, R - 1) // (R // M)


def _feed(config: DecoderConfig, weights, stems: _Stems, flight: _Flight):
    """Hidden states [U, S, D] behind the tokens in hand. A row's first token needs none: it comes from the stem."""
    W, prompts = _window(flight), _prompt_of(stems, flight)
    cuts, tail_lengths = (jnp.take_along_axis(x, prompts, axis=1) for x in (stems.cuts, stems.tail_lengths))
    column = flight.clock % W
    # A column holds what was fed `age` tokens ago; a row has fed index + 1 tokens, the one in hand among them.
    age_W = (column - jnp.arange(W)) % W
    own_mask = age_W < (flight.index + 1)[:, :, None, None]
    reach = Reach(cuts=cuts[..., None], prompts=prompts[..., None], first=None, columns=stems.columns)
    hidden_US1D, cache = decoder.extend(
        config,
        weights,
        flight.token[..., None],
        (cuts + tail_lengths + flight.index)[..., None],
        stems.kv,
        sees_stem(reach),
        flight.cache,
        column,
        own_mask,
    )
    return hidden_US1D[:, :, 0], replace(flight, cache=cache, clock=flight.clock + 1)


def _draw(law: Law, params, stems: _Stems, flight: _Flight, hidden_USD) -> tuple[_Flight, _Entry]:
    """Draw the next token of every slot; the slots of rows that end with it are empty."""
    R = stems.queue.shape[1]
    first_USD = jnp.take_along_axis(stems.tail_hidden, _prompt_of(stems, flight)[..., None], axis=1)
    hidden_USD = jnp.where((flight.index < 0)[..., None], first_USD, hidden_USD)
    logits_USV = next_logits(params, hidden_USD)
    if logits_USV.shape[-1] > law.vocab_size:
        logits_USV = jnp.where(jnp.arange(logits_USV.shape[-1]) < law.vocab_size, logits_USV, -jnp.inf)
    keys = jnp.take_along_axis(stems.keys, jnp.minimum(flight.row, R - 1), axis=1)
    index = flight.index + 1
    token, logprob, rejected = sample(
        logits_USV, keys, index, temperature=law.temperature, top_p=law.top_p, top_k=law.top_k
    )
    entry = _Entry(row=flight.row, index=index, token=token, logprob=logprob, rejected=rejected)
    has_ended = _is_stop(law, token) | (index + 1 >= law.max_completion_tokens)
    return replace(flight, token=token, index=index, row=jnp.where(has_ended, _EMPTY, flight.row)), entry


# --- Between segments ---------------------------------------------------------------------------------------------


def _shapes(num_trunks: int, slots: int, num_stem: int, limit: int, may_regroup: bool) -> list[tuple[int, int]]:
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


def _holds(groups: int, slots: int, live_U, may_regroup: bool) -> bool:
    """Whether the live rows, i32 [U] by trunk, have room in so many groups."""
    return int(np.sum(-(-live_U // slots))) <= groups if may_regroup else live_U.max() <= slots


@partial(jax.jit, static_argnames=("config", "window"))
def _widen(config: DecoderConfig, flight: _Flight, *, window: int) -> _Flight:
    """Columns added behind; only before the ring has turned for the first time."""
    more = window - _window(flight)

    def pad(x, axis):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, more)
        return jnp.pad(x, widths)

    axes = decoder.columns_axis(kernels_of(config))
    return replace(flight, cache=[tuple(map(pad, kv, axes)) for kv in flight.cache])


@partial(jax.jit, static_argnames="slots")
def _shrink(flight: _Flight, *, slots: int) -> _Flight:
    """Live rows in the first slots of their trunk; the others are given up."""
    order = jnp.argsort(flight.row == _EMPTY, axis=1, stable=True)[:, :slots]

    def take(x):
        return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)

    rows = {name: take(getattr(flight, name)) for name in ("row", "index", "token")}
    return replace(flight, **rows, cache=jax.tree.map(take, flight.cache))


@partial(jax.jit, static_argnames=("num_trunks", "groups", "slots"))
def _regroup(stems: _Stems, flight: _Flight, *, num_trunks: int, groups: int, slots: int) -> tuple[_Stems, _Flight]:
    """Live rows in `groups` groups of slots; a trunk's rows fill one group after the other."""
    size = flight.row.size
    trunk_B = jnp.where(flight.row == _EMPTY, num_trunks, flight.trunk[:, None]).reshape(-1)
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

    row = jnp.where(source.reshape(groups, slots) < 0, _EMPTY, take(flight.row))
    moved = _Flight(
        clock=flight.clock,
        trunk=trunk,
        num_started=flight.num_started[group_of_trunk_U[trunk]],
        row=row,
        index=take(flight.index),
        token=take(flight.token),
        cache=jax.tree.map(take, flight.cache),
    )
    return jax.tree.map(lambda x: x[group_of_trunk_U[trunk]], stems), moved
