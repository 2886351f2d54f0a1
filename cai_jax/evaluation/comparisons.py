"""Paired differences between the rows of a summary, with p-values adjusted for their family."""

from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.evaluation.intervals import holm, paired_difference, paired_p_value

Columns = Mapping[str, Sequence[float]]  # by measure, one number per response


def compare_successive(rows: Mapping[str, Columns]) -> dict[str, dict[str, Any]]:
  """Compare each row with the row before it, such as a revision round with the round before.

  Args:
    rows: the columns of each row. All rows answer the same prompts in the same order.

  Returns:
    For each row but the first, the difference of each measure: `to` (the row before), `value` (row
    minus row before), `interval` (95 %), `p_value`, and `adjusted_p_value`, which Holm's method
    adjusts for all rows with the same measure. A measure that one of the two rows lacks is left
    out.
  """
  names = list(rows)
  differences: dict[str, dict[str, Any]] = {name: {} for name in names[1:]}
  for before, name in zip(names, names[1:], strict=False):
    for measure, values in rows[name].items():
      if measure in rows[before]:
        estimate = paired_difference(values, rows[before][measure])
        differences[name][measure] = {
          'to': before,
          'value': estimate.value,
          'interval': [estimate.low, estimate.high],
          'p_value': paired_p_value(values, rows[before][measure]),
        }
  for measure in dict.fromkeys(measure for row in differences.values() for measure in row):
    family = [row[measure] for row in differences.values() if measure in row]
    adjusted = holm([entry['p_value'] for entry in family])
    for entry, p_value in zip(family, adjusted, strict=True):
      entry['adjusted_p_value'] = p_value
  return differences
