"""Long trials: `make trials`. Each writes its counts to runs/trials/<name>.json; docs/reliability.md lists them."""

import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from test_interruption import run as run_whole
from test_rl import earned, rows_of, run_update
from test_rollout import make_tasks
from test_system import corpus, run_hashes, tiny_run  # noqa: F401  (a fixture)

from experiments import quickstart
from rpt_jax.config import DecoderConfig, LossConfig, MeshConfig
from rpt_jax.errors import CheckpointError
from rpt_jax.models import decoder
from rpt_jax.parallel.interruption import RESUMABLE, STALLED
from rpt_jax.parallel.mesh import make_mesh, shard_batch
from rpt_jax.rl import packing, trainer
from rpt_jax.rollout.engine import generate, rollout_key
from rpt_jax.train.checkpoint import Checkpoints, find_damage
from rpt_jax.train.pipeline import run_stages
from rpt_jax.train.run import newest_state
from rpt_jax.train.run_directory import read_records
from rpt_jax.train.stages.warm_start import warm_start
from rpt_jax.types import Experience, TrainState
from tests.processes import ROOT, finish, flags, start, start_hosts, write_corpus

pytestmark = pytest.mark.slow


@pytest.fixture
def figures(request):
    """A dict that is written to a file if the trial passes."""
    found, failed = {}, request.session.testsfailed
    yield found
    if request.session.testsfailed > failed:
        return
    directory = ROOT / "runs" / "trials"
    directory.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", request.node.name.removeprefix("test_")).strip("_")
    (directory / f"{name}.json").write_text(json.dumps(found, indent=1))
    print(request.node.name, found)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a corpus, and with the compilation cache of all processes."""
    home = tmp_path_factory.mktemp("home")
    write_corpus(home / "corpus")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(home / "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    yield home
    del os.environ["JAX_COMPILATION_CACHE_DIR"], os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]


def result_of(run: Path) -> tuple[str, str, str]:
    """Return a digest of the last checkpoint's arrays, the logged metrics, and a digest of the completions."""
    (last,) = (p for p in (run / "checkpoints" / "rpt").iterdir() if p.name == "4")
    from orbax.checkpoint import v1 as ocp

    state = ocp.load_checkpointables(last, {"state": None})["state"]
    arrays = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state)))
    lines = [r for r in read_records(run) if r["stage"] in ("rpt", "evaluation", "warm_start")]
    steps = [(r["stage"], r["step"]) for r in lines]
    assert len(steps) == len(set(steps)), steps
    tokens = hashlib.sha256()
    for path in sorted((run / "completions").glob("*.parquet")):
        tokens.update(repr(pyarrow.parquet.read_table(path).to_pydict()).encode())
    return arrays.hexdigest(), json.dumps(lines, sort_keys=True), tokens.hexdigest()


@pytest.fixture(scope="module")
def straight(home):
    """Run twice undisturbed; return the result, and the seconds of the second run, which has all programs cached."""
    for name in ("first", "straight"):
        begin = time.monotonic()
        process = start(flags(home / "corpus", home / name, "--checkpoint.every-steps", "1"), home / f"{name}.log")
        assert finish([process], 400) == [0]
    assert result_of(home / "first") == result_of(home / "straight")
    return result_of(home / "straight"), time.monotonic() - begin


def test_thinking_learns_on_the_worked_corpus(tmp_path, figures):
    """A shortened quickstart: the accuracy of sampled thoughts on hard determined positions rises by over half."""
    run = tmp_path / "run"
    quickstart.main(
        ["--run.directory", str(run), "--run.num-steps", "40", "--run.no-control", "--eval.final-num-positions", "200"]
    )
    results = json.loads((run / "results.json").read_text())
    before, after = (results[k]["hard determined"]["sampled_prefix"] for k in ("before", "after"))
    figures |= {"before": before, "after": after}
    assert after["value"] > 1.5 * before["value"]


