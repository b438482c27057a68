"""Training of reward and value models: a scalar readout of graded completions, branches of shared prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from rpt_jax.config import Config, DecoderConfig, SupervisedConfig
from rpt_jax.data.graded import Graded
from rpt_jax.models.lora import join
from rpt_jax.parallel.distributed import to_host
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.parallel.programs import needs_memory
from rpt_jax.reward_models.bradley_terry import k_way
from rpt_jax.reward_models.process import process
from rpt_jax.reward_models.value import scaled_sigmoid, value
from rpt_jax.rl.update import update
from rpt_jax.scoring.scalars import score_tokens, token_scalars
from rpt_jax.sequences import several_completions
from rpt_jax.train.recorder import to_floats
from rpt_jax.train.stages.examples import ExampleTraining, padded
from rpt_jax.train.training import Outcome
from rpt_jax.types import TrainState, record
from rpt_jax.work import num_parameters, update_flops


@record
class GradedRows:
    """Graded completions as the model runs them. Weights are normalised over the whole batch."""

    sequences: Any  # Sequences, one trunk per example, R completions each
    labels: Any  # f32 [U, R, T], of the places that have one
    weights: Any  # f32 [U, R, T], of each label's term; 0 elsewhere
    margins: Any  # f32 [U], of Bradley-Terry's pairs


@dataclass(kw_only=True)
class RewardModelling(ExampleTraining):
    """The steps of a reward model's training; a `training.Training`. supervised.objective is the kind of model."""

    @needs_memory("training a reward model", "--supervised.batch-size, in a new run")
    def step(self, state: TrainState, number: int) -> tuple[TrainState, Outcome]:
        """Update on the next batch."""
        rows, num_tokens = graded_rows(self.take(), self.tail, self.config)
        num_params = num_parameters(join(self.frozen, state.params))
        state, metrics = update(
            state,
            [shard_batch(self.mesh, rows)],
            loss_fn=reward_model_loss(self.config.model, self.config.supervised),
            optimizer=self.optimizer,
            frozen=self.frozen,
        )
        flops = update_flops(num_params, num_tokens, has_adapters=self.frozen is not None)
        return state, Outcome(flops=lambda: flops, record=lambda: to_floats(metrics))


def graded_rows(examples: Sequence[Graded], tail, config: Config) -> tuple[GradedRows, int]:
    """Build NumPy rows; return them with the number of their tokens, a prompt's counted once."""
    trunk_tokens, cuts, tokens, mask = padded([e.trunk for e in examples], [e.completions for e in examples], config)
    labels, is_labelled = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, bool)
    for u, example in enumerate(examples):
        for r, places in enumerate(example.places):
            labels[u, r, places], is_labelled[u, r, places] = example.labels[r], True
    rows = GradedRows(
        sequences=several_completions(trunk_tokens, cuts, tail, tokens, mask),
        labels=labels,
        weights=(is_labelled / max(1, is_labelled.sum())).astype(np.float32),
        margins=np.array([e.margin for e in examples], np.float32),
    )
    return rows, int(cuts.sum() + len(examples) * len(tail) + mask.sum())


@cache
def reward_model_loss(model: DecoderConfig, supervised: SupervisedConfig) -> Callable:
    """Return the loss for `update`; the same object for the same arguments, so that nothing compiles twice."""
    return partial(_loss, model, supervised)


def _loss(model: DecoderConfig, supervised: SupervisedConfig, params, rows: GradedRows):
    """Return (loss, metrics): accuracy of pairs or labels, and the mean score.

    bradley_terry: mean over prompts of the mean over their pairs. Others: mean over labelled places.
    """
    scores, has_label = token_scalars(model, params, rows.sequences), rows.weights > 0
    labels, mean = rows.labels, jnp.sum(rows.weights * scores)
    if supervised.objective == "bradley_terry":
        ends_UR, ranks_UR = (jnp.sum(jnp.where(has_label, x, 0.0), axis=-1) for x in (scores, labels))
        real_UR = has_label.any(-1)
        terms = k_way(ends_UR, ranks_UR, real_UR, margin_U=rows.margins, centering=supervised.centering)
        loss, accuracy = terms.mean(), _pair_accuracy(ends_UR, ranks_UR, real_UR)
    elif supervised.objective == "value":
        terms = value(scores, labels, loss=supervised.value_loss)
        loss = jnp.sum(rows.weights * terms)
        accuracy = jnp.sum(rows.weights * ((scaled_sigmoid(scores) > 0) == (labels > 0)))
    else:
        loss = jnp.sum(rows.weights * process(scores, labels))
        accuracy = jnp.sum(rows.weights * ((scores > 0) == (labels > 0.5)))
    return loss, {"accuracy": accuracy, "mean_score": mean}


def _pair_accuracy(scores_UR, ranks_UR, mask_UR):
    is_pair = (ranks_UR[:, :, None] > ranks_UR[:, None]) & mask_UR[:, :, None] & mask_UR[:, None]
    is_right = scores_UR[:, :, None] > scores_UR[:, None]
    return jnp.mean(jnp.sum(is_pair & is_right, axis=(1, 2)) / jnp.maximum(1, is_pair.sum((1, 2))))


def scores_of(model: DecoderConfig, params, examples: Sequence[Graded], tail, config: Config, mesh, *, batch_size: int):
    """Return the score at each labelled place: for each example, completions, of each a list of floats."""
    found: list[list[list[float]]] = []
    for first in range(0, len(examples), batch_size):
        some = list(examples[first : first + batch_size])
        padded = some + [some[-1]] * (batch_size - len(some))
        rows, _ = graded_rows(padded, tail, config)
        scores = to_host(score_tokens(model, params, shard_batch(mesh, rows.sequences)))
        for u, example in enumerate(some):
            found.append([scores[u, r, places].tolist() for r, places in enumerate(example.places)])
    return found
