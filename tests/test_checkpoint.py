"""Checkpoints: what is restored is what was saved, and damage is found, named and passed over."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rpt_jax.config import MeshConfig
from rpt_jax.errors import CheckpointError
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.train.checkpoint import MANIFEST, Checkpoints, find_damage, steps_of
from rpt_jax.types import TrainState


def state_of(number: float, sharding=None) -> TrainState:
    params = {"w": jnp.arange(64, dtype=jnp.float32).reshape(8, 8) + number, "b": jnp.full(8, number, jnp.bfloat16)}
    if sharding is not None:
        params = jax.device_put(params, sharding)
    return TrainState(
        step=jnp.int32(number), params=params, opt_state=(jnp.float32(number),), skipped=jnp.int32(0), companions={}
    )


def same(a: TrainState, b: TrainState) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture
def saved(tmp_path):
    """Steps 1 and 2, and the directory."""
    with Checkpoints(tmp_path / "rpt", keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), {"step": step, "seen": [1.5, 2]})
    return tmp_path / "rpt"


def newest(directory) -> tuple[int, dict]:
    checkpoints = Checkpoints(directory, keep=3)
    state, record = checkpoints.restore(state_of(0))
    assert same(state, state_of(record["step"])) and checkpoints.latest_step == record["step"]
    return record["step"], record


def test_state_and_record_come_back(saved):
    assert newest(saved) == (2, {"step": 2, "seen": [1.5, 2]})


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    """The update that follows writes into the very buffers that are being saved."""
    change = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(1, 6):
            state = state_of(step)
            checkpoints.save(step, state, {"step": step})
            jax.block_until_ready(change(state))
    for step in range(1, 6):
        state, _ = Checkpoints(tmp_path, keep=9, step=6 - step).restore(state_of(0))
        assert same(state, state_of(6 - step))


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 5, 9):
            checkpoints.save(step, state_of(step), {"step": step})
    assert steps_of(tmp_path) == [5, 9]


def flip(path, position: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_any_file_is_found(saved, capsys):
    """Orbax restores such a checkpoint without a word; its own manifest is a file like the others here."""
    files = [p for p in (saved / "2").rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 5 and any(p.name == MANIFEST for p in files)
    assert find_damage(saved / "2") == ""
    for path in files:
        for position in (0, path.stat().st_size // 2, -1):
            flip(path, position)
            assert find_damage(saved / "2"), (path, position)
            flip(path, position)
    flip(files[0])
    assert newest(saved)[0] == 1
    assert "differ from their digests" in capsys.readouterr().err.replace("\n", " ")
    assert (saved.parent / "set_aside" / "rpt-2.0" / "why.txt").exists()


def truncate(directory):
    path = max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])


def delete_a_file(directory):
    next(p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != MANIFEST).unlink()


def empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def unfinished(directory):
    """Orbax was done, the digests were not."""
    (directory / MANIFEST).unlink()


def escape(directory):
    text = (directory / MANIFEST).read_text()
    (directory / MANIFEST).write_text(text.replace('"state/', '"../state/', 1))


@pytest.mark.parametrize("damage", [truncate, delete_a_file, empty, unfinished, escape])
def test_a_damaged_checkpoint_is_passed_over_and_its_step_can_be_saved_again(saved, damage):
    damage(saved / "2")
    (saved / "3.orbax-checkpoint-tmp").mkdir()
    assert newest(saved)[0] == 1
    with Checkpoints(saved, keep=3) as checkpoints:
        checkpoints.save(2, state_of(2), {"step": 2})
    assert newest(saved)[0] == 2
    assert sorted(p.name for p in saved.iterdir()) == ["1", "2"]


def test_an_interrupted_first_save_is_a_beginning(saved):
    shutil.rmtree(saved / "1")
    unfinished(saved / "2")
    checkpoints = Checkpoints(saved, keep=3)
    assert checkpoints.latest_step is None
    with pytest.raises(CheckpointError, match="start the stage from its beginning"):
        checkpoints.restore(state_of(0))


def test_a_run_does_not_begin_anew_in_silence(saved):
    for step in ("1", "2"):
        flip(next(p for p in (saved / step).rglob("*") if p.is_file()))
    with pytest.raises(CheckpointError, match="holds checkpoints, but none is intact"):
        Checkpoints(saved, keep=3)


def test_a_reader_touches_nothing(saved):
    """A run may be writing: what looks unfinished to a reader is about to be finished."""
    (saved / "3.orbax-checkpoint-tmp").mkdir()
    unfinished(saved / "2")
    reader = Checkpoints(saved, keep=1, read_only=True)
    assert reader.latest_step == 1 and reader.restore(state_of(0))[1]["step"] == 1
    assert sorted(p.name for p in saved.iterdir()) == ["1", "2", "3.orbax-checkpoint-tmp"]


def test_going_back_to_a_step_sets_later_ones_aside(saved):
    assert Checkpoints(saved, keep=3, step=1).latest_step == 1
    assert steps_of(saved) == [1] and (saved.parent / "set_aside" / "rpt-2.0").is_dir()
    with pytest.raises(CheckpointError, match=r"no intact checkpoint of step 7 .* there are steps \[1\]"):
        Checkpoints(saved, keep=3, step=7)


def test_going_back_to_a_damaged_step_changes_nothing(saved):
    unfinished(saved / "1")
    with pytest.raises(CheckpointError, match="no intact checkpoint of step 1"):
        Checkpoints(saved, keep=3, step=1)
    assert steps_of(saved) == [1, 2] and newest(saved)[0] == 2


def test_another_model_does_not_fit(saved):
    like = state_of(0)
    like.params["w"] = jnp.zeros((3, 3))
    with pytest.raises(CheckpointError, match="does not fit this run"):
        Checkpoints(saved, keep=3).restore(like)


@pytest.mark.parametrize("axes", [(2, 4, 1), (8, 1, 1), (1, 1, 1)])
def test_arrays_are_bit_equal_on_another_mesh(tmp_path, axes):
    """Saved on 4 x 2."""

    def sharding(data, fsdp, tensor):
        mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
        return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state_of(3, sharding(4, 2, 1)), {"step": 3})
    state, _ = Checkpoints(tmp_path, keep=1).restore(state_of(0, sharding(*axes)))
    assert same(state, state_of(3))
    assert len(state.params["w"].sharding.device_set) == np.prod(axes)


def test_a_full_disk_is_said_and_older_checkpoints_stay(saved, monkeypatch):
    """The writer's error reaches the next call, in the thread that can act on it."""
    from orbax.checkpoint import v1 as ocp

    class Full:
        def result(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp, "save_checkpointables_async", lambda *_: Full())
    checkpoints = Checkpoints(saved, keep=1)
    checkpoints.save(3, state_of(3), {})
    checkpoints._writer.join()
    # Told apart from waiting: a loop asks after every step.
    with pytest.raises(CheckpointError, match="3 could not be written .*No space left.* earlier ones are untouched"):
        checkpoints.raise_failure()
    checkpoints.save(4, state_of(4), {})
    with pytest.raises(CheckpointError, match="4 could not be written"):
        checkpoints.wait()
    monkeypatch.undo()
    assert newest(saved)[0] == 2
