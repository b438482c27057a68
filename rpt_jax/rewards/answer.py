"""From completion tokens to prediction bytes, on the device: the string in the last \\boxed{} after the last </think>.

Tokens may split a mark in any way, so a finite automaton over bytes finds the marks; its step for a whole token is
tabulated once per vocabulary (`answer_tables`). Only a window of fixed size is expanded to bytes. Nothing is stripped:
spaces and newlines belong to the answer (arXiv:2506.08007 §3.3).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.tokenizer import BOX_OPEN, THINK_CLOSE
from rpt_jax.types import record

_MODES = ("balanced", "tail", "balanced_then_tail")
_DEFAULT_MAX_BYTES = 1024


@record
class Predictions:
    """Predictions of completions. A row without one has length 0 and found False."""

    bytes: Any  # u8 [B, X], zero-padded
    lengths: Any  # i32 [B], length of the prediction in bytes; more than X if the window truncated it
    found: Any  # bool [B], there is a closed box, possibly empty
    think_end_tokens: Any  # i32 [B], number of tokens up to the end of the last </think>; 0: there is none


@record
class AnswerTables:
    """The effect of each token on the scan for marks and braces; from `answer_tables`."""

    think_next: Any  # i32 [V, 8], automaton state after the token, by the state before it
    think_end: Any  # i32 [V, 8], bytes of the token up to the end of the last </think> it completes; 0: none
    box_next: Any  # i32 [V, 7], as think_next, for the box
    box_end: Any  # i32 [V, 7], as think_end, for the box
    escape_next: Any  # i32 [V, 2], 1 if the token leaves a backslash that escapes the next byte, by the same before it
    net: Any  # i32 [V, 2], opening minus closing braces, by whether the first byte is escaped
    low: Any  # i32 [V, 2], lowest running brace count within the token; at most 0
    last_close: Any  # i32 [V, 2], bytes up to and including the last closing brace; 0: none


@record
class _Text:
    """Completions in bytes: the place of each token, and the vocabulary's bytes."""

    tokens: Any  # i32 [B, C], 0 where the mask is False
    escaped: Any  # i32 [B, C], 1 if a backslash before the token escapes its first byte
    mask: Any  # bool [B, C]
    starts: Any  # i32 [B, C], byte position of the token's first byte
    ends: Any  # i32 [B, C], byte position after its last byte
    byte_table: Any  # u8 [V, W]
    byte_lengths: Any  # i32 [V]


@record
class _Mark:
    """The last mark of each row; without one, all but `found` is arbitrary."""

    token: Any  # i32 [B], index of the token that completes it
    offset: Any  # i32 [B], bytes of that token up to the mark's end
    position: Any  # i32 [B], byte position after the mark
    found: Any  # bool [B], there is a mark


def _automaton(mark: str, table_VW, lengths_V):
    """Compute the transitions of the automaton that finds `mark`, for every token and state.

    In state s, the last bytes are the mark's first s, and in the last state any number of spaces: LaTeX allows them
    between a command and its brace. The first byte of a mark does not recur in it, so a failed match falls back to
    state 1 or 0, and matches cannot overlap.
    """
    pattern = jnp.frombuffer(mark.encode(), jnp.uint8)
    size, last = len(mark), len(mark) - 1
    V, W = table_VW.shape
    may_wait = mark.endswith("{")

    def step(w, state, end):
        byte = table_VW[:, w][:, None]
        active = (w < lengths_V)[:, None]
        advanced = jnp.where(byte == pattern[state], state + 1, (byte == pattern[0]).astype(jnp.int32))
        if may_wait:
            advanced = jnp.where((state == last) & (byte == ord(" ")), last, advanced)
        end = jnp.where(active & (advanced == size), w + 1, end)
        return jnp.where(active, advanced % size, state), end

    state = jnp.broadcast_to(jnp.arange(size), (V, size))
    end = jnp.zeros((V, size), jnp.int32)
    head = min(last, W)
    state, end = jax.lax.fori_loop(0, head, lambda w, c: step(w, *c), (state, end))
    # After size - 1 bytes of a token, only the last state still depends on earlier tokens: through spaces.
    ends = np.array([0, last])
    inner, inner_end = jax.lax.fori_loop(
        head, W, lambda w, c: step(w, *c), (state[:, ends], jnp.zeros((V, 2), jnp.int32))
    )
    which = (np.arange(size) == last).astype(int)
    is_long = (lengths_V >= last)[:, None]
    return jnp.where(is_long, inner[:, which], state), jnp.maximum(end, inner_end[:, which])


