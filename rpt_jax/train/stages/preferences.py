"""Learning from pairs: DPO against the policy that the stage starts from, by the steps and loss of RL.

A pair is two branches of one prompt, so the prompt runs once for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import Config, LossConfig
from rpt_jax.data.preferences import Pair
from rpt_jax.models.lora import join
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.parallel.programs import needs_memory
from rpt_jax.rl.objective import objective_fn
from rpt_jax.rl.slopes import batch_slopes
from rpt_jax.rl.surrogates import pair_margins
from rpt_jax.rl.update import update
from rpt_jax.scoring.logprobs import score
from rpt_jax.sequences import several_completions
from rpt_jax.train.recorder import to_floats
from rpt_jax.train.stages.examples import ExampleTraining, padded
from rpt_jax.train.training import Outcome
from rpt_jax.types import Rows, TrainState
from rpt_jax.work import forward_flops, num_parameters, update_flops


@dataclass(kw_only=True)
class Preferences(ExampleTraining):
    """The steps of DPO; a `training.Training`. Its examples are pairs.

    Attributes:
        start: the reference policy, with which the stage starts.
    """

    start: Any

    @needs_memory("training on pairs", "--supervised.batch-size, in a new run")
    def step(self, state: TrainState, number: int) -> tuple[TrainState, Outcome]:
        """Update on the next batch."""
        pairs = self.take()
        loss = replace(LossConfig(objective="dpo"), surrogate=self.config.loss.surrogate)
        rows, num_tokens = pair_rows(pairs, self.tail, self.config)
        rows = shard_batch(self.mesh, rows)
        policy, model = join(self.frozen, state.params), self.config.model
        reference, current = (score(model, p, rows.sequences, temperature=1.0) for p in (self.start, policy))
        rows = replace(rows, ref_logprobs=reference)
        metrics = _margin_metrics(rows, current)
        rows, shift = batch_slopes(loss, rows, current, 0, jnp.zeros((len(pairs), 1, 2)))
        num_params = num_parameters(policy)
        state, of_update = update(
            state, [rows], loss_fn=objective_fn(model, loss), optimizer=self.optimizer, frozen=self.frozen
        )
        metrics |= of_update | {"loss": of_update["loss"] + shift}
        flops = update_flops(num_params, num_tokens, has_adapters=self.frozen is not None)
        flops += 2 * forward_flops(num_params, num_tokens)
        return state, Outcome(flops=lambda: flops, record=lambda: to_floats(metrics))


def pair_rows(pairs: Sequence[Pair], tail, config: Config) -> tuple[Rows, int]:
    """Build NumPy Rows of one trunk per pair, of which row 0 is the chosen completion and row 1 the rejected one.

    Returns:
        (rows with advantages 1 and 0, which rank the two; number of their tokens).
    """
    trunk_tokens, cuts, tokens, mask = padded([p.trunk for p in pairs], [(p.chosen, p.rejected) for p in pairs], config)
    ranks = np.broadcast_to(np.array([1.0, 0.0], np.float32)[:, None], mask.shape)
    rows = Rows(
        sequences=several_completions(trunk_tokens, cuts, tail, tokens, mask),
        row=np.where(mask, np.arange(2, dtype=np.int32)[:, None], -1),
        policy_weights=mask.astype(np.float32) / max(1, mask.sum()),
        advantages=ranks,
        likelihood_weights=None,
        trunk_weights=None,
        temperature=np.ones(mask.shape, np.float32),
        sampler_logprobs=np.zeros(mask.shape, np.float32),
        old_logprobs=None,
        ref_logprobs=None,
    )
    return rows, int(cuts.sum() + len(pairs) * len(tail) + mask.sum())


@jax.jit
def _margin_metrics(rows: Rows, logprobs_URC) -> dict:
    """Return the mean margin of the batch, nats, and the share of pairs whose margin is positive."""
    mask = rows.sequences.branch_mask
    log_ratio = jnp.where(mask, logprobs_URC - rows.ref_logprobs, 0.0).sum(-1)[:, None]
    margins, _ = pair_margins(log_ratio, rows.advantages[..., 0][:, None], jnp.ones(log_ratio.shape, bool))
    return {"margin": margins.mean(), "pair_accuracy": (margins > 0).mean()}
