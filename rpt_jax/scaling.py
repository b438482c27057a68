"""Alias of `analysis/scaling.py`, the power-law fit."""

from rpt_jax.analysis.scaling import PowerLawFit, fit_power_law

__all__ = ["PowerLawFit", "fit_power_law"]
