"""The power-law fit: it recovers the generating constants, and refuses points that it cannot fit."""

import dataclasses

import numpy as np
import pytest

from rpt_jax.analysis.scaling import fit_power_law
from rpt_jax.errors import DataError


@pytest.mark.parametrize(("A", "alpha", "p_star"), [(-3e6, 0.35, 0.52), (-1.0e4, 0.2, 0.9), (-4.0e20, 1.0, 0.4)])
def test_recovers_exact_curves(A, alpha, p_star):
    compute = np.geomspace(1e20, 1e21, 6)
    fit = fit_power_law(compute, A / compute**alpha + p_star, num_bootstrap=2)
    np.testing.assert_allclose([fit.A, fit.alpha, fit.p_star], [A, alpha, p_star], rtol=2e-3)
    assert fit.r2 > 1 - 1e-9


def test_band_covers_the_truth_and_widens_with_noise():
    compute = np.geomspace(1e12, 1e14, 8)
    truth = 0.8 - 0.5 * (compute / 1e12) ** -0.5
    rng = np.random.default_rng(0)
    narrow, wide = (fit_power_law(compute, truth + s * rng.standard_normal(8)) for s in (0.002, 0.03))
    low, high = narrow.band(compute)
    assert ((low - 0.01 <= truth) & (truth <= high + 0.01)).all()
    width = lambda fit: np.subtract(*fit.band(compute)[::-1]).mean()  # noqa: E731
    assert width(wide) > 3 * width(narrow)
    # R^2 by its definition.
    residual = ((wide.accuracy - wide.predict(compute)) ** 2).sum()
    np.testing.assert_allclose(wide.r2, 1 - residual / ((wide.accuracy - wide.accuracy.mean()) ** 2).sum())


def test_constants_that_the_points_do_not_determine_are_doubted():
    assert fit_power_law([1, 2, 4, 8], [0.1, 0.3, 0.4, 0.45], num_bootstrap=2).doubt == ""
    # A jump followed by a plateau is steeper than any power law in the searched range.
    assert "α is at the edge" in fit_power_law([1, 2, 4, 8, 16], [0.1, 0.5, 0.5, 0.5, 0.5], num_bootstrap=2).doubt
    # 1.2 - C^-0.5 is in [0, 1] at all points, but its limit is not. Points above 1 are not shares: any limit is fine.
    C = np.array([1.0, 2, 4, 8, 16])
    assert "P* is outside [0, 1]" in fit_power_law(C, 1.2 - C**-0.5, num_bootstrap=2).doubt
    assert fit_power_law(C, 2.2 - C**-0.5, num_bootstrap=2).doubt == ""


def test_noise_is_doubted():
    """F-test by its table: with 2 and 3 degrees, F = 9.552 has p = 0.05; noise passes about that often."""
    F, degrees = 9.552, 3
    r2 = F * 2 / (F * 2 + degrees)
    fit = fit_power_law([1, 2, 4, 8, 16, 32], [0.1, 0.3, 0.4, 0.45, 0.47, 0.48], num_bootstrap=1)
    np.testing.assert_allclose(dataclasses.replace(fit, r2=r2).p_value, 0.05, rtol=1e-3)
    rng, compute = np.random.default_rng(0), np.geomspace(1e12, 1e14, 8)
    noise = [fit_power_law(compute, 0.5 + 0.02 * rng.standard_normal(8), num_bootstrap=1).doubt for _ in range(40)]
    assert sum(not doubt for doubt in noise) <= 6
    assert sum("no better than a constant" in doubt for doubt in noise) >= 20


@pytest.mark.parametrize(
    ("compute", "accuracy", "message"),
    [
        ([1, 2, 3], [0.1, 0.2, 0.3], "at least 4 points"),
        ([1, 2, 3, 4], [0.1, 0.2, 0.3], "two series of equal length"),
        ([1, 2, 3, 4], [0.5] * 4, "accuracy is constant"),
        ([2] * 4, [0.1, 0.2, 0.3, 0.4], "compute is constant"),
        ([1, 2, 3, 4], [0.5, 0.5, 0.5, 0.5 + 1e-16], "accuracy is constant"),
        ([1, 1, 2, 2, 2], [0.1, 0.2, 0.3, 0.4, 0.5], "2 different computes"),
        (["a", 2, 3, 4], [0.1, 0.2, 0.3, 0.4], "not numbers"),
        ([1, 2, 3, 4], [[0.1], [0.2, 0.3], 0.4, 0.5], "not numbers"),
        ([0, 1, 2, 3], [0.1, 0.2, 0.3, 0.4], "compute positive"),
        ([1, 2, 3, np.nan], [0.1, 0.2, 0.3, 0.4], "finite"),
    ],
)
def test_refusals(compute, accuracy, message):
    with pytest.raises(DataError, match=message):
        fit_power_law(compute, accuracy)
