"""Which positions of a document are worth thinking about: the proxy model's entropy over its 16 likeliest tokens.

The proxy sees BOS and document tokens only, no template. The same pass gives the direct prediction (argmax and the
true token's log-probability) that evaluation reports beside thinking.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import DecoderConfig, PositionsConfig
from rpt_jax.data.documents import Document
from rpt_jax.data.prompts import candidate_mask
from rpt_jax.errors import DataError
from rpt_jax.models import decoder
from rpt_jax.parallel.mesh import shard_batch

NUM_TOP_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class PositionTable:
    """Positions as columns; row i is position id i.

    Attributes:
        document: i32 [P], index into the documents.
        index: i32 [P], token index to predict.
        entropy: f32 [P], nats.
        direct_token: i32 [P], the proxy's argmax.
        direct_logprob: f32 [P], the proxy's log-probability of the true token.
    """

    document: np.ndarray
    index: np.ndarray
    entropy: np.ndarray
    direct_token: np.ndarray
    direct_logprob: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def take(self, rows) -> "PositionTable":
        return replace(self, **{name: column[rows] for name, column in vars(self).items()})


def window_start(index: int, *, window: int, stride: int) -> int:
    """Start of the document window that gives position `index` most context: the smallest multiple of the stride
    whose window of `window` tokens reaches up to the position."""
    return max(0, -(-(index - window) // stride)) * stride


@partial(jax.jit, static_argnames=("config", "renormalize"))
def direct_statistics(config: DecoderConfig, params, tokens_UL, *, renormalize: bool):
    """Entropy, argmax and log-probability of the law that predicts each token from those before it.

    Source: top-16 entropy, arXiv:2506.08007 §3.3. The paper does not say whether the 16 are renormalised.

    Args:
        tokens_UL: i32; column l is predicted by column l - 1, so column 0 holds no prediction.
        renormalize: divide the 16 probabilities by their sum first.
    Returns:
        (entropy f32 [U, L], argmax i32 [U, L], logprob f32 [U, L]); column 0 is 0.
    """
    hidden_ULD, _ = decoder.forward(config, params, decoder.empty_branches(tokens_UL))
    head_VD = decoder.output_head(params)
    num_top = min(NUM_TOP_TOKENS, head_VD.shape[0])

    def column(inputs):
        hidden_UD, target_U = inputs
        logits_UV = jnp.einsum("ud,vd->uv", hidden_UD, head_VD.astype(hidden_UD.dtype)).astype(jnp.float32)
        total_U = jax.nn.logsumexp(logits_UV, axis=-1)
        # The barrier keeps the product of both: using part of it alone makes XLA sort the whole vocabulary on a CPU.
        top, ids = jax.lax.optimization_barrier(jax.lax.top_k(logits_UV, num_top))
        log_p = top - total_U[:, None]
        if renormalize:
            log_p = log_p - jax.nn.logsumexp(log_p, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits_UV, target_U[:, None], axis=-1)[:, 0] - total_U
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1), ids[:, 0], chosen

    # One column of logits at a time: [U, L, V] is never built.
    columns = jax.lax.map(column, (jnp.swapaxes(hidden_ULD, 0, 1)[:-1], tokens_UL.T[1:]))
    return tuple(jnp.pad(c.T, ((0, 0), (1, 0))) for c in columns)


def score_documents(
    config: DecoderConfig,
    params,
    mesh: Mesh,
    documents: list[Document],
    token_bytes: list[bytes],
    *,
    bos_id: int | None,
    window: int,
    stride: int,
    batch_trunks: int,
    settings: PositionsConfig,
    continuation_tokens: int,
    progress=iter,
) -> PositionTable:
    """Run the proxy over every window and list all candidate positions of all documents.

    Args:
        window: document tokens per window; stride: tokens between window starts.
        batch_trunks: windows per forward pass.
        progress: wraps the iterable of batches, to show where the pass is.
    Raises:
        DataError: no document has a candidate position.
    """
    bos = [] if bos_id is None else [bos_id]
    jobs = []  # (document, window start, [indices it answers for])
    for number, document in enumerate(documents):
        candidates = candidate_mask(
            document, token_bytes, min_context_tokens=settings.min_context_tokens, num_tokens=continuation_tokens
        )
        by_start: dict[int, list[int]] = {}
        for index in np.flatnonzero(candidates):
            by_start.setdefault(window_start(int(index), window=window, stride=stride), []).append(int(index))
        jobs += [(number, start, indices) for start, indices in by_start.items()]
    if not jobs:
        raise DataError(
            f"none of the {len(documents)} documents has a position with {settings.min_context_tokens} tokens before "
            "it and a target that can be written. Give longer documents or lower --positions.min-context-tokens."
        )
    length = len(bos) + window + 1
    rows = []
    for first in progress(range(0, len(jobs), batch_trunks)):
        batch = jobs[first : first + batch_trunks]
        tokens_UL = np.zeros((batch_trunks, length), np.int32)
        for row, (number, start, _) in enumerate(batch):
            piece = [*bos, *documents[number].tokens[start : start + window + 1]]
            tokens_UL[row, : len(piece)] = piece
        statistics = direct_statistics(config, params, shard_batch(mesh, tokens_UL), renormalize=settings.renormalize)
        entropy, argmax, logprob = (np.asarray(s) for s in statistics)
        for row, (number, start, indices) in enumerate(batch):
            columns = len(bos) + np.asarray(indices) - start
            rows.append(
                (
                    np.full(len(indices), number),
                    indices,
                    entropy[row, columns],
                    argmax[row, columns],
                    logprob[row, columns],
                )
            )
    kinds = (np.int32, np.int32, np.float32, np.int32, np.float32)
    columns = (np.concatenate(c).astype(k) for c, k in zip(zip(*rows, strict=True), kinds, strict=True))
    return PositionTable(**dict(zip(PositionTable.__annotations__, columns, strict=True)))


def select_positions(table: PositionTable, settings: PositionsConfig, *, stride: int, seed: int) -> np.ndarray:
    """Ids of the positions to train on. `stride`: document tokens that share a limit of positions.

    Raises:
        DataError: the selector keeps nothing.
    """
    rng = np.random.default_rng(seed)
    if settings.selector == "random":
        kept = np.arange(len(table))
    else:
        kept = np.flatnonzero(table.entropy > settings.entropy_threshold)
    if not len(kept):
        raise DataError(
            f"no position has more than positions.entropy_threshold={settings.entropy_threshold} nats "
            f"(highest: {table.entropy.max():.3f}). Lower --positions.entropy-threshold."
        )
    kept = _cap_per_window(rng.permutation(kept), table, stride, settings.max_positions_per_window)
    share = settings.unfiltered_fraction
    if share and settings.selector != "random":
        others = np.setdiff1d(np.arange(len(table)), kept)
        count = min(len(others), round(len(kept) * share / (1 - share)))
        kept = np.concatenate([kept, rng.choice(others, count, replace=False)])
    return np.sort(kept)


def _cap_per_window(ids, table: PositionTable, stride: int, limit: int):
    """The first `limit` of the ids in each run of `stride` document tokens."""
    seen: dict[tuple[int, int], int] = {}
    kept = []
    for i in ids:
        window = int(table.document[i]), int(table.index[i]) // stride
        seen[window] = seen.get(window, 0) + 1
        if seen[window] <= limit:
            kept.append(i)
    return np.asarray(kept)
