"""Rows that go on: a completion's first tokens are given, and prefilled into the row's own cache.

With equal parameters a row that was stopped and goes on is the row that never stopped, but for near-ties: its noise is
keyed by the step that it was born in and by the token's index, and only the rounding of products of other shapes
differs.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decoder
from rpt_jax.models.attention import Visibility, stem_mask_of
from rpt_jax.rollout.flight import EMPTY, Entry, Flight, Stems, Written, prompt_of, window_of
from rpt_jax.types import Prompts, record

# Given tokens of each row that run at once.
_CHUNK = 64


@record
class Given:
    """What is given of each row of a batch."""

    tokens: Any  # i32 [U, R, C'], right-padded
    lengths: Any  # i32 [U, R], 0: the row begins anew
    logprobs: Any  # f32 [U, R, C'], that the tokens were sampled with; 0 where nobody knows
    is_done: Any  # bool [U, R], a stop token or the limit is among them: nothing is left to draw


def given_rows(prompts: Prompts, stop_ids: tuple[int, ...], limit: int) -> Given | None:
    """The given tokens of a batch; None where every row begins anew."""
    if prompts.prefix_tokens is None:
        return None
    U, M, G, width = prompts.prefix_tokens.shape
    tokens = jnp.asarray(prompts.prefix_tokens).reshape(U, M * G, width)
    lengths = jnp.asarray(prompts.prefix_lengths).reshape(U, M * G)
    is_real = jnp.arange(width) < lengths[..., None]
    is_stop = jnp.any(tokens[..., None] == jnp.asarray(stop_ids, jnp.int32), axis=-1)
    logprobs = jnp.zeros(tokens.shape, jnp.float32)
    if prompts.prefix_logprobs is not None:
        logprobs = jnp.asarray(prompts.prefix_logprobs).reshape(tokens.shape)
    return Given(
        tokens=jnp.where(is_real, tokens, 0),
        lengths=lengths,
        logprobs=jnp.where(is_real, logprobs, 0.0),
        is_done=jnp.any(is_real & is_stop, axis=-1) | (lengths >= limit),
    )


@partial(jax.jit, static_argnames=("stop_ids", "limit"))
def max_continued_rows(prompts: Prompts, *, stop_ids: tuple[int, ...], limit: int):
    """i32: rows of one trunk that go on, at most. Each needs a slot from the start."""
    given = given_rows(prompts, stop_ids, limit)
    is_real_UR = jnp.repeat(prompts.prompt_mask, prompts.row_ids.shape[-1], axis=1)
    return jnp.max(jnp.sum(is_real_UR & (given.lengths > 0) & ~given.is_done, axis=1), initial=0)


def start_order(is_real_UR, given: Given | None):
    """(rows of each trunk in the order they start i32 [U, R], how many start i32 [U]). Rows that go on come first."""
    starts_UR, rank_UR = is_real_UR, ~is_real_UR
    if given is not None:
        starts_UR = is_real_UR & ~given.is_done
        rank_UR = jnp.where(starts_UR, jnp.where(given.lengths > 0, 0, 1), 2)
    return jnp.argsort(rank_UR, axis=1, stable=True).astype(jnp.int32), starts_UR.sum(1, dtype=jnp.int32)


def initial_written(num_trunks: int, num_rows: int, limit: int, is_real_UR, given: Given | None) -> Written:
    """Nothing but what is given."""
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
    """Slots of rows that go on hold the last token that is given."""
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
    """A first draw as it is for the other slots: rows that go on have not fed their token in hand yet."""

    def pick(old, new):
        return jnp.where(is_continued_US, old, new)

    rows = {name: pick(getattr(before, name), getattr(after, name)) for name in ("row", "index", "token")}
    return replace(after, **rows), replace(entry, row=jnp.where(is_continued_US, EMPTY, entry.row))


@partial(jax.jit, static_argnames="config", donate_argnames="flight")
def prefill_rows(config: DecoderConfig, weights, stems: Stems, flight: Flight, given: Given) -> Flight:
    """The caches with what is given of each row, all but its token in hand, in the columns just before the clock.

    Args:
        weights: from `decoder.decoding_weights`.
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
        # The last chunk may overlap the one before: its keys and values are the same again.
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
        _, cache = decoder.extend(
            config, weights, tokens, positions, stems.kv, stem_mask_of(visibility), cache, first, own_mask
        )
        return cache

    cache = jax.lax.fori_loop(0, -(-columns // chunk), feed, flight.cache)
    return replace(flight, cache=cache, clock=flight.clock + columns)
