"""Attention of one decoding step in two GPU kernels (Pallas, Triton): to the stem, and to the row's own tokens.

All rows of a trunk attend to their stem in blocks of queries. The stem's columns are split over programs, which write
partial sums. The second kernel adds a row's own tokens to them. It reads only the columns that the row has, and writes
its new key and value into its cache, a ring: the token fed `age` steps ago is `age` columns behind the current one.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import PartitionSpec

from rpt_jax.parallel.mesh import TRUNK_AXES, num_shards
from rpt_jax.types import record

# Stems and caches have a multiple of this many columns.
COLUMNS = 64
# Queries of a tensor-core product of the second kernel, of which J are real.
_HEADS = 16
_HIDDEN = -1e30
_LOG2E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Sizes of one kernel, measured on an H100."""

    columns: int
    """Columns of a tile; divides COLUMNS."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Tiles in flight."""
    queries: int = _HEADS
    """Queries of a program."""
    programs: int = 0
    """Programs that fill the GPU: a stem is split until there are this many."""

    @property
    def params(self):
        """Compiler parameters."""
        return plgpu.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages)


STEM = Tuning(columns=64, num_warps=4, num_stages=3, queries=64, programs=264)
OWN = Tuning(columns=32, num_warps=2, num_stages=3)


@record
class Spans:
    """Columns of its stem that each row sees: below `cut`, and from `first` up to `last`, the tail of its prompt."""

    cut: Any  # i32 [U, S]
    first: Any  # i32 [U, S]
    last: Any  # i32 [U, S], exclusive


def supports(dtype, head_size: int, num_queries_per_key: int) -> bool:
    """Return whether the kernels run with these: 16-bit activations, head sizes of 16, 32, 64, 128 or 256."""
    is_power_of_2 = head_size & (head_size - 1) == 0
    return jnp.dtype(dtype).itemsize == 2 and is_power_of_2 and 16 <= head_size <= 256 and num_queries_per_key <= _HEADS


