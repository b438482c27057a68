"""Evaluations of a run: its held-out tasks, by split, logged at the steps that ask for them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rpt_jax.rewards.base import Reward
from rpt_jax.train.domains import Source
from rpt_jax.train.run import Run


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Evaluates policies on the held-out tasks; the first and last evaluation use more of them.

    Attributes:
        start: the policy that RL starts from, for requests of the reward that name it.
    """

    run: Run
    source: Source
    start: Any = None

    def at_step(self, step: int, params, flops: Callable[[], float]) -> None:
        """Evaluate before the first step, every eval.every_steps and after the last, unless that was done."""
        config, directory = self.run.config, self.run.directory
        is_last = step == config.run.num_steps
        if not (is_last or step % config.eval.every_steps == 0) or directory.has_record("evaluation", step):
            return
        figures = self.evaluate(params, thinking=True, final=is_last or step == 0)
        directory.log("evaluation", step, {"flops": flops()} | figures)

    def evaluate(self, params, *, thinking: bool, final: bool) -> dict[str, dict]:
        """{"splits": figures per split, on eval.num_positions tasks of each}.

        Args:
            final: "splits" are on eval.final_num_positions; the others, of which a curve over steps is made, are
                beside them as "curve".
        """
        settings = self.run.config.eval
        limits = {"splits": settings.num_positions}
        if final:
            limits = {"splits": settings.final_num_positions, "curve": settings.num_positions}
        evaluator = self.run.domain.evaluator(self.run, self.source, limits, self._reward)
        figures = evaluator.evaluate(params, start=self.start, thinking=thinking)
        return {which: {name: cells for (w, name), cells in figures.items() if w == which} for which in limits}

    @cached_property
    def _reward(self) -> Reward:
        """Made once: a new one would start processes again."""
        return self.run.make_reward(self.source)
