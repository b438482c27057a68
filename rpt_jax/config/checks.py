"""Checks across settings of different sections."""

from typing import Any

from rpt_jax.errors import ConfigError


def check_relations(config: Any) -> None:
    """Check settings against each other. Each is valid by itself.

    Raises:
        ConfigError: names the fields, the requirement and what to change.
    """
    if config.supervised.control_optimizer.schedule == "linear":
        raise ConfigError(
            "supervised.control_optimizer.schedule='linear'; compute determines the control's length, so it must be "
            "'constant'. Change it."
        )
    thresholds = config.eval.difficulty_thresholds
    if list(thresholds) != sorted(thresholds):
        raise ConfigError(
            f"eval.difficulty_thresholds={thresholds}; they must not decrease (easy, medium, hard). Sort them."
        )
    if config.data.path and config.data.mixture:
        raise ConfigError(
            f"data.path={config.data.path!r} and data.mixture are both set; a run reads one of them. Remove one."
        )
    if config.data.tokenizer_pattern and not (config.data.tokenizer or config.policy.path):
        raise ConfigError(
            f"data.tokenizer_pattern={config.data.tokenizer_pattern!r} without data.tokenizer or policy.path; a new "
            "tokenizer has its own pattern. Leave it out, or name the tokenizer."
        )
    low, high = config.positions.pass_rate_band
    if not 0 <= low < high <= 1:
        raise ConfigError(
            f"positions.pass_rate_band={low} {high}; it must be two shares, the lower one first. Correct it."
        )
    if config.reward.compose == "normalize_then_sum" and config.loss.advantage != "grpo":
        raise ConfigError(
            f"loss.advantage={config.loss.advantage!r} with reward.compose='normalize_then_sum', whose result is the "
            "advantage; it must keep its default 'grpo'. Remove it, or use --reward.compose sum."
        )
    _check_processes(config.distributed)
    _check_divisions(config)


def _check_processes(distributed: Any) -> None:
    if distributed.coordinator and not distributed.process_id < distributed.num_processes:
        raise ConfigError(
            f"distributed.process_id={distributed.process_id} of distributed.num_processes="
            f"{distributed.num_processes}; with a coordinator, ids are 0 to num_processes - 1. Correct them."
        )


def _check_divisions(config: Any) -> None:
    model, mesh, loss = config.model, config.mesh, config.loss
    minibatch = config.rollout.num_trunks // loss.num_minibatches
    # -1 is resolved when the run starts.
    microbatch = mesh.microbatch_trunks if mesh.microbatch_trunks > 0 else minibatch
    shards = "mesh.data * mesh.fsdp"
    divisions = [
        ("model.num_heads", model.num_heads, "model.num_kv_heads", model.num_kv_heads),
        ("model.num_kv_heads", model.num_kv_heads, "mesh.tensor", mesh.tensor),
        ("model.mlp_width", model.mlp_width, "mesh.tensor", mesh.tensor),
        ("model.width", model.width, "mesh.fsdp", mesh.fsdp),
        ("model.width", model.width, "mesh.tensor", mesh.tensor),
        ("model.head_size", model.head_size, "2 (rotary halves)", 2),
        ("rollout.num_trunks", config.rollout.num_trunks, "loss.num_minibatches", loss.num_minibatches),
        ("trunks of a minibatch", minibatch, "mesh.microbatch_trunks", microbatch),
        ("trunks of a microbatch", microbatch, shards, mesh.trunk_shards),
        ("supervised.batch_size", config.supervised.batch_size, shards, mesh.trunk_shards),
        ("eval.batch_trunks", config.eval.batch_trunks, shards, mesh.trunk_shards),
    ]
    if model.vocab_size:
        divisions.append(("model.vocab_size", model.vocab_size, "mesh.tensor", mesh.tensor))
    for name, value, by_name, by in divisions:
        if value % by:
            raise ConfigError(f"{name}={value} is not divisible by {by_name}={by}. Change one of the two.")
