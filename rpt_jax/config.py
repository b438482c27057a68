"""Every setting of a run: frozen dataclasses, each default stated once, checked before any compile.

Precedence: the default here, then the preset (`experiments/presets.py`), then the command line. The text under a
field is its help text. A derived value is a property or is computed where it is used, never a stored field.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from rpt_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    directory: str = ""
    """Run directory; created if missing. Empty: runs/<preset>."""
    seed: int = 0
    """Seeds parameters, data order and sampling noise. A run is a function of (config, seed, data)."""
    num_steps: int = 100
    """RPT updates after the warm start."""
    control: bool = True
    """Also train the control: next-token training on the same documents, from the same start, with the same compute.
    Questions have none."""
    completions_every_steps: int = 10
    """Write one rollout batch's completions (parquet) every so many steps. 0: never."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    resume: str = "latest"
    """Where RPT goes on in a run directory that holds a run: latest, its newest checkpoint, or a step that one was kept
    of; later ones are set aside. In a new directory, DIR or DIR@STEP begins as a copy of that run at that step."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = ""
    """Training documents: a .txt, .jsonl, .parquet or .array_record file, a glob of them, or hf:NAME[:CONFIG][:SPLIT],
    a dataset of the `datasets` package."""
    mixture: tuple[str, ...] = ()
    """Several corpora instead of data.path, each WEIGHT=PATH or WEIGHT=PATH=TEMPLATE; trunks are drawn by weight."""
    cache: str = ""
    """Directory of tokenised documents and scored positions, shared by runs. Empty: the run directory."""
    heldout_path: str = ""
    """Held-out documents for evaluation. Empty: the last `heldout_fraction` of the training documents."""
    heldout_fraction: float = 0.1
    """Share of documents kept for evaluation when `heldout_path` is empty; in (0, 1)."""
    text_template: str = "{text}"
    """How a jsonl or parquet record becomes a document, e.g. '{problem}\\n\\n{solution}'; backslash-n is a newline."""
    tokenizer: str = ""
    """Tokenizer directory. Empty: train a byte-level BPE on the training documents."""
    tokenizer_vocab_size: int = 1024
    """Vocabulary size of the trained tokenizer when `tokenizer` is empty."""
    template: Literal["minimal", "v0", "v6"] = "v6"
    """Prompt around a context: minimal (text, then <think>), or the paper's v0-like or v6-like wording."""
    chat: bool = False
    """Wrap the prompt in the tokenizer's chat template."""
    trunk_length: int = 512
    """Tokens of a trunk: template header plus document window. Longer documents become overlapping windows."""
    window_stride: int = 256
    """Document tokens between the starts of neighbouring windows."""
    continuation_tokens: int = 8
    """True tokens after a position that a prediction may reach into; later bytes count as unknown."""


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    path: str = ""
    """Questions to train on instead of a text's positions: jsonl or parquet in the verl layout (prompt, reward_model),
    with question or problem and answer, or multiple choice in the MMLU-Pro or ARC layout."""
    heldout_path: str = ""
    """Questions for evaluation. Empty: the last `data.heldout_fraction` of the training questions."""
    template: Literal["boxed", "none"] = "boxed"
    """boxed asks to reason and to put the answer, or its letter, in \\boxed{}; none where the prompts already do."""


