"""The table of rewards. A new reward is one function of the evidence and one line here."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import jax

from rpt_jax.config import Config, RewardConfig
from rpt_jax.errors import ConfigError
from rpt_jax.rewards import controls, likelihood, models, shaping, vote
from rpt_jax.rewards.base import Reward, compose, make_reader, parse_terms
from rpt_jax.rewards.host import make_equivalence_fn, make_host_reward_fn
from rpt_jax.rewards.prefix import DIRECT_PREDICTION, conditional_dense, dense, first_token, prefix
from rpt_jax.rl.advantages import TOKEN_ADVANTAGES
from rpt_jax.rl.surrogates import BATCH_OBJECTIVES, TOKEN_OBJECTIVES
from rpt_jax.scoring.requests import Request, Scorer
from rpt_jax.types import Earned, Evidence

# Maximum length of an answer that a judge sees; longer text is not an answer.
_ANSWER_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class Row:
    """One reward: a function of the evidence, or a judge that runs on the host."""

    fn: Callable[..., Earned] | None = None
    """Function of the evidence, and with `options` of the reward's settings. It runs on the devices, compiled once."""
    options: bool = False
    judge: str | None = None
    """package.module:function that runs on the host; "" stands for reward.function."""
    votes: bool = False
    """`judge` tells which predictions of a group are equal, and the most frequent one is rewarded."""
    requests: tuple[Request, ...] | Callable[[RewardConfig, str], tuple[Request, ...]] = ()
    """Scoring passes, or a function of the reward's settings and the kind of tasks that returns them."""
    learns: bool = False
    """The update may learn the reference of its first request."""
    shapes: bool = False
    """It shapes the outcome of the first term, so it cannot be that."""
    tasks: tuple[str, ...] = ("documents", "questions")
    """Kinds of tasks that it supports."""