def test_straight_against_every_stop(corpus, tmp_path, figures, monkeypatch):  # noqa: F811
    """Two updates per batch; tasks are few enough to repeat. One run is stopped after each step, and one ends between
    the two updates of a batch."""

    def config(name):
        base = tiny_run(corpus, tmp_path / name, loss=LossConfig(num_minibatches=2))
        return dataclasses.replace(
            base,
            run=dataclasses.replace(base.run, num_steps=6, control=False),
            positions=dataclasses.replace(base.positions, max_documents=2),
            eval=dataclasses.replace(base.eval, every_steps=2),
        )

    def go(name, stop_at_step=None):
        run = run_stages(config(name), stop_at_step=stop_at_step)
        params = warm_start(run)
        figures["tasks"] = len(run.domain.training_tasks(run, params).ids)
        return run_hashes(run, newest_state(run, params)[0])

    straight = go("straight")
    assert figures["tasks"] < 6 * 8
    for k in range(1, 6):
        go(f"stopped{k}", stop_at_step=k)
        assert go(f"stopped{k}") == straight, k
    calls, update = [], trainer.update

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return update(*args, **kwargs)

    monkeypatch.setattr(trainer, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        go("between")
    monkeypatch.undo()
    assert go("between") == straight
    figures |= {"stops": 5, "ends between two updates": 1, "differing": 0}


def test_kills_at_random_times(home, straight, figures):
    """Send kill -9 to running processes at 50 random times; every run has the result of the undisturbed one."""
    figures |= kill_at_random(home, *straight, kills=50)


# Rollouts of up to 30 tokens, 12 in a step; the loss reads the log-probabilities of the steps that drew them.
WAITING = (
    "--rollout.new-tokens-per-step", "12", "--reward.terms", "likelihood", "--loss.correction.mode", "token_truncate",
)  # fmt: skip


def test_kills_at_random_times_with_rows_in_waiting(home, figures):
    """Send kill -9 at 20 random times while rollouts wait; every run has the result of the undisturbed one."""
    for name in ("first_waiting", "waiting"):
        begin = time.monotonic()
        extra = ("--checkpoint.every-steps", "1", *WAITING)
        process = start(flags(home / "corpus", home / name, *extra), home / f"{name}.log")
        assert finish([process], 400) == [0]
    expected, seconds = result_of(home / "waiting"), time.monotonic() - begin
    assert result_of(home / "first_waiting") == expected
    waited = [r["trunks_waiting"] for r in read_records(home / "waiting") if r["stage"] == "rpt"]
    # In the third step rollouts of the first end and are trained on; others wait before and after.
    assert waited[0] > 0 and waited[2] < waited[1] and waited[3] > 0
    figures |= kill_at_random(home, expected, seconds, WAITING, kills=20) | {"trunks waiting": waited}


def kill_at_random(home: Path, expected: tuple, seconds: float, extra: tuple = (), *, kills: int) -> dict:
    """Kill runs of `seconds` until `kills` of them are killed, and let each finish; return the counts."""
    rng, done, during_save, runs, starts = random.Random(0), 0, 0, 0, 0
    name = f"killed{len(extra)}_"
    while done < kills:
        run = home / f"{name}{runs}"
        runs += 1
        while True:
            arguments = flags(home / "corpus", run, "--checkpoint.every-steps", "1", *extra)
            process, starts = start(arguments, home / "killed.log"), starts + 1
            try:
                status = process.wait(rng.uniform(0.3, 1.0) * seconds if done < kills else 400)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
                saves = run / "checkpoints"
                during_save += any(saves.rglob("*orbax-checkpoint-tmp*")) or any(
                    not (p / "manifest.json").exists() for p in saves.glob("*/*") if p.name.isdigit()
                )
            else:
                assert status == 0, (home / "killed.log").read_text()[-3000:]
                break
        assert result_of(run) == expected
    return {"kills": done, "kills during a save": during_save, "runs": runs, "starts": starts, "differing": 0}


# Recipes in tiny form, shortened, with the warm-start updates after which their samples are sometimes right.
RECIPES = {
    "r1": (400, "--zero", "--cold-steps", "40", "--sft-steps", "3", "--batches", "2", "--texts", "20"),
    "kimi": (60, "--cold-steps", "4", "--sft-steps", "3", "--dpo-steps", "3", "--batches", "1"),
    "rpt_then_rl": (40, "--rl-steps", "2"),
    "ravr": (100, "--sft-steps", "3", "--batches", "2", "--rounds", "2"),
    "inverse_incentive": (20,),
    "base_start": (20, "--cold-steps", "3"),
}
RECIPE_FLAGS = ("--run.num-steps", "2", "--eval.final-num-positions", "20", "--checkpoint.every-steps", "1")


def digest_of_recipe(directory: Path) -> dict[str, str]:
    """Return digests of every step: the arrays of its newest checkpoints, its files, and the figures of its policy."""
    from orbax.checkpoint import v1 as ocp

    found = {}
    for step in sorted(p for p in directory.iterdir() if (p / "judged.json").exists()):
        digest = hashlib.sha256()
        for stage in sorted((step / "checkpoints").glob("*")):
            last = max((p for p in stage.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
            state = ocp.load_checkpointables(last, {"state": None})["state"]
            digest.update(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state)))
        for file in sorted((*step.glob("*.jsonl"), *step.glob("*.safetensors"))):
            if file.name not in ("metrics.jsonl", "times.jsonl", "programs.jsonl"):
                digest.update(file.read_bytes())
        digest.update(json.dumps(json.loads((step / "judged.json").read_text())["figures"]).encode())
        found[step.name] = digest.hexdigest()
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_killed_at_random_stages(name, home, figures):
    """Kill -9 at random times until the recipe is through; every step ends as in the undisturbed recipe."""
    warm, *own = RECIPES[name]
    arguments = [*own, *RECIPE_FLAGS, "--supervised.num-steps", str(warm)]

    def begin(directory: Path):
        log = home / f"{name}.log"
        return start([*arguments, "--run.directory", str(directory)], log, module=f"experiments.recipes.{name}")

    began = time.monotonic()
    assert finish([begin(home / name / "straight")], 1800) == [0], (home / f"{name}.log").read_text()[-3000:]
    seconds, expected = time.monotonic() - began, digest_of_recipe(home / name / "straight")
    rng, kills, killed = random.Random(1), 0, home / name / "killed"
    while True:
        process = begin(killed)
        try:
            status = process.wait(rng.uniform(0.1, 0.6) * seconds if kills < 5 else 1800)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        assert status == 0, (home / f"{name}.log").read_text()[-3000:]
        break
    assert kills and digest_of_recipe(killed) == expected
    figures |= {"kills": kills, "steps": len(expected), "differing": 0}


def test_kills_during_a_save(home, straight, figures):
    """Send kill -9 ten times, as soon as a half-written checkpoint appears; such a checkpoint is never restored."""
    expected, _ = straight
    kills, runs = 0, 0
    while kills < 10:
        run = home / f"saving{runs}"
        arguments, runs, saves = (
            flags(home / "corpus", run, "--checkpoint.every-steps", "1"),
            runs + 1,
            run / "checkpoints",
        )
        seen: set[str] = set()
        while True:
            process = start(arguments, home / "saving.log")
            while process.poll() is None:
                half = {p.name.split(".")[0] for p in saves.glob("*/*orbax-checkpoint-tmp*")} - seen
                if half and kills < 10:
                    process.kill()
                    kills, seen = kills + 1, seen | half
                time.sleep(0.0005)
            if process.wait() == 0:
                break
            assert process.returncode == -signal.SIGKILL, (home / "saving.log").read_text()[-3000:]
        assert result_of(run) == expected
    figures |= {"kills": kills, "runs": runs, "differing": 0}


def test_sigterm_from_outside(home, straight, figures):
    """SIGTERM at ten points of a run: it exits with the resumable status in bounded time, and resumes exactly."""
    expected, seconds = straight
    waits, resumable = [], 0
    for number in range(10):
        run = home / f"terminated{number}"
        arguments = flags(home / "corpus", run, "--checkpoint.every-steps", "1")
        process = start(arguments, home / "terminated.log")
        while process.poll() is None and not (run / "config.json").exists():
            time.sleep(0.05)
        time.sleep(seconds * 0.06 * number)
        if process.poll() is None:
            begin = time.monotonic()
            process.send_signal(signal.SIGTERM)
            status = process.wait(120)
            waits.append(time.monotonic() - begin)
            # After the last stage a signal has its default effect, because there is nothing to save.
            assert status in (RESUMABLE, -signal.SIGTERM), (home / "terminated.log").read_text()[-3000:]
            resumable += status == RESUMABLE
        assert finish([start(arguments, home / "terminated.log")], 400) == [0]
        assert result_of(run) == expected
    assert resumable >= 5
    figures |= {"signals": len(waits), "resumable": resumable, "longest wait, s": round(max(waits), 1), "differing": 0}


def small_state(number: int) -> TrainState:
    params = {"w": jnp.arange(4, dtype=jnp.float32) + number}
    return TrainState(step=jnp.int32(number), params=params, opt_state=(), skipped=jnp.int32(0), companions={})


def test_every_byte_of_a_checkpoint(tmp_path, figures):
    """Flip one bit of each byte of each file in turn; every flip is detected."""
    with Checkpoints(tmp_path / "rpt", keep=2) as checkpoints:
        checkpoints.save(1, small_state(1), {"step": 1})
    path = tmp_path / "rpt" / "1"
    files = [p for p in path.rglob("*") if p.is_file()]
    flips = 0
    for file in files:
        data = bytearray(file.read_bytes())
        for position in range(len(data)):
            data[position] ^= 1 << (position % 8)
            file.write_bytes(data)
            assert find_damage(path), (file, position)
            data[position] ^= 1 << (position % 8)
            flips += 1
        file.write_bytes(data)
    assert find_damage(path) == ""
    figures |= {"files": len(files), "flips": flips, "found": flips}


def test_a_small_disk_runs_full(tmp_path, figures):
    """A file system of 2 MiB: the save that runs out of space reports it, and the previous one is restored."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:

        def state(number):
            params = {"w": jax.random.normal(jax.random.key(number), (400, 400))}
            return TrainState(step=jnp.int32(number), params=params, opt_state=(), skipped=jnp.int32(0), companions={})

        checkpoints = Checkpoints(disk / "rpt", keep=9)
        with pytest.raises(CheckpointError, match="No space left"):
            for number in range(1, 9):
                checkpoints.save(number, state(number), {"step": number})
                checkpoints.wait()
        whole = Checkpoints(disk / "rpt", keep=9)
        restored, record = whole.restore(state(0))
        assert record["step"] == number - 1 and not list((disk / "rpt").glob("*tmp*"))
        np.testing.assert_array_equal(restored.params["w"], state(number - 1).params["w"])
        figures |= {"saved": number - 1, "restored": record["step"]}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4))


def test_one_seed_on_five_meshes(figures):
    """Noise is the same on every mesh; tokens agree except near-ties, and one update's gradients within a tolerance."""
    config = DecoderConfig(
        vocab_size=64, num_layers=3, width=64, mlp_width=96, num_heads=8, num_kv_heads=4, head_size=8
    )
    params = jax.tree.map(np.asarray, decoder.init_params(config, make_mesh(MeshConfig()), jax.random.key(2)))
    params["head"] = 4 * params["head"]
    tasks = make_tasks(config, U=8, M=2, G=8, L=64)
    options = dict(max_completion_tokens=64, temperature=1.0, top_p=1.0, top_k=0, stop_ids=(1,), vocab_size=61)
    results = {}
    for axes in MESHES:
        mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), axes, strict=True))))
        shardings = jax.tree.map(lambda p: p.sharding, decoder.abstract_params(config, mesh))
        placed, batch = jax.device_put(params, shardings), shard_batch(mesh, tasks)
        rollouts = generate(config, placed, batch.prompts, rollout_key(0, 0), **options)
        # The same rollouts on every mesh, so that updates can be compared.
        same = rollouts if axes == MESHES[0] else shard_batch(mesh, results[MESHES[0]]["rollouts"])
        results[axes] = {"rollouts": jax.tree.map(np.asarray, rollouts)}
        rewards = (np.asarray(same.tokens)[..., 0] % 2).reshape(8, 2, 8).astype(np.float32)
        experience = shard_batch(mesh, Experience(
            tasks=jax.tree.map(np.asarray, batch), rollouts=jax.tree.map(np.asarray, same), predictions=None,
            earned=earned(rewards), group_mask=np.asarray(tasks.prompts.prompt_mask),
            tokens_scored=np.zeros(8, np.int32),
        ))  # fmt: skip
        train = rows_of(experience, LossConfig(), header_length=0)
        [plan], _ = packing.plan_update(
            experience.tasks.prompts, train, num_minibatches=1, microbatch_trunks=0, num_shards=axes[0] * axes[1],
            keeps_all=False,
        )  # fmt: skip
        microbatches = [packing.pack(train, *shard_batch(mesh, (m.trunks, m.source))) for m in plan]
        state, metrics = run_update(config, placed, microbatches, mesh)
        results[axes] |= {"mu": jax.tree.map(np.asarray, state.opt_state[1][0].mu), "loss": float(metrics["loss"])}
    base = results[MESHES[0]]
    for axes in MESHES[1:]:
        found = results[axes]
        rows = (found["rollouts"].tokens == base["rollouts"].tokens).all(-1)
        gap = np.abs(found["rollouts"].sampler_logprobs - base["rollouts"].sampler_logprobs)[rows].max()
        leaves = list(zip(jax.tree.leaves(found["mu"]), jax.tree.leaves(base["mu"]), strict=True))
        largest = max(np.abs(b).max() for _, b in leaves)
        update_gap = max(np.abs(a - b).max() for a, b in leaves) / largest
        figures["x".join(map(str, axes))] = {
            "rows": int(rows.size), "rows with the same tokens": int(rows.sum()),
            "largest difference of log-probabilities": float(gap), "relative gap of gradients": float(update_gap),
        }  # fmt: skip
        assert rows.mean() > 0.95 and gap < 1e-4 and update_gap < 1e-5


