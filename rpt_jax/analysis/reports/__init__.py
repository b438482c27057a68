"""Reports of runs: plots and one self-contained report.html, with one writer per kind of task."""

from rpt_jax.analysis.reports import questions, run

REPORTS = {"documents": run.write_report, "questions": questions.write_report}