@jax.jit
def answer_tables(byte_table_VW, byte_lengths_V) -> AnswerTables:
    """Tabulate a vocabulary once, for every call of `extract_predictions`.

    Args:
        byte_table_VW: u8, from `Tokenizer.byte_table()`.
        byte_lengths_V: i32, likewise.
    """
    byte_table_VW, byte_lengths_V = jnp.asarray(byte_table_VW), jnp.asarray(byte_lengths_V)
    think_next, think_end = _automaton(THINK_CLOSE, byte_table_VW, byte_lengths_V)
    box_next, box_end = _automaton(BOX_OPEN, byte_table_VW, byte_lengths_V)
    W = byte_table_VW.shape[1]
    mask_VW = jnp.arange(W) < byte_lengths_V[:, None]
    # A brace after an unescaped backslash is text. Column e: the first byte is escaped (1) or not (0).
    escaped = [_escaped(byte_table_VW, jnp.full(len(byte_lengths_V), e)) for e in (0, 1)]
    braces = [_braces(byte_table_VW, mask_VW & ~escaped_VW) for escaped_VW in escaped]

    def by_escape(of_braces):
        return jnp.stack([of_braces(braces_VW) for braces_VW in braces], axis=-1)

    last_V = jnp.maximum(byte_lengths_V - 1, 0)
    leaves = [_at((byte_table_VW == ord("\\")) & ~escaped_VW, last_V) for escaped_VW in escaped]
    is_empty = byte_lengths_V == 0
    return AnswerTables(
        think_next=think_next,
        think_end=think_end,
        box_next=box_next,
        box_end=box_end,
        escape_next=jnp.stack([jnp.where(is_empty, e, leaves[e]) for e in (0, 1)], axis=-1).astype(jnp.int32),
        net=by_escape(lambda braces_VW: braces_VW.sum(-1)),
        low=by_escape(lambda braces_VW: jnp.minimum(0, jnp.cumsum(braces_VW, axis=-1).min(-1))),
        last_close=by_escape(lambda braces_VW: jnp.max(jnp.where(braces_VW < 0, jnp.arange(1, W + 1), 0), axis=-1)),
    )