_TEXT, _QUESTIONS = ("documents",), ("questions",)
_ON_TEXT = "rpt_jax.rewards.text:judge_"
CATALOG = {
    "prefix": Row(fn=prefix, tasks=_TEXT),
    "first_token": Row(fn=first_token, tasks=_TEXT),
    "dense": Row(fn=dense, requests=(DIRECT_PREDICTION,), tasks=_TEXT),
    "conditional_dense": Row(fn=conditional_dense, requests=(DIRECT_PREDICTION,), tasks=_TEXT),
    "random": Row(fn=controls.random, tasks=_TEXT),
    "random_lengths": Row(fn=controls.random_lengths, tasks=_TEXT),
    "shuffled_targets": Row(fn=controls.shuffled_targets, tasks=_TEXT),
    "math": Row(judge="rpt_jax.rewards.math_judge:math", tasks=_QUESTIONS),
    "choice": Row(judge="rpt_jax.rewards.judges:choice", tasks=_QUESTIONS),
    "exact": Row(judge="rpt_jax.rewards.judges:exact", tasks=_QUESTIONS),
    "code": Row(judge="rpt_jax.rewards.code_judge:code", tasks=_QUESTIONS),
    "custom": Row(judge=""),
    # Nothing verifies: likelihood of the reference, votes.
    "likelihood": Row(fn=likelihood.likelihood, options=True, requests=likelihood.after_thought, learns=True),
    "information_gain": Row(fn=likelihood.information_gain, requests=likelihood.with_average_baseline),
    "verifree": Row(fn=likelihood.verifree, requests=likelihood.after_thought, learns=True),
    "rlpr": Row(fn=likelihood.rlpr, options=True, requests=likelihood.with_start_baseline),
    "ravr": Row(fn=likelihood.ravr, options=True, requests=likelihood.of_posterior, learns=True),
    "nover": Row(fn=likelihood.nover, options=True, requests=likelihood.after_thought_of_average),
    "ttrl": Row(fn=vote.ttrl, options=True),
    "ttrl_math": Row(judge="rpt_jax.rewards.math_judge:math", votes=True, tasks=_QUESTIONS),
    "self_evaluation": Row(fn=likelihood.self_evaluation, requests=likelihood.judgement, tasks=_QUESTIONS),
    "candidate_choice": Row(
        fn=likelihood.candidate_choice,
        options=True,
        requests=likelihood.choices_of_pairs,
        learns=True,
        tasks=_QUESTIONS,
    ),
    "rubric": Row(fn=likelihood.rubric, requests=likelihood.rubric_after_text, tasks=_QUESTIONS),
    # Trained models.
    "reward_model": Row(fn=models.reward_model, requests=(models.AT_END,)),
    "process_model": Row(fn=models.process_model, options=True, requests=(models.AT_STEPS,)),
    # Shaping, next to a reward of the outcome.
    "format": Row(judge=f"{_ON_TEXT}format"),
    "format_nover": Row(judge=f"{_ON_TEXT}format_nover"),
    "format_lines": Row(judge=f"{_ON_TEXT}format_lines"),
    "format_tags": Row(judge=f"{_ON_TEXT}format_tags"),
    "format_think": Row(judge=f"{_ON_TEXT}format_think"),
    "tag_count": Row(judge=f"{_ON_TEXT}tag_count"),
    "language": Row(judge=f"{_ON_TEXT}language"),
    "repetition": Row(judge=f"{_ON_TEXT}repetition"),
    "repeated_window": Row(judge=f"{_ON_TEXT}repeated_window"),
    "coherence": Row(fn=likelihood.coherence, requests=likelihood.own_tokens),
    "syntax": Row(judge=f"{_ON_TEXT}syntax"),
    "fact": Row(fn=likelihood.fact, requests=likelihood.fact_behind_text, tasks=_QUESTIONS),
    "kimi_length": Row(fn=shaping.kimi_length_reward, shapes=True),
    "cosine_length": Row(fn=shaping.cosine_length_reward, options=True, shapes=True),
    "soft_overlong": Row(fn=shaping.soft_overlong_reward, options=True, shapes=True),
    "overlong_filter": Row(fn=shaping.overlong_filter, shapes=True),
}


# Rewards that compare with an accepted answer; 1 is right.
VERIFIERS = ("math", "choice", "exact", "code")


def make_reward(
    config: RewardConfig,
    tokenizer,
    columns: Callable[[int], dict] | None = None,
    scorer: Scorer | None = None,
    *,
    kind: str = "documents",
) -> Reward:
    """Make the reward that `config.terms` and `config.compose` describe.

    Args:
        config: of the reward.
        tokenizer: of the policy.
        columns: task id -> columns for judges (`batches.Source.columns`).
        scorer: for rewards that need scoring passes.
        kind: of the tasks: documents or questions.
    Raises:
        ConfigError: an unknown or malformed term, a function that cannot be imported, or choices of several tokens.
    """
    terms, read = parse_terms(config.terms), make_reader(config, tokenizer)
    rewards = []
    for term in terms:
        row = _row(term.name)
        requests = _requests(row, config, kind)
        for request in requests:
            if request.choices and scorer:
                scorer.choice_ids(request)
        if row.judge is None:
            fn = partial(_configured(row.fn), options=config) if row.options else _compiled(row.fn)
            learned = requests[0] if row.learns and _learns(term.name, config) else None
            # The references of questions hold no bytes that would set how much of a prediction is read.
            width = _ANSWER_BYTES if kind == "questions" else 0
            rewards.append(Reward(fn, requests, width, read, scorer, learned))
            continue
        # The policy's text makes a built-in judge slow, which must not stop a run.
        on_fault = "zero" if row.judge else config.on_fault
        function = row.judge or config.function
        if row.votes:
            fn = partial(_elect, make_equivalence_fn(config, function, width=_ANSWER_BYTES), config)
            rewards.append(Reward(fn, requests, _ANSWER_BYTES, read, scorer))
            continue
        fn = make_host_reward_fn(config, function, tokenizer, columns, width=_ANSWER_BYTES, on_fault=on_fault)
        rewards.append(Reward(fn, requests, _ANSWER_BYTES, read, scorer))
    return compose(terms, rewards, config.compose)


