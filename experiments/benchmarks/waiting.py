"""Measure useful tokens per second of rollouts that wait against rollouts that end in their step, alternating.

python -m experiments.benchmarks.waiting [--rounds 3] [--trunks 4] [--limit 128] [--prompt 128] [--json FILE]

Model S samples groups of 8 completions of prompts of --prompt tokens. A completion ends with probability 2 / limit at
every token, and after --limit tokens at the latest, so its length is geometric around half of the limit.

whole: a step samples --trunks groups until all of their rows have ended; running rows move into fewer slots.
waiting: a step draws at most a quarter of the limit for each row, and keeps twice as many groups in flight: about half
    of their rows have ended and wait for the others of their group. Each step runs prompts and given tokens once more,
    because the policy has changed.

A turn is 16 steps of waiting rollouts, after as many that fill the pipeline, or enough whole steps for as many groups.
Useful tokens are those of groups that have ended.
"""

import dataclasses
import statistics
import time

import jax
import numpy as np

from experiments.benchmarks.common import MODEL_S, make_tasks, parser, save_results
from rpt_jax.config import MeshConfig
from rpt_jax.models.decoder import init_params
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.rl.waiting import Waiting
from rpt_jax.rollout.engine import generate, rollout_key

GROUP, STEPS, EOS = 8, 16, 1


def sampling(limit: int) -> dict:
    """Return options of `generate`: at this temperature tokens are nearly uniform, and one of limit / 2 ends a row."""
    return dict(
        max_completion_tokens=limit, temperature=200.0, top_p=1.0, top_k=0, stop_ids=(EOS,), vocab_size=limit // 2
    )


class Groups:
    """Endless trunks of one prompt each; stands for a `batches.TrainIterator`."""

    def __init__(self, num_trunks: int, prompt: int):
        self.num_trunks, self._next = num_trunks, 0
        self._tasks = make_tasks(64, [prompt - 8], 8, GROUP, MODEL_S.vocab_size)

    def take(self, number: int) -> list[list[int]]:
        """Return the ids of the next trunks."""
        first, self._next = self._next, self._next + number
        return [[i] for i in range(first, first + number)]

    def make(self, trunks: list[list[int]]):
        """Build their batch."""
        rows = np.array([i for (i,) in trunks])
        tasks = jax.tree.map(lambda x: x[rows % 64], self._tasks)
        ids = (rows[:, None, None] * GROUP + np.arange(GROUP)).astype(np.int32)
        return dataclasses.replace(tasks, prompts=dataclasses.replace(tasks.prompts, row_ids=ids))


class WholeRollouts:
    """Steps whose rollouts all end."""

    def __init__(self, params, groups: Groups, limit: int):
        self._params, self._groups, self._limit, self._step = params, groups, limit, 0

    def __call__(self) -> tuple[int, int]:
        """Sample one step; return (groups that ended, their tokens)."""
        batch = self._groups.make(self._groups.take(self._groups.num_trunks))
        rollouts = generate(MODEL_S, self._params, batch.prompts, rollout_key(0, self._step), **sampling(self._limit))
        self._step += 1
        return self._groups.num_trunks, int(np.asarray(rollouts.mask).sum())


class WaitingRollouts:
    """Steps whose rows draw a quarter of the limit."""

    def __init__(self, params, groups: Groups, limit: int):
        self._params, self._groups, self._limit, self._step = params, groups, limit, 0
        self._waiting = Waiting(new_tokens=limit // 4, limit=limit, stop_ids=(EOS,))

    def __call__(self) -> tuple[int, int]:
        """Sample one step; return (groups that ended, their tokens)."""
        batch = self._waiting.next_batch(self._groups, self._step)
        key = rollout_key(0, batch.prompts.born_step)
        options = sampling(self._limit) | {"new_tokens": self._limit // 4}
        rollouts = generate(MODEL_S, self._params, batch.prompts, key, **options)
        ready, rollouts, _ = self._waiting.settle(batch, rollouts)
        is_ready = np.asarray(ready.prompts.prompt_mask)[:, 0]
        self._step += 1
        return int(is_ready.sum()), int(np.asarray(rollouts.mask)[is_ready].sum())


def main() -> None:
    """Alternate both and save the figures."""
    args = parser(__doc__, name="waiting", rounds=3)
    args.add_argument("--trunks", type=int, default=4, help="groups of a step without waiting")
    args.add_argument("--limit", type=int, default=128, help="most tokens of a completion")
    args.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    args = args.parse_args()
    params = init_params(MODEL_S, make_mesh(MeshConfig()), jax.random.key(0))
    whole = WholeRollouts(params, Groups(args.trunks, args.prompt), args.limit)
    waiting = WaitingRollouts(params, Groups(2 * args.trunks, args.prompt), args.limit)
    for _ in range(STEPS):  # compiles, and fills the pipeline
        waiting()
    whole()
    rates: dict[str, list] = {"whole": [], "waiting": []}
    for _ in range(args.rounds):
        groups, tokens, began = 0, 0, time.perf_counter()
        for _ in range(STEPS):
            found = waiting()
            groups, tokens = groups + found[0], tokens + found[1]
        rates["waiting"].append(tokens / (time.perf_counter() - began))
        done, tokens, began = 0, 0, time.perf_counter()
        while done < groups:
            found = whole()
            done, tokens = done + found[0], tokens + found[1]
        rates["whole"].append(tokens / (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = [a / b for a, b in zip(rates["waiting"], rates["whole"], strict=True)]
    figures = {
        "trunks": args.trunks, "limit": args.limit, "prompt": args.prompt, "useful_tokens_per_second": medians,
        "samples": rates,
        "ratio": medians["waiting"] / medians["whole"], "ratio_range": [min(ratios), max(ratios)],
    }  # fmt: skip

    def draw(axes):
        axes.barh(*zip(*medians.items(), strict=True))
        axes.set_xlabel("useful tokens per second")
        axes.set_title(f"Geometric lengths, limit {args.limit}, a quarter of it a step, model S")

    save_results(args, figures, draw)


if __name__ == "__main__":
    main()
