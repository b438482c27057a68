"""Measure how the cost of a step grows with context length, positions, rollouts, vocabulary and model size.

python -m experiments.benchmarks.growth [--rounds 3] [--json FILE] [--axes positions context ...]

A step is a rollout and an update of full-length completions (no stop token, no idle group). Each axis varies one
quantity around 4 documents of 512 tokens (1 document for the vocabulary and parameters axes), 4 positions x 8 rollouts,
tails of 24 and completions of 64 tokens, model S. Measured seconds are compared with a count: tokens times parameters.
Trunks and branches have T + PG(s + c) tokens per document, repeated prompts have PG(T + s + c). One factor per axis
scales both counts to seconds: the median of seconds / count of trunks and branches.
"""

import dataclasses
import time
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.ticker import EngFormatter

from experiments.benchmarks.common import MODEL_S, make_tasks, parser, save_results
from rpt_jax.config import Config, DecoderConfig, MeshConfig, OptimizerConfig, RolloutConfig
from rpt_jax.models.decoder import init_params
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.rewards.base import Reward
from rpt_jax.rl.optimizer import init_state, make_optimizer
from rpt_jax.rl.trainer import Trainer
from rpt_jax.types import Earned
from rpt_jax.work import num_parameters

TAIL, NEW = 24, 64


@dataclasses.dataclass(frozen=True)
class Point:
    """A point on an axis.

    Attributes:
        documents: number of documents.
        context: T, tokens of each document.
        positions: P, positions per document.
        rollouts: G, rollouts per position.
        model: the policy's shape.
    """

    documents: int = 4
    context: int = 512
    positions: int = 4
    rollouts: int = 8
    model: DecoderConfig = MODEL_S

    @property
    def cuts(self) -> list[int]:
        """Cuts, evenly spaced over the last quarter of the context."""
        return [self.context - i * self.context // (4 * self.positions) for i in range(self.positions)]

    def count(self, num_params: int, *, repeated: bool = False) -> float:
        """Return the tokens of a step times `num_params`, with trunks and branches or with repeated prompts."""
        rows = self.positions * self.rollouts
        tokens = rows * (self.context + TAIL + NEW) if repeated else self.context + rows * (TAIL + NEW)
        return self.documents * tokens * num_params


def scaled(layers: int, width: int) -> DecoderConfig:
    """Return model S with another depth and width."""
    return dataclasses.replace(
        MODEL_S, num_layers=layers, width=width, mlp_width=4 * width, num_heads=width // 64, num_kv_heads=width // 128
    )


AXES = {
    "positions": [(p, Point(positions=p)) for p in (1, 2, 4, 8, 16)],
    "context": [(t, Point(context=t)) for t in (128, 256, 512, 1024)],
    "rollouts": [(g, Point(rollouts=g)) for g in (4, 8, 16, 32)],
    "vocabulary": [
        (v, Point(documents=1, model=dataclasses.replace(MODEL_S, vocab_size=v))) for v in (2048, 8192, 32_768, 131_072)
    ],
    "parameters": [
        (None, Point(documents=1, model=scaled(*shape))) for shape in ((4, 128), (8, 256), (8, 384), (12, 512))
    ],
}


def make_step(point: Point):
    """Return (a function that runs one step, the number of parameters)."""
    U, M, G = point.documents, point.positions, point.rollouts
    config = Config(
        model=point.model,
        rollout=RolloutConfig(
            num_trunks=U,
            prompts_per_trunk=M,
            group_size=G,
            max_completion_tokens=NEW,
            temperature=1.0,
            stop_ids=(point.model.vocab_size - 1,),
        ),
        mesh=MeshConfig(microbatch_trunks=1),
        optimizer=OptimizerConfig(),
    )
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer, 100)
    params = init_params(config.model, mesh, jax.random.key(0))
    rewards = jnp.asarray(np.tile(np.arange(G) % 2, (U, M, 1)), jnp.float32)
    trainer = Trainer(
        config=config,
        mesh=mesh,
        # The stop token is never sampled.
        tokenizer=SimpleNamespace(bos_id=None, vocab_size=point.model.vocab_size - 1),
        header_length=0,
        reward=Reward(lambda _: Earned(rewards=rewards, faults=jnp.zeros(rewards.shape, bool), metrics={})),
        optimizer=optimizer,
        columns=None,
    )
    tasks = make_tasks(U, point.cuts, TAIL, G, point.model.vocab_size)
    held = {"state": init_state(params, optimizer, mesh)}

    def step():
        experience = trainer.roll_out(trainer.policies(held["state"]), 0, tasks, 0)
        held["state"], _ = trainer.learn(held["state"], experience)
        return jax.block_until_ready(held["state"])

    return step, num_parameters(params)


def measure(axis: str, rounds: int) -> list[dict]:
    """Time the points of one axis, one step of each in turn.

    Returns:
        Per point: its value on the axis, median seconds, samples, both counts, and seconds over the scaled count.
    """
    steps = {i: make_step(point) for i, (_, point) in enumerate(AXES[axis])}
    for step, _ in steps.values():
        step()
    samples = {i: [] for i in steps}
    for _ in range(rounds):
        for i, (step, _) in steps.items():
            start = time.perf_counter()
            step()
            samples[i].append(time.perf_counter() - start)
    rows = []
    for i, (value, point) in enumerate(AXES[axis]):
        num_params = steps[i][1]
        rows.append(
            {
                "value": value or num_params,
                "seconds": float(np.median(samples[i])),
                "samples": samples[i],
                "count": point.count(num_params),
                "repeated_count": point.count(num_params, repeated=True),
            }
        )
    scale = np.median([r["seconds"] / r["count"] for r in rows])
    return [r | {"seconds_over_count": r["seconds"] / (scale * r["count"])} for r in rows]


def main() -> None:
    """Measure the axes, print and save the figures."""
    command = parser(__doc__, name="growth", rounds=3)
    command.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    args = command.parse_args()
    results = {}
    for axis in args.axes:
        results[axis] = measure(axis, args.rounds)
        print(axis, *(f"{r['value']}: {r['seconds']:.2f} s ({r['seconds_over_count']:.2f})" for r in results[axis]))
    save_results(args, {"axes": results}, partial(draw, results), panels=len(results))


def draw(results, *panels) -> None:
    """Plot one panel per axis: measured seconds and both counts."""
    for axes, (axis, rows) in zip(panels, results.items(), strict=True):
        values = [r["value"] for r in rows]
        scale = np.median([r["seconds"] / r["count"] for r in rows])
        axes.plot(values, [r["seconds"] for r in rows], "o-", label="measured")
        axes.plot(values, [scale * r["count"] for r in rows], "--", label="trunk and branches, counted")
        axes.plot(values, [scale * r["repeated_count"] for r in rows], ":", label="repeated prompts, counted")
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds per step")
        axes.set_xticks(values, [EngFormatter(places=0, sep="")(v) for v in values], minor=False)
        axes.set_yticks([t for t in (1, 2, 5, 10, 20, 50, 100) if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    panels[0].legend(fontsize=8)


if __name__ == "__main__":
    main()
