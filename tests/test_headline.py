"""Headlines of made results, read against their figures: no gain is claimed that the figures do not show."""

import pytest

from rpt_jax.analysis.reports.headline import Difference, changed, headline, question_headline, training_summary


def cell(value, error=0.02, n=400):
    return {"value": value, "standard_error": error, "n": n}


def figures(thinking, direct, **splits):
    made = {"all": {"sampled_prefix": cell(*thinking), "direct_prefix": cell(*direct)}}
    return made | {name: {"sampled_prefix": cell(*t), "direct_prefix": cell(*d)} for name, (t, d) in splits.items()}


def made(before, after, control):
    return {"before": before, "after": after, "control": control}


def said(results, hard="all"):
    return " ".join(headline(results, hard))


def test_a_loss_against_the_control_is_said_first():
    """The case that misled: thinking fell within noise, and the control is far ahead."""
    text = said(made(figures([0.35, 0.05], [0.7]), figures([0.27, 0.05], [0.7]), figures([0.3], [0.71])))
    assert text.index("far behind (-0.440") < text.index("did not change beyond noise (-0.080")
    assert "control, next-token training with the same compute, predicts 0.710" in text


def test_a_gain_over_the_control():
    results = made(
        figures([0.5], [0.75], hard=([0.33], [0.11])), figures([0.76], [0.75], hard=([0.95], [0.1])),
        figures([0.5], [0.77], hard=([0.3], [0.17])),
    )  # fmt: skip
    text = said(results, "hard")
    assert "On all held-out positions (n=400), thinking is right in 0.760" in text
    assert "not distinguishable from it (-0.010" in text and "far ahead (+0.780" in text
    assert "rose strongly (+0.260" in text and "rose strongly (+0.620" in text and "on hard: 0.330 → 0.950" in text


def test_a_mixed_result_names_both_splits():
    results = made(
        figures([0.5], [0.7], hard=([0.2], [0.3])), figures([0.6], [0.7], hard=([0.1], [0.3])),
        figures([0.5], [0.55], hard=([0.2], [0.4])),
    )  # fmt: skip
    text = said(results, "hard")
    assert "clearly ahead (+0.050" not in text  # 0.05 ± 0.028 is below two errors
    assert "far behind (-0.300" in text and "rose clearly (+0.100" in text and "fell clearly (-0.100" in text


def test_without_a_control_nothing_is_claimed_about_training():
    text = said(made(figures([0.1], [0.6]), figures([0.5], [0.6]), None))
    assert "the same policy predicts 0.600 ± 0.020 directly" in text and "clearly behind (-0.100" in text
    assert "Without a control, this run cannot tell" in text


@pytest.mark.parametrize("n", [1, 9, 20])
def test_few_positions(n):
    error = 0.0 if n < 10 else 0.1
    text = said(made(figures([0.0, error, n], [0.5, error, n]), figures([1.0, error, n], [0.5, error, n]),
                     figures([0.5, error, n], [0.5, error, n])))  # fmt: skip
    assert "fewer than 50 positions" in text
    if n < 10:
        assert f"with n={n}" in text and "rose" not in text and "ahead" not in text
    else:
        assert "rose strongly" in text


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [(0.02, 0.005, "rose slightly"), (0.05, 0.02, "rose clearly"), (0.3, 0.05, "rose strongly"),
     (-0.3, 0.05, "fell strongly"), (0.3, 0.2, "did not change beyond noise"), (0.0, 0.0, "did not change beyond"),
     (0.0399, 0.02, "did not change beyond noise"), (-0.02, 0.01, "fell slightly")],
)  # fmt: skip
def test_words_follow_from_size_and_error(value, error, words):
    assert changed(Difference(value, error, 400)).startswith(words)


def test_questions_have_their_own_words():
    before, after = {"all": {"sampled": cell(0.2)}}, {"all": {"sampled": cell(0.31), "direct": cell(0.45)}}
    judged = {"config": {"reward": {"terms": ["0.9*math", "0.1*format"]}}}
    text = " ".join(question_headline(made(before, after, None) | judged))
    assert "On 400 held-out questions, 0.310 ± 0.020 of the sampled answers are right" in text
    assert "rose clearly (+0.110" in text and "clearly behind (-0.140" in text and "position" not in text
    few = {"all": {"sampled": cell(0.31, 0.1, 20)}}
    assert "fewer than 50 questions" in " ".join(question_headline(made(before, few, None) | judged))
    # A reward of one's own is no share of right answers, and has a sentence.
    own = {"config": {"reward": {"terms": ["custom"]}}}
    before["all"]["reward"], after["all"]["reward"] = cell(0.5), cell(0.9)
    text = " ".join(question_headline(made(before, after, None) | own))
    assert "0.310 ± 0.020 of the sampled answers are right" in text
    assert "The mean reward rose strongly (+0.400 ± 0.028): 0.500 → 0.900." in text
    # Texts that a judge scores have no answer.
    before["all"]["no_prediction"], after["all"]["no_prediction"] = cell(1.0), cell(1.0)
    text = " ".join(question_headline(made(before, after, None) | own))
    assert "boxes no answer" in text and "answers are right" not in text and "The mean reward rose" in text


def test_training_is_summed_up():
    steps = [{"degenerate_group_fraction": 0.5, "padded_prompt_fraction": -1e-8}, {"degenerate_group_fraction": 0.7}]
    text = training_summary(steps)
    assert "in 60% of the groups (such groups" in text and "and 0% of the prompts" in text
    assert "an unknown share" in training_summary([])
