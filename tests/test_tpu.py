"""The programs of a step compile for a TPU slice, on a machine without one. Skips where its compiler is missing."""

import os
from functools import partial

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from test_rollout import make_tasks

from rpt_jax.config import DecoderConfig, LossConfig, OptimizerConfig
from rpt_jax.models import decoder
from rpt_jax.parallel.mesh import replicated, trunk_sharding
from rpt_jax.rl import update
from rpt_jax.rollout import engine
from rpt_jax.types import Rollouts, TrainBatch

pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is not installed: pip install 'jax[tpu]'")

CONFIG = DecoderConfig(
    vocab_size=2048, num_layers=2, width=256, mlp_width=512, num_heads=4, num_kv_heads=2, head_size=128,
    activation_dtype="bfloat16", platform="tpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def slice_of_four():
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    grid = np.array(topology.devices).reshape(1, 2, 2)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def shapes(tree, sharding):
    """Shapes of arrays, all lying in one way or each in its own."""
    if not isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(shapes, tree, sharding)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding), tree)


def compiled(function, *args, **options):
    """(the program, its results' shapes)."""
    lowered = function.lower(*args, **options)
    program = lowered.compile()
    return program, shapes(lowered.out_info, program.output_shardings)


def test_rollout_and_update_compile_for_a_tpu_slice(slice_of_four):
    mesh = slice_of_four
    params = decoder.abstract_params(CONFIG, mesh)
    tasks = make_tasks(CONFIG, U=4, M=2, G=4, L=128, E=8)
    on_trunks = partial(shapes, sharding=trunk_sharding(mesh))
    on_all = partial(shapes, sharding=replicated(mesh))
    law = engine.Law(max_completion_tokens=32, temperature=1.0, top_p=0.95, top_k=0, eos_id=1, vocab_size=2000)
    key = on_all(jax.eval_shape(lambda: jax.random.key(0)))
    _, started = compiled(engine.start, CONFIG, law, params, on_trunks(tasks), key, slots=8, window=16)
    _, weights = compiled(decoder.decoding_weights, CONFIG, params)
    floor = jax.ShapeDtypeStruct((), np.int32)
    decode, _ = compiled(engine.run_segment, CONFIG, law, weights, *started, key, floor)
    # Caches are donated: they are results without a second copy.
    assert decode.memory_analysis().alias_size_in_bytes > 0

    mask = np.ones((4, 8, 32), bool)
    numbers = np.zeros(mask.shape, np.float32)
    rollouts = Rollouts(
        tokens=mask.astype(np.int32), mask=mask, sampler_logprobs=None, truncated=None, num_rejected=None
    )
    batch = TrainBatch(
        sequences=jax.eval_shape(engine.to_sequences, tasks, rollouts.tokens, rollouts.mask),
        token_weights=numbers, trunk_weights=np.zeros((4, 128), np.float32), advantages=numbers,
        sampler_logprobs=numbers, old_logprobs=None, ref_logprobs=None,
    )  # fmt: skip
    loss_fn = partial(update.policy_loss, CONFIG, LossConfig(), 1.0)
    _, (gradients, metrics) = compiled(
        update.add_gradients, params, params, None, on_trunks(batch), loss_fn=loss_fn,
        shardings=tuple(p.sharding for p in jax.tree.leaves(params)),
    )  # fmt: skip
    for gradient, parameter in zip(jax.tree.leaves(gradients), jax.tree.leaves(params), strict=True):
        assert gradient.sharding.is_equivalent_to(parameter.sharding, len(parameter.shape))
    optimizer = update.make_optimizer(OptimizerConfig(), 10)
    moments = jax.eval_shape(optimizer.init, params)
    state = update.TrainState(
        step=on_all(np.int32(0)),
        params=params,
        opt_state=shapes(moments, update.state_shardings(moments, params, mesh)),
        skipped=on_all(np.int32(0)),
    )
    compiled(update.apply_gradients, state, gradients, metrics, optimizer=optimizer)