def numbers(run: Path) -> list[dict]:
    return [r for r in read_records(run) if r["stage"] in ("rpt", "evaluation")]


ON_MESH = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")


def test_two_hosts_are_one_and_either_resumes_for_the_other(home, figures):
    """Whole runs: two processes of four devices, one of eight, stopped on two and finished on one, and the reverse."""

    def two(name, *extra):
        logs = [home / f"{name}-{i}.log" for i in (0, 1)]
        return finish(start_hosts(flags(home / "corpus", home / name, *ON_MESH, *extra), logs, devices=4), 500)

    def one(name, *extra):
        return finish(
            [start(flags(home / "corpus", home / name, *ON_MESH, *extra), home / f"{name}.log", devices=8)], 500
        )

    assert one("one") == [0] and two("two") == [0, 0]
    # A run of two steps equals a stopped run of four: with a constant learning rate, num_steps may change on resume.
    assert two("two-one", "--run.num-steps", "2") == [0, 0] and one("two-one") == [0]
    assert one("one-two", "--run.num-steps", "2") == [0] and two("one-two") == [0, 0]
    base = [r for r in numbers(home / "one") if r["stage"] == "rpt"]
    for name in ("two", "two-one", "one-two"):
        records = [r for r in numbers(home / name) if r["stage"] == "rpt"]
        assert [r["step"] for r in records] == [1, 2, 3, 4]
        gaps = [abs(r[k] - b[k]) for r, b in zip(records, base, strict=True) for k in r if isinstance(r[k], float)]
        figures[name] = {"steps": len(records), "largest difference of a metric": max(gaps)}
        for r, b in zip(records, base, strict=True):
            for metric in ("reward", "completion_tokens", "loss", "grad_norm", "tokens_updated"):
                np.testing.assert_allclose(r[metric], b[metric], rtol=1e-4, atol=1e-6, err_msg=f"{name} {metric}")
        assert max(gaps) == 0.0, name
        # The data cursor: the same tasks in the same places.
        for step in range(1, 5):
            a, b = (
                pyarrow.parquet.read_table(home / n / "completions" / f"step_{step:06d}.parquet")["position_id"]
                for n in (name, "one")
            )
            assert a.equals(b)


