"""Many rows until all are done: stems prefilled once, branches' caches hold completion tokens only.

Rows wait in a queue of their trunk and run in slots. One jitted loop feeds and draws a token per slot, and hands the
slot of a row that ends to the next waiting one. Where no row waits, the host moves the live rows into fewer slots, and
it widens the caches as rows get longer. Noise is keyed by row and token, so a schedule changes nothing but the rounding
of products of other shapes.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decoder
from rpt_jax.models.attention import Visibility, stem_mask_of
from rpt_jax.models.vocabulary_head import next_logits
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.interruption import check
from rpt_jax.parallel.mesh import on_mesh_of
from rpt_jax.rollout.continued import (
    Given,
    given_rows,
    initial_written,
    load_last_given,
    max_continued_rows,
    prefill_rows,
    skip_continued,
    start_order,
)
from rpt_jax.rollout.flight import (
    EMPTY,
    Entry,
    Flight,
    Stems,
    Written,
    num_live,
    num_waiting,
    prompt_of,
    start_waiting_rows,
    window_of,
)
from rpt_jax.rollout.sampling import row_keys, sample
from rpt_jax.rollout.slots import chain_of_shapes, holds, regroup, shrink, widen
from rpt_jax.sequences import stems as stems_of
from rpt_jax.types import Prompts, Rollouts


def rollout_key(seed: int, step, round_number: int = 0):
    """The key of one rollout batch: a function of the run's seed, the step and the dynamic-sampling round.

    Args:
        step: an int, or i32 [U]: the steps that the rows of each trunk were born in, for a key each.
    """

    def key(step):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), round_number)

    return jax.vmap(key)(jnp.asarray(step)) if np.ndim(step) else key(step)


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
class SamplingSettings:
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
        prompts: where it has prefixes, rows go on behind them and the rollouts hold them too (`continued.py`).
        key: `rollout_key(...)`, or a key [U] for each trunk, of the step that its rows were born in.
        max_completion_tokens: C.
        temperature, top_p, top_k: see `sampling.sample`.
        stop_ids: a row stops after any of these tokens; empty: at the limit alone.
        vocab_size: the tokenizer's ids; larger model vocabularies have unused entries that are never sampled.
        slots_per_trunk: rows of a trunk in flight at once; 0: all.
    Raises:
        ValueError: a stop id that is negative.
        Interrupted: between two segments; nothing but time is lost, for the same call draws the same.
    """
    if any(i < 0 for i in stop_ids):
        raise ValueError(f"stop ids {stop_ids}; they must be token ids, 0 or more")
    limit = max_completion_tokens
    settings = SamplingSettings(
        max_completion_tokens=limit,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop_ids=tuple(stop_ids),
        vocab_size=vocab_size,
    )
    U, M, G = prompts.row_ids.shape
    slots, window = min(slots_per_trunk or M * G, M * G), min(schedule.window, limit)
    if prompts.prefix_tokens is not None:
        slots = max(slots, int(to_host(max_continued_rows(prompts, stop_ids=settings.stop_ids, limit=limit))))
        window = min(max(window, prompts.prefix_tokens.shape[-1]), limit)
    with on_mesh_of(params):
        weights = decoder.decoding_weights(config, params)
        stems, flight, written, given = start(config, settings, params, prompts, key, slots=slots, window=window)
        if given is not None:
            flight = prefill_rows(config, weights, stems, flight, given)
        # Trunks of a sharded batch stay on their device.
        may_regroup = num_shards_of(prompts.trunk_tokens) == 1
        shapes = chain_of_shapes(U, slots, stems.stem_layout.shape[1], limit, may_regroup) if schedule.compact else []
        floor = math.prod(shapes[0]) if shapes else 0
        while True:
            flight, written, status = run_segment(config, settings, weights, stems, flight, written, np.int32(floor))
            live_U, clock, is_waiting = to_host(status)
            check()
            live, window = int(live_U.sum()), window_of(flight)
            if not live and not is_waiting:
                return _rollouts(settings, written)
            if shapes and not is_waiting and live <= floor:
                stems, flight = _compacted(stems, flight, shapes, live_U, may_regroup)
                floor = min(math.prod(shapes[0]), live * 7 // 8) if shapes else 0
            if clock == window < limit:
                flight = widen(config, flight, window=min(2 * window, limit))


def _compacted(stems: Stems, flight: Flight, shapes: list, live_U, may_regroup: bool) -> tuple[Stems, Flight]:
    """Live rows in the smallest shape that holds them; shapes that are passed are taken off the list."""
    while shapes and holds(*shapes[0], live_U, may_regroup):
        groups, size = shapes.pop(0)
        if may_regroup:
            stems, flight = regroup(stems, flight, num_trunks=len(live_U), groups=groups, slots=size)
        else:
            flight = shrink(flight, slots=size)
    return stems, flight


def num_shards_of(array) -> int:
    sharding = getattr(array, "sharding", None)
    return 1 if sharding is None else array.shape[0] // sharding.shard_shape(array.shape)[0]


@partial(jax.jit, static_argnames=("config", "settings", "slots", "window"))
def start(config: DecoderConfig, settings: SamplingSettings, params, prompts: Prompts, key, *, slots: int, window: int):
    """Prefill the stems, fill the slots, draw the first token of each row that begins anew.

    Returns:
        (stems, flight, written, what is given of rows that go on or None).
    """
    U, M, G = prompts.row_ids.shape
    R, C, E = M * G, settings.max_completion_tokens, prompts.tail_tokens.shape[-1]
    sequences, given = stems_of(prompts), given_rows(prompts, settings.stop_ids, C)
    hidden_UPD, kv = decoder.prefill(config, params, sequences)
    is_real_UR = jnp.repeat(prompts.prompt_mask, G, axis=1)
    queue, num_queued = start_order(is_real_UR, given)
    stems = Stems(
        kv=kv,
        tail_hidden=decoder.prompt_ends(hidden_UPD, sequences),
        cuts=jnp.asarray(prompts.cuts),
        tail_lengths=jnp.asarray(prompts.tail_lengths),
        stem_layout=decoder.stem_layout(prompts.trunk_tokens.shape[1], prompts.tail_lengths, E),
        keys=row_keys(key, jnp.asarray(prompts.row_ids).reshape(U, R)),
        queue=queue,
        num_queued=num_queued,
    )
    flight = Flight(
        clock=jnp.int32(0),
        trunk=jnp.arange(U, dtype=jnp.int32),
        num_started=jnp.zeros(U, jnp.int32),
        row=jnp.full((U, slots), EMPTY, jnp.int32),
        index=jnp.zeros((U, slots), jnp.int32),
        token=jnp.zeros((U, slots), jnp.int32),
        cache=decoder.empty_cache(config, U, slots, window),
    )
    flight, entry = _draw_first(config, settings, params, stems, start_waiting_rows(stems, flight), given)
    written = initial_written(U, R, C, is_real_UR, given)
    return stems, flight, _write(written, flight.trunk, jax.tree.map(lambda x: x[None], entry)), given


def _draw_first(
    config: DecoderConfig, settings: SamplingSettings, params, stems: Stems, flight: Flight, given: Given | None
):
    """The first token of each slot's row, from its stem; rows that go on take the last token that is given."""
    nothing_USD = jnp.zeros((*flight.row.shape, config.width), config.activation_dtype)
    if given is None:
        return _draw(settings, params, stems, flight, nothing_USD)
    flight = load_last_given(flight, given)
    is_continued_US = (flight.index >= 0) & (flight.row < EMPTY)
    return skip_continued(is_continued_US, flight, *_draw(settings, params, stems, flight, nothing_USD))


@partial(jax.jit, static_argnames=("config", "settings"), donate_argnames=("flight", "written"))
def run_segment(
    config: DecoderConfig, settings: SamplingSettings, weights, stems: Stems, flight: Flight, written: Written, floor
):
    """Feed and draw until all is done, the caches are full, or no row waits and at most `floor` live.

    Returns:
        (flight, written, (live rows i32 [U] by trunk, the clock, whether rows wait)).
    """
    U, W = written.tokens.shape[0], window_of(flight)
    may_widen = settings.max_completion_tokens > W

    def is_running(carry):
        flight, _, steps = carry
        # One sum of both: on a mesh the devices meet once a token for it.
        live, waiting = jnp.sum(jnp.stack([num_live(flight), num_waiting(stems, flight)]), axis=1)
        is_running = (steps < W) & ((waiting > 0) | (live > floor))
        return is_running & (flight.clock < W) if may_widen else is_running

    def feed_and_draw(carry):
        flight, tape, steps = carry
        flight = start_waiting_rows(stems, flight)
        hidden_USD, flight = _feed(config, weights, stems, flight)
        flight, entry = _draw(settings, weights["rest"], stems, flight, hidden_USD)
        tape = jax.tree.map(
            lambda all_steps, now: jax.lax.dynamic_update_index_in_dim(all_steps, now, steps, 0), tape, entry
        )
        return flight, tape, steps + 1

    shape = (W, *flight.row.shape)
    blank = Entry(
        row=jnp.full(shape, EMPTY, jnp.int32),
        index=jnp.zeros(shape, jnp.int32),
        token=jnp.zeros(shape, jnp.int32),
        logprob=jnp.zeros(shape, jnp.float32),
        rejected=jnp.zeros(shape, bool),
    )
    flight, tape, _ = jax.lax.while_loop(is_running, feed_and_draw, (flight, blank, jnp.int32(0)))
    live_U = jnp.zeros(U, jnp.int32).at[flight.trunk].add(num_live(flight))
    is_waiting = jnp.any(num_waiting(stems, flight) > 0)
    return flight, _write(written, flight.trunk, tape), (live_U, flight.clock, is_waiting)


def _write(written: Written, trunk_U, tape: Entry) -> Written:
    """Put a tape [steps, U, S] of tokens where they belong."""
    place = (trunk_U[None, :, None], tape.row, tape.index)  # EMPTY is out of range: dropped
    return Written(
        tokens=written.tokens.at[place].set(tape.token, mode="drop"),
        logprobs=written.logprobs.at[place].set(tape.logprob, mode="drop"),
        mask=written.mask.at[place].set(True, mode="drop"),
        rejected=written.rejected.at[place].set(tape.rejected, mode="drop"),
    )


def _is_stop(settings: SamplingSettings, tokens):
    """bool, whether each token ends a row."""
    return jnp.any(tokens[..., None] == jnp.asarray(settings.stop_ids, jnp.int32), axis=-1)


@partial(jax.jit, static_argnames="settings")
def _rollouts(settings: SamplingSettings, written: Written) -> Rollouts:
    return Rollouts(
        tokens=written.tokens,
        mask=written.mask,
        sampler_logprobs=written.logprobs,
        truncated=written.mask[..., -1] & ~_is_stop(settings, written.tokens[..., -1]),
        num_rejected=written.rejected.sum(-1),
    )


# --- One step -----------------------------------------------------------------------------------------------------


def _feed(config: DecoderConfig, weights, stems: Stems, flight: Flight):
    """Hidden states [U, S, D] behind the tokens in hand. A row's first token needs none: it comes from the stem."""
    W, prompts = window_of(flight), prompt_of(stems, flight)
    cuts, tail_lengths = (jnp.take_along_axis(x, prompts, axis=1) for x in (stems.cuts, stems.tail_lengths))
    column = flight.clock % W
    # A column holds what was fed `age` tokens ago; a row has fed index + 1 tokens, the one in hand among them.
    age_W = (column - jnp.arange(W)) % W
    own_mask = age_W < (flight.index + 1)[:, :, None, None]
    visibility = Visibility(cuts=cuts[..., None], prompts=prompts[..., None], first=None, stem_layout=stems.stem_layout)
    hidden_US1D, cache = decoder.extend(
        config,
        weights,
        flight.token[..., None],
        (cuts + tail_lengths + flight.index)[..., None],
        stems.kv,
        stem_mask_of(visibility),
        flight.cache,
        column,
        own_mask,
    )
    return hidden_US1D[:, :, 0], replace(flight, cache=cache, clock=flight.clock + 1)


def _draw(settings: SamplingSettings, params, stems: Stems, flight: Flight, hidden_USD) -> tuple[Flight, Entry]:
    """Draw the next token of every slot; the slots of rows that end with it are empty."""
    R = stems.queue.shape[1]
    first_USD = jnp.take_along_axis(stems.tail_hidden, prompt_of(stems, flight)[..., None], axis=1)
    hidden_USD = jnp.where((flight.index < 0)[..., None], first_USD, hidden_USD)
    logits_USV = next_logits(params, hidden_USD)
    if logits_USV.shape[-1] > settings.vocab_size:
        logits_USV = jnp.where(jnp.arange(logits_USV.shape[-1]) < settings.vocab_size, logits_USV, -jnp.inf)
    keys = jnp.take_along_axis(stems.keys, jnp.minimum(flight.row, R - 1), axis=1)
    index = flight.index + 1
    token, logprob, rejected = sample(
        logits_USV, keys, index, temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k
    )
    entry = Entry(row=flight.row, index=index, token=token, logprob=logprob, rejected=rejected)
    has_ended = _is_stop(settings, token) | (index + 1 >= settings.max_completion_tokens)
    return replace(flight, token=token, index=index, row=jnp.where(has_ended, EMPTY, flight.row)), entry