@dataclass(frozen=True, kw_only=True)
class PositionsConfig:
    selector: Literal["entropy_threshold", "entropy_top_fraction", "random", "pass_rate_band"] = "entropy_threshold"
    """entropy_threshold keeps positions above that threshold (arXiv:2506.08007 §3.3), entropy_top_fraction those of
    highest entropy; random draws from all, without a proxy pass; pass_rate_band does too, and passes over trunks whose
    positions the rollouts so far got right too often or too rarely."""
    entropy_threshold: float = 1.0
    """Nats; the paper does not state its training threshold."""
    top_fraction: float = 0.2
    """Share of all positions that entropy_top_fraction keeps; in (0, 1)."""
    pass_rate_band: tuple[float, float] = (0.05, 0.95)
    """Lowest and highest share of right rollouts at which pass_rate_band asks a position again."""
    renormalize: bool = False
    """Renormalise the proxy's 16 most likely tokens before taking the entropy."""
    min_context_tokens: int = 16
    """Document tokens that must precede a position: early positions look falsely uncertain."""
    unfiltered_fraction: float = 0.0
    """Share of training positions drawn from all of them, beside those that an entropy selector keeps; in [0, 1)."""
    max_positions_per_window: int = 8
    """At most so many training positions per data.window_stride tokens of a document, drawn at random."""
    max_documents: int = 0
    """Choose positions in the first so many training documents only. 0: in all of them."""
    difficulty_thresholds: tuple[float, float, float] = (0.5, 1.0, 1.5)
    """Entropy above which a position is easy, medium, hard (nested; arXiv:2506.08007 §4.1), nats."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of the slow rotary frequencies beyond the length it was first trained on."""

    factor: float = 1.0
    """Slow frequencies are divided by this. 1: no scaling."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_positions / this are divided whole."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_positions / this stay; those between are interpolated."""
    original_positions: int = 8192


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    family: Literal["qwen2", "qwen3", "llama", "mistral"] = "qwen3"
    """Hugging Face architecture that exports are written as; models/families.py says what each can hold."""
    vocab_size: int = 0
    """Entries of the embedding. 0: the tokenizer's size."""
    num_layers: int = 4
    width: int = 128
    mlp_width: int = 384
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 32
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_positions: int = 32768
    """Positions that the model is made for; a prompt and its completion must fit."""
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    o_bias: bool = False
    """Bias on the attention's output projection (Llama and Qwen3 with attention_bias)."""
    mlp_bias: bool = False
    """Biases in the MLP (Llama with mlp_bias)."""
    qk_norm: bool = True
    """RMS-normalise each query and key head (Qwen3)."""
    tie_embeddings: bool = False
    """Use the embedding as the output head."""
    activation_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; parameters, norms, softmax and log-probabilities stay float32."""
    remat: bool = True
    """Recompute each layer in the backward pass instead of keeping its activations."""
    platform: Literal["", "cpu", "gpu", "tpu"] = ""
    """Machine whose kernels and layouts programs use. Empty: the one they run on; name one to compile for another."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    path: str = ""
    """Hugging Face model directory to start from; its config.json then replaces the model section, but for
    activation_dtype, remat and platform. Empty: random parameters in the shape of the model section."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which parameters are kept and updated."""


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    path: str = ""
    """Hugging Face model directory of the proxy whose entropy chooses positions; it must have the policy's tokenizer.
    Empty: the policy that RPT starts from."""


LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "head"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 0
    """Rank of low-rank adapters, which are then all that is trained. 0: train every parameter."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank."""
    targets: tuple[LoraTarget, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Weights that get an adapter."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum on the layers' matrices, Adam without decay on everything else."""
    learning_rate: float = 1e-6
    matrix_learning_rate: float = 0.02
    """Muon's own rate for the layers' matrices; adapters are none of them."""
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.01
    max_grad_norm: float = 0.2
    """Global gradient norm is clipped to this. 0: no clipping."""
    warmup_steps: int = 0
    schedule: Literal["constant", "linear"] = "constant"
    """After warm-up: constant, or linear to zero at the last step."""


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    path: str = ""
    """jsonl of {"text", "completion"?, "text_weight"?}, or of token ids as experiments.rejection_sample writes them, in
    training order. Empty: the training documents."""
    num_steps: int = 0
    """Warm-start updates before RPT. 0: none."""
    batch_size: int = 40
    """Sequences per update; with `pack`, rows."""
    pack: bool = False
    """Fill each row with as many sequences, in order, as fit; they do not see each other."""
    context_weight: float = 0.2
    """Loss weight of a text that has a completion, where its line does not say, and of plain text beside drafts;
    completions have weight 1."""
    draft_fraction: float = 0.0
    """With an empty path: share of sequences that teach the response format. They are cut at a random position; the
    thought is a draft of the text's next `draft_tokens` tokens, the answer its first."""
    draft_tokens: int = 2
    """Tokens of a draft."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            name="muon", learning_rate=3e-3, weight_decay=0.0, max_grad_norm=1.0, warmup_steps=10
        )
    )
    """The warm start's optimizer."""
    control_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-3, max_grad_norm=1.0, warmup_steps=10)
    )
    """The control's optimizer."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    num_trunks: int = 32
    """Documents per rollout batch (U)."""
    prompts_per_trunk: int = 8
    """Positions per document in a batch (M); a document with fewer is padded, one with more becomes more trunks."""
    group_size: int = 8
    """Rollouts per position (G); at least 2."""
    max_completion_tokens: int = 256
    """Sampling stops here (C); such rollouts count as truncated."""
    temperature: float = 0.8
    """Above 0. Log-probabilities in training are those of this temperature."""
    top_p: float = 1.0
    """Sample inside the smallest set of tokens with at least this probability; in (0, 1]."""
    top_k: int = 0
    """Sample among the k most likely tokens. 0: no limit."""
    slots_per_trunk: int = 0
    """Rollouts of a trunk in flight at once; waiting ones take the places of those that end. 0: all at once. Fewer need
    less memory; what is sampled stays the same."""

    @property
    def sampling(self) -> dict:
        """Arguments of `rollout.engine.generate`."""
        names = ("max_completion_tokens", "temperature", "top_p", "top_k", "slots_per_trunk")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    name: Literal["prefix", "first_token", "dense", "conditional_dense", "math", "choice", "exact", "custom"] = "prefix"
    """Of positions: prefix (arXiv:2506.08007 eq. 3), or its appendix A's first_token, dense, conditional_dense. Of
    questions: math (math-verify), choice (the letter), exact (the string). Of either: custom (reward.function)."""
    function: str = ""
    """For custom: package.module:function, called as function(completion: bytes, prediction: bytes or None,
    columns: dict) -> float in a process of its own, once per completion."""
    time_limit_seconds: float = 10.0
    """Of one call of math or custom; a call that takes longer is a fault and its process is replaced."""
    num_workers: int = 2
    """Processes that judge."""
    on_fault: Literal["fail", "zero"] = "fail"
    """When reward.function raises, hangs or returns no finite number: stop the run, or give 0 and count it. Faults of
    math, choice and exact are always counted: what the policy wrote causes them."""
    boxed_mode: Literal["balanced", "tail", "balanced_then_tail"] = "balanced"
    """How the end of the last box is found: its balancing brace, or the completion's last brace."""
    require_think_end: bool = True
    """Only a box after the last </think> counts."""
    unescape_newline: bool = False
    """Where the prediction as written fails, also try it with backslash-n read as a newline."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    advantage: Literal["grpo", "mean", "rloo", "batch_std", "opo"] = "grpo"
    """Baseline and scale of the reward; see rl/advantages.py."""
    aggregation: Literal["seq_mean", "token_mean", "constant"] = "token_mean"
    """How token terms become one number; see rl/losses.py."""
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    """Ratio bounds 1 - low and 1 + high; inert with one update per rollout batch."""
    kl_coef: float = 0.0
    """Weight of the KL term towards the policy that RPT started from. 0: no reference policy is kept."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    ntp_coef: float = 0.0
    """Weight of a next-token term on the trunks' document tokens, added to the RL loss."""
    num_minibatches: int = 1
    """Updates per rollout batch; 1 is exactly on-policy."""
    microbatch_trunks: int = 0
    """Trunks per forward-backward pass; gradients add up. 0: the whole minibatch at once."""
    dynamic_sampling_from_step: int = -1
    """From this step on, degenerate groups are replaced by further rounds of rollouts (the paper: 500). -1: never."""
    dynamic_sampling_rounds: int = 2
    """At most so many rollout rounds per update."""
    max_skipped_updates: int = 5
    """Stop after so many updates in a row were skipped for a non-finite loss or gradient."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    data: int = 1
    """Replicas of the parameters; trunks are split over data x fsdp."""
    fsdp: int = 1
    """Shards of parameters and optimizer state; trunks are split over data x fsdp."""
    tensor: int = 1
    """Shards of heads, MLP width and vocabulary."""

    @property
    def num_devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def trunk_shards(self) -> int:
        return self.data * self.fsdp


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Several processes for one run. Settings of the launch: a run may go on with others."""

    coordinator: str = ""
    """host:port of process 0, where a launcher says nothing else. Empty: what SLURM or Open MPI say, or one process."""
    num_processes: int = 0
    """With a coordinator: how many there are."""
    process_id: int = 0
    """With a coordinator: which one this is; 0 writes the files."""
    join: bool = False
    """Join the processes that JAX finds in the environment; on slices of several TPU VMs, and under Kubernetes."""
    heartbeat_seconds: int = 100
    """A process that is silent for so long is taken for dead; all others then end."""
    deadline_seconds: float = 3600.0
    """A process that for so long ends no step, segment of a rollout, or batch hangs: it says where, and ends. 0: it
    waits for ever."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 100
    """Save every so many steps of RPT, of the warm start and of the control, and after the last."""
    keep: int = 2
    """Checkpoints kept of each stage, newest first."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every_steps: int = 50
    """Evaluate before the first step, every so many steps, and after the last."""
    num_positions: int = 200
    """Held-out positions per split, drawn uniformly within the split, the same ones at every evaluation."""
    final_num_positions: int = 800
    """The same for the first and last evaluation, whose figures the tables show."""
    num_samples: int = 8
    """Sampled rollouts per position (the k of pass@k and majority@k)."""
    max_documents: int = 1000
    """Evaluate on the first so many held-out documents or questions."""
    batch_trunks: int = 64
    """Held-out windows per evaluation batch; a speed setting, results do not depend on it."""


