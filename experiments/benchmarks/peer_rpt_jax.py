"""This package's worker for `experiments.benchmarks.peers`: a Trainer's `roll_out` and `learn`, as in training.

Documents are trunks and positions are cuts, so a context runs once for any number of branches.
"""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.common import MODEL_S, make_tasks
from experiments.benchmarks.peers import (
    GROUP_SIZE,
    LEARNING_RATE,
    NUM_CORES,
    STOP_ID,
    VOCABULARY,
    PeerError,
    Shape,
    as_worker,
)
from rpt_jax.config import Config, MeshConfig, OptimizerConfig, RolloutConfig
from rpt_jax.models.decoder import init_params
from rpt_jax.parallel.distributed import split_cpu
from rpt_jax.parallel.mesh import make_mesh, shard_batch
from rpt_jax.rewards.base import Reward
from rpt_jax.rl.optimizer import init_state, make_optimizer
from rpt_jax.rl.trainer import Trainer
from rpt_jax.types import Earned, Evidence, TaskBatch

# Documents per forward-backward pass, over all devices.
MICROBATCH_TRUNKS = 4


def make_config(shape: Shape) -> Config:
    """Return the run's config: one device per core, one update per batch."""
    return Config(
        model=MODEL_S,
        rollout=RolloutConfig(
            num_trunks=shape.num_documents,
            prompts_per_trunk=len(shape.cuts),
            group_size=GROUP_SIZE,
            max_completion_tokens=shape.new_tokens,
            temperature=1.0,
            stop_ids=(STOP_ID,),
        ),
        mesh=MeshConfig(data=NUM_CORES, microbatch_trunks=MICROBATCH_TRUNKS),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, max_grad_norm=1.0),
    )


def make_batch(shape: Shape) -> TaskBatch:
    """Return the shape's documents as trunks and its positions as cuts, with the same ids as the peers."""
    tasks = make_tasks(shape.num_documents, shape.cuts, shape.tail_tokens, GROUP_SIZE, VOCABULARY)
    tails = np.broadcast_to(shape.tail(), tasks.prompts.tail_tokens.shape)
    return replace(tasks, prompts=replace(tasks.prompts, trunk_tokens=shape.documents(), tail_tokens=tails))


def rewards(evidence: Evidence) -> Earned:
    """Return `peers.reward` of every rollout, f32 [U, M, G]."""
    means_UR = jnp.mean(evidence.rollouts.tokens.astype(jnp.float32), axis=-1)
    shape = evidence.tasks.prompts.row_ids.shape
    return Earned(rewards=means_UR.reshape(shape) / VOCABULARY, faults=jnp.zeros(shape, bool), metrics={})


def main() -> None:
    """Answer the driver's requests until it is done."""
    shape, turns, _ = as_worker()
    config = make_config(shape)
    config.validate()
    split_cpu(config.mesh, config.distributed)
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.num_updates)
    trainer = Trainer(
        config=config,
        mesh=mesh,
        # The stop token, the last id, is never sampled.
        tokenizer=SimpleNamespace(bos_id=None, vocab_size=STOP_ID),
        header_length=0,
        reward=Reward(rewards),
        optimizer=optimizer,
        columns=lambda task_id: {},
    )
    state = init_state(init_params(config.model, mesh, jax.random.key(0)), optimizer, mesh)
    tasks = shard_batch(mesh, make_batch(shape))
    step = 0
    while turns.wait():
        experience = jax.block_until_ready(trainer.roll_out(trainer.policies(state), step, tasks, 0))
        turns.rolled_out(int(experience.rollouts.mask.sum()))
        state, metrics = trainer.learn(state, experience)
        jax.block_until_ready(state)
        if any(m["rows_left_out_fraction"] for m in metrics):
            raise PeerError("rpt_jax skipped rows in the update; every row must have an advantage. Check the rewards.")
        turns.answer()
        step += 1


if __name__ == "__main__":
    main()
