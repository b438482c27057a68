"""Shapes of a step's arrays, from its config alone: for programs that are compiled before there are any."""

import jax
import numpy as np

from rpt_jax.config import Config
from rpt_jax.rl.slopes import has_slopes
from rpt_jax.sequences import build_tasks, completions, shapes_of
from rpt_jax.types import Rows, TaskBatch


def tasks_shape(config: Config, num_tail: int) -> TaskBatch:
    """Return the shapes of a rollout batch.

    Args:
        config: of the run.
        num_tail: number of prompt tokens after the text.
    """
    r = config.rollout
    row_ids = np.zeros((r.num_trunks, r.prompts_per_trunk, r.group_size), np.int32)
    tasks = build_tasks(
        [], tail=[0] * num_tail, row_ids=row_ids, trunk_length=config.data.trunk_length, num_bytes=64,
        num_tokens=config.data.continuation_tokens,
    )  # fmt: skip
    return shapes_of(tasks)


def microbatch_shape(config: Config, tasks: TaskBatch, num_lanes: int = 0, learned_width: int = 0) -> Rows:
    """Return the shapes of a microbatch whose lanes have full length.

    Args:
        config: of the run.
        tasks: from `tasks_shape`.
        num_lanes: lanes of each trunk; 0: one for each rollout, as if every one is trained on and has full length.
        learned_width: length of rows that end with a reference to learn; 0: rows are completions.
    """
    U = config.microbatch_trunks
    R = num_lanes or config.rollout.prompts_per_trunk * config.rollout.group_size
    C = learned_width or config.rollout.max_completion_tokens
    prompts = jax.tree.map(lambda x: jax.ShapeDtypeStruct((U, *x.shape[1:]), x.dtype), tasks.prompts)
    f32, mask = jax.ShapeDtypeStruct((U, R, C), np.float32), jax.ShapeDtypeStruct((U, R, C), bool)
    tokens = jax.ShapeDtypeStruct((U, R, C), np.int32)
    trunk_weights = jax.ShapeDtypeStruct((U, config.data.trunk_length), np.float32)
    return Rows(
        sequences=jax.eval_shape(completions, prompts, tokens, mask),
        row=tokens,
        policy_weights=f32,
        advantages=f32,
        likelihood_weights=f32 if learned_width else None,
        trunk_weights=trunk_weights if config.loss.ntp_coef else None,
        temperature=f32,
        sampler_logprobs=f32,
        old_logprobs=f32 if config.loss.num_minibatches > 1 else None,
        ref_logprobs=f32 if config.loss.has_kl_term or config.loss.objective == "dpo" else None,
        slopes=f32 if has_slopes(config.loss) else None,
        old_values=f32 if config.loss.has_critic else None,
        returns=f32 if config.loss.has_critic else None,
    )
