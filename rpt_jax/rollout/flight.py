"""State of running rows: their shared stems, the slots they occupy, and the tokens recorded so far.

A slot is a place in the caches that one row occupies while it runs. A column is an index along the key axis of a cache.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from rpt_jax.types import record

EMPTY = 2**30  # row index of an empty slot: out of range of every array


@record
class Stems:
    """What a group of slots reads: its trunk's stem, prompts and rows. The leading dimension U counts groups."""

    kv: Any  # per layer (keys, values) of the stems in cache layout [U, K, ., .], activation dtype
    tail_hidden: Any  # [U, M, D], hidden state of each prompt's last token, activation dtype
    cuts: Any  # i32 [U, M], trunk tokens that each prompt sees
    tail_lengths: Any  # i32 [U, M], number of real tail tokens
    stem_layout: Any  # i32 [U, P], as Visibility.stem_layout
    tail_ends: Any  # i32 [U, M], stem column behind the tail of each prompt
    keys: Any  # PRNG keys [U, R], noise of each row
    queue: Any  # i32 [U, R], rows in starting order, those of padded positions last
    num_queued: Any  # i32 [U], number of rows to start
    limits: Any = None  # i32 [U, R], number of tokens at which each row is cut; None: at C


@record
class Flight:
    """Rows in their slots. A slot's pending token is drawn and recorded, but not yet fed to the model."""

    clock: Any  # i32 [], tokens fed to every slot so far; the next goes to column clock mod W of the caches
    trunk: Any  # i32 [U], trunk of each group of slots
    num_started: Any  # i32 [U], rows of the queue that have been started
    row: Any  # i32 [U, S], row in each slot; EMPTY if there is none
    index: Any  # i32 [U, S], index of the pending token in its completion; -1 before the first
    token: Any  # i32 [U, S], pending token
    cache: Any  # per layer (keys, values) of the rows [U, S, K, ., .]; W columns, a ring buffer of the last tokens fed


@record
class Written:
    """Completions so far, by row. Padding is 0 and False."""

    tokens: Any  # i32 [U, R, C]
    logprobs: Any  # f32 [U, R, C], of the untruncated distribution, nats
    mask: Any  # bool [U, R, C], recorded tokens
    rejected: Any  # bool [U, R, C], the first draw fell outside top-p / top-k


def window_of(flight: Flight) -> int:
    """Return W, the number of columns of the rows' caches."""
    return flight.cache[0][1].shape[-2]


@record
class Entry:
    """The tokens that one step drew, for every slot."""

    row: Any  # i32 [U, S]; EMPTY: no token
    index: Any  # i32 [U, S], index of the token in its completion
    token: Any  # i32 [U, S]
    logprob: Any  # f32 [U, S], nats
    rejected: Any  # bool [U, S], the first draw fell outside top-p / top-k


def num_live(flight: Flight):
    """Return the number of occupied slots of each group, i32 [U]."""
    return jnp.sum(flight.row < EMPTY, axis=1, dtype=jnp.int32)


def num_waiting(stems: Stems, flight: Flight):
    """Return the number of queued rows of each group, i32 [U]."""
    return stems.num_queued - flight.num_started


def start_waiting_rows(stems: Stems, flight: Flight) -> Flight:
    """Assign the next rows of each trunk's queue to its empty slots."""
    R = stems.queue.shape[1]
    is_empty = flight.row == EMPTY
    place = flight.num_started[:, None] + jnp.cumsum(is_empty, axis=1) - 1
    is_fresh = is_empty & (place < stems.num_queued[:, None])
    row = jnp.take_along_axis(stems.queue, jnp.minimum(place, R - 1), axis=1)
    return replace(
        flight,
        row=jnp.where(is_fresh, row, flight.row),
        index=jnp.where(is_fresh, -1, flight.index),
        num_started=flight.num_started + is_fresh.sum(1, dtype=jnp.int32),
    )


def prompt_of(stems: Stems, flight: Flight):
    """Return the prompt of each slot's row, i32 [U, S]; arbitrary but in range for empty slots."""
    R, M = stems.queue.shape[1], stems.cuts.shape[1]
    return jnp.minimum(flight.row, R - 1) // (R // M)
