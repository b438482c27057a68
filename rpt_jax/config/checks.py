"""Checks across settings of different sections."""

import math
from typing import Any

from rpt_jax.config.schema import flag_of
from rpt_jax.errors import ConfigError


def check_relations(config: Any) -> None:
    """Check settings against each other. Each is valid by itself.

    Raises:
        ConfigError: names the fields, the requirement and what to change.
    """
    if config.supervised.control_optimizer.schedule == "linear":
        raise ConfigError(
            "supervised.control_optimizer.schedule='linear'; compute determines the control's length, so it must be "
            "'constant'. Remove --supervised.control-optimizer.schedule."
        )
    _check_supervised(config)
    steps = config.steps
    if not steps.delimiter or (steps.every_tokens and steps.marks):
        raise ConfigError(
            f"steps.delimiter={steps.delimiter!r}, every_tokens={steps.every_tokens} and marks={steps.marks}; a step "
            "ends at a text, after a number of tokens, or at marks. Set one of them."
        )
    thresholds = config.eval.difficulty_thresholds
    if list(thresholds) != sorted(thresholds):
        raise ConfigError(
            f"eval.difficulty_thresholds={thresholds}; they must not decrease (easy, medium, hard). Sort them."
        )
    if config.data.path and config.data.mixture:
        raise ConfigError(
            f"data.path={config.data.path!r} and data.mixture are both set; a run reads one of them. Remove "
            "--data.path or --data.mixture."
        )
    if config.questions.path and (config.data.path or config.data.mixture):
        raise ConfigError(
            f"questions.path={config.questions.path!r} and data.path or data.mixture are both set; a run trains on one "
            "of them. Remove --questions.path or --data.path."
        )
    if config.data.tokenizer_pattern and not (config.data.tokenizer or config.policy.path):
        raise ConfigError(
            f"data.tokenizer_pattern={config.data.tokenizer_pattern!r} without data.tokenizer or policy.path; a new "
            "tokenizer has its own pattern. Leave it out, or name the tokenizer."
        )
    positions = config.positions
    if positions.selector == "entropy_threshold" and positions.entropy_threshold >= math.log(16):
        raise ConfigError(
            f"positions.entropy_threshold={positions.entropy_threshold} nats; the entropy over 16 tokens is at most "
            f"ln 16 = {math.log(16):.2f}, so no position would be selected. Lower --positions.entropy-threshold."
        )
    low, high = positions.pass_rate_band
    if not 0 <= low < high <= 1:
        raise ConfigError(
            f"positions.pass_rate_band={low} {high}; it must be two shares, the lower one first. Correct "
            "--positions.pass-rate-band."
        )
    if config.reward.compose == "normalize_then_sum" and config.loss.advantage != "grpo":
        raise ConfigError(
            f"loss.advantage={config.loss.advantage!r} with reward.compose='normalize_then_sum', whose result is the "
            "advantage; it must keep its default 'grpo'. Remove --loss.advantage, or use --reward.compose sum."
        )
    _check_loss(config)
    _check_waiting(config)
    _check_processes(config.distributed)
    _check_divisions(config)


def _check_supervised(config: Any) -> None:
    supervised = config.supervised
    for name, is_set, owner in (
        ("centering", supervised.centering > 0, "bradley_terry"),
        ("value_loss", supervised.value_loss != "squared", "value"),
    ):
        if is_set and supervised.objective != owner:
            raise ConfigError(
                f"supervised.{name}={getattr(supervised, name)!r} with supervised.objective={supervised.objective!r}; "
                f"it belongs to {owner}. Remove --supervised.{name.replace('_', '-')}, or set the objective."
            )
    if supervised.objective == "likelihood":
        return
    if not supervised.path or supervised.pack or supervised.draft_fraction:
        raise ConfigError(
            f"supervised.objective={supervised.objective!r} with path={supervised.path!r}, pack={supervised.pack} and "
            f"draft_fraction={supervised.draft_fraction}; it learns completions of a file, whole. Set "
            "--supervised.path, and remove --supervised.pack and --supervised.draft-fraction."
        )
    if supervised.objective != "dpo" and config.run.num_steps:
        raise ConfigError(
            f"supervised.objective={supervised.objective!r} with run.num_steps={config.run.num_steps}; such a run is a "
            "reward model, which does no RL. Set --run.num-steps 0."
        )


