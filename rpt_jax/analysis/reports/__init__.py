"""Run directories as pages: plots and one self-contained report.html, by the kind of tasks."""

from rpt_jax.analysis.reports import questions, run

REPORTS = {"documents": run.write_report, "questions": questions.write_report}
