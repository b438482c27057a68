"""Settings that are left to the machine, and what a run says when its memory does not suffice."""

import dataclasses
import functools

import jax
import pytest

from rpt_jax.config import Config, DataConfig, MeshConfig, RolloutConfig
from rpt_jax.errors import ConfigError
from rpt_jax.parallel.programs import needs_memory
from rpt_jax.planning import fitting, programs

TAIL = 3


@pytest.fixture
def config(tiny_config):
    return Config(
        data=DataConfig(trunk_length=64),
        model=dataclasses.replace(tiny_config, num_layers=1),
        rollout=RolloutConfig(
            num_trunks=4, prompts_per_trunk=1, group_size=4, max_completion_tokens=64, slots_per_trunk=-1
        ),
        mesh=MeshConfig(microbatch_trunks=-1),
    )


@pytest.mark.parametrize(
    "section, field, fit, phase",
    [
        ("mesh", "microbatch_trunks", fitting.fit_microbatch, "compile_update"),
        ("rollout", "slots_per_trunk", fitting.fit_slots, "compile_rollout"),
    ],
)
def test_the_largest_value_that_fits(config, mesh, monkeypatch, section, field, fit, phase):
    def with_value(n: int) -> Config:
        return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{field: n})})

    compiled = functools.cache(lambda *args: list(getattr(programs, phase)(*args)))
    monkeypatch.setattr(fitting, phase, compiled)
    options = [with_value(n) for n in (4, 2, 1)]
    sizes = [max(p.peak + p.resident for p in compiled(option, mesh, TAIL)) for option in options]
    assert sizes[0] > sizes[1] > sizes[2]
    # The estimate is the first guess; the compiled programs decide.
    monkeypatch.setattr(fitting, "_SURE", -1)
    for name in ("estimate_update", "estimate_rollout"):
        monkeypatch.setattr(fitting, name, lambda *_: 0.0)
    said = []
    for memory, expected in zip((sizes[0], sizes[0] - 1, sizes[1] - 1), options, strict=True):
        assert fit(config, mesh, TAIL, memory, said.append) == expected
    assert f"{section}.{field} is 2: needs" in said[1]
    with pytest.raises(ConfigError, match=r"the smallest passes need .*--mesh.fsdp"):
        fit(config, mesh, TAIL, sizes[2] - 1, said.append)
    # A value that is set stays.
    assert fit(options[2], mesh, TAIL, 0, said.append) == options[2]


def test_an_estimate_alone_decides_without_a_mesh_or_if_little_is_needed(config, mesh, monkeypatch):
    monkeypatch.setattr(fitting, "estimate_update", lambda c, _: 100 * c.mesh.microbatch_trunks)
    assert fitting.fit_microbatch(config, None, TAIL, 250 / fitting.MARGIN, print).mesh.microbatch_trunks == 2
    assert fitting.fit_microbatch(config, None, TAIL, 1, print).mesh.microbatch_trunks == 1
    # Nothing is compiled either if the estimate is far below the memory.
    monkeypatch.setattr(fitting, "compile_update", None)
    assert fitting.fit_microbatch(config, mesh, TAIL, 800, print).mesh.microbatch_trunks == 4


def test_cpus_take_two_trunks_and_all_rollouts(config, mesh):
    assert fitting.device_memory(mesh) is None
    chosen = fitting.fit_slots(fitting.fit_microbatch(config, mesh, TAIL, None, print), mesh, TAIL, None, print)
    assert chosen.mesh.microbatch_trunks == 2 and chosen.rollout.slots_per_trunk == 4
    sharded = dataclasses.replace(config, mesh=MeshConfig(data=4, microbatch_trunks=-1))
    assert fitting.fit_microbatch(sharded, mesh, TAIL, None, print).mesh.microbatch_trunks == 4


def test_the_settings_to_lower_are_named_if_memory_runs_out():
    @needs_memory("an update", "--mesh.microbatch-trunks")
    def fail(message):
        raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(ConfigError, match=r"an update ran out .*\(RESOURCE_EXHAUSTED: 9 GiB\)\. Lower --mesh\.micro"):
        fail("RESOURCE_EXHAUSTED: 9 GiB\nmore")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fail("INTERNAL: 9 GiB")
