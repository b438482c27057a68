"""Sampling of many rows: stems are prefilled once, and the rows' caches hold completion tokens only.

Rows queue at their trunk and run in slots. One jitted loop feeds and draws a token per slot, and gives the slot of a
finished row to the next queued one. Once the queues are empty, the host moves running rows into fewer slots. It widens
the caches as rows grow. Noise is keyed by row and token, so a schedule only changes the rounding of matrix products of
other shapes.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decoder, decoding
from rpt_jax.models.attention import PADDING, Visibility, stem_mask_of
from rpt_jax.models.decode_kernel import Spans
from rpt_jax.models.vocabulary_head import next_logits
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.interruption import check
from rpt_jax.parallel.mesh import on_mesh_of
from rpt_jax.parallel.programs import program
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
    """Return the PRNG key of one rollout batch, a function of seed, step and dynamic-sampling round.

    Args:
        step: an int; or i32 [U], the step in which each trunk's rows started, which gives one key per trunk.
    """

    def key(step):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), round_number)

    return jax.vmap(key)(jnp.asarray(step)) if np.ndim(step) else key(step)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How rows are scheduled. Sampled tokens do not depend on it, except at near-ties."""

    window: int = 64
    """Initial number of cache columns (entries along the key axis); doubled when rows outgrow them. The kernels of
    decoding read only the columns that a row has: with them, caches have full width from the start."""
    shares: tuple[float, ...] = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)
    """Shares of all slots that running rows move to once no row is queued. Each is a program."""


# Caches of full width from the start; every row keeps its slot until all have ended.
STATIC = Schedule(window=2**30, shares=())
# By `run.shapes`.
SCHEDULES = {"many": Schedule(), "few": Schedule(window=2**30, shares=(1 / 4,))}


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Settings of the sampling distribution; see `generate`."""

    max_completion_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop_ids: tuple[int, ...]
    vocab_size: int
    new_tokens: int = 0


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
    new_tokens: int = 0,
    schedule: Schedule = Schedule(),
) -> Rollouts:
    """Sample G completions for every prompt.

    Args:
        prompts: rows continue after their prefixes, if there are any, and the rollouts include them (`continued.py`).
        key: from `rollout_key`: one, or [U] with one key per trunk.
        max_completion_tokens: C.
        temperature, top_p, top_k: see `sampling.sample`.
        stop_ids: a row stops after any of these tokens; empty: only at the limit.
        vocab_size: number of the tokenizer's ids; unused entries of a larger model vocabulary are never sampled.
        slots_per_trunk: rows of a trunk that run at once; 0: all.
        new_tokens: most tokens that a row draws in this call; 0: up to C. Rows that are cut have no stop token.
        schedule: how rows are scheduled.
    Raises:
        ValueError: a stop id is negative.
        Interrupted: between two segments, on a stop signal. The same call draws the same tokens again.
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
        new_tokens=new_tokens,
    )
    U, M, G = prompts.row_ids.shape
    slots, window = min(slots_per_trunk or M * G, M * G), first_window(config, schedule, limit)
    if prompts.prefix_tokens is not None:
        slots = max(slots, int(to_host(max_continued_rows(prompts, stop_ids=settings.stop_ids, limit=limit))))
        window = max(window, min(prompts.prefix_tokens.shape[-1], limit))
    with on_mesh_of(params):
        weights = decoding.decoding_weights(config, params)
        stems, flight, written, given = start(config, settings, params, prompts, key, slots=slots, window=window)
        if given is not None:
            flight = prefill_rows(config, weights, stems, flight, given)
        # Trunks of a sharded batch must stay on their device.
        may_regroup = num_shards_of(prompts.trunk_tokens) == 1
        shapes = chain_of_shapes(U, slots, stems.stem_layout.shape[1], limit, may_regroup, schedule.shares)
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


def first_window(config: DecoderConfig, schedule: Schedule, limit: int) -> int:
    """Return the number of cache columns that rows of up to `limit` tokens start with."""
    if decoding.has_fused_attention(config):
        return decoding.num_columns(config, limit)
    return min(schedule.window, limit)


