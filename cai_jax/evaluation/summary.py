"""The summary of a run: means of the response measures over held-out prompts, with intervals."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax.dialogue import Message
from cai_jax.evaluation.comparisons import Columns, compare_successive
from cai_jax.evaluation.intervals import rate_interval
from cai_jax.evaluation.registries import ResponseMeasure, Row, Turn
from cai_jax.runtime.errors import UserError


def measure_responses(
  measures: Sequence[ResponseMeasure],
  prompts: Sequence[Sequence[Message]],
  turns: Sequence[Turn],
) -> dict[str, list[float]]:
  """Return the columns of all measures, with one number per response.

  Args:
    measures: the measures, such as those of `suite.load_response_measures`.
    prompts: the messages that each turn answers.
    turns: the responses, with `text` and `num_tokens`.

  Raises:
    UserError: if two measures return the same column, a column has the wrong length, or a rate is
      outside [0, 1].
  """
  columns: dict[str, list[float]] = {}
  for measure in measures:
    for name, values in measure(prompts, turns).items():
      if name in columns:
        raise UserError(f'Two measures return the column {name!r}. Rename one of the two.')
      if len(values) != len(turns):
        raise UserError(
          f'The measure of {name!r} returned {len(values)} values for {len(turns)} responses. It '
          'must return one value per response.'
        )
      if name.endswith('_rate') and not all(0 <= value <= 1 for value in values):
        raise UserError(
          f'The measure of {name!r} returned {min(values)}..{max(values)}. A rate must be in '
          '[0, 1]; give another name to what is no rate.'
        )
      columns[name] = list(values)
  return columns


def average_measures(
  measures: Sequence[ResponseMeasure],
  prompts: Sequence[Sequence[Message]],
  turns: Sequence[Turn],
) -> dict[str, Any]:
  """Return the number of responses and the mean of each column of `measure_responses`.

  Args:
    measures: the measures.
    prompts: the messages that each turn answers.
    turns: the responses, with `text` and `num_tokens`.

  Returns:
    `count`, and the mean of each column by name. A column whose name ends in `_rate` also has its
    95 % Wilson interval [low, high], named `..._rate_interval`.

  Raises:
    UserError: if there are no responses.
  """
  if not turns:
    raise UserError('There is no response to measure. Give at least one.')
  return _average_columns(measure_responses(measures, prompts, turns), len(turns))


def _average_columns(columns: Columns, count: int) -> dict[str, Any]:
  result: dict[str, Any] = {'count': count}
  for name, values in columns.items():
    result[name] = float(np.mean(values))
    if name.endswith('_rate'):
      result[f'{name}_interval'] = list(rate_interval(values))
  return result


def summarize(
  base: Iterable[Row], aligned: Iterable[Row], measures: Sequence[ResponseMeasure]
) -> dict[str, dict[str, Any]]:
  """Return the summary of a run from the rows of two models on the same held-out prompts.

  Args:
    base: rows of M_θ: harmful prompts with their rounds, helpful prompts without.
    aligned: rows of M_aligned, with its responses to the same prompts.
    measures: the measures.

  Returns:
    Over harmful prompts, `stages` (initial, revision_1, ...) and `models` (base, aligned); over
    helpful prompts, if there are any, `benign` (base, aligned). Each entry is a result of
    `average_measures`. Each one but the first of its group also has `differences` to the entry
    before it, see `comparisons.compare_successive`.

  Raises:
    UserError: if the two models have different prompts.
  """
  base, aligned_rows = list(base), {row['id']: row for row in aligned}
  if {row['id'] for row in base} != set(aligned_rows):
    raise UserError('M_θ and M_aligned answered different prompts. Evaluate both on the same ones.')
  summary: dict[str, dict[str, Any]] = {}
  for kind, group in (('harmful', 'models'), ('helpful', 'benign')):
    rows = [row for row in base if row['kind'] == kind]
    if not rows:
      continue
    prompts = [row['prompt'] for row in rows]
    turns = {
      'base': [row['initial'] for row in rows],
      'aligned': [aligned_rows[row['id']]['initial'] for row in rows],
    }
    columns = {name: measure_responses(measures, prompts, turns[name]) for name in turns}
    summary[group] = _summarize_rows(columns, len(rows))
    if kind == 'harmful':
      stages = {'initial': columns['base']}
      for number in range(min(len(row['rounds']) for row in rows)):
        revisions = [row['rounds'][number]['revision'] for row in rows]
        stages[f'revision_{number + 1}'] = measure_responses(measures, prompts, revisions)
      summary = {'stages': _summarize_rows(stages, len(rows))} | summary
  return summary


def _summarize_rows(columns: Mapping[str, Columns], count: int) -> dict[str, dict[str, Any]]:
  """Return the averages of each row, and its paired differences to the row before."""
  differences = compare_successive(columns)
  return {
    name: _average_columns(row, count)
    | ({'differences': differences[name]} if name in differences else {})
    for name, row in columns.items()
  }
