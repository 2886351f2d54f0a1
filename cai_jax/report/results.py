"""The results of an experiment as plain data: their schema, a check, and access to their parts.

All arms are compared with one of them, the reference, on the same prompts and seeds:

  {'name': 'revisions', 'title': 'Does every further revision help?', 'docstring': '...',
   'base': 'configs/tiny.py', 'seeds': [0, 1], 'reference': 'initial',
   'metrics': ['violation_rate', 'mean_tokens'],
   'arms': {'revision 1': {
     'response': 'revision_1', 'overrides': {'feedback.rounds': 4}, 'facts': {'coverage': 4.0},
     'groups': {'harmful': {
       'count': 1200,
       'metrics': {'violation_rate': {
         'value': 0.54, 'interval': [0.5, 0.58], 'by_seed': {'0': 0.54, '1': 0.52}}},
       'differences': {'violation_rate': {
         'value': -0.33, 'interval': [-0.36, -0.3], 'p_value': 1e-9, 'adjusted_p_value': 3e-9}}}}}},
   'figures': [
     {'kind': 'line', 'caption': '...', 'group': 'harmful', 'x_label': '...', 'y_label': '...',
      'series': [{'name': '...', 'metric': 'violation_rate', 'arms': ['revision 1'], 'x': [1]}]},
     {'kind': 'arms', 'caption': '...', 'group': 'harmful', 'metrics': [...], 'arms': [...]},
     {'kind': 'differences', 'caption': '...', 'group': 'harmful', 'metrics': [...], 'arms': [...]},
     {'kind': 'frontier', 'caption': '...', 'arms': [...],
      'x': ['harmful', 'violation_rate'], 'y': ['helpful', 'helpful_rate']}],
   'config_differences': {'feedback.rounds': {'revision 1': 4}},
   'costs': [{'run': 'feedback.rounds=4', 'seed': 0, 'stage': 'generate', 'turns': 5600,
              'reused_turns': 700, 'tokens': 100000, 'seconds': 13.2, 'peak_memory_bytes': 2**30}],
   'notes': ['A sentence to show as it is.']}

Every arm has the group 'harmful'. Other groups and single metrics may be absent, and a value may be
None. Tables and figures of kind 'arms' or 'differences' (the paired differences of the arms) then
show a dash, and lines have a gap. A figure of kind
'frontier' needs every value.

If the facts of an arm have `COMPARED_WITH`, its differences are to what that names, such as another
response of the same run, and not to the reference.

Metrics named `*_rate` are in [0, 1]; they are shown in per cent and their differences in percentage
points. Differences are paired, arm minus reference, and the reference itself has none. Their
p-values may be absent.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.runtime.errors import UserError

COMPARED_WITH = 'compared with'  # the fact that names what an arm's differences are to
FIELDS = ('name', 'title', 'docstring', 'base', 'seeds', 'reference', 'metrics', 'arms', 'figures')
FIGURE_FIELDS = {
  'line': ('caption', 'group', 'x_label', 'y_label', 'series'),
  'arms': ('caption', 'group', 'metrics', 'arms'),
  'differences': ('caption', 'group', 'metrics', 'arms'),
  'frontier': ('caption', 'x', 'y', 'arms'),
}


def check_results(results: dict[str, Any]) -> None:
  """Check that the results have every field that the page, the figures and the table read.

  Args:
    results: the results of an experiment.

  Raises:
    UserError: if a field is missing, or a figure cannot be drawn.
  """
  _require(results, (*FIELDS, 'config_differences', 'costs', 'notes'), 'results')
  arms = results['arms']
  if results['reference'] not in arms:
    raise UserError(
      f'The reference {results["reference"]!r} is not an arm. The arms are {list(arms)}.'
    )
  for name, arm in arms.items():
    _require(arm, ('response', 'overrides', 'facts', 'groups'), f'arm {name!r}')
    if 'harmful' not in arm['groups']:
      raise UserError(
        f'Arm {name!r} has the groups {list(arm["groups"])}. It also needs "harmful".'
      )
    for group, row in arm['groups'].items():
      where = f'arm {name!r}, {group}'
      _require(row, ('count', 'metrics'), where)
      for kind in ('metrics', 'differences'):
        for metric, number in row.get(kind, {}).items():
          _require(number, ('value', 'interval'), f'{where}, {kind} {metric!r}')
  check_figures(results['figures'])
  for row in results['costs']:
    _require(row, ('run', 'seed', 'stage'), 'a row of costs')


def check_figures(figures: Sequence[Mapping[str, Any]]) -> None:
  """Check that specifications of figures have every field that is drawn.

  Args:
    figures: the specifications.

  Raises:
    UserError: if a field is missing, a figure's kind is unknown, or a series has not one x for each
      arm.
  """
  for number, figure in enumerate(figures, 1):
    where = f'figure {number}'
    _require(figure, ('kind',), where)
    if figure['kind'] not in FIGURE_FIELDS:
      raise UserError(
        f'{where} is of kind {figure["kind"]!r}. The kinds are {list(FIGURE_FIELDS)}.'
      )
    _require(figure, FIGURE_FIELDS[figure['kind']], f'{where} ({figure["kind"]})')
    for series in figure['series'] if figure['kind'] == 'line' else ():
      _require(series, ('name', 'metric', 'arms', 'x'), f'{where}, a series')
      arms, x = series['arms'], series['x']
      if len(x) != len(arms) or not all(isinstance(value, int | float) for value in x):
        raise UserError(
          f'{where}, series {series["name"]!r} has the arms {list(arms)} and x={list(x)}. Give one '
          'number for each arm.'
        )


def _require(fields: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
  missing = [key for key in keys if key not in fields]
  if missing:
    raise UserError(f'{where} has no {", ".join(map(repr, missing))}. It needs {", ".join(keys)}.')


def fact_names(results: dict[str, Any]) -> list[str]:
  """Return the names of all facts that any arm states, in order."""
  return list(dict.fromkeys(fact for arm in results['arms'].values() for fact in arm['facts']))


def rows_by_group(results: dict[str, Any]) -> list[tuple[str, dict[str, dict[str, Any]]]]:
  """Return (group, {arm: its row}) for each group, in order."""
  arms = results['arms']
  groups = dict.fromkeys(group for arm in arms.values() for group in arm['groups'])
  return [
    (group, {name: arm['groups'][group] for name, arm in arms.items() if group in arm['groups']})
    for group in groups
  ]


def describe_comparison(results: dict[str, Any]) -> str:
  """Return what the differences of the arms are to, for a note below the table."""
  if COMPARED_WITH in fact_names(results):
    return f'to what the column "{COMPARED_WITH}" names'
  return f'to {results["reference"]!r}'


def group_title(group: str) -> str:
  """Return the title of a group, such as 'Harmful prompts'."""
  return f'{group.capitalize()} prompts'


def number_row(row: dict[str, Any], metric: str) -> dict[str, Any]:
  """Return one metric of an arm in the form that `cai_jax.report.numbers.cell` takes.

  Args:
    row: the results of one arm in one group.
    metric: the metric's name.
  """
  number = row['metrics'].get(metric)
  return {metric: number['value'], f'{metric}_interval': number['interval']} if number else {}
