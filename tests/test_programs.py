"""Compiled programs: their cache, how many there are, and those that a run compiles before its first step."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rpt_jax.errors import ConfigError
from rpt_jax.parallel.programs import OFF, Program, take_compilations, use_cache

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def no_cache_yet():
    """JAX without a cache directory."""
    names = ["jax_compilation_cache_dir", "jax_compilation_cache_max_size"]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_options_of_a_gpu_stay_off_other_platforms():
    double = Program(lambda x: 2 * x, gpu={"no_such_option": True})
    assert double(jnp.float32(3)) == 6 and double.options("gpu") and not double.options("cpu")


def test_compilations_are_counted_once():
    take_compilations()
    jax.jit(lambda x: x * 3 + 0.12345)(jnp.float32(1))
    assert take_compilations().programs >= 1 and take_compilations().programs == 0


def test_where_programs_are_kept(no_cache_yet, tmp_path, monkeypatch):
    use_cache(OFF)
    assert jax.config.jax_compilation_cache_dir is None
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.compilation_cache=.*cannot be written"):
        use_cache(str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not kept"):
        use_cache("")
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    use_cache("")
    assert Path(jax.config.jax_compilation_cache_dir).parent == tmp_path / "user" / "rpt_jax"
    use_cache(str(tmp_path / "other"))  # a directory that is set stays
    assert "user" in jax.config.jax_compilation_cache_dir


def test_a_run_compiles_early_and_a_second_one_not_at_all(tmp_path):
    """Three steps of the preset `text` with few shapes, twice, each in its own process."""
    found, compiled = {}, {}
    for name in ("cold", "warm"):
        command = [sys.executable, "-m", "experiments.benchmarks.gpu_steps", str(tmp_path), name, "--dry-run"]
        log = {"JAX_LOG_COMPILES": "1"}
        done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, env=os.environ | log)
        compiled[name] = Counter(re.findall(r"Finished XLA compilation of jit\((\w+)\)", done.stderr))
        found[name] = [json.loads(line) for line in (tmp_path / name / "programs.jsonl").read_text().splitlines()]
    assert [r["step"] for r in found["cold"]] == [1] and found["cold"][0]["from_cache"] < 5
    # One program for each shape: the calls of the first step find those that were compiled ahead.
    large = {"start": 1, "run_segment": 2, "regroup": 1, "add_gradients": 2, "apply_gradients": 1}
    assert {name: compiled["cold"][name] for name in large} == large
    (warm,) = found["warm"]
    assert warm["programs"] == warm["from_cache"] and warm["programs"] >= found["cold"][0]["programs"] - 5
