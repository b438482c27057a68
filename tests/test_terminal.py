"""What a person sees: progress without a terminal, suggestions for typing errors, what presets are for."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from experiments.cli import parse_config
from experiments.presets import METHOD_PURPOSES, METHODS, NEED_A_POLICY, PRESETS, PURPOSES
from rpt_jax.config import Config, PolicyConfig
from rpt_jax.errors import ConfigError
from rpt_jax.parallel.interruption import watching
from rpt_jax.train import progress
from rpt_jax.train.run import prepare


@pytest.fixture
def lines(monkeypatch):
    """Progress into a file, with a clock that the test moves."""
    out, clock = io.StringIO(), [100.0]
    monkeypatch.setattr(progress, "console", Console(file=out, width=200))
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return out, clock


def test_without_a_terminal_progress_is_plain_lines(lines):
    """The first item, one line every half minute, and the last; the time left leaves out the first item."""
    out, clock = lines
    with progress.progress_bar("rpt", 50) as update:
        for step, seconds in ((1, 60), (2, 10), (3, 25), (4, 5), (50, 20)):
            clock[0] += seconds
            update(step, f"reward 0.{step}")
    assert out.getvalue().splitlines() == [
        "rpt          1/50  1:00 elapsed  reward 0.1",
        # 35 s for two steps since the first: 17.5 s for each of the 47 left.
        "rpt          3/50  1:35 elapsed  13:42 left  reward 0.3",
        "rpt          50/50  2:00 elapsed  reward 0.50",
    ]


def test_the_last_item_is_printed_without_a_total(lines):
    out, clock = lines
    for _ in progress.counted("tokenising", range(250)):
        clock[0] += 0.1
    assert out.getvalue().splitlines()[-1].split()[:2] == ["tokenising", "200"]


def test_nothing_is_printed_twice(lines):
    out, _ = lines
    list(progress.tracked("evaluation", range(1)))
    assert len(out.getvalue().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "meant"),
    [(["--preset", "txt"], "Did you mean text?"), (["--preset", "tiny-text"], "Did you mean tiny_text?"),
     (["--preset", "tiny_text", "--group-size", "4"], "Did you mean --rollout.group-size?"),
     (["--preset", "tiny_text", "--rollout.group-sise", "4"], "Did you mean --rollout.group-size?"),
     (["--preset", "tiny_text", "--optimiser.learning-rate=3"], "learning-rate"),
     (["--preset", "tiny_text", "--loss.microbatch-trunks", "2"], "is now --mesh.microbatch-trunks")],
)  # fmt: skip
def test_typing_errors_get_a_suggestion(flags, meant):
    with pytest.raises(ConfigError) as error:
        parse_config(flags)
    assert meant in str(error.value)


def test_every_preset_says_what_it_is_for(capsys):
    assert METHOD_PURPOSES.keys() == METHODS.keys()
    assert list(PURPOSES) == list(PRESETS) and set(NEED_A_POLICY) < set(PRESETS)
    with pytest.raises(SystemExit):
        parse_config(["--preset", "text", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {purpose}" in printed for name, purpose in PURPOSES.items())
    assert "--loss.clip-eps-high" in printed and "--rollout.group-size" in printed


def test_a_preset_for_pretrained_policies_needs_one(tmp_path):
    flags = ["--preset", "questions", "--questions.path", "q.jsonl", "--run.directory", str(tmp_path)]
    assert parse_config(flags)[0].policy.path == ""
    with pytest.raises(ConfigError, match="questions has no policy.path.*random one would never earn a reward"):
        parse_config(flags, trains=True)
    assert parse_config([*flags, "--policy.path", "x"], trains=True)[0].policy.path == "x"


@pytest.mark.parametrize(
    ("path", "expected"),
    [("Qwen/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B"), ("/no/such/model", "Correct --policy")],
)
def test_a_missing_policy_is_named(path, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"policy\.path='.*' does not exist") as error:
        prepare(Config(policy=PolicyConfig(path=path)))
    assert expected in str(error.value)


def test_the_first_signal_says_what_follows(capfd):
    with watching(0):
        os.kill(os.getpid(), signal.SIGTERM)
    assert "SIGTERM: stopping at the next boundary" in capfd.readouterr().err


def test_a_reader_that_has_seen_enough():
    command = f"{sys.executable} -m experiments.train --help | head -1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("Train a preset") and "Traceback" not in done.stderr
