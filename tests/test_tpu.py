"""Plans: the programs of a step compile for TPU slices, on a machine without TPUs. Skipped if libtpu is missing."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from experiments import plan as plan_script
from rpt_jax.config import (
    Config,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    LoraConfig,
    MeshConfig,
    RolloutConfig,
    SupervisedConfig,
)
from rpt_jax.errors import ConfigError
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.planning.estimate import estimate_memory
from rpt_jax.planning.plan import make_plan
from rpt_jax.planning.topologies import describe_topology, fit_mesh, larger_topologies

pytest.importorskip("libtpu", reason="libtpu (the TPU compiler) is not installed: pip install -e '.[tpu]'")

CONFIG = Config(
    data=DataConfig(trunk_length=128),
    model=DecoderConfig(
        vocab_size=2048, num_layers=2, width=256, mlp_width=512, num_heads=4, num_kv_heads=2, head_size=128,
        activation_dtype="bfloat16",
    ),
    rollout=RolloutConfig(num_trunks=4, prompts_per_trunk=2, group_size=4, max_completion_tokens=32, top_p=0.95),
    mesh=MeshConfig(data=1, fsdp=2, tensor=2, microbatch_trunks=2),
    supervised=SupervisedConfig(batch_size=4),
    eval=EvalConfig(batch_trunks=4, num_samples=4),
)  # fmt: skip


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4)])
def test_a_step_compiles_for_a_slice_and_is_accounted_for(lora):
    found = make_plan(dataclasses.replace(CONFIG, lora=lora), "v5e:2x2", num_tail=8)
    assert found.fits and [p.name for p in found.programs] == [
        "gather weights", "prefill", "decode", "gradients", "optimizer",
    ]  # fmt: skip
    # By hand: q, o 256 x 512; k, v 256 x 256; the MLP's three 256 x 512; norms; embedding and head.
    layer = 2 * 256 * 512 + 2 * 256 * 256 + 3 * 256 * 512 + 2 * 256 + 2 * 128
    parameters = 2 * layer + 2 * 2048 * 256 + 256
    assert found.parameters == parameters
    # All parameters but the norms are split over the four chips, in float32.
    norms = 2 * (2 * 256 + 2 * 128) + 256
    held = (parameters - norms) + 4 * norms
    if not lora.rank:
        assert found.memory["parameters"] == held
        assert found.memory["optimizer"] == pytest.approx(2 * held, abs=64)
    else:
        assert held < found.memory["parameters"] < 1.2 * held and found.memory["optimizer"] < 0.2 * held
    # Keys and values of 4 x 8 completions of 32 tokens, two layers, two heads of 128, bfloat16.
    assert found.memory["caches"] == 4 * 8 * 32 * 2 * 2 * 2 * 128 * 2 // 4
    for phase in found.phases:
        assert phase["traffic"] > 0.5 * phase["least_traffic"] > 0, phase["name"]
        assert phase["limited_by"] in ("arithmetic", "memory", "links")
    text = plan_script.describe(found, CONFIG)
    assert "FITS" in text and "a step takes at least" in text


def test_the_nearest_settings_that_fit_are_suggested():
    long = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, num_layers=16, max_positions=2**20),
        rollout=dataclasses.replace(CONFIG.rollout, max_completion_tokens=2**17),
    )
    found = make_plan(long, "v5e:2x2", num_tail=8)
    assert not found.fits and "too big" in plan_script.describe(found, long)
    changes, topology, nearer = next(plan_script.nearest(long, "v5e:2x2", 8, found.chip.memory))
    assert estimate_memory(nearer, 8) < found.chip.memory < estimate_memory(long, 8)
    assert changes and topology.startswith("v5e:")


def test_evaluations_must_fit_into_the_plan():
    larger = dataclasses.replace(CONFIG, eval=EvalConfig(batch_trunks=8, num_samples=2))
    with pytest.raises(ConfigError, match="--eval.batch-trunks 4"):
        make_plan(larger, "v5e:2x2", num_tail=8)
    more = dataclasses.replace(CONFIG, eval=EvalConfig(batch_trunks=4, num_samples=8))
    with pytest.raises(ConfigError, match="keeps 64 rollouts of 4 trunks .* a step's 32 .* --eval.batch-trunks 2"):
        make_plan(more, "v5e:2x2", num_tail=8)


@pytest.mark.parametrize(
    ("topology", "message"),
    [("v9:2x2", "must be one of v4, v5e, v5p, v6e"), ("v5e:7x9x3", "cannot be described")],
)
def test_unknown_topologies_are_refused(topology, message):
    with pytest.raises(ConfigError, match=message):
        describe_topology(topology)


def test_meshes_follow_topologies():
    _, devices = describe_topology("v5e:4x4")
    fitted = fit_mesh(CONFIG, 4)
    assert fitted == CONFIG
    with pytest.raises(ConfigError, match="not a multiple"):
        fit_mesh(dataclasses.replace(CONFIG, mesh=MeshConfig(data=3, tensor=2)), 16)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=4), devices)
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)
    # Neighbours along the tensor axis are neighbours in the torus.
    for row in mesh.devices.reshape(-1, 4):
        coordinates = np.array([d.coords for d in row])
        assert (np.abs(np.diff(coordinates, axis=0)).sum(1) == 1).all()


def test_slices_are_the_outer_part_of_data():
    _, _ = describe_topology("v5e:2x2")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    for number, part in enumerate(mesh.devices):
        assert {d.slice_index for d in part.flat} == {number}
    with pytest.raises(ConfigError, match="must be a multiple of the number of slices"):
        make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), devices)


def test_larger_topologies():
    assert list(larger_topologies("v5p:2x2x4"))[:2] == ["v5p:2x4x4", "v5p:4x4x4"]
    assert jax.default_backend() == "cpu"
