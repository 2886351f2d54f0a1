"""The summary of a run: means of the response measures over held-out prompts, with intervals.

A column may be None for a response whose value is unknown. Means and differences leave it out.
"""

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
) -> dict[str, list[float | None]]:
  """Return the columns of all measures, with one number per response.

  Args:
    measures: the measures, such as those of `suite.load_response_measures`.
    prompts: the messages that each turn answers.
    turns: the responses, with `text` and `num_tokens`.

  Raises:
    UserError: if two measures return the same column, a column has the wrong length, or a rate is
      outside [0, 1].
  """
  columns: dict[str, list[float | None]] = {}
  for measure in measures:
    for name, values in measure(prompts, turns).items():
      if name in columns:
        raise UserError(f'Two measures return the column {name!r}. Rename one of the two.')
      if len(values) != len(turns):
        raise UserError(
          f'The measure of {name!r} returned {len(values)} values for {len(turns)} responses. It '
          'must return one value per response.'
        )
      known = [value for value in values if value is not None]
      if name.endswith('_rate') and not all(0 <= value <= 1 for value in known):
        raise UserError(
          f'The measure of {name!r} returned {min(known)}..{max(known)}. A rate must be in '
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
  return _average(measure_responses(measures, prompts, turns), len(turns))


def _average(columns: Columns, count: int) -> dict[str, Any]:
  """Return the count, and the mean of each column that has a value, with the interval of a rate."""
  result: dict[str, Any] = {'count': count}
  for name, values in columns.items():
    known = [value for value in values if value is not None]
    if not known:
      continue
    result[name] = float(np.mean(known))
    if name.endswith('_rate'):
      result[f'{name}_interval'] = list(rate_interval(known))
  return result


def summarize(
  base: Iterable[Row],
  aligned: Iterable[Row],
  measures: Sequence[ResponseMeasure],
  baselines: Mapping[str, Iterable[Row]] | None = None,
) -> dict[str, dict[str, Any]]:
  """Return the summary of a run from the rows of its models on the same held-out prompts.

  Each measure sees the responses of all models and rounds in one call.

  Args:
    base: rows of M_θ: harmful prompts with their rounds, helpful prompts without.
    aligned: rows of M_aligned, with its responses to the same prompts.
    measures: the measures.
    baselines: rows of each baseline by name, with its responses to the same prompts.

  Returns:
    Over harmful prompts, `stages` (initial, revision_1, ...) and `models` (base, aligned and the
    baselines); over helpful prompts, if there are any, `benign` (the same). Each entry is a result
    of `average_measures`. Each one but the first of its group also has `differences`: a revision to
    the round before, and a model to M_θ. See `comparisons.compare_successive`.

  Raises:
    UserError: if the models have different prompts.
  """
  base = list(base)
  others = {
    name: {row['id']: row for row in rows}
    for name, rows in {'aligned': aligned, **(baselines or {})}.items()
  }
  for name, rows_by_id in others.items():
    if {row['id'] for row in base} != set(rows_by_id):
      raise UserError(
        f'M_θ and {"M_aligned" if name == "aligned" else name} answered different prompts. '
        'Evaluate both on the same ones.'
      )
  responses: dict[tuple[str, str], tuple[list, list]] = {}  # (group, row) → prompts, turns
  for kind, group in (('harmful', 'models'), ('helpful', 'benign')):
    rows = [row for row in base if row['kind'] == kind]
    if not rows:
      continue
    prompts = [row['prompt'] for row in rows]
    initial = [row['initial'] | {'reference': None} for row in rows]
    compare = lambda turns, rows=rows: [  # noqa: E731
      turn | {'reference': row['initial']['text']} for turn, row in zip(turns, rows, strict=True)
    ]
    responses[group, 'base'] = prompts, initial
    for name, rows_by_id in others.items():
      responses[group, name] = prompts, compare([rows_by_id[row['id']]['initial'] for row in rows])
    if kind == 'harmful':
      for number in range(min(len(row['rounds']) for row in rows)):
        turns = compare([row['rounds'][number]['revision'] for row in rows])
        responses['stages', f'revision_{number + 1}'] = prompts, turns
  return _summarize(responses, measures)


def _summarize(
  responses: Mapping[tuple[str, str], tuple[list, list]], measures: Sequence[ResponseMeasure]
) -> dict[str, dict[str, Any]]:
  """Return the summary of responses: prompts and turns by group and row."""
  if not responses:
    return {}
  prompts, turns = ([x for part in responses.values() for x in part[i]] for i in (0, 1))
  whole = measure_responses(measures, prompts, turns)
  measured: dict[str, dict[str, Columns]] = {}
  start = 0
  for (group, name), (_, part) in responses.items():
    stop = start + len(part)
    measured.setdefault(group, {})[name] = {key: v[start:stop] for key, v in whole.items()}
    start = stop
  if 'models' in measured:  # the initial responses are those of M_θ
    measured['stages'] = {'initial': measured['models']['base'], **measured.get('stages', {})}
  summary: dict[str, dict[str, Any]] = {}
  for group in ('stages', 'models', 'benign'):
    if group in measured:
      rows = measured[group]
      references = {} if group == 'stages' else dict.fromkeys(rows, 'base')
      differences = compare_successive(rows, references)
      count = len(responses['benign' if group == 'benign' else 'models', 'base'][0])
      summary[group] = {
        name: _average(columns, count)
        | ({'differences': differences[name]} if name in differences else {})
        for name, columns in rows.items()
      }
  return summary
