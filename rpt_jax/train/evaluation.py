"""Evaluations of a run on its held-out tasks, by split, logged at fixed steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rpt_jax.parallel.distributed import is_main
from rpt_jax.parallel.programs import needs_memory
from rpt_jax.rewards.base import Reward
from rpt_jax.train.domains import Source
from rpt_jax.train.run import Run


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Evaluates policies on the held-out tasks; the first and last evaluation use more of them.

    Attributes:
        run: the run.
        source: its held-out tasks.
        start: parameters of the policy that RL starts from, for requests of the reward that name it.
        only: the only split to evaluate; empty: all.
    """

    run: Run
    source: Source
    start: Any = None
    only: str = ""

    def at_step(self, step: int, params, flops: Callable[[], float]) -> dict | None:
        """Evaluate before the first step, every eval.every_steps steps and after the last, unless already logged.

        Args:
            step: number of steps done.
            params: of the policy.
            flops: returns the FLOPs so far.
        Returns:
            Figures as `evaluate` returns them; None: nothing was evaluated.
        """
        config, directory = self.run.config, self.run.directory
        is_last = step == config.run.num_steps
        if not (is_last or step % config.eval.every_steps == 0) or directory.has_record("evaluation", step):
            return None
        kept: list[dict[str, list]] = []
        # All processes take part in fetching completions, and one writes them.
        collect = kept.append if is_main() else lambda _: None
        keep = collect if config.run.completions_every_steps else None
        figures = self.evaluate(params, thinking=True, final=is_last or step == 0, keep=keep)
        if kept:
            rows = {name: [value for columns in kept for value in columns[name]] for name in kept[0]}
            directory.write_completions("evaluation", step, rows)
        directory.log("evaluation", step, {"flops": flops()} | figures)
        return figures

    @needs_memory("an evaluation", "--rollout.slots-per-trunk, or --eval.batch-trunks in a new run")
    def evaluate(
        self, params, *, thinking: bool, final: bool, keep: Callable[[dict[str, list]], None] | None = None
    ) -> dict[str, dict]:
        """Return {"splits": {split: figures}}, on up to eval.num_positions tasks of each split.

        Args:
            params: of the policy.
            thinking: False computes the direct figures only.
            final: "splits" use eval.final_num_positions tasks instead, and "curve" is added with the usual number, for
                curves over steps.
            keep: called with the completions of each batch (`rollout.completions`), their style (sampled or greedy) and
                the splits of their tasks.
        """
        settings = self.run.config.eval
        limits = {"splits": settings.num_positions}
        if final:
            limits = {"splits": settings.final_num_positions, "curve": settings.num_positions}
        evaluator = self.run.domain.evaluator(self.run, self.source, limits, self._reward)
        if self.only:
            splits = {key: ids for key, ids in evaluator.splits.items() if key[1] == self.only}
            evaluator = replace(evaluator, splits=splits)
        members = {name: set(ids.tolist()) for (which, name), ids in evaluator.splits.items() if which == "splits"}

        def with_splits(columns: dict[str, list]) -> None:
            splits = [[name for name, ids in members.items() if i in ids] for i in columns["position_id"]]
            keep(columns | {"splits": splits})

        evaluator = replace(evaluator, keep=keep and with_splits)
        figures = evaluator.evaluate(params, start=self.start, thinking=thinking)
        return {which: {name: cells for (w, name), cells in figures.items() if w == which} for which in limits}

    @cached_property
    def _reward(self) -> Reward:
        """Create the reward once, because every instance starts worker processes."""
        return self.run.make_reward(self.source)
