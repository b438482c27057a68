"""Named starting points. A preset is a full config; the command line overrides individual fields."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from rpt_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    MeshConfig,
    OptimizerConfig,
    PolicyConfig,
    PositionsConfig,
    RewardConfig,
    RolloutConfig,
    RopeScaling,
    RunConfig,
    SupervisedConfig,
)
from rpt_jax.config.schema import with_values
from rpt_jax.errors import ConfigError

# The quickstart: worked puzzles, 0.8 M parameters, minutes on 2 CPU cores.
TINY_WORKED = Config(
    run=RunConfig(num_steps=120),
    data=DataConfig(template="minimal", trunk_length=64, window_stride=32),
    positions=PositionsConfig(
        entropy_threshold=2.0,
        # Exclude the first free digit, at token 15 or earlier: nothing determines it.
        min_context_tokens=17,
        unfiltered_fraction=0.3,
    ),
    model=DecoderConfig(num_layers=4, width=128, mlp_width=384, num_heads=4, num_kv_heads=4, head_size=32),
    supervised=SupervisedConfig(num_steps=380, batch_size=40),
    rollout=RolloutConfig(num_trunks=48, prompts_per_trunk=1, group_size=8, max_completion_tokens=32, temperature=1.0),
    # Six trunks per pass, so that its activations fit into the cache of a small CPU.
    mesh=MeshConfig(microbatch_trunks=6),
    optimizer=OptimizerConfig(learning_rate=4e-4, max_grad_norm=1.0, weight_decay=0.0),
    checkpoint=CheckpointConfig(every_steps=40),
    eval=EvalConfig(every_steps=20, num_positions=100, difficulty_thresholds=(0.5, 1.0, 2.0)),
)

# Any text on the same machine: a tokenizer trained on the text, and a warm start on drafts of it.
TINY_TEXT = Config(
    run=RunConfig(num_steps=60, on_diagnosis="stop"),
    data=DataConfig(template="minimal", trunk_length=128, window_stride=64),
    positions=PositionsConfig(entropy_threshold=1.5, unfiltered_fraction=0.15, max_documents=400, max_tokens=2**20),
    model=DecoderConfig(num_layers=4, width=128, mlp_width=384, num_heads=4, num_kv_heads=4, head_size=32),
    supervised=SupervisedConfig(num_steps=300, batch_size=32, draft_fraction=0.7),
    rollout=RolloutConfig(num_trunks=12, prompts_per_trunk=4, group_size=8, max_completion_tokens=16, temperature=1.0),
    mesh=MeshConfig(microbatch_trunks=2),
    optimizer=OptimizerConfig(learning_rate=4e-4, max_grad_norm=1.0, weight_decay=0.0),
    checkpoint=CheckpointConfig(every_steps=30),
    eval=EvalConfig(every_steps=10, num_positions=100, final_num_positions=300, max_tokens=2**18, batch_trunks=32),
)

# A small learning rate for supervised training of a pretrained model.
_FINE_TUNING = OptimizerConfig(learning_rate=1e-5, max_grad_norm=1.0, warmup_steps=10)

# Any text with the policy in --policy.path, on one accelerator: prompts as chat-template turns, no warm start.
TEXT = Config(
    run=RunConfig(num_steps=200),
    data=DataConfig(chat=True, trunk_length=1024, window_stride=512),
    positions=PositionsConfig(entropy_threshold=1.0),
    model=DecoderConfig(activation_dtype=""),
    supervised=SupervisedConfig(optimizer=_FINE_TUNING, control_optimizer=_FINE_TUNING),
    rollout=RolloutConfig(
        num_trunks=16,
        prompts_per_trunk=4,
        group_size=8,
        max_completion_tokens=1024,
        temperature=0.8,
        slots_per_trunk=-1,
    ),
    mesh=MeshConfig(microbatch_trunks=-1),
    optimizer=OptimizerConfig(warmup_steps=10),
    checkpoint=CheckpointConfig(every_steps=20),
    eval=EvalConfig(every_steps=50, num_positions=100, final_num_positions=400, num_samples=4, batch_trunks=16),
)

# SmolLM2-135M (experiments.fetch_smollm2), a pretrained policy that anyone can have, on 2 CPU cores.
# experiments.recipes.smollm2_rpt runs it. The cold start on drafts teaches only the response format.
SMOLLM2 = Config(
    # runs/smollm2 holds the model.
    run=RunConfig(directory="runs/smollm2_rpt", num_steps=50),
    data=DataConfig(template="minimal", trunk_length=192, window_stride=96),
    positions=PositionsConfig(entropy_threshold=0.5, unfiltered_fraction=0.3, max_tokens=2**16),
    policy=PolicyConfig(path="runs/smollm2"),
    supervised=SupervisedConfig(
        num_steps=15,
        batch_size=32,
        draft_fraction=0.8,
        optimizer=OptimizerConfig(learning_rate=3e-4, max_grad_norm=1.0, weight_decay=0.0, warmup_steps=3),
        control_optimizer=replace(_FINE_TUNING, weight_decay=0.0, learning_rate=3e-5),
    ),
    rollout=RolloutConfig(num_trunks=8, prompts_per_trunk=4, group_size=8, max_completion_tokens=24, temperature=1.0),
    mesh=MeshConfig(microbatch_trunks=2),
    optimizer=OptimizerConfig(learning_rate=3e-5, max_grad_norm=1.0, weight_decay=0.0, warmup_steps=5),
    checkpoint=CheckpointConfig(every_steps=10),
    eval=EvalConfig(
        every_steps=25, num_positions=200, final_num_positions=200, num_samples=4, batch_trunks=8, max_tokens=2**14
    ),
)

# The same on one GPU: 2,048 rollouts a step, longer contexts and thoughts.
SMOLLM2_GPU = replace(
    SMOLLM2,
    run=replace(SMOLLM2.run, directory="runs/smollm2_gpu_rpt", num_steps=200),
    data=replace(SMOLLM2.data, trunk_length=512, window_stride=256),
    positions=replace(SMOLLM2.positions, max_tokens=2**20),
    model=DecoderConfig(activation_dtype=""),
    rollout=replace(
        SMOLLM2.rollout, num_trunks=32, prompts_per_trunk=8, max_completion_tokens=48, slots_per_trunk=-1
    ),
    mesh=MeshConfig(microbatch_trunks=-1),
    checkpoint=CheckpointConfig(every_steps=50),
    eval=replace(
        SMOLLM2.eval, every_steps=50, num_positions=400, final_num_positions=400, num_samples=8, batch_trunks=32,
        max_tokens=2**16,
    ),
)  # fmt: skip

# Questions with answers: RL fine-tuning and zero-shot evaluation of the policy in --policy.path.
QUESTIONS = Config(
    run=RunConfig(num_steps=100),
    data=DataConfig(trunk_length=1024),
    model=DecoderConfig(activation_dtype=""),
    rollout=RolloutConfig(
        num_trunks=16,
        prompts_per_trunk=1,
        group_size=8,
        max_completion_tokens=1024,
        temperature=1.0,
        slots_per_trunk=-1,
    ),
    supervised=SupervisedConfig(optimizer=_FINE_TUNING, control_optimizer=_FINE_TUNING),
    reward=RewardConfig(terms=("math",)),
    mesh=MeshConfig(microbatch_trunks=-1),
    optimizer=OptimizerConfig(warmup_steps=10),
    checkpoint=CheckpointConfig(every_steps=20),
    eval=EvalConfig(every_steps=20, num_positions=100, final_num_positions=500, num_samples=4, batch_trunks=16),
)


def _rpt(model: DecoderConfig, mesh: MeshConfig, **rollout) -> Config:
    """Return the paper's run (arXiv:2506.08007 §3.3): 256 positions x 8 rollouts per step, contexts of 4,096 tokens,
    completions of 8,192, 1,000 steps, dynamic sampling from step 500. Here positions share documents, by default four
    per document.

    Set --policy.path, --proxy.path and --data.path. Plans take the model's shape from the model section.
    """
    rollout = (
        dict(num_trunks=64, prompts_per_trunk=4, group_size=8, max_completion_tokens=8192, temperature=0.8) | rollout
    )
    return Config(
        run=RunConfig(num_steps=1000),
        data=DataConfig(chat=True, trunk_length=4096, window_stride=2048, continuation_tokens=16),
        positions=PositionsConfig(entropy_threshold=1.0),
        model=replace(model, activation_dtype="bfloat16"),
        supervised=SupervisedConfig(batch_size=256, optimizer=_FINE_TUNING, control_optimizer=_FINE_TUNING),
        rollout=RolloutConfig(**rollout, dynamic_sampling_from_step=500),
        mesh=replace(mesh, microbatch_trunks=mesh.trunk_shards),
        checkpoint=CheckpointConfig(every_steps=20),
        # So that an evaluation's rollouts need no more memory than a step's.
        eval=EvalConfig(every_steps=100, num_samples=4, batch_trunks=rollout["num_trunks"]),
    )


# The paper's policy, DeepSeek-R1-Distill-Qwen-14B, on 64 TPU v5p chips.
RPT_QWEN2_5_14B = _rpt(
    DecoderConfig(
        family="qwen2", vocab_size=152064, num_layers=48, width=5120, mlp_width=13824, num_heads=40, num_kv_heads=8,
        head_size=128, rope_theta=1e6, max_positions=131072, norm_eps=1e-5, qkv_bias=True, qk_norm=False,
    ),
    MeshConfig(fsdp=16, tensor=4),
    slots_per_trunk=16,
)  # fmt: skip

# Qwen3-1.7B on 16 TPU v6e chips.
RPT_QWEN3_1_7B = _rpt(
    DecoderConfig(
        family="qwen3", vocab_size=151936, num_layers=28, width=2048, mlp_width=6144, num_heads=16, num_kv_heads=8,
        head_size=128, rope_theta=1e6, max_positions=40960, tie_embeddings=True,
    ),
    MeshConfig(fsdp=8, tensor=2),
    num_trunks=128,
    prompts_per_trunk=2,
    slots_per_trunk=1,
)  # fmt: skip

# Llama-3.1-8B on 32 TPU v5p chips.
RPT_LLAMA3_8B = _rpt(
    DecoderConfig(
        family="llama", vocab_size=128256, num_layers=32, width=4096, mlp_width=14336, num_heads=32, num_kv_heads=8,
        head_size=128, rope_theta=5e5, max_positions=131072, norm_eps=1e-5, qk_norm=False,
        rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192),
    ),
    MeshConfig(fsdp=8, tensor=4),
    slots_per_trunk=8,
)  # fmt: skip

PRESETS = {
    "tiny_worked": TINY_WORKED,
    "tiny_text": TINY_TEXT,
    "text": TEXT,
    "questions": QUESTIONS,
    "smollm2": SMOLLM2,
    "smollm2_gpu": SMOLLM2_GPU,
    "rpt_qwen2_5_14b": RPT_QWEN2_5_14B,
    "rpt_qwen3_1_7b": RPT_QWEN3_1_7B,
    "rpt_llama3_8b": RPT_LLAMA3_8B,
}
PURPOSES = {
    "tiny_worked": "puzzles, a 0.8 M policy of its own, minutes on 2 CPU cores (the quickstart)",
    "tiny_text": "any text, a small policy and tokenizer of its own, minutes on 2 CPU cores",
    "text": "any text, your pretrained policy, one GPU or TPU",
    "questions": "questions with answers, your pretrained policy, one GPU or TPU",
    "smollm2": "any text, SmolLM2-135M, sized for 2 CPU cores",
    "smollm2_gpu": "the same with larger batches, one GPU",
    "rpt_qwen2_5_14b": "the paper's run: R1-Distill-Qwen-14B on 64 TPU v5p chips",
    "rpt_qwen3_1_7b": "the paper's batch with Qwen3-1.7B on 16 TPU v6e chips",
    "rpt_llama3_8b": "the paper's batch with Llama-3.1-8B on 32 TPU v5p chips",
}
# Methods change the reward and loss of a preset: `tiny_worked+verifree`; a method alone stands for text+METHOD. Reward,
# advantage, aggregation and clipping are the authors'; learning rates, group sizes, lengths and the decay of NOVER's
# average stay the preset's.
METHODS: dict[str, dict[str, Any]] = {
    "information_gain": {
        "reward.terms": ("information_gain",), "loss.advantage": "rloo", "loss.aggregation": "seq_mean",
        "companion.decay": 0.999,
    },
    "nover": {"reward.terms": ("nover",), "loss.advantage": "grpo", "loss.aggregation": "seq_mean"},
    "verifree": {"reward.terms": ("verifree",), "loss.advantage": "rloo", "loss.aggregation": "constant"},
    "rlpr": {
        "reward.terms": ("0.9*rlpr", "0.1*format"), "loss.advantage": "grpo", "loss.aggregation": "token_mean",
        "loss.clip_eps_high": 0.27, "reward.deviation_filter": 0.5,
    },
    "ravr": {"reward.terms": ("ravr",), "loss.advantage": "grpo", "loss.aggregation": "token_mean"},
    "rubric": {
        "reward.terms": ("rubric",), "questions.template": "none", "loss.advantage": "grpo",
        "loss.aggregation": "token_mean",
    },
    "ttrl": {"reward.terms": ("ttrl",), "loss.advantage": "grpo", "loss.aggregation": "token_mean"},
}  # fmt: skip
METHOD_PURPOSES = {
    "information_gain": "what a thought adds to the text's log-likelihood (RLP)",
    "nover": "perplexity of the reference after the thought, ranked in the group",
    "verifree": "probability of the reference after the thought, whose gradient is exact",
    "rlpr": "mean token probability of the reference, against that without a thought",
    "ravr": "thoughts written with the reference in view, by what they add, and distilled",
    "rubric": "how likely a text makes criteria; with questions: questions+rubric",
    "ttrl": "the group's majority; the truth only evaluates",
}
# Presets whose policy must be pretrained.
NEED_A_POLICY = ("text", "questions", "rpt_qwen2_5_14b", "rpt_qwen3_1_7b", "rpt_llama3_8b")


def find_preset(name: str | None) -> tuple[str, Config] | None:
    """Return (name of the base, config) of PRESET, PRESET+METHOD or METHOD; None: there is no such preset."""
    base, plus, method = (name or "").partition("+")
    if base in METHODS and not plus:
        base, plus, method = "text", "+", base
    if base not in PRESETS or (plus and method not in METHODS):
        return None
    return base, with_values(PRESETS[base], method_settings(method, PRESETS[base])) if method else PRESETS[base]


def method_settings(method: str, config: Config) -> dict[str, Any]:
    """Return the settings of a method on top of a config."""
    settings = METHODS[method]
    if method == "ravr" and config.rollout.prompts_per_trunk == 1:
        # Two prompts for each task, and as many rollouts as before.
        settings = settings | {"rollout.prompts_per_trunk": 2, "rollout.num_trunks": config.rollout.num_trunks // 2}
    return settings


def preset_names() -> str:
    """Return what a preset may be, in words."""
    return f"one of {', '.join(PRESETS)}, with +METHOD or not, or a method: {', '.join(METHODS)}"


def preset(name: str, values: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """Return a preset with some settings changed, for `rpt_jax.train`; its directory is runs/<name> unless set.

    Args:
        name: of the preset.
        values: by the setting's path, {"data.path": "my.txt", "rollout.group_size": 4}.
    Raises:
        ConfigError: an unknown preset or setting, or an invalid value.
    """
    found = find_preset(name)
    if found is None:
        raise ConfigError(f"preset {name!r}; it must be {preset_names()}. Choose one.")
    config = with_values(found[1], values)
    if not config.run.directory:
        config = replace(config, run=replace(config.run, directory=f"runs/{name}"))
    config.validate()
    return config