def _check_loss(config: Any) -> None:
    loss, is_composed = config.loss, config.reward.compose == "normalize_then_sum"
    surrogate, correction = loss.surrogate, loss.correction
    low, high = surrogate.ratio_cap
    per_token = loss.advantage in ("gae", "reinforce_pp")
    problems = {
        f"loss.surrogate.dual_clip={surrogate.dual_clip}": 0 < surrogate.dual_clip <= 1
        and "it must be above 1, or 0 for none. Correct --loss.surrogate.dual-clip",
        f"loss.surrogate.ratio_cap={low} {high}": not 0 <= low <= 1 <= high
        and "it must hold 1, the ratio of a fresh sample. Correct --loss.surrogate.ratio-cap",
        f"loss.correction.low={correction.low} and high={correction.high}": correction.low > correction.high
        and "low must be at most high. Correct --loss.correction.low",
        f"loss.correction.max_old_drift={correction.max_old_drift} with loss.num_minibatches=1": (
            correction.max_old_drift > 0 and loss.num_minibatches == 1
        )
        and "with one update per rollout batch the policy has not moved. Set --loss.correction.max-old-drift 0",
        f"loss.kl_in='reward' with loss.kl_coef={loss.kl_coef}": loss.kl_in == "reward"
        and not loss.kl_coef
        and "it must be above 0. Set --loss.kl-coef, or --loss.kl-in loss",
        "loss.kl_in='reward' with loss.kl_estimator='k3_ratio'": (
            loss.kl_in == "reward" and loss.kl_estimator == "k3_ratio"
        )
        and "a reward has no ratio. Choose another --loss.kl-estimator",
        "loss.kl_in='reward' with reward.compose='normalize_then_sum'": loss.kl_in == "reward"
        and is_composed
        and "its result is the advantage, which no reward changes. Use --reward.compose sum",
        f"loss.objective='dpo' with loss.advantage={loss.advantage!r}": loss.objective == "dpo"
        and per_token
        and "pairs are ranked by one number per rollout. Set --loss.advantage grpo",
        "loss.objective='dpo' with loss.correction": loss.objective == "dpo"
        and (correction.mode != "none" or correction.max_old_drift > 0)
        and "which weights advantages, and a pair has none. Remove --loss.correction",
        f"loss.ddof='sample' with loss.advantage={loss.advantage!r}": loss.ddof == "sample"
        and (is_composed or loss.advantage not in ("grpo", "batch_std", "anchor", "max_gap"))
        and "whose formula fixes its deviation. Remove --loss.ddof",
        f"loss.advantage={loss.advantage!r} with rollout.dynamic_sampling_from_step": loss.advantage
        in ("anchor", "gae", "reinforce_pp")
        and config.rollout.dynamic_sampling_from_step >= 0
        and "it learns from groups whose rewards are equal, which dynamic sampling leaves out. Set "
        "--rollout.dynamic-sampling-from-step -1",
        f"loss.surrogate.sapo_temperatures={surrogate.sapo_temperatures}": min(surrogate.sapo_temperatures) <= 0
        and "they must be above 0. Correct --loss.surrogate.sapo-temperatures",
        f"loss.surrogate.cov_bounds={surrogate.cov_bounds}": surrogate.cov_bounds[0] >= surrogate.cov_bounds[1]
        and "the lower one must come first. Correct --loss.surrogate.cov-bounds",
    }
    for received, required in problems.items():
        if required:
            raise ConfigError(f"{received}; {required}.")


