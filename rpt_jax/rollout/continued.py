"""Continued rows: a completion's first tokens are given, and prefilled into the row's cache.

With equal parameters, a row that is stopped and continued equals the row that never stopped, except at near-ties. Its
noise is keyed by the step in which it started and by the token's index, so only the rounding of matrix products of
other shapes differs.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decoding
from rpt_jax.models.attention import Visibility, stem_mask_of
from rpt_jax.rollout.flight import EMPTY, Entry, Flight, Stems, Written, prompt_of, window_of
from rpt_jax.types import Prompts, record

# Given tokens of each row that are prefilled at once.
_CHUNK = 64


@record
class Given:
    """The given tokens of each row of a batch."""

    tokens: Any  # i32 [U, R, C'], right-padded
    lengths: Any  # i32 [U, R], number of given tokens; 0: the row starts fresh
    logprobs: Any  # f32 [U, R, C'], log-probabilities they were sampled with; 0 if unknown
    is_done: Any  # bool [U, R], they end, contain a stop token or reach the limit: nothing is left to draw


def given_rows(prompts: Prompts, stop_ids: tuple[int, ...], limit: int) -> Given | None:
    """Return the given tokens of a batch; None if every row starts fresh."""
    if prompts.prefix_tokens is None:
        return None
    U, M, G, width = prompts.prefix_tokens.shape
    tokens = jnp.asarray(prompts.prefix_tokens).reshape(U, M * G, width)
    lengths = jnp.asarray(prompts.prefix_lengths).reshape(U, M * G)
    is_real = jnp.arange(width) < lengths[..., None]
    is_stop = jnp.any(tokens[..., None] == jnp.asarray(stop_ids, jnp.int32), axis=-1)
    has_ended = jnp.zeros(lengths.shape, bool)
    if prompts.prefix_ended is not None:
        has_ended = jnp.asarray(prompts.prefix_ended).reshape(lengths.shape)
    logprobs = jnp.zeros(tokens.shape, jnp.float32)
    if prompts.prefix_logprobs is not None:
        logprobs = jnp.asarray(prompts.prefix_logprobs).reshape(tokens.shape)
    return Given(
        tokens=jnp.where(is_real, tokens, 0),
        lengths=lengths,
        logprobs=jnp.where(is_real, logprobs, 0.0),
        is_done=has_ended | jnp.any(is_real & is_stop, axis=-1) | (lengths >= limit),
    )


@partial(jax.jit, static_argnames=("stop_ids", "limit"))
def max_continued_rows(prompts: Prompts, *, stop_ids: tuple[int, ...], limit: int):
    """Return the largest number of continued rows in a trunk, i32 scalar. Each needs a slot from the start."""
    given = given_rows(prompts, stop_ids, limit)
    is_real_UR = jnp.repeat(prompts.prompt_mask, prompts.row_ids.shape[-1], axis=1)
    return jnp.max(jnp.sum(is_real_UR & (given.lengths > 0) & ~given.is_done, axis=1), initial=0)


def start_order(is_real_UR, given: Given | None):
    """Return (rows of each trunk in starting order i32 [U, R], number to start i32 [U]); continued rows come first."""
    starts_UR, rank_UR = is_real_UR, ~is_real_UR
    if given is not None:
        starts_UR = is_real_UR & ~given.is_done
        rank_UR = jnp.where(starts_UR, jnp.where(given.lengths > 0, 0, 1), 2)
    return jnp.argsort(rank_UR, axis=1, stable=True).astype(jnp.int32), starts_UR.sum(1, dtype=jnp.int32)


def initial_written(num_trunks: int, num_rows: int, limit: int, is_real_UR, given: Given | None) -> Written:
    """Return the initial record: blank except for the given tokens."""
    shape = (num_trunks, num_rows, limit)
    written = Written(
        tokens=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
        mask=jnp.zeros(shape, bool),
        rejected=jnp.zeros(shape, bool),
    )
    if given is None:
        return written
    width = min(limit, given.tokens.shape[-1])
    mask = (jnp.arange(width) < given.lengths[..., None]) & is_real_UR[..., None]

    def put(blank, values):
        return blank.at[..., :width].set(jnp.where(mask, values[..., :width], jnp.zeros((), values.dtype)))

    return replace(
        written,
        tokens=put(written.tokens, given.tokens),
        logprobs=put(written.logprobs, given.logprobs),
        mask=written.mask.at[..., :width].set(mask),
    )


def load_last_given(flight: Flight, given: Given) -> Flight:
    """Make the last given token of each continued row its slot's pending token."""
    row = jnp.minimum(flight.row, given.tokens.shape[1] - 1)
    lengths_US = jnp.where(flight.row < EMPTY, jnp.take_along_axis(given.lengths, row, axis=1), 0)
    tokens_USC = jnp.take_along_axis(given.tokens, row[..., None], axis=1)
    last_US = jnp.take_along_axis(tokens_USC, jnp.maximum(lengths_US - 1, 0)[..., None], axis=-1)[..., 0]
    is_continued = lengths_US > 0
    return replace(
        flight,
        index=jnp.where(is_continued, lengths_US - 1, flight.index),
        token=jnp.where(is_continued, last_US, flight.token),
    )


