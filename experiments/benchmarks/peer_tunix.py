"""Tunix's worker for `experiments.benchmarks.peers`: a GRPOLearner that is fed one batch per turn.

Actor and rollout use the same mesh and therefore the same weights. The mesh is one device, or several that share each
matrix. Rollouts use Tunix's vanilla engine on the whole batch. An update runs two prompts per pass, which is fastest.
With one update per batch and no KL term, Tunix runs no other passes.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from tunix.models.qwen3.model import ModelConfig, Qwen3
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from experiments.benchmarks.peers import GROUP_SIZE, LEARNING_RATE, VOCABULARY, Shape, Turns, as_worker, reward

# Prompts per forward-backward pass.
MICROBATCH_PROMPTS = 2


class Tokenizer:
    """Tokenizer whose text is decimal ids separated by spaces.

    Padding and stop token are the first id beyond the vocabulary, because Tunix's engine may sample any id within it
    and excludes both tokens from the loss.
    """

    def encode(self, text: str) -> list[int]:
        """Return the ids that the text lists."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        """Return the ids as text."""
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        """Return None: there is no BOS token."""
        return None

    def eos_id(self) -> int:
        """Return the stop token's id."""
        return VOCABULARY

    def pad_id(self) -> int:
        """Return the padding token's id."""
        return VOCABULARY


class TimedLearner(GRPOLearner):
    """GRPOLearner that reports when the completions and rewards of a batch are ready."""

    turns: Turns

    def _generate_and_compute_advantage(self, training_input, *args, **kwargs):
        batch = jax.block_until_ready(super()._generate_and_compute_advantage(training_input, *args, **kwargs))
        self.turns.rolled_out(int(batch.completion_mask.sum()))
        return batch


def rewards(prompts, completions, **columns) -> list[float]:
    """Return `peers.reward` of every completion."""
    return [reward(Tokenizer().encode(text)) for text in completions]


def make_model(mesh: Mesh) -> Qwen3:
    """Return the model with random weights in Tunix's sharding. Tunix itself would initialise MLPs to zero."""
    config = ModelConfig(
        num_layers=8,
        vocab_size=VOCABULARY,
        embed_dim=256,
        hidden_dim=1024,
        num_heads=4,
        head_dim=64,
        num_kv_heads=2,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    model = Qwen3(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def randomise(weights):
        return weights if weights.ndim == 1 else jnp.asarray(0.02 * rng.standard_normal(weights.shape, np.float32))

    state = jax.tree.map(randomise, nnx.state(model))
    shardings = jax.tree.map(partial(NamedSharding, mesh), nnx.get_partition_spec(state))
    nnx.update(model, jax.device_put(state, shardings))
    return model


def make_cluster(shape: Shape) -> RLCluster:
    """Return actor and rollout on one mesh of all devices, with the settings of the comparison."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(1, -1), ("fsdp", "tp"))
    longest = max(map(len, shape.prompts()))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=0.01))
    return RLCluster(
        actor=make_model(mesh),
        tokenizer=Tokenizer(),
        cluster_config=ClusterConfig(
            role_to_mesh={Role.ACTOR: mesh, Role.ROLLOUT: mesh},
            training_config=RLTrainingConfig(
                actor_optimizer=optimizer,
                max_steps=1_000_000,
                eval_every_n_steps=1_000_000,
                mini_batch_size=shape.num_prompts,
                train_micro_batch_size=MICROBATCH_PROMPTS,
                rollout_micro_batch_size=shape.num_prompts,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=shape.new_tokens,
                max_prompt_length=longest,
                kv_cache_size=longest + shape.new_tokens,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
            ),
        ),
    )


def main() -> None:
    """Train until the driver is done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tensor", type=int, default=1, help="devices that share each matrix")
    shape, turns, args = as_worker(parser)
    jax.config.update("jax_num_cpu_devices", args.tensor)
    cluster = make_cluster(shape)
    config = GRPOConfig(num_generations=GROUP_SIZE, num_iterations=1, beta=0.0)
    learner = TimedLearner(rl_cluster=cluster, algo_config=config, reward_fns=rewards)
    learner.turns = turns
    prompts = [" ".join(map(str, ids)) for ids in shape.prompts()]

    def batches():
        # The learner requests the next batch when it has finished the previous one.
        while turns.wait():
            yield {"prompts": prompts}
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
            turns.answer()

    learner.train(batches())


if __name__ == "__main__":
    main()
