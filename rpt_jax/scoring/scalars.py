"""The scalar readout of a model after each branch token: scores of reward models, values."""

from functools import partial

import jax

from rpt_jax.config import DecoderConfig
from rpt_jax.models import decoder
from rpt_jax.models.scalar_head import read_scalars
from rpt_jax.parallel.mesh import on_mesh_of
from rpt_jax.scoring.logprobs import in_rounds
from rpt_jax.types import Sequences


def token_scalars(config: DecoderConfig, params, sequences: Sequences):
    """Return the readout after each branch token, f32 [U, R, T]: of what was read up to it, the token included."""
    _, branch_URTD = decoder.forward(config, params, sequences)
    return read_scalars(params, branch_URTD)


def score_tokens(config: DecoderConfig, params, sequences: Sequences, *, trunks_at_once: int = 0):
    """Compute `token_scalars`; arguments as in `logprobs.score`."""
    with on_mesh_of(params):
        return _score_tokens(config, params, sequences, trunks_at_once=trunks_at_once)


@partial(jax.jit, static_argnames=("config", "trunks_at_once"))
def _score_tokens(config: DecoderConfig, params, sequences: Sequences, *, trunks_at_once: int):
    return in_rounds(partial(token_scalars, config, params), sequences, trunks_at_once)
