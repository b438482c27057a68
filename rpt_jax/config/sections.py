"""Every setting of a run: frozen dataclasses, with default, bounds and help text at the field.

Precedence: default, then preset (`experiments/presets.py`), then command line. The text under a field is its help
text. Derived values are properties or computed where they are used, never stored fields.
"""

from dataclasses import dataclass, field
from typing import Literal

from rpt_jax.config.checks import check_relations
from rpt_jax.config.schema import check_fields, from_json, setting, to_json


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    directory: str = setting("", free="always", shown=True)
    """Run directory, created if missing. Empty: runs/<preset>."""
    seed: int = setting(0, shown=True)
    """Seed of parameters, data order and sampling noise. A run is a function of (config, seed, data)."""
    num_steps: int = setting(100, at_least=0, free="always", shown=True)
    """RPT updates after the warm start. 0: only the warm start, for other runs to begin from."""
    control: bool = True
    """Also train the control: next-token training on the same documents, from the same start, with the same compute.
    Questions have none."""
    on_diagnosis: Literal["warn", "stop"] = setting("warn", free="always")
    """If the tasks are too few, or if a dozen steps taught nothing: say why and go on, or stop. Completed steps are
    saved."""
    max_skipped_updates: int = setting(5, at_least=1)
    """Stop after this many consecutive updates were skipped for a non-finite loss or gradient."""
    completions_every_steps: int = setting(10, at_least=0, free="always")
    """Write the completions (parquet) of a rollout batch every N steps, and of every evaluation. 0: never."""
    tensorboard: bool = setting(True, free="always")
    """Write TensorBoard event files in addition to metrics.jsonl."""
    shapes: Literal["", "many", "few"] = setting("", free="always")
    """Sizes that rollouts and updates are rounded up to. many: padding is small, but each size is a program to compile.
    few: at most two of each. Empty: few on GPUs, many elsewhere. Tokens do not depend on it, except near-ties."""
    compilation_cache: str = setting("", free="always")
    """Directory of compiled programs, which later starts reuse. Empty: rpt_jax in the user's cache directory. off: no
    cache."""
    resume: str = setting("latest", free="always", shown=True)
    """Where an existing run resumes: latest (its newest checkpoint) or the step of a kept checkpoint, which sets later
    checkpoints aside. In a new directory, DIR or DIR@STEP starts from a copy of that run at that step."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = setting("", shown=True)
    """Training documents: a .txt, .jsonl, .parquet or .array_record file, a glob of them, or hf:NAME[:CONFIG][:SPLIT]
    for a dataset of the `datasets` package."""
    mixture: tuple[str, ...] = ()
    """Several corpora instead of data.path, each WEIGHT=PATH or WEIGHT=PATH=TEMPLATE; trunks are drawn by weight."""
    cache: str = ""
    """Directory of tokenised documents and scored positions that runs share. Empty: the run directory."""
    heldout_path: str = ""
    """Held-out documents for evaluation. Empty: the last `heldout_fraction` of the training documents."""
    heldout_fraction: float = setting(0.1, inside=(0, 1))
    """Share of documents kept for evaluation when `heldout_path` is empty; in (0, 1)."""
    text_template: str = "{text}"
    """Document text from a jsonl or parquet record, e.g. '{problem}\\n\\n{solution}'; backslash-n is a newline."""
    split: Literal["files", "paragraphs"] = "files"
    """A .txt file is one document; or each of its paragraphs is one, with blank lines between them."""
    tokenizer: str = setting("", shown=True)
    """Tokenizer directory. Empty: train a byte-level BPE on the training documents."""
    tokenizer_pattern: str = ""
    """How text is split before merging, for a tiktoken file or a vocab.json whose family its name does not tell: gpt2,
    qwen, cl100k, o200k, llama3 or a regular expression."""
    tokenizer_vocab_size: int = setting(1024, at_least=300)
    """Vocabulary size of the trained tokenizer when `tokenizer` is empty."""
    template: str = "v6"
    """Prompt around a context: minimal (text, then <think>), v0 or v6 (wordings like the paper's), or a text file with
    {context} where the text goes. <think> is added unless the prompt ends with it."""
    chat: bool = setting(False, shown=True)
    """Wrap the prompt in the tokenizer's chat template."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Variables of the chat template, each NAME=VALUE with a JSON value or text, e.g. enable_thinking=true."""
    trunk_length: int = setting(512, at_least=2, shown=True)
    """Tokens of a trunk: template header plus document window. Longer documents become overlapping windows."""
    window_stride: int = setting(256, at_least=1)
    """Document tokens between the starts of neighbouring windows."""
    continuation_tokens: int = setting(8, at_least=1)
    """Number of true tokens after a position that a prediction may cover; a longer prediction is wrong."""


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    path: str = setting("", shown=True)
    """Questions to train on instead of text positions: jsonl or parquet in the verl layout (prompt, reward_model), with
    question or problem and answer, or multiple choice in the MMLU-Pro or ARC layout."""
    heldout_path: str = ""
    """Questions for evaluation. Empty: the last `data.heldout_fraction` of the training questions."""
    template: str = "boxed"
    """boxed asks for reasoning and for the answer, or its letter, in \\boxed{}; none adds nothing; or a text file with
    {question} where the question goes."""


@dataclass(frozen=True, kw_only=True)
class PositionsConfig:
    selector: Literal["entropy_threshold", "entropy_top_fraction", "random", "pass_rate_band"] = setting(
        "entropy_threshold", shown=True
    )
    """entropy_threshold keeps positions above that threshold (arXiv:2506.08007 §3.3), entropy_top_fraction those of
    highest entropy. random draws from all positions, without a proxy pass. pass_rate_band does the same and skips
    trunks whose positions were solved too often or too rarely so far."""
    entropy_threshold: float = setting(1.0, shown=True)
    """Nats; the paper does not state its training threshold."""
    top_fraction: float = setting(0.2, inside=(0, 1))
    """Share of all positions kept by entropy_top_fraction; in (0, 1)."""
    pass_rate_band: tuple[float, float] = (0.05, 0.95)
    """Lowest and highest share of correct rollouts at which pass_rate_band keeps using a position."""
    renormalize: bool = False
    """Renormalise the proxy's 16 most likely tokens before taking the entropy."""
    min_context_tokens: int = setting(16, at_least=1)
    """Minimum number of document tokens before a position; early positions look more uncertain than they are."""
    unfiltered_fraction: float = setting(0.0, inside=(0, 1), or_none=True)
    """Share of training positions drawn uniformly from all, in addition to those of an entropy selector; in [0, 1)."""
    max_positions_per_window: int = setting(8, at_least=1)
    """Maximum number of training positions per data.window_stride tokens of a document, drawn at random."""
    max_documents: int = setting(0, at_least=0)
    """Use positions of the first N training documents only. 0: of all."""
    max_tokens: int = setting(0, at_least=0)
    """Use positions among the first N tokens of these documents only, N / parts of each part of a mixture. 0: all."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's scaling of slow rotary frequencies, for contexts beyond the original training length."""

    factor: float = setting(1.0, at_least=1.0)
    """Slow frequencies are divided by this. 1: no scaling."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_positions / this are scaled by the full factor."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_positions / this stay unchanged; those in between are interpolated."""
    original_positions: int = 8192


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    family: Literal["qwen2", "qwen3", "llama", "mistral"] = "qwen3"
    """Hugging Face architecture of exports; see models/families.py for what each supports."""
    vocab_size: int = setting(0, at_least=0, resolved=True)
    """Entries of the embedding. 0: the tokenizer's size."""
    num_ids: int = setting(0, at_least=0, resolved=True, shows_in_repr=False)
    """Entries that stand for ids of the tokenizer, resolved at the first start: only these are sampled, scored and
    learned. 0: all."""
    num_layers: int = setting(4, at_least=1)
    width: int = setting(128, at_least=1)
    mlp_width: int = setting(384, at_least=1)
    num_heads: int = setting(4, at_least=1)
    num_kv_heads: int = setting(2, at_least=1)
    head_size: int = setting(32, at_least=2)
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_positions: int = setting(32768, at_least=1)
    """Maximum sequence length; a prompt and its completion must fit."""
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    """Add biases to the query, key and value projections (Qwen2)."""
    o_bias: bool = False
    """Add a bias to the attention's output projection (Llama and Qwen3 with attention_bias)."""
    mlp_bias: bool = False
    """Add biases to the MLP (Llama with mlp_bias)."""
    qk_norm: bool = True
    """RMS-normalise each query and key head (Qwen3)."""
    tie_embeddings: bool = False
    """Use the embedding as the output head."""
    activation_dtype: Literal["", "float32", "bfloat16"] = setting("float32", free="to readers", resolved=True)
    """Dtype of activations and matrix products; norms, softmax and log-probabilities stay float32. Empty: bfloat16 on
    GPUs and TPUs, float32 on CPUs."""
    remat: bool = setting(True, free="to readers")
    """Recompute each layer in the backward pass instead of keeping its activations."""
    platform: Literal["", "cpu", "gpu", "tpu"] = setting("", free="to readers")
    """Platform whose kernels and layouts are used. Empty: the one at hand; name another to compile for it."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    path: str = setting("", shown=True)
    """Hugging Face model directory or run directory to start from. Its config replaces the model section, except for
    activation_dtype, remat and platform. Empty: random parameters in the shape of the model section."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the stored and updated parameters."""


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    path: str = ""
    """Hugging Face model directory of the proxy whose entropy selects positions; it must use the policy's tokenizer.
    Empty: the policy that RPT starts from."""


LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "head"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = setting(0, at_least=0, shown=True)
    """Rank of low-rank adapters; only they are trained. 0: train every parameter."""
    alpha: float = setting(32.0, at_least=1e-6)
    """Adapters are scaled by alpha / rank."""
    targets: tuple[LoraTarget, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Weights with an adapter."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum on the layers' matrices, Adam without decay on everything else."""
    learning_rate: float = setting(1e-6, at_least=0, shown=True)
    """Peak learning rate, after the warm-up."""
    matrix_learning_rate: float = setting(0.02, at_least=0)
    """Muon's learning rate for the layers' matrices; adapters do not use it."""
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = setting(0.01, at_least=0)
    max_grad_norm: float = setting(0.2, at_least=0)
    """Maximum global gradient norm. 0: no clipping."""
    warmup_steps: int = setting(0, at_least=0)
    schedule: Literal["constant", "linear"] = "constant"
    """After warm-up: constant, or linear decay to zero at the last step."""


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    path: str = ""
    """jsonl of {"text", "completion"?, "text_weight"?}, or of token ids from experiments.rejection_sample, in training
    order. Empty: the training documents."""
    num_steps: int = setting(0, at_least=0, shown=True)
    """Warm-start updates before RPT. 0: none."""
    objective: Literal["likelihood", "dpo", "bradley_terry", "outcome", "process", "value"] = "likelihood"
    """likelihood learns the sequences. dpo learns pairs (arXiv:2305.18290): `path` holds prompt, chosen and rejected in
    TRL's layouts, or their token ids; loss.surrogate.dpo_beta scales the margin. The others train a scalar readout on
    graded completions (docs/reward_models.md): the run is then a reward model, and no policy."""
    centering: float = setting(0.0, at_least=0.0)
    """bradley_terry: weight of the squared sum of a pair's scores, which pulls them to 0 (TRL recommends 0.01)."""
    value_loss: Literal["squared", "cross_entropy"] = "squared"
    """value: squared error of 2 sigmoid - 1, or cross-entropy of the probability."""
    batch_size: int = setting(40, at_least=1)
    """Sequences or pairs per update, or rows with `pack`."""
    pack: bool = False
    """Pack as many sequences, in order, into each row as fit; they do not attend to each other."""
    context_weight: float = setting(0.2, at_least=0.0)
    """Loss weight of the text before a completion, unless its line states one, and of plain text mixed with drafts.
    Completions have weight 1."""
    draft_fraction: float = setting(0.0, inside=(0, 1), or_none=True)
    """With an empty path: share of sequences that teach the response format. They are cut at a random position; the
    thought is a draft of the next `draft_tokens` tokens, and the answer is its first token."""
    draft_tokens: int = setting(2, at_least=1)
    """Number of tokens in a draft."""
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
class StepsConfig:
    """Where the steps of a thought end, for process and value models, labels of steps, and search."""

    delimiter: str = "\\n\\n"
    """A step ends behind this text, which may span tokens; backslash-n is a newline."""
    every_tokens: int = setting(0, at_least=0)
    """Instead, a step ends after every N tokens. 0: at the delimiter."""
    marks: tuple[str, ...] = ()
    """Instead, a step ends at each of these tokens, given by their text."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    num_trunks: int = setting(32, at_least=1, shown=True)
    """Documents in a rollout batch (U)."""
    prompts_per_trunk: int = setting(8, at_least=1, shown=True)
    """Positions per document in a batch (M). A document with fewer is padded, one with more becomes several trunks."""
    group_size: int = setting(8, at_least=2, shown=True)
    """Rollouts per position (G), at least 2."""
    max_completion_tokens: int = setting(256, at_least=1, shown=True)
    """Maximum number of sampled tokens (C); rollouts that reach it count as truncated."""
    temperature: float = setting(
        0.8, above=0, because="because greedy rollouts of one prompt are all equal and teach nothing", shown=True
    )
    """Sampling temperature, above 0; also that of the log-probabilities in training."""
    top_p: float = setting(1.0, above=0, at_most=1)
    """Sample from the smallest set of tokens with at least this probability; in (0, 1]."""
    top_k: int = setting(0, at_least=0)
    """Sample from the k most likely tokens. 0: no limit."""
    slots_per_trunk: int = setting(0, at_least=-1, free="always")
    """Rollouts of a trunk that run at once; queued ones replace those that end. 0: all. -1: as many as fit into the
    memory of a GPU or TPU; all on CPUs. The sampled tokens stay the same."""
    stop_ids: tuple[int, ...] = setting((), resolved=True)
    """Token ids that end a completion. Empty: the tokenizer's."""
    new_tokens_per_step: int = setting(0, at_least=0)
    """Most tokens that a rollout draws in a step. Unfinished ones wait and go on in a later step; a group is trained on
    when all of it has ended (partial rollouts, arXiv:2501.12599 §2.6.2). 0: every rollout ends in its step."""
    earlier_tokens: Literal["train", "mask"] = "train"
    """What an update does with tokens that an earlier step drew, so an older policy: train on them, with the weights of
    loss.correction, or mask them."""
    repeat_window: int = setting(0, at_least=0)
    """With new_tokens_per_step: a rollout whose last N tokens are one piece, four times or more, ends. 0: none does."""
    repeat_penalty: float = setting(0.0, at_least=0)
    """What such a rollout loses of its reward."""
    dynamic_sampling_from_step: int = -1
    """From this step on, further rounds of rollouts replace degenerate groups (the paper: 500). -1: never."""
    dynamic_sampling_rounds: int = setting(2, at_least=1)
    """Maximum number of rollout rounds per update."""

    @property
    def sampling(self) -> dict:
        """Return the keyword arguments of `rollout.engine.generate`."""
        names = ("max_completion_tokens", "temperature", "top_p", "top_k", "stop_ids")
        # Until -1 is resolved, all rollouts run at once.
        return {name: getattr(self, name) for name in names} | {"slots_per_trunk": max(0, self.slots_per_trunk)}

    @property
    def step_sampling(self) -> dict:
        """Return the same for the rollouts of a training step, which may wait."""
        return self.sampling | {"new_tokens": self.new_tokens_per_step}


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    num_targets: int = setting(0, at_least=0)
    """Leading tokens of the reference to score. 0: one of a text's, all of an answer's."""
    measure: Literal["log", "mean_log", "probability", "mean_probability", "geometric_mean"] = "log"
    """What the reward `likelihood` is of the reference's token probabilities; see rewards/likelihood.py."""
    reference_term: Literal["none", "one", "reward", "advantage", "jepo"] = "none"
    """Weight with which `likelihood` also learns the reference behind the thought: 0, 1, its reward, or its advantage
    (leave-one-out). jepo: its share of the group's likelihood, with that bound's advantages. verifree and ravr
    always learn it, with their rewards."""
    judge: Literal["start", "current", "average"] = "start"
    """Policy that judges in self_evaluation and candidate_choice: the one that RL started from, the one in training, or
    its average."""
    num_rivals: int = setting(1, at_least=1)
    """candidate_choice compares a text with that many of its group's on either side, in both orders."""
    ranking_loss: float = setting(0.0, at_least=0.0)
    """Weight with which candidate_choice also teaches the policy to choose as the rubric's likelihood does. 0: not."""
    nover_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Weights of format, rank and efficiency in nover."""
    rlpr_shaping: str = "threshold_0"
    """threshold_T: the gain over the baseline, clipped to [0, 1], and 0 below T. identity: unclipped. one_minus: 1 -
    gain."""
    ravr_drift: float = setting(0.1, at_least=0.0)
    """Share of the reward that ravr takes from a thought for each nat per token by which it is less likely without the
    reference in view."""


@dataclass(frozen=True, kw_only=True)
class ShapingConfig:
    cosine_right: tuple[float, float] = (1.0, 0.5)
    """Rewards of a right completion without tokens and of one at the limit, for cosine_length."""
    cosine_wrong: tuple[float, float] = (-1.0, -0.5)
    """The same for a wrong completion."""
    overlong_fraction: float = setting(0.2, inside=(0, 1))
    """Last share of rollout.max_completion_tokens over which soft_overlong falls from 0 to -1."""


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """Rewards by trained models (docs/reward_models.md); both must have the policy's tokenizer."""

    path: str = ""
    """reward_model: a run that trained one, or a Hugging Face classifier with one label."""
    process_path: str = ""
    """process_model: the same, with scores behind steps."""
    aggregation: Literal["min", "prod", "last", "mean"] = "min"
    """process_model: what a completion's step scores become. prod favours few steps."""
    process_use: Literal["reward", "steps", "filter"] = "reward"
    """process_model: reward adds the aggregated score. steps adds each step's score, standardised in the group, to the
    advantages of its own and earlier tokens. filter only leaves out right rollouts with the worst scores and wrong ones
    with the best (PROF); the first term tells right from wrong."""
    keep: float = setting(0.5, above=0, at_most=1)
    """With filter: share of the right and of the wrong rollouts that remain, in (0, 1]."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    terms: tuple[str, ...] = setting(("prefix",), shown=True)
    """Rewards to add up, each NAME or WEIGHT*NAME. For positions: prefix (arXiv:2506.08007 eq. 3), first_token, dense,
    conditional_dense (its appendix A), and as controls random, random_lengths, shuffled_targets. For questions: math
    (equal to an answer), choice (the letter), exact (the string), code (unit tests). For both: custom
    (reward.function); without a verifier likelihood, information_gain, verifree, rlpr, ravr, nover, ttrl; shaping terms
    such as format or kimi_length. docs/rewards.md has all."""
    compose: Literal["sum", "normalize_then_sum", "gate"] = "sum"
    """sum; normalize_then_sum standardises each term in its group, then the sum over the batch, and uses the result as
    the advantage; gate counts later terms only if the first is 1."""
    function: str = ""
    """For custom: package.module:function or path/file.py:function, called once per completion in a worker process as
    function(completion: bytes, prediction: bytes or None, columns: dict) -> float. On the command line it implies
    --reward.terms custom."""
    time_limit_seconds: float = setting(10.0, at_least=0.01)
    """Time limit of one call of a judge on the host, seconds. A longer call fails, and its process is replaced."""
    num_workers: int = setting(2, at_least=1)
    """Number of worker processes that run judges."""
    on_fault: Literal["fail", "zero"] = "fail"
    """If reward.function raises, hangs or returns a non-finite value: stop the run, or give 0 and count the failure.
    Failures of built-in judges are always counted, because the policy's text causes them."""
    boxed_mode: Literal["balanced", "tail", "balanced_then_tail"] = "balanced"
    """End of the last box: its balancing brace, the completion's last brace, or the latter if the former fails."""
    require_think_end: bool = True
    """Accept only a box after the last </think>."""
    unescape_newline: bool = False
    """If the prediction fails as written, also try it with backslash-n read as a newline."""
    deviation_filter: float = setting(0.0, at_least=0.0)
    """From step 11 on, leave out groups whose deviation is below this share of its moving mean (RLPR). 0: none."""
    vote_train: int = setting(0, at_least=0)
    """With ttrl: all rollouts of a group vote, and the first N are trained on. 0: all."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)


@dataclass(frozen=True, kw_only=True)
class SurrogateConfig:
    """Constants of the objectives; each belongs to those that it names."""

    dual_clip: float = setting(0.0, at_least=0.0)
    """ppo, gspo, sequence_ppo, clip_cov: where the advantage is negative, the term is at least this times it (verl: 3,
    TRL's delta). 0: unlimited; otherwise above 1."""
    ratio_cap: tuple[float, float] = (0.0, 5.0)
    """cispo: bounds of the ratio. TRL 0 5; open-instruct 0 and 1 + eps; verl 1 - eps and 1 + eps."""
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    """sapo: tau for positive advantages, and for others."""
    kimi_tau: float = setting(0.1, at_least=0.0)
    """kimi: weight of half the squared log-ratio."""
    cov_fraction: float = setting(0.0002, inside=(0, 1))
    """clip_cov, kl_cov: share of the tokens that they treat (the authors' codes: 0.0002)."""
    cov_bounds: tuple[float, float] = (1.0, 5.0)
    """clip_cov: covariances outside are left alone."""
    cov_kl_coef: float = setting(1.0, at_least=0.0)
    """kl_cov: weight of |log-ratio|."""
    dpo_beta: float = setting(0.1, above=0, because="because 0 makes every pair the same")
    """dpo: scale of the margin."""


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Correction for tokens that another policy sampled: weights w = pi_old / pi_sampler, or masks."""

    mode: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """What multiplies a token's term: w clipped to the bounds, or w where it is inside them and 0 elsewhere; of the
    token, or of the whole sequence."""
    low: float = setting(0.0, at_least=0.0)
    high: float = setting(3.0, above=0, because="because w is positive")
    """Bounds of w."""
    max_old_drift: float = setting(0.0, at_least=0.0)
    """Leave out sequences with a negative advantage whose mean log(pi_old / pi) is above this (DeepSeek-V3.2). 0: none.
    No effect with one update per rollout batch."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """A value readout of the policy's hidden states, for loss.advantage gae."""

    coef: float = setting(0.5, above=0, because="because the critic would not learn")
    """Weight of the value loss."""
    clip: float = setting(0.2, above=0, because="because values could not move")
    """The new value is clipped to this distance from the old one in the value loss."""
    gamma: float = setting(1.0, above=0, at_most=1)
    lam: float = setting(1.0, above=0, at_most=1)
    """Discount and trace of generalised advantage estimation; in (0, 1]."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    objective: Literal[
        "ppo", "reinforce", "cispo", "sapo", "kimi", "gspo", "sequence_ppo", "gmpo", "clip_cov", "kl_cov", "dpo"
    ] = "ppo"
    """What is maximised; see rl/surrogates.py and docs/objectives.md. Most differ only with several updates per rollout
    batch."""
    advantage: Literal[
        "grpo",
        "mean",
        "rloo",
        "batch_std",
        "opo",
        "anchor",
        "max_gap",
        "gpg",
        "reinforce_pp",
        "reinforce_pp_baseline",
        "gae",
    ] = "grpo"
    """Baseline and scale of the advantage; see rl/advantages.py. gae trains a critic."""
    ddof: Literal["population", "sample"] = "population"
    """Deviations of a group divide by G, or by G - 1 as in TRL and verl, which makes them larger."""
    aggregation: Literal["seq_mean", "token_mean", "constant", "seq_sum"] = "token_mean"
    """Aggregation of token terms into the loss; see rl/rows.py."""
    clip_eps_low: float = setting(0.2, at_least=0.0)
    clip_eps_high: float = setting(0.2, at_least=0.0)
    """The ratio is clipped to [1 - low, 1 + high]; no effect with one update per rollout batch. gspo: a hundredth of
    the usual (3e-4, 4e-4), because it averages the log-ratio; gmpo clips log-ratios."""
    kl_coef: float = setting(0.0, at_least=0.0)
    """Weight of the KL term towards the policy that RL started from. 0: no reference policy."""
    kl_estimator: Literal["k1", "abs", "k2", "k3", "k3_ratio"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    """reward: subtract kl_coef times the estimate from the reward instead, per token where the advantage is per token
    (reinforce_pp, gae), else its sum."""
    ntp_coef: float = setting(0.0, at_least=0.0)
    """Weight of a next-token loss on the trunks' document tokens, added to the RL loss."""
    num_minibatches: int = setting(1, at_least=1)
    """Updates per rollout batch. 1 is exactly on-policy."""
    surrogate: SurrogateConfig = field(default_factory=SurrogateConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)

    @property
    def has_reference(self) -> bool:
        """Return whether the loss reads the policy that RL started from."""
        return self.kl_coef > 0 or self.objective == "dpo"

    @property
    def has_kl_term(self) -> bool:
        """Return whether the loss has a KL term of its own."""
        return self.kl_coef > 0 and self.kl_in == "loss"

    @property
    def needs_old(self) -> bool:
        """Return whether the loss reads the log-probabilities of the policy before the first update."""
        return self.num_minibatches > 1 or self.correction.mode != "none"

    @property
    def needs_all_rows(self) -> bool:
        """Return whether rows without an advantage have a gradient, or are needed for that of others."""
        has_own = self.objective in ("kimi", "kl_cov") and self.num_minibatches > 1
        return self.has_kl_term or self.has_critic or has_own or self.objective in ("clip_cov", "dpo")

    @property
    def has_critic(self) -> bool:
        """Return whether the policy has a value readout."""
        return self.advantage == "gae"


@dataclass(frozen=True, kw_only=True)
class CompanionConfig:
    """The moving average of the policy, kept if a reward's scoring passes request it."""

    decay: float = setting(0.99, inside=(0, 1))
    """average <- decay * average + (1 - decay) * policy after every update."""
    every_steps: int = setting(0, at_least=0)
    """Instead of averaging, copy the policy every N updates. 0: average."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    data: int = setting(1, at_least=1, free="always")
    """Number of parameter replicas; trunks are split over data x fsdp."""
    fsdp: int = setting(1, at_least=1, free="always", shown=True)
    """Number of shards of parameters and optimizer state; trunks are split over data x fsdp."""
    tensor: int = setting(1, at_least=1, free="always")
    """Number of shards of heads, MLP width and vocabulary."""
    microbatch_trunks: int = setting(0, at_least=-1, free="always")
    """Trunks per forward-backward pass; gradients accumulate. 0: the whole minibatch. -1: as many as fit into the
    memory of a GPU or TPU; two on CPUs."""

    @property
    def num_devices(self) -> int:
        """Return the number of devices of the mesh."""
        return self.data * self.fsdp * self.tensor

    @property
    def trunk_shards(self) -> int:
        """Return the number of shards that trunks are split into."""
        return self.data * self.fsdp


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Several processes for one run. These settings belong to the launch and may change when a run resumes."""

    coordinator: str = setting("", free="always")
    """host:port of process 0. Empty: as SLURM or Open MPI report, or one process."""
    num_processes: int = setting(0, at_least=0, free="always")
    """With a coordinator: the number of processes."""
    process_id: int = setting(0, at_least=0, free="always")
    """With a coordinator: the index of this process; process 0 writes the files."""
    join: bool = setting(False, free="always")
    """Join the processes that JAX detects from the environment, on slices of several TPU VMs and under Kubernetes."""
    heartbeat_seconds: int = setting(100, at_least=1, free="always")
    """A process without a heartbeat for this long is presumed dead, and all others exit."""
    deadline_seconds: float = setting(3600.0, at_least=0.0, free="always")
    """A process that finishes no step, rollout segment or batch for this long prints its stacks and exits. 0: wait
    forever."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = setting(100, at_least=1, free="always", shown=True)
    """Save every N steps of RPT, the warm start and the control, and after the last step."""
    keep: int = setting(2, at_least=1, free="always")
    """Number of newest checkpoints to keep for each stage."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every_steps: int = setting(50, at_least=1, shown=True)
    """Evaluate before the first step, every N steps, and after the last."""
    num_positions: int = setting(200, at_least=2, free="to readers")
    """Held-out positions per split, drawn uniformly within the split, the same at every evaluation."""
    final_num_positions: int = setting(800, at_least=2, free="to readers")
    """The same for the first and last evaluation, which the tables show."""
    num_samples: int = setting(8, at_least=1, free="to readers")
    """Sampled rollouts per position (the k of pass@k and majority@k)."""
    max_documents: int = setting(1000, at_least=1)
    """Evaluate on the first N held-out documents or questions."""
    max_tokens: int = setting(0, at_least=0)
    """Evaluate on positions among the first N tokens of these documents only. 0: all."""
    batch_trunks: int = setting(64, at_least=1, free="to readers")
    """Held-out windows per evaluation batch; affects speed, not results."""
    difficulty_thresholds: tuple[float, float, float] = (0.5, 1.0, 1.5)
    """Entropy above which a position is easy, medium, hard (nested; arXiv:2506.08007 §4.1), nats."""


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
    steps: StepsConfig = StepsConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    companion: CompanionConfig = CompanionConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def num_updates(self) -> int:
        """Return the number of optimizer steps of RPT."""
        return self.run.num_steps * self.loss.num_minibatches

    @property
    def microbatch_trunks(self) -> int:
        """Return the trunks per forward-backward pass. Until -1 is resolved, these are two, or one per shard."""
        minibatch, shards = self.rollout.num_trunks // self.loss.num_minibatches, self.mesh.trunk_shards
        if self.mesh.microbatch_trunks >= 0:
            return self.mesh.microbatch_trunks or minibatch
        return max(n for n in range(shards, minibatch + 1, shards) if minibatch % n == 0 and n <= max(2, shards))

    def validate(self) -> None:
        """Check everything that can be checked without data or devices.

        Raises:
            ConfigError: names the field, the value received, what is required and what to change.
        """
        check_fields(self)
        check_relations(self)

    def to_json(self) -> str:
        """Return all fields and the format version as JSON."""
        return to_json(self)

    @staticmethod
    def from_json(text: str) -> "Config":
        """Read the text that `to_json` of this version or an earlier one wrote; see `schema.from_json`.

        Raises:
            ConfigError: not such JSON; unknown or ill-typed fields; a later version.
        """
        return from_json(Config, text)[0]