def rounded_up(columns: int) -> int:
    """Return the number of columns that stems and caches have for the kernels."""
    return -(-columns // COLUMNS) * COLUMNS


def decode_attention(q_USHQ, k_USKQ, v_USKQ, stem_kv, spans: Spans, cache, column, lengths_US, *, interpret: bool):
    """Attend from one token per row to its stem, to the row's earlier tokens and to itself.

    Args:
        q_USHQ: rotated queries.
        k_USKQ, v_USKQ: keys and values of the same tokens.
        stem_kv: keys and values of the stems [U, K, P, Q].
        spans: what each row sees of its stem; at least one column.
        cache: keys and values of the rows [U, S, K, W, Q]; their buffers are reused.
        column: i32 scalar, cache column of these tokens.
        lengths_US: i32, earlier tokens of each row in the cache; at most W - 1.
        interpret: emulate the kernels, on any platform.
    Returns:
        (attended values [U, S, H, Q] in the queries' dtype, the updated cache).
    """
    attend = partial(_attend, interpret=interpret)
    arguments = (q_USHQ, k_USKQ, v_USKQ, stem_kv, spans, cache, jnp.reshape(column, (1,)), lengths_US)
    if num_shards(*TRUNK_AXES, "tensor") == 1:
        return attend(*arguments)
    trunks = TRUNK_AXES if q_USHQ.shape[0] % num_shards(*TRUNK_AXES) == 0 else None
    heads = "tensor" if k_USKQ.shape[2] % num_shards("tensor") == 0 else None
    by_row, by_trunk = PartitionSpec(trunks, None, heads), PartitionSpec(trunks, heads)
    rows = PartitionSpec(trunks)
    return jax.shard_map(
        attend,
        in_specs=(by_row, by_row, by_row, by_trunk, rows, by_row, PartitionSpec(), rows),
        out_specs=(by_row, by_row),
        check_vma=False,
    )(*arguments)


def _attend(q_USHQ, k_USKQ, v_USKQ, stem_kv, spans: Spans, cache, column_1, lengths_US, *, interpret: bool):
    U, S, H, Q = q_USHQ.shape
    K, J = k_USKQ.shape[2], H // k_USKQ.shape[2]
    # [U, K, X, Q]: the queries of a trunk that share a key, row by row, padded to whole blocks.
    block = min(STEM.queries, max(_HEADS, pl.next_power_of_2(S * J)))
    X = -(-S * J // block) * block
    q_UKXQ = jnp.moveaxis(q_USHQ.reshape(U, S, K, J, Q), 2, 1).reshape(U, K, S * J, Q)
    q_UKXQ = jnp.pad(q_UKXQ, ((0, 0), (0, 0), (0, X - S * J), (0, 0)))
    of_stem = _attend_to_stem(q_UKXQ, stem_kv, spans, num_heads=J, block=block, interpret=interpret)
    return _attend_to_own(
        q_UKXQ, of_stem, k_USKQ, v_USKQ, column_1, lengths_US, cache, num_heads=J, interpret=interpret
    )


def _attend_to_stem(q_UKXQ, stem_kv, spans: Spans, *, num_heads: int, block: int, interpret: bool):
    """Return partial sums [splits, U, K, X, Q], and f32 [splits, U, K, X] maxima in base 2 and sums of weights."""
    (U, K, X, Q), P = q_UKXQ.shape, stem_kv[0].shape[2]

    def of_queries(x_US):
        x_UX = jnp.repeat(x_US, num_heads, axis=1)
        return jnp.pad(x_UX, ((0, 0), (0, X - x_UX.shape[1])), mode="edge")

    splits = max(1, min(P // STEM.columns, STEM.programs // (U * K * (X // block)), 16))
    stem_block = pl.BlockSpec((None, None, P, Q), lambda g, b, i: (g // K, g % K, 0, 0))
    span_block = pl.BlockSpec((None, block), lambda g, b, i: (g // K, b))
    number_block = pl.BlockSpec((None, None, None, block), lambda g, b, i: (i, g // K, g % K, b))
    return pl.pallas_call(
        partial(_stem_kernel, num_splits=splits),
        grid=(U * K, X // block, splits),
        in_specs=[
            pl.BlockSpec((None, None, block, Q), lambda g, b, i: (g // K, g % K, b, 0)),
            *[stem_block] * 2,
            *[span_block] * 3,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, block, Q), lambda g, b, i: (i, g // K, g % K, b, 0)),
            *[number_block] * 2,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((splits, U, K, X, Q), q_UKXQ.dtype),
            *[jax.ShapeDtypeStruct((splits, U, K, X), jnp.float32)] * 2,
        ],
        compiler_params=STEM.params,
        interpret=interpret,
        name="stem_attention",
    )(q_UKXQ, *stem_kv, *map(of_queries, (spans.cut, spans.first, spans.last)))


def _attend_to_own(q_UKXQ, of_stem, k_USKQ, v_USKQ, column_1, lengths_US, cache, *, num_heads: int, interpret: bool):
    """Add a row's own tokens to what its queries found in the stem; return values [U, S, K * J, Q] and the cache."""
    (U, S, K, Q), X, W, J = k_USKQ.shape, q_UKXQ.shape[2], cache[0].shape[3], num_heads
    splits = of_stem[0].shape[0]
    row_block = pl.BlockSpec((None, None, None, Q), lambda u, s, k: (u, s, k, 0))
    number_block = pl.BlockSpec((splits, None, None, X), lambda u, s, k: (0, u, k, 0))
    cache_block = pl.BlockSpec((None, None, None, W, Q), lambda u, s, k: (u, s, k, 0, 0))
    attended, *cache = pl.pallas_call(
        partial(_own_kernel, num_heads=J),
        grid=(U, S, K),
        in_specs=[
            pl.BlockSpec((None, None, X, Q), lambda u, s, k: (u, k, 0, 0)),
            pl.BlockSpec((splits, None, None, X, Q), lambda u, s, k: (0, u, k, 0, 0)),
            *[number_block] * 2,
            *[row_block] * 2,
            pl.BlockSpec((1,), lambda u, s, k: (0,)),
            pl.BlockSpec((None, S), lambda u, s, k: (u, 0)),
            *[cache_block] * 2,
        ],
        out_specs=[pl.BlockSpec((None, None, J, Q), lambda u, s, k: (u, s, k, 0)), *[cache_block] * 2],
        out_shape=[
            jax.ShapeDtypeStruct((U, S, K * J, Q), q_UKXQ.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache),
        ],
        input_output_aliases={8: 1, 9: 2},
        compiler_params=OWN.params,
        interpret=interpret,
        name="own_attention",
    )(q_UKXQ, *of_stem, k_USKQ, v_USKQ, column_1, lengths_US, *cache)
    return attended, tuple(cache)


_dot = partial(jnp.dot, preferred_element_type=jnp.float32)


def _attend_to_tile(carry, q_XQ, k_SQ, v_SQ, mask_XS=None):
    """Add a tile of columns to (weighted sums f32 [X, Q], maxima f32 [X] in base 2, weight sums f32 [X])."""
    sums_XQ, peak_X, total_X = carry
    scores_XS = _dot(q_XQ, k_SQ.T) * (_LOG2E * q_XQ.shape[-1] ** -0.5)
    if mask_XS is not None:
        scores_XS = jnp.where(mask_XS, scores_XS, _HIDDEN)
    new_peak_X = jnp.maximum(peak_X, scores_XS.max(axis=1))
    weights_XS = jnp.exp2(scores_XS - new_peak_X[:, None])
    if mask_XS is not None:
        # A row that has seen nothing has the peak of a hidden column, whose weight would be 1.
        weights_XS = jnp.where(mask_XS, weights_XS, 0.0)
    scale_X = jnp.exp2(peak_X - new_peak_X)
    sums_XQ = sums_XQ * scale_X[:, None] + _dot(weights_XS.astype(v_SQ.dtype), v_SQ)
    return sums_XQ, new_peak_X, total_X * scale_X + weights_XS.sum(axis=1)


def _stem_kernel(q_ref, k_ref, v_ref, cut_ref, first_ref, last_ref, sums_ref, peak_ref, total_ref, *, num_splits):
    q_XQ, cut_X, first_X, last_X = q_ref[...], cut_ref[...], first_ref[...], last_ref[...]
    (X, Q), width = q_XQ.shape, STEM.columns

    def attend(tile, carry, *, is_masked):
        columns = pl.ds(tile * width, width)
        mask_XS = None
        if is_masked:
            column_S = tile * width + jnp.arange(width)
            in_tail = (column_S >= first_X[:, None]) & (column_S < last_X[:, None])
            mask_XS = (column_S < cut_X[:, None]) | in_tail
        return _attend_to_tile(carry, q_XQ, k_ref[columns, :], v_ref[columns, :], mask_XS)

    # Tiles that every query sees whole, those that reach the last cut, and those of the tails, without gaps between.
    whole, trunk = jnp.min(cut_X) // width, (jnp.max(cut_X) + width - 1) // width
    tail = jnp.maximum(jnp.min(first_X) // width, trunk)
    num_tiles = trunk + jnp.maximum((jnp.max(last_X) + width - 1) // width - tail, 0)
    split = pl.program_id(2)
    begin, end = split * num_tiles // num_splits, (split + 1) * num_tiles // num_splits

    def attend_masked(number, carry):
        return attend(jnp.where(number < trunk, number, tail + number - trunk), carry, is_masked=True)

    carry = jnp.zeros((X, Q), jnp.float32), jnp.full(X, _HIDDEN, jnp.float32), jnp.zeros(X, jnp.float32)
    middle = jnp.clip(whole, begin, end)
    carry = jax.lax.fori_loop(begin, middle, partial(attend, is_masked=False), carry)
    sums_XQ, peak_ref[...], total_ref[...] = jax.lax.fori_loop(middle, end, attend_masked, carry)
    sums_ref[...] = sums_XQ.astype(sums_ref.dtype)


def _own_kernel(
    q_ref, sums_ref, peak_ref, total_ref, new_k_ref, new_v_ref, column_ref, lengths_ref, k_in_ref, v_in_ref,
    attended_ref, k_ref, v_ref, *, num_heads,
):  # fmt: skip
    s, W, width = pl.program_id(1), k_ref.shape[0], OWN.columns
    heads_X, columns_Q = jnp.arange(_HEADS), jnp.arange(q_ref.shape[1])
    is_head_X = heads_X < num_heads
    is_head_XQ = jnp.broadcast_to(is_head_X[:, None], (_HEADS, q_ref.shape[1]))
    rows_X = s * num_heads + heads_X

    def of_row(ref, *index):
        """Load the row's queries, or numbers of them; 0 for those that fill up the product."""
        is_matrix = len(ref.shape) == len(index) + 2
        where = (*index, rows_X[:, None], columns_Q[None]) if is_matrix else (*index, rows_X)
        return plgpu.load(ref.at[where], mask=is_head_XQ if is_matrix else is_head_X, other=0)

    q_XQ = of_row(q_ref)
    new_k_Q, new_v_Q = new_k_ref[...], new_v_ref[...]
    column, length = column_ref[0], lengths_ref[s]

    # The token itself comes from registers; its column is written at the end.
    products_XQ = q_XQ.astype(jnp.float32) * new_k_Q.astype(jnp.float32)
    peak_X = products_XQ.sum(axis=1) * (_LOG2E * q_XQ.shape[-1] ** -0.5)
    carry = jnp.broadcast_to(new_v_Q.astype(jnp.float32), q_XQ.shape), peak_X, jnp.ones(_HEADS, jnp.float32)
    for split in range(sums_ref.shape[0]):
        carry = _merged(carry, tuple(of_row(ref, split) for ref in (sums_ref, peak_ref, total_ref)))

    # Tiles from the one that holds the row's first column, around the ring.
    first = (column - length + W) % W
    first_tile, offset = first // width, first % width

    def attend(number, carry):
        columns = pl.ds((first_tile + number) % (W // width) * width, width)
        token_S = number * width - offset + jnp.arange(width)
        mask_XS = jnp.broadcast_to((token_S >= 0) & (token_S < length), (_HEADS, width))
        return _attend_to_tile(carry, q_XQ, k_in_ref[columns, :], v_in_ref[columns, :], mask_XS)

    num_tiles = jnp.where(length > 0, (offset + length + width - 1) // width, 0)
    sums_XQ, _, total_X = jax.lax.fori_loop(0, num_tiles, attend, carry)
    attended_XQ = (sums_XQ / total_X[:, None]).astype(attended_ref.dtype)
    plgpu.store(attended_ref.at[heads_X[:, None], columns_Q[None]], attended_XQ, mask=is_head_XQ)
    k_ref[column, :], v_ref[column, :] = new_k_Q, new_v_Q


def _merged(a, b):
    """Add up two parts: weighted sums [X, Q], maxima f32 [X] in base 2, weight sums f32 [X]."""
    (sums_a_XQ, peak_a_X, total_a_X), (sums_b_XQ, peak_b_X, total_b_X) = a, b
    peak_X = jnp.maximum(peak_a_X, peak_b_X)
    scale_a_X, scale_b_X = jnp.exp2(peak_a_X - peak_X), jnp.exp2(peak_b_X - peak_X)
    sums_XQ = sums_a_XQ * scale_a_X[:, None] + sums_b_XQ.astype(jnp.float32) * scale_b_X[:, None]
    return sums_XQ, peak_X, total_a_X * scale_a_X + total_b_X * scale_b_X