def _elect(same: Callable, config: RewardConfig, evidence: Evidence) -> Earned:
    return vote.ttrl_judged(evidence, *same(evidence), config)


_compiled = cache(jax.jit)


@cache
def _configured(fn: Callable) -> Callable:
    return jax.jit(fn, static_argnames="options")


def _requests(row: Row, config: RewardConfig, kind: str) -> tuple[Request, ...]:
    return row.requests(config, kind) if callable(row.requests) else row.requests


def _learns(name: str, config: RewardConfig) -> bool:
    if name == "candidate_choice":
        return config.likelihood.ranking_loss > 0
    return name in ("verifree", "ravr") or config.likelihood.reference_term != "none"


def _row(name: str) -> Row:
    if name not in CATALOG:
        raise ConfigError(f"reward.terms names {name!r}; it must be one of {', '.join(CATALOG)}. Choose from these.")
    return CATALOG[name]


def judges(terms: Sequence[str]) -> list[str]:
    """Return the names of the terms that are judged on the host, with what is known of a run's task."""
    return [term.name for term in parse_terms(terms) if _row(term.name).judge is not None]


def requests_of(config: RewardConfig, kind: str) -> list[Request]:
    """Return the reward's scoring passes on tasks of this kind."""
    return [r for term in parse_terms(config.terms) for r in _requests(_row(term.name), config, kind)]


def learned_request(config: RewardConfig, kind: str) -> Request | None:
    """Return the pass whose target the update learns; None: there is none."""
    for term in parse_terms(config.terms):
        row = _row(term.name)
        if row.learns and _learns(term.name, config):
            return _requests(row, config, kind)[0]
    return None


def requested_policies(config: RewardConfig) -> set[str]:
    """Return the policies that the reward's scoring passes need: a subset of current, start, average."""
    return {request.policy for request in requests_of(config, "documents")}


def shows_references(config: RewardConfig) -> bool:
    """Return whether every second prompt of training shows its reference."""
    return any(term.name == "ravr" for term in parse_terms(config.terms))


# Rewards that no box changes: they score a text or a thought.
_WITHOUT_BOX = (
    "likelihood", "information_gain", "verifree", "rlpr", "ravr", "rubric", "self_evaluation", "candidate_choice",
    "fact", "coherence", "custom", "reward_model", "process_model",
)  # fmt: skip


def needs_box(config: RewardConfig) -> bool:
    """Return whether a completion without a closed box cannot be rewarded."""
    return parse_terms(config.terms)[0].name not in _WITHOUT_BOX


def check_rewards(config: Config) -> None:
    """Check the terms against the tasks.

    Raises:
        ConfigError: an unknown term, a term that does not fit these tasks, or reward.function without custom.
    """
    kind = "questions" if config.questions.path else "documents"
    names = [term.name for term in parse_terms(config.reward.terms)]
    _check_settings(config, names)
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


# Rewards of 0 or 1.
_OUTCOMES = (
    *VERIFIERS,
    "prefix",
    "first_token",
    "ttrl",
    "ttrl_math",
    "random",
    "random_lengths",
    "shuffled_targets",
    "custom",
)
# Rewards that depend on the thought alone, or on no token.
_ON_THOUGHT = ("likelihood", "information_gain", "verifree", "rlpr", "ravr", "coherence", "overlong_filter")


