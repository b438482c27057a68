"""Configs and command lines: everything wrong is refused, by name, before anything is read or compiled."""

import dataclasses
import json

import pytest

from experiments.cli import describe, parse_config
from experiments.presets import PRESETS
from rpt_jax.config import Config, MeshConfig, schema
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
        ("data", {"heldout_fraction": 1.0}, "data.heldout_fraction=1.0; it must be between 0 and 1"),
        ("eval", {"difficulty_thresholds": (1.0, 0.5, 2.0)}, "must not decrease"),
        ("positions", {"unfiltered_fraction": 1.0}, "unfiltered_fraction"),
        ("positions", {"entropy_threshold": 2.8}, "at most ln 16 = 2.77.*Lower --positions.entropy-threshold"),
        ("model", {"num_heads": 5}, "model.num_heads=5; it must be divisible by model.num_kv_heads=2"),
        ("model", {"head_size": 7}, "model.head_size=7"),
        ("mesh", {"tensor": 4}, "model.num_kv_heads=2; it must be divisible by mesh.tensor=4"),
        ("mesh", {"fsdp": 3}, "must be divisible"),
        ("loss", {"num_minibatches": 5}, "rollout.num_trunks=32; it must be divisible by loss.num_minibatches=5"),
        ("mesh", {"microbatch_trunks": 5}, "mesh.microbatch_trunks=5"),
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
    broken = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, microbatch_trunks=2))
    with pytest.raises(ConfigError, match="trunks of a microbatch=2; it must be divisible by mesh.data"):
        broken.validate()


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ConfigError, match="needs 64 devices; 8 cpu"):
        make_mesh(MeshConfig(data=64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v | {"extra": 1}, r"unknown fields \['extra'\]"),
        (lambda v: v | {"loss": v["loss"] | {"epsilon": 1}}, r"config.loss has unknown fields \['epsilon'\]"),
        (lambda v: v | {"format": 99}, "format 99; this version reads 1 to"),
        (lambda v: v | {"format": True}, "format True"),
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
        ("reward", "terms", "best"), ("reward", "compose", "best"), ("positions", "selector", 3),
        ("supervised", "pack", "no"),
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


def as_format_1(config) -> dict:
    """What the first format would hold: settings where they stood, no format, none of the later fields."""
    values = json.loads(config.to_json())
    del values["format"]
    for name in ("max_skipped_updates", "microbatch_trunks", "dynamic_sampling_from_step", "dynamic_sampling_rounds"):
        section = {"max_skipped_updates": "run", "microbatch_trunks": "mesh"}.get(name, "rollout")
        values["loss"][name] = values[section].pop(name)
    values["positions"]["difficulty_thresholds"] = values["eval"].pop("difficulty_thresholds")
    values["reward"]["name"] = values["reward"].pop("terms")[0]
    del values["reward"]["compose"], values["rollout"]["stop_ids"], values["companion"]
    return values


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_of_the_first_format_is_read_as_it_was_meant(preset):
    config, notes = schema.from_json(Config, json.dumps(as_format_1(PRESETS[preset])))
    assert config == PRESETS[preset]
    said = " ".join(notes.values())
    assert "loss.microbatch_trunks is mesh.microbatch_trunks=" in said and "rollout.stop_ids is missing" in said
    assert schema.from_json(Config, config.to_json()) == (config, {})


def test_fields_that_a_file_lacks_take_what_held_before_them():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Section:
        old: int = schema.setting(1, at_least=0)
        new: str = schema.setting("better", before="as ever")
        other: float = 2.0

    built, notes = schema.from_json(Section, '{"old": 3}')
    assert built == Section(old=3, new="as ever", other=2.0) and Section().new == "better"
    assert notes == {"new": "new is missing: as ever", "other": "other is missing: 2.0"}
    with pytest.raises(ConfigError, match=r"unknown fields \['gone'\]"):
        schema.from_json(Section, '{"old": 3, "gone": 1}')


def test_presets_that_are_newer_than_a_run_do_not_change_it(tmp_path):
    """The run was made before positions.max_tokens existed; tiny_text sets it now."""
    flags = ["--preset", "tiny_text", "--data.path", "a.txt", "--run.directory", str(tmp_path)]
    config, _ = parse_config(flags)
    assert config.positions.max_tokens == 2**20
    values = json.loads(config.to_json())
    del values["positions"]["max_tokens"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert parse_config(flags)[0].positions == dataclasses.replace(config.positions, max_tokens=0)
    assert parse_config([*flags, "--positions.max-tokens", "9"])[0].positions.max_tokens == 9


def test_bounds_and_help_stand_at_every_field():
    texts = schema.help_texts(Config())
    fields = {path: f for path, f, _ in schema.walk(Config())}
    assert set(texts) == set(fields)
    assert (
        fields["rollout.group_size"].metadata["at_least"] == 2
        and "Rollouts per position" in texts["rollout.group_size"]
    )
    shown = [path for path, f in fields.items() if f.metadata.get("shown")]
    assert 18 <= len(shown) <= 30 and all(texts[path] for path in shown)


def test_help_shows_first_what_people_vary(capsys):
    for flag, has_all in (("--help", False), ("--help-all", True)):
        with pytest.raises(SystemExit):
            parse_config(["--preset", "tiny_worked", flag])
        out = " ".join(capsys.readouterr().out.split())
        assert "--rollout.group-size" in out and "--model.norm-eps" in out
        assert "Rollouts per position (G)" in out and ("Weight of the KL term" in out) == has_all


def test_a_flag_that_moved_says_where_to():
    with pytest.raises(ConfigError, match="--loss.microbatch-trunks is now --mesh.microbatch-trunks"):
        parse_config(["--preset", "tiny_worked", "--loss.microbatch-trunks", "3"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward.terms", "best"], "names 'best'; it must be one of prefix"),
        (["--reward.terms", "prefix", "prefix"], "each once"),
        (["--reward.terms", "x*prefix"], "WEIGHT\\*NAME"),
        (["--reward.terms", "math"], "'math', which needs questions"),
        (["--reward.terms", "custom"], "custom needs a function"),
        (["--reward.compose", "normalize_then_sum", "--loss.advantage", "mean"], "must keep its default 'grpo'"),
    ],
)
def test_rewards_that_cannot_be_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(["--preset", "tiny_worked", *flags])


def test_command_line_precedence():
    config, dry = parse_config(["--preset", "tiny_worked", "--rollout.group-size", "4", "--dry-run"])
    preset = PRESETS["tiny_worked"]
    assert dry and config.rollout.group_size == 4
    assert config.rollout.num_trunks == preset.rollout.num_trunks and config.run.directory == "runs/tiny_worked"
    assert f"{preset.rollout.num_trunks * 4} rollouts" in describe(config)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no --preset; it must be one of tiny_worked, tiny_text"),
        (["--preset", "huge"], "--preset huge"),
        (["--preset", "tiny_worked", "--loss.epsilon", "3"], "unknown argument"),
        (["--preset", "tiny_worked", "--rollout.group-size", "1"], "group_size=1"),
    ],
)
def test_command_lines_that_cannot_run_are_refused(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(argv)
