"""The page of an experiment: its arms side by side, figures, settings and costs."""

import os
from collections.abc import Sequence
from typing import Any

from cai_jax.report.differences import SEED_INTERVALS, difference_html, explain_marks
from cai_jax.report.elements import (
  cost_cell,
  escape,
  fact_list,
  figure,
  figure_grid,
  fold,
  format_value,
  note_list,
  number_html,
  preformatted,
  section,
)
from cai_jax.report.experiment_figures import draw_figures
from cai_jax.report.numbers import MISSING, cell, heading
from cai_jax.report.page import write_page
from cai_jax.report.results import (
  check_results,
  describe_comparison,
  fact_names,
  group_title,
  number_row,
  rows_by_group,
)
from cai_jax.report.svg import inline_svg
from cai_jax.runtime.errors import UserError

COSTS = {
  'turns': 'turns sampled',
  'reused_turns': 'turns reused',
  'tokens': 'tokens',
  'seconds': 'seconds',
  'peak_memory_bytes': 'peak memory',
}
MAXIMUM_COSTS = ('peak_memory_bytes',)  # the total is the maximum; all other costs are summed


def write_experiment(
  path: str | os.PathLike, results: dict[str, Any], chains: Sequence[dict[str, Any]]
) -> None:
  """Write the page of an experiment atomically.

  Args:
    path: the HTML file; its folder must exist.
    results: the results, as `cai_jax.report.results` describes.
    chains: chains in the form of `write_report`, each with the name of its `arm` and a unique id.

  Raises:
    UserError: if the results are malformed or a chain's arm does not exist.
  """
  check_results(results)
  arms = list(results['arms'])
  for chain in chains:
    if chain.get('arm') not in arms:
      raise UserError(
        f'Chain {chain.get("id")!r} has the arm {chain.get("arm")!r}. It must be one of {arms}.'
      )
  arm_table = _arm_table(results)  # first, since it checks every number
  figures = [
    figure(
      spec['caption'],
      inline_svg(drawing),
      wide=len(spec.get('metrics', ())) > 1,
    )
    for spec, drawing in zip(results['figures'], draw_figures(results), strict=True)
  ]
  sections = section('Settings', _setting_table(results))
  if results['costs']:
    sections += section('Costs', _cost_tables(results['costs']))
  write_page(
    path,
    title=results['title'],
    head=_head(results),
    results=arm_table
    + note_list(results['notes'])
    + figure_grid(figures)
    + fold('Values by seed', _seed_table(results)),
    sections=sections,
    chains=list(chains),
  )


def _head(results: dict[str, Any]) -> str:
  first, _, rest = results['docstring'].strip().partition('\n\n')
  facts = {
    'base configuration': results['base'],
    'seeds': ', '.join(map(str, results['seeds'])),
    'arms': len(results['arms']),
    'reference': results['reference'],
  }
  head = fact_list(facts) + f'<p class="lead">{escape(first)}</p>'
  return head + (fold('The whole description', preformatted(rest)) if rest.strip() else '')


def _arm_table(results: dict[str, Any]) -> str:
  facts, metrics = fact_names(results), results['metrics']
  head = '<th scope="col" class="label">scored</th>'
  head += ''.join(f'<th scope="col">{escape(name)}</th>' for name in (*facts, 'count'))
  head += ''.join(f'<th scope="col" class="metric">{escape(heading(m))}</th>' for m in metrics)
  width = 3 + len(facts) + len(metrics)
  body = []
  for group, rows in rows_by_group(results):
    title = escape(group_title(group))
    body.append(f'<tbody><tr><th colspan="{width}" scope="rowgroup">{title}</th></tr>')
    for name, row in rows.items():
      arm = results['arms'][name]
      cells = f'<td class="label">{escape(arm["response"].replace("_", " "))}</td>'
      cells += ''.join(
        f'<td>{escape(format_value(arm["facts"].get(fact, MISSING)))}</td>' for fact in facts
      )
      cells += f'<td>{row["count"]:,}</td>'
      for metric in metrics:
        number = number_html(number_row(row, metric), metric)
        cells += f'<td class="metric">{number}{difference_html(row, metric)}</td>'
      body.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    body.append('</tbody>')
  marks = explain_marks(
    [row for _, rows in rows_by_group(results) for row in rows.values()], '▼ lower', '▲ higher'
  )
  note = (
    f'In brackets: {SEED_INTERVALS}. Second lines: paired difference '
    f'{describe_comparison(results)} (pp: percentage points); {marks}.'
  )
  return (
    f'<div class="scroll"><table class="results arms"><thead><tr><td></td>{head}</tr></thead>'
    f'{"".join(body)}</table></div><p class="note">{escape(note)}</p>'
  )


