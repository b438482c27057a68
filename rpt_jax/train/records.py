"""What a step leaves behind: metrics read a step late, token and FLOP counts, sampled completions."""

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import Config
from rpt_jax.rl.advantages import degenerate_groups
from rpt_jax.tokenizer import Tokenizer
from rpt_jax.train.compute import count_tokens, num_parameters, rollout_flops, update_flops
from rpt_jax.train.metrics import RunDirectory, to_host
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
        "degenerate_group_fraction": jnp.sum(groups & degenerate) / num_groups,
        "masked_group_fraction": 1 - jnp.sum(experience.group_mask) / num_groups,
        "completion_tokens": jnp.sum(lengths) / num_rows,
        "truncated_fraction": fraction(rollouts.truncated),
        "no_think_end_fraction": fraction(predictions.think_end_tokens == 0),
        "no_prediction_fraction": fraction(~predictions.found),
        # Longer than any continuation: cannot match, and bytes past the horizon are unknown.
        "prediction_overflow_fraction": fraction(predictions.lengths > width),
        "excluded_mass": jnp.sum(rollouts.num_rejected) / jnp.maximum(1, jnp.sum(lengths)),
        "padded_prompt_fraction": 1 - jnp.mean(groups),
    }


class StepRecorder:
    """Holds one step's device metrics until the next step is under way, then writes them."""

    def __init__(self, config: Config, tokenizer: Tokenizer, run: RunDirectory, params):
        self._config, self._tokenizer, self._run = config, tokenizer, run
        self._num_params = num_parameters(params)
        self._pending = None
        self.flops = 0.0
        self.num_skipped = 0
        self.note = ""

    def add(self, step: int, experience: Experience, spent: list[Experience], updates: list[dict]) -> None:
        """Take a step's results; writes the previous step's."""
        pending = (
            step,
            experience_metrics(experience),
            [count_tokens(e) for e in spent],
            count_tokens(experience),
            updates,
        )
        self.flush()
        self._pending = pending
        every = self._config.run.completions_every_steps
        if every and step % every == 0:
            self._run.write_completions(step, completion_columns(experience, self._tokenizer))

    def flush(self) -> float:
        """Write what is held; returns FLOPs so far."""
        if self._pending is None:
            return self.flops
        step, metrics, spent, kept, updates = self._pending
        self._pending = None
        rounds, kept = [to_host(counts) for counts in spent], to_host(kept)
        updates = [to_host(u) for u in updates]
        self.flops += sum(rollout_flops(self._num_params, counts) for counts in rounds)
        self.flops += update_flops(self._num_params, kept["tokens_updated"])
        record = to_host(metrics) | {name: sum(r[name] for r in rounds) for name in rounds[0]}
        record |= {name: float(np.mean([u[name] for u in updates])) for name in updates[0]}
        record |= {"skipped": updates[-1]["skipped"], "rollout_rounds": len(rounds), "flops": self.flops}
        self.num_skipped = int(updates[-1]["skipped"])
        self.note = f"reward {record['reward']:.3f}  tokens {record['completion_tokens']:.1f}"
        self._run.log("rpt", step + 1, record)
        return self.flops


def completion_columns(experience: Experience, tokenizer: Tokenizer) -> dict[str, list]:
    """One row per rollout of a real position: context, completion, prediction, truth, reward."""
    tasks, rollouts, predictions = jax.tree.map(
        np.asarray, (experience.tasks, experience.rollouts, experience.predictions)
    )
    rewards = np.asarray(experience.rewards)
    U, M, G = rewards.shape
    names = ("position_id", "rollout", "context", "completion", "prediction", "truth", "reward", "tokens", "truncated")
    columns: dict[str, list] = {name: [] for name in names}
    for u, m, g in np.ndindex(U, M, G):
        if not tasks.position_mask[u, m]:
            continue
        r = m * G + g
        boundaries = np.flatnonzero(tasks.boundary_mask[u, m])
        truth = tasks.continuation_bytes[u, m, : boundaries[-1] + 1].tobytes() if len(boundaries) else b""
        prediction = predictions.bytes[u, r, : predictions.lengths[u, r]].tobytes()
        row = (
            int(tasks.position_ids[u, m]),
            g,
            tokenizer.decode(tasks.trunk_tokens[u, : tasks.cuts[u, m]]),
            tokenizer.decode(rollouts.tokens[u, r][rollouts.mask[u, r]]),
            prediction.decode("utf-8", errors="replace") if predictions.found[u, r] else None,
            truth.decode("utf-8", errors="replace"),
            float(rewards[u, m, g]),
            int(rollouts.mask[u, r].sum()),
            bool(rollouts.truncated[u, r]),
        )
        for name, value in zip(names, row, strict=True):
            columns[name].append(value)
    return columns