def _check_waiting(config: Any) -> None:
    rollout = config.rollout
    new, limit = rollout.new_tokens_per_step, rollout.max_completion_tokens
    received = f"rollout.new_tokens_per_step={new}"
    problems = {
        f"{received} with rollout.max_completion_tokens={limit}": new >= limit > 0
        and "no rollout would ever wait. Lower it, or set 0",
        f"{received} with rollout.dynamic_sampling_from_step={rollout.dynamic_sampling_from_step}": new
        and rollout.dynamic_sampling_from_step >= 0
        and "further rounds would start more rollouts that wait. Set --rollout.dynamic-sampling-from-step -1",
        f"{received} with ravr in reward.terms": new
        and any("ravr" in term for term in config.reward.terms)
        and "both prompts of a task must end in one step. Set --rollout.new-tokens-per-step 0",
        "rollout.earlier_tokens='mask' without rollout.new_tokens_per_step": rollout.earlier_tokens == "mask"
        and not new
        and "no token is drawn earlier. Set it, or --rollout.earlier-tokens train",
        "rollout.repeat_window without rollout.new_tokens_per_step": rollout.repeat_window > 0
        and not new
        and "repeats are looked for between steps. Set it, or --rollout.repeat-window 0",
        f"rollout.repeat_window={rollout.repeat_window}": 0 < rollout.repeat_window < 4
        and "it must hold a piece four times. Set --rollout.repeat-window to at least 4, or 0",
        "rollout.repeat_penalty with reward.compose='normalize_then_sum'": rollout.repeat_penalty > 0
        and config.reward.compose == "normalize_then_sum"
        and "its result is the advantage, which no penalty changes. Use --reward.compose sum",
        "rollout.repeat_penalty without rollout.repeat_window": rollout.repeat_penalty > 0
        and not rollout.repeat_window
        and "nothing is penalised. Set --rollout.repeat-window, or --rollout.repeat-penalty 0",
    }
    for received, required in problems.items():
        if required:
            raise ConfigError(f"{received}; {required}.")


def _check_processes(distributed: Any) -> None:
    if distributed.coordinator and not distributed.process_id < distributed.num_processes:
        raise ConfigError(
            f"distributed.process_id={distributed.process_id} of distributed.num_processes="
            f"{distributed.num_processes}; with a coordinator, ids are 0 to num_processes - 1. Correct them."
        )


# What sets a size that is not a setting itself.
_SHARDS, _HALVES = "mesh.data * mesh.fsdp", "the number of rotary halves"
_MINIBATCH, _MICROBATCH = "trunks of a minibatch", "trunks of a microbatch"
_SETTINGS = {_MINIBATCH: "rollout.num_trunks", _MICROBATCH: "mesh.microbatch_trunks", _SHARDS: "mesh.data"}


def _check_divisions(config: Any) -> None:
    model, mesh, loss = config.model, config.mesh, config.loss
    minibatch = config.rollout.num_trunks // loss.num_minibatches
    # -1 is resolved when the run starts.
    microbatch = mesh.microbatch_trunks if mesh.microbatch_trunks > 0 else minibatch
    divisions = [
        ("model.num_heads", model.num_heads, "model.num_kv_heads", model.num_kv_heads),
        ("model.num_kv_heads", model.num_kv_heads, "mesh.tensor", mesh.tensor),
        ("model.mlp_width", model.mlp_width, "mesh.tensor", mesh.tensor),
        ("model.width", model.width, "mesh.fsdp", mesh.fsdp),
        ("model.width", model.width, "mesh.tensor", mesh.tensor),
        ("model.head_size", model.head_size, _HALVES, 2),
        ("rollout.num_trunks", config.rollout.num_trunks, "loss.num_minibatches", loss.num_minibatches),
        (_MINIBATCH, minibatch, "mesh.microbatch_trunks", microbatch),
        (_MICROBATCH, microbatch, _SHARDS, mesh.trunk_shards),
        ("supervised.batch_size", config.supervised.batch_size, _SHARDS, mesh.trunk_shards),
        ("eval.batch_trunks", config.eval.batch_trunks, _SHARDS, mesh.trunk_shards),
    ]
    if model.vocab_size:
        divisions.append(("model.vocab_size", model.vocab_size, "mesh.tensor", mesh.tensor))
    for name, value, by_name, by in divisions:
        if value % by:
            settings = dict.fromkeys(_SETTINGS.get(n, n) for n in (name, by_name) if n != _HALVES)
            flags = " or ".join(map(flag_of, settings))
            raise ConfigError(f"{name}={value}; it must be divisible by {by_name}={by}. Change {flags}.")