def _compacted(stems: Stems, flight: Flight, shapes: list, live_U, may_regroup: bool) -> tuple[Stems, Flight]:
    """Move running rows into the smallest shape that holds them, and remove passed shapes from the list."""
    while shapes and holds(*shapes[0], live_U, may_regroup):
        groups, size = shapes.pop(0)
        if may_regroup:
            stems, flight = regroup(stems, flight, num_trunks=len(live_U), groups=groups, slots=size)
        else:
            flight = shrink(flight, slots=size)
    return stems, flight


def num_shards_of(array) -> int:
    """Return the number of shards of an array's leading dimension."""
    sharding = getattr(array, "sharding", None)
    return 1 if sharding is None else array.shape[0] // sharding.shard_shape(array.shape)[0]


@partial(jax.jit, static_argnames=("config", "settings", "slots", "window"))
def start(config: DecoderConfig, settings: SamplingSettings, params, prompts: Prompts, key, *, slots: int, window: int):
    """Prefill the stems, fill the slots and draw the first token of each fresh row.

    Returns:
        (stems, flight, written, given tokens of continued rows or None).
    """
    U, M, G = prompts.row_ids.shape
    R, C, E = M * G, settings.max_completion_tokens, prompts.tail_tokens.shape[-1]
    sequences, given = stems_of(prompts), given_rows(prompts, settings.stop_ids, C)
    hidden_UPD, kv = decoding.prefill(config, params, sequences)
    L, P = prompts.trunk_tokens.shape[1], kv[0][1].shape[-2]
    layout_UP = decoder.stem_layout(L, prompts.tail_lengths, E)
    is_real_UR = jnp.repeat(prompts.prompt_mask, G, axis=1)
    queue, num_queued = start_order(is_real_UR, given)
    stems = Stems(
        kv=kv,
        tail_hidden=decoder.prompt_ends(hidden_UPD, sequences),
        cuts=jnp.asarray(prompts.cuts),
        tail_lengths=jnp.asarray(prompts.tail_lengths),
        stem_layout=jnp.pad(layout_UP, ((0, 0), (0, P - layout_UP.shape[1])), constant_values=PADDING),
        tail_ends=jnp.broadcast_to(L + E * (1 + jnp.arange(M, dtype=jnp.int32)), (U, M)),
        keys=row_keys(key, jnp.asarray(prompts.row_ids).reshape(U, R)),
        queue=queue,
        num_queued=num_queued,
        limits=_limits(settings, U, R, given),
    )
    flight = Flight(
        clock=jnp.int32(0),
        trunk=jnp.arange(U, dtype=jnp.int32),
        num_started=jnp.zeros(U, jnp.int32),
        row=jnp.full((U, slots), EMPTY, jnp.int32),
        index=jnp.zeros((U, slots), jnp.int32),
        token=jnp.zeros((U, slots), jnp.int32),
        cache=decoding.empty_cache(config, U, slots, window),
    )
    flight, entry = _draw_first(config, settings, params, stems, start_waiting_rows(stems, flight), given)
    written = initial_written(U, R, C, is_real_UR, given)
    return stems, flight, _write(written, flight.trunk, jax.tree.map(lambda x: x[None], entry)), given


def _limits(settings: SamplingSettings, U: int, R: int, given: Given | None):
    """Return the number of tokens at which each row is cut, i32 [U, R]; None: all at C."""
    if not settings.new_tokens:
        return None
    before = jnp.zeros((U, R), jnp.int32) if given is None else given.lengths
    return jnp.minimum(before + settings.new_tokens, settings.max_completion_tokens)


def _draw_first(
    config: DecoderConfig, settings: SamplingSettings, params, stems: Stems, flight: Flight, given: Given | None
):
    """Draw the first token of each fresh row from its stem; a continued row takes its last given token."""
    nothing_USD = jnp.zeros((*flight.row.shape, config.width), config.activation_dtype)
    if given is None:
        return _draw(settings, params, stems, flight, nothing_USD)
    flight = load_last_given(flight, given)
    is_continued_US = (flight.index >= 0) & (flight.row < EMPTY)
    return skip_continued(is_continued_US, flight, *_draw(settings, params, stems, flight, nothing_USD))


