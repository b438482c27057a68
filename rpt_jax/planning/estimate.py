"""A rough estimate of memory, used to choose other settings that are worth compiling."""

from collections.abc import Iterator
from dataclasses import replace

from rpt_jax.config import Config
from rpt_jax.errors import ConfigError
from rpt_jax.work import Shape

# Settings are worth compiling if the estimate is at most this share of a chip's memory.
MARGIN = 0.9


def estimate_memory(config: Config, num_tail: int) -> float:
    """Estimate the peak bytes of each chip, accurate enough to choose what to compile.

    Args:
        config: to estimate.
        num_tail: tokens of the prompt after the text.
    """
    return max(estimate_rollout(config, num_tail), estimate_update(config, num_tail))


def estimate_rollout(config: Config, num_tail: int) -> float:
    """Estimate the peak bytes of each chip during rollouts; arguments as for `estimate_memory`."""
    m, r, mesh = config.model, config.rollout, config.mesh
    kv = 2 * m.num_layers * m.num_kv_heads * m.head_size * _itemsize(config) / mesh.tensor
    R = r.prompts_per_trunk * r.group_size
    slots = min(r.slots_per_trunk or R, R)
    branches = 1.5 * slots * r.max_completion_tokens
    weights = Shape(m).stored * _itemsize(config) / mesh.tensor
    return _state(config) + weights + r.num_trunks / mesh.trunk_shards * (_stem(config, num_tail) + branches) * kv


def estimate_update(config: Config, num_tail: int) -> float:
    """Estimate the peak bytes of each chip during the update; arguments as for `estimate_memory`."""
    m, r, mesh, size = config.model, config.rollout, config.mesh, _itemsize(config)
    t, D = mesh.tensor, m.width
    R = r.prompts_per_trunk * r.group_size
    per_token = (4 * D + (6 * m.mlp_width + 8 * Shape(m).heads_width) / t) * size
    trunks = config.microbatch_trunks / mesh.trunk_shards
    tokens = trunks * (_stem(config, num_tail) + R * r.max_completion_tokens)
    kept = m.num_layers * D / t * size if m.remat else m.num_layers * per_token
    head = 2 * 4 * m.vocab_size * D / t  # its gradient, unsharded over data x fsdp
    return _state(config) + 4 * _trained(config) / mesh.num_devices + head + tokens * (kept + per_token)


def _itemsize(config: Config) -> int:
    return 2 if config.model.activation_dtype == "bfloat16" else 4


def _trained(config: Config) -> float:
    """Return the number of trained parameters."""
    return (0.02 if config.lora.rank else 1) * Shape(config.model).stored


def _state(config: Config) -> float:
    """Return the bytes of parameters, the policy that RL started from, and the optimizer's state."""
    held = Shape(config.model).stored * (2 if config.policy.param_dtype == "bfloat16" else 4)
    return ((1 if config.lora.rank else 2) * held + 8 * _trained(config)) / config.mesh.num_devices


def _stem(config: Config, num_tail: int) -> int:
    return config.data.trunk_length + config.rollout.prompts_per_trunk * num_tail


def nearest_settings(config: Config, num_tail: int, memory: float) -> Iterator[tuple[list[str], Config]]:
    """Yield (flags, config) of changes that would fit by the estimate, the fewest and gentlest first.

    Fewer slots and fewer prompts per trunk only cost time. More tensor shards need more link traffic. Adapters change
    what is trained.

    Args:
        config: that does not fit; the number of devices stays the same.
        num_tail: tokens of the prompt after the text.
        memory: of a chip, bytes.
    """
    found = []
    r, mesh = config.rollout, config.mesh
    R = r.prompts_per_trunk * r.group_size
    for use_lora in (False, True) if not config.lora.rank else (False,):
        for tensor in (mesh.tensor * 2**i for i in range(4)):
            for prompts in (r.prompts_per_trunk // 2**i for i in range(8) if r.prompts_per_trunk >= 2**i):
                for parts in (1, 2, 4, 8, 16):
                    slots = prompts * r.group_size // parts
                    if not slots:
                        continue
                    change = _changed(config, use_lora, tensor, prompts, 0 if parts == 1 else slots)
                    try:
                        change.validate()
                    except ConfigError:
                        continue
                    if change.mesh.num_devices != config.mesh.num_devices:
                        continue
                    if estimate_memory(change, num_tail) <= MARGIN * memory:
                        words = [
                            f"--rollout.num-trunks {change.rollout.num_trunks} --rollout.prompts-per-trunk {prompts}"
                            if prompts != r.prompts_per_trunk
                            else "",
                            f"--rollout.slots-per-trunk {slots}" if slots != min(r.slots_per_trunk or R, R) else "",
                            f"--mesh.fsdp {change.mesh.fsdp} --mesh.tensor {tensor}" if tensor != mesh.tensor else "",
                            "--lora.rank 32 --policy.param-dtype bfloat16" if use_lora else "",
                            f"--mesh.microbatch-trunks {change.mesh.microbatch_trunks}"
                            if change.mesh.microbatch_trunks != config.mesh.microbatch_trunks
                            else "",
                        ]
                        words = [w for w in words if w]
                        if words:  # no flags: the config itself
                            gentleness = 8 * use_lora + 2 * (tensor != mesh.tensor) + parts / 16 + len(words)
                            found.append((gentleness, words, change))
    for _, words, change in sorted(found, key=lambda f: f[0]):
        yield words, change


def _changed(config: Config, use_lora: bool, tensor: int, prompts: int, slots: int) -> Config:
    mesh = config.mesh
    mesh = replace(mesh, tensor=tensor, fsdp=max(1, mesh.fsdp * mesh.tensor // tensor))
    mesh = replace(mesh, microbatch_trunks=mesh.trunk_shards)
    trunks = config.rollout.num_trunks * config.rollout.prompts_per_trunk // prompts
    return replace(
        config,
        mesh=mesh,
        rollout=replace(config.rollout, num_trunks=trunks, prompts_per_trunk=prompts, slots_per_trunk=slots),
        lora=replace(config.lora, rank=32) if use_lora else config.lora,
        policy=replace(config.policy, param_dtype="bfloat16") if use_lora else config.policy,
    )
