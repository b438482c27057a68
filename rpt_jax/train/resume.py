"""Where a run resumes: at its newest checkpoint, at an earlier one, or as a copy of another run."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from rpt_jax.config import Config, OptimizerConfig
from rpt_jax.errors import CheckpointError
from rpt_jax.parallel.distributed import is_main, main_first
from rpt_jax.train.checkpoint import find_damage, steps_of
from rpt_jax.train.progress import console
from rpt_jax.train.run_directory import read_config, read_json, read_records, write_atomically

# Files that a copy takes over along with checkpoints: facts that are recorded once and must stay the same.
_FACTS = ("policy.json", "proxy.json", "corpus.json", "versions.json", "chat.json", "stop_ids.json")


@dataclass(frozen=True)
class Resume:
    """The parsed value of --run.resume."""

    step: int | None = None
    """None: the newest checkpoint."""
    source: Path | None = None
    """The run to copy into a new directory; None: resume the run in the directory."""

    @staticmethod
    def parse(text: str) -> "Resume":
        """Parse latest, STEP, DIR or DIR@STEP."""
        if text == "latest":
            return Resume()
        if text.isdigit():
            return Resume(step=int(text))
        directory, at, step = text.rpartition("@")
        if at and step.isdigit():
            return Resume(step=int(step), source=Path(directory))
        return Resume(source=Path(text))


def begin_as_copy(config: Config, identity: dict) -> None:
    """Copy the checkpoints and records of the run that --run.resume names, if any, into a new run directory.

    The new run has its own config. It must read the same corpus with the same tokenizer and template.

    Args:
        config: of the new run.
        identity: identifies the data, as `RunDirectory` stores it.
    Raises:
        CheckpointError: the source is not a run, or has other data, adapters on other base weights, or no intact
            checkpoint of that step; or the directory already holds something else; or copying failed.
    """
    resume, target = Resume.parse(config.run.resume), Path(config.run.directory)
    if resume.source is None:
        return
    with main_first("copy of a run"):
        if not is_main():
            return
        asked = {"run": str(resume.source), "step": resume.step}
        has_begun = (target / "forked.json").exists() and read_json(target / "forked.json") == asked
        if (target / "config.json").exists() and has_begun:
            return  # the copy exists: this is a restart
        if ((target / "config.json").exists() or (target / "checkpoints").exists()) and not has_begun:
            raise CheckpointError(
                f"run.resume={config.run.resume!r} starts a new run, but {target} already holds something else. Choose "
                "another --run.directory; to go back in a run, give only the step."
            )
        if not (resume.source / "config.json").exists():
            raise CheckpointError(
                f"run.resume={config.run.resume!r}: {resume.source} is not a run (no config.json); the value must be "
                "latest, a step, or the directory of a run. Correct --run.resume."
            )
        if read_json(resume.source / "corpus.json") != identity:
            raise CheckpointError(
                f"run.resume={config.run.resume!r} is a run on other data; a copy must keep the corpus, tokenizer and "
                "template. To train its policy on other data, export it and set --policy.path."
            )
        _check_same_base(read_config(resume.source, say=False), config)
        step = _whole_step(resume)
        target.mkdir(parents=True, exist_ok=True)
        # The marker is written first and the config last, so that an interrupted copy is made again.
        write_atomically(target / "forked.json", json.dumps(asked, indent=2))
        shutil.rmtree(target / "checkpoints", ignore_errors=True)
        stages = resume.source / "checkpoints"
        try:
            shutil.copytree(stages / "rpt" / str(step), target / "checkpoints" / "rpt" / str(step))
            if (stages / "warm_start").exists():
                shutil.copytree(stages / "warm_start", target / "checkpoints" / "warm_start")
            for name in _FACTS:
                if (resume.source / name).exists():
                    shutil.copy(resume.source / name, target / name)
            problem = find_damage(target / "checkpoints" / "rpt" / str(step))
        except (OSError, shutil.Error) as error:
            problem = str(error)
        if problem:
            raise CheckpointError(
                f"{resume.source} could not be copied at step {step} ({problem}); it must not change during the copy. "
                "Run the same command again."
            )
        kept = [r for r in read_records(resume.source) if _is_before(r, step)]
        write_atomically(target / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in kept))
        write_atomically(target / "config.json", config.to_json())
        console.print(f"started as a copy of {resume.source} at step {step}")


def _check_same_base(old: Config, new: Config) -> None:
    """Check that adapters get the base weights that they were trained on, which each run computes itself."""
    if not old.lora.rank and not new.lora.rank:
        return

    def base(config: Config) -> dict:
        made_by = {"lora": config.lora, "model": config.model, "policy.param_dtype": config.policy.param_dtype}
        if config.supervised.num_steps:
            made_by["supervised"] = replace(config.supervised, control_optimizer=OptimizerConfig())
        if config.supervised.num_steps or not config.policy.path:
            made_by["run.seed"] = config.run.seed
        return made_by

    (before, after), nothing = map(base, (old, new)), "not used"
    for name in sorted({*before, *after}):
        if before.get(name, nothing) != after.get(name, nothing):
            raise CheckpointError(
                f"run.resume={new.run.resume!r} has adapters made with {name}={before.get(name, nothing)}, but this "
                f"run has {after.get(name, nothing)}; their base weights must stay the same. Use the same value."
            )


def _whole_step(resume: Resume) -> int:
    directory = resume.source / "checkpoints" / "rpt"
    steps = steps_of(directory)
    for step in reversed(steps) if resume.step is None else [resume.step]:
        if not (problem := find_damage(directory / str(step))):
            return step
        console.print(f"[bold red]checkpoint {directory / str(step)}[/]: {problem}")
    raise CheckpointError(
        f"{directory} has no intact checkpoint to start from; there are steps {steps}. Choose another --run.resume."
    )


def _is_before(record: dict, step: int) -> bool:
    limit = {"warm_start": float("inf"), "rpt": step, "evaluation": step - 1}.get(record["stage"], -1)
    return record["step"] <= limit
