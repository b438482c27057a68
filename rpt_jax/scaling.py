"""The power-law fit, under the name by which other code imports it; it lives in `analysis/scaling.py`."""

from rpt_jax.analysis.scaling import PowerLawFit, fit_power_law

__all__ = ["PowerLawFit", "fit_power_law"]
