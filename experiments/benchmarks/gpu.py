"""Compare decode with the memory-bandwidth limit of its shape, and the update with matrix peak, on an accelerator.

python -m experiments.benchmarks.gpu [--rounds 3] [--json FILE] [--dry-run]

The policy is random: 1.5 B parameters (28 layers, width 1536, vocabulary 151,936, tied), bfloat16 activations and
caches. The peaks are measured in the same run: a copy of 4 GiB and a bfloat16 product of 8192 x 8192 matrices.

decode: 4 documents of 2,048 tokens, 8 positions x 8 rollouts each, 512 new tokens. Seconds are from the first to the
    last token, without the prefill. Limit: a step reads the weights once, and the keys and values of each document,
    each tail and each row once. `repeated prompts` is the same engine with one document per row; a step then reads a
    whole prompt for each row.
update: the same batch. Limit: 6 FLOPs per parameter and token, plus 12 per attended pair, layer and unit of the heads'
    total width. Each token of a document counts once, and recomputation in the backward pass does not count.
    `repeated prompts` has one document per row, but its limit is the same.

--dry-run uses a small model and batch on any machine, to check that the script runs; its shares are meaningless.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.common import MODEL_S, alternate, make_tasks, parser, save_results
from rpt_jax.config import DecoderConfig, LossConfig, MeshConfig, OptimizerConfig
from rpt_jax.models.decoder import init_params
from rpt_jax.parallel.mesh import make_mesh, shard_batch
from rpt_jax.rl.objective import objective_fn
from rpt_jax.rl.optimizer import init_state, make_optimizer
from rpt_jax.rl.update import update
from rpt_jax.rollout.engine import generate, rollout_key
from rpt_jax.sequences import completions
from rpt_jax.types import Prompts, Rollouts, Rows, TaskBatch
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


def update_flops(shape: Shape) -> float:
    """Return the FLOPs of the batch's forward and backward passes, counting each token of a document once."""
    stem = shape.documents * (shape.context + shape.positions * shape.tail)
    tokens = stem + shape.rows * shape.new
    pairs = shape.documents * shape.context**2 / 2 + shape.documents * shape.positions * shape.tail * shape.context
    pairs += shape.rows * shape.new * (shape.context + shape.tail + shape.new / 2)
    # The output head runs on completion tokens only, and the embedding is a lookup. Backward costs twice the forward.
    return 3 * ModelShape(shape.model).forward_flops(tokens, shape.rows * shape.new, pairs)


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


def measure(shape: Shape, rounds: int) -> dict:
    """Time decode and update, with trunks and with repeated prompts; return the figures."""
    peak = peaks(shape, rounds)
    mesh, optimizer = make_mesh(MeshConfig()), make_optimizer(OptimizerConfig(), 100)
    params = init_params(shape.model, mesh, jax.random.key(0))
    num_params = sum(p.size for p in jax.tree.leaves(params))
    loss_fn = objective_fn(shape.model, LossConfig())
    no_stop = shape.model.vocab_size - 1
    sampling = dict(temperature=1.0, top_p=1.0, top_k=0, stop_ids=(no_stop,), vocab_size=no_stop)
    held = {"state": init_state(params, optimizer, mesh)}
    figures = {"parameters": num_params, "peaks": peak, "decode": {}, "update": {}}
    for name, tasks, size in (
        ("trunk and branches", shape.tasks(), 1),
        ("repeated prompts", repeated(shape.tasks()), shape.positions),
    ):
        tasks = shard_batch(mesh, tasks)

        def decode(new, tasks=tasks):
            params, key = held["state"].params, rollout_key(0, 0)
            return generate(shape.model, params, tasks.prompts, key, max_completion_tokens=new, **sampling)

        batches = microbatches(tasks, decode(shape.new), size)

        def learn(batches=batches):
            held["state"], _ = update(held["state"], batches, loss_fn=loss_fn, optimizer=optimizer)
            return held["state"]

        timings = alternate({"all": partial(decode, shape.new), "one": partial(decode, 1), "update": learn}, rounds)
        seconds = timings["all"]["median"] - timings["one"]["median"]
        limit = decode_bytes(shape, num_params, is_repeated=name == "repeated prompts") / peak["bytes_per_second"]
        figures["decode"][name] = {
            "seconds": seconds,
            "prefill_seconds": timings["one"]["median"],
            "tokens_per_second": shape.rows * (shape.new - 1) / seconds,
            "share_of_limit": limit / seconds,
        }
        arithmetic = update_flops(shape) / peak["flops_per_second"]
        figures["update"][name] = timings["update"] | {"share_of_limit": arithmetic / timings["update"]["median"]}
    return figures


def main() -> None:
    """Run the benchmark and save the figures."""
    command = parser(__doc__, name="gpu", rounds=3)
    command.add_argument("--dry-run", action="store_true")
    args = command.parse_args()
    figures = measure(DRY if args.dry_run else FULL, args.rounds)

    def draw(axes):
        bars = {f"{part}\n{name}": f for part in ("decode", "update") for name, f in figures[part].items()}
        axes.bar(list(bars), [100 * f["share_of_limit"] for f in bars.values()])
        axes.set(ylabel="% of the limit", title="Decode: bandwidth limit. Update: matrix peak")

    save_results(args, {"dry_run": args.dry_run} | figures, draw)


if __name__ == "__main__":
    main()
