"""Time drawing a token with its log-probability against one logsumexp of the same logits, alternating in one run.

python -m experiments.benchmarks.sampling [--rounds 9] [--json FILE]

There are 64 rows. Logits are normal with standard deviation 2, so top-p 0.95 keeps thousands of tokens. `categorical`
is jax.random.categorical (the Gumbel trick) and a log-softmax at the drawn token. `sorted top-p` truncates by a full
sort.
"""

import jax
import jax.numpy as jnp

from experiments.benchmarks.common import alternate, parser, save_results
from rpt_jax.rollout.sampling import row_keys, sample

ROWS = 64


def categorical(logits, keys):
    """Draw with the Gumbel trick; return (tokens i32 [B], log-probabilities f32 [B, 1]) for logits f32 [B, V]."""
    token = jax.vmap(jax.random.categorical)(keys, logits)
    return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)


def sorted_top_p(logits, keys):
    """Draw like `categorical`, after top-p truncation by a full sort."""
    probabilities = jax.nn.softmax(logits)
    descending = -jnp.sort(-probabilities, axis=-1)
    above = jnp.cumsum(descending, axis=-1) - descending
    least = jnp.min(jnp.where(above < 0.95, descending, jnp.inf), axis=-1, keepdims=True)
    return categorical(jnp.where(probabilities >= least, logits, -jnp.inf), keys)


def main() -> None:
    """Time all programs at three vocabularies and save the figures."""
    args = parser(__doc__, name="sampling", rounds=9).parse_args()
    keys = row_keys(jax.random.key(1), jnp.arange(ROWS))
    options = {
        "sample": dict(temperature=1.0, top_p=1.0, top_k=0),
        "top-p 0.95": dict(temperature=1.0, top_p=0.95, top_k=0),
        "top-k 50": dict(temperature=1.0, top_p=1.0, top_k=50),
        "greedy": dict(temperature=0.0, top_p=1.0, top_k=0),
    }
    results = {}
    for vocab_size in (8192, 32_000, 151_936):
        logits = 2 * jax.random.normal(jax.random.key(0), (ROWS, vocab_size))
        programs = {"logsumexp": jax.jit(lambda x, _: jax.nn.logsumexp(x, axis=-1))}
        programs |= {n: jax.jit(lambda x, k, o=o: sample(x, k, 0, **o)) for n, o in options.items()}
        programs |= {"categorical": jax.jit(categorical), "sorted top-p": jax.jit(sorted_top_p)}
        timings = alternate({n: lambda f=f, x=logits: f(x, keys) for n, f in programs.items()}, args.rounds)
        results[vocab_size] = {
            name: {"seconds": t, "times_logsumexp": t["median"] / timings["logsumexp"]["median"]}
            for name, t in timings.items()
        }

    def draw(axes):
        for name in programs:
            axes.plot(list(results), [1e3 * r[name]["seconds"]["median"] for r in results.values()], "o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="vocabulary", ylabel="milliseconds")
        axes.set_title(f"One token for each of {ROWS} rows")
        axes.legend()

    save_results(args, {"rows": ROWS, "vocabulary": results}, draw)


if __name__ == "__main__":
    main()
