"""From bytes to a token: the longest vocabulary entry that begins a byte string, for many rows at once.

One cumulative pass hashes every prefix of a row. The hashes are looked up in the vocabulary's sorted hashes, and a hit
counts only if the bytes agree.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.types import record

_BASE = np.uint32(0x01000193)


@record
class VocabularyIndex:
    """A vocabulary's entries, sorted by hash; entries without bytes are left out of `hashes` and `ids`."""

    hashes: Any  # u32 [V'], sorted
    ids: Any  # i32 [V'], token of each hash
    table: Any  # u8 [V, W], bytes of each token, padding 0
    lengths: Any  # i32 [V], number of bytes


def _prefix_hashes(bytes_BW):
    """Hash the first w + 1 bytes of each row into [:, w], u32 [B, W]: h <- h * base + byte + 1 modulo 2^32."""

    def step(hash_B, byte_B):
        hash_B = hash_B * _BASE + byte_B.astype(jnp.uint32) + jnp.uint32(1)
        return hash_B, hash_B

    start = jnp.zeros(bytes_BW.shape[0], jnp.uint32)
    return jax.lax.scan(step, start, jnp.asarray(bytes_BW).T)[1].T


def vocabulary_index(byte_table: tuple[np.ndarray, np.ndarray]) -> VocabularyIndex:
    """Index `Tokenizer.byte_table()`. If several ids have the same bytes, look-ups return the lowest."""
    table, lengths = byte_table
    all_hashes = np.asarray(_prefix_hashes(table))
    hashes = np.where(lengths > 0, all_hashes[np.arange(len(table)), np.maximum(lengths, 1) - 1], 0)
    order = np.argsort(hashes, kind="stable")
    order = order[lengths[order] > 0]
    return VocabularyIndex(
        hashes=jnp.asarray(hashes[order]),
        ids=jnp.asarray(order.astype(np.int32)),
        table=jnp.asarray(table),
        lengths=jnp.asarray(lengths),
    )


@jax.jit
def longest_prefix_tokens(index: VocabularyIndex, bytes_BX, lengths_B):
    """Return the longest entry that is a prefix of each row's first `lengths` bytes, i32 [B]; -1 if there is none."""
    W = min(index.table.shape[1], bytes_BX.shape[1])
    window_BW = bytes_BX[:, :W]
    hashes_BW = _prefix_hashes(window_BW)
    # Different entries may share a hash, so the next entry is checked too.
    first_BW = jnp.searchsorted(index.hashes, hashes_BW)
    best_B = jnp.full(bytes_BX.shape[0], -1, jnp.int32)
    best_length_B = jnp.zeros(bytes_BX.shape[0], jnp.int32)
    for neighbour in range(2):
        ids_BW = index.ids[jnp.minimum(first_BW + neighbour, len(index.ids) - 1)]
        size_BW = index.lengths[ids_BW]
        columns = jnp.arange(W)
        agrees = (index.table[ids_BW][:, :, :W] == window_BW[:, None, :]) | (columns >= size_BW[..., None])
        hit = jnp.all(agrees, axis=-1) & (size_BW == columns + 1) & (size_BW <= lengths_B[:, None])
        length_B = jnp.max(jnp.where(hit, columns + 1, 0), axis=1)
        id_B = jnp.take_along_axis(ids_BW, jnp.maximum(length_B - 1, 0)[:, None], axis=1)[:, 0]
        best_B = jnp.where(length_B > best_length_B, id_B, best_B)
        best_length_B = jnp.maximum(best_length_B, length_B)
    return best_B
