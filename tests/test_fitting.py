"""Settings that are left to the machine, and what a run says when its memory does not suffice."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import pytest

from experiments.cli import describe
from experiments.presets import PRESETS
from rpt_jax.config import Config, DataConfig, DecoderConfig, EvalConfig, LossConfig, MeshConfig, RolloutConfig
from rpt_jax.errors import ConfigError
from rpt_jax.models import attention
from rpt_jax.parallel.programs import needs_memory
from rpt_jax.planning import fitting, programs
from rpt_jax.planning.estimate import estimate_rollout
from rpt_jax.planning.topologies import fit_mesh
from rpt_jax.train import sizes

TAIL, GIB = 3, 2**30


@pytest.fixture
def config(tiny_config):
    return Config(
        data=DataConfig(trunk_length=64),
        model=dataclasses.replace(tiny_config, num_layers=1),
        rollout=RolloutConfig(num_trunks=4, prompts_per_trunk=1, group_size=4, max_completion_tokens=64),
        eval=EvalConfig(batch_trunks=4),
    )


def changed(config, section, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


@pytest.mark.parametrize(
    "section, field, phase",
    [("mesh", "microbatch_trunks", "compile_update"), ("rollout", "slots_per_trunk", "compile_rollout")],
)
def test_the_largest_value_that_fits(config, mesh, monkeypatch, section, field, phase):
    @functools.cache
    def found(option):
        compiler = programs.make_compiler(option, mesh, print, reads_text=False)
        return list(getattr(programs, phase)(option, compiler, TAIL))

    options = [changed(config, section, **{field: n}) for n in (4, 2, 1)]
    needed = [max(p.peak + p.resident for p in found(option)) for option in options]
    assert needed[0] > needed[1] > needed[2]
    # The estimate is the first guess; the compiled programs decide.
    monkeypatch.setattr(fitting, phase, lambda option, *_: found(option))
    monkeypatch.setattr(fitting, "_SURE", -1)
    for name in ("estimate_update", "estimate_rollout"):
        monkeypatch.setattr(fitting, name, lambda *_: 0.0)
    said, left_open = [], changed(config, section, **{field: -1})

    def fit(start, memory):
        return fitting.fit_sizes(start, mesh, TAIL, memory / fitting._FULL, said.append)

    for memory, expected in zip((needed[0] + 1, needed[0] - 1, needed[1] - 1), options, strict=True):
        assert fit(left_open, memory) == expected
    assert f"{section}.{field} is 2: it needs 0.0 of 0.0 GiB" in said
    with pytest.raises(ConfigError, match=rf"{field}=1, the smallest, needs .*--mesh.fsdp"):
        fit(left_open, needed[2] - 1)
    # A value that is set stays.
    assert fit(options[2], 0) == options[2]


def test_an_estimate_alone_decides_without_a_mesh_or_if_little_is_needed(config, mesh, monkeypatch):
    config = changed(config, "mesh", microbatch_trunks=-1)
    monkeypatch.setattr(fitting, "estimate_update", lambda c, _: 100 * c.mesh.microbatch_trunks)
    monkeypatch.setattr(fitting, "compile_update", None)

    def fit(mesh, memory):
        return fitting.fit_sizes(config, mesh, TAIL, memory, print).mesh.microbatch_trunks

    assert fit(None, 250 / fitting.MARGIN) == 2 and fit(None, 1) == 1 and fit(mesh, 800) == 4


def test_an_evaluation_of_more_trunks_counts(config, monkeypatch):
    config = changed(changed(config, "rollout", slots_per_trunk=-1), "eval", batch_trunks=16)
    monkeypatch.setattr(fitting, "estimate_rollout", lambda c, _: c.rollout.num_trunks * c.rollout.slots_per_trunk)
    chosen = fitting.fit_sizes(config, None, TAIL, 32 / fitting.MARGIN, print)
    assert chosen.rollout.slots_per_trunk == 2 and chosen.rollout.num_trunks == 4


@pytest.mark.parametrize(
    "trunks, minibatches, shards, expected",
    [(16, 1, 1, 2), (3, 1, 1, 1), (16, 2, 1, 2), (16, 1, 4, 4), (12, 1, 2, 2)],
)
def test_sizes_that_nobody_has_chosen_yet(trunks, minibatches, shards, expected):
    config = Config(
        rollout=RolloutConfig(num_trunks=trunks, slots_per_trunk=-1),
        loss=LossConfig(num_minibatches=minibatches),
        mesh=MeshConfig(data=shards, microbatch_trunks=-1),
    )
    assert config.microbatch_trunks == expected and config.rollout.sampling["slots_per_trunk"] == 0
    if shards == 1 and trunks % 2 == 0:
        assert fit_mesh(config, 2).mesh.microbatch_trunks == -1


def test_a_run_keeps_its_sizes_until_they_may_not_fit(config, mesh, tmp_path, monkeypatch):
    config = changed(changed(config, "mesh", microbatch_trunks=-1), "rollout", slots_per_trunk=-1)
    template = SimpleNamespace(width=TAIL)
    directory = SimpleNamespace(
        path=tmp_path,
        is_read_only=False,
        keep=lambda name, value: (tmp_path / f"{name}.json").write_text(json.dumps(value)),
    )
    run = SimpleNamespace(config=config, mesh=mesh, template=template, directory=directory, learned_width=0)
    monkeypatch.setattr(
        sizes, "replace", lambda r, **c: SimpleNamespace(**vars(r) | c) if r is run else dataclasses.replace(r, **c)
    )
    assert sizes.device_memory(mesh) is None and sizes.fitted(run) is run  # a CPU
    gib = 2**30
    monkeypatch.setattr(sizes, "device_memory", lambda _: 1.0 * gib)
    first = sizes.fitted(run).config
    assert first.mesh.microbatch_trunks == 4 and first.rollout.slots_per_trunk == 4
    # More memory changes nothing; less memory, or another batch, does.
    monkeypatch.setattr(
        sizes,
        "fit_sizes",
        lambda *_: changed(changed(config, "mesh", microbatch_trunks=1), "rollout", slots_per_trunk=1),
    )
    monkeypatch.setattr(sizes, "device_memory", lambda _: 2.0 * gib)
    assert sizes.fitted(run).config == first
    monkeypatch.setattr(sizes, "device_memory", lambda _: 0.5 * gib)
    directory.is_read_only = True
    assert sizes.fitted(run) is run
    directory.is_read_only = False
    assert sizes.fitted(run).config.mesh.microbatch_trunks == 1


def test_old_gpus_take_float32(monkeypatch):
    left_open = DecoderConfig(activation_dtype="")
    assert attention.default_dtype(left_open) == "float32"  # a CPU
    for platform in ("gpu", "tpu"):
        assert attention.default_dtype(dataclasses.replace(left_open, platform=platform)) == "bfloat16"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability, expected in (("7.5", "float32"), ("8.0", "bfloat16"), ("12.0", "bfloat16")):
        monkeypatch.setattr(jax, "devices", lambda c=capability: [SimpleNamespace(compute_capability=c)])
        assert attention.default_dtype(left_open) == expected


def test_the_settings_to_lower_are_named_if_memory_runs_out():
    @needs_memory("an update", "--mesh.microbatch-trunks")
    def fail(message):
        raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(ConfigError, match=r"an update ran out .*\(RESOURCE_EXHAUSTED: 9 GiB\)\. Lower --mesh\.micro"):
        fail("RESOURCE_EXHAUSTED: 9 GiB\nmore")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fail("INTERNAL: 9 GiB")


def test_sizes_that_no_memory_holds_are_refused():
    """4,096 x 64 rollouts of a tiny policy: the refusal names the sizes, the need and what to lower."""
    config = changed(PRESETS["tiny_text"], "model", vocab_size=1024)
    sizes.check_memory(config, TAIL, 8 * GIB)
    large = changed(config, "rollout", num_trunks=4096, group_size=64)
    with pytest.raises(
        ConfigError, match=r"4096 trunks x 4 prompts x 64 rollouts needs about \d+.*--rollout.slots-per"
    ):
        sizes.check_memory(large, TAIL, 8 * GIB)
    # Keys and values alone: 2 x 4 layers x 4 heads x 32 x 4 bytes for each of 4096 x (128 + 16 + 256 x 16) tokens.
    assert estimate_rollout(large, TAIL) > 4096 * 4096 * (144 + 256 * 16)
    few_slots = changed(large, "rollout", slots_per_trunk=1)
    sizes.check_memory(few_slots, TAIL, 8 * GIB)
    whole = changed(few_slots, "mesh", microbatch_trunks=4096)
    with pytest.raises(ConfigError, match=r"update of 4096 trunks per pass.*--mesh.microbatch-trunks"):
        sizes.check_memory(whole, TAIL, 8 * GIB)
    assert sizes.host_memory() > 2**28


def test_a_dry_run_says_what_a_run_needs(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1500)
    paths = {"path": str(tmp_path / "*.txt"), "heldout_path": str(tmp_path / "none.txt")}
    text = describe(changed(PRESETS["tiny_text"], "data", **paths))
    assert "data.path: 1 file(s), 0.0 MB" in text and "none.txt DOES NOT EXIST" in text
    # 4 layers of 128 x (128 x 4 + 384 x 3) and two matrices of 1024 x 128.
    assert f"policy: {(4 * 128 * (128 * 4 + 384 * 3) + 2 * 1024 * 128) / 1e6:.1f} M parameters" in text
    assert "GiB per device for rollouts" in text