def _seed_table(results: dict[str, Any]) -> str:
  seeds, metrics = [str(seed) for seed in results['seeds']], results['metrics']
  head = ''.join(
    f'<th scope="colgroup" colspan="{len(seeds)}">{escape(heading(metric))}</th>'
    for metric in metrics
  )
  seed_row = ''.join(f'<th scope="col">{escape(seed)}</th>' for seed in seeds) * len(metrics)
  body = []
  for group, rows in rows_by_group(results):
    title, width = escape(group_title(group)), 1 + len(seeds) * len(metrics)
    body.append(f'<tbody><tr><th colspan="{width}" scope="rowgroup">{title}</th></tr>')
    for name, row in rows.items():
      values = [
        cell({metric: row['metrics'].get(metric, {}).get('by_seed', {}).get(seed)}, metric)
        for metric in metrics
        for seed in seeds
      ]
      cells = ''.join(f'<td>{escape(value)}</td>' for value in values)
      body.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    body.append('</tbody>')
  return (
    '<div class="scroll"><table class="results"><thead>'
    f'<tr><td></td>{head}</tr><tr><th scope="row">seed</th>{seed_row}</tr></thead>'
    f'{"".join(body)}</table></div>'
  )


def _setting_table(results: dict[str, Any]) -> str:
  """Return a table of the config fields in which arms differ."""
  fields = {field: dict(arms) for field, arms in results['config_differences'].items()}
  for name, arm in results['arms'].items():
    for field, value in arm['overrides'].items():
      fields.setdefault(field, {}).setdefault(name, value)
  base = escape(results['base'])
  if not fields:
    return f'<p class="none">All arms use the configuration {base}.</p>'
  head = ''.join(f'<th scope="col">{escape(field)}</th>' for field in fields)
  rows = []
  for name in results['arms']:
    values = [format_value(arms[name]) if name in arms else MISSING for arms in fields.values()]
    cells = ''.join(f'<td>{escape(value)}</td>' for value in values)
    rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
  return (
    f'<div class="scroll"><table class="settings"><thead><tr><th scope="col">arm</th>{head}</tr>'
    f'</thead><tbody>{"".join(rows)}</tbody></table></div>'
    f'<p class="note">Fields in which arms differ; {MISSING}: as in {base}.</p>'
  )


def _cost_tables(costs: list[dict[str, Any]]) -> str:
  total = _total_costs(costs)
  stages = [
    {'stage': stage} | _total_costs([row for row in costs if row['stage'] == stage])
    for stage in dict.fromkeys(row['stage'] for row in costs)
  ]
  details = _cost_table(costs, ('run', 'seed', 'stage'), total)
  return _cost_table(stages, ('stage',), total) + fold('By run, seed and stage', details)


def _total_costs(rows: list[dict[str, Any]]) -> dict[str, float]:
  total = {}
  for key in COSTS:
    values = [row[key] for row in rows if row.get(key) is not None]
    if values:
      total[key] = max(values) if key in MAXIMUM_COSTS else sum(values)
  return total


def _cost_table(rows: list[dict[str, Any]], names: tuple[str, ...], total: dict[str, float]) -> str:
  keys = [key for key in COSTS if key in total]

  def cells(row: dict[str, Any]) -> str:
    return ''.join(f'<td>{cost_cell(key, row.get(key))}</td>' for key in keys)

  body = []
  for row in rows:
    first, *rest = (escape(row[name]) for name in names)
    labels = ''.join(f'<td class="label">{value}</td>' for value in rest)
    body.append(f'<tr><th scope="row">{first}</th>{labels}{cells(row)}</tr>')
  head = ''.join(f'<th scope="col" class="label">{name}</th>' for name in names)
  head += ''.join(f'<th scope="col">{COSTS[key]}</th>' for key in keys)
  return (
    f'<div class="scroll"><table class="costs"><thead><tr>{head}</tr></thead>'
    f'<tbody>{"".join(body)}</tbody>'
    f'<tfoot><tr><th scope="row" colspan="{len(names)}">all</th>{cells(total)}</tr></tfoot>'
    '</table></div>'
  )
