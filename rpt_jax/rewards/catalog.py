"""The table of rewards. A new reward is one function of the evidence and one line here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax

from rpt_jax.config import Config, RewardConfig
from rpt_jax.errors import ConfigError
from rpt_jax.rewards import controls
from rpt_jax.rewards.base import Reward, compose, make_reader, parse_terms
from rpt_jax.rewards.host import make_host_reward_fn
from rpt_jax.rewards.prefix import DIRECT_PREDICTION, conditional_dense, dense, first_token, prefix
from rpt_jax.scoring.requests import Request, Scorer
from rpt_jax.types import Earned, Evidence

# Maximum length of an answer that a judge sees; longer text is not an answer.
_ANSWER_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class Row:
    """One reward: a function of the evidence, or a judge that runs on the host."""

    fn: Callable[[Evidence], Earned] | None = None
    """Runs on the devices, compiled once."""
    judge: str | None = None
    """package.module:function that runs on the host; "" stands for reward.function."""
    requests: tuple[Request, ...] = ()
    tasks: tuple[str, ...] = ("documents", "questions")
    """Kinds of tasks that it supports."""


_TEXT, _QUESTIONS = ("documents",), ("questions",)
CATALOG = {
    "prefix": Row(fn=prefix, tasks=_TEXT),
    "first_token": Row(fn=first_token, tasks=_TEXT),
    "dense": Row(fn=dense, requests=(DIRECT_PREDICTION,), tasks=_TEXT),
    "conditional_dense": Row(fn=conditional_dense, requests=(DIRECT_PREDICTION,), tasks=_TEXT),
    "random": Row(fn=controls.random, tasks=_TEXT),
    "shuffled_targets": Row(fn=controls.shuffled_targets, tasks=_TEXT),
    "math": Row(judge="rpt_jax.rewards.math_judge:math", tasks=_QUESTIONS),
    "choice": Row(judge="rpt_jax.rewards.judges:choice", tasks=_QUESTIONS),
    "exact": Row(judge="rpt_jax.rewards.judges:exact", tasks=_QUESTIONS),
    "custom": Row(judge=""),
}


def make_reward(
    config: RewardConfig, tokenizer, columns: Callable[[int], dict] | None = None, scorer: Scorer | None = None
) -> Reward:
    """Make the reward that `config.terms` and `config.compose` describe.

    Args:
        config: of the reward.
        tokenizer: of the policy.
        columns: task id -> columns for judges (`batches.Source.columns`).
        scorer: for rewards that need scoring passes.
    Raises:
        ConfigError: an unknown or malformed term, or a function that cannot be imported.
    """
    terms, read = parse_terms(config.terms), make_reader(config, tokenizer)
    rewards = []
    for term in terms:
        row = _row(term.name)
        if row.judge is None:
            rewards.append(Reward(_compiled(row.fn), row.requests, 0, read, scorer))
            continue
        # The policy's text makes a built-in judge slow, which must not stop a run.
        on_fault = "zero" if row.judge else config.on_fault
        function = row.judge or config.function
        fn = make_host_reward_fn(config, function, tokenizer, columns, width=_ANSWER_BYTES, on_fault=on_fault)
        rewards.append(Reward(fn, row.requests, _ANSWER_BYTES, read, scorer))
    return compose(terms, rewards, config.compose)


_compiled = cache(jax.jit)


def _row(name: str) -> Row:
    if name not in CATALOG:
        raise ConfigError(f"reward.terms names {name!r}; it must be one of {', '.join(CATALOG)}. Choose from these.")
    return CATALOG[name]


def requested_policies(config: RewardConfig) -> set[str]:
    """Return the policies that the reward's scoring passes need: a subset of current, start, average."""
    return {request.policy for term in parse_terms(config.terms) for request in _row(term.name).requests}


def check_rewards(config: Config) -> None:
    """Check the terms against the tasks.

    Raises:
        ConfigError: an unknown term, a term that does not fit these tasks, or reward.function without custom.
    """
    kind = "questions" if config.questions.path else "documents"
    names = [term.name for term in parse_terms(config.reward.terms)]
    for name in names:
        if kind in _row(name).tasks:
            continue
        fitting = ", ".join(n for n, row in CATALOG.items() if kind in row.tasks)
        if kind == "questions":
            raise ConfigError(
                f"reward.terms names {name!r}, which reads a text's continuation, but questions.path is set. "
                f"Set --reward.terms to one of {fitting}."
            )
        raise ConfigError(
            f"reward.terms names {name!r}, which needs questions. Set --questions.path, or --reward.terms to one of "
            f"{fitting}."
        )
    if ("custom" in names) != bool(config.reward.function):
        raise ConfigError(
            f"reward.terms={config.reward.terms} with reward.function={config.reward.function!r}; custom needs a "
            "function and no other reward takes one. Set both or neither."
        )
