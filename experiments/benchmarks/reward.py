"""Measure rows per second of the prefix reward on bytes that are on the device, alternating with three baselines.

python -m experiments.benchmarks.reward [--rounds 7] [--json FILE]

Predictions have up to 32 bytes and continuations 64, with a boundary after every token of 1 to 6 bytes. About half of
the predictions are prefixes of their continuation, and about 60% of those end at a boundary. The baselines are a Python
loop over prepared bytes objects and sets of boundary lengths, NumPy, and the byte-by-byte definition under jit. All
give the same rewards.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.common import alternate, parser, save_results
from rpt_jax.rewards.prefix import prefix_match_reward

X, Y = 32, 64


def make_rows(num_rows: int, seed: int = 0):
    """Return random (predictions u8 [B, X], lengths i32 [B], continuations u8 [B, Y], boundary masks bool [B, Y])."""
    rng = np.random.default_rng(seed)
    continuation = rng.integers(97, 123, (num_rows, Y), np.uint8)
    ends = np.cumsum(rng.integers(1, 7, (num_rows, Y)), axis=1)
    boundary = np.zeros((num_rows, Y + 1), bool)
    np.put_along_axis(boundary, np.minimum(ends, Y + 1) - 1, True, axis=1)
    boundary = boundary[:, :Y]
    lengths = np.where(rng.random(num_rows) < 0.5, ends[:, 3], rng.integers(1, X + 1, num_rows)).astype(np.int32)
    prediction = continuation[:, :X].copy()
    wrong = rng.random(num_rows) < 0.5
    prediction[wrong, rng.integers(0, 4, wrong.sum())] ^= 1
    return prediction, lengths, continuation, boundary


def numpy_reward(prediction, lengths, continuation, boundary):
    """Return rewards f32 [B] with NumPy."""
    columns = np.arange(X)
    agrees = ((prediction == continuation[:, :X]) | (columns >= lengths[:, None])).all(1)
    return (agrees & boundary[np.arange(len(lengths)), lengths - 1]).astype(np.float32)


@jax.jit
def byte_by_byte(prediction, lengths, continuation, boundary):
    """Return rewards f32 [B] by the definition, comparing single bytes."""
    columns = jnp.arange(X)
    agrees = jnp.all((prediction == continuation[:, :X]) | (columns >= lengths[:, None]), axis=1)
    at_boundary = jnp.any(boundary[:, :X] & (columns == lengths[:, None] - 1), axis=1)
    return (agrees & at_boundary).astype(jnp.float32)


def python_reward(predictions: list[bytes], continuations: list[bytes], boundaries: list[set]) -> list[float]:
    """Return one reward per row with a Python loop."""
    return [
        float(len(p) in ends and c.startswith(p))
        for p, c, ends in zip(predictions, continuations, boundaries, strict=True)
    ]


def main() -> None:
    """Check that all functions agree, time them and save the figures."""
    args = parser(__doc__, name="reward", rounds=7).parse_args()
    results = {}
    for num_rows in (1024, 65_536, 1_048_576):
        rows = make_rows(num_rows)
        on_device = jax.block_until_ready(jax.device_put(rows))
        prediction, lengths, continuation, boundary = rows
        texts = [p[:n].tobytes() for p, n in zip(prediction, lengths)], [c.tobytes() for c in continuation]
        sets = [set((np.flatnonzero(b) + 1).tolist()) for b in boundary]
        functions = {
            "rpt_jax": partial(prefix_match_reward, *on_device),
            "jit, byte by byte": partial(byte_by_byte, *on_device),
            "numpy": partial(numpy_reward, *rows),
            "python": partial(python_reward, *texts, sets),
        }
        expected = np.asarray(functions["python"]())
        assert 0.1 < expected.mean() < 0.9
        for function in functions.values():
            np.testing.assert_array_equal(np.asarray(function()), expected)
        timings = alternate(functions, args.rounds)
        results[num_rows] = {
            name: {
                "seconds": t,
                "million_rows_per_second": num_rows / t["median"] / 1e6,
                "times_python": timings["python"]["median"] / t["median"],
            }
            for name, t in timings.items()
        }

    def draw(axes):
        for name in results[1024]:
            axes.plot(list(results), [r[name]["million_rows_per_second"] for r in results.values()], "o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="million rows per second")
        axes.set_title("Prefix reward")
        axes.legend()

    save_results(args, {"rows": results}, draw)


if __name__ == "__main__":
    main()