def _check_learned(config: Config, names: list[str]) -> None:
    """Check rewards whose update also learns the reference."""
    settings = config.reward.likelihood
    if settings.ranking_loss and "candidate_choice" not in names:
        raise ConfigError(
            f"reward.likelihood.ranking_loss={settings.ranking_loss} without the reward candidate_choice, which it "
            "belongs to. Remove it, or add candidate_choice to --reward.terms."
        )
    if settings.reference_term != "none" and "likelihood" not in names:
        raise ConfigError(
            f"reward.likelihood.reference_term={settings.reference_term!r} without the reward likelihood, which it "
            "belongs to. Remove it, or add likelihood to --reward.terms."
        )
    if settings.reference_term == "reward" and settings.measure in ("log", "mean_log"):
        raise ConfigError(
            f"reward.likelihood.reference_term='reward' with measure={settings.measure!r}, which is negative: the "
            "reference would be unlearned. Set --reward.likelihood.measure probability, or another reference term."
        )
    learning = [name for name in names if _row(name).learns and _learns(name, config.reward)]
    if not learning:
        return
    if len(learning) > 1:
        raise ConfigError(
            f"reward.terms has {learning[0]!r} and {learning[1]!r}, which both teach what follows a completion; a row "
            "holds one of them. Remove one."
        )
    if learning == ["candidate_choice"] and settings.judge != "current":
        raise ConfigError(
            f"reward.likelihood.ranking_loss={settings.ranking_loss} with judge={settings.judge!r}, which does not "
            "learn. Set --reward.likelihood.judge current, or --reward.likelihood.ranking-loss 0."
        )
    others = [name for name in names if name not in _ON_THOUGHT]
    if others and learning != ["candidate_choice"]:
        raise ConfigError(
            f"reward.terms has {others[0]!r} next to a reward whose update also learns the reference; its rows hold "
            f"thought and reference, so what {others[0]} rewards after the thought would not be learned. Use one "
            f"of {', '.join(_ON_THOUGHT)}, or --reward.likelihood.reference-term none."
        )
    own = config.loss.kl_in == "reward" or config.rollout.repeat_penalty or config.loss.advantage in TOKEN_ADVANTAGES
    if settings.reference_term == "jepo" and own:
        raise ConfigError(
            "reward.likelihood.reference_term='jepo', which has advantages of its own, with loss.kl_in='reward', "
            f"rollout.repeat_penalty or loss.advantage={config.loss.advantage!r}, which would be dropped. Use "
            "--loss.kl-in loss, no penalty and --loss.advantage grpo."
        )
    if settings.reference_term == "jepo" and len(names) > 1:
        raise ConfigError(
            "reward.likelihood.reference_term='jepo' with several terms; its bound has advantages of its own, so it "
            "must be alone. Remove the other terms."
        )
    if config.loss.aggregation == "seq_mean":
        raise ConfigError(
            "loss.aggregation='seq_mean' with a reward whose update also learns the reference; a token's weight must "
            "not depend on its thought's length. Set --loss.aggregation constant or token_mean."
        )


def _check_models(config: Config, names: list[str]) -> None:
    """Check rewards by trained models against their settings."""
    settings = config.reward.models
    for name, field, path in (
        ("reward_model", "path", settings.path), ("process_model", "process_path", settings.process_path),
    ):  # fmt: skip
        if (name in names) != bool(path):
            raise ConfigError(
                f"reward.terms={config.reward.terms} with reward.models.{field}={path!r}; {name} needs a model, and no "
                f"other reward takes this one. Set --reward.models.{field.replace('_', '-')}, or change --reward.terms."
            )
    if settings.process_use == "reward" or "process_model" not in names:
        return
    if names[0] == "process_model":
        raise ConfigError(
            f"reward.models.process_use={settings.process_use!r} with process_model as the first term; it needs an "
            "outcome before it. Set --reward.terms to e.g. prefix process_model."
        )
    if settings.process_use == "filter" and names[0] not in _OUTCOMES:
        raise ConfigError(
            f"reward.models.process_use='filter' behind {names[0]!r}, whose reward may lie between 0 and 1; only 1 "
            f"counts as right. Put one of {', '.join(_OUTCOMES)} first."
        )
    if settings.process_use == "steps" and config.loss.objective in BATCH_OBJECTIVES:
        raise ConfigError(
            f"reward.models.process_use='steps' with loss.objective={config.loss.objective!r}, which has one advantage "
            f"per completion. Use one of {', '.join(TOKEN_OBJECTIVES)}."
        )
    if settings.process_use == "steps" and config.loss.advantage in TOKEN_ADVANTAGES:
        raise ConfigError(
            f"reward.models.process_use='steps' with loss.advantage={config.loss.advantage!r}, which makes advantages "
            "of tokens itself. Set --loss.advantage grpo."
        )


