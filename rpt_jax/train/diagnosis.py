"""Whether a run can learn: the tasks before the first step, and the records of its steps."""

from collections import deque

import numpy as np

from rpt_jax.config import Config
from rpt_jax.errors import DataError
from rpt_jax.rewards.catalog import needs_box
from rpt_jax.rl.advantages import WITHOUT_GROUP
from rpt_jax.train.domains import Tasks
from rpt_jax.train.progress import console

# Steps whose mean is judged: two or three unlucky batches are no failure.
WINDOW = 12
# Shares from which on almost all rollouts, groups or prompts are of one kind.
_ALMOST_ALL, _MOST = 0.95, 0.5


def diagnose_tasks(tasks: Tasks, config: Config, num_examples: int) -> list[str]:
    """Return what is wrong with a run's tasks, each with what to change.

    Args:
        tasks: to train on.
        config: of the run.
        num_examples: examples of the warm start; 0: there is none.
    """
    rollout, found = config.rollout, []
    per_trunk = rollout.prompts_per_trunk // tasks.source.template.prompts_per_task
    per_batch, number = rollout.num_trunks * per_trunk, len(tasks.ids)
    unit = "questions" if config.questions.path else "positions"
    epochs = config.supervised.num_steps * config.supervised.batch_size / max(1, num_examples)
    memorised = (
        f" The warm start read its {num_examples} examples {epochs:.0f} times. It knows these texts by heart, and as "
        "the proxy it finds few positions uncertain: lower --supervised.num-steps, or set --proxy.path."
        if num_examples and epochs > 20 and not config.proxy.path
        else ""
    )
    if number < per_batch:
        found.append(
            f"{number} {unit} are too few for batches of {per_batch}, so every step repeats them.{memorised} Use more "
            "text, lower --positions.entropy-threshold, or lower --rollout.num-trunks."
        )
    trunks = tasks.source.group(tasks.ids, rollout.prompts_per_trunk)
    padding = 1 - number / (len(trunks) * per_trunk)
    if padding > _MOST:
        found.append(
            f"{padding:.0%} of the prompts of a batch are padding: documents have {number / len(trunks):.1f} {unit} "
            f"on average, and rollout.prompts_per_trunk is {rollout.prompts_per_trunk}. Lower it, raise "
            "--positions.max-positions-per-window, or lower --positions.entropy-threshold."
        )
    return found


def diagnose_steps(records: list[dict]) -> tuple[str, str] | None:
    """Return (cause, why steps taught nothing and what to change); None: they taught something.

    Args:
        records: of consecutive RL steps.
    """
    mean = {name: float(np.mean([r[name] for r in records])) for name in _READ}
    if mean["reward_fault_fraction"] > _MOST:
        return "faults", (
            f"the reward function fails on {mean['reward_fault_fraction']:.0%} of the completions, which earn 0. "
            "Correct the function; --reward.on-fault fail shows a traceback."
        )
    # A reward of one's own may not need a box, so groups whose rewards vary are left alone.
    if mean["degenerate_group_fraction"] <= _ALMOST_ALL:
        return None
    if mean["no_prediction_fraction"] > _ALMOST_ALL:
        none = f"{mean['no_prediction_fraction']:.0%} of the completions have no closed box after </think>"
        if mean["truncated_fraction"] > _MOST:
            return "limit", (
                f"{none}, and {mean['truncated_fraction']:.0%} reach rollout.max_completion_tokens before they end. "
                "Raise --rollout.max-completion-tokens, or teach shorter thoughts in a cold start."
            )
        return "format", f"{none}: {_UNKNOWN_FORMAT}"
    equal = (
        f"in {mean['degenerate_group_fraction']:.0%} of the groups all rollouts earn the same, so nothing is learned"
    )
    if mean["identical_group_fraction"] > _MOST:
        return "collapse", (
            f"{equal}: the policy has collapsed, and in {mean['identical_group_fraction']:.0%} of the groups all "
            "completions are the same. Raise --rollout.temperature, or start again with a lower "
            "--optimizer.learning-rate."
        )
    if mean["reward_any_in_group"] < 1 - _ALMOST_ALL:
        return "hard", (
            f"{equal}: hardly any rollout is right, the tasks are too hard. Use a better policy or a longer cold "
            "start, raise --rollout.group-size, or for positions lower --positions.entropy-threshold."
        )
    if mean["reward_any_in_group"] > _ALMOST_ALL:
        return "easy", (
            f"{equal}: almost every rollout is right, the tasks are too easy. Raise --positions.entropy-threshold, or "
            "use harder questions."
        )
    return "fixed", (
        f"{equal}: each task is always solved or never. Raise --rollout.temperature or --rollout.group-size, or select "
        "with --positions.selector pass_rate_band."
    )


_UNKNOWN_FORMAT = (
    "the policy does not know the response format. Give it a cold start (--supervised.num-steps with "
    "--supervised.draft-fraction or --supervised.path), or a prompt that asks for it (--data.template v6, "
    "--questions.template boxed). A chat model that boxes its answer without a </think> needs "
    "--reward.no-require-think-end."
)
_READ = (
    "reward_fault_fraction", "no_prediction_fraction", "truncated_fraction", "degenerate_group_fraction",
    "identical_group_fraction", "reward_any_in_group",
)  # fmt: skip


class Diagnosis:
    """Watches a run, and says once what keeps it from learning.

    Args:
        config: run.on_diagnosis says whether the run stops then.
    """

    def __init__(self, config: Config):
        self._stops, self._needs_box = config.run.on_diagnosis == "stop", needs_box(config.reward)
        self._needs_groups = config.loss.advantage not in WITHOUT_GROUP
        self._records: deque[dict] = deque(maxlen=WINDOW)
        self._said: set[str] = set()

    def of_tasks(self, messages: list[str]) -> None:
        """Say what is wrong with the tasks.

        Raises:
            DataError: something is, and the run stops on a diagnosis.
        """
        for message in messages:
            self._say("this run may not learn", message, message)

    def of_evaluation(self, figures: dict) -> None:
        """Say at once if almost no completion of the first evaluation has an answer and needs one; the run goes on."""
        everything = figures["splits"]["all"]
        share = everything.get("no_prediction", everything.get("sampled_no_prediction"))["value"]
        if share > _ALMOST_ALL and self._needs_box:
            self._said.add("format")
            console.print(
                f"[yellow]before the first step:[/] {share:.0%} of the completions have no closed box after </think>: "
                f"{_UNKNOWN_FORMAT}",
                highlight=False,
            )

    def add(self, record: dict) -> None:
        """Judge the last steps, with the record of another one.

        Raises:
            DataError: they taught nothing, and the run stops on a diagnosis.
        """
        self._records.append(record)
        if self._needs_groups and len(self._records) == WINDOW and (found := diagnose_steps(list(self._records))):
            self._say(f"steps {record['step'] - WINDOW + 1} to {record['step']} taught little", *found)

    def _say(self, what: str, cause: str, message: str) -> None:
        if self._stops:
            raise DataError(f"{what}: {message} (--run.on-diagnosis warn goes on.)")
        if cause not in self._said:
            self._said.add(cause)
            console.print(f"[yellow]{what}:[/] {message}", highlight=False)
