"""One token per row: exact inverse-CDF sampling that also returns the token's log-probability.

Noise is keyed by (seed, step, row id, token index), never by device, slot or process, so the same rows draw the same
noise on any mesh.
"""

import jax
import jax.numpy as jnp

_BLOCK = 128


def row_keys(key, row_ids):
    """Return one PRNG key per row, shaped like `row_ids`; key: a single one, or [U] for the leading dimension."""
    fold = jax.random.fold_in
    if key.ndim:
        return jax.vmap(row_keys)(key, row_ids)
    for _ in range(row_ids.ndim):
        fold = jax.vmap(fold, in_axes=(None, 0))
    return fold(key, row_ids)


def uniform(keys, token_index, draw):
    """Return f32 noise in [0, 1) per key, for draw number `draw` of a row's token; above 0 after rejections."""

    def one(key, token_index):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, token_index), draw))

    for _ in range(keys.ndim):
        one = jax.vmap(one)
    return one(keys, jnp.broadcast_to(token_index, keys.shape))


def _blocks(logits):
    """Reshape to [..., blocks, _BLOCK], padded with -inf.

    Sums over all logits go by blocks: XLA's CPU backend then computes and sums the values in one pass.
    """
    *lead, V = logits.shape
    num_blocks = -(-V // _BLOCK)
    padding = [(0, 0)] * len(lead) + [(0, num_blocks * _BLOCK - V)]
    return jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(*lead, num_blocks, _BLOCK)


def _draw(logits, weight_of, floor, uniform):
    """Draw an index in proportion to its weight, from one uniform in [0, 1) per row; return (index, sum of weights).

    Two levels: weights are summed by blocks, the block is found in the cumulative sums, then its entry. The
    weights of all entries are summed as they are computed and never stored. Entries of weight 0 are never drawn.

    Args:
        logits: f32 [..., V].
        weight_of: logits [..., any] or [..., blocks, any] -> weights.
        floor: f32 [...], logits at or below it are excluded; None: all count.
        uniform: f32 [...], in [0, 1).
    """
    *lead, V = logits.shape

    def weights(some):
        """Weights of logits [..., any] or [..., blocks, any]."""
        lift = (..., *(None,) * (some.ndim - len(lead)))
        some_weights = weight_of(some)
        return some_weights if floor is None else jnp.where(some > floor[lift], some_weights, 0.0)

    block_sums = weights(_blocks(logits)).sum(-1)
    ends = jnp.cumsum(block_sums, axis=-1)
    point = uniform * ends[..., -1]
    block = _first_above(ends, point, block_sums)
    before = jnp.take_along_axis(ends - block_sums, block[..., None], axis=-1)[..., 0]
    entries = block[..., None] * _BLOCK + jnp.arange(_BLOCK)
    inside = weights(jnp.take_along_axis(logits, jnp.minimum(entries, V - 1), axis=-1))
    inside = jnp.where(entries < V, inside, 0.0)
    entry = _first_above(jnp.cumsum(inside, axis=-1), jnp.maximum(point - before, 0.0), inside)
    return (block * _BLOCK + entry).astype(jnp.int32), ends[..., -1]


def _first_above(ends, point, weights):
    """Return the first index whose cumulative end exceeds the point, at most the last one with weight above 0."""
    n = ends.shape[-1]
    index = jnp.sum(ends <= point[..., None], axis=-1)
    last = jnp.max(jnp.where(weights > 0, jnp.arange(n), 0), axis=-1)
    return jnp.minimum(index, last)


def greedy(logits):
    """Return (argmax i32 [...], its log-probability at temperature 1 f32 [...]); the first index wins a tie."""
    V, blocks = logits.shape[-1], _blocks(logits)
    peak = blocks.max((-1, -2), keepdims=True)
    places = jnp.arange(blocks.shape[-2] * _BLOCK).reshape(blocks.shape[-2:])
    token = jnp.where(blocks == peak, places, V).min(-1).min(-1).astype(jnp.int32)
    # min(V - 1): rows of NaN have no peak. Their log-probability is NaN, so the update is skipped.
    return jnp.minimum(token, V - 1), -jnp.log(jnp.exp(blocks - peak).sum(-1).sum(-1))


def sample(logits, keys, token_index, *, temperature: float, top_p: float, top_k: int):
    """Draw one token per row.

    top-p and top-k are exact and need no sorting. A token drawn from the full distribution is accepted iff it is
    inside: the mass strictly above it is below top_p, and fewer than top_k tokens are strictly above it. After a
    rejection, the next draw is restricted to tokens above the rejected one, which still include every token inside.
    Accepted tokens therefore follow exactly the truncated distribution, and the support shrinks until one is accepted.

    Args:
        logits: f32 [..., V].
        keys: typed PRNG keys [...], one per row (`row_keys`).
        token_index: i32, a scalar or one per row.
        temperature: 0 is greedy.
        top_p: in (0, 1].
        top_k: 0 is no limit.
    Returns:
        token i32 [...]; its log-probability f32 [...] under the untruncated distribution at `temperature` (at 1 if
        greedy), nats; rejected bool [...]: the first draw was outside, an unbiased indicator of the excluded mass.
    """
    if temperature == 0:
        token, logprob = greedy(logits)
        return token, logprob, jnp.zeros(token.shape, bool)
    peak = logits.max(-1, keepdims=True)

    def weight_of(some):
        return jnp.exp((some - peak.reshape(*peak.shape, *(1,) * (some.ndim - peak.ndim))) / temperature)

    def logit_of(token):
        return jnp.take_along_axis(logits, token[..., None], axis=-1)

    def logprob_of(token):
        return ((logit_of(token) - peak) / temperature)[..., 0] - jnp.log(total)

    token, total = _draw(logits, weight_of, None, uniform(keys, token_index, 0))
    if top_p >= 1 and top_k == 0:
        return token, logprob_of(token), jnp.zeros(token.shape, bool)

    def is_outside(token):
        above = _blocks(logits) > logit_of(token)[..., None]
        outside = jnp.zeros(token.shape, bool)
        if top_p < 1:
            outside |= jnp.where(above, weight_of(_blocks(logits)), 0.0).sum(-1).sum(-1) >= top_p * total
        if top_k:
            outside |= above.sum(-1).sum(-1) >= top_k
        return outside

    def redraw(carry):
        token, outside, draw = carry
        again, _ = _draw(logits, weight_of, logit_of(token)[..., 0], uniform(keys, token_index, draw))
        token = jnp.where(outside, again, token)
        return token, outside & is_outside(token), draw + 1

    rejected = is_outside(token)
    token, _, _ = jax.lax.while_loop(lambda c: jnp.any(c[1]), redraw, (token, rejected, jnp.int32(1)))
    return token, logprob_of(token), rejected