@pytest.mark.parametrize("how", ["stalls", "dies"])
def test_one_host_of_two_is_lost(home, figures, how):
    """The other process exits with an error status, within four deadlines."""
    logs = [home / f"{how}-{i}.log" for i in (0, 1)]
    deadline = 30
    limits = ("--distributed.heartbeat-seconds", "15", "--distributed.deadline-seconds", str(deadline))
    long = ("--run.num-steps", "400", "--eval.every-steps", "400")
    arguments = flags(home / "corpus", home / how, *ON_MESH, *limits, *long)
    survivor, victim = start_hosts(arguments, logs, devices=4)
    try:
        end = time.monotonic() + 300
        while not any(r["stage"] == "rpt" for r in read_records(home / how)):
            assert time.monotonic() < end and survivor.poll() is None, logs[0].read_text()[-3000:]
            time.sleep(0.5)
        victim.send_signal(signal.SIGSTOP if how == "stalls" else signal.SIGKILL)
        begin = time.monotonic()
        status = survivor.wait(4 * deadline)
        figures |= {"status": status, "seconds": round(time.monotonic() - begin, 1), "deadline": deadline}
        assert status not in (0, RESUMABLE)
        text = logs[0].read_text()
        assert status == STALLED or any(w in text for w in ("heartbeat", "Connection", "unavailable", "Gloo"))
    finally:
        for process in (survivor, victim):
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


