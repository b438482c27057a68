"""Learning from pairs: DPO against the policy that the stage starts from, by the steps and loss of RL.

A pair is two branches of one prompt, so the prompt runs once for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import Config, LossConfig
from rpt_jax.data.preferences import Pair
from rpt_jax.models.lora import Frozen, join
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.parallel.programs import needs_memory
from rpt_jax.rl.objective import objective_fn
from rpt_jax.rl.slopes import batch_slopes
from rpt_jax.rl.surrogates import pair_margins
from rpt_jax.rl.update import update
from rpt_jax.scoring.logprobs import score
from rpt_jax.sequences import several_completions
from rpt_jax.train.recorder import to_floats
from rpt_jax.train.stages.supervised import example_order
from rpt_jax.train.training import Outcome
from rpt_jax.types import Rows, TrainState
from rpt_jax.work import forward_flops, num_parameters, update_flops

# Completions are padded to a multiple of this many tokens, so that few programs compile.
_WIDTH_STEP = 32


@dataclass(kw_only=True)
class Preferences:
    """The steps of DPO; a `training.Training`.

    Attributes:
        name, also_records, log_every_steps: see `training.Training`.
        config: of the run; supervised.batch_size pairs make an update.
        mesh: that holds parameters and batches.
        optimizer: of the stage.
        pairs: to learn, reshuffled each epoch.
        tail: ids that end every prompt.
        start: the reference policy, with which the stage starts.
        frozen: base weights of the state's adapters; None: the state holds the whole policy.
    """

    name: str
    config: Config
    mesh: Any
    optimizer: Any
    pairs: Sequence[Pair]
    tail: Any
    start: Any
    frozen: Frozen | None = None
    also_records: tuple[str, ...] = ()
    log_every_steps: int = 10
    _position: int = 0
    _order: Any = field(default=None, repr=False)

    @needs_memory("training on pairs", "--supervised.batch-size, in a new run")
    def step(self, state: TrainState, number: int) -> tuple[TrainState, Outcome]:
        """Update on the next batch."""
        pairs = [self._next_pair() for _ in range(self.config.supervised.batch_size)]
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

    def _next_pair(self) -> Pair:
        if self._order is None:
            self._order = example_order(len(self.pairs), shuffle=True, seed=self.config.run.seed)
        self._position += 1
        return self.pairs[self._order[self._position - 1]]

    def get_cursor(self) -> dict:
        """Return {"position": number of pairs taken}."""
        return {"position": self._position}

    def set_cursor(self, cursor: dict) -> None:
        """Continue from a position."""
        self._position = cursor["position"]


def pair_rows(pairs: Sequence[Pair], tail, config: Config) -> tuple[Rows, int]:
    """Build NumPy Rows of one trunk per pair, of which row 0 is the chosen completion and row 1 the rejected one.

    Returns:
        (rows with advantages 1 and 0, which rank the two; number of their tokens).
    """
    U, L = len(pairs), config.data.trunk_length
    longest = max(len(side) for p in pairs for side in (p.chosen, p.rejected))
    C = min(config.rollout.max_completion_tokens, -(-longest // _WIDTH_STEP) * _WIDTH_STEP)
    trunk_tokens, cuts = np.zeros((U, L), np.int32), np.zeros(U, np.int32)
    tokens, mask = np.zeros((U, 2, C), np.int32), np.zeros((U, 2, C), bool)
    for u, pair in enumerate(pairs):
        trunk_tokens[u, : len(pair.trunk)], cuts[u] = pair.trunk, len(pair.trunk)
        for r, side in enumerate((pair.chosen, pair.rejected)):
            tokens[u, r, : len(side)], mask[u, r, : len(side)] = side, True
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
    return rows, int(cuts.sum() + U * len(tail) + mask.sum())


@jax.jit
def _margin_metrics(rows: Rows, logprobs_URC) -> dict:
    """Return the mean margin of the batch, nats, and the share of pairs whose margin is positive."""
    mask = rows.sequences.branch_mask
    log_ratio = jnp.where(mask, logprobs_URC - rows.ref_logprobs, 0.0).sum(-1)[:, None]
    margins, _ = pair_margins(log_ratio, rows.advantages[..., 0][:, None], jnp.ones(log_ratio.shape, bool))
    return {"margin": margins.mean(), "pair_accuracy": (margins > 0).mean()}
