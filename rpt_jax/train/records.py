"""What a step leaves behind: metrics read a step late, token and FLOP counts, sampled completions."""

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.parallel.distributed import is_main, to_host
from rpt_jax.rl.advantages import degenerate_groups
from rpt_jax.train.compute import count_tokens, num_parameters, step_flops
from rpt_jax.train.metrics import RunDirectory, to_floats
from rpt_jax.train.trainer import Trainer
from rpt_jax.types import Experience


@jax.jit
def experience_metrics(experience: Experience) -> dict[str, jax.Array]:
    """Scalars of one rollout batch; fractions are over rollouts of real positions unless the name says otherwise."""
    tasks, rollouts, predictions = experience.tasks, experience.rollouts, experience.predictions
    groups = tasks.position_mask
    rows = jnp.repeat(groups, tasks.row_ids.shape[-1], axis=1)
    num_rows, num_groups = jnp.maximum(1, rows.sum()), jnp.maximum(1, groups.sum())
    lengths, width = rollouts.mask.sum(-1), predictions.bytes.shape[-1]

    def fraction(flags_UR):
        return jnp.sum(rows & flags_UR) / num_rows

    degenerate = degenerate_groups(experience.rewards)
    return {
        "reward": jnp.sum(experience.rewards * groups[..., None]) / num_rows,
        "reward_any_in_group": jnp.sum(groups & (experience.rewards.max(-1) > 0)) / num_groups,
        "reward_fault_fraction": jnp.sum(experience.faults & groups[..., None]) / num_rows,
        "degenerate_group_fraction": jnp.sum(groups & degenerate) / num_groups,
        "completion_tokens": jnp.sum(lengths) / num_rows,
        "truncated_fraction": fraction(rollouts.truncated),
        "no_think_end_fraction": fraction(predictions.think_end_tokens == 0),
        "no_prediction_fraction": fraction(~predictions.found),
        # Longer than any continuation: cannot match, and bytes past the horizon are unknown.
        "prediction_overflow_fraction": fraction(predictions.lengths > width),
        "excluded_mass": jnp.sum(rollouts.num_rejected) / jnp.maximum(1, jnp.sum(lengths)),
        "padded_prompt_fraction": 1 - jnp.mean(groups),
    }


# Sums over tokens with the loss's own weights, which need not sum to 1.
_WEIGHTED = ("kl", "entropy", "clip_fraction", "sampler_mismatch")


class StepRecorder:
    """Holds one step's device metrics until the next step is under way, then writes them."""

    def __init__(self, trainer: Trainer, run: RunDirectory, params):
        self._config, self._trainer, self._run = trainer.config, trainer, run
        self._num_params = num_parameters(params)
        self._pending = None
        self.flops = 0.0
        self.num_skipped = 0
        self.note = ""

    def add(
        self,
        step: int,
        experience: Experience,
        spent: list[Experience],
        updates: list[dict],
        *,
        trunks_passed_over: int,
    ) -> None:
        """Take a step's results; writes the previous step's. trunks_passed_over: since the run began."""
        # Rewards are those of everything sampled; what dynamic sampling kept would flatter them.
        metrics = [experience_metrics(e) for e in spent]
        masked = 1 - jnp.sum(experience.group_mask) / jnp.maximum(1, jnp.sum(experience.tasks.position_mask))
        pending = (step, metrics, masked, [count_tokens(e) for e in spent], updates, trunks_passed_over)
        self.flush()
        self._pending = pending
        every = self._config.run.completions_every_steps
        if every and step % every == 0:
            columns = completion_columns(experience, self._trainer)
            if is_main():
                self._run.write_completions(step + 1, columns)

    def flush(self) -> float:
        """Write what is held; returns FLOPs so far."""
        if self._pending is None:
            return self.flops
        step, metrics, masked, spent, updates, passed_over = self._pending
        self._pending = None
        metrics, rounds, updates = ([to_floats(x) for x in xs] for xs in (metrics, spent, updates))
        self.flops += step_flops(self._config, self._num_params, rounds, updates[0]["tokens_updated"])
        record = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        record |= {name: sum(r[name] for r in rounds) for name in rounds[0]}
        weight = sum(u.pop("token_weight") for u in updates)
        for name in updates[0]:
            values = [u[name] for u in updates]
            if name in _WEIGHTED:
                # Of no tokens there is no mean: the step then has no such metric.
                record |= {name: sum(values) / weight} if weight else {}
            else:
                record[name] = max(values) if name.endswith("_max") else float(np.mean(values))
        record |= {"skipped": updates[-1]["skipped"], "masked_group_fraction": float(masked)}
        record |= {"rollout_rounds": len(rounds), "trunks_passed_over": passed_over, "flops": self.flops}
        self.num_skipped = int(updates[-1]["skipped"])
        self.note = f"reward {record['reward']:.3f}  tokens {record['completion_tokens']:.1f}"
        self._run.log("rpt", step + 1, record)
        return self.flops


def completion_columns(experience: Experience, trainer: Trainer) -> dict[str, list]:
    """One row per rollout of a real task: context, completion, prediction, truth, reward, and the token ids."""
    tasks, rollouts, predictions, rewards = to_host(
        (experience.tasks, experience.rollouts, experience.predictions, experience.rewards)
    )
    tokenizer = trainer.tokenizer
    U, M, G = rewards.shape
    rows = []
    for u, m, g in np.ndindex(U, M, G):
        if not tasks.position_mask[u, m]:
            continue
        r, task_id = m * G + g, int(tasks.position_ids[u, m])
        trunk, completion = tasks.trunk_tokens[u, : tasks.cuts[u, m]], rollouts.tokens[u, r][rollouts.mask[u, r]]
        prediction = predictions.bytes[u, r, : predictions.lengths[u, r]].tobytes()
        rows.append(
            {
                "position_id": task_id,
                "rollout": g,
                "context": tokenizer.decode(trunk),
                "completion": tokenizer.decode(completion),
                "prediction": prediction.decode("utf-8", errors="replace") if predictions.found[u, r] else None,
                "truth": _truth(trainer.columns(task_id)),
                "reward": float(rewards[u, m, g]),
                "tokens": len(completion),
                "truncated": bool(rollouts.truncated[u, r]),
                "trunk_tokens": trunk.tolist(),
                "completion_tokens": completion.tolist(),
            }
        )
    return {name: [row[name] for row in rows] for name in rows[0]}


def _truth(columns: dict) -> str:
    """How the text goes on, as far as a prediction may reach, or the accepted answers."""
    if "answers" in columns:
        return " or ".join(columns["answers"])
    return columns["continuation"][: columns["boundaries"][-1]].decode("utf-8", errors="replace")
