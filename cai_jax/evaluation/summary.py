"""The summary of a run: means of the response measures over held-out prompts, with intervals.

A column may be None for a response whose value is unknown. Means and differences leave it out. They
also leave out columns of labels, which the scored rows and the report have.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
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
) -> dict[str, list[Any]]:
  """Return the columns of all measures, with one number, or tuple of labels, per response.

  Args:
    measures: the measures, such as those of `suite.load_response_measures`.
    prompts: the messages that each turn answers.
    turns: the responses, with `text` and `num_tokens`.

  Raises:
    UserError: if two measures return the same column, a column has the wrong length, or a rate is
      outside [0, 1].
  """
  columns: dict[str, list[Any]] = {}
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
  for name, values in numeric(columns).items():
    known = [value for value in values if value is not None]
    if not known:
      continue
    result[name] = float(np.mean(known))
    if name.endswith('_rate'):
      result[f'{name}_interval'] = list(rate_interval(known))
  return result


@dataclasses.dataclass(frozen=True)
class Measured:
  """The columns of the responses of one model or round.

  Attributes:
    ids: id of the prompt of each response.
    columns: the number, or the tuple of labels, of each response, by column.
  """

  ids: list[str]
  columns: Mapping[str, Sequence[Any]]


Groups = Mapping[str, Mapping[str, Measured]]  # by group, and by model or round


def summarize(
  base: Iterable[Row],
  aligned: Iterable[Row],
  measures: Sequence[ResponseMeasure],
  baselines: Mapping[str, Iterable[Row]] | None = None,
) -> dict[str, dict[str, Any]]:
  """Return the summary of a run: `average_groups` of `measure_groups`, which has the arguments."""
  return average_groups(measure_groups(base, aligned, measures, baselines))


def measure_groups(
  base: Iterable[Row],
  aligned: Iterable[Row],
  measures: Sequence[ResponseMeasure],
  baselines: Mapping[str, Iterable[Row]] | None = None,
) -> dict[str, dict[str, Measured]]:
  """Return the columns of the responses of a run's models to the same held-out prompts.

  Each measure sees the responses of all models and rounds in one call.

  Args:
    base: rows of M_θ: harmful prompts with their rounds, helpful prompts without.
    aligned: rows of M_aligned, with its responses to the same prompts.
    measures: the measures.
    baselines: rows of each baseline, and of each policy that learnt from preferences, by name, with
      its responses to the same prompts.

  Returns:
    Over harmful prompts, `stages` (initial, revision_1, ...) and `models` (base, aligned and the
    baselines); over helpful prompts, if there are any, `benign` (the same).

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
  # (group, row) → ids, prompts, turns
  responses: dict[tuple[str, str], tuple[list[str], list, list]] = {}
  for kind, group in (('harmful', 'models'), ('helpful', 'benign')):
    rows = [row for row in base if row['kind'] == kind]
    if not rows:
      continue
    ids, prompts = [row['id'] for row in rows], [row['prompt'] for row in rows]
    initial = [row['initial'] | {'reference': None} for row in rows]
    compare = lambda turns, rows=rows: [  # noqa: E731
      turn | {'reference': row['initial']['text']} for turn, row in zip(turns, rows, strict=True)
    ]
    responses[group, 'base'] = ids, prompts, initial
    for name, rows_by_id in others.items():
      turns = compare([rows_by_id[key]['initial'] for key in ids])
      responses[group, name] = ids, prompts, turns
    if kind == 'harmful':
      for number in range(min(len(row['rounds']) for row in rows)):
        turns = compare([row['rounds'][number]['revision'] for row in rows])
        responses['stages', f'revision_{number + 1}'] = ids, prompts, turns
  if not responses:
    return {}
  return _measure(responses, measures)


def _measure(
  responses: Mapping[tuple[str, str], tuple[list[str], list, list]],
  measures: Sequence[ResponseMeasure],
) -> dict[str, dict[str, Measured]]:
  """Return the columns of responses: ids, prompts and turns by group and row."""
  prompts = [prompt for _, some, _ in responses.values() for prompt in some]
  turns = [turn for _, _, some in responses.values() for turn in some]
  whole = measure_responses(measures, prompts, turns)
  groups: dict[str, dict[str, Measured]] = {}
  start = 0
  for (group, name), (ids, _, _) in responses.items():
    stop = start + len(ids)
    columns = {key: values[start:stop] for key, values in whole.items()}
    groups.setdefault(group, {})[name] = Measured(ids, columns)
    start = stop
  if 'models' in groups:  # the initial responses are those of M_θ
    groups['stages'] = {'initial': groups['models']['base'], **groups.get('stages', {})}
  return groups


def average_groups(
  groups: Groups, references: Mapping[str, str] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
  """Return the summary of a run.

  Args:
    groups: the result of `measure_groups`.
    references: for models that are not compared with M_θ, the model to compare with.

  Returns:
    The same groups and names. Each entry is a result of `average_measures`. Each one but the first
    of its group also has `differences`: a revision to the round before, and a model to M_θ or to
    its reference. See
    `comparisons.compare_successive`.
  """
  summary: dict[str, dict[str, Any]] = {}
  for group in ('stages', 'models', 'benign'):
    if group in groups:
      columns = {name: numeric(measured.columns) for name, measured in groups[group].items()}
      compared = {} if group == 'stages' else {**dict.fromkeys(columns, 'base'), **references}
      differences = compare_successive(columns, compared)
      summary[group] = {
        name: _average(measured.columns, len(measured.ids))
        | ({'differences': differences[name]} if name in differences else {})
        for name, measured in groups[group].items()
      }
  return summary


def response_rows(groups: Groups) -> Iterator[dict[str, Any]]:
  """Yield a row for each response of a run, with its numbers.

  Args:
    groups: the result of `measure_groups`.

  Yields:
    `model`, `id` of the prompt, `stage` ('initial' or 'revision_1', ...; only M_θ revises), and
    `columns`: the numbers by column, None where a value is unknown. If measures give labels, there
    are also `labels`: lists of texts by column.
  """
  for group, entries in groups.items():
    for name, measured in entries.items():
      if (group, name) == ('stages', 'initial'):  # the same as M_θ in `models`
        continue
      model, stage = ('base', name) if group == 'stages' else (name, 'initial')
      for i, prompt_id in enumerate(measured.ids):
        numbers = numeric(measured.columns)
        columns = {key: _plain(values[i]) for key, values in numbers.items()}
        row = {'model': model, 'id': prompt_id, 'stage': stage, 'columns': columns}
        labels = {
          key: list(values[i]) for key, values in measured.columns.items() if key not in numbers
        }
        yield row | ({'labels': labels} if labels else {})


def numeric(columns: Mapping[str, Sequence[Any]]) -> Columns:
  """Return the columns of numbers: those whose names do not end in `_labels`."""
  return {name: values for name, values in columns.items() if not name.endswith('_labels')}


def _plain(value: float | None) -> float | None:
  """Return a number as a float, also a bool or one of NumPy's, which JSON lacks."""
  return None if value is None else float(value)