def skip_continued(is_continued_US, before: Flight, after: Flight, entry: Entry) -> tuple[Flight, Entry]:
    """Undo the first draw for continued rows, which have not fed their pending token yet."""

    def pick(old, new):
        return jnp.where(is_continued_US, old, new)

    rows = {name: pick(getattr(before, name), getattr(after, name)) for name in ("row", "index", "token")}
    return replace(after, **rows), replace(entry, row=jnp.where(is_continued_US, EMPTY, entry.row))


@partial(jax.jit, static_argnames="config", donate_argnames="flight")
def prefill_rows(config: DecoderConfig, weights, stems: Stems, flight: Flight, given: Given) -> Flight:
    """Prefill the caches with each row's given tokens except the pending one, in the columns just before the clock.

    Args:
        weights: from `decoding.decoding_weights`.
    """
    columns = given.tokens.shape[-1] - 1
    if not columns:
        return flight
    chunk = min(_CHUNK, columns)
    row = jnp.minimum(flight.row, given.tokens.shape[1] - 1)
    fed_US = jnp.where(flight.row < EMPTY, jnp.take_along_axis(given.lengths, row, axis=1) - 1, 0)
    # Right-aligned: column j holds token j - (columns - fed).
    numbers_UST = jnp.arange(columns) - (columns - fed_US)[..., None]
    tokens_USC = jnp.take_along_axis(given.tokens, row[..., None], axis=1)
    tokens_UST = jnp.take_along_axis(tokens_USC, jnp.maximum(numbers_UST, 0), axis=-1)
    prompts = prompt_of(stems, flight)
    cuts, tail_lengths = (jnp.take_along_axis(x, prompts, axis=1) for x in (stems.cuts, stems.tail_lengths))
    positions_UST = (cuts + tail_lengths)[..., None] + jnp.maximum(numbers_UST, 0)
    columns_W = jnp.arange(window_of(flight))

    def feed(number, cache):
        # The last chunk may overlap the previous one and then writes the same keys and values again.
        first = jnp.minimum(number * chunk, columns - chunk)
        tokens, positions = (jax.lax.dynamic_slice_in_dim(x, first, chunk, axis=2) for x in (tokens_UST, positions_UST))
        queries_T = first + jnp.arange(chunk)
        is_given = columns_W >= (columns - fed_US)[..., None, None]
        own_mask = (columns_W <= queries_T[:, None]) & is_given
        visibility = Visibility(
            cuts=jnp.broadcast_to(cuts[..., None], tokens.shape),
            prompts=jnp.broadcast_to(prompts[..., None], tokens.shape),
            first=None,
            stem_layout=stems.stem_layout,
        )
        attend = decoding.attend_plain(config, stem_mask_of(visibility), own_mask, first)
        _, cache = decoding.extend(config, weights, tokens, positions, stems.kv, cache, attend)
        return cache

    cache = jax.lax.fori_loop(0, -(-columns // chunk), feed, flight.cache)
    return replace(flight, cache=cache, clock=flight.clock + columns)
