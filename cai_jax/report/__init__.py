"""What a run or an experiment showed: a plain text table, SVG figures and one HTML page.

Everything here takes plain Python data (dicts, lists, numbers, strings), as it stands in a run's
`evaluation/summary.json`, `metrics.jsonl` and `manifest.json`, and imports nothing but the standard
library, so a report can be drawn again on any machine.
"""

from cai_jax.report.experiment import experiment_table, write_experiment, write_figures
from cai_jax.report.figures import Series, line_figure
from cai_jax.report.page import write_report
from cai_jax.report.table import table

__all__ = [
  'Series',
  'experiment_table',
  'line_figure',
  'table',
  'write_experiment',
  'write_figures',
  'write_report',
]