def _check_pairs(config: Config, names: list[str]) -> None:
    """Check settings that would part the two prompts of a task."""
    number = config.rollout.prompts_per_trunk
    problem = {
        f"reward.terms={config.reward.terms}": len(names) > 1 and "ravr must be alone. Remove the other terms",
        f"rollout.prompts_per_trunk={number}": number % 2 and "it must be even. Change --rollout.prompts-per-trunk",
        "rollout.dynamic_sampling_from_step is set": config.rollout.dynamic_sampling_from_step >= 0
        and "rounds are chosen by prompt. Set --rollout.dynamic-sampling-from-step -1",
        "reward.deviation_filter is set": config.reward.deviation_filter > 0
        and "it leaves out single prompts. Set --reward.deviation-filter 0",
        "positions.selector='pass_rate_band'": config.positions.selector == "pass_rate_band"
        and "rewards of thoughts with the reference in view are no pass rates. Choose another --positions.selector",
    }
    for received, required in problem.items():
        if required:
            raise ConfigError(f"{received} with ravr, whose tasks have two prompts each; {required}.")


def _check_settings(config: Config, names: list[str]) -> None:
    if _row(names[0]).shapes:
        raise ConfigError(
            f"reward.terms begins with {names[0]!r}, which shapes the outcome of the first term; an outcome must come "
            "first. Set --reward.terms to e.g. prefix " + f"{names[0]}."
        )
    if "ravr" in names:
        _check_pairs(config, names)
    _check_learned(config, names)
    graded = [name for name in names[1:] if name in ("kimi_length", "cosine_length")]
    if graded and names[0] not in _OUTCOMES:
        raise ConfigError(
            f"reward.terms has {graded[0]!r} after {names[0]!r}, whose reward may lie between 0 and 1; it must be 0 or "
            f"1, because only 1 counts as right. Put one of {', '.join(_OUTCOMES)} first, or remove {graded[0]}."
        )
    if "verifree" in names and config.loss.advantage not in ("rloo", "mean"):
        raise ConfigError(
            f"loss.advantage={config.loss.advantage!r} with verifree, whose gradient is that of a probability; its "
            "scale must be kept. Set --loss.advantage rloo."
        )
    shaping = config.reward.likelihood.rlpr_shaping
    if not re.fullmatch(r"identity|one_minus|threshold_(0|1|0?\.\d+)", shaping):
        raise ConfigError(
            f"reward.likelihood.rlpr_shaping={shaping!r}; it must be threshold_T with T in [0, 1], identity or "
            "one_minus. Correct --reward.likelihood.rlpr-shaping."
        )
    _check_models(config, names)
    if "candidate_choice" in names and config.reward.likelihood.num_rivals >= config.rollout.group_size:
        raise ConfigError(
            f"reward.likelihood.num_rivals={config.reward.likelihood.num_rivals} of rollout.group_size="
            f"{config.rollout.group_size} rollouts; a text is no rival of itself. Lower --reward.likelihood.num-rivals."
        )
    if config.reward.vote_train > config.rollout.group_size:
        raise ConfigError(
            f"reward.vote_train={config.reward.vote_train} of rollout.group_size={config.rollout.group_size} rollouts; "
            "it must be at most that. Lower --reward.vote-train."
        )
