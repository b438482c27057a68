"""Teacher-forced log-probabilities of branch tokens, through the model's one graph."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decoder
from rpt_jax.models.vocabulary_head import token_logprobs
from rpt_jax.parallel.mesh import on_mesh_of
from rpt_jax.types import Sequences


def predicting_states(config: DecoderConfig, params, sequences: Sequences):
    """Return the hidden states that predict branch tokens [U, R, T, D], and those of whole trunks [U, L, D].

    The last token of a prompt predicts the first token of its completions; the other tokens are predicted by the token
    before them.
    """
    s = sequences
    stem_UPD, branch_URTD = decoder.forward(config, params, s)
    trunk_ULD = stem_UPD[:, : s.trunk_tokens.shape[1]]
    if branch_URTD is None:
        return jnp.zeros((*s.branch_tokens.shape, stem_UPD.shape[-1]), stem_UPD.dtype), trunk_ULD
    U, R, T, D = branch_URTD.shape
    ends_UMD = decoder.prompt_ends(stem_UPD, s)
    first = jnp.take_along_axis(ends_UMD, s.branch_prompts.reshape(U, R * T, 1), axis=1).reshape(U, R, T, D)
    before = jnp.pad(branch_URTD[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
    return jnp.where((s.branch_index == 0)[..., None], first, before), trunk_ULD


def score(config: DecoderConfig, params, sequences: Sequences, *, temperature: float, trunks_at_once: int = 0):
    """Compute teacher-forced log-probabilities of branch tokens, f32 [U, R, T], nats.

    Args:
        config, params: of the model.
        sequences: stems and branches.
        temperature: of the scored distribution; > 0.
        trunks_at_once: a divisor of U, and a multiple of the trunk shards, to save memory; 0: all.
    """
    with on_mesh_of(params):
        return _score(config, params, sequences, temperature=temperature, trunks_at_once=trunks_at_once)


@partial(jax.jit, static_argnames=("config", "temperature", "trunks_at_once"))
def _score(config: DecoderConfig, params, sequences: Sequences, *, temperature: float, trunks_at_once: int):
    def of_some(some: Sequences):
        hidden_nRTD, _ = predicting_states(config, params, some)
        n, R, T, D = hidden_nRTD.shape
        hidden_nND, targets_nN = hidden_nRTD.reshape(n, R * T, D), some.branch_tokens.reshape(n, R * T)
        logprobs, _ = token_logprobs(config, params, hidden_nND, targets_nN, temperature=temperature)
        return logprobs.reshape(n, R, T)

    return in_rounds(of_some, sequences, trunks_at_once)


def in_rounds(fn: Callable, trunks, trunks_at_once: int):
    """Apply `fn` to some trunks at a time, to save memory.

    Args:
        fn: tree of arrays [n, ...] -> tree of arrays [n, ...].
        trunks: tree of arrays [U, ...].
        trunks_at_once: n, a divisor of U and a multiple of the trunk shards; 0: all.
    """
    U = len(jax.tree.leaves(trunks)[0])
    n = trunks_at_once or U
    # The trunks of a round are U // n apart, so each shard takes part in every round.
    rounds = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(n, U // n, *x.shape[1:]), 1, 0), trunks)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(U, *x.shape[2:]), jax.lax.map(fn, rounds))