@pytest.mark.parametrize("where", ["rewards", "logits", "loss"])
def test_numbers_that_are_not_finite(corpus, tmp_path, monkeypatch, figures, where):  # noqa: F811
    """From the third step on, updates are skipped and counted and leave the state as it is; then the run stops."""
    base = tiny_run(corpus, tmp_path / "run")
    config = dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, num_steps=12, max_skipped_updates=3),
        eval=dataclasses.replace(base.eval, every_steps=12),
        checkpoint=dataclasses.replace(base.checkpoint, every_steps=1, keep=20),
    )
    bad, calls = float("nan"), []
    roll_out, learn = trainer.Trainer.roll_out, trainer.Trainer.learn

    def poisoned_rollout(self, policies, step, tasks, round_number):
        if where == "logits" and step >= 2:
            current = policies["current"]
            policies = policies | {"current": current | {"final_norm": current["final_norm"] * bad}}
        experience = roll_out(self, policies, step, tasks, round_number)
        if where == "rewards" and step >= 2:
            experience = dataclasses.replace(experience, earned=earned(experience.earned.rewards * bad))
        return experience

    def poisoned_learn(self, state, experience):
        if where == "loss" and int(state.step) >= 2:
            rewards = experience.earned.rewards.at[0, 0, 0].set(float("inf"))
            experience = dataclasses.replace(experience, earned=earned(rewards))
        calls.append([np.asarray(x).tobytes() for x in jax.tree.leaves((state.params, state.opt_state))])
        return learn(self, state, experience)

    monkeypatch.setattr(trainer.Trainer, "roll_out", poisoned_rollout)
    monkeypatch.setattr(trainer.Trainer, "learn", poisoned_learn)
    with pytest.raises(CheckpointError, match="3 updates in a row had a non-finite loss or gradient"):
        run_whole(config)
    records = [r for r in read_records(tmp_path / "run") if r["stage"] == "rpt"]
    assert [r["skipped"] for r in records][:2] == [0, 0] and records[-1]["skipped"] == 3
    assert all(state == calls[2] for state in calls[3:])
    figures |= {"steps": len(records), "skipped": 3, "parameters changed": 0}