def _escaped(bytes_BW, first_B):
    """Return the bytes that an unescaped backslash precedes, bool [B, W]; first_B: i32, 1 if the first byte is one."""
    W = bytes_BW.shape[1]
    is_other = bytes_BW != ord("\\")
    # A byte is escaped if an odd number of backslashes stands directly before it.
    last_other = jax.lax.cummax(jnp.where(is_other, jnp.arange(W), -1), axis=1)
    before = jnp.pad(last_other[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    count = jnp.arange(W) - 1 - before + jnp.where(before < 0, first_B[:, None], 0)
    return count % 2 == 1


def _braces(bytes_, mask):
    """Return +1 at opening braces, -1 at closing ones, 0 elsewhere."""
    return jnp.where(mask, (bytes_ == ord("{")).astype(jnp.int32) - (bytes_ == ord("}")), 0)


def _at(array_BC, index_B):
    return jnp.take_along_axis(array_BC, index_B[:, None], axis=1)[:, 0]


def _last(flags_BC):
    """Return (index of the last True, any True) per row."""
    C = flags_BC.shape[1]
    return jnp.max(jnp.where(flags_BC, jnp.arange(C), 0), axis=1), jnp.any(flags_BC, axis=1)


def _first(flags_BC):
    return jnp.argmax(flags_BC, axis=1), jnp.any(flags_BC, axis=1)


def _lay_out(tokens_BC, mask_BC, byte_table_VW, byte_lengths_V, tables: AnswerTables) -> _Text:
    byte_table_VW, byte_lengths_V = jnp.asarray(byte_table_VW), jnp.asarray(byte_lengths_V)
    tokens_BC = jnp.where(mask_BC, tokens_BC, 0)
    ends_BC = jnp.cumsum(jnp.where(mask_BC, byte_lengths_V[tokens_BC], 0), axis=1)

    def escape(escaped_B, inputs):
        token_B, mask_B = inputs
        return jnp.where(mask_B, tables.escape_next[token_B, escaped_B], escaped_B), escaped_B

    start_B = jnp.zeros(tokens_BC.shape[0], jnp.int32)
    return _Text(
        tokens=tokens_BC,
        escaped=jax.lax.scan(escape, start_B, (tokens_BC.T, mask_BC.T))[1].T,
        mask=mask_BC,
        starts=jnp.pad(ends_BC[:, :-1], ((0, 0), (1, 0))),
        ends=ends_BC,
        byte_table=byte_table_VW,
        byte_lengths=byte_lengths_V,
    )


def _last_mark(text: _Text, mark_end_BC) -> _Mark:
    """Locate the last mark, given the bytes of each token up to the end of the last mark it completes (0: none)."""
    token_B, found_B = _last(mark_end_BC > 0)
    offset_B = _at(mark_end_BC, token_B)
    return _Mark(token=token_B, offset=offset_B, position=_at(text.starts, token_B) + offset_B, found=found_B)


def _scan_marks(tables: AnswerTables, text: _Text):
    """Return bytes of each token up to the end of the last mark it completes, i32 [B, C]: for </think>, for the box."""

    def step(states, inputs):
        think, box = states
        token_B, mask_B = inputs
        ends = (
            jnp.where(mask_B, tables.think_end[token_B, think], 0),
            jnp.where(mask_B, tables.box_end[token_B, box], 0),
        )
        think = jnp.where(mask_B, tables.think_next[token_B, think], think)
        box = jnp.where(mask_B, tables.box_next[token_B, box], box)
        return (think, box), ends

    start = jnp.zeros(text.tokens.shape[0], jnp.int32)
    _, (think_end_CB, box_end_CB) = jax.lax.scan(step, (start, start), (text.tokens.T, text.mask.T))
    return think_end_CB.T, box_end_CB.T


def _balanced_close(tables: AnswerTables, text: _Text, box: _Mark):
    """Return (byte position of the brace that balances the box, whether there is one), each [B].

    The box's token is read from its byte offset on, later tokens through their tabulated brace counts. Only the token
    that closes the box is read byte by byte.
    """
    C, W = text.tokens.shape[1], text.byte_table.shape[1]

    def depth_inside(index_B, depth_B, from_byte_B):
        token_B = _at(text.tokens, index_B)
        bytes_BW = text.byte_table[token_B]
        inside_BW = (jnp.arange(W) >= from_byte_B[:, None]) & (jnp.arange(W) < text.byte_lengths[token_B][:, None])
        inside_BW &= ~_escaped(bytes_BW, _at(text.escaped, index_B))
        return depth_B[:, None] + jnp.cumsum(_braces(bytes_BW, inside_BW), axis=1)

    depth_BW = depth_inside(box.token, jnp.ones_like(box.token), box.offset)
    near_offset_B, near_B = _first(depth_BW == 0)

    later_BC = (jnp.arange(C) > box.token[:, None]) & text.mask
    net_BC = jnp.where(later_BC, tables.net[text.tokens, text.escaped], 0)
    before_BC = depth_BW[:, -1:] + jnp.cumsum(net_BC, axis=1) - net_BC
    far_token_B, far_B = _first(later_BC & (before_BC + tables.low[text.tokens, text.escaped] <= 0))
    far_depth_BW = depth_inside(far_token_B, _at(before_BC, far_token_B), jnp.zeros_like(far_token_B))
    far_offset_B, _ = _first(far_depth_BW == 0)

    token_B = jnp.where(near_B, box.token, far_token_B)
    return _at(text.starts, token_B) + jnp.where(near_B, near_offset_B, far_offset_B), near_B | far_B


def _box_end(mode: str, tables: AnswerTables, text: _Text, box: _Mark):
    """Return (byte position of the box's end, whether there is one), each [B], by the mode's rule."""
    balanced_end_B, balanced_B = _balanced_close(tables, text, box)
    if mode == "balanced":
        return balanced_end_B, balanced_B
    tail_end_B = _last_mark(text, jnp.where(text.mask, tables.last_close[text.tokens, text.escaped], 0)).position - 1
    has_tail_B = tail_end_B >= box.position
    if mode == "tail":
        return tail_end_B, has_tail_B
    use_tail_B = has_tail_B & (~balanced_B | (balanced_end_B == box.position))
    return jnp.where(use_tail_B, tail_end_B, balanced_end_B), balanced_B | has_tail_B


def _bytes_from(text: _Text, position_B, width: int):
    """Return the completion's bytes from a position on, u8 [B, width]; arbitrary past its end."""
    C, W = text.tokens.shape[1], text.byte_table.shape[1]
    positions_BX = position_B[:, None] + jnp.arange(width)
    index_BX = jax.vmap(partial(jnp.searchsorted, side="right"))(text.ends, positions_BX)
    index_BX = jnp.minimum(index_BX, C - 1)
    offset_BX = positions_BX - jnp.take_along_axis(text.starts, index_BX, axis=1)
    return text.byte_table[jnp.take_along_axis(text.tokens, index_BX, axis=1), jnp.clip(offset_BX, 0, W - 1)]


def _unescape_newlines(bytes_BX, lengths_B):
    """Replace each backslash-n by a newline and close the gaps."""
    B, X = bytes_BX.shape
    inside = jnp.arange(X) < lengths_B[:, None]
    following = jnp.pad(bytes_BX[:, 1:], ((0, 0), (0, 1)))
    starts = inside & (bytes_BX == ord("\\")) & (following == ord("n")) & (jnp.arange(X) + 1 < lengths_B[:, None])
    dropped = jnp.pad(starts[:, :-1], ((0, 0), (1, 0)))
    target = jnp.where(dropped | ~inside, X, jnp.arange(X) - jnp.cumsum(dropped, axis=1))
    replaced = jnp.where(starts, jnp.uint8(ord("\n")), bytes_BX)
    out = jnp.zeros((B, X), jnp.uint8).at[jnp.arange(B)[:, None], target].set(replaced, mode="drop")
    return out, lengths_B - dropped.sum(1)


def _read(text: _Text, position_B, lengths_B, X: int, unescape_newline: bool):
    """Return (first X bytes of the strings at these positions, zero-padded; their full lengths)."""
    # Unescaping shortens a prediction by at most half.
    width = 2 * X if unescape_newline else X
    bytes_BX = _bytes_from(text, position_B, width)
    bytes_BX = jnp.where(jnp.arange(width) < lengths_B[:, None], bytes_BX, 0).astype(jnp.uint8)
    if unescape_newline:
        bytes_BX, lengths_B = _unescape_newlines(bytes_BX, lengths_B)
    return bytes_BX[:, :X], lengths_B


@partial(jax.jit, static_argnames=("mode", "require_think_end", "unescape_newline", "max_prediction_bytes"))
def extract_predictions(
    tokens_BC,
    mask_BC,
    byte_table_VW,
    byte_lengths_V,
    *,
    mode: str,
    require_think_end: bool = True,
    unescape_newline: bool = False,
    max_prediction_bytes: int | None = None,
    tables: AnswerTables | None = None,
) -> Predictions:
    """Extract the whole string inside the last \\boxed{} after the last </think>. Source: arXiv:2506.08007 §3.3.

    Args:
        tokens_BC: i32, completion tokens; in [0, V) where the mask is True.
        mask_BC: bool, real tokens.
        byte_table_VW: u8, from `Tokenizer.byte_table()`. Special tokens have no bytes.
        byte_lengths_V: i32, likewise.
        mode: balanced (up to the brace that balances the box), tail (up to the completion's last brace),
            balanced_then_tail (tail if balanced finds no end, or an empty box while braces remain). An escaped brace is
            text, and spaces may separate the command from its brace.
        require_think_end: a prediction needs a </think> before it; False: use the last box of the whole completion.
        unescape_newline: read backslash-n as a newline.
        max_prediction_bytes: X; None: as many as possible, at most 1024.
        tables: `answer_tables(byte_table_VW, byte_lengths_V)`; None: computed at every call.
    Returns:
        Predictions.
    Raises:
        ValueError: unknown mode.
    """
    if mode not in _MODES:
        raise ValueError(f"mode {mode!r}; it must be one of {_MODES}")
    tables = answer_tables(byte_table_VW, byte_lengths_V) if tables is None else tables
    text = _lay_out(tokens_BC, mask_BC, byte_table_VW, byte_lengths_V, tables)
    X = max_prediction_bytes or min(tokens_BC.shape[1] * text.byte_table.shape[1], _DEFAULT_MAX_BYTES)
    think, box = (_last_mark(text, end_BC) for end_BC in _scan_marks(tables, text))
    # Marks cannot overlap, so the box follows </think> iff it ends later.
    allowed_B = box.found & (think.found & (box.position > think.position) if require_think_end else True)
    end_B, closed_B = _box_end(mode, tables, text, box)
    found_B = allowed_B & closed_B
    lengths_B = jnp.where(found_B, end_B - box.position, 0)
    bytes_BX, lengths_B = _read(text, box.position, lengths_B, X, unescape_newline)
    think_end_B = jnp.where(think.found, think.token + 1, 0)
    return Predictions(bytes=bytes_BX, lengths=lengths_B, found=found_B, think_end_tokens=think_end_B)
