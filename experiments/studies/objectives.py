"""Do the objectives differ? Four updates per rollout batch, so that ratios are not 1; and a critic against a group.

python -m experiments.studies.objectives --preset tiny_worked --directory runs/objectives --seeds 0
    --out docs/results/objectives.json [--arms ppo gspo ...] [--section.field VALUE ...]

Arms start from the seed's warm start (that of is_it_the_reward, whose --directory can be used) and take equally many
steps on the prefix reward. one_update is GRPO as in the other studies, critic trains one instead of comparing with the
group, and waiting draws at most 12 tokens a row in a step; the others take four updates per batch, at the learning rate
of --optimizer.learning-rate divided by two. They resume, and a finished arm is not run again. The script
writes --out after each arm and prints a Markdown table; the KL divergence from the start is measured on a batch that
the final policy samples.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments.cli import run_script
from experiments.studies.is_it_the_reward import missing_arms, parse_study, run_rl_arm
from rpt_jax.config import Config
from rpt_jax.data.batches import TrainIterator
from rpt_jax.parallel.mesh import shard_batch
from rpt_jax.scoring.companions import CURRENT, START
from rpt_jax.scoring.requests import Request
from rpt_jax.train.run import newest_state, prepare
from rpt_jax.train.run_directory import read_json, read_records
from rpt_jax.train.sizes import fitted
from rpt_jax.train.stages.rl import make_trainer
from rpt_jax.train.stages.warm_start import warm_start

_SEQUENCES = {"loss.aggregation": "seq_mean"}
OBJECTIVES = {
    "ppo": {},
    "dual_clip": {"loss.surrogate.dual_clip": 3.0},
    "reinforce": {"loss.objective": "reinforce"},
    "cispo": {"loss.objective": "cispo", "loss.surrogate.ratio_cap": (0.0, 1.2)},
    "sapo": {"loss.objective": "sapo"},
    "kimi": {"loss.objective": "kimi"},
    "gspo": {"loss.objective": "gspo", "loss.clip_eps_low": 3e-4, "loss.clip_eps_high": 4e-4, **_SEQUENCES},
    "sequence_ppo": {"loss.objective": "sequence_ppo", "loss.advantage": "rloo", **_SEQUENCES},
    "gmpo": {"loss.objective": "gmpo", "loss.clip_eps_low": 0.4, "loss.clip_eps_high": 0.4, **_SEQUENCES},
    "clip_cov": {"loss.objective": "clip_cov", "loss.surrogate.cov_fraction": 0.02},
    "kl_cov": {"loss.objective": "kl_cov", "loss.surrogate.cov_fraction": 0.02},
    "dpo": {"loss.objective": "dpo"},
    "reinforce_pp": {"loss.advantage": "reinforce_pp"},
    "gae": {"loss.advantage": "gae"},
}
# One update per batch: GRPO, a critic instead of the group, and rollouts that wait.
ONE_UPDATE = {
    "one_update": {},
    "critic": {"loss.advantage": "gae"},
    "waiting": {"rollout.new_tokens_per_step": 12, "loss.correction.mode": "token_truncate"},
}
ARMS = ONE_UPDATE | {name: {"loss.num_minibatches": 4, **own} for name, own in OBJECTIVES.items()}
_OWN = Request(name="own", policy=START, keep="nothing", target="completion", is_tempered=True)


def run_arm(config: Config, directory: Path, arm: str) -> dict:
    """Run one arm and return its figures, with the means of the updates' metrics."""
    slower = {} if arm in ONE_UPDATE else {"optimizer.learning_rate": config.optimizer.learning_rate / 2}
    settings = {"reward.terms": ("prefix",), "loss.kl_coef": 0.0} | slower | ARMS[arm]
    result = run_rl_arm(config, directory, f"objective_{arm}", settings)
    path = directory / f"objective_{arm}"
    steps = [r for r in read_records(path) if r["stage"] == "rpt"]
    for name in ("clip_fraction", "grad_norm", "entropy"):
        result[name] = float(np.mean([r[name] for r in steps if name in r]))
    return result | {"kl": kl_from_start(path)}


def kl_from_start(path: Path) -> float:
    """Return the mean of log pi - log pi_start over the tokens of a batch that the final policy samples, nats."""
    run = fitted(prepare(Config.from_json((path / "config.json").read_text()), read_only=True))
    params = warm_start(run)
    tasks, rollout = run.domain.training_tasks(run, params), run.config.rollout
    trainer, _ = make_trainer(run, params, tasks)
    state, _, _ = newest_state(run, params)
    iterator = TrainIterator(
        tasks.source, tasks.ids, num_trunks=rollout.num_trunks, prompts_per_trunk=rollout.prompts_per_trunk,
        group_size=rollout.group_size, seed=run.config.run.seed + 1,
    )  # fmt: skip
    batch = shard_batch(run.mesh, next(iterator))
    experience = trainer.roll_out({CURRENT: trainer.policy(state), START: params}, 2**30, batch, 0)
    start = trainer.reward.scorer.score(_OWN, params, batch, experience.rollouts, None)
    gaps = jnp.where(start.mask, experience.rollouts.sampler_logprobs - start.values, 0.0)
    run.directory.close()
    return float(gaps.sum() / start.mask.sum())


def table(found: dict) -> str:
    """Return a Markdown table, one row per arm; a cell has the seeds' values and the largest error over positions."""
    titles = (
        "hard determined", "all", "reward, first 30 steps", "clipped", "gradient norm", "entropy", "KL from the start",
        "FLOPs",
    )  # fmt: skip
    lines = [f"| arm | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for arm in ARMS:
        results = [of[arm] for of in found.values() if arm in of]
        if results:
            cells = [_accuracy([r["after"][split]["sampled_prefix"] for r in results]) for split in titles[:2]]
            cells.append(_plain([float(np.mean(r["reward"][:30])) for r in results], 3))
            cells += [_plain([r[name] for r in results], 3) for name in ("clip_fraction", "grad_norm", "entropy", "kl")]
            cells.append(" / ".join(f"{r['flops'][-1]:.2g}" for r in results))
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _accuracy(figures: list[dict]) -> str:
    return _plain([f["value"] for f in figures], 3) + f" ±{max(f['standard_error'] for f in figures):.3f}"


def _plain(values: list[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def main(argv: list[str]) -> None:
    """Run the arms of every seed, then print the table."""
    args, config = parse_study(argv, list(ARMS), [])
    found = read_json(args.out) if args.out.exists() else {}
    for begun, directory, arm, of_seed in missing_arms(args, config, found):
        of_seed[arm] = run_arm(begun, directory, arm)
    print(table(found))


if __name__ == "__main__":
    run_script(main)
