"""Records of steps: metrics read one step late, token and FLOP counts."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.parallel.programs import take_compilations
from rpt_jax.rl.advantages import degenerate_groups
from rpt_jax.train.run_directory import RunDirectory
from rpt_jax.train.training import Outcome
from rpt_jax.types import Experience


@jax.jit
def experience_metrics(experience: Experience) -> dict[str, jax.Array]:
    """Compute f32 scalars of one rollout batch; fractions are over rollouts of real prompts unless named otherwise.

    Prompts that show their reference do not count.
    """
    tasks, rollouts, predictions = experience.tasks, experience.rollouts, experience.predictions
    earned = experience.earned
    groups = tasks.prompts.prompt_mask
    padded = 1 - jnp.mean(groups)
    if tasks.references.shown is not None:
        groups &= ~tasks.references.shown
    rows = jnp.repeat(groups, tasks.prompts.row_ids.shape[-1], axis=1)
    num_rows, num_groups = jnp.maximum(1, rows.sum()), jnp.maximum(1, groups.sum())
    lengths, width = rollouts.mask.sum(-1), predictions.bytes.shape[-1]

    def fraction(flags_UR):
        return jnp.sum(rows & flags_UR) / num_rows

    degenerate = degenerate_groups(earned.rewards)
    tokens_UMGC = (rollouts.tokens * rollouts.mask).reshape(*earned.rewards.shape, -1)
    identical = (tokens_UMGC == tokens_UMGC[:, :, :1]).all((-1, -2))
    return {
        "reward": jnp.sum(earned.rewards * groups[..., None]) / num_rows,
        "reward_any_in_group": jnp.sum(groups & (earned.rewards.max(-1) > 0)) / num_groups,
        "reward_fault_fraction": jnp.sum(earned.faults & groups[..., None]) / num_rows,
        "degenerate_group_fraction": jnp.sum(groups & degenerate) / num_groups,
        "identical_group_fraction": jnp.sum(groups & identical) / num_groups,
        "completion_tokens": jnp.sum(lengths) / num_rows,
        "truncated_fraction": fraction(rollouts.truncated),
        "no_think_end_fraction": fraction(predictions.think_end_tokens == 0),
        "no_prediction_fraction": fraction(~predictions.found),
        # Longer than any continuation, so it cannot match; bytes past the horizon are unknown.
        "prediction_overflow_fraction": fraction(predictions.lengths > width),
        "excluded_mass": jnp.sum(rollouts.num_rejected) / jnp.maximum(1, jnp.sum(lengths)),
        "padded_prompt_fraction": padded,
    } | {name: jnp.sum(jnp.where(groups[..., None], x, 0)) / num_rows for name, x in earned.metrics.items()}


# Sums over tokens with the loss's weights, which need not sum to 1.
_WEIGHTED = ("kl", "entropy", "clip_fraction", "sampler_mismatch")


class Recorder:
    """Holds a step's outcome until the next step is running, then writes it: the devices never wait for the disk.

    Args:
        name: stage of the records.
        run: where records go; None: nowhere.
    Attributes:
        flops: of all written steps.
        num_skipped: consecutive skipped updates, up to the last written step.
        note: text for the progress bar.
    """

    def __init__(self, name: str, run: RunDirectory | None):
        self._name, self._run = name, run
        self._pending: tuple[int, Outcome, bool] | None = None
        self._began, self._written = time.perf_counter(), []
        self.flops = 0.0
        self.num_skipped = 0
        self.note = ""

    def begin(self) -> None:
        """Start the clock of a step."""
        self._began = time.perf_counter()

    def add(self, step: int, outcome: Outcome, *, keep: bool) -> None:
        """Write the previous step's outcome and hold this one.

        Args:
            step: number of steps done.
            outcome: of the last of them.
            keep: log its record.
        """
        self.flush()
        self._pending = (step, outcome, keep)
        if self._run is None:
            return
        self._run.log_seconds(self._name, step, time.perf_counter() - self._began)
        if (found := take_compilations()).programs:
            self._run.log_programs(self._name, step, found)

    def take_written(self) -> list[dict]:
        """Return the records written since the last call, with their steps."""
        taken, self._written = self._written, []
        return taken

    def flops_with(self, outcome: Outcome) -> float:
        """Return the FLOPs so far, plus those of an outcome that is not added yet."""
        return self.flush() + outcome.flops()

    def flush(self) -> float:
        """Write the held outcome, if any; return the FLOPs so far."""
        if self._pending is None:
            return self.flops
        (step, outcome, keep), self._pending = self._pending, None
        record = outcome.record()
        self.flops += outcome.flops()
        self.num_skipped = int(record["skipped"])
        names = [name for name in ("reward", "loss", "completion_tokens") if name in record]
        # The bar already counts the step that is running.
        self.note = "  ".join([f"step {step}:", *(f"{name} {record[name]:.3f}" for name in names)])
        if keep and self._run is not None:
            self._run.log(self._name, step, record | {"flops": self.flops})
        self._written.append({"step": step} | record)
        return self.flops


def step_record(rounds: list[dict], counts: list[dict], updates: list[dict], masked: float) -> dict:
    """Return the record of one RL step, as floats.

    Args:
        rounds: `experience_metrics` of every rollout round; those of the kept trunks alone would flatter the rewards.
        counts: `work.count_tokens` of every rollout round.
        updates: metrics of every update.
        masked: share of prompts that took no part in the update.
    """
    record = {name: float(np.mean([m[name] for m in rounds])) for name in rounds[0]}
    record |= {name: sum(r[name] for r in counts) for name in counts[0]}
    weight = sum(u["token_weight"] for u in updates)
    for name in (n for n in updates[0] if n != "token_weight"):
        values = [u[name] for u in updates]
        if name in _WEIGHTED:
            # Without tokens there is no mean, so the record omits the metric.
            record |= {name: sum(values) / weight} if weight else {}
        else:
            record[name] = max(values) if name.endswith("_max") else float(np.mean(values))
    return record | {
        "skipped": int(updates[-1]["skipped"]),
        "masked_group_fraction": float(masked),
        "rollout_rounds": len(rounds),
    }


def to_floats(metrics: dict) -> dict:
    """Convert device scalars to Python floats."""
    return {name: float(np.asarray(value)) for name, value in metrics.items()}
