"""Teacher-forced log-probabilities of branch tokens, through the model's one graph."""

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
    U = len(sequences.trunk_tokens)
    n = trunks_at_once or U

    def of_some(some: Sequences):
        hidden_nRTD, _ = predicting_states(config, params, some)
        _, R, T, D = hidden_nRTD.shape
        hidden_nND, targets_nN = hidden_nRTD.reshape(n, R * T, D), some.branch_tokens.reshape(n, R * T)
        logprobs, _ = token_logprobs(config, params, hidden_nND, targets_nN, temperature=temperature)
        return logprobs.reshape(n, R, T)

    # The trunks of a round are U // n apart, so each shard takes part in every round.
    rounds = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(n, U // n, *x.shape[1:]), 1, 0), sequences)
    logprobs = jax.lax.map(of_some, rounds)
    return jnp.moveaxis(logprobs, 0, 1).reshape(U, *logprobs.shape[2:])
