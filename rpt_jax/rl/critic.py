"""The critic: a linear readout of the policy's hidden states, its pass before an update, and its loss."""

from functools import partial

import jax
import jax.numpy as jnp

from rpt_jax.config import DecoderConfig, LossConfig
from rpt_jax.models.scalar_head import read_scalars
from rpt_jax.parallel.mesh import on_mesh_of
from rpt_jax.scoring.logprobs import in_rounds, predicting_states
from rpt_jax.types import Rows, Sequences


def score_values(config: DecoderConfig, params, sequences: Sequences, *, trunks_at_once: int = 0):
    """Return the critic's value of the state before each branch token, f32 [U, R, T]; arguments as in `score`."""
    with on_mesh_of(params):
        return _score_values(config, params, sequences, trunks_at_once=trunks_at_once)


@partial(jax.jit, static_argnames=("config", "trunks_at_once"))
def _score_values(config: DecoderConfig, params, sequences: Sequences, *, trunks_at_once: int):
    def of_some(some: Sequences):
        return read_scalars(params, predicting_states(config, params, some)[0])

    return in_rounds(of_some, sequences, trunks_at_once)


def clipped_value_loss(values, old_values, returns, *, clip: float):
    """Return max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2 per token (PPO's code, and verl's)."""
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    return jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2


def value_loss(loss: LossConfig, params, rows: Rows, hidden_URTD):
    """Return the critic's sum in the loss, without its coefficient, f32; its gradient reaches the policy too.

    Args:
        loss: settings.
        params: of the policy, with the readout.
        rows: of the update.
        hidden_URTD: hidden states that predict the rows' tokens.
    """
    values = read_scalars(params, hidden_URTD)
    # A token without a term has weight 0, and may hold anything.
    has_term = rows.policy_weights != 0
    old, returns = (jnp.where(has_term, x, 0.0) for x in (rows.old_values, rows.returns))
    terms = clipped_value_loss(jnp.where(has_term, values, 0.0), old, returns, clip=loss.critic.clip)
    return jnp.sum(rows.policy_weights * terms)
