"""Leave groups with little spread out of the update, measured against the spread of earlier steps.

Source: RLPR, arXiv:2506.18254 §3.3, and OpenBMB/RLPR `RayPPOTrainer.filter`. Differs: the deviation divides by G, on
both sides of the comparison.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from rpt_jax.types import Experience

# Steps whose mean deviation the moving mean starts from (counted from 1), and its decay.
_FIRST, _LAST, _DECAY = 6, 10, 0.99


@dataclass
class DeviationFilter:
    """The moving mean of the groups' deviations, and the bound that follows from it.

    Attributes:
        beta: a group is kept if its deviation is at least beta times the moving mean.
        decay: of the moving mean.
        steps: observed so far.
        mean: moving mean; before step 11, the sum over steps 6 to 10 so far.
    """

    beta: float
    decay: float = _DECAY
    steps: int = 0
    mean: float = 0.0

    @property
    def bound(self) -> float:
        """Return the bound for the next step; 0 for the first ten."""
        return self.beta * self.mean if self.steps >= _LAST else 0.0

    def observe(self, deviation: float) -> None:
        """Take in the mean deviation of a step's groups."""
        self.steps += 1
        if self.steps > _LAST:
            self.mean = self.decay * self.mean + (1 - self.decay) * deviation
        elif self.steps >= _FIRST:
            self.mean += deviation / (_LAST - _FIRST + 1)

    def apply(self, experience: Experience) -> Experience:
        """Mask the groups below the bound, and observe the step."""
        mask_UM, deviation = _kept(experience, self.bound)
        self.observe(float(deviation))
        return replace(experience, group_mask=mask_UM)

    def get_state(self) -> list:
        """Return what `set_state` takes; JSON-able."""
        return [self.steps, self.mean]

    def set_state(self, state: list) -> None:
        self.steps, self.mean = int(state[0]), float(state[1])


@jax.jit
def _kept(experience: Experience, bound):
    """Return (groups that take part bool [U, M], mean deviation of the groups of real prompts)."""
    deviations_UM = experience.earned.rewards.std(-1)
    mean = jnp.mean(deviations_UM, where=experience.tasks.prompts.prompt_mask)
    return experience.group_mask & (deviations_UM >= bound), mean
