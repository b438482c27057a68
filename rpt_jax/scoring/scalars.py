"""The scalar readout of a model after each branch token: scores of reward models, values."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from rpt_jax.config import DecoderConfig, StepsConfig
from rpt_jax.models import decoder
from rpt_jax.models.scalar_head import read_scalars
from rpt_jax.parallel.mesh import on_mesh_of
from rpt_jax.scoring.logprobs import in_rounds
from rpt_jax.types import Sequences


@dataclass(frozen=True, kw_only=True)
class ScalarModel:
    """A trained reward or value model.

    Attributes:
        config: the model's shape.
        params: of the decoder, with the readout.
        objective: bradley_terry, outcome, process or value; of a model directory, what its class tells.
        steps: where the steps end that it was trained on; None: unknown.
        name: where it is from.
    """

    config: DecoderConfig
    params: Any
    objective: str
    steps: StepsConfig | None
    name: str


def in_units(objective: str, scalars):
    """Return scores as a reward: of bradley_terry as they are, of value in (-1, 1), of others probabilities."""
    if objective == "bradley_terry":
        return scalars
    probabilities = jax.nn.sigmoid(scalars)
    return 2 * probabilities - 1 if objective == "value" else probabilities


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
