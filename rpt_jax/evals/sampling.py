"""Rollouts for evaluations, with noise that no training step uses."""

from typing import Any

from rpt_jax.config import Config
from rpt_jax.parallel.programs import program_shapes
from rpt_jax.rollout.engine import SCHEDULES, generate, rollout_key
from rpt_jax.scoring.companions import AVERAGE, CURRENT, START
from rpt_jax.tokenizer import Tokenizer
from rpt_jax.types import Rollouts, TaskBatch

# Training steps are below 2^31 - 1, so evaluation noise is never reused.
EVALUATION_STEP = 2**31 - 1


def policies_of(params: Any, start: Any) -> dict[str, Any]:
    """Return the policies of an evaluation. There is no average, so the start replaces it.

    Args:
        params: of the evaluated policy.
        start: that RL started from; None: `params`.
    """
    start = params if start is None else start
    return {CURRENT: params, START: start, AVERAGE: start}


def sample(config: Config, tokenizer: Tokenizer, policies: dict, tasks: TaskBatch, temperature: float) -> Rollouts:
    """Sample rollouts of the current policy; temperature 0 is greedy."""
    return generate(
        config.model,
        policies[CURRENT],
        tasks.prompts,
        rollout_key(config.run.seed, EVALUATION_STEP),
        vocab_size=tokenizer.vocab_size,
        schedule=SCHEDULES[program_shapes(config)],
        **config.rollout.sampling | {"temperature": temperature},
    )