# On GPUs, the whole loop becomes one graph (CUDA 12.3 or later; XLA leaves it out for an older driver), and cuBLAS
# multiplies: its products of a few hundred rows need no extra pass to add up parts.
_GRAPH = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"


@program(
    static_argnames=("config", "settings"),
    donate_argnames=("flight", "written"),
    gpu={"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_command_buffer": _GRAPH},
)
def run_segment(
    config: DecoderConfig, settings: SamplingSettings, weights, stems: Stems, flight: Flight, written: Written, floor
):
    """Feed and draw until all rows are done, the caches are full, or no row is queued and at most `floor` run.

    Args:
        weights: from `decoding.decoding_weights`.
        floor: i32 scalar.
    Returns:
        (flight, written, (running rows of each trunk i32 [U], the clock, whether rows are queued)).
    """
    U, W = written.tokens.shape[0], window_of(flight)
    may_widen = settings.max_completion_tokens > W

    def is_running(carry):
        flight, _, steps = carry
        # One reduction for both: on a mesh it is the only synchronisation per token.
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
    """Scatter the drawn tokens of a segment, [steps, U, S], into the completions."""
    place = (trunk_U[None, :, None], tape.row, tape.index)  # EMPTY is out of range: dropped
    return Written(
        tokens=written.tokens.at[place].set(tape.token, mode="drop"),
        logprobs=written.logprobs.at[place].set(tape.logprob, mode="drop"),
        mask=written.mask.at[place].set(True, mode="drop"),
        rejected=written.rejected.at[place].set(tape.rejected, mode="drop"),
    )


def _is_stop(settings: SamplingSettings, tokens):
    """Return whether each token ends a row, bool."""
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
    """Feed the pending tokens and return their hidden states [U, S, D]. A row's first token comes from its stem."""
    W, prompts = window_of(flight), prompt_of(stems, flight)
    cuts, tail_lengths, tail_ends = (
        jnp.take_along_axis(x, prompts, axis=1) for x in (stems.cuts, stems.tail_lengths, stems.tail_ends)
    )
    column = flight.clock % W
    if decoding.has_fused_attention(config):
        spans = Spans(cut=cuts, first=tail_ends - tail_lengths, last=tail_ends)
        # An empty slot, or one whose row has no token yet, reads no column.
        lengths = jnp.where(flight.row < EMPTY, jnp.maximum(flight.index, 0), 0)
        attend = decoding.attend_fused(config, spans, lengths, column)
    else:
        # A column holds the token fed `age` steps ago; a row has fed index + 1 tokens, including the pending one.
        age_W = (column - jnp.arange(W)) % W
        own_mask = age_W < (flight.index + 1)[:, :, None, None]
        visibility = Visibility(
            cuts=cuts[..., None], prompts=prompts[..., None], first=None, stem_layout=stems.stem_layout
        )
        attend = decoding.attend_plain(config, stem_mask_of(visibility), own_mask, column)
    positions_US1 = (cuts + tail_lengths + flight.index)[..., None]
    hidden_US1D, cache = decoding.extend(
        config, weights, flight.token[..., None], positions_US1, stems.kv, flight.cache, attend
    )
    return hidden_US1D[:, :, 0], replace(flight, cache=cache, clock=flight.clock + 1)


def _draw(settings: SamplingSettings, params, stems: Stems, flight: Flight, hidden_USD) -> tuple[Flight, Entry]:
    """Draw the next token of every slot; slots of rows that end with it become empty."""
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
    limit_US = settings.max_completion_tokens
    if stems.limits is not None:
        limit_US = jnp.take_along_axis(stems.limits, jnp.minimum(flight.row, R - 1), axis=1)
    has_ended = _is_stop(settings, token) | (index + 1 >= limit_US)
    return replace(flight, token=token, index=index, row=jnp.where(has_ended, EMPTY, flight.row)), entry
