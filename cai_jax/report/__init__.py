"""Reports of a run or an experiment: a text table, figures, and one HTML page.

All functions take plain Python data, as a run writes it to `evaluation/summary.json`,
`metrics.jsonl` and `manifest.json`. The package does not import JAX, so you can write a report on
any machine.
"""

from cai_jax.report.experiment_figures import write_figures
from cai_jax.report.experiment_page import write_experiment
from cai_jax.report.figure_data import Series
from cai_jax.report.figures import line_figure
from cai_jax.report.findings import Diagnosis, find_problems
from cai_jax.report.run_page import write_report
from cai_jax.report.svg import inline_svg
from cai_jax.report.text_table import experiment_table, summary_table

__all__ = [
  'Diagnosis',
  'Series',
  'experiment_table',
  'find_problems',
  'inline_svg',
  'line_figure',
  'summary_table',
  'write_experiment',
  'write_figures',
  'write_report',
]
