"""A run that is told to stop stops at the next boundary, saved; a standstill ends loudly."""

import dataclasses
import signal
import subprocess
import sys

import pytest
from test_system import corpus, evaluated_at_the_ends, run_hashes, tiny_run  # noqa: F401  (a fixture)

from rpt_jax.config import LoraConfig, LossConfig
from rpt_jax.errors import CheckpointError, Interrupted, RewardError
from rpt_jax.parallel.interruption import STALLED, check, watching
from rpt_jax.rl import trainer
from rpt_jax.rollout import engine
from rpt_jax.train.checkpoint import Checkpoints
from rpt_jax.train.pipeline import run_stages
from rpt_jax.train.run import newest_state, prepare
from rpt_jax.train.stages import supervised
from rpt_jax.train.stages.warm_start import warm_start

pytestmark = pytest.mark.usefixtures("few_programs")

LOSS = LossConfig(num_minibatches=2)


def run(config):
    """All that a resumed run must repeat exactly: the warm start too."""
    with watching(0):
        done = run_stages(dataclasses.replace(config, run=dataclasses.replace(config.run, control=False)))
    return run_hashes(done, newest_state(done, warm_start(done))[0])


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):  # noqa: F811
    config = evaluated_at_the_ends(tiny_run(corpus, tmp_path_factory.mktemp("straight") / "run", loss=LOSS))
    return run(config)


def on_call(monkeypatch, place, name: str, number: int, action) -> None:
    """Do `action` in the number-th call of a function, before it."""
    function, calls = getattr(place, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            action()
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, wrapped)


def terminate():
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("place", "name", "number"),
    [
        (engine, "run_segment", 12),  # in an evaluation or a rollout
        (trainer, "update", 3),  # in the first of two updates of a batch
        (trainer, "update", 4),  # in the second
        (Checkpoints, "save", 2),
        (supervised, "update", 2),  # in the warm start
    ],
)
def test_sigterm_saves_and_the_same_command_resumes_exactly(
    corpus,  # noqa: F811
    straight,
    tmp_path,
    monkeypatch,
    place,
    name,
    number,
):
    config = evaluated_at_the_ends(tiny_run(corpus, tmp_path / "run", loss=LOSS))
    on_call(monkeypatch, place, name, number, terminate)
    with pytest.raises(Interrupted, match="SIGTERM"):
        run(config)
    monkeypatch.undo()
    assert run(config) == straight


class Killed(Exception):
    """Not one of ours: nothing is done about it."""


def test_an_end_between_two_updates_of_one_batch_repeats_the_whole_step(corpus, straight, tmp_path, monkeypatch):  # noqa: F811
    def die():
        raise Killed

    config = evaluated_at_the_ends(tiny_run(corpus, tmp_path / "run", loss=LOSS))
    on_call(monkeypatch, trainer, "update", 6, die)
    with pytest.raises(Killed):
        run(config)
    monkeypatch.undo()
    assert run(config) == straight


def test_a_copy_continues_as_its_source_did_and_may_change(corpus, straight, tmp_path):  # noqa: F811
    """--run.resume DIR@STEP: the same settings give the same end; the source stays as it was."""
    config = evaluated_at_the_ends(tiny_run(corpus, tmp_path / "source", loss=LOSS))
    assert run(config) == straight
    settings = dataclasses.replace(config.run, directory=str(tmp_path / "copy"), resume=f"{tmp_path / 'source'}@2")
    copy = dataclasses.replace(config, run=settings)
    arrays, lines, _ = run(copy)
    assert (arrays, lines) == straight[:2]
    assert sorted(p.name for p in (tmp_path / "source" / "checkpoints" / "rpt").iterdir()) == ["2", "4"]
    assert not (tmp_path / "source" / "checkpoints" / "set_aside").exists()
    # Fewer steps than are done: said, and nothing is written.
    records = (tmp_path / "source" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="has done 4 steps; run.num_steps=3"):
        run(dataclasses.replace(config, run=dataclasses.replace(config.run, num_steps=3)))
    assert (tmp_path / "source" / "metrics.jsonl").read_bytes() == records
    # Going back in the copy itself.
    back = dataclasses.replace(copy, run=dataclasses.replace(settings, resume="2"))
    assert run(back) == run(copy)
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    for resume, directory, message in (
        ("9", "copy", "no intact checkpoint of step 9"),
        (str(tmp_path / "nowhere"), "new", "is not a run"),
        (f"{tmp_path / 'source'}@2", "other", "already holds something else"),
        (f"{tmp_path / 'source'}@4", "copy", "to go back in a run, give only the step"),
    ):
        directory = str(tmp_path / directory)
        with pytest.raises(CheckpointError, match=message):
            run(dataclasses.replace(copy, run=dataclasses.replace(settings, directory=directory, resume=resume)))


def test_a_copy_with_adapters_needs_the_weights_under_them(corpus, tmp_path):  # noqa: F811
    config = tiny_run(corpus, tmp_path / "run", lora=LoraConfig(rank=2))
    prepare(config)
    fork = dataclasses.replace(config.run, directory=str(tmp_path / "fork"), resume=f"{tmp_path / 'run'}@2")
    for change, name in (
        ({"lora": LoraConfig(rank=2, alpha=99.0)}, "lora"),
        ({"supervised": dataclasses.replace(config.supervised, num_steps=0)}, "supervised"),
    ):
        with pytest.raises(CheckpointError, match=f"adapters made with {name}="):
            prepare(dataclasses.replace(config, run=fork, **change))


def test_a_failing_reward_function_loses_no_step(corpus, straight, tmp_path, monkeypatch):  # noqa: F811
    config = evaluated_at_the_ends(tiny_run(corpus, tmp_path / "run", loss=LOSS))
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every_steps=100))

    def fail():
        raise RewardError("task 7")

    on_call(monkeypatch, trainer, "generate", 3, fail)  # in the third rollout
    with pytest.raises(RewardError):
        run(config)
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "run" / "checkpoints" / "rpt", keep=3).latest_step == 2
    assert run(config)[0] == straight[0]


def test_a_second_signal_is_immediate():
    with watching(0):
        terminate()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(Interrupted):
            check()
    with watching(0):
        check()  # a new watch knows nothing of the last one's signals


def test_a_standstill_ends_the_process_and_says_where():
    code = (
        "import time\nfrom rpt_jax.parallel.interruption import watching\n"
        "def waits_for_ever():\n    time.sleep(60)\n"
        "with watching(0.5):\n    waits_for_ever()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == STALLED
    assert "no progress for distributed.deadline_seconds=0.5" in ended.stderr
    assert "in waits_for_ever" in ended.stderr
