"""Accuracy as a power law of compute: P(C) = A / C^alpha + P* (arXiv:2506.08007 §4.2)."""

from dataclasses import dataclass

import numpy as np

from rpt_jax.errors import DataError

MIN_POINTS, MIN_COMPUTES = 4, 3
# A fit that noise around a constant reaches with a higher probability than this is doubted.
_SIGNIFICANCE = 0.05
_ALPHAS = np.geomspace(0.01, 4.0, 400)


@dataclass(frozen=True, kw_only=True)
class PowerLawFit:
    """A fitted curve. Accuracy that rises with compute has A < 0 and alpha > 0.

    Attributes:
        A: scale.
        alpha: exponent.
        p_star: accuracy in the limit of infinite compute.
        r2: 1 - SS_res / SS_tot; weak evidence for few points, because three constants are fitted.
        compute: f64 [n], FLOPs of the points.
        accuracy: f64 [n], accuracies of the points.
        bootstrap: f64 [samples, 3], (A, alpha, p_star) of residual-bootstrap refits.
    """

    A: float
    alpha: float
    p_star: float
    r2: float
    compute: np.ndarray
    accuracy: np.ndarray
    bootstrap: np.ndarray

    @property
    def p_value(self) -> float:
        """Probability of an R^2 this high if accuracy is constant with normal noise: F-test with 2 and n - 3 degrees.

        For 2 degrees in the numerator the tail is (SS_res / SS_tot)^((n - 3) / 2). The search over alpha makes noise
        fit a little better than that.
        """
        return float(max(0.0, 1 - self.r2) ** ((len(self.compute) - 3) / 2))

    @property
    def doubt(self) -> str:
        """Reason why the points do not determine the constants; empty if none is found."""
        if self.p_value > _SIGNIFICANCE:
            return f"no better than a constant (F-test, p = {self.p_value:.2g})"
        if not 1.01 * _ALPHAS[0] < self.alpha < 0.99 * _ALPHAS[-1]:
            return "α is at the edge of the searched range: not determined"
        are_shares = ((self.accuracy >= 0) & (self.accuracy <= 1)).all()
        if are_shares and not 0 <= self.p_star <= 1:
            return "P* is outside [0, 1]: not determined"
        return ""

    def predict(self, compute):
        """Return the fitted accuracy at `compute` (FLOPs); f64, same shape."""
        return self.A * np.asarray(compute, float) ** -self.alpha + self.p_star

    def band(self, compute, level: float = 0.9):
        """Return (low, high) accuracies at `compute`, f64 [n]: the central `level` of the bootstrap's curves."""
        C = np.asarray(compute, float)
        A, alpha, p_star = (column[:, None] for column in self.bootstrap.T)
        curves = A * C[None] ** -alpha + p_star
        return tuple(np.quantile(curves, [(1 - level) / 2, (1 + level) / 2], axis=0))


def fit_power_law(compute, accuracy, *, num_bootstrap: int = 200, seed: int = 0) -> PowerLawFit:
    """Fit P(C) = A / C^alpha + P* by least squares: a grid over alpha, with (A, P*) solved linearly, then refined.

    Args:
        compute: FLOPs, positive, at least 4 points.
        accuracy: same length.
        num_bootstrap: number of refits to resampled residuals, for `PowerLawFit.band`. Three constants are fitted, so
            residuals are smaller than the noise; they are widened by sqrt(n / (n - 3)). With few points the band is
            still too narrow: with 6, a nominal 90% band contains the curve in about 80 to 85 of 100 simulated cases.
        seed: of the resampling.
    Raises:
        DataError: fewer than 4 points or 3 different computes, different lengths, values that are not finite numbers,
            non-positive compute, or a constant series (R^2 and alpha are undefined).
    """
    try:
        C, P = np.asarray(compute, float), np.asarray(accuracy, float)
    except (TypeError, ValueError) as error:
        raise DataError(f"compute or accuracy is not numbers ({error}); both must be. Correct them.") from error
    if C.shape != P.shape or C.ndim != 1 or len(C) < MIN_POINTS:
        raise DataError(
            f"compute has shape {C.shape} and accuracy {P.shape}; a fit needs two series of equal length with "
            f"at least {MIN_POINTS} points. Evaluate more often (--eval.every-steps)."
        )
    if not (np.isfinite(C).all() and np.isfinite(P).all() and (C > 0).all()):
        raise DataError(
            "compute or accuracy is not finite, or compute is not positive; both must be finite and compute positive. "
            "Drop the point at zero compute."
        )
    # Differences of the size of rounding are not differences.
    constant = [name for name, x in (("accuracy", P), ("compute", C)) if np.ptp(x) <= 1e-9 * np.abs(x).max()]
    if constant:
        raise DataError(
            f"{constant[0]} is constant over all {len(P)} points; a power law needs it to vary. Train longer, or "
            "evaluate another split."
        )
    if len(np.unique(C)) < MIN_COMPUTES:
        raise DataError(
            f"the points have {len(np.unique(C))} different computes; three constants need at least {MIN_COMPUTES}. "
            "Evaluate more often (--eval.every-steps)."
        )
    A, alpha, p_star = _fit(C, P)
    fitted = A * C**-alpha + p_star
    residuals = P - fitted
    rng = np.random.default_rng(seed)
    widened = residuals * np.sqrt(len(P) / (len(P) - 3))
    refits = [_fit(C, fitted + rng.choice(widened, len(P))) for _ in range(num_bootstrap)]
    return PowerLawFit(
        A=A,
        alpha=alpha,
        p_star=p_star,
        r2=float(1 - (residuals**2).sum() / ((P - P.mean()) ** 2).sum()),
        compute=C,
        accuracy=P,
        bootstrap=np.asarray(refits).reshape(-1, 3),
    )


def _fit(C, P) -> tuple[float, float, float]:
    # Compute in units of its geometric mean, because C^-alpha of raw FLOPs would underflow in the solve.
    unit = np.exp(np.log(C).mean())
    x = C / unit

    def solve(alpha):
        basis = np.stack([x**-alpha, np.ones_like(x)], axis=1)
        solution, *_ = np.linalg.lstsq(basis, P, rcond=None)
        return ((basis @ solution - P) ** 2).sum(), solution

    best = int(np.argmin([solve(a)[0] for a in _ALPHAS]))
    low, high = _ALPHAS[max(0, best - 1)], _ALPHAS[min(len(_ALPHAS) - 1, best + 1)]
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if solve(left)[0] < solve(right)[0]:
            high = right
        else:
            low = left
    alpha = (low + high) / 2
    _, (A, p_star) = solve(alpha)
    return float(A * unit**alpha), float(alpha), float(p_star)
