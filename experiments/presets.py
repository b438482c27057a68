"""Named starting points. A preset is a full config; the command line overrides single fields of it."""

from rpt_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    LossConfig,
    OptimizerConfig,
    PositionsConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SupervisedConfig,
)

# The quickstart: worked puzzles, 0.8 M parameters, 2 CPU cores, minutes.
TINY_WORKED = Config(
    run=RunConfig(num_steps=120),
    data=DataConfig(template="minimal", trunk_length=64, window_stride=32),
    positions=PositionsConfig(
        entropy_threshold=2.0,
        # The first free digit lies at token 15 at the latest: nothing determines it, so it is no task.
        min_context_tokens=17,
        unfiltered_fraction=0.3,
        difficulty_thresholds=(0.5, 1.0, 2.0),
    ),
    model=DecoderConfig(num_layers=4, width=128, mlp_width=384, num_heads=4, num_kv_heads=4, head_size=32),
    supervised=SupervisedConfig(num_steps=380, batch_size=40),
    rollout=RolloutConfig(num_trunks=48, prompts_per_trunk=1, group_size=8, max_completion_tokens=32, temperature=1.0),
    # Six trunks at a time: the activations of a pass then stay in the cache of a small CPU.
    loss=LossConfig(microbatch_trunks=6),
    optimizer=OptimizerConfig(learning_rate=4e-4, max_grad_norm=1.0, weight_decay=0.0),
    checkpoint=CheckpointConfig(every_steps=40),
    eval=EvalConfig(every_steps=20, num_positions=100),
)

# Anybody's text on the same machine: a trained tokenizer, a cold start from drafts of the text itself.
TINY_TEXT = Config(
    run=RunConfig(num_steps=60),
    data=DataConfig(template="minimal", trunk_length=128, window_stride=64),
    positions=PositionsConfig(entropy_threshold=1.5, unfiltered_fraction=0.15, max_documents=400),
    model=DecoderConfig(num_layers=4, width=128, mlp_width=384, num_heads=4, num_kv_heads=4, head_size=32),
    supervised=SupervisedConfig(num_steps=300, batch_size=32, draft_fraction=0.7),
    rollout=RolloutConfig(num_trunks=12, prompts_per_trunk=4, group_size=8, max_completion_tokens=16, temperature=1.0),
    loss=LossConfig(microbatch_trunks=2),
    optimizer=OptimizerConfig(learning_rate=4e-4, max_grad_norm=1.0, weight_decay=0.0),
    checkpoint=CheckpointConfig(every_steps=30),
    eval=EvalConfig(every_steps=10, num_positions=100, final_num_positions=300, batch_trunks=32),
)

# Questions with answers: RL fine-tuning and zero-shot evaluation of a policy that --policy.path names.
QUESTIONS = Config(
    run=RunConfig(num_steps=100),
    data=DataConfig(trunk_length=1024),
    model=DecoderConfig(),
    rollout=RolloutConfig(
        num_trunks=16, prompts_per_trunk=1, group_size=8, max_completion_tokens=1024, temperature=1.0
    ),
    reward=RewardConfig(name="math"),
    loss=LossConfig(microbatch_trunks=4),
    optimizer=OptimizerConfig(warmup_steps=10),
    checkpoint=CheckpointConfig(every_steps=20),
    eval=EvalConfig(every_steps=20, num_positions=100, final_num_positions=500, num_samples=4, batch_trunks=16),
)

PRESETS = {"tiny_worked": TINY_WORKED, "tiny_text": TINY_TEXT, "questions": QUESTIONS}
