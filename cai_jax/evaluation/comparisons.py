"""Paired differences between the rows of a summary, with p-values adjusted for their family."""

from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.evaluation.intervals import holm, paired_difference, paired_p_value

Columns = Mapping[str, Sequence[float | None]]  # by measure, one number per response


def compare_successive(
  rows: Mapping[str, Columns], references: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
  """Compare each row with the row before it, such as a revision round with the round before.

  Args:
    rows: the columns of each row. All rows answer the same prompts in the same order. Prompts
      whose value is None in one of two rows are left out of their comparison.
    references: for rows that are not compared with the row before, the row to compare with.

  Returns:
    For each row but the first, the difference of each measure: `to` (the other row), `value` (row
    minus other row), `interval` (95 %), `p_value`, and `adjusted_p_value`, which Holm's method
    adjusts for all rows with the same measure. A measure that one of the two rows lacks is left
    out.
  """
  names = list(rows)
  differences: dict[str, dict[str, Any]] = {name: {} for name in names[1:]}
  for preceding, name in zip(names, names[1:], strict=False):
    before = (references or {}).get(name, preceding)
    for measure, values in rows[name].items():
      pairs = [
        (x, y)
        for x, y in zip(values, rows[before].get(measure, [None] * len(values)), strict=True)
        if x is not None and y is not None
      ]
      if pairs:
        new, old = zip(*pairs, strict=True)
        estimate = paired_difference(new, old)
        differences[name][measure] = {
          'to': before,
          'value': estimate.value,
          'interval': [estimate.low, estimate.high],
          'p_value': paired_p_value(new, old),
        }
  for measure in dict.fromkeys(measure for row in differences.values() for measure in row):
    family = [row[measure] for row in differences.values() if measure in row]
    adjusted = holm([entry['p_value'] for entry in family])
    for entry, p_value in zip(family, adjusted, strict=True):
      entry['adjusted_p_value'] = p_value
  return differences
