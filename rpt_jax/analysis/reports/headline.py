"""The first sentences of a report, written from its figures: outcome against the control first, then the change.

A difference is compared with the standard errors of both figures. Its words follow from its size and from that ratio:
below two errors nothing is claimed.
"""

from dataclasses import dataclass

from rpt_jax.rewards.catalog import VERIFIERS

# Differences from which on "clearly" and "far" are said.
_CLEARLY, _FAR = 0.03, 0.15
# Fewer positions than this make a figure that only large differences can be read from.
_FEW = 50
# From fewer than these nothing is read: ten figures that agree may have no error and still show little.
_TOO_FEW = 10


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies.

    Attributes:
        value: of the difference.
        error: its standard error, from those of both figures.
        n: positions of the smaller figure.
    """

    value: float
    error: float
    n: int

    @staticmethod
    def of(new: dict, old: dict) -> "Difference":
        """Return new - old, both {"value", "standard_error", "n"}."""
        error = (new["standard_error"] ** 2 + old["standard_error"] ** 2) ** 0.5
        return Difference(new["value"] - old["value"], error, min(new["n"], old["n"]))

    @property
    def is_shown(self) -> bool:
        """Return whether the figures show a difference, which is at least two errors."""
        return self.n >= _TOO_FEW and abs(self.value) >= 2 * self.error and self.value != 0

    @property
    def size(self) -> str:
        """Return how large it is, in a word."""
        return "far" if abs(self.value) >= _FAR else "clearly" if abs(self.value) >= _CLEARLY else "slightly"

    def __str__(self) -> str:
        return f"{self.value:+.3f} ± {self.error:.3f}"


def against(difference: Difference) -> str:
    """Return how one accuracy stands to another: "far behind (-0.171 ± 0.042)"."""
    if difference.n < _TOO_FEW:
        return f"not comparable, with n={difference.n}"
    if not difference.is_shown:
        return f"not distinguishable from it ({difference})"
    return f"{difference.size} {'ahead' if difference.value > 0 else 'behind'} ({difference})"


def changed(difference: Difference) -> str:
    """Return how an accuracy changed: "rose clearly (+0.178 ± 0.030)"."""
    if difference.n < _TOO_FEW:
        return f"was measured with n={difference.n}, too few to show a change"
    if not difference.is_shown:
        return f"did not change beyond noise ({difference})"
    word = {"far": "strongly", "clearly": "clearly", "slightly": "slightly"}[difference.size]
    return f"{'rose' if difference.value > 0 else 'fell'} {word} ({difference})"


def headline(results: dict, hard: str) -> list[str]:
    """Return the sentences for a run on documents; plain text.

    Args:
        results: with before, after and control, each {split: {metric: figures}}; control may be None.
        hard: the split of hard positions that the report leads with; "all" if there is none.
    """
    sentences, splits = [], ["all", *([hard] if hard != "all" else [])]
    for split in splits:
        after = results["after"][split]
        thinking, direct = after["sampled_prefix"], after["direct_prefix"]
        where = (
            "all held-out positions" if split == "all" else f"{split} ones" if split == "hard" else f"the {split} ones"
        )
        what = f"On {where} (n={thinking['n']}), thinking is right in {_share(thinking)}"
        if results["control"]:
            control = results["control"][split]["direct_prefix"]
            sentences.append(
                f"{what}; the control, next-token training with the same compute, predicts {_share(control)} without "
                f"thinking. Thinking is {against(Difference.of(thinking, control))}."
            )
        else:
            sentences.append(
                f"{what}; the same policy predicts {_share(direct)} directly. Thinking is "
                f"{against(Difference.of(thinking, direct))}."
            )
    if not results["control"]:
        sentences.append(
            "Without a control, this run cannot tell what plain training with its compute would have reached."
        )
    changes = []
    for split in splits:
        before, after = (results[k][split]["sampled_prefix"] for k in ("before", "after"))
        name = "all" if split == "all" else split
        changes.append(
            f"{changed(Difference.of(after, before))} on {name}: {before['value']:.3f} → {after['value']:.3f}"
        )
    sentences.append(f"With RPT, thinking {'; it '.join(changes)}.")
    if splits and min(results["after"][s]["sampled_prefix"]["n"] for s in splits) < _FEW:
        sentences.append(f"With fewer than {_FEW} positions, only large differences could be seen.")
    return sentences


_NO = {"value": 0.0}


def question_headline(results: dict) -> list[str]:
    """Return the sentences for a run on questions; plain text. Arguments as in `headline`, without control."""
    before, after = (results[k]["all"] for k in ("before", "after"))
    figures = after["sampled"]
    change, earlier = Difference.of(figures, before["sampled"]), before["sampled"]["value"]
    has_answers = min(of.get("no_prediction", _NO)["value"] for of in (before, after)) < 1
    sentences = [
        f"On {figures['n']} held-out questions, {_share(figures)} of the sampled answers are right. With RL this share "
        f"{changed(change)}: {earlier:.3f} → {figures['value']:.3f}."
        if has_answers
        else f"On {figures['n']} held-out questions the policy boxes no answer, so none is right or wrong."
    ]
    if results["config"]["reward"]["terms"][0].rpartition("*")[2] not in VERIFIERS:
        old, new = before["reward"], after["reward"]
        sentences.append(
            f"The mean reward {changed(Difference.of(new, old))}: {old['value']:.3f} → {new['value']:.3f}."
        )
    if "direct" in after:
        difference = Difference.of(figures, after["direct"])
        sentences.append(
            f"The most likely letter without thinking is right in {_share(after['direct'])}; thinking is "
            f"{against(difference)}."
        )
    if figures["n"] < _FEW:
        sentences.append(f"With fewer than {_FEW} questions, only large differences could be seen.")
    return sentences


def training_summary(steps: list[dict]) -> str:
    """Return a sentence on the batches of training: groups that taught nothing, and padding.

    Args:
        steps: records of RL steps; those of earlier versions may lack figures.
    """

    def mean(name: str) -> str:
        values = [r[name] for r in steps if name in r]
        return f"{max(0.0, sum(values) / len(values)):.0%}" if values else "an unknown share"

    return (
        f"On average, all rollouts earned the same in {mean('degenerate_group_fraction')} of the groups (such groups "
        f"teach nothing), and {mean('padded_prompt_fraction')} of the prompts of a batch were padding."
    )


def _share(figures: dict) -> str:
    return f"{figures['value']:.3f} ± {figures['standard_error']:.3f}"
