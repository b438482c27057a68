"""Rows in flight: what their slots read, where each row is, and what has been written."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from rpt_jax.types import record

EMPTY = 2**30  # the row of an empty slot: beyond every array


@record
class Stems:
    """What the slots of a group read: a trunk's stem, its prompts, its rows. Leading dimension: groups of slots."""

    kv: Any  # keys and values of the stems, a pair per layer
    tail_hidden: Any  # [U, M, D], hidden state of each prompt's last token
    cuts: Any  # i32 [U, M]
    tail_lengths: Any  # i32 [U, M]
    stem_layout: Any  # i32 [U, P], as attention.Visibility
    keys: Any  # keys [U, R], of the rows' noise
    queue: Any  # i32 [U, R], rows in the order they are started, those of padded positions last
    num_queued: Any  # i32 [U], rows that are started


@record
class Flight:
    """Rows in their slots. The token in hand is drawn and written, but not yet fed."""

    clock: Any  # i32 [], tokens fed to every slot; column clock mod W of the caches is next
    trunk: Any  # i32 [U], the trunk that a group of slots belongs to
    num_started: Any  # i32 [U], rows of the queue that have had a slot
    row: Any  # i32 [U, S]; EMPTY where the slot is empty
    index: Any  # i32 [U, S], number of the token in hand in its completion; -1 before the first
    token: Any  # i32 [U, S], in hand
    cache: Any  # own keys and values per layer; their W columns are a ring of the last tokens fed


@record
class Written:
    """Completions so far, by row."""

    tokens: Any  # i32 [U, R, C]
    logprobs: Any  # f32 [U, R, C]
    mask: Any  # bool [U, R, C]
    rejected: Any  # bool [U, R, C], the token's first draw was refused


def window_of(flight: Flight) -> int:
    """W."""
    return flight.cache[0][1].shape[-2]


@record
class Entry:
    """What one step has drawn, for every slot."""

    row: Any  # i32 [U, S]; EMPTY: nothing
    index: Any  # i32 [U, S]
    token: Any  # i32 [U, S]
    logprob: Any  # f32 [U, S]
    rejected: Any  # bool [U, S]


def num_live(flight: Flight):
    """i32 [U], rows in each group's slots."""
    return jnp.sum(flight.row < EMPTY, axis=1, dtype=jnp.int32)


def num_waiting(stems: Stems, flight: Flight):
    """i32 [U], rows of each group's queue that have had no slot."""
    return stems.num_queued - flight.num_started


def start_waiting_rows(stems: Stems, flight: Flight) -> Flight:
    """Empty slots take the next rows of their trunk's queue."""
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
    """i32 [U, S]: the prompt of each slot's row; that of some row where the slot is empty."""
    R, M = stems.queue.shape[1], stems.cuts.shape[1]
    return jnp.minimum(flight.row, R - 1) // (R // M)
