"""Measure useful tokens per second of the rollout schedules on rows of geometric length, alternating in one run.

python -m experiments.benchmarks.rollout [--rounds 3] [--json FILE]

Model S samples completions from 8 prompts of 128 tokens. A completion ends with probability about 1/48 at every token,
and after 128 tokens at the latest.

queue: 512 rows, 64 per prompt. The two static schedules run 64 rows at a time until all have ended, eight times, or all
    512 at once until all have ended. The other two run 64 slots that queued rows refill, or all rows at once, with
    running rows moved into fewer slots.
questions: 64 rows, 8 per prompt, all at once: static compared with fewer slots.

Every row's tokens are compared with the static schedule's. The figures count the rows that differ, and those of them
whose first difference is a near-tie: a draw within 1e-4 of a boundary of the teacher-forced cumulative distribution.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.common import MODEL_S, alternate, make_tasks, parser, save_results
from rpt_jax.config import MeshConfig
from rpt_jax.models.decoder import forward, init_params
from rpt_jax.models.vocabulary_head import next_logits
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.rollout.engine import STATIC, generate, rollout_key
from rpt_jax.rollout.sampling import row_keys, uniform
from rpt_jax.sequences import completions

MEAN, LIMIT, EOS, TEMPERATURE = 48, 128, 1, 20.0
NEAR = 1e-4


def near_ties(params, tasks, key, ours, static) -> dict:
    """Count all rows, the rows whose tokens differ, and those that a near-tie explains.

    Args:
        params: the decoder's.
        tasks: the prompts of both rollouts.
        key: of the sampling noise.
        ours: rollouts of the schedule to check.
        static: rollouts of the static schedule.
    """
    a, b = np.asarray(ours.tokens), np.asarray(static.tokens)
    differ = np.argwhere((a != b).any(-1))
    explained = 0
    for u, r in differ:
        step = int(np.argmax(a[u, r] != b[u, r]))
        probabilities = _probabilities_at(params, tasks, static, u, r, step)
        cdf = np.concatenate([[0.0], np.cumsum(probabilities)])
        row_id = tasks.row_ids.reshape(len(tasks.cuts), -1)[u, r]
        point = float(uniform(row_keys(key, jnp.asarray([row_id])), step, 0)[0])
        explained += bool(np.abs(cdf - point).min() < NEAR)
    return {"rows_that_differ": len(differ), "of_them_near_ties": explained, "rows": a.shape[0] * a.shape[1]}


def _probabilities_at(params, tasks, rollouts, u, r, step):
    """Return the teacher-forced distribution of token `step` of row `r` of trunk `u`, f64 [MEAN]."""
    one = jax.tree.map(lambda x: np.asarray(x)[u : u + 1], (tasks, rollouts))
    sequences = completions(one[0], jnp.asarray(one[1].tokens), jnp.asarray(one[1].mask))
    sequences = dataclasses.replace(
        sequences,
        **{
            name: getattr(sequences, name)[:, r : r + 1]
            for name in ("branch_tokens", "branch_mask", "branch_prompts", "branch_index")
        },
    )
    stem, branch = jax.jit(partial(forward, MODEL_S))(params, sequences)
    prompt = r // tasks.row_ids.shape[-1]
    tail_end = tasks.trunk_tokens.shape[1] + (prompt + 1) * tasks.tail_tokens.shape[-1] - 1
    hidden = stem[0, tail_end] if step == 0 else branch[0, 0, step - 1]
    logits = np.asarray(next_logits(params, hidden), np.float64)[:MEAN] / TEMPERATURE
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def run_shape(params, tasks, schedules: dict, static: str, rounds: int) -> dict:
    """Time the schedules of one shape and return the figures.

    Args:
        params: the decoder's.
        tasks: prompts of all rows.
        schedules: {name: (options of `generate`, batches to run back to back)}.
        static: name of the schedule that the others are compared with.
        rounds: number of turns of each schedule.
    """
    key = rollout_key(0, 0)
    sampling = dict(
        max_completion_tokens=LIMIT, temperature=TEMPERATURE, top_p=1.0, top_k=0, stop_ids=(EOS,), vocab_size=MEAN
    )

    def call(options, batches):
        return [generate(MODEL_S, params, batch, key, **sampling, **options) for batch in batches]

    timings = alternate({name: partial(call, *schedule) for name, schedule in schedules.items()}, rounds)
    results = {name: _joined(call(*schedule), schedule[1], tasks) for name, schedule in schedules.items()}
    useful = int(np.asarray(results[static].mask).sum())
    lengths = np.asarray(results[static].mask).sum(-1)
    figures = {
        "rows": int(lengths.size),
        "mean_length": float(lengths.mean()),
        "useful_tokens": useful,
        "schedules": {
            name: {
                "seconds": t,
                "useful_tokens_per_second": useful / t["median"],
                "speedup": timings[static]["median"] / t["median"],
            }
            | ({} if name == static else {"tokens": near_ties(params, tasks, key, results[name], results[static])})
            for name, t in timings.items()
        },
    }
    return figures


def _joined(rollouts: list, batches: list, tasks):
    """Return the rollouts of all batches in the order of the rows of `tasks`."""
    if len(rollouts) == 1:
        return rollouts[0]
    order = np.argsort(np.concatenate([b.row_ids.reshape(len(b.cuts), -1) for b in batches], axis=1), axis=1)

    def join(*parts):
        whole = np.concatenate([np.asarray(p) for p in parts], axis=1)
        return np.take_along_axis(whole, order.reshape(order.shape + (1,) * (whole.ndim - 2)), axis=1)

    return jax.tree.map(join, *rollouts)


def main() -> None:
    """Run both shapes and save the figures."""
    args = parser(__doc__, name="rollout", rounds=3).parse_args()
    params = init_params(MODEL_S, make_mesh(MeshConfig()), jax.random.key(0))
    static = {"schedule": STATIC}
    many = make_tasks(8, [120], 8, 64, MODEL_S.vocab_size).prompts
    eighths = [dataclasses.replace(many, row_ids=many.row_ids[..., 8 * i : 8 * i + 8]) for i in range(8)]
    few = make_tasks(8, [120], 8, 8, MODEL_S.vocab_size).prompts
    shapes = {
        "queue": run_shape(
            params,
            many,
            {
                "static, 64 at a time": (static, eighths),
                "static, all 512": (static, [many]),
                "64 slots, refilled": ({"slots_per_trunk": 8}, [many]),
                "all 512, fewer slots": ({}, [many]),
            },
            "static, 64 at a time",
            args.rounds,
        ),
        "questions": run_shape(
            params, few, {"static": (static, [few]), "fewer slots": ({}, [few])}, "static", args.rounds
        ),
    }

    def draw(axes):
        bars = [
            (f"{name}\n({shape})", s["useful_tokens_per_second"])
            for shape, f in shapes.items()
            for name, s in f["schedules"].items()
        ]
        axes.barh(*zip(*reversed(bars), strict=True))
        axes.set_xlabel("useful tokens per second")
        axes.set_title(f"Completions of geometric length (mean {MEAN}, limit {LIMIT}), model S")

    save_results(args, {"shapes": shapes}, draw)


if __name__ == "__main__":
    main()
