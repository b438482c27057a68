"""Configs and command lines: everything wrong is refused, by name, before anything is read or compiled."""

import dataclasses
import json

import pytest

from experiments.cli import describe, parse_config
from experiments.presets import PRESETS
from rpt_jax.config import Config, MeshConfig
from rpt_jax.errors import ConfigError
from rpt_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_survive_json(preset):
    config = PRESETS[preset]
    config.validate()
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("rollout", {"group_size": 1}, "rollout.group_size=1; it must be at least 2"),
        ("rollout", {"num_trunks": 0}, "rollout.num_trunks=0"),
        ("rollout", {"top_p": 0.0}, "rollout.top_p=0.0"),
        ("rollout", {"temperature": -1.0}, "rollout.temperature=-1.0"),
        ("rollout", {"temperature": 0.0}, "teach nothing"),
        ("optimizer", {"learning_rate": -1.0}, "optimizer.learning_rate=-1.0"),
        ("model", {"num_heads": 0}, "model.num_heads=0"),
        ("data", {"heldout_fraction": 1.0}, "data.heldout_fraction=1.0; it must lie between 0 and 1"),
        ("positions", {"difficulty_thresholds": (1.0, 0.5, 2.0)}, "must not decrease"),
        ("positions", {"unfiltered_fraction": 1.0}, "unfiltered_fraction"),
        ("model", {"num_heads": 5}, "model.num_heads=5 is not divisible by model.num_kv_heads=2"),
        ("model", {"head_size": 7}, "model.head_size=7"),
        ("mesh", {"tensor": 4}, "model.num_kv_heads=2 is not divisible by mesh.tensor=4"),
        ("mesh", {"fsdp": 3}, "not divisible"),
        ("loss", {"num_minibatches": 5}, "rollout.num_trunks=32 is not divisible by loss.num_minibatches=5"),
        ("loss", {"microbatch_trunks": 5}, "mesh.microbatch_trunks=5"),
        ("eval", {"num_positions": 1}, "eval.num_positions=1"),
        ("checkpoint", {"keep": 0}, "checkpoint.keep=0"),
    ],
)
def test_settings_that_cannot_run_are_refused(section, changes, message):
    config = Config()
    config.validate()
    broken = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
    with pytest.raises(ConfigError, match=message):
        broken.validate()


def test_microbatch_must_fill_the_mesh():
    config = Config(mesh=MeshConfig(data=2, fsdp=2))
    config.validate()
    broken = dataclasses.replace(config, loss=dataclasses.replace(config.loss, microbatch_trunks=2))
    with pytest.raises(ConfigError, match="trunks of a microbatch=2 is not divisible by mesh.data"):
        broken.validate()


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ConfigError, match="needs 64 devices; 8 cpu"):
        make_mesh(MeshConfig(data=64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v | {"extra": 1}, r"unknown fields \['extra'\]"),
        (lambda v: {k: x for k, x in v.items() if k != "loss"}, r"lacks \['loss'\]"),
        (lambda v: v | {"run": 3}, "config.run is int"),
    ],
)
def test_json_with_other_fields_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_json(json.dumps(change(json.loads(Config().to_json()))))
    with pytest.raises(ConfigError, match="not a JSON config"):
        Config.from_json("{")


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("run", "num_steps", "abc"), ("run", "num_steps", None), ("run", "num_steps", 2.5), ("run", "num_steps", True),
        ("rollout", "temperature", float("nan")), ("reward", "time_limit_seconds", float("inf")),
        ("reward", "name", "best"), ("positions", "selector", 3), ("supervised", "pack", "no"),
        ("positions", "pass_rate_band", [0.1, 0.2, 0.3]), ("lora", "targets", "q_proj"),
        ("lora", "targets", ["x_proj"]), ("model", "rope_scaling", 3), ("data", "path", 7),
    ],
)  # fmt: skip
def test_ill_typed_values_are_refused_by_name(section, name, value):
    values = json.loads(PRESETS["tiny_text"].to_json())
    values[section][name] = value
    with pytest.raises(ConfigError, match=name):
        Config.from_json(json.dumps(values))
    with pytest.raises(ConfigError, match="not a JSON config"):
        Config.from_json("[" * 100_000)


def test_command_line_precedence():
    config, dry = parse_config(["--preset", "tiny_worked", "--rollout.group-size", "4", "--dry-run"])
    preset = PRESETS["tiny_worked"]
    assert dry and config.rollout.group_size == 4
    assert config.rollout.num_trunks == preset.rollout.num_trunks and config.run.directory == "runs/tiny_worked"
    assert f"{preset.rollout.num_trunks * 4} rollouts" in describe(config)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--preset None; it must be one of tiny_worked, tiny_text"),
        (["--preset", "huge"], "--preset huge"),
        (["--preset", "tiny_worked", "--loss.epsilon", "3"], "unknown argument"),
        (["--preset", "tiny_worked", "--rollout.group-size", "1"], "group_size=1"),
    ],
)
def test_command_lines_that_cannot_run_are_refused(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(argv)
