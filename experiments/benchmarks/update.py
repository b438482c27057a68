"""Time the update: against repeated prompts, with idle groups, with short rows. Measure memory at a large vocabulary.

python -m experiments.benchmarks.update [--rounds 3] [--json FILE]

rpt: 4 trunks of 512 tokens with 4 positions x 8 rollouts each, tails of 24 and completions of 64 tokens, model S.
    `repeated prompts` runs all 128 rows with their full prompts, in microbatches of 16, with a full log-softmax; both
    have the same gradient norm. `half idle` is the same batch with equal rewards in a random half of the groups.
    `short rows` has completions of geometric length (mean 24, cut at 64).
vocabulary: peak temporary memory of loss and gradient of 2,048 completion tokens at vocabulary 151,936 and width 256,
    as the compiler reports it: computed in chunks, compared with a full log-softmax.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.common import MODEL_S, alternate, make_tasks, parser, save_results
from rpt_jax.config import Config, DecoderConfig, MeshConfig, OptimizerConfig, RolloutConfig
from rpt_jax.models.decoder import forward, init_params
from rpt_jax.models.vocabulary_head import next_logits, token_loss
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.rl.optimizer import init_state, make_optimizer
from rpt_jax.rl.trainer import Trainer
from rpt_jax.sequences import trunks_alone
from rpt_jax.types import Earned, Experience, Rollouts

CUTS, TAIL, NEW, GROUP = (464, 480, 496, 512), 24, 64, 8


def make_experience(lengths=None, idle_share: float = 0.0) -> Experience:
    """Return a batch of random completions with alternating rewards 0 and 1.

    Args:
        lengths: int [U, M * G], completion tokens of each row; None: full length.
        idle_share: share of the groups whose rewards are all 1.
    """
    tasks = make_tasks(4, CUTS, TAIL, GROUP, MODEL_S.vocab_size)
    U, M, G = tasks.prompts.row_ids.shape
    rng = np.random.default_rng(1)
    lengths = np.full((U, M * G), NEW) if lengths is None else lengths
    rewards = np.tile(np.arange(G) % 2, (U, M, 1)).astype(np.float32)
    idle = rng.permutation(U * M)[: round(idle_share * U * M)]
    rewards.reshape(U * M, G)[idle] = 1.0
    mask = np.arange(NEW) < lengths[..., None]
    rollouts = Rollouts(
        tokens=np.where(mask, rng.integers(0, MODEL_S.vocab_size - 1, (U, M * G, NEW)), 0).astype(np.int32),
        mask=mask,
        sampler_logprobs=np.zeros((U, M * G, NEW), np.float32),
        truncated=np.ones((U, M * G), bool),
        num_rejected=np.zeros((U, M * G), np.int32),
    )
    return Experience(
        tasks=tasks,
        rollouts=rollouts,
        predictions=None,
        earned=Earned(rewards=rewards, faults=np.zeros(rewards.shape, bool), metrics={}),
        group_mask=tasks.prompts.prompt_mask,
        tokens_scored=np.zeros(U, np.int32),
    )


def repeated_prompts(experience: Experience):
    """Return every row as one full sequence, right-padded, in microbatches of 16.

    Returns:
        (tokens i32 [num_microbatches, 16, T], loss weights f32, same shape). The weight of a completion token is
        -advantage / number of completion tokens in the batch; all others are 0.
    """
    prompts, rollouts = experience.tasks.prompts, experience.rollouts
    U, M, G = prompts.row_ids.shape
    rewards = experience.earned.rewards
    advantages = (rewards - rewards.mean(-1, keepdims=True)) / (rewards.std(-1, keepdims=True) + 1e-6)
    tokens = np.zeros((U * M * G, max(CUTS) + TAIL + NEW), np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for row, (u, m, g) in enumerate(np.ndindex(U, M, G)):
        own = rollouts.tokens[u, m * G + g][rollouts.mask[u, m * G + g]]
        prompt = [*prompts.trunk_tokens[u, : prompts.cuts[u, m]], *prompts.tail_tokens[u, m]]
        tokens[row, : len(prompt) + len(own)] = [*prompt, *own]
        weights[row, len(prompt) : len(prompt) + len(own)] = -advantages[u, m, g] / rollouts.mask.sum()
    return tokens.reshape(-1, 16, tokens.shape[1]), weights.reshape(-1, 16, tokens.shape[1])


@partial(jax.jit, static_argnames="optimizer", donate_argnums=0)
def repeated_update(state, tokens, weights, optimizer):
    """Update on gradients that a scan sums over microbatches.

    The importance ratio is 1, so the gradient is that of weights times log-probabilities.

    Args:
        state: (params, optimizer state).
        tokens, weights: from `repeated_prompts`.
        optimizer: an optax optimizer.
    Returns:
        (new state, gradient norm).
    """
    params, opt_state = state

    def loss_fn(params, tokens, weights):
        hidden, _ = forward(MODEL_S, params, trunks_alone(tokens))
        logprobs = jax.nn.log_softmax(next_logits(params, hidden[:, :-1]))
        return jnp.sum(weights[:, 1:] * jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0])

    def add(total, batch):
        return jax.tree.map(jnp.add, total, jax.grad(loss_fn)(params, *batch)), None

    gradients, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (tokens, weights))
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), optax.tree.norm(gradients)


def time_updates(rounds: int) -> dict:
    """Time the four updates in turn and check that `rpt` and `repeated prompts` have the same gradient norm."""
    mesh, optimizer = make_mesh(MeshConfig()), make_optimizer(OptimizerConfig(max_grad_norm=0.0), 100)
    params = init_params(MODEL_S, mesh, jax.random.key(0))
    trainer = Trainer(
        config=Config(model=MODEL_S, mesh=MeshConfig(microbatch_trunks=1), rollout=RolloutConfig(temperature=1.0)),
        mesh=mesh,
        tokenizer=None,
        header_length=0,
        reward=None,
        optimizer=optimizer,
        columns=None,
    )
    geometric = np.minimum(np.random.default_rng(2).geometric(1 / 24, (4, 32)), NEW)
    experiences = {
        "rpt": make_experience(),
        "half idle": make_experience(idle_share=0.5),
        "short rows": make_experience(lengths=geometric),
    }
    states = {name: init_state(jax.tree.map(jnp.copy, params), optimizer, mesh) for name in experiences}
    norms, counts = {}, {}

    def ours(name):
        states[name], metrics = trainer.learn(states[name], experiences[name])
        norms.setdefault(name, float(metrics[0]["grad_norm"]))
        counts[name] = metrics[0]
        return states[name]

    repeated = jax.device_put(repeated_prompts(experiences["rpt"]))
    plain = {"state": (jax.tree.map(jnp.copy, params), optimizer.init(params))}

    def theirs():
        plain["state"], norm = repeated_update(plain["state"], *repeated, optimizer)
        norms.setdefault("repeated prompts", float(norm))
        return plain["state"]

    functions = {name: partial(ours, name) for name in experiences} | {"repeated prompts": theirs}
    timings = alternate(functions, rounds)
    np.testing.assert_allclose(norms["rpt"], norms["repeated prompts"], rtol=1e-3)
    return {
        name: {"seconds": t, "of_rpt": t["median"] / timings["rpt"]["median"], "grad_norm": norms[name]}
        | {k: float(counts[name][k]) for k in ("tokens_updated", "update_padding_fraction") if name in counts}
        for name, t in timings.items()
    }


def vocabulary_memory() -> dict:
    """Return the peak temporary bytes of loss and gradient at a large vocabulary, as the compiler reports them."""
    config = DecoderConfig(vocab_size=151_936, width=256)
    n = 2048
    shapes = (
        {"head": jax.ShapeDtypeStruct((config.vocab_size, config.width), jnp.float32)},
        jax.ShapeDtypeStruct((1, n, config.width), jnp.float32),
        jax.ShapeDtypeStruct((1, n), jnp.int32),
        jax.ShapeDtypeStruct((1, n), jnp.float32),
    )

    def chunked(params, hidden, targets, weights):
        return token_loss(config, lambda x, w: -w * x, params, hidden, targets, weights, temperature=1.0)[0]

    def whole(params, hidden, targets, weights):
        logprobs = jax.nn.log_softmax(next_logits(params, hidden))
        return -jnp.sum(weights * jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0])

    figures = {}
    for name, loss in (("chunks", chunked), ("full log-softmax", whole)):
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        figures[name] = compiled.memory_analysis().temp_size_in_bytes
    return {"temporary_bytes": figures, "share": figures["chunks"] / figures["full log-softmax"]}


def main() -> None:
    """Run both parts and save the figures."""
    args = parser(__doc__, name="update", rounds=3).parse_args()
    memory = vocabulary_memory()
    updates = time_updates(args.rounds)

    def draw(axes):
        axes.bar(list(updates), [u["seconds"]["median"] for u in updates.values()])
        axes.set(ylabel="seconds", title="One update at RPT's shape, model S")

    save_results(args, {"updates": updates, "vocabulary_151936": memory}, draw)


if __name__ == "__main__":
    main()