@dataclass(frozen=True, kw_only=True)
class Config:
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    questions: QuestionsConfig = QuestionsConfig()
    positions: PositionsConfig = PositionsConfig()
    policy: PolicyConfig = PolicyConfig()
    proxy: ProxyConfig = ProxyConfig()
    model: DecoderConfig = DecoderConfig()
    lora: LoraConfig = LoraConfig()
    supervised: SupervisedConfig = SupervisedConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def num_updates(self) -> int:
        """Optimizer steps of RPT."""
        return self.run.num_steps * self.loss.num_minibatches

    def validate(self) -> None:
        """Check everything that can be checked without data or devices.

        Raises:
            ConfigError: names the field, the value received, what is required and what to change.
        """
        _check_types(self, "")
        for name, value, minimum in self._lower_bounds():
            if value < minimum:
                raise ConfigError(f"{name}={value}; it must be at least {minimum}. Raise {name}.")
        for name, value in (
            ("data.heldout_fraction", self.data.heldout_fraction),
            ("positions.unfiltered_fraction", self.positions.unfiltered_fraction or 0.5),
            ("positions.top_fraction", self.positions.top_fraction),
            ("supervised.draft_fraction", self.supervised.draft_fraction or 0.5),
        ):
            if not 0 < value < 1:
                raise ConfigError(f"{name}={value}; it must lie between 0 and 1. Choose a share between them.")
        if self.rollout.temperature <= 0:
            raise ConfigError(
                f"rollout.temperature={self.rollout.temperature}; it must be above 0, for greedy rollouts of one "
                "prompt are all equal and teach nothing. Raise it."
            )
        if self.supervised.control_optimizer.schedule == "linear":
            raise ConfigError(
                "supervised.control_optimizer.schedule='linear'; the control's length is set by compute, so it must be "
                "'constant'. Change it."
            )
        if not 0 < self.rollout.top_p <= 1:
            raise ConfigError(f"rollout.top_p={self.rollout.top_p}; it must lie in (0, 1]. Use 1 for no limit.")
        if list(self.positions.difficulty_thresholds) != sorted(self.positions.difficulty_thresholds):
            raise ConfigError(
                f"positions.difficulty_thresholds={self.positions.difficulty_thresholds}; they must not decrease "
                "(easy, medium, hard). Sort them."
            )
        judges = ("math", "choice", "exact", "custom")
        if self.questions.path and self.reward.name not in judges:
            raise ConfigError(
                f"reward.name={self.reward.name!r} reads a text's continuation, and questions.path asks for questions. "
                f"Set --reward.name to one of {', '.join(judges)}."
            )
        if (self.reward.name == "custom") != bool(self.reward.function):
            raise ConfigError(
                f"reward.name={self.reward.name!r} with reward.function={self.reward.function!r}; custom needs a "
                "function and no other reward takes one. Set both or neither."
            )
        if self.data.path and self.data.mixture:
            raise ConfigError(
                f"data.path={self.data.path!r} and data.mixture are both given; a run reads one. Leave one out."
            )
        low, high = self.positions.pass_rate_band
        if not 0 <= low < high <= 1:
            raise ConfigError(
                f"positions.pass_rate_band={low} {high}; it must be two shares, the lower first. Correct it."
            )
        distributed = self.distributed
        if distributed.coordinator and not distributed.process_id < distributed.num_processes:
            raise ConfigError(
                f"distributed.process_id={distributed.process_id} of distributed.num_processes="
                f"{distributed.num_processes}; with a coordinator ids run from 0 to one below the number. Correct them."
            )
        self._validate_divisions()

    def _lower_bounds(self):
        rollout, loss, model = self.rollout, self.loss, self.model
        yield from (
            ("rollout.group_size", rollout.group_size, 2),
            ("rollout.num_trunks", rollout.num_trunks, 1),
            ("rollout.prompts_per_trunk", rollout.prompts_per_trunk, 1),
            ("rollout.max_completion_tokens", rollout.max_completion_tokens, 1),
            ("rollout.top_k", rollout.top_k, 0),
            ("rollout.slots_per_trunk", rollout.slots_per_trunk, 0),
            ("run.num_steps", self.run.num_steps, 1),
            ("run.completions_every_steps", self.run.completions_every_steps, 0),
            ("supervised.num_steps", self.supervised.num_steps, 0),
            ("supervised.batch_size", self.supervised.batch_size, 1),
            ("supervised.draft_tokens", self.supervised.draft_tokens, 1),
            ("reward.time_limit_seconds", self.reward.time_limit_seconds, 0.01),
            ("reward.num_workers", self.reward.num_workers, 1),
            ("model.max_positions", model.max_positions, 1),
            ("model.rope_scaling.factor", model.rope_scaling.factor, 1.0),
            ("lora.rank", self.lora.rank, 0),
            ("lora.alpha", self.lora.alpha, 1e-6),
            ("model.vocab_size", model.vocab_size, 0),
            ("loss.num_minibatches", loss.num_minibatches, 1),
            ("loss.microbatch_trunks", loss.microbatch_trunks, 0),
            ("loss.kl_coef", loss.kl_coef, 0.0),
            ("loss.ntp_coef", loss.ntp_coef, 0.0),
            ("loss.dynamic_sampling_rounds", loss.dynamic_sampling_rounds, 1),
            ("loss.max_skipped_updates", loss.max_skipped_updates, 1),
            ("data.trunk_length", self.data.trunk_length, 2),
            ("data.window_stride", self.data.window_stride, 1),
            ("data.continuation_tokens", self.data.continuation_tokens, 1),
            ("positions.min_context_tokens", self.positions.min_context_tokens, 1),
            ("positions.max_positions_per_window", self.positions.max_positions_per_window, 1),
            ("positions.max_documents", self.positions.max_documents, 0),
            ("mesh.data", self.mesh.data, 1),
            ("mesh.fsdp", self.mesh.fsdp, 1),
            ("mesh.tensor", self.mesh.tensor, 1),
            ("distributed.num_processes", self.distributed.num_processes, 0),
            ("distributed.process_id", self.distributed.process_id, 0),
            ("distributed.heartbeat_seconds", self.distributed.heartbeat_seconds, 1),
            ("distributed.deadline_seconds", self.distributed.deadline_seconds, 0.0),
            ("checkpoint.every_steps", self.checkpoint.every_steps, 1),
            ("checkpoint.keep", self.checkpoint.keep, 1),
            ("eval.every_steps", self.eval.every_steps, 1),
            ("eval.num_positions", self.eval.num_positions, 2),
            ("eval.final_num_positions", self.eval.final_num_positions, 2),
            ("eval.num_samples", self.eval.num_samples, 1),
            ("eval.batch_trunks", self.eval.batch_trunks, 1),
            ("eval.max_documents", self.eval.max_documents, 1),
            ("data.tokenizer_vocab_size", self.data.tokenizer_vocab_size, 300),
            ("supervised.context_weight", self.supervised.context_weight, 0.0),
            ("loss.clip_eps_low", loss.clip_eps_low, 0.0),
            ("loss.clip_eps_high", loss.clip_eps_high, 0.0),
            ("model.num_heads", model.num_heads, 1),
            ("model.head_size", model.head_size, 2),
            ("model.mlp_width", model.mlp_width, 1),
            ("model.num_layers", model.num_layers, 1),
            ("model.num_kv_heads", model.num_kv_heads, 1),
            ("model.width", model.width, 1),
        )
        supervised = self.supervised
        for name, optimizer in (
            ("optimizer", self.optimizer),
            ("supervised.optimizer", supervised.optimizer),
            ("supervised.control_optimizer", supervised.control_optimizer),
        ):
            for field_name in (
                "learning_rate",
                "matrix_learning_rate",
                "weight_decay",
                "max_grad_norm",
                "warmup_steps",
            ):
                yield f"{name}.{field_name}", getattr(optimizer, field_name), 0

    def _validate_divisions(self) -> None:
        model, mesh, loss = self.model, self.mesh, self.loss
        minibatch = self.rollout.num_trunks // loss.num_minibatches
        microbatch = loss.microbatch_trunks or minibatch
        shards = "mesh.data * mesh.fsdp"
        divisions = [
            ("model.num_heads", model.num_heads, "model.num_kv_heads", model.num_kv_heads),
            ("model.num_kv_heads", model.num_kv_heads, "mesh.tensor", mesh.tensor),
            ("model.mlp_width", model.mlp_width, "mesh.tensor", mesh.tensor),
            ("model.width", model.width, "mesh.fsdp", mesh.fsdp),
            ("model.width", model.width, "mesh.tensor", mesh.tensor),
            ("model.head_size", model.head_size, "2 (rotary halves)", 2),
            ("rollout.num_trunks", self.rollout.num_trunks, "loss.num_minibatches", loss.num_minibatches),
            ("trunks of a minibatch", minibatch, "loss.microbatch_trunks", microbatch),
            ("trunks of a microbatch", microbatch, shards, mesh.trunk_shards),
            ("supervised.batch_size", self.supervised.batch_size, shards, mesh.trunk_shards),
            ("eval.batch_trunks", self.eval.batch_trunks, shards, mesh.trunk_shards),
        ]
        if model.vocab_size:
            divisions.append(("model.vocab_size", model.vocab_size, "mesh.tensor", mesh.tensor))
        for name, value, by_name, by in divisions:
            if value % by:
                raise ConfigError(f"{name}={value} is not divisible by {by_name}={by}. Change one of the two.")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Config":
        """The inverse of `to_json`; raises ConfigError on unknown, missing or ill-typed fields and values."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not a JSON config ({error}); it must be what Config.to_json wrote.") from error
        config = _build(Config, values, "config")
        _check_types(config, "")
        return config


def _check_types(section: Any, prefix: str) -> None:
    """Raises ConfigError at the first field whose value is not of its annotated type, or no finite number."""
    for f in dataclasses.fields(section):
        name, value = f"{prefix}{f.name}", getattr(section, f.name)
        if dataclasses.is_dataclass(f.type):
            if not isinstance(value, f.type):
                raise ConfigError(f"{name}={value!r:.80}; it must be a {f.type.__name__}. Correct it.")
            _check_types(value, f"{name}.")
        elif not _fits(value, f.type):
            wanted = getattr(f.type, "__name__", None) if not get_args(f.type) else str(f.type).replace("typing.", "")
            raise ConfigError(f"{name}={value!r:.80}; it must be {wanted}, and a number finite. Correct it.")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind) and type(value) is str
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if isinstance(value, tuple) and kinds[-1] is Ellipsis else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _build(cls: type, values: Any, where: str):
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {type(values).__name__}; it must be an object of fields.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown, missing = sorted(set(values) - set(fields)), sorted(set(fields) - set(values))
    if unknown or missing:
        raise ConfigError(
            f"{where} has unknown fields {unknown} and lacks {missing}; it must name each field of {cls.__name__} "
            "once. Use the version of rpt_jax that wrote it, or write it anew."
        )
    built = {}
    for name, value in values.items():
        kind = fields[name].type
        if dataclasses.is_dataclass(kind):
            built[name] = _build(kind, value, f"{where}.{name}")
        else:
            built[name] = tuple(value) if isinstance(value, list) else value
    return cls(**built)
