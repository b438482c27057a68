"""Decode, update and whole steps of an accelerator, compared with its memory bandwidth and its matrix peak.

python -m experiments.benchmarks.gpu [--parts steps,trl,peaks,decode,update,numerics,lora,repeated] [--seconds 600]
    [--rounds 3] [--json FILE] [--trl-python PYTHON] [--dry-run]

Each figure is printed as soon as it is measured. A part starts only if the time that is left allows for it, so that the
script ends within --seconds. The policy is random: 1.5 B parameters (28 layers, width 1536, vocabulary 151,936, tied),
bfloat16 activations and caches.

steps: a policy of 135 M parameters (SmolLM2's shape), 32 documents of 512 tokens, 8 positions x 8 rollouts, 48 new
    tokens: seconds from the start of the process to the end of the first RL step, without an evaluation before it, with
    an empty cache of programs and with the cache of the run before; then steps a minute.
trl: GRPO steps of TRL on the batch of `decode`, in a process of --trl-python, which may belong to another environment
    (peers_requirements_trl.txt, with torch's CUDA build). Its rollouts use transformers' generate. The first step
    does not count. Without TRL, the part is skipped.
peaks: a copy of 4 GiB and a bfloat16 product of 8192 x 8192 matrices; the other parts' limits refer to these.
decode: 4 documents of 2,048 tokens, 8 positions x 8 rollouts each, 512 new tokens. Seconds are from the first to the
    last token, without the prefill. Limit: a step reads the weights once, and the keys and values of each document,
    each tail and each row once.
update: the same batch. Limit: 6 FLOPs per parameter and token, plus 12 per attended pair, layer and unit of the heads'
    total width. Each token of a document counts once, and recomputation in the backward pass does not count.
numerics: on 4 layers, log-probabilities of sampler and trainer in bfloat16 and float32, and the gradient in bfloat16
    against float32.
lora: decode and update of adapters of rank 32 on Llama 3's 8 B parameters in bfloat16, the same batch. The limit of the
    update leaves out the gradients of the weights, which are not computed.
repeated: decode and update with one document per row, as in an engine without trunks; the limit of the update is the
    same.

--dry-run uses a small model and batch on any machine, to check that the script runs; its shares are meaningless.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.common import MODEL_S, alternate, make_tasks, parser, save_results
from experiments.presets import PRESETS
from rpt_jax.config import DecoderConfig, LoraConfig, LossConfig, MeshConfig, OptimizerConfig
from rpt_jax.models import lora
from rpt_jax.models.decoder import init_params
from rpt_jax.models.families import config_json
from rpt_jax.models.lora import Frozen
from rpt_jax.parallel.mesh import make_mesh, shard_batch
from rpt_jax.rl.objective import objective_fn
from rpt_jax.rl.optimizer import init_state, make_optimizer
from rpt_jax.rl.update import update
from rpt_jax.rollout.engine import SCHEDULES, generate, rollout_key
from rpt_jax.scoring.logprobs import score
from rpt_jax.sequences import completions
from rpt_jax.types import Prompts, Rollouts, Rows, TaskBatch, TrainState
from rpt_jax.work import Shape as ModelShape

MODEL_1_5B = DecoderConfig(
    family="qwen2",
    vocab_size=151_936,
    num_layers=28,
    width=1536,
    mlp_width=8960,
    num_heads=12,
    num_kv_heads=2,
    head_size=128,
    qkv_bias=True,
    qk_norm=False,
    rope_theta=1e6,
    tie_embeddings=True,
    activation_dtype="bfloat16",
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the benchmark.

    Attributes:
        model: the policy's shape.
        documents: number of documents.
        context: tokens of each document.
        positions: positions per document.
        tail: tokens of each prompt's tail.
        new: tokens of each completion.
        copy_bytes: size of the copy that measures bandwidth.
        matrix: side of the square matrices that measure the matrix peak.
        rollouts: rollouts per position.
    """

    model: DecoderConfig
    documents: int
    context: int
    positions: int
    tail: int
    new: int
    copy_bytes: int
    matrix: int
    rollouts: int = 8

    @property
    def rows(self) -> int:
        """Number of rollouts."""
        return self.documents * self.positions * self.rollouts

    def tasks(self) -> TaskBatch:
        """Return the batch, with cuts evenly spaced over the last eighth of the context."""
        cuts = [self.context - i * self.context // (8 * self.positions) for i in range(self.positions)]
        return make_tasks(self.documents, cuts, self.tail, self.rollouts, self.model.vocab_size)


MODEL_8B = dataclasses.replace(PRESETS["rpt_llama3_8b"].model, activation_dtype="bfloat16")
FULL = Shape(MODEL_1_5B, documents=4, context=2048, positions=8, tail=24, new=512, copy_bytes=2**32, matrix=8192)
DRY = Shape(MODEL_S, documents=2, context=128, positions=2, tail=8, new=32, copy_bytes=2**26, matrix=512)


def repeated(tasks: TaskBatch) -> TaskBatch:
    """Return the tasks with a separate document for every row (U * M * G trunks), as in an engine without trunks."""
    prompts = tasks.prompts
    U, M, G = prompts.row_ids.shape

    def rows(x, per_prompt: bool):
        return np.repeat(x.reshape(U * M, 1, *x.shape[2:]) if per_prompt else np.repeat(x, M, axis=0), G, axis=0)

    per_trunk = {name: rows(getattr(prompts, name), False) for name in ("trunk_tokens", "trunk_lengths")}
    names = ("cuts", "tail_tokens", "tail_lengths", "prompt_mask")
    per_prompt = {name: rows(getattr(prompts, name), True) for name in names}
    own = Prompts(row_ids=prompts.row_ids.reshape(U * M * G, 1, 1), **per_trunk, **per_prompt)
    return TaskBatch(prompts=own, references=jax.tree.map(lambda x: rows(x, True), tasks.references))


def peaks(shape: Shape, rounds: int) -> dict:
    """Measure the bytes per second of a copy (read and written) and the FLOPs per second of a product in the activation
    dtype, each in its fastest call."""
    x = jnp.zeros(shape.copy_bytes // 4, jnp.float32)
    a = jax.random.normal(jax.random.key(0), (shape.matrix, shape.matrix), jnp.dtype(shape.model.activation_dtype))
    copy, product = jax.jit(lambda x: x + 1), jax.jit(lambda a: a @ a)
    seconds = alternate({"copy": lambda: copy(x), "product": lambda: product(a)}, max(5, rounds))
    return {
        "bytes_per_second": 2 * shape.copy_bytes / min(seconds["copy"]["samples"]),
        "flops_per_second": 2 * shape.matrix**3 / min(seconds["product"]["samples"]),
    }


def decode_bytes(shape: Shape, num_params: int, *, is_repeated: bool) -> float:
    """Return the bytes that all decoding steps after the first token must read."""
    c = shape.model
    itemsize = jnp.dtype(c.activation_dtype).itemsize
    token = 2 * c.num_layers * c.num_kv_heads * c.head_size * itemsize
    contexts = shape.rows * (shape.context + shape.tail) if is_repeated else shape.documents * shape.context
    tails = 0 if is_repeated else shape.documents * shape.positions * shape.tail
    own = shape.rows * (shape.new - 1) / 2
    return (shape.new - 1) * (num_params * itemsize + token * (contexts + tails + own))


def update_flops(shape: Shape, *, has_adapters: bool) -> float:
    """Return the FLOPs of the batch's forward and backward passes, counting each token of a document once."""
    stem = shape.documents * (shape.context + shape.positions * shape.tail)
    tokens = stem + shape.rows * shape.new
    pairs = shape.documents * shape.context**2 / 2 + shape.documents * shape.positions * shape.tail * shape.context
    pairs += shape.rows * shape.new * (shape.context + shape.tail + shape.new / 2)
    # The output head runs on completion tokens only, and the embedding is a lookup. Gradients of activations cost as
    # much as the forward pass, those of weights again. Attention has no weights, but two factors with gradients.
    model = ModelShape(shape.model)
    products = model.forward_flops(tokens, shape.rows * shape.new, 0)
    return (2 if has_adapters else 3) * products + 3 * model.attention_flops(pairs)


def microbatches(tasks: TaskBatch, rollouts: Rollouts, size: int) -> list[Rows]:
    """Split all rows into microbatches of `size` trunks, with alternating advantages 1 and -1."""
    shape = rollouts.mask.shape
    batch = Rows(
        sequences=completions(tasks.prompts, rollouts.tokens, rollouts.mask),
        row=jnp.broadcast_to(jnp.arange(shape[1])[:, None], shape),
        policy_weights=rollouts.mask / rollouts.mask.sum(),
        likelihood_weights=None,
        trunk_weights=None,
        temperature=jnp.ones(shape),
        advantages=jnp.broadcast_to(1.0 - 2.0 * (tasks.prompts.row_ids.reshape(shape[:2]) % 2)[..., None], shape),
        sampler_logprobs=rollouts.sampler_logprobs,
        old_logprobs=None,
        ref_logprobs=None,
    )
    return [jax.tree.map(lambda x, i=i: x[i : i + size], batch) for i in range(0, shape[0], size)]


class Bench:
    """The benchmark's parts, which share a policy; each method of a part's name measures it.

    Attributes:
        shape: sizes.
        rounds: repetitions of each timing.
        rank: of adapters; 0: all parameters are trained.
        trl_python: interpreter that has TRL.
        figures: {part: figures} measured so far.
    """

    def __init__(self, shape: Shape, rounds: int, rank: int = 0, trl_python: str = sys.executable):
        self.shape, self.rounds, self.rank, self.trl_python, self.figures = shape, rounds, rank, trl_python, {}
        self._optimizer, self._state, self._frozen = make_optimizer(OptimizerConfig(), 100), None, None

    @cached_property
    def _mesh(self):
        return make_mesh(MeshConfig())

    def _make_state(self) -> TrainState:
        """Return the policy's state, made at the first call."""
        if self._state is None:
            model, key = self.shape.model, jax.random.key(0)
            params = init_params(model, self._mesh, key)
            if self.rank:
                base = jax.tree.map(lambda p: p.astype(model.activation_dtype), params)
                self._frozen = Frozen(params=base, scale=np.float32(1.0))
                params = lora.init_adapters(model, LoraConfig(rank=self.rank), self._mesh, key)
            self._state = init_state(params, self._optimizer, self._mesh)
        return self._state

    def _policy(self):
        """Return the policy's parameters."""
        state = self._make_state()
        return lora.join(self._frozen, state.params)

    def _sample(self, model: DecoderConfig, params, tasks: TaskBatch, new: int) -> Rollouts:
        no_stop = model.vocab_size - 1
        return generate(
            model, params, tasks.prompts, rollout_key(0, 0), max_completion_tokens=new, temperature=1.0, top_p=1.0,
            top_k=0, stop_ids=(no_stop,), vocab_size=no_stop, schedule=SCHEDULES["few"],
        )  # fmt: skip

    def peaks(self) -> dict:
        """Measure what the other parts are compared with."""
        return peaks(self.shape, self.rounds)

    def numerics(self) -> dict:
        """Compare sampler with trainer, and bfloat16 with float32."""
        figures, gradients = {}, {}
        # Untied: a random policy with tied embeddings repeats its input with a probability near 1.
        ids = self.shape.model.vocab_size - 1  # the last one is the stop id, which is never sampled
        model = dataclasses.replace(self.shape.model, num_layers=4, tie_embeddings=False, num_ids=ids)
        shape = dataclasses.replace(self.shape, documents=1, new=min(64, self.shape.new), model=model)
        params = init_params(shape.model, self._mesh, jax.random.key(0))
        tasks, rollouts = shard_batch(self._mesh, shape.tasks()), None
        for kind in ("float32", "bfloat16"):
            model = dataclasses.replace(shape.model, activation_dtype=kind)
            with jax.default_matmul_precision("highest" if kind == "float32" else "default"):
                sampled = self._sample(model, params, tasks, shape.new)
                rollouts = rollouts or sampled
                sequences = completions(tasks.prompts, sampled.tokens, sampled.mask)
                trained = score(model, params, sequences, temperature=1.0)
                difference = jnp.abs(trained - sampled.sampler_logprobs)[sampled.mask]
                figures[f"logprob_difference_{kind}"] = {
                    "mean": float(difference.mean()),
                    "max": float(difference.max()),
                }
                (batch,) = microbatches(tasks, rollouts, 1)
                loss = partial(objective_fn(model, LossConfig()), rows=batch)
                gradients[kind] = jax.jit(jax.grad(lambda p, loss=loss: loss(p)[0]))(params)
        leaves = [jax.tree.leaves(gradients[kind]) for kind in ("bfloat16", "float32")]
        squares = [(jnp.sum((a - b) ** 2), jnp.sum(b**2)) for a, b in zip(*leaves, strict=True)]
        figures["gradient_difference"] = float(jnp.sqrt(sum(d for d, _ in squares) / sum(n for _, n in squares)))
        return figures

    def decode(self, tasks: TaskBatch | None = None, *, is_repeated: bool = False) -> dict:
        """Time sampling."""
        shape, tasks = self.shape, shard_batch(self._mesh, tasks or self.shape.tasks())
        calls = {n: partial(self._sample, shape.model, self._policy(), tasks, n) for n in (shape.new, 1)}
        timings = alternate(calls, self.rounds)
        seconds = timings[shape.new]["median"] - timings[1]["median"]
        limit = decode_bytes(shape, ModelShape(shape.model).stored, is_repeated=is_repeated)
        return {
            "seconds": seconds,
            "milliseconds_per_token_step": 1e3 * seconds / (shape.new - 1),
            "tokens_per_second": shape.rows * (shape.new - 1) / seconds,
            "share_of_limit": limit / self.figures["peaks"]["bytes_per_second"] / seconds,
            "prefill_seconds": timings[1]["median"],
            "samples": timings[shape.new]["samples"],
        }

    def update(self, tasks: TaskBatch | None = None, *, size: int = 1) -> dict:
        """Time an optimizer step in microbatches of `size` trunks."""
        shape, tasks = self.shape, shard_batch(self._mesh, tasks or self.shape.tasks())
        U, M, G = tasks.prompts.row_ids.shape
        tokens = jax.random.randint(jax.random.key(1), (U, M * G, shape.new), 0, shape.model.vocab_size - 1)
        rollouts = Rollouts(
            tokens=tokens,
            mask=jnp.ones(tokens.shape, bool),
            sampler_logprobs=jnp.zeros(tokens.shape),
            truncated=jnp.ones(tokens.shape[:2], bool),
            num_rejected=jnp.zeros(tokens.shape[:2], jnp.int32),
        )
        batches, loss_fn = microbatches(tasks, rollouts, size), objective_fn(shape.model, LossConfig())

        def learn():
            state = self._make_state()
            self._state, _ = update(state, batches, loss_fn=loss_fn, optimizer=self._optimizer, frozen=self._frozen)
            return self._state

        timing = alternate({"update": learn}, self.rounds)["update"]
        seconds = timing["median"]
        limit = update_flops(shape, has_adapters=self.rank > 0) / self.figures["peaks"]["flops_per_second"]
        return {"seconds": seconds, "share_of_limit": limit / seconds, "samples": timing["samples"]}

    def lora(self) -> dict:
        """Time adapters on a larger policy."""
        self._state = None  # makes room
        shape = self.shape if self.shape is DRY else dataclasses.replace(self.shape, model=MODEL_8B)
        other = Bench(shape, self.rounds, rank=32)
        other.figures["peaks"] = self.figures["peaks"]
        return {"decode": other.decode(), "update": other.update()}

    def repeated(self) -> dict:
        """Time decode and update with one document per row."""
        tasks = repeated(self.shape.tasks())
        found = {
            "decode": self.decode(tasks, is_repeated=True),
            "update": self.update(tasks, size=self.shape.positions),
        }

        def step(figures: dict) -> float:
            return figures["decode"]["seconds"] + figures["decode"]["prefill_seconds"] + figures["update"]["seconds"]

        return found | {"step_is_slower_by": step(found) / step(self.figures)}

    def steps(self) -> dict:
        """Time the first step of a process, and later ones."""
        figures = {}
        with tempfile.TemporaryDirectory() as directory:
            for name in ("cold", "warm"):
                command = [sys.executable, "-m", "experiments.benchmarks.gpu_steps", directory, name]
                command += ["--dry-run"] if self.shape is DRY else []
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                ends = json.loads(done.stdout.splitlines()[-1])["seconds_at_end_of_step"]
                later = statistics.median(np.diff(ends[1:])) if len(ends) > 2 else float("nan")
                figures[name] = {"first_step_seconds": ends[0], "steps_per_minute": 60 / later}
        return figures

    def trl(self) -> dict:
        """Time steps of TRL on the same batch."""
        if subprocess.run([self.trl_python, "-c", "import trl"], stderr=subprocess.DEVNULL, check=False).returncode:
            return {"skipped": f"{self.trl_python} has no TRL"}
        prompts = self.shape.tasks().prompts
        texts = [
            [*prompts.trunk_tokens[u, : prompts.cuts[u, m]].tolist(), *prompts.tail_tokens[u, m].tolist()]
            for u, m in np.ndindex(prompts.cuts.shape)
        ]
        spec = {
            "model": config_json(self.shape.model, "float32", {}), "prompts": texts, "new": self.shape.new,
            "group_size": self.shape.rollouts, "rows": 2, "steps": 1 + min(2, self.rounds),
        }  # fmt: skip
        command = [self.trl_python, "-m", "experiments.benchmarks.gpu_trl"]
        try:
            done = subprocess.run(
                command, input=json.dumps(spec), stdout=subprocess.PIPE, text=True, check=True, timeout=PARTS["trl"]
            )
        except subprocess.SubprocessError as error:
            return {"skipped": str(error)}
        found = json.loads(done.stdout.splitlines()[-1])
        step, rollout = (statistics.median(found[name][1:]) for name in ("steps", "rollouts"))
        return {"step": step, "rollout": rollout, "update": step - rollout}


# Part -> seconds that it takes at most, with compiling. The steps and TRL come first: their processes need the whole
# memory, which this one takes with its first array.
PARTS = {
    "steps": 150,
    "trl": 240,
    "peaks": 15,
    "decode": 60,
    "update": 70,
    "numerics": 100,
    "lora": 160,
    "repeated": 150,
}


def main() -> None:
    """Run the parts and save the figures."""
    begin = time.monotonic()
    command = parser(__doc__, name="gpu", rounds=3)
    command.add_argument("--parts", default=",".join(PARTS))
    command.add_argument("--seconds", type=float, default=600)
    command.add_argument("--trl-python", default=sys.executable)
    command.add_argument("--dry-run", action="store_true")
    args = command.parse_args()
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        command.error(f"--parts names {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    bench = Bench(DRY if args.dry_run else FULL, args.rounds, trl_python=args.trl_python)
    chosen = [p for p in PARTS if p in {"peaks", *args.parts.split(",")}]
    if "repeated" in chosen:
        chosen = [p for p in PARTS if p in {*chosen, "decode", "update"}]
    for part in chosen:
        left = args.seconds - (time.monotonic() - begin)
        if left < PARTS[part] and not args.dry_run:
            print(f"{part}: not measured, {left:.0f} s are left and it may take {PARTS[part]}", flush=True)
            continue
        bench.figures[part] = getattr(bench, part)()
        print(f"[{time.monotonic() - begin:.0f} s] {part}: {json.dumps(bench.figures[part])}", flush=True)
    figures = bench.figures
    if "step" in figures.get("trl", {}) and {"decode", "update"} <= set(figures):
        own = figures["decode"]["seconds"] + figures["decode"]["prefill_seconds"] + figures["update"]["seconds"]
        print(f"a step of TRL takes {figures['trl']['step'] / own:.1f} times as long", flush=True)

    def draw(axes):
        bars = {part: figures[part]["share_of_limit"] for part in ("decode", "update") if part in figures}
        axes.bar(list(bars), [100 * share for share in bars.values()])
        axes.set(ylabel="% of the limit", title="Decode: bandwidth limit. Update: matrix peak")

    save_results(args, {"dry_run": args.dry_run} | figures, draw)


if __name__ == "__main__":
    main()
